"""The files of a cell: its measurements, checked value by value, and its first images."""

import hashlib
import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ddim_schedulers.pipelines.files import write_json, write_npz
from ddim_schedulers.pipelines.sampling_files import ORIGIN, SETTINGS
from ddim_schedulers.pipelines.workdir import Workdir
from ddim_schedulers.reading import DamagedFileError, read_json, read_npz
from ddim_schedulers.training.common.seals import read_sealed_json, sealed
from ddim_schedulers.training.evaluation.grid import Cell
from ddim_schedulers.training.metrics.distances import METRICS

Value = TypeVar("Value")

PREVIEW = 16


# Cells of earlier versions hold a fingerprint of their settings alone. These are the settings of
# the last of those versions, by which such a cell is recognised; nothing is added to them.
KNOWN = {
    "job": """batch_size eta file_format num_images num_inference_steps seed timesteps
        use_clipped_model_output""".split(),
    "scheduler_config": """beta_end beta_schedule beta_start calibration clip_sample
        clip_sample_range dynamic_thresholding_ratio eta late_noise_cap lower_order_final
        num_train_timesteps original_inference_steps prediction_type quadratic_end
        rescale_betas_zero_snr reverse_variance sample_max_value set_alpha_to_one sigma
        snr_shift_scale solver_corrector solver_form solver_order steps_offset thresholding
        timestep_spacing timesteps trained_betas variance_type""".split(),
}
TOLD = """channels_last compiled job network network_config network_dtype scheduler
    scheduler_config""".split()
# Some of those versions lacked these.
KNOWN_LATER = ("late_noise_cap", "original_inference_steps", "snr_shift_scale")


class _OfCells(Workdir[Cell, Value]):
    """Files of cells; a damaged one gets one warning, and the cell is measured again."""

    argument = "output_dir"

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        super().__init__(folder)
        self._say = tell
        self._told: set[str] = set()

    def tell(self, error: DamagedFileError) -> None:
        """Say once that a file is damaged."""
        line = f"{error} The cell is measured again."
        if line not in self._told:
            self._told.add(line)
            self._say(line)


class CellFiles(_OfCells[dict[str, Any]]):
    """The measurements of the cells in a folder.

    Args:
        folder: of the evaluation.
        tell: called with a line of text about a damaged file, once for each line.
    """

    holds = "a cell"
    remedy = "delete the cell's file, or choose another folder"

    def path_of(self, item: Cell) -> Path:
        """Return the file of a cell's measurements."""
        return self.folder / "cells" / f"{item.label}.json"

    def images_of(self, cell: Cell) -> Path:
        """Return the folder of a cell's samples."""
        return self.path_of(cell).with_suffix("")

    def read(self, item: Cell) -> dict[str, Any]:
        """Return what a cell's file holds.

        Raises:
            DamagedFileError: it is not whole, or not of this cell.
        """
        path = self.path_of(item)
        return check_cell(read_sealed_json(path), item, path)

    def save(self, item: Cell, value: dict[str, Any]) -> None:
        """Write a cell's measurements."""
        write_json(self.path_of(item), sealed(value))

    def require_made_with(
        self, cell: Cell, kept: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]
    ) -> None:
        """Refuse a cell that was made with other settings.

        Args:
            cell: which.
            kept: what its file holds.
            now: the settings of this evaluation.
            defaults: see `workdir.differences`.

        Raises:
            ValueError: naming what differs. A cell of an earlier version, without samples, does not
                say what it is.
        """
        before, holds = kept["settings"], f"the cell {cell.label}"
        if isinstance(before, str):
            if before in earlier_fingerprints(now, defaults):
                return
            samples = self.images_of(cell) / SETTINGS
            if not samples.exists():
                self.refuse("an earlier version wrote it, which kept a fingerprint alone", holds)
            before = read_json(samples)
            before.pop(ORIGIN, None)
        self.require_same(as_told(before), as_told(now), defaults, holds)


class FirstImages(_OfCells[np.ndarray]):
    """The first images of the cells in a folder.

    Args:
        cells: their measurements, which hold a check sum of the images.
        shape: (C, H, W) of the images.
        tell: called with a line of text about a damaged file, once for each line.
    """

    def __init__(
        self, cells: CellFiles, shape: tuple[int, int, int], tell: Callable[[str], None]
    ) -> None:
        super().__init__(cells.folder, tell)
        self.cells, self.shape = cells, shape

    def path_of(self, item: Cell) -> Path:
        """Return the file of a cell's first images."""
        return self.cells.path_of(item).with_suffix(".npz")

    def read(self, item: Cell) -> np.ndarray:
        """Return the first images of a measured cell, uint8 (n, H, W, C).

        Raises:
            DamagedFileError: they are not whole, or not those of the cell's measurements.
        """
        path = self.path_of(item)
        channels, height, width = self.shape
        shape = (min(PREVIEW, item.n), height, width, channels)
        images = read_npz(path, ["images"], limit=int(np.prod(shape)))["images"]
        if images.shape != shape or images.dtype != np.uint8:
            raise DamagedFileError(path, f"it holds {images.shape} of {images.dtype}, not {shape}")
        measured = self.cells.load(item) or {}
        if measured.get("preview") not in (None, check_sum_of_images(images)):
            raise DamagedFileError(path, "its images are not those of the cell")
        return images

    def save(self, item: Cell, value: np.ndarray) -> None:
        """Write a cell's first images, uint8 (n, H, W, C)."""
        write_npz(self.path_of(item), {"images": value})


def as_told(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as a cell's file holds them: numbers that are not finite as text."""
    told: dict[str, Any] = json.loads(json.dumps(settings), parse_constant=str)
    return told


def earlier_fingerprints(settings: dict[str, Any], defaults: dict[str, Any]) -> set[str]:
    """Return the fingerprints that earlier versions made of the same settings.

    They did not know the settings that came later, and did what those default to.
    """
    # an unknown setting is its default; a scheduler of another package has no unknown settings
    unchanged = {
        (group, name)
        for group in KNOWN
        for name, value in settings[group].items()
        if value == defaults.get(f"{group}.{name}")
    }
    new = {(group, name) for group, name in unchanged if name not in KNOWN[group]}
    later = [("scheduler_config", name) for name in KNOWN_LATER]
    subsets = [set(c) for n in range(len(later) + 1) for c in combinations(later, n)]
    found = set()
    for lacked in [more | subset & unchanged for more in (new, set()) for subset in subsets]:
        then = {
            name: value for name, value in settings.items() if name in TOLD or value is not None
        }
        for group in KNOWN:
            then[group] = {k: v for k, v in settings[group].items() if (group, k) not in lacked}
        found.add(hashlib.sha256(json.dumps(then, sort_keys=True).encode()).hexdigest())
    return found


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
    require(isinstance(settings, str | dict), "settings", settings)
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
            sometimes = metric.of_labels or metric.of_ode
            needed = not sometimes and (has_classes or not metric.of_classes)
            if needed or name in measured:
                found = measured.get(name)
                require(_is_number(found, metric.low, metric.high), f"{name} of {space}", found)
    return content


def _is_number(value: Any, low: float, high: float = math.inf, integer: bool = False) -> bool:
    kinds = (int,) if integer else (int, float)
    return type(value) in kinds and low <= value <= high


def check_sum_of_images(images: np.ndarray) -> str:
    """Return the SHA-256 of uint8 images."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
