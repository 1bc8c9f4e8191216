"""From the published PyTorch DDPM checkpoints to a diffusers pipeline.

The layout is that of pesser/pytorch_diffusion (`diffusion_cifar10_model/model-790000.ckpt` and its
kin), which the DDIM authors' code loads and writes too. The network is the same as diffusers'
`UNet2DModel`; names differ, attention is a 1 x 1 convolution there, and the levels of the way up
are counted from below. Files are read with `weights_only=True`: no code in them is run.
"""

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.forms import check_form
from ddim_schedulers.network_config import check_network_config
from ddim_schedulers.pipelines.ownership import Owner, own
from ddim_schedulers.reading import FREE_BYTES, check_archive

GROUPS = 32  # of the group norms, fixed in that layout
ATTENTION_SIZE = 16  # DDPM (arXiv:2006.11239), App. B: attention at 16 x 16
WEIGHTS = ("ema", "raw")
VARIANCE_TYPES = ("fixed_small", "fixed_large")  # no network of this layout predicts a variance

RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
TOP = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
MID = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    weights: str = "ema",
    image_size: int | None = None,
    variance_type: str | None = None,
    form: str = "portable",
) -> list[str]:
    """Write the pipeline of a checkpoint.

    Args:
        checkpoint: a state dict, or a training state of the DDIM authors' code.
        output_dir: new folder of the pipeline.
        weights: `ema` or `raw`, where the file holds both; otherwise what it holds.
        image_size: side of the images, a multiple of 2^(levels - 1); `None` takes it from the level
            that attends, which is 16 x 16.
        variance_type: of the scheduler, one of `VARIANCE_TYPES`; `None` is `fixed_large` for 32 x
            32 images (CIFAR-10) and `fixed_small` for larger ones (LSUN), as published.
        form: of the export, see `ddim_schedulers.export`.

    Returns:
        One sentence for each setting that the form cannot express.

    Raises:
        ValueError: for a file of another layout, with code or with NaN in it, an argument that is
            not allowed, or a folder that is not empty.
    """
    check_form(form)
    if variance_type is not None and variance_type not in VARIANCE_TYPES:
        raise ValueError(
            f"`variance_type` is {variance_type!r}; it must be one of {VARIANCE_TYPES}."
        )
    target = Path(output_dir)
    # a lock beside the new folder, which appears whole
    with own(target.with_name(f".{target.name}.converting"), "convert", transient=True) as owner:
        return _convert(checkpoint, target, weights, image_size, variance_type, form, owner)


