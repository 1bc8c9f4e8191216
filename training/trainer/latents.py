"""The latents of a run: the frozen autoencoder, its scale and its cache.

The scale is measured, so that latents have a deviation of 1 as images of [-1, 1] nearly have, which
the noise levels of every process are made for. The config's own is taken where it does the same
within `NEAR`, or on request: every fresh autoencoder claims the 0.18215 of Stable Diffusion.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.codec import Codec, rescaled
from ddim_schedulers.pipelines.fingerprints import fingerprint_of
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.images import ImageData
from ddim_schedulers.training.data.latents import ENCODED, LatentCache
from ddim_schedulers.training.networks.autoencoders import load_vae

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer.trainer import Trainer

MEASURED = 1024  # images that the scale is measured on
NEAR = 0.1  # the deviation may be this far from 1, the mean from 0
USABLE = (0.5, 2.0)  # the deviations that are allowed with a scale of the config
CACHE = "latents"  # in the folder of a run


@dataclass(frozen=True)
class Measured:
    """Unscaled latents in numbers.

    Attributes:
        mean: of all values.
        deviation: of all values, of draws where the encoder gives a Gaussian.
        error: mean squared error of decoded means, images in [-1, 1].
        images: how many were measured.
    """

    mean: float
    deviation: float
    error: float
    images: int


@dataclass
class Latents:
    """The latents of a run.

    Attributes:
        codec: on the device of the run.
        shape: (c, h, w) of the latents.
        sampled: whether latents are drawn from the encoder's Gaussian; else they are its mean.
        said: what there is to say of them at the start.
        cache: the encodings of the training images, once they are made.
    """

    codec: Codec
    shape: tuple[int, int, int]
    sampled: bool
    said: str
    cache: LatentCache | None = None

    def x0_of(self, images: Tensor, noise: Tensor | None, encoded: bool = False) -> Tensor:
        """Return scaled latents (B, c, h, w).

        Args:
            images: (B, C, H, W) in [-1, 1], or what `Codec.moments` gave for them.
            noise: standard normal, for draws.
            encoded: whether `images` are encoded already.
        """
        moments = images if encoded else self.codec.moments(images)
        # an encoder may give another memory format than that of the images
        return self.codec.latents(moments, noise).contiguous()

    def contents(self) -> dict[str, Any]:
        """Return what training depends on, as JSON types."""
        return {
            "vae": fingerprint_of(self.codec.vae.state_dict(), type(self.codec.vae).__name__),
            "scale": self.codec.scale,
            "shift": self.codec.shift,
        }


def make_latents(
    config: TrainingConfig,
    data: ImageData,
    device: torch.device,
    known: tuple[float, float] | None = None,
) -> Latents | None:
    """Return the latents of a run; None for one on pixels.

    Args:
        config: the settings.
        data: the training images.
        device: of the run.
        known: scale and shift of the run that goes on.

    Raises:
        ValueError: an autoencoder that cannot be read, is not whole or does not fit the images, or
            whose latents have no usable scale.
    """
    if config.vae is None:
        return None
    vae = load_vae(config.vae, config.vae_revision).to(device)
    codec = Codec(vae)
    shape = codec.latent_shape(data.shape)
    sampled = codec.has_distribution and config.vae_posterior == "sample"
    found = _measure(codec, data, shape, sampled, device)
    scale, shift, why = _scale(codec, found, config.vae_scale)
    if known is not None:
        (scale, shift), why = known, "those of the checkpoint"
    codec = rescaled(vae, scale, shift)
    said = (
        f"vae: {type(vae).__name__} {config.vae}, images {_size(data.shape)} to latents "
        f"{_size(shape)}; unscaled they have mean {found.mean:.4g} and deviation "
        f"{found.deviation:.4g} over {found.images} images; scale {codec.scale:.6g} and shift "
        f"{codec.shift:.4g}, {why}; decoded encodings differ by {found.error:.3g} (mean squared, "
        "images in [-1, 1])"
    )
    return Latents(codec, shape, sampled, said)


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, (*shape[1:], shape[0])))


@torch.no_grad()
def _measure(
    codec: Codec,
    data: ImageData,
    shape: tuple[int, int, int],
    sampled: bool,
    device: torch.device,
) -> Measured:
    count = min(MEASURED, len(data))
    rows = np.linspace(0, len(data) - 1, count).astype(np.int64)
    total = square = error = 0.0
    for start, stop in chunks(count, ENCODED):
        x = data.batch(rows[start:stop])[0].to(device)
        moments = codec.moments(x)
        mean = moments.chunk(2, dim=1)[0] if codec.has_distribution else moments
        if tuple(mean.shape[1:]) != shape:
            raise ValueError(
                f"`vae` gives latents of {tuple(mean.shape[1:])} for images of {data.shape}; its "
                f"config says {shape}, and they must agree"
            )
        variance = moments.chunk(2, dim=1)[1].clamp(-30, 20).exp() if sampled else None
        total += float(mean.double().sum())
        square += float(mean.double().square().sum())
        square += 0.0 if variance is None else float(variance.double().sum())
        again = codec.vae.decode(mean.to(codec.vae.dtype)).sample
        if again.shape != x.shape:
            raise ValueError(
                f"`vae` decodes to images of {tuple(again.shape[1:])}; they must be {data.shape}, "
                "as the data"
            )
        error += float((again.double() - x.double()).square().sum())
    values, pixels = count * math.prod(shape), count * math.prod(data.shape)
    mean_of_all = total / values
    deviation = math.sqrt(max(square / values - mean_of_all**2, 0.0))
    return Measured(mean_of_all, deviation, error / pixels, count)


def _scale(codec: Codec, found: Measured, choice: str) -> tuple[float, float, str]:
    """Return scale and shift, and where they are from."""
    if not math.isfinite(found.deviation) or found.deviation < 1e-6:
        raise ValueError(
            f"`vae` gives latents of deviation {found.deviation:.3g} for {found.images} images; it "
            "must be a finite number above 1e-6: the autoencoder tells no images apart"
        )
    given = found.deviation * codec.scale
    if choice == "config":
        low, high = USABLE
        if not low <= given <= high:
            raise ValueError(
                f"`vae_scale` is 'config', and the config's scale {codec.scale:g} gives latents of "
                f"deviation {given:.3g}; that must be {low} to {high}: leave vae_scale out, and it "
                "is measured"
            )
        return codec.scale, codec.shift, f"of the config, for a deviation of {given:.3g}"
    if abs(given - 1) <= NEAR:
        return codec.scale, codec.shift, f"of the config, for a deviation of {given:.3g}"
    shift = found.mean if abs(found.mean) > NEAR * found.deviation else 0.0
    return (
        1 / found.deviation,
        shift,
        f"measured (the config's {codec.scale:g} would give a deviation of {given:.3g})",
    )


def fill_cache(trainer: "Trainer") -> LatentCache | None:
    """Encode the training images of a run once, on all its processes; None on the fly."""
    latents, config = trainer.latents, trainer.config
    if latents is None or trainer.stream is not None or config.vae_cache == "off":
        return None

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def encode(images: Tensor) -> Tensor:
        return latents.codec.moments(images.to(trainer.device))

    cache = LatentCache(
        Path(config.output_dir) / CACHE,
        _fingerprint(trainer, latents),
        trainer.data,
        config.random_flip,
        say,
    )
    accelerator = trainer.accelerator
    made = cache.fill(encode, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if made and accelerator.is_main_process:
        say(f"latents of {len(trainer.data)} images are kept in {cache.folder}")
    return cache


def _fingerprint(trainer: "Trainer", latents: Latents) -> str:
    """Return the SHA-256 of what the encodings depend on: not the scale, which comes after."""
    data, config = trainer.data, trainer.config
    read = {
        "images": trainer.contents["data"],
        "shape": data.shape,
        "range": data.value_range,
        "mirrored": config.random_flip,
        **{name: getattr(config, name) for name in ("fit", "image_mode", "background")},
        "vae": latents.contents()["vae"],
        "config": {k: v for k, v in latents.codec.vae.config.items() if not _of_scale(k)},
    }
    text = json.dumps(read, sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + data.ids.astype("<i8").tobytes()).hexdigest()


def _of_scale(key: str) -> bool:
    return key.startswith("_") or key in ("scaling_factor", "shift_factor")
