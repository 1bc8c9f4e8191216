"""Bounds on the config of a saved `UNet2DModel` and its pipeline, checked before it is built."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddim_schedulers.class_labels import MOST_CLASSES, labels_in
from ddim_schedulers.reading import Place, check_archive, read_json, safetensors_shapes

# Far above every published network.
LEVELS, LAYERS, CHANNELS, SIDE = 12, 16, 16384, 16384
VALUES = 2**28  # of one image: channels x height x width, 1 GiB in float32
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
PARAMETERS = 4 * 10**9  # 16 GB in float32; the largest of ADM has 5.5e8


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
        (_or_null(_integer(1, MOST_CLASSES)), f"null or an integer, 1 to {MOST_CLASSES}"),
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


def _check_rules(
    rules: Mapping[str, tuple[Callable[[Any], bool], str]], config: Mapping[str, Any], path: Place
) -> None:
    for key, (holds, allowed) in rules.items():
        if key in config and not holds(config[key]):
            raise ValueError(
                f"{str(path)!r}: `{key}` is {str(config[key])[:80]!r}; it must be {allowed}."
            )


def check_network_config(config: Mapping[str, Any], path: Place) -> None:
    """Check the config of a `UNet2DModel` and the size of the network; keys may be absent.

    The numbers come first, each by its own bound, then the whole: the network is built without
    memory for its weights (on torch's device `meta`), and has at most `PARAMETERS` of them.

    Raises:
        ValueError: naming the file, the key, its value and what is allowed.
    """
    _check_rules(_RULES, config, path)
    lists = ("block_out_channels", "down_block_types", "up_block_types")
    lengths = {key: len(config[key]) for key in lists if key in config}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"`{key}` has {length}" for key, length in lengths.items())
        raise ValueError(f"{str(path)!r}: {said} values; there must be as many of each.")
    size, channels = config.get("sample_size") or 1, config.get("in_channels", 1)
    values = channels * (math.prod(size) if isinstance(size, list | tuple) else size**2)
    if values > VALUES:
        raise ValueError(
            f"{str(path)!r}: `sample_size` is {size!r} and `in_channels` is {channels}, images of "
            f"{values} values; they must have at most {VALUES}."
        )
    if config.get("class_embed_type") is None:
        try:
            labels_in(config)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}.") from None
    _check_parameters(config, path)


def _check_parameters(config: Mapping[str, Any], path: Place) -> None:
    import torch
    from diffusers import UNet2DModel

    known = inspect.signature(UNet2DModel.__init__).parameters
    given = {key: value for key, value in config.items() if key in known}
    try:
        with torch.device("meta"):
            network = UNet2DModel(**given)
    except Exception as error:  # its blocks refuse what does not fit in many ways
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{str(path)!r} is refused, as no UNet2DModel has these settings "
            f"({type(error).__name__}: {said}); settings must fit each other."
        ) from error
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > PARAMETERS:
        raise ValueError(
            f"{str(path)!r} has {count} parameters; it must have at most {PARAMETERS}."
        )


_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
_AUTOENCODER_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{
        key: _RULES[key]
        for key in (
            "sample_size",
            "in_channels",
            "out_channels",
            "block_out_channels",
            "down_block_types",
            "up_block_types",
            "layers_per_block",
            "norm_num_groups",
        )
    },
    **dict.fromkeys(_WIDTHS, _RULES["block_out_channels"]),
    **dict.fromkeys(
        ("num_encoder_blocks", "num_decoder_blocks"),
        (_list(_integer(1, LAYERS)), f"a list of 1 to {LEVELS} integers, 1 to {LAYERS}"),
    ),
    "latent_channels": _RULES["in_channels"],
    "vq_embed_dim": (_or_null(_integer(1, CHANNELS)), f"null or an integer, 1 to {CHANNELS}"),
    "num_vq_embeddings": (_integer(1, 2**20), "an integer, 1 to 2**20"),
    "upsampling_scaling_factor": (_integer(1, 8), "an integer, 1 to 8"),
}


def check_autoencoder_config(config: Mapping[str, Any], path: Place) -> None:
    """Check the numbers in the config of an autoencoder; keys may be absent.

    Raises:
        ValueError: naming the file, the key, its value and what is allowed.
    """
    _check_rules(_AUTOENCODER_RULES, config, path)


# What diffusers reads of a saved pipeline before it looks at the rest.
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")


def check_saved(folder: Place) -> None:
    """Check the configs and the headers of the weights that lie in the folder of a saved pipeline.

    For loaders that read the files themselves, as diffusers' `from_pretrained`. What is no folder
    passes.

    Raises:
        ValueError: naming the first file that cannot be read, or as `check_network_config`, or for
            an index that names other classes than a `UNet2DModel` and a scheduler.
    """
    root = Path(folder)
    for path in sorted(p for pattern in ("*", "*/*") for p in root.glob(pattern)):
        if path.name in _CONFIGS:
            config = read_json(path)
            if path.name == "model_index.json" and path.parent == root:
                _check_classes(config, path)
            # whatever class it says it is of: the index decides what is built
            elif path.name == "config.json" and path.parent in (root, root / "unet"):
                check_network_config(config, path)
            elif path.name == "config.json" and path.parent in (root / "vqvae", root / "vae"):
                check_autoencoder_config(config, path)
        elif path.suffix == ".safetensors":
            safetensors_shapes(path)
        elif path.suffix == ".bin":
            check_archive(path)


def _check_classes(index: Mapping[str, Any], path: Place) -> None:
    """Refuse an index that would build another network, or take a class from any module."""
    autoencoders = f"one of {', '.join(AUTOENCODERS)} of diffusers"
    for part, holds, allowed in (
        ("unet", _is_network, "a UNet2DModel of diffusers"),
        (
            "scheduler",
            _is_scheduler,
            "a scheduler of diffusers, of this package or of a module that was imported before",
        ),
        ("vqvae", _is_autoencoder, autoencoders),
        ("vae", _is_autoencoder, autoencoders),
    ):
        if part in index and not holds(index[part]):
            raise ValueError(
                f"{str(path)!r}: `{part}` is {str(index[part])[:80]!r}; it must be {allowed}."
            )


def _is_network(entry: Any) -> bool:
    return entry in (["diffusers", "UNet2DModel"], [None, None])


def _is_autoencoder(entry: Any) -> bool:
    return entry == [None, None] or entry in [["diffusers", name] for name in AUTOENCODERS]


def _is_scheduler(entry: Any) -> bool:
    if entry == [None, None]:
        return True
    if not isinstance(entry, list) or len(entry) != 2 or not all(map(_is_name, entry)):
        return False
    module, name = entry  # self-contained ones are replaced by the installed class, or refused
    known = module in sys.modules or module.startswith("ddim_schedulers_")
    return known and name.endswith("Scheduler")


def check_complete(network: Any, place: Place) -> None:
    """Check that every weight of a loaded network was in its file: diffusers only warns.

    Raises:
        ValueError: naming the first that was not.
    """
    lost = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if lost:
        raise ValueError(
            f"{str(place)!r} has weights that lack {len(lost)} tensors of its config, among them "
            f"{lost[0]}; it must have them all."
        )
