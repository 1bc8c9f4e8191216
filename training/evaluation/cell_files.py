"""The files of a cell: its measurements, checked value by value, and its first images."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddim_schedulers.pipelines.files import write_json, write_npz
from ddim_schedulers.pipelines.workdir import whole
from ddim_schedulers.reading import DamagedFileError, read_npz
from ddim_schedulers.training.common.seals import read_sealed_json, sealed
from ddim_schedulers.training.evaluation.config import Cell
from ddim_schedulers.training.metrics.distances import METRICS

PREVIEW = 16


class CellFiles:
    """The measurements and first images of the cells in a folder.

    Args:
        folder: of the evaluation.
        shape: (C, H, W) of the images.
        tell: called with a line of text about a damaged file, once for each line.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int, int], tell: Callable[[str], None]
    ) -> None:
        self.folder, self.shape, self._say = folder / "cells", shape, tell
        self._told: set[str] = set()

    def path_of(self, cell: Cell) -> Path:
        """Return the file of a cell's measurements."""
        return self.folder / f"{cell.label}.json"

    def images_of(self, cell: Cell) -> Path:
        """Return the folder of a cell's samples."""
        return self.folder / cell.label

    def kept(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell's file holds; nothing if it is missing or damaged."""
        path = self.path_of(cell)
        return whole(path, lambda: self.read(cell), self._tell) or {}

    def has_preview(self, cell: Cell, kept: dict[str, Any]) -> bool:
        """Return whether a cell's first images are there, and those of its measurements."""
        path = self.path_of(cell).with_suffix(".npz")

        def read() -> bool:
            if kept.get("preview") not in (None, check_sum_of_images(self.preview(cell))):
                raise DamagedFileError(path, "its images are not those of the cell")
            return True

        return whole(path, read, self._tell) is not None

    def read(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell's file holds.

        Raises:
            DamagedFileError: it is not whole, or not of this cell.
        """
        path = self.path_of(cell)
        return check_cell(read_sealed_json(path), cell, path)

    def preview(self, cell: Cell) -> np.ndarray:
        """Return the first images of a measured cell, uint8 (n, H, W, C)."""
        path = self.path_of(cell).with_suffix(".npz")
        channels, height, width = self.shape
        shape = (min(PREVIEW, cell.n), height, width, channels)
        images = read_npz(path, ["images"], limit=int(np.prod(shape)))["images"]
        if images.shape != shape or images.dtype != np.uint8:
            raise DamagedFileError(path, f"it holds {images.shape} of {images.dtype}, not {shape}")
        return images

    def write(self, cell: Cell, measured: dict[str, Any], first: np.ndarray) -> None:
        """Write a cell's measurements and its first images, uint8 (n, H, W, C)."""
        path = self.path_of(cell)
        write_npz(path.with_suffix(".npz"), {"images": first})
        write_json(path, sealed({**measured, "preview": check_sum_of_images(first)}))

    def _tell(self, error: DamagedFileError) -> None:
        line = f"{error} The cell is measured again."
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def check_cell(content: dict[str, Any], cell: Cell, path: Path) -> dict[str, Any]:
    """Return the content of a cell's file if it can be of that cell.

    Raises:
        DamagedFileError: naming the first value that cannot.
    """

    def require(holds: bool, name: str, value: Any) -> None:
        if not holds:
            raise DamagedFileError(path, f"its {name} is {str(value)[:80]!r}")

    own = {"row": cell.sampler.name, "steps": cell.steps, "n": cell.n, "repeat": cell.repeat}
    for name, value in own.items():
        found = content.get(name)
        require(type(found) is type(value) and found == value, name, found)
    for name in ("network_calls", "processes"):
        require(_is_number(content.get(name), 1, integer=True), name, content.get(name))
    for name in ("seconds", "images_per_second"):
        value = content.get(name)
        require(value is None or _is_number(value, 0), name, value)
    settings, made_with = content.get("settings"), content.get("made_with", {})
    require(isinstance(settings, str), "settings", settings)
    require(isinstance(made_with, dict), "made_with", made_with)
    metrics = content.get("metrics")
    require(isinstance(metrics, dict), "metrics", metrics)
    for space, measured in content["metrics"].items():
        require(isinstance(measured, dict), f"metrics of {space}", measured)
        require(isinstance(measured.get("reference"), dict), f"reference of {space}", measured)
        for name in ("n", "k"):
            found = measured.get(name)
            require(_is_number(found, 1, integer=True), f"{name} of {space}", found)
        has_classes = any(
            metric.of_classes and name in measured for name, metric in METRICS.items()
        )
        for name, metric in sorted(METRICS.items()):
            if has_classes or not metric.of_classes:
                found = measured.get(name)
                require(_is_number(found, metric.low, metric.high), f"{name} of {space}", found)
    return content


def _is_number(value: Any, low: float, high: float = math.inf, integer: bool = False) -> bool:
    kinds = (int,) if integer else (int, float)
    return type(value) in kinds and low <= value <= high


def check_sum_of_images(images: np.ndarray) -> str:
    """Return the SHA-256 of uint8 images."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
