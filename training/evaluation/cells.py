"""The evaluation of a trained model: which scheduler, how many steps, which eta, at what cost.

    OUTPUT/cells/LABEL/        sample.json and the samples of a cell (with `keep_images`)
    OUTPUT/cells/LABEL.json    its measurements, written when they are all there
    OUTPUT/cells/LABEL.npz     its first images
    OUTPUT/reference-*.safetensors   features of the real images, by fingerprint (or in cache_dir)
    OUTPUT/fine/               while it runs: end points of the ODE, for `endpoint`
    OUTPUT/metrics.json        everything; report.md and the pictures are made of it

Both sides are uint8. Processes share the samples of a cell and their features; the features are
then put in the order of the samples, so the measurements do not depend on the number of processes.
"""

import copy
import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import class_labels_of
from ddim_schedulers.config_reading import PROCESS_KEYS
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.compatibility import is_deterministic
from ddim_schedulers.pipelines.conditions import (
    BoundConditions,
    Conditions,
    check_same_process,
)
from ddim_schedulers.pipelines.files import check_folders
from ddim_schedulers.pipelines.images import to_uint8
from ddim_schedulers.pipelines.sampling import predict, step_arguments
from ddim_schedulers.pipelines.sampling_files import Piece, SamplingFiles
from ddim_schedulers.pipelines.sampling_job import (
    Guides,
    SamplingJob,
    defaults_of_settings,
    sample_to_directory,
    settings_of,
    with_classes,
)
from ddim_schedulers.training.common.flags import renamed
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.repositories import fetch
from ddim_schedulers.training.common.versions import commit, device_name
from ddim_schedulers.training.evaluation.cell_files import (
    PREVIEW,
    CellFiles,
    FirstImages,
    as_told,
    check_sum_of_images,
)
from ddim_schedulers.training.evaluation.config import EvaluationConfig
from ddim_schedulers.training.evaluation.grid import (
    GUIDES,
    RENAMED,
    Cell,
    defaults_of,
    scheduler_class,
)
from ddim_schedulers.training.evaluation.references import Progress, RealImages, from_uint8
from ddim_schedulers.training.metrics.distances import endpoint_errors
from ddim_schedulers.training.networks.places import pipeline_folder

FINE, FINE_STEPS = "fine", 100


