"""Images into model space [-1, 1] and out of it; nothing is converted without a word."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddim_schedulers.pipelines.codec import Codec
from ddim_schedulers.pipelines.image_files import BadImageError, Reading, as_shown

ImageInput = Any  # a PIL image or a list of them, an array or a tensor: see `to_model_space`
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_model_space(
    images: ImageInput,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    name: str = "images",
) -> torch.Tensor:
    """Return images as a batch (N, C, H, W) in [-1, 1] on the CPU.

    Args:
        images: a PIL image or the path of an image file, or a list of either (mode L, RGB or RGBA
            as the network has 1, 3 or 4 channels); an array (H, W, C) or (N, H, W, C); or a tensor
            (C, H, W) or (N, C, H, W). Arrays and tensors are uint8 in 0 .. 255, or floating point
            in [0, 1] as the pipelines return them.
        shape: (C, H, W) of the network.
        dtype: of the result.
        name: what messages call the argument.

    Raises:
        ValueError: naming what is wrong: type, dtype, mode, channels, size or range.
    """
    if isinstance(images, Image.Image | str | os.PathLike):
        images = [images]
    if isinstance(images, torch.Tensor):
        batch = images.detach().cpu()
    elif isinstance(images, np.ndarray) and images.dtype.kind in "fiubc":
        batch = _channels_first(torch.from_numpy(np.ascontiguousarray(images)), name)
    elif (
        isinstance(images, Sequence)
        and images
        and all(isinstance(i, Image.Image | str | os.PathLike) for i in images)
    ):
        opened = [i if isinstance(i, Image.Image) else read_image(i, name) for i in images]
        batch = _from_pil(opened, shape, name)
    else:
        raise ValueError(
            f"`{name}` is {type(images).__name__}; it must be a PIL image, the path of one, a "
            "non-empty list of them, a numpy array (N, H, W, C) or a tensor (N, C, H, W)."
        )
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[0] == 0 or tuple(batch.shape[1:]) != shape:
        raise ValueError(
            f"`{name}` has shape {tuple(batch.shape)} (N, C, H, W); the network takes (N, "
            f"{shape[0]}, {shape[1]}, {shape[2]})."
        )
    return _unit_range(batch, dtype, name) * 2 - 1


def read_image(path: str | os.PathLike[str], name: str) -> Image.Image:
    """Return the picture in a file as every viewer shows it; see `image_files`.

    Args:
        path: of the file.
        name: what the message calls the argument.

    Raises:
        ValueError: naming a file that is not there, cannot be read or is no image.
    """
    try:
        return as_shown(Path(path), Reading(setting=name))
    except BadImageError as error:
        raise ValueError(
            f"`{name}` has {error.name}, which cannot be read: {error.reason}; it must be an image."
        ) from error


def _channels_first(array: torch.Tensor, name: str) -> torch.Tensor:
    if array.ndim not in (3, 4):
        raise ValueError(
            f"`{name}` has shape {tuple(array.shape)}; arrays are (H, W, C) or (N, H, W, C)."
        )
    return array.movedim(-1, -3)


def _from_pil(
    images: Sequence[Image.Image], shape: tuple[int, int, int], name: str
) -> torch.Tensor:
    channels, height, width = shape
    mode = PIL_MODES.get(channels)
    for i, image in enumerate(images):
        if image.mode != mode:
            raise ValueError(
                f"`{name}[{i}]` has mode {image.mode!r}; a network of {channels} channels takes "
                f"{mode!r}. Convert it yourself: image.convert({mode!r})."
            )
        if image.size != (width, height):
            raise ValueError(
                f"`{name}[{i}]` is {image.size[0]}x{image.size[1]} (width x height); the network "
                f"takes {width}x{height}."
            )
    arrays = [np.asarray(i).reshape(height, width, channels) for i in images]
    return _channels_first(torch.from_numpy(np.stack(arrays)), name)


def _unit_range(batch: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if batch.dtype == torch.uint8:
        return batch.to(dtype) / 255
    if not batch.is_floating_point():
        raise ValueError(
            f"`{name}` has dtype {batch.dtype}; it must be uint8 in 0 .. 255 or floating point in "
            "[0, 1]."
        )
    low, high = float(batch.min()), float(batch.max())
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        hint = (
            " Pass (x + 1) / 2 for images in [-1, 1]." if -1.0 <= low < 0.0 and high <= 1.0 else ""
        )
        raise ValueError(
            f"`{name}` has values in [{low:.4g}, {high:.4g}]; floating-point images lie in [0, "
            f"1].{hint}"
        )
    return batch.to(dtype)


def to_unit_range(x: torch.Tensor) -> torch.Tensor:
    """Return model-space samples as images in [0, 1], clamped as diffusers does: same shape."""
    return (x / 2 + 0.5).clamp(0, 1)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Return model-space samples (N, C, H, W) as rounded uint8 images (N, H, W, C)."""
    return (to_unit_range(x) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def to_pil(array: np.ndarray) -> list[Image.Image]:
    """Return uint8 images (N, H, W, C) as PIL images.

    Raises:
        ValueError: for channel counts that PIL has no mode for.
    """
    check_pil_channels(array.shape[-1])
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in array]


