"""Which UNet is trained (a preset, a config file, or a trained one to go on from), and for what."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.class_labels import labels_in
from ddim_schedulers.network_config import check_network_config
from ddim_schedulers.reading import DamagedFileError, read_json
from ddim_schedulers.training.common.repositories import fetch
from ddim_schedulers.training.config import ProcessConfig

# The networks of DDPM (arXiv:2006.11239), App. B, as the converted checkpoints configure them: no
# bias of time frequencies, attention with one head, GroupNorm with epsilon 1e-6, asymmetric
# padding.
_DDPM: dict[str, Any] = {
    "layers_per_block": 2,
    "act_fn": "silu",
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}

# As the networks of latent diffusion (arXiv:2112.10752, App. E.1): attention at half the size and
# below, with heads of 32 channels.
_LATENT: dict[str, Any] = {
    "layers_per_block": 2,
    "act_fn": "silu",
    "attention_head_dim": 32,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}

PRESETS: dict[str, dict[str, Any]] = {
    # for the demo: 8x8 images, trained and sampled thousands of times in minutes on two cores; the
    # middle block attends at 4x4, and the blocks around it would add a fifth to a training step
    "mini": {
        "block_out_channels": (8, 32),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    # for 8x8 images: seconds a run
    "tiny": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    # for 28x28 to 32x32 grey images: an hour on two cores
    "small": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    # 35.7 M parameters
    "ddpm-cifar10": {
        **_DDPM,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "dropout": 0.1,
    },
    # latents of 32x32, as those of 256x256 images with factor 8: 39 M parameters
    "latent-32": {
        **_LATENT,
        "block_out_channels": (128, 256, 384),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # latents of 64x64, as those of 512x512 images with factor 8: 85 M parameters
    "latent-64": {
        **_LATENT,
        "block_out_channels": (128, 256, 384, 512),
        "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
        "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    },
    # 114 M parameters
    "ddpm-256": {
        **_DDPM,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (
            *("DownBlock2D",) * 4,
            "AttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": (
            "UpBlock2D",
            "AttnUpBlock2D",
            *("UpBlock2D",) * 4,
        ),
    },
}


def make_unet(
    model: str,
    *,
    channels: int,
    size: tuple[int, int],
    learned_variance: bool = False,
    dropout: float | None = None,
    num_class_embeds: int | None = None,
) -> UNet2DModel:
    """Return a new UNet with random weights from the global generator.

    Args:
        model: a name in `PRESETS`, or a UNet2DModel config file (JSON), whose in_channels,
            out_channels and sample_size may be absent.
        channels: channels of the images.
        size: height and width of the images.
        learned_variance: give the network a second set of output channels for the variance.
        dropout: replaces the dropout of the preset or file.
        num_class_embeds: classes, the null class among them; None for an unconditional network.

    Raises:
        ValueError: unknown preset, unreadable file, or channels, size or classes that do not fit.
    """
    config = dict(PRESETS[model]) if model in PRESETS else _read_config(model)
    out_channels = channels * (2 if learned_variance else 1)
    given: dict[str, Any] = {"in_channels": channels, "out_channels": out_channels}
    if num_class_embeds is not None:
        given["num_class_embeds"] = num_class_embeds
    for name, value in given.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`model` is {model!r}, whose `{name}` is {config[name]}; it must be "
                f"{value}, as the data need"
            )
    height, width = size
    config |= given | {"sample_size": height if height == width else (height, width)}
    if dropout is not None:
        config["dropout"] = dropout
    _check(config, model, size, num_class_embeds is not None)
    return UNet2DModel(**config)


def load_unet(
    path: str,
    *,
    channels: int,
    size: tuple[int, int],
    learned_variance: bool,
    class_conditional: bool = False,
) -> UNet2DModel:
    """Return a trained UNet from a pipeline or UNet folder or a Hub name, in float32.

    Args:
        path: folder or name.
        channels: channels of the images.
        size: height and width of the images.
        learned_variance: whether it must have a second set of output channels.
        class_conditional: whether it may have classes.

    Raises:
        ValueError: nothing there, classes that are not asked for, or channels or size that do not
            fit.
    """
    found = fetch(path, "from_pretrained")
    is_pipeline = bool(found.commit) or (found.folder / "model_index.json").exists()
    try:
        unet = found.read(UNet2DModel, subfolder="unet" if is_pipeline else None)
    except OSError as error:
        raise ValueError(
            f"`from_pretrained` is {path!r}; it must have a UNet2DModel that can be loaded: {error}"
        ) from error
    found.finish(unet)
    wanted = (channels, channels * (2 if learned_variance else 1))
    if (unet.config.in_channels, unet.config.out_channels) != wanted:
        raise ValueError(
            f"`from_pretrained` is {path!r}, whose UNet has {unet.config.in_channels} channels in "
            f"and {unet.config.out_channels} out; they must be {wanted[0]} and {wanted[1]}, as "
            "data and variance_type need"
        )
    _check(dict(unet.config), path, size, class_conditional)
    return unet


def with_class_embedding(unet: UNet2DModel, num_class_embeds: int) -> UNet2DModel:
    """Return an unconditional network with an embedding of classes that changes nothing yet.

    Args:
        unet: the network; its weights are taken.
        num_class_embeds: classes, the null class among them. Their vectors are zeros.
    """
    # from_config would pass over the keys of this list
    known = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
    new = UNet2DModel.from_config({**known, "num_class_embeds": num_class_embeds})
    torch.nn.init.zeros_(new.class_embedding.weight)
    missing, unexpected = new.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["class_embedding.weight"] and not unexpected
    return new


def make_scheduler(config: ProcessConfig, *, clip: bool = True) -> MarkovianDDPMScheduler:
    """Return the network's training process with a sampler whose few-step samples are clean.

    A pipeline records the one by the other. sigma-hat (`fixed_large`) adds more noise than the
    last steps of a short trajectory can remove, and `leading` ends at a t whose noise stays.

    Args:
        config: the settings.
        clip: whether x0_hat is clipped to [-1, 1]; latents have no such range.
    """
    return MarkovianDDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type="fixed_small" if config.variance_type == "auto" else config.variance_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=clip,
    )


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"`model` is {path!r}; it must be one of {', '.join(PRESETS)}, or a UNet2DModel config "
            "file"
        )
    try:
        config = read_json(file)
    except DamagedFileError as error:
        raise ValueError(
            f"`model` is {path!r}, which cannot be read; its file must be whole: {error.reason}"
        ) from error
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(
            f"`model` is {path!r}, the config of a {config['_class_name']}; it must be that "
            "of a UNet2DModel"
        )
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    check_network_config(config, path)
    known = set(inspect.signature(UNet2DModel.__init__).parameters)
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"`model` is {path!r}, whose keys {unknown} are none of UNet2DModel; they must "
            "be left out"
        )
    return config


def _check(
    config: dict[str, Any], name: str, size: tuple[int, int], class_conditional: bool
) -> None:
    try:
        labels = labels_in(config)
    except ValueError as error:
        raise ValueError(f"`unet` of {name} must have labels that fit: {error}") from None
    if labels is not None and not class_conditional:
        raise ValueError(
            f"`unet` of {name} is class-conditional, and class_conditional is false; set it to "
            "true, or take a network whose num_class_embeds is null"
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if size[0] % factor or size[1] % factor:
        raise ValueError(
            f"`image_size` makes images of {size[0]}x{size[1]}, but the UNet of {name} halves them "
            f"{len(config['block_out_channels']) - 1} times; both sides must be multiples of "
            f"{factor} (see image_size and fit)"
        )
