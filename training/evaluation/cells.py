"""The evaluation of a trained model: which scheduler, how many steps, which eta, at what cost.

    OUTPUT/cells/LABEL/        sample.json and the samples of a cell (with `keep_images`)
    OUTPUT/cells/LABEL.json    its figures, written when they are all there
    OUTPUT/cells/LABEL.npz     its first images
    OUTPUT/reference-*.safetensors   features of the real images, by fingerprint (or in cache_dir)
    OUTPUT/metrics.json        everything; report.md and the pictures are made of it

Both sides are uint8. Processes share the samples of a cell and their features; the features are
then put in the order of the samples, so the figures do not depend on the number of processes.
"""

import copy
import hashlib
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers.config_reading import PROCESS_KEYS
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.files import check_folders, write_bytes, write_json, write_npz
from ddim_schedulers.pipelines.images import to_uint8
from ddim_schedulers.pipelines.ownership import Owner
from ddim_schedulers.pipelines.sampling import predict, step_arguments
from ddim_schedulers.pipelines.sampling_job import (
    SamplingJob,
    read_shard,
    sample_to_directory,
    settings_of,
)
from ddim_schedulers.reading import DamagedFileError, npz_names, read_npz
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.repositories import fetch
from ddim_schedulers.training.common.seals import pack_sealed, read_sealed, read_sealed_json, sealed
from ddim_schedulers.training.common.versions import versions
from ddim_schedulers.training.data.images import ImageData, load_data
from ddim_schedulers.training.evaluation.config import (
    CLASSIFIER,
    FIGURES,
    Cell,
    EvaluationConfig,
    defaults_of,
    scheduler_class,
)
from ddim_schedulers.training.metrics import features as spaces
from ddim_schedulers.training.metrics.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_metrics,
)
from ddim_schedulers.training.networks.places import pipeline_folder

PREVIEW = 16
READ_BATCH = 500
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The real images of one feature space.

    Attributes:
        train: features of the training part, (m, F).
        held_out: features of the held-out part, (k, F).
        fingerprint: of the images, as they went in, and of the feature space.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    fingerprint: str


