"""Whether a checkpoint is of the run that is to go on: by contents, not by names of files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging

from ddim_schedulers.reading import read_json
from ddim_schedulers.training.common.versions import versions
from ddim_schedulers.training.config import COMPUTED_FROM, TrainingConfig
from ddim_schedulers.training.data.streams import held_out_of_stream
from ddim_schedulers.training.objectives.losses import bound_variance

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer.trainer import Trainer

logger = logging.get_logger(__name__)

STAMPED = ("torch", "diffusers", "accelerate", "ddim_schedulers")
_REMEDY = "start a new run in another output_dir (from_pretrained takes its weights)"
_MEANING = {
    "data": "the images, their bytes or their names",
    "gamma": "the weights in the file of gamma",
    "labels": "the labels of the images, or the names of their classes",
    "vae": "the autoencoder, or the scale of its latents",
    "mixed_precision": "mixed_precision",
    "allow_tf32": "allow_tf32",
}


def require_same_run(trainer: "Trainer", state: dict[str, Any], folder: Path) -> None:
    """Compare settings, data, network and precision with those of a checkpoint.

    Other versions of packages, and what an old checkpoint does not hold, are only warned about.

    Args:
        trainer: of the run that goes on.
        state: what `state.json` of the checkpoint holds.
        folder: the checkpoint.

    Raises:
        ValueError: something that changes what is computed is not as it was.
    """
    now, before = trainer.contents, state.get("contents", {})
    same_files = _same_files(now, before)
    if "data" not in before and trainer.config.split == "all":
        same_files.add("split")  # older versions read a folder of splits whole
    _require_same_settings(trainer.config, state["config"], same_files)
    _require_same_data(describe_data(trainer), state["data"], trainer.data.source.understood)
    _require_same_contents(now, before)
    _require_same_network(trainer, folder)
    if not trainer.accelerator.is_main_process:
        return
    if unknown := [_MEANING[name] for name in now if name not in before]:
        logger.warning(
            f"checkpoint {folder} is of an older version and does not hold {_and(unknown)}; "
            "whether they changed since cannot be compared"
        )
    was, are = state.get("versions", {}), versions(*STAMPED)
    if other := [
        f"{n} was {was[n]} and is {are[n]}" for n in STAMPED if was.get(n, are[n]) != are[n]
    ]:
        logger.warning(
            f"checkpoint {folder} was written by other versions: {', '.join(other)}; numbers may "
            "differ from those of a run without a break"
        )


def describe_data(trainer: "Trainer") -> dict[str, Any]:
    """Return how many images there are, and of which kind."""
    count = None if trainer.stream is not None else len(trainer.data)
    return {"images": count, "shape": list(trainer.data.shape), "levels": trainer.data.levels}


def _same_files(now: dict[str, Any], before: dict[str, Any]) -> set[str]:
    """Return settings that name a file whose contents are known to be what they were."""
    same = {"model"}  # the network itself is compared
    if "data" in before and now["data"] == before["data"]:
        same.add("data")
    if before.get("gamma") is not None and now["gamma"] == before["gamma"]:
        same.add("gamma")
    if before.get("vae") is not None and now.get("vae") == before["vae"]:
        same |= {"vae", "vae_revision"}
    return same


def _require_same_settings(
    config: TrainingConfig, before: dict[str, Any], same_files: set[str]
) -> None:
    now, defaults = config.to_dict(), TrainingConfig().to_dict()
    before = defaults | before  # a setting that the run did not know had its default
    same = {"variance_type"} if _trained_variance(before) == _trained_variance(now) else set()
    names = sorted(COMPUTED_FROM - same_files - same - {"max_train_steps"})
    changed = [name for name in names if before[name] != now[name]]
    if now["streaming"] and not changed:
        # They decide which images of a stream are trained on.
        names = ["validate_every", "validation_images"]
        parts = [held_out_of_stream(*(values[k] for k in names)) for values in (before, now)]
        changed = names if parts[0] != parts[1] else []
    if changed:
        pairs = ", ".join(f"{k} was {before[k]!r} and is {now[k]!r}" for k in changed)
        raise ValueError(
            f"`resume` names a checkpoint of a run with other settings: {pairs}; start a new run "
            "(from_pretrained takes its weights) or set them back"
        )


def _trained_variance(settings: dict[str, Any]) -> str | None:
    """Return what training depends on in `variance_type`; a fixed one matters to the bound."""
    variance = bound_variance(settings["variance_type"])
    return variance if variance == "learned_range" or settings["loss"] == "vlb" else None


def _require_same_data(now: dict[str, Any], before: dict[str, Any], understood: str) -> None:
    if now != before:
        read = f" ({understood}; split 'all' reads all)" if understood.startswith("split") else ""
        raise ValueError(
            f"`resume` names a checkpoint of a run on other data: they were {before} and are "
            f"{now}{read}; bring the images back, or start a new run (from_pretrained "
            "takes its weights)"
        )


def _require_same_contents(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in ("data", "gamma", "labels", "vae"):
        if name in now and name in before and now[name] != before[name]:
            raise ValueError(
                f"`resume` names a checkpoint of a run on other contents: {_MEANING[name]} are not "
                f"those that it was trained with so far; bring them back, or {_REMEDY}"
            )
    for name in ("mixed_precision", "allow_tf32"):
        if name in before and now[name] != before[name]:
            raise ValueError(
                f"`resume` names a checkpoint of a run of another precision: {name} was "
                f"{before[name]!r} and is {now[name]!r}; set it back, or {_REMEDY}"
            )


def _require_same_network(trainer: "Trainer", folder: Path) -> None:
    before = read_json(folder / "unet" / "config.json")
    now = json.loads(trainer.unet.to_json_string())
    changed = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in sorted(before)
        if not name.startswith("_") and name in now and before[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"`resume` names a checkpoint of another network: {', '.join(changed)}; set model and "
            f"dropout back, or {_REMEDY}"
        )


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
