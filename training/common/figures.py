"""Figures of images and lines, without a display: what the demo and the evaluation draw with."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers.pipelines.files import write_bytes


def tiles(images: torch.Tensor, columns: int) -> np.ndarray:
    """Return images (N, C, H, W) in [-1, 1] as one array (height, width, C) with grey lines.

    Of other numbers of channels than 1 and 3, the first is shown.
    """
    shown = images if images.shape[1] in (1, 3) else images[:, :1]
    padded = torch.nn.functional.pad(shown.clamp(-1, 1), (0, 1, 0, 1), value=0.0)
    n, channels, height, width = padded.shape
    rows = -(-n // columns)
    blank = padded.new_zeros(rows * columns - n, channels, height, width)
    grid = torch.cat([padded, blank]).reshape(rows, columns, channels, height, width)
    joined = grid.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return joined[:-1, :-1].numpy()


def panels_figure(panels: Sequence[tuple[str, np.ndarray]], columns: int, width: float) -> Any:
    """Return a figure of titled pictures (of `tiles`), row by row, each `width` inches wide."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    tallest = max(array.shape[0] / array.shape[1] for _, array in panels)
    figure = Figure(
        figsize=(width * columns, (width * tallest + 0.35) * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (title, array) in zip(axes, panels, strict=False):
        unit = ((array + 1) / 2).clip(0, 1)
        axis.imshow(unit.squeeze(-1) if unit.shape[-1] == 1 else unit, **_GREY)
        axis.set_title(title, fontsize=9)
    return figure


_GREY = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}


def rows_figure(rows: Sequence[tuple[str, torch.Tensor]]) -> Any:
    """Return a figure of titled rows of images (N, C, H, W) in [-1, 1]."""
    return panels_figure([(title, tiles(images, len(images))) for title, images in rows], 1, 7.0)


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, whole or not at all."""
    encoded = io.BytesIO()
    figure.savefig(encoded, dpi=dpi, format="png")
    write_bytes(path, encoded.getvalue())
