"""What a saved `UNet2DModel` and its pipeline may say, before anything of that size is built."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddim_schedulers.reading import Place, read_json, safetensors_shapes

LEVELS, LAYERS, CHANNELS, SIDE = 16, 64, 16384, 16384  # far above every published network


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _list(holds: Callable[[Any], bool], most: int = LEVELS) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and 0 < len(v) <= most and all(map(holds, v))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_side = _integer(1, SIDE)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sample_size": (
        lambda v: v is None or _side(v) or (_list(_side, 2)(v) and len(v) == 2),
        f"null, an integer or two, 1 to {SIDE}",
    ),
    **dict.fromkeys(
        ("in_channels", "out_channels"),
        (_integer(1, CHANNELS), f"an integer, 1 to {CHANNELS}"),
    ),
    "block_out_channels": (
        _list(_integer(1, CHANNELS)),
        f"a list of 1 to {LEVELS} integers, 1 to {CHANNELS}",
    ),
    **dict.fromkeys(
        ("down_block_types", "up_block_types"),
        (_list(_is_name), f"a list of 1 to {LEVELS} names"),
    ),
    "layers_per_block": (_integer(1, LAYERS), f"an integer, 1 to {LAYERS}"),
    "norm_num_groups": (_integer(1, CHANNELS), f"an integer, 1 to {CHANNELS}"),
    **dict.fromkeys(
        ("attn_norm_num_groups", "attention_head_dim", "time_embedding_dim"),
        (_or_null(_integer(1, CHANNELS)), f"null or an integer, 1 to {CHANNELS}"),
    ),
    **dict.fromkeys(
        ("num_class_embeds", "num_train_timesteps"),
        (_or_null(_integer(1, 10**6)), "null or an integer, 1 to 1000000"),
    ),
    "downsample_padding": (_integer(0, 8), "an integer, 0 to 8"),
    "norm_eps": (_number(0, 1), "a number, 0 to 1"),
    "dropout": (_number(0, 1), "a number, 0 to 1"),
    "freq_shift": (_number(-1e6, 1e6), "a number"),
    "mid_block_scale_factor": (_number(-1e6, 1e6), "a number"),
    **dict.fromkeys(
        ("act_fn", "downsample_type", "upsample_type", "resnet_time_scale_shift"),
        (_is_name, "a name"),
    ),
    **dict.fromkeys(("mid_block_type", "class_embed_type"), (_or_null(_is_name), "null or a name")),
    "time_embedding_type": (
        lambda v: v in ("positional", "fourier", "learned"),
        "positional, fourier or learned",
    ),
    **dict.fromkeys(
        ("center_input_sample", "flip_sin_to_cos", "add_attention"), (_is_flag, "true or false")
    ),
}


def check_network_config(config: Mapping[str, Any], path: Place) -> None:
    """Check the types and sizes in the config of a `UNet2DModel`; keys may be absent.

    Raises:
        ValueError: naming the file, the key, its value and what is allowed.
    """
    for key, (holds, allowed) in _RULES.items():
        if key in config and not holds(config[key]):
            raise ValueError(
                f"{str(path)!r}: `{key}` is {str(config[key])[:80]!r}; it must be {allowed}."
            )
    lists = ("block_out_channels", "down_block_types", "up_block_types")
    lengths = {key: len(config[key]) for key in lists if key in config}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{str(path)!r}: {lengths} values; there must be as many of each.")


# What diffusers reads of a saved pipeline before it looks at the rest.
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")


def check_saved(folder: Place) -> None:
    """Check the configs and the headers of the weights that lie in the folder of a saved pipeline.

    For loaders that read by themselves, as diffusers' `from_pretrained`; what is no folder passes.

    Raises:
        ValueError: naming the first file that cannot be read, or as `check_network_config`.
    """
    root = Path(folder)
    for path in sorted(p for pattern in ("*", "*/*") for p in root.glob(pattern)):
        if path.name in _CONFIGS:
            config = read_json(path)
            if config.get("_class_name") == "UNet2DModel":
                check_network_config(config, path)
        elif path.suffix == ".safetensors":
            safetensors_shapes(path)


def check_complete(network: Any, place: Place) -> None:
    """Check that every weight of a loaded network was in its file: diffusers only warns.

    Raises:
        ValueError: naming the first that was not.
    """
    lost = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if lost:
        raise ValueError(
            f"the weights of {str(place)!r} lack {len(lost)} tensors that its config asks for, "
            f"among them {lost[0]}."
        )