def _convert(
    checkpoint: str | os.PathLike[str],
    target: Path,
    weights: str,
    image_size: int | None,
    variance_type: str | None,
    form: str,
    owner: Owner,
) -> list[str]:
    from diffusers import DDPMPipeline, UNet2DModel

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"`output_dir` is {str(target)!r}, which exists; it must be a new or an empty folder."
        )
    state = load_checkpoint(checkpoint, weights)
    config = unet_config(state, image_size)
    check_network_config(config, Path(checkpoint))
    with torch.device("meta"):  # shapes alone: nothing is allocated before they are known to fit
        unet = UNet2DModel(**config)
    converted = convert_state(state, len(config["block_out_channels"]))
    _check_shapes(converted, unet.state_dict())
    unet.to_empty(device="cpu").load_state_dict(converted)
    for name, parameter in unet.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"`checkpoint` has values in {name} that are not finite; all must be.")
    if variance_type is None:
        variance_type = "fixed_large" if config["sample_size"] <= 32 else "fixed_small"
    pipeline = DDPMPipeline(unet.eval(), MarkovianDDPMScheduler(variance_type=variance_type))
    partial = owner.folder / "pipeline"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        notes = save_pipeline(pipeline, partial, form)
        owner.check()
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def load_checkpoint(
    checkpoint: str | os.PathLike[str], weights: str = "ema"
) -> dict[str, torch.Tensor]:
    """Return the network's state dict of a checkpoint, in the names of that layout.

    Args:
        checkpoint: a `torch.save`d state dict, or the list [network, optimiser, epoch, step, EMA]
            of the DDIM authors' code.
        weights: `ema` or `raw`; a bare state dict is what it is.

    Raises:
        ValueError: if the file cannot be read without running code, or holds no such state.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` is {weights!r}; it must be one of {WEIGHTS}.")
    path = Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"`checkpoint` is {str(path)!r}; it must be a file.")
    check_archive(path)
    try:
        with warnings.catch_warnings():
            # torch 2.14 warns of the time that sparse tensors take; under `-W error` that would
            # read as a file that cannot be loaded
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip errors of many kinds
        raise ValueError(
            f"`checkpoint` is {str(path)!r}, which is no PyTorch file of tensors alone "
            f"({type(error).__name__}); it must be one, for anything else could run code."
        ) from None
    if isinstance(state, list | tuple) and state:
        state = state[-1] if weights == "ema" and len(state) >= 5 else state[0]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(f"`checkpoint` is {str(path)!r}; it must hold a state dict of a network.")
    for key, value in state.items():
        if not _is_dense(value):
            raise ValueError(
                f"`checkpoint` is {str(path)!r}, where {key} is not a dense tensor of floating "
                "point numbers; all must be."
            )
    # names that share their memory become weights of their own
    wanted = sum(value.numel() * value.element_size() for value in state.values())
    most = max(FREE_BYTES, 2 * path.stat().st_size)
    if wanted > most:
        raise ValueError(
            f"`checkpoint` is {str(path)!r}, which makes {wanted} bytes of weights; it must make "
            f"at most {most}."
        )
    named = {key.removeprefix("module."): value for key, value in state.items()}
    if len(named) != len(state):
        raise ValueError(
            f"`checkpoint` is {str(path)!r}, which holds tensors with and without the prefix "
            "'module.'; all or none must have it."
        )
    return named


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether it has real floating point numbers, as many as its shape says."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def unet_config(state: Mapping[str, torch.Tensor], image_size: int | None = None) -> dict[str, Any]:
    """Return the `UNet2DModel` config that fits a state dict of that layout.

    Args:
        state: as `load_checkpoint` returns it.
        image_size: side of the images, a multiple of 2^(levels - 1); `None` takes it from the level
            that attends.

    Raises:
        ValueError: if the state is of another layout, or tells no image size.
    """
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int)):
        raise ValueError(f"`image_size` is {image_size!r}; it must be an integer.")
    for key in ("conv_in.weight", "conv_out.weight", "temb.dense.0.weight", "mid.attn_1.q.weight"):
        if key not in state:
            raise ValueError(
                f"`checkpoint` has no {key!r}; it must be in the layout of "
                "pesser/pytorch_diffusion."
            )
    numbers = [int(m[1]) for key in state if (m := re.match(r"down\.(\d{1,3})\.", key))]
    levels = 1 + max(numbers, default=0)
    channels = []
    for level in range(levels):
        key = f"down.{level}.block.0.conv1.weight"
        if key not in state:
            raise ValueError(f"`checkpoint` has no {key!r}; every level must have it.")
        channels.append(_conv_channels(state, key)[0])
        if channels[-1] < 1 or channels[-1] % GROUPS:
            raise ValueError(
                f"`checkpoint` has {channels[-1]} output channels in {key}; they must be a "
                f"multiple of {GROUPS}."
            )
        if level < levels - 1 and f"down.{level}.downsample.conv.weight" not in state:
            raise ValueError(
                f"`checkpoint` has no convolution that halves the image at level {level}; there "
                "must be one (average pooling is not supported)."
            )
    if any(key.endswith("conv_shortcut.weight") for key in state):
        raise ValueError(
            "`checkpoint` has 3 x 3 shortcuts; they must be 1 x 1, for UNet2DModel has no others."
        )
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    if image_size is None:
        if sum(attends) != 1:
            raise ValueError(
                f"`image_size` is not set, and the checkpoint attends at {sum(attends)} levels, "
                "which tells no image size; it must be set."
            )
        image_size = ATTENTION_SIZE * 2 ** attends.index(True)
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(
            f"`image_size` is {image_size}; it must be a multiple of {2 ** (levels - 1)}, for the "
            f"network halves images {levels - 1} times."
        )
    images = _conv_channels(state, "conv_in.weight")[1]
    if _conv_channels(state, "conv_out.weight")[0] != images:
        raise ValueError(
            f"`checkpoint` has {state['conv_out.weight'].shape[0]} output channels in "
            f"conv_out.weight; they must be as many as those of the images, {images}."
        )
    blocks = {int(m[1]) for key in state if (m := re.match(r"down\.0\.block\.(\d+)\.", key))}
    return {
        "sample_size": image_size,
        "in_channels": images,
        "out_channels": images,
        "block_out_channels": tuple(channels),
        "layers_per_block": len(blocks),
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        "attention_head_dim": None,  # one head
        "downsample_padding": 0,  # padded below and to the right alone
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": GROUPS,
    }


def _conv_channels(state: Mapping[str, torch.Tensor], key: str) -> tuple[int, int]:
    """Return (output channels, input channels) of a convolution's weight."""
    if state[key].ndim != 4:
        raise ValueError(
            f"`checkpoint` has {key} of shape {tuple(state[key].shape)}; a convolution's weight "
            "must have 4 dimensions."
        )
    return state[key].shape[0], state[key].shape[1]


