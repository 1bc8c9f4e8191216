"""The network in a checkpoint and the scheduler of its run, without a trainer."""

import dataclasses
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.reading import read_json
from ddim_schedulers.training.config import ProcessConfig
from ddim_schedulers.training.networks.autoencoders import load_vae
from ddim_schedulers.training.networks.checkpoints import verify
from ddim_schedulers.training.networks.models import make_scheduler
from ddim_schedulers.training.networks.places import STATE

VAE_FOLDER = "vae"  # of the autoencoder, in the folder of a run


def load_checkpoint(
    folder: Path, weights: str = "averaged"
) -> tuple[UNet2DModel, MarkovianDDPMScheduler, str]:
    """Return a checkpoint's network in evaluation mode, its run's scheduler, and a description.

    Args:
        folder: the checkpoint.
        weights: `averaged`, where the run keeps an average, or `raw`.

    Raises:
        ValueError: it is damaged.
    """
    if (damage := verify(folder)) is not None:
        raise ValueError(
            f"{str(folder)!r} is a checkpoint that is damaged: {damage}; choose another one"
        )
    state: dict[str, Any] = read_json(folder / STATE)
    config = {f.name: state["config"][f.name] for f in dataclasses.fields(ProcessConfig)}
    averaged = weights == "averaged" and (folder / "unet_ema").is_dir()
    unet = UNet2DModel.from_pretrained(
        folder, subfolder="unet_ema" if averaged else "unet", use_safetensors=True
    )
    said = f"checkpoint {folder}, step {state['step']}, {'averaged' if averaged else 'raw'} weights"
    scheduler = make_scheduler(ProcessConfig(**config), clip=not _of_latents(state))
    return unet.eval(), scheduler, said


def load_checkpoint_vae(folder: Path) -> Any:  # noqa: ANN401
    """Return the autoencoder of a checkpoint's run, with its scale; None for a run on pixels.

    Raises:
        ValueError: the run keeps it no longer, beside its checkpoints, or it cannot be read.
    """
    if not _of_latents(read_json(folder / STATE)):
        return None
    place = folder.resolve().parent.parent / VAE_FOLDER
    if not place.is_dir():
        raise ValueError(
            f"`pipeline` is {str(folder)!r}, a checkpoint of a run on latents; {str(place)!r} must "
            "lie beside its checkpoints: the autoencoder, with the scale of the latents"
        )
    return load_vae(str(place), option="vae of the run")


def _of_latents(state: dict[str, Any]) -> bool:
    return state["config"].get("vae") is not None