class Evaluation:
    """A model, real images and feature spaces, ready to measure cells.

    Args:
        config: what is asked for.
        team: the processes that share the work.
        device: of the network and the feature spaces.
        progress: called with a line of text now and then.

    Raises:
        FolderInUseError: another process writes to the folder.
        ValueError: for what does not fit together: channels, sizes, pixels that are not 8-bit, too
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
        self._guides: dict[tuple[str, str], Any] = {}
        self.commit = commit()
        self.pipe = self._load_pipeline()
        self.files = CellFiles(self.folder, progress)
        self.first_images = FirstImages(self.files, self.pipe.picture_shape, progress)
        self.real = RealImages(config, self.team, self.device, self.pipe.picture_shape, progress)
        for cell in config.cells:  # refuse a cell before the first is sampled
            self._check_scheduler(cell)
        with own_together(self.folder, "evaluate", self.team):
            self.real.prepare()

    def _load_pipeline(self) -> GenerationPipeline:
        pipe = self._read(self.config.pipeline, "pipeline")
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device).speed_up(
            compile=self.config.compile,
            channels_last=self.config.channels_last,
            dtype=getattr(torch, self.config.dtype),
        )

    def _read(self, place: str, name: str) -> GenerationPipeline:
        found = fetch(pipeline_folder(place))
        try:
            pipe = found.read(GenerationPipeline)
        except OSError as error:
            raise ValueError(f"`{name}` is {place!r}; it cannot be loaded: {error}") from error
        found.finish(pipe.unet, pipe.vae)
        if name == "pipeline":
            self.pipeline_commit = found.commit
        return pipe

    def _check_scheduler(self, cell: Cell) -> None:
        try:
            scheduler = self._pipe_of(cell).scheduler
            scheduler.set_timesteps(cell.steps)
            step_arguments(scheduler, None, None, cell.sampler.use_clipped_model_output)
            with_classes(self.pipe, self._job(cell), self.guides_of(cell))
        except ValueError as error:
            said = renamed(str(error), RENAMED)
            raise ValueError(
                f"`tables` has the row {cell.sampler.name!r}, S = {cell.steps}: {said}"
            ) from error

    def _pipe_of(self, cell: Cell) -> GenerationPipeline:
        cls: Any = scheduler_class(cell.sampler.scheduler)
        scheduler = cls.from_config(
            self.pipe.scheduler.config, **copy.deepcopy(cell.sampler.settings)
        )
        return self.pipe.sibling(GenerationPipeline, scheduler=scheduler)

    def unsaid(self, cell: Cell) -> dict[str, Any]:
        """Return the settings of a cell's scheduler that are no defaults and not in the row's name.

        What describes the process is the network's, the same in every row.
        """
        defaults, config = defaults_of(cell.sampler.scheduler), self._pipe_of(cell).scheduler.config
        silent = {*PROCESS_KEYS, "calibration", *cell.sampler.said}
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
            use_clipped_model_output=cell.sampler.use_clipped_model_output,
            **{k: v for k, v in cell.sampler.conditions.items() if k not in GUIDES},
        )

    def guides_of(self, cell: Cell) -> Guides:
        """Return the networks beside the pipeline's that guide a row's samples, loaded once.

        Raises:
            ValueError: for one that cannot be loaded, or does not fit the pipeline.
        """
        found: dict[str, Any] = {}
        for name in GUIDES:
            place = cell.sampler.conditions.get(name)
            if place is not None:
                if (name, place) not in self._guides:
                    self._guides[name, place] = self._load_guide(name, place)
                found[name] = self._guides[name, place]
        return Guides(**found)

    def _load_guide(self, name: str, place: str) -> Any:  # noqa: ANN401
        if name == "classifier":
            from ddim_schedulers.training.networks.noisy_classifier import load_noisy_classifier

            classifier: Any = load_noisy_classifier(place)
            return classifier.to(self.device)
        guide = self._read(place, name)
        check_same_process(self.pipe.scheduler, guide.scheduler, name)
        return guide.to(self.device).speed_up(dtype=self.pipe.unet.dtype).unet

    def missing(self, cell: Cell) -> list[str]:
        """Return the feature spaces in which a cell is still to be measured."""
        kept = self.files.load(cell)
        if kept is None or self.first_images.load(cell) is None:
            return list(self.config.features)
        have = kept["metrics"]
        return [
            name
            for name in self.config.features
            if have.get(name, {}).get("reference") != self.real.note(name)
            or have[name].get("k") != self.config.neighbours
            or ("endpoint" not in have[name] and self._has_endpoint(cell))
        ]

    def _has_endpoint(self, cell: Cell) -> bool:
        """Tell whether the end-point error of a cell is asked for and exists."""
        return self.config.endpoint and is_deterministic(self._pipe_of(cell).scheduler)

    def discard_fine(self) -> None:
        """Delete the end points of the ODE, which no further cell needs."""
        self.team.wait()
        if self.team.index == 0:
            shutil.rmtree(self.folder / FINE, ignore_errors=True)

    def _endpoint(
        self, cell: Cell, pieces: list[Piece], samples: SamplingFiles, guides: Guides
    ) -> float:
        """Return the end-point error of a cell, whose samples are there."""
        pipe = self.pipe.sibling(GenerationPipeline, scheduler=fine_scheduler(self.pipe.scheduler))
        steps = min(FINE_STEPS, pipe.scheduler.config.num_train_timesteps)
        job = replace(
            with_classes(pipe, self._job(cell), guides),
            num_inference_steps=steps,
            use_clipped_model_output=None,
        )
        told = json.dumps(as_told(settings_of(pipe, job, guides)), sort_keys=True)
        folder = self.folder / FINE / hashlib.sha256(told.encode()).hexdigest()[:16]
        share = {"rank": self.team.index, "world_size": self.team.count}
        sample_to_directory(pipe, folder, job, guides=guides, **share)
        self.team.wait()
        fine = SamplingFiles(folder, job, self.team.index, pipe.image_shape)
        mine = [
            float(endpoint_errors(*(from_uint8(f.read(piece)) for f in (samples, fine))).sum())
            for piece in pieces[self.team.index :: self.team.count]
        ]
        return sum(sorted(self.team.gather(mine))) / cell.n

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return the measurements of a cell: from its file, or by sampling what is missing.

        Raises:
            FolderInUseError: another process writes to the folder of the evaluation.
            ValueError: if the folder holds the cell with other settings, naming what differs.
        """
        with own_together(self.folder, "evaluate", self.team):
            return self._measure(cell)

    def _measure(self, cell: Cell) -> dict[str, Any]:
        pipe, guides = self._pipe_of(cell), self.guides_of(cell)
        job = with_classes(pipe, self._job(cell), guides)
        images = self.files.images_of(cell)
        settings = settings_of(pipe, job, guides)
        kept, missing = self.files.load(cell) or {}, self.missing(cell)
        self.team.wait()  # all processes look before one writes
        if kept:
            self.files.require_made_with(cell, kept, settings, defaults_of_settings(pipe))
        if not missing:
            return kept
        cost = self._sample(pipe, job, guides, images)
        samples = SamplingFiles(images, job, self.team.index, pipe.picture_shape)
        pieces = samples.all_pieces()
        found = {k: value for k, value in kept.get("metrics", {}).items() if k not in missing}
        asked = self._has_endpoint(cell)
        endpoint = {"endpoint": self._endpoint(cell, pieces, samples, guides)} if asked else {}
        for name in missing:
            mine = [
                (piece.start, self.real.features_of(name, samples.read(piece)))
                for piece in pieces[self.team.index :: self.team.count]
            ]
            fake = self.real.joined(mine)
            if self.team.index == 0:
                labels: Any = job.labels(0, cell.n)
                found[name] = self.real.measure(name, fake, labels, class_labels_of(pipe))
                found[name] |= endpoint
        result = {
            "row": cell.sampler.name,
            "steps": cell.steps,
            "n": cell.n,
            "repeat": cell.repeat,
            "seeds": [job.seed, job.seed + cell.n - 1],
            "network_calls": len(pipe.scheduler.timesteps),
            **(cost if cost["sampled"] or not kept else {k: kept[k] for k in cost if k in kept}),
            "processes": self.team.count,
            "metrics": found,
            "settings": as_told(settings),
        }
        if self.team.index == 0:
            count = -(-PREVIEW // job.batch_size)
            first = np.concatenate([samples.read(piece) for piece in pieces[:count]])[:PREVIEW]
            self.first_images.save(cell, first)
            self.files.save(cell, {**result, "preview": check_sum_of_images(first)})
        self.team.wait()
        if not self.config.keep_images and self.team.index == 0:
            shutil.rmtree(images)
        return self.files.read(cell)  # the same on every process

    def _sample(
        self, pipe: GenerationPipeline, job: SamplingJob, guides: Guides, images: Path
    ) -> dict[str, Any]:
        """Sample the images that are missing of a cell; the cost of these, and with what."""
        if not self.warm:  # compilation and first calls do not count as time of sampling
            zeros = torch.zeros(job.batch_size, *self.pipe.image_shape, device=self.device)
            conditions = Conditions(**job.conditions(guides, 0, job.batch_size))
            bound = BoundConditions(
                conditions, pipe.unet, pipe.scheduler, job.batch_size, self.device
            )
            with torch.no_grad():
                t = torch.zeros((), dtype=torch.long, device=self.device)
                predict(bound.of(0, job.batch_size), zeros, t)
            self.warm = True
        shown = self.shows_steps and self.team.index == 0
        pipe.set_progress_bar_config(disable=not shown, leave=False)
        self.team.wait()
        begun = time.perf_counter()
        share = {"rank": self.team.index, "world_size": self.team.count}
        report = sample_to_directory(pipe, images, job, guides=guides, **share)
        left = sum(self.team.gather([report.sampled]))
        seconds = time.perf_counter() - begun
        rate = left / seconds if left else None
        return {
            "sampled": left,
            "seconds": None if rate is None else job.num_images / rate,
            "images_per_second": rate,
            "made_with": {
                "commit": self.commit,
                "device": device_name(self.device),
                "threads": torch.get_num_threads(),
                "compiled": self.config.compile,
                "channels_last": self.config.channels_last,
            },
        }

    def samples(self, cell: Cell) -> np.ndarray:
        """Return all samples of a cell that are kept, uint8 (n, H, W, C)."""
        shape = self.pipe.picture_shape
        files = SamplingFiles(self.files.images_of(cell), self._job(cell), 0, shape)
        return np.concatenate([files.read(piece) for piece in files.all_pieces()])

    def ceiling(self, n: int) -> dict[str, Any] | None:
        """Measure n held-out images that the autoencoder encoded and decoded, as samples are.

        No sample of latents can be expected to be nearer. None for a pipeline of pixels.
        """
        if self.pipe.vae is None:
            return None
        rows = self.real.chosen_held_out(n)

        def again(images: torch.Tensor) -> np.ndarray:
            size = self.config.batch_size
            unit = from_uint8(to_uint8(images)).add(1).div(2).clamp(0, 1)
            return to_uint8(self.pipe.pixels_of(self.pipe.x0_of(unit, size), size))

        return self.real.measure_images(rows, again)

    def memorisation(self, cell: Cell) -> dict[str, Any]:
        """Measure the distances of a cell's first samples to their nearest training images.

        Held-out images are measured in the same way: samples that were copied would lie nearer.
        Root mean squared distance of pixels on [0, 1].
        """
        fake = from_uint8(self.first_images.read(cell))
        real = self.real.held_out.batch(range(min(200, len(self.real.held_out))))[0]
        distance, nearest = self.real.nearest(torch.cat([fake, real]))
        count = len(fake)
        pixels = fake[0].numel()
        rms = distance / 2 / pixels**0.5
        return {
            "row": cell.sampler.name,
            "steps": cell.steps,
            "n": count,
            "held_out_n": len(real),
            "samples_median": float(rms[:count].median()),
            "samples_min": float(rms[:count].min()),
            "held_out_median": float(rms[count:].median()),
            "held_out_min": float(rms[count:].min()),
            "nearest": [int(i) for i in nearest[:count]],
        }


def fine_scheduler(scheduler: Any) -> GeneralizedDDIMScheduler:  # noqa: ANN401
    """Return a scheduler for fine solutions of the ODE, of order 3 with corrector, unclipped.

    Args:
        scheduler: of the pipeline.
    """
    neutral = {"eta_interval": None, "eps_scale": 1.0, "end_scale": 1.0, "sigma": None}
    return GeneralizedDDIMScheduler.from_config(
        scheduler.config,
        **neutral,
        calibration=None,
        clip_sample=False,
        eta=0.0,
        lower_order_final=False,
        original_inference_steps=None,
        reverse_variance="sigma",
        solver_calibrated=False,
        solver_corrector=True,
        solver_corrector_order=None,
        solver_form="sample",
        solver_order=3,
        solver_variable=None,
        solver_weights="exact",
        thresholding=False,
        timestep_spacing="trailing",
        timesteps=None,
    )
