"""The spelling of flags: dashes or underscores; an unknown one is an error."""

import argparse
import difflib
import re
from collections.abc import Mapping

# What the same settings are called in diffusers' `train_unconditional.py`.
STOCK_NAMES = {
    "adam_weight_decay": "weight_decay",
    "checkpointing_steps": "checkpoint_every",
    "checkpoints_total_limit": "keep_last",
    "dataloader_num_workers": "num_workers",
    "dataset_config_name": "data_config",
    "dataset_name": "data",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_num_steps": "num_train_timesteps",
    "ema_max_decay": "ema_decay",
    "learning_rate": "lr",
    "logger": "tracker",
    "lr_scheduler": "lr_schedule",
    "model_config_name_or_path": "model",
    "num_epochs": "max_train_steps",
    "resolution": "image_size",
    "resume_from_checkpoint": "resume",
    "train_batch_size": "batch_size",
    "train_data_dir": "data",
}


def spelled(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Return the words of `argv` with each flag as `parser` spells it: dashes become underscores.

    A flag that it does not know is `parser.error`, with the nearest one that it does. This happens
    before anything else, for what is missing may be what was misspelt.
    """
    flags = parser._option_string_actions
    own = {flag.replace("_", "-"): flag for flag in flags if flag.startswith("--")}
    words = list(argv)
    for index, word in enumerate(words):
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or flag in flags:
            continue
        if (known := own.get(flag.replace("_", "-"))) is None:
            names = sorted({name[2:].replace("-", "_") for name in own})
            parser.error(f"unknown flag {flag}{nearest(flag[2:], names, '--')}")
        words[index] = f"{known}{equals}{value}"
    return words


def nearest(name: str, names: list[str], prefix: str) -> str:
    """Return the end of a message about an unknown `name`: the nearest of `names`, or a hint."""
    name = name.replace("-", "_")
    close = [STOCK_NAMES[name]] if STOCK_NAMES.get(name) in names else []
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    few = len(names) <= 30
    return f"; allowed: {', '.join(names)}" if few else "; see --help for all names"


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a message with the arguments that it quotes called as the user knows them.

    Args:
        text: e.g. "`class_labels[0]` is 'cow'; ...".
        names: what to call an argument, by its name, e.g. {"class_labels": "--labels"}.
    """
    return re.sub(r"`(\w+)", lambda found: f"`{names.get(found[1], found[1])}", text)
