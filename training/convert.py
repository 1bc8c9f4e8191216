"""From the published PyTorch DDPM checkpoints to a diffusers pipeline.

The layout is that of pesser/pytorch_diffusion (`diffusion_cifar10_model/model-790000.ckpt` and its
kin), which the DDIM authors' code loads and writes too. The network is the same as diffusers'
`UNet2DModel`; names differ, attention is a 1 x 1 convolution there, and the levels of the way up
are counted from below. Files are read with `weights_only=True`: no code in them is run.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.export import check_form, save_pipeline

GROUPS = 32  # of the group norms, fixed in that layout
ATTENTION_SIZE = 16  # DDPM (arXiv:2006.11239), App. B: attention at 16 x 16
WEIGHTS = ("ema", "raw")

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
        image_size: side of the images; `None` takes it from the level that attends, which is 16 x
            16.
        variance_type: of the scheduler; `None` is `fixed_large` for 32 x 32 images (CIFAR-10) and
            `fixed_small` for larger ones (LSUN), as published.
        form: of the export, see `ddim_schedulers.export`.

    Returns:
        One sentence for each setting that the form cannot express.

    Raises:
        ValueError: for a file of another layout or with code in it, or a folder that is not empty.
    """
    from diffusers import DDPMPipeline, UNet2DModel

    check_form(form)
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`output_dir` is {target}, which exists and is not an empty folder.")
    state = load_checkpoint(checkpoint, weights)
    config = unet_config(state, image_size)
    unet = UNet2DModel(**config)
    converted = convert_state(state, len(config["block_out_channels"]))
    _check_shapes(converted, unet.state_dict())
    unet.load_state_dict(converted)
    if variance_type is None:
        variance_type = "fixed_large" if config["sample_size"] <= 32 else "fixed_small"
    pipeline = DDPMPipeline(unet.eval(), MarkovianDDPMScheduler(variance_type=variance_type))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        notes = save_pipeline(pipeline, partial, form)
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
        raise ValueError(f"`checkpoint` is {path}, which is not a file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip errors of many kinds
        raise ValueError(
            f"{path} is not a PyTorch file of tensors alone ({type(error).__name__}); it was not "
            "loaded, for anything else could run code."
        ) from None
    if isinstance(state, list | tuple) and state:
        state = state[-1] if weights == "ema" and len(state) >= 5 else state[0]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path} holds no state dict of a network.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def unet_config(state: Mapping[str, torch.Tensor], image_size: int | None = None) -> dict[str, Any]:
    """Return the `UNet2DModel` config that fits a state dict of that layout.

    Args:
        state: as `load_checkpoint` returns it.
        image_size: side of the images; `None` takes it from the level that attends.

    Raises:
        ValueError: if the state is of another layout, or tells no image size.
    """
    for key in ("conv_in.weight", "conv_out.weight", "temb.dense.0.weight", "mid.attn_1.q.weight"):
        if key not in state:
            raise ValueError(
                f"the checkpoint has no {key!r}; it is not in the layout of "
                "pesser/pytorch_diffusion."
            )
    levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"down\.(\d+)\.", key)))
    channels = []
    for level in range(levels):
        key = f"down.{level}.block.0.conv1.weight"
        if key not in state:
            raise ValueError(f"the checkpoint has no {key!r}.")
        channels.append(state[key].shape[0])
        if level < levels - 1 and f"down.{level}.downsample.conv.weight" not in state:
            raise ValueError(
                f"level {level} of the checkpoint has no convolution that halves the image; "
                "average pooling is not supported."
            )
    if any(key.endswith("conv_shortcut.weight") for key in state):
        raise ValueError("the checkpoint has 3 x 3 shortcuts, which UNet2DModel does not have.")
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    if image_size is None:
        if sum(attends) != 1:
            raise ValueError(
                f"the checkpoint attends at {sum(attends)} levels, which tells no image size; "
                "`image_size` is needed."
            )
        image_size = ATTENTION_SIZE * 2 ** attends.index(True)
    blocks = {int(m[1]) for key in state if (m := re.match(r"down\.0\.block\.(\d+)\.", key))}
    return {
        "sample_size": image_size,
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
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
            raise ValueError(f"the checkpoint has {key!r}, which the layout does not know.")
        attention = ".attentions." in name and "group_norm" not in name
        if attention and kind == "weight" and value.ndim == 4:
            value = value[:, :, 0, 0]  # a 1 x 1 convolution is a linear map of the channels
        converted[f"{name}.{kind}"] = value.float().contiguous()
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
            f"the checkpoint does not fit a UNet2DModel: {len(missing)} tensors are missing "
            f"({', '.join(missing[:2])}), {len(unknown)} are unknown ({', '.join(unknown[:2])})."
        )
    for name, tensor in wanted.items():
        if converted[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(converted[name].shape)} in the checkpoint; it must be "
                f"{tuple(tensor.shape)}."
            )