def check_pil_channels(channels: int) -> None:
    """Check that PIL has a mode for `channels`.

    Raises:
        ValueError: otherwise.
    """
    if channels not in PIL_MODES:
        raise ValueError(
            f"`unet` has {channels} channels, which PIL cannot show (1, 3 or 4); "
            "use output_type 'np' or 'pt'."
        )


def check_finite(x: torch.Tensor, start: int = 0, seeds: Sequence[int] | None = None) -> None:
    """Check the samples x (B, C, H, W) of the images from `start` on; one read from the device.

    Raises:
        ValueError: naming the images whose values are not finite, and what the cause may be.
    """
    if bool(x.isfinite().all()):
        return
    bad = (~x.isfinite().flatten(1).all(dim=1)).nonzero().flatten() + start
    numbers = [i if seeds is None else seeds[i] for i in bad.tolist()]
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    named = f"seeds {shown}" if seeds is not None else f"images {shown} (counted from 0)"
    raise ValueError(
        f"{len(numbers)} of {len(x)} samples are not finite: {named}. All must be: check the "
        "network's weights; use bfloat16 or float32 in the place of float16, which overflows "
        "first; or take smaller steps (a smaller `snr`, more steps, a lower `solver_order`)."
    )


class OutputBuffer:
    """Gathers samples in their final form: any number of images costs one batch more.

    `pil`: a list of PIL images. `np`: float32 (N, H, W, C) in [0, 1]. `pt`: (N, C, H, W) in [0, 1]
    on the CPU, in the dtype of the sample. `latent`: the same in model space, neither scaled nor
    clamped. With `seeds` a sample that is not finite is named by its seed, too. With a `codec` the
    samples are latents, and `shape` is of the images that they are decoded to.
    """

    def __init__(
        self,
        output_type: str,
        num_images: int,
        shape: tuple[int, int, int],
        seeds: Sequence[int] | None = None,
        codec: Codec | None = None,
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; it must be one of {OUTPUT_TYPES}.")
        if output_type == "pil":
            check_pil_channels(shape[0])
        self.output_type, self.num_images, self.shape = output_type, num_images, shape
        self.seeds, self.codec = seeds, None if output_type == "latent" else codec
        self.images: Any = [] if output_type == "pil" else None

    def add(self, start: int, x0: torch.Tensor) -> None:
        """Store the samples x0 (B, C, H, W) as the images from `start` on.

        Raises:
            ValueError: for values that are not finite, which would come out as black images.
        """
        check_finite(x0, start, self.seeds)
        if self.codec is not None:
            x0 = self.codec.decode(x0)
            check_finite(x0, start, self.seeds)
        if self.output_type == "pil":
            self.images.extend(to_pil(to_uint8(x0)))
            return
        block = x0 if self.output_type == "latent" else to_unit_range(x0)
        block = block.movedim(1, -1).float() if self.output_type == "np" else block
        if self.images is None:
            self.images = torch.empty((self.num_images, *block.shape[1:]), dtype=block.dtype)
        self.images[start : start + block.shape[0]] = block.cpu()

    def result(self) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Return all images in the type that was asked for."""
        return self.images.numpy() if self.output_type == "np" else self.images
