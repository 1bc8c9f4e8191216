"""Pictures made of pictures: grids of samples, and a sample as it forms."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from ddim_schedulers.pipelines.images import to_pil, to_uint8
from ddim_schedulers.pipelines.observers import SamplingPath

SHOWN_PIXELS = 64


def make_grid(
    images: Sequence[Image.Image] | np.ndarray | torch.Tensor,
    columns: int | None = None,
    *,
    padding: int = 2,
    scale: int | None = 1,
) -> Image.Image:
    """Return one picture of all images, row by row on a mid-grey ground.

    Args:
        images: PIL images of one size and mode; an array (N, H, W, C), uint8 or in [0, 1]; or a
            tensor (N, C, H, W) in [0, 1]: what the pipelines return as pil, np and pt.
        columns: images in a row; None makes the grid about square.
        padding: pixels between and around the images, >= 0.
        scale: integer factor of enlargement, by repeating pixels; None enlarges images up to 64
            pixels on their short side, so that small ones can be seen.

    Raises:
        ValueError: for no images, images of different sizes or modes, or arguments out of range.
    """
    tiles = _as_pil(images)
    if not tiles:
        raise ValueError("`images` is empty; a grid needs at least one.")
    size, mode = tiles[0].size, tiles[0].mode
    if any(tile.size != size or tile.mode != mode for tile in tiles):
        raise ValueError("`images` differ in size or mode; a grid needs them all alike.")
    columns = math.ceil(math.sqrt(len(tiles))) if columns is None else columns
    scale = max(1, SHOWN_PIXELS // min(size)) if scale is None else scale
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(
            f"`columns` is {columns}, `padding` {padding}, `scale` {scale}; they must be >= "
            "1, >= 0 and >= 1."
        )
    scaled = (size[0] * scale, size[1] * scale)
    tiles = [tile.resize(scaled, Image.Resampling.NEAREST) for tile in tiles]
    return _joined(tiles, columns, padding, padding, 128)


def tiled(images: torch.Tensor, columns: int, grey: int = 128) -> Image.Image:
    """Return images (N, C, H, W) in [-1, 1] as one picture, with lines of one pixel between them.

    Of other numbers of channels than 1 and 3, the first is shown.

    Args:
        images: at least one.
        columns: images in a row.
        grey: of the lines, 0 .. 255.
    """
    shown = images if images.shape[1] in (1, 3) else images[:, :1]
    return _joined(to_pil(to_uint8(shown)), columns, 1, 0, grey)


def _joined(
    tiles: list[Image.Image], columns: int, padding: int, border: int, grey: int
) -> Image.Image:
    """Paste tiles of one size and mode row by row on a ground."""
    (width, height), mode = tiles[0].size, tiles[0].mode
    step, rows = (width + padding, height + padding), math.ceil(len(tiles) / columns)
    edge = 2 * border - padding
    ground = Image.new("L", (1, 1), grey).convert(mode).getpixel((0, 0))
    canvas = Image.new(mode, (columns * step[0] + edge, rows * step[1] + edge), ground)
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i % columns * step[0] + border, i // columns * step[1] + border))
    return canvas


def path_grid(
    path: SamplingPath,
    columns: int = 10,
    *,
    scale: int = 1,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Image.Image:
    """Return x0_hat as it forms, an image a row: from the first step to the result.

    It is the picture of DDPM, Fig. 6.

    Args:
        path: of `GenerationPipeline(..., return_path=True)`.
        columns: steps shown, evenly chosen, >= 2, the result included as the last.
        scale: integer factor of enlargement.
        decode: of a path of latents: `pipe.pixels_of`.

    Raises:
        ValueError: if `columns` is below 2.
    """
    if columns < 2:
        raise ValueError(f"`columns` is {columns!r}; it must be >= 2.")
    total = len(path.timesteps)
    shown = min(columns - 1, total)
    picked = [round(i * (total - 1) / max(shown - 1, 1)) for i in range(shown)]
    frames = torch.cat([path.x0[picked], path.x_t[-1:]])
    rows = frames.transpose(0, 1).flatten(0, 1)
    pixels = rows if decode is None else decode(rows)
    return make_grid(to_pil(to_uint8(pixels)), shown + 1, scale=scale)


def _as_pil(images: Sequence[Image.Image] | np.ndarray | torch.Tensor) -> list[Image.Image]:
    if isinstance(images, torch.Tensor):
        return to_pil(to_uint8(images * 2 - 1))
    if isinstance(images, np.ndarray):
        unit = images if images.dtype == np.uint8 else (images * 255).round().astype(np.uint8)
        return to_pil(unit)
    return list(images)
