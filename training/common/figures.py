"""Figures of images and lines, without a display: what the demo and the evaluation draw with."""

import functools
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.pictures import tiled

logger = logging.get_logger(__name__)


@functools.cache
def can_plot() -> bool:
    """Tell whether matplotlib is installed; if it is not, say once how to get it."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    logger.warning('No curves are drawn: pip install "ddim-schedulers[plots]" brings matplotlib.')
    return False


def panels_figure(panels: Sequence[tuple[str, Image.Image]], columns: int, width: float) -> Any:
    """Return a figure of titled pictures (of `tiled`), row by row, each `width` inches wide."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    tallest = max(picture.height / picture.width for _, picture in panels)
    figure = Figure(
        figsize=(width * columns, (width * tallest + 0.35) * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (title, picture) in zip(axes, panels, strict=False):
        axis.imshow(np.asarray(picture), **_GREY)
        # a letter is about 0.6 of its size wide, and an inch has 72 points
        axis.set_title(title, fontsize=min(9, width * 72 / (0.6 * max(len(title), 1))))
    return figure


_GREY = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"}


def rows_figure(rows: Sequence[tuple[str, torch.Tensor]]) -> Any:
    """Return a figure of titled rows of images (N, C, H, W) in [-1, 1]."""
    return panels_figure([(title, tiled(images, len(images))) for title, images in rows], 1, 7.0)


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, whole or not at all."""
    encoded = io.BytesIO()
    figure.savefig(encoded, dpi=dpi, format="png")
    write_bytes(path, encoded.getvalue())
