"""Images to latents and back, by an autoencoder of diffusers that stays as it is.

With z the autoencoder's latent, the network is trained on and samples

    x_0 = (z - shift) * scale,    z = x_0 / scale + shift

`scale` and `shift` are in the autoencoder's config as `scaling_factor` and `shift_factor`, which is
how diffusers' latent pipelines read them; a class that has no `shift_factor` keeps it under the
private key of this package. An `AutoencoderKL` gives a Gaussian for each image, the others a
latent.
"""

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from ddim_schedulers.latent_scale import scale_in
from ddim_schedulers.settings import SETTINGS_KEY

AUTOENCODERS: tuple[type, ...] = (AutoencoderKL, AutoencoderTiny, VQModel)
# log variances of diffusers' `DiagonalGaussianDistribution`
_LOG_VARIANCE = (-30.0, 20.0)


class Autoencoder(Protocol):
    """What the codec uses of an autoencoder, which is diffusers' own object."""

    config: Any

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""


class Codec:
    """Encodes images to what a network of latents is trained on, and decodes its samples.

    Args:
        vae: an `AutoencoderKL`, `AutoencoderTiny` or `VQModel`.

    Raises:
        ValueError: for another class, an encoder and decoder that differ in channels, or a scale
            that is none.
    """

    def __init__(self, vae: Autoencoder) -> None:
        check_autoencoder(vae)
        self.vae: Any = vae
        self.scale, self.shift = scale_in(vae.config)

    @property
    def channels(self) -> int:
        """Return C of the images."""
        return int(self.vae.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Return C of the latents."""
        embedded = self.vae.config.get("vq_embed_dim")
        return int(self.vae.config.latent_channels if embedded is None else embedded)

    @property
    def factor(self) -> int:
        """Return how many pixels of a side are one of the latent's."""
        widths = self.vae.config.get("block_out_channels")
        widths = self.vae.config.get("encoder_block_out_channels") if widths is None else widths
        return int(2 ** (len(widths) - 1))

    @property
    def has_distribution(self) -> bool:
        """Return whether an image has a Gaussian of latents, and not one latent."""
        return isinstance(self.vae, AutoencoderKL)

    def picture_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the images that latents of a shape decode to.

        Raises:
            ValueError: for latents of other channels.
        """
        channels, height, width = latent_shape
        if channels != self.latent_channels:
            raise ValueError(
                f"`vae` is {type(self.vae).__name__} with latents of {self.latent_channels} "
                f"channels; they must have {channels}, as the network's samples."
            )
        return (self.channels, height * self.factor, width * self.factor)

    def latent_shape(self, picture_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latents of images of a shape.

        Raises:
            ValueError: for images of other channels, or a side that is no multiple of the factor.
        """
        channels, height, width = picture_shape
        if channels != self.channels:
            raise ValueError(
                f"`vae` is {type(self.vae).__name__} for images of {self.channels} channels; they "
                f"must have as many, and have {channels} (see image_mode)."
            )
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"`image_size` makes images of {height}x{width}; both sides must be multiples of "
                f"{self.factor}, the factor of the vae, {type(self.vae).__name__}."
            )
        return (self.latent_channels, height // self.factor, width // self.factor)

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the encoder gives for images x (B, C, H, W) in [-1, 1], unscaled.

        Returns:
            mean and log variance (B, 2c, h, w) of an `AutoencoderKL`, else the latents (B, c, h,
            w), in the dtype of `x`.
        """
        encoded = self.vae.encode(x.to(self.vae.dtype))
        found = encoded.latent_dist.parameters if self.has_distribution else encoded.latents
        return found.to(x.dtype)

    def latents(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return scaled latents (B, c, h, w).

        Args:
            moments: of `moments`.
            noise: standard normal, of the shape of the latents; None takes the mean.
        """
        if self.has_distribution:
            moments, log_variance = moments.chunk(2, dim=1)
            if noise is not None:
                moments = moments + (0.5 * log_variance.clamp(*_LOG_VARIANCE)).exp() * noise
        return (moments - self.shift) * self.scale

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scaled latents of images x (B, C, H, W) in [-1, 1]; of a Gaussian, the mean.

        The result has the device and dtype of `x`.
        """
        return self.latents(self.moments(x))

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W), about [-1, 1], of scaled latents x0 in their dtype."""
        z = x0 / self.scale + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.to(x0.dtype)


def check_autoencoder(vae: Any, name: str = "vae") -> None:  # noqa: ANN401
    """Check that an autoencoder is of a class that the codec knows, and whole.

    Raises:
        ValueError: naming the argument, what it is and what is allowed.
    """
    if not isinstance(vae, AUTOENCODERS):
        allowed = ", ".join(cls.__name__ for cls in AUTOENCODERS)
        raise ValueError(f"`{name}` is {type(vae).__name__}; it must be one of {allowed}.")
    config: Any = vae.config  # type: ignore[attr-defined]
    for part in ("encoder", "decoder"):
        if not isinstance(getattr(vae, part, None), torch.nn.Module):
            raise ValueError(
                f"`{name}` is {type(vae).__name__} without its {part}; it must have both parts."
            )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"`{name}` maps {config.in_channels} channels to {config.out_channels}; it must return "
            "as many as it takes."
        )
    scale_in(config, name)


def check_finite_weights(vae: torch.nn.Module, name: str = "vae") -> None:
    """Check every weight of an autoencoder; a pass over all of them.

    Raises:
        ValueError: naming the first that is not finite.
    """
    for key, value in vae.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"`{name}` is {type(vae).__name__} whose weight {key!r} is not finite; all must be."
            )


def rescaled(vae: Any, scale: float, shift: float) -> Codec:  # noqa: ANN401
    """Return the codec of an autoencoder with another scale, which its config tells from now on."""
    note_scale(vae, scale, shift)
    return Codec(vae)


def note_scale(vae: Any, scale: float, shift: float) -> None:  # noqa: ANN401
    """Write scale and shift into an autoencoder's config, where every codec finds them."""
    note: dict[str, Any] = {"scaling_factor": scale}
    if "shift_factor" in vae.config:
        note["shift_factor"] = shift if shift or vae.config["shift_factor"] is not None else None
    elif shift or SETTINGS_KEY in vae.config:
        note[SETTINGS_KEY] = {"shift_factor": shift}
    # `from_config` would pass over the keys of this list
    unset = [key for key in vae.config.get("_use_default_values", ()) if key not in note]
    vae.register_to_config(**note, _use_default_values=unset)
