"""The pipeline class that a folder of a network of latents names, by the form of the folder."""

from collections.abc import Mapping
from typing import Any

from .latent_scale import scale_in

# Our class for pipelines that `LDMPipeline` would sample wrongly. diffusers refuses its name.
LATENT_CLASS = "GenerationPipeline"


def form_of_latents(vae_config: Mapping[str, Any], labelled: bool, form: str) -> str:
    """Return `form`, or `plug-in` where the portable one would lose a shift or the classes."""
    return form if latent_class(vae_config, labelled) == "LDMPipeline" else "plug-in"


def latent_class(vae_config: Mapping[str, Any], labelled: bool, form: str = "plug-in") -> str:
    """Return the pipeline class for a network of latents with its autoencoder, `vqvae`.

    Args:
        vae_config: of the autoencoder.
        labelled: whether the network has classes.
        form: one of `FORMS`.

    Raises:
        ValueError: for the form `portable`, where `LDMPipeline` would lose a shift or the classes.
    """
    shift = scale_in(vae_config)[1]
    if not (shift or labelled):
        return "LDMPipeline"
    if form == "portable":
        lost = f"the shift of the latents, {shift}" if shift else "the classes of the network"
        raise ValueError(
            f"`form` is 'portable', which names LDMPipeline, and that leaves out {lost}; it must "
            "be 'plug-in' or 'self-contained'."
        )
    return LATENT_CLASS