class Evaluation:
    """A model, real images and feature spaces, ready to measure cells.

    Args:
        config: what is asked for.
        team: the processes that share the work.
        device: of the network and the feature spaces.
        progress: called with a line of text now and then.

    Raises:
        ValueError: whatever does not fit together: channels, sizes, pixels that are not 8-bit, too
            few images, a scheduler that refuses its settings or steps, a feature space that gives
            something else than features. Nothing was sampled then.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        team: Team | None = None,
        device: torch.device | str = "cpu",
        progress: Progress = lambda line: None,
    ) -> None:
        self.config, self.team, self.progress = config, team or Team(), progress
        self.device = torch.device(device)
        self.folder = Path(config.output_dir)
        check_folders(self.folder, "cells", "output_dir")
        self.warm = self.shows_steps = False
        self.told: set[str] = set()
        self.commit = commit()
        self.pipe = self._load_pipeline()
        self.reference, self.held_out = self._load_data()
        for cell in config.cells:  # what a scheduler refuses is found before anything is sampled
            self._check_scheduler(cell)
        self.networks = {name: self._network(name) for name in config.features}
        self.order = self._order()
        self.real = {name: self._real(name) for name in config.features}
        # the self-check: what a perfect sampler would get, by the n of the tables
        self.self_check: dict[int, dict[str, Any]] = {}
        if self.team.index == 0:
            self.self_check = {n: self.real_images(n) for n in {t.n for t in config.tables}}

    def _load_pipeline(self) -> GenerationPipeline:
        found = fetch(pipeline_folder(self.config.pipeline))
        try:
            pipe = found.read(GenerationPipeline)
        except OSError as error:
            raise ValueError(
                f"`pipeline` is {self.config.pipeline!r}; it cannot be loaded: {error}"
            ) from error
        found.finish(pipe.unet)
        self.pipeline_commit = found.commit
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device).speed_up(
            compile=self.config.compile,
            channels_last=self.config.channels_last,
            dtype=getattr(torch, self.config.dtype),
        )

    def _load_data(self) -> tuple[ImageData, ImageData]:
        reference, held_out = load_data(self.config.data)
        if reference.shape != self.pipe.image_shape:
            raise ValueError(
                f"`data`: the images are {reference.shape}, the network's {self.pipe.image_shape} "
                "(C, H, W)"
            )
        if reference.levels is None or reference.levels > 256:
            raise ValueError(
                "`data`: the images are not 8-bit, as both sides of a comparison must be"
            )
        if self.config.held_out is not None:
            held_out = load_data(self.config.held_out)[0]
        if self.team.index == 0:
            self.progress(reference.inventory.line())
            if self.config.held_out is not None and held_out is not None:
                self.progress(f"held out: {held_out.inventory.line()}")
        if held_out is None or len(held_out) < 2 or held_out.shape != reference.shape:
            found = "none" if held_out is None else f"{len(held_out)} of {held_out.shape}"
            raise ValueError(
                f"held-out images: {found}; real images are measured like samples, so there must "
                f"be at least 2 of {reference.shape}: set validation_fraction or held_out"
            )
        return reference, held_out

    def _check_scheduler(self, cell: Cell) -> None:
        try:
            scheduler = self._pipe_of(cell).scheduler
            scheduler.set_timesteps(cell.steps)
            step_arguments(scheduler, None, None, cell.row.use_clipped_model_output)
        except ValueError as error:
            raise ValueError(f"row {cell.row.name!r}, S = {cell.steps}: {error}") from error

    def _order(self) -> np.ndarray:
        """Return the sorted positions of the reference images: all, or a fixed choice."""
        count = min(len(self.reference), self.config.reference_images or len(self.reference))
        fewest = min([count, *(table.n for table in self.config.tables)])
        if self.config.neighbours >= fewest:
            raise ValueError(
                f"`neighbours` is {self.config.neighbours}; it must be below the number of samples "
                f"and of reference images, here {fewest}"
            )
        return np.sort(
            np.random.default_rng(self.config.seed).permutation(len(self.reference))[:count]
        )

    # -- feature spaces and real images -----------------------------------------------------------

    def _network(self, name: str) -> torch.nn.Module:
        if name == CLASSIFIER:
            name = str(self._classifier())
        return spaces.make_feature_space(name, self.reference.shape).to(self.device)

    def classifier_path(self) -> Path:
        """Return where the classifier is, or will be."""
        return Path(self.config.classifier or self.folder / "classifier.safetensors")

    def _classifier(self) -> Path:
        path = self.classifier_path()
        self.team.wait()  # nobody looks after one has begun to write
        there = path.exists() and (self.config.classifier is not None or self._is_own(path))
        self.team.wait()  # nobody writes before all have looked
        if not there and self.team.index == 0:
            labels = labels_of(self.reference, self.config)
            network, record = spaces.train_classifier(
                lambda rows: as_uint8_sees(self.reference.batch(rows)[0]),
                labels,
                self.reference.shape,
                epochs=self.config.classifier_epochs,
                seed=self.config.seed,
                progress=self.progress,
            )
            spaces.save_classifier(network, record, path)
        self.team.wait()
        return path

    def _is_own(self, path: Path) -> bool:
        """Return whether the folder's own classifier is whole; it is trained anew if not.

        Raises:
            ValueError: it was trained in another way than is asked for.
        """
        try:
            record = spaces.classifier_record(path)
        except DamagedFileError as error:
            self.progress(f"{error} It is trained anew.")
            return False
        wanted = {"epochs": self.config.classifier_epochs, "seed": self.config.seed}
        wanted["images"] = len(self.reference)
        found = {**record, "images": record["train_n"] + record["held_out_n"]}
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(
                    f"`output_dir`: {path} was trained with {name} = {found[name]}, but {value} is "
                    "asked for; delete it, and the cells are measured anew with another, or say "
                    "`classifier` to use this one"
                )
        return True

    def _real(self, name: str) -> Reference:
        """Return features of the real images, from the cache where they are in it."""
        parts = {"train": (self.reference, self.order)}
        parts["held_out"] = (self.held_out, np.arange(len(self.held_out)))
        digest = hashlib.sha256(spaces.fingerprint(name, self.networks[name]).encode())
        for part, (data, rows) in parts.items():
            digest.update(f"{part} {len(rows)} {data.shape}".encode())
            for images in _batches(data, rows):
                digest.update(to_uint8(images).tobytes())
        fingerprint = digest.hexdigest()
        path = (
            Path(self.config.cache_dir or self.folder) / f"reference-{fingerprint[:16]}.safetensors"
        )
        self.team.wait()
        kept = self._kept_features(path, fingerprint, {p: len(r) for p, (_, r) in parts.items()})
        if kept is None:
            self.progress(f"features of the real images: {name}")
            kept = {part: self._shared(name, data, rows) for part, (data, rows) in parts.items()}
            for part, value in kept.items():
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"`features` name {name!r}, which gives values that are not finite for "
                        f"real images ({part})"
                    )
            if self.team.index == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, pack_sealed(kept, fingerprint))
            self.team.wait()
        return Reference(kept["train"], kept["held_out"], fingerprint)

    def _kept_features(
        self, path: Path, fingerprint: str, rows: dict[str, int]
    ) -> dict[str, torch.Tensor] | None:
        """Return the features in a file of the cache; None if it is missing or damaged."""
        if not path.exists():
            return None
        try:
            kept = read_sealed(path, fingerprint, unsealed=True)
            found = {part: len(value) if value.ndim == 2 else -1 for part, value in kept.items()}
            if found != rows or len({value.shape[1] for value in kept.values()}) != 1:
                raise DamagedFileError(path, f"it does not hold features of {rows} images")
        except DamagedFileError as error:
            self.progress(f"{error} It is made anew.")
            return None
        return kept

    def _shared(self, name: str, data: ImageData, rows: np.ndarray) -> torch.Tensor:
        parts = chunks(len(rows), READ_BATCH)
        mine = [
            (start, self._features(name, to_uint8(data.batch(rows[start:stop])[0])))
            for start, stop in parts[self.team.index :: self.team.count]
        ]
        return self._joined(mine)

    def _features(self, name: str, images: np.ndarray) -> torch.Tensor:
        """Return features of uint8 images (B, H, W, C)."""
        return spaces.extract(self.networks[name], from_uint8(images))

    def _joined(self, mine: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Return the rows of all processes, in the order of their positions."""
        found = self.team.gather([(start, value.numpy()) for start, value in mine])
        return torch.cat(
            [torch.from_numpy(value) for _, value in sorted(found, key=lambda f: f[0])]
        )

    # -- one cell ---------------------------------------------------------------------------------

    def _pipe_of(self, cell: Cell) -> GenerationPipeline:
        cls: Any = scheduler_class(cell.row.scheduler)
        scheduler = cls.from_config(self.pipe.scheduler.config, **copy.deepcopy(cell.row.settings))
        return self.pipe.sibling(GenerationPipeline, scheduler=scheduler)

    def unsaid(self, cell: Cell) -> dict[str, Any]:
        """Return the settings of a cell's scheduler that are no defaults and not in the row's name.

        What describes the process is the network's, the same in every row.
        """
        defaults, config = defaults_of(cell.row.scheduler), self._pipe_of(cell).scheduler.config
        silent = {*PROCESS_KEYS, "calibration", *cell.row.said}
        return {
            key: config[key]
            for key, default in sorted(defaults.items())
            if key not in silent and key in config and config[key] != default
        }

    def _job(self, cell: Cell) -> SamplingJob:
        return SamplingJob(
            num_images=cell.n,
            batch_size=self.config.batch_size,
            seed=self.config.seed + cell.repeat * cell.n,
            file_format="npz",
            num_inference_steps=cell.steps,
            use_clipped_model_output=cell.row.use_clipped_model_output,
        )

    def path_of(self, cell: Cell) -> Path:
        """Return the file of a cell's figures."""
        return self.folder / "cells" / f"{cell.label}.json"

    def _kept(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell's file holds; nothing if it is missing or damaged."""
        path = self.path_of(cell)
        if not path.exists():
            return {}
        try:
            return check_cell(read_sealed_json(path), cell, path)
        except DamagedFileError as error:
            self._tell(f"{error} The cell is measured anew.")
            return {}

    def _tell(self, line: str) -> None:
        """Say something once."""
        if line not in self.told:
            self.told.add(line)
            self.progress(line)

    def _has_preview(self, cell: Cell, kept: dict[str, Any]) -> bool:
        """Return whether a cell's first images are there, and those of its figures."""
        path = self.path_of(cell).with_suffix(".npz")
        if not path.exists():
            return False
        try:
            images = self.preview(cell)
            if kept.get("preview") not in (None, digest_of_images(images)):
                raise DamagedFileError(path, "its images are not those of the cell")
        except DamagedFileError as error:
            self._tell(f"{error} The cell is measured anew.")
            return False
        return True

    def missing(self, cell: Cell) -> list[str]:
        """Return the feature spaces in which a cell is still to be measured."""
        kept = self._kept(cell)
        if not kept or not self._has_preview(cell, kept):
            return list(self.config.features)
        have = kept["metrics"]
        return [
            name
            for name in self.config.features
            if have.get(name, {}).get("reference") != self._reference_note(name)
            or have[name].get("k") != self.config.neighbours
        ]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return the figures of a cell: from its file, or by sampling what is missing.

        Raises:
            ValueError: if the folder holds the cell with other settings, naming what differs.
        """
        pipe, job = self._pipe_of(cell), self._job(cell)
        path, images = self.path_of(cell), self.folder / "cells" / cell.label
        settings = digest_of(settings_of(pipe, job))
        kept, missing = self._kept(cell), self.missing(cell)
        self.team.wait()  # nobody writes before all have looked
        if kept and kept["settings"] != settings:
            raise ValueError(
                f"`output_dir`: {path} was made with other settings (network, scheduler or seeds); "
                "delete it or choose another output_dir"
            )
        if not missing:
            return kept
        parts = chunks(cell.n, job.batch_size)
        shards = [images / "shards" / f"{a:06d}-{b - 1:06d}.npz" for a, b in parts]
        cost = self._sample(pipe, job, images)

        def read(i: int) -> np.ndarray:
            (a, b), shape = parts[i], pipe.image_shape
            seeds = np.arange(job.seed + a, job.seed + b, dtype=np.int64)
            return read_shard(shards[i], (b - a, *shape[1:], shape[0]), seeds)

        found = {k: value for k, value in kept.get("metrics", {}).items() if k not in missing}
        for name in missing:
            mine = [
                (a, self._features(name, read(i)))
                for i, (a, _) in list(enumerate(parts))[self.team.index :: self.team.count]
            ]
            fake = self._joined(mine)
            if self.team.index == 0:
                found[name] = self.figures(name, fake)
        result = {
            "row": cell.row.name,
            "steps": cell.steps,
            "n": cell.n,
            "repeat": cell.repeat,
            "seeds": [job.seed, job.seed + cell.n - 1],
            "network_calls": len(pipe.scheduler.timesteps),
            **(cost if cost["sampled"] or not kept else {k: kept[k] for k in cost if k in kept}),
            "processes": self.team.count,
            "metrics": found,
            "settings": settings,
        }
        if self.team.index == 0:
            count = -(-PREVIEW // job.batch_size)
            first = np.concatenate([read(i) for i in range(len(shards[:count]))])[:PREVIEW]
            write_npz(path.with_suffix(".npz"), {"images": first})
            write_json(path, sealed({**result, "preview": digest_of_images(first)}))
        self.team.wait()
        if not self.config.keep_images and self.team.index == 0:
            shutil.rmtree(images)
        return check_cell(read_sealed_json(path), cell, path)  # the same on every process

    def _sample(self, pipe: GenerationPipeline, job: SamplingJob, images: Path) -> dict[str, Any]:
        """Sample the images that are missing of a cell; the cost of these, and with what."""
        if not self.warm:  # compiling and first touches are no part of what sampling costs
            zeros = torch.zeros(job.batch_size, *self.pipe.image_shape, device=self.device)
            with torch.no_grad():
                predict(pipe.unet, zeros, torch.zeros((), dtype=torch.long, device=self.device))
            self.warm = True
        shown = self.shows_steps and self.team.index == 0
        pipe.set_progress_bar_config(disable=not shown, leave=False)
        self.team.wait()
        begun = time.perf_counter()
        share = {"rank": self.team.index, "world_size": self.team.count}
        report = sample_to_directory(pipe, images, job, **share)
        left = sum(self.team.gather([report.sampled]))
        seconds = time.perf_counter() - begun
        rate = left / seconds if left else None
        return {
            "sampled": left,
            "seconds": None if rate is None else job.num_images / rate,
            "images_per_second": rate,
            "made_with": {
                "commit": self.commit,
                "device": _device_name(self.device),
                "threads": torch.get_num_threads(),
                "compiled": self.config.compile,
                "channels_last": self.config.channels_last,
            },
        }

    def _reference_note(self, name: str) -> dict[str, Any]:
        real = self.real[name]
        return {"fingerprint": real.fingerprint, "n": len(real.train)}

    def figures(self, name: str, fake: torch.Tensor) -> dict[str, Any]:
        """Return all figures of features (n, F), each with what it was compared to."""
        real = self.real[name]
        k = min(self.config.neighbours, len(fake) - 1)
        shuffled = np.random.default_rng(self.config.seed).permutation(len(real.train))
        equal = real.train[
            shuffled[: len(fake)]
        ]  # as many as samples: neither side's balls are larger
        kernel, spread = kernel_distance(real.train, fake, seed=self.config.seed)
        found: dict[str, Any] = {
            "n": len(fake),
            "reference": self._reference_note(name),
            "frechet": frechet_distance(real.train, fake),
            "kernel": kernel,
            "kernel_std": spread,
            **neighbour_metrics(equal, fake, k),
            "k": k,
            "neighbour_reference_n": len(equal),
        }
        network: Any = self.networks[name]
        if hasattr(network, "head"):
            with torch.no_grad():
                found["inception_score"] = inception_score(network.head(fake.to(self.device)).cpu())
        return found

    def real_images(self, n: int) -> dict[str, Any]:
        """Measure n held-out images in each feature space, as if a perfect sampler had made them.

        If fewer are held out, all of them; their figures then have an n of their own.
        """
        rows = np.random.default_rng(self.config.seed).permutation(len(self.held_out))[:n]
        return {name: self.figures(name, self.real[name].held_out[rows]) for name in self.real}

    # -- memorisation -----------------------------------------------------------------------------

    def memorisation(self, cell: Cell) -> dict[str, Any]:
        """Measure the distances of a cell's first samples to their nearest training images.

        Held-out images are measured in the same way: samples that were copied would lie nearer.
        Root mean squared distance of pixels on [0, 1].
        """
        fake = from_uint8(self.preview(cell))
        real = self.held_out.batch(range(min(200, len(self.held_out))))[0]
        distance, nearest = self._nearest(torch.cat([fake, real]))
        count = len(fake)
        pixels = fake[0].numel()
        rms = distance / 2 / pixels**0.5
        return {
            "row": cell.row.name,
            "steps": cell.steps,
            "n": count,
            "held_out_n": len(real),
            "samples_median": float(rms[:count].median()),
            "samples_min": float(rms[:count].min()),
            "held_out_median": float(rms[count:].median()),
            "held_out_min": float(rms[count:].min()),
            "nearest": [int(i) for i in nearest[:count]],
        }

    def _nearest(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance (n,) to the nearest of all training images, and its position."""
        best = torch.full((len(images),), torch.inf)
        where = torch.zeros(len(images), dtype=torch.int64)
        start = 0
        flat = images.flatten(1).double()
        for batch in _batches(self.reference, np.arange(len(self.reference))):
            value, index = torch.cdist(flat, batch.flatten(1).double()).min(1)
            closer = value.float() < best
            best, where = (
                torch.where(closer, value.float(), best),
                torch.where(closer, index + start, where),
            )
            start += len(batch)
        return best, where

    def preview(self, cell: Cell) -> np.ndarray:
        """Return the first images of a measured cell, uint8 (n, H, W, C)."""
        path = self.path_of(cell).with_suffix(".npz")
        channels, height, width = self.pipe.image_shape
        shape = (min(PREVIEW, cell.n), height, width, channels)
        images = read_npz(path, ["images"], limit=int(np.prod(shape)))["images"]
        if images.shape != shape or images.dtype != np.uint8:
            raise DamagedFileError(path, f"it holds {images.shape} of {images.dtype}, not {shape}")
        return images


# Bounds of the figures. A distance that is zero may be negative by rounding; the kernel one is
# unbiased, so that it may be negative anyway.
_BOUNDS = {
    "frechet": (-1e-2, math.inf),
    "kernel": (-math.inf, math.inf),
    "precision": (0, 1),
    "recall": (0, 1),
    "density": (0, math.inf),
    "coverage": (0, 1),
    "inception_score": (1 - 1e-6, math.inf),
}


def check_cell(content: dict[str, Any], cell: Cell, path: Path) -> dict[str, Any]:
    """Return the content of a cell's file if it can be of that cell.

    Raises:
        DamagedFileError: naming the first value that cannot.
    """

    def require(holds: bool, name: str, value: Any) -> None:
        if not holds:
            raise DamagedFileError(path, f"its {name} is {str(value)[:80]!r}")

    own = {"row": cell.row.name, "steps": cell.steps, "n": cell.n, "repeat": cell.repeat}
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
    for space, figures in content["metrics"].items():
        require(isinstance(figures, dict), f"metrics of {space}", figures)
        require(isinstance(figures.get("reference"), dict), f"reference of {space}", figures)
        for name in ("n", "k"):
            found = figures.get(name)
            require(_is_number(found, 1, integer=True), f"{name} of {space}", found)
        needed = set(FIGURES) if "inception_score" in figures else set(FIGURES[:-1])
        for name in sorted(needed):
            found = figures.get(name)
            require(_is_number(found, *_BOUNDS[name]), f"{name} of {space}", found)
    return content


def _is_number(value: Any, low: float, high: float = math.inf, integer: bool = False) -> bool:
    kinds = (int,) if integer else (int, float)
    return type(value) in kinds and low <= value <= high


def digest_of_images(images: np.ndarray) -> str:
    """Return the SHA-256 of uint8 images."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def run(evaluation: Evaluation, sample: bool = True) -> dict[str, Any]:
    """Measure every cell and return everything; process 0 writes it to metrics.json.

    Args:
        evaluation: the model and the data.
        sample: else only the cells that are there are gathered.

    Raises:
        FolderInUseError: another process writes to the folder of the evaluation.
    """
    with own_together(evaluation.folder, "evaluate", evaluation.team) as owner:
        return _run(evaluation, sample, owner)


def _run(evaluation: Evaluation, sample: bool, owner: Owner) -> dict[str, Any]:
    config, team = evaluation.config, evaluation.team
    done: dict[str, dict[str, Any]] = {}
    for number, cell in enumerate(config.cells):
        if sample or not evaluation.missing(cell):
            evaluation.progress(f"cell {number + 1} of {len(config.cells)}: {cell.label}")
            done[cell.label] = evaluation.measure(cell)
    tables = []
    for table in config.tables:
        cells = [cell for cell in table.cells if cell.label in done]
        entry: dict[str, Any] = {"name": table.name, "n": table.n}
        entry["cells"] = summarise([done[cell.label] for cell in cells], config.features)
        entry["missing"] = [cell.label for cell in table.cells if cell.label not in done]
        entry["unsaid"] = {cell.row.name: evaluation.unsaid(cell) for cell in cells}
        if team.index == 0:
            entry["real"] = evaluation.self_check[table.n]
        if cells and team.index == 0:
            name = config.features[0]
            first = [cell for cell in cells if cell.repeat == 0]
            best = min(first, key=lambda c: done[c.label]["metrics"][name]["frechet"])
            entry["memorisation"] = evaluation.memorisation(best)
        tables.append(entry)
    made_with = _counted([cell.get("made_with", {}) for cell in done.values()])
    results = {**about(evaluation), "made_with": made_with, "tables": tables}
    if team.index == 0:
        owner.check()
        write_json(evaluation.folder / "metrics.json", results)
    team.wait()
    return results


def _counted(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinct notes in the order of their first cells, with the numbers of cells."""
    distinct = [note for i, note in enumerate(notes) if note not in notes[:i]]
    return [{**note, "cells": notes.count(note)} for note in distinct]


def summarise(cells: list[dict[str, Any]], features: list[str]) -> list[dict[str, Any]]:
    """Join cells of the same row and steps: means over the repetitions, with their spread."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        grouped.setdefault((cell["row"], cell["steps"]), []).append(cell)
    summary = []
    for (row, steps), group in grouped.items():
        first = group[0]
        rates = [c["images_per_second"] for c in group if c["images_per_second"]]
        entry: dict[str, Any] = {
            "row": row,
            "steps": steps,
            "n": first["n"],
            "repeats": len(group),
            "network_calls": first["network_calls"],
            "images_per_second": float(np.mean(rates)) if rates else None,
            "seconds": first["n"] / float(np.mean(rates)) if rates else None,
            "processes": first["processes"],
            "metrics": {},
        }
        for name in features:
            values = [c["metrics"][name] for c in group]
            entry["metrics"][name] = {
                key: _mean_and_std([v[key] for v in values])
                for key in FIGURES
                if all(key in v for v in values)
            }
        summary.append(entry)
    return summary


def _mean_and_std(values: list[float]) -> dict[str, float | None]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def about(evaluation: Evaluation) -> dict[str, Any]:
    """Return what the figures depend on besides the cells, as JSON types."""
    config = evaluation.config
    classifier = None
    if CLASSIFIER in config.features:
        classifier = spaces.classifier_record(evaluation.classifier_path())
    network: Any = evaluation.pipe.unet
    return {
        "data": {
            "name": Path(config.data.data).name,
            "shape": list(evaluation.reference.shape),
            "reference_n": len(evaluation.order),
            "held_out_n": len(evaluation.held_out),
            "found": evaluation.reference.inventory.counts(),
        },
        "features": config.features,
        "reference_fingerprints": {
            name: evaluation.real[name].fingerprint for name in config.features
        },
        "classifier": classifier,
        "network": {
            "parameters": sum(p.numel() for p in network.parameters()),
            "dtype": config.dtype,
            "compiled": config.compile,
            "channels_last": config.channels_last,
            "batch_size": config.batch_size,
        },
        "scheduler_config": json.loads(
            json.dumps(
                {
                    k: v
                    for k, v in dict(evaluation.pipe.scheduler.config).items()
                    if not k.startswith("_") and k != "calibration"
                },
                default=str,
            )
        ),
        "seed": config.seed,
        "device": _device_name(evaluation.device),
        "threads": torch.get_num_threads(),
        "processes": evaluation.team.count,
        "commit": evaluation.commit,
        # a folder is told by its weights alone
        "pipeline": evaluation.pipeline_commit or None,
        "feature_commits": {
            name: told
            for name, network in evaluation.networks.items()
            if (told := spaces.commit_of(network))
        },
        "expected": config.expected,
        "not_run": config.not_run,
        "versions": versions(
            "ddim-schedulers", "diffusers", "torch", "torchmetrics", "numpy", "python"
        ),
        "card": config.card,
    }


def commit() -> str | None:
    """Return the commit of this package's source, None where it is not in a git repository."""
    folder = Path(__file__).parent
    done = (
        subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD", "--show-toplevel"],
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    if done is None or done.returncode:
        return None
    found, top = done.stdout.split("\n")[:2]
    # an installed package may lie inside somebody else's repository
    return found if (Path(top) / "training" / Path(__file__).name).exists() else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def digest_of(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of everything that a cell's samples depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def labels_of(data: ImageData, config: EvaluationConfig) -> np.ndarray:
    """Return class numbers (n,) of the images of `data`, from the place `config.labels`.

    Raises:
        ValueError: nothing is said, or nothing there.
    """
    own = config.data
    if own.data == "digits":
        from sklearn.datasets import load_digits

        values = load_digits().target
    elif config.labels is None:
        raise ValueError("`labels`: a classifier needs them; say where they are, or leave it out")
    elif config.labels == "folders":
        values = np.array([Path(data.source.name(i)).parent.name for i in range(len(data.source))])
    elif Path(own.data).suffix == ".npz":
        if config.labels not in (names := npz_names(own.data)):
            raise ValueError(f"`labels` is {config.labels!r}; {own.data} holds {names}")
        values = read_npz(own.data, [config.labels])[config.labels]
    else:
        from ddim_schedulers.training.data.sources import load_table

        table = load_table(own, streaming=False)
        if config.labels not in table.column_names:
            raise ValueError(f"`labels` is {config.labels!r}; the columns are {table.column_names}")
        values = np.asarray(table[config.labels])
    if len(values) <= (last := int(data.ids.max())):
        raise ValueError(
            f"`labels`: there are {len(values)}, but the images go on to number {last}"
        )
    return spaces.class_names(values[data.ids])[1]


def from_uint8(images: np.ndarray) -> torch.Tensor:
    """Return images uint8 (B, H, W, C) as (B, C, H, W) in [-1, 1], float32."""
    return torch.from_numpy(images).movedim(-1, 1).float().div(127.5).sub(1)


def as_uint8_sees(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] after a round trip through uint8."""
    return from_uint8(to_uint8(images))


def _batches(data: ImageData, rows: np.ndarray) -> Iterator[torch.Tensor]:
    for start, stop in chunks(len(rows), READ_BATCH):
        yield data.batch(rows[start:stop])[0]