def convert_state(state: Mapping[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Return the state dict under the names of `UNet2DModel`.

    Args:
        state: as `load_checkpoint` returns it.
        levels: number of resolutions.

    Raises:
        ValueError: for a name that the layout does not have.
    """
    converted = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        name = _new_name(module, levels)
        if name is None or kind not in ("weight", "bias"):
            raise ValueError(f"`checkpoint` has {key!r}; every name must be one of the layout.")
        attention = ".attentions." in name and "group_norm" not in name
        if attention and kind == "weight" and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # a 1 x 1 convolution is a linear map of the channels
        converted[f"{name}.{kind}"] = value
    return converted


def _new_name(module: str, levels: int) -> str | None:
    if module in TOP:
        return TOP[module]
    parts = module.split(".")
    if parts[0] == "mid" and len(parts) == 3 and parts[1] in MID:
        names = ATTENTION if parts[1] == "attn_1" else RESNET
        return _joined("mid_block", MID[parts[1]], names.get(parts[2]))
    if parts[0] not in ("down", "up") or len(parts) < 4 or not parts[1].isdigit():
        return None
    level = int(parts[1]) if parts[0] == "down" else levels - 1 - int(parts[1])
    start, rest = f"{parts[0]}_blocks.{level}", parts[2:]
    if rest in (["downsample", "conv"], ["upsample", "conv"]):
        return f"{start}.{rest[0]}rs.0.conv"
    if len(rest) != 3 or rest[0] not in ("block", "attn"):
        return None
    group, names = ("resnets", RESNET) if rest[0] == "block" else ("attentions", ATTENTION)
    return _joined(start, f"{group}.{rest[1]}", names.get(rest[2]))


def _joined(*parts: str | None) -> str | None:
    return None if None in parts else ".".join(str(part) for part in parts)


def _check_shapes(
    converted: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    missing, unknown = sorted(set(wanted) - set(converted)), sorted(set(converted) - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"`checkpoint` does not fit a UNet2DModel: {len(missing)} tensors are missing "
            f"({', '.join(missing[:2])}), {len(unknown)} are unknown ({', '.join(unknown[:2])}); "
            "it must have the same."
        )
    for name, tensor in wanted.items():
        if converted[name].shape != tensor.shape:
            raise ValueError(
                f"`checkpoint` has {name} of shape {tuple(converted[name].shape)}; it must be "
                f"{tuple(tensor.shape)}."
            )
