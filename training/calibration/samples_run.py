"""`calibrate --objective samples`: the few numbers that decide pictures, measured and stored.

For each number of calls: eta and the interval in which it acts, `eps_scale` and `end_scale`, on top
of the stored table for that number of calls or of the analytic preset. `samples_search` says how
they are chosen; here samples are made and measured. Processes share the measurements, which are
kept in files, so that an interrupted run goes on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.images import to_uint8
from ddim_schedulers.pipelines.ownership import Owner
from ddim_schedulers.training.calibration.predictor import Predictor, check_model
from ddim_schedulers.training.calibration.progress import Progress, cost_line
from ddim_schedulers.training.calibration.samples_job import (
    NEIGHBOURS,
    Outcome,
    SamplesJob,
    formulas_entry,
    sampler_of,
    stored_entry,
)
from ddim_schedulers.training.calibration.samples_search import (
    BLOCKS,
    FLOORS,
    Samples,
    Tensors,
    Verdict,
    choose,
    compare,
    most_blocks,
    search,
)
from ddim_schedulers.training.calibration.samples_space import Setting, Space
from ddim_schedulers.training.calibration.solver_job import is_fitted
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.sealed_parts import SealedParts, discard_parts
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.data.images import ImageData
from ddim_schedulers.training.evaluation.references import from_uint8
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel
from ddim_schedulers.training.metrics.distances import Gaussian, neighbour_metrics
from ddim_schedulers.training.metrics.features import extract, space_fingerprint

METHOD = 1  # changes with everything that changes the numbers of a part
CLAIM = "samples.json"
CLASSIFIER_FILES = "classifier*.safetensors"
READ_BATCH = 2000
HELD_OUT = "held-out"
# How many settings, the best of the search first, are compared with the one that is there now.
TRIES = 6


class MeasurementFiles(SealedParts[str]):
    """The measurements of one calibration, by name."""

    settings_name = CLAIM
    names = tuple(f"part-{kind}-*.safetensors" for kind in ("data", "search", HELD_OUT))

    def path_of(self, item: str) -> Path:
        """Return where a measurement is, or will be."""
        return self.folder / f"part-{item}.safetensors"


def calibrate_samples(
    model: MeasuredModel,
    data: ImageData,
    spaces: dict[str, torch.nn.Module],
    job: SamplesJob,
    *,
    work_dir: Path,
    team: Team | None = None,
    progress: Callable[[str], object] | None = None,
) -> tuple[list[Outcome], dict[str, Any]]:
    """Choose settings for each number of calls, and compare them with those that are there now.

    Args:
        model: network and process.
        data: that samples should be like.
        spaces: feature spaces by name, on the device of the network; the distance in the first one
            decides, the others guard. Two or more.
        job: what is calibrated.
        work_dir: where measurements are kept; all processes must see it. An interrupted run goes
            on.
        team: the processes that share it; None for this one alone.
        progress: called with a line of text now and then, or None.

    Returns:
        One outcome for each number of calls, and the cost: `evaluations` of the network, `seconds`,
        `processes`.

    Raises:
        FolderInUseError: another process owns `work_dir`.
        ValueError: for a number out of range, one feature space alone, or `work_dir` with the parts
            of another run.
    """
    team = Team() if team is None else team
    check(model, job, [*spaces])
    begun = time.perf_counter()
    with own_together(work_dir, "calibrate", team, transient=True) as owner:
        run = _Run(model, data, spaces, job, work_dir, team, owner, progress)
        outcomes = [run.outcome(calls) for calls in job.calls]
    cost = {
        "evaluations": sum(outcome.evaluations for outcome in outcomes),
        "seconds": time.perf_counter() - begun,
        "processes": team.count,
    }
    return outcomes, cost


def check(model: MeasuredModel, job: SamplesJob, spaces: Sequence[str]) -> None:
    """Check what needs neither data nor feature spaces.

    Args:
        model: network and process.
        job: what is calibrated.
        spaces: names of the feature spaces.

    Raises:
        ValueError: as `calibrate_samples`, and for a stored table that does not fit the config.
    """
    job.check(len(model.alpha_bar))
    check_model(model, job.guiding)
    if len(spaces) < 2:
        raise ValueError(f"`features` is {[*spaces]}; one decides and another guards: name two")
    for calls in job.calls:
        current = Setting.of(stored_entry(model.config, calls, job.guiding))
        sampler_of(model.config, calls, current, job.guiding)


def discard(work_dir: Path) -> None:
    """Delete the parts of a run that is done, and the folder unless it holds anything else."""
    discard_parts(work_dir, MeasurementFiles, CLASSIFIER_FILES)


class _Run:
    def __init__(
        self,
        model: MeasuredModel,
        data: ImageData,
        spaces: dict[str, torch.nn.Module],
        job: SamplesJob,
        work_dir: Path,
        team: Team,
        owner: Owner,
        progress: Callable[[str], object] | None,
    ) -> None:
        self.model, self.data, self.spaces, self.job = model, data, spaces, job
        self.team, self.predictor = team, Predictor(model, job.guiding)
        each = job.block * job.guiding.calls
        costs = {c: each * c * most_blocks(self._space(self._entry(c))) for c in job.calls}
        self.progress = Progress(progress, costs, lambda: self.predictor.evaluations, team.count)
        if team.index == 0:
            self.progress(cost_line(costs))
        self.device = self.predictor.device
        self.shape = data.shape
        self.files = MeasurementFiles(work_dir, self._settings(), team, owner)
        self.files.claim()
        self._measure_data()

    def _settings(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for start, stop in chunks(len(self.data), READ_BATCH):
            digest.update(to_uint8(self.data.batch(range(start, stop))[0]).tobytes())
        config = {k: v for k, v in self.model.config.items() if not k.startswith("_")}
        left_out = ("calls", "space", "guiding")
        job = {k: v for k, v in asdict(self.job).items() if k not in left_out}
        job |= self.job.guiding.settings()
        if self.model.labels is not None:
            job["labels"] = self.model.labels.tolist()
        return json.loads(
            json.dumps(
                {
                    "method": METHOD,
                    "network": self.model.fingerprint(),
                    "dtype": str(self.model.dtype),
                    "device": self.device.type,
                    "config": config,
                    "data": [len(self.data), digest.hexdigest()],
                    "features": {n: space_fingerprint(n, s) for n, s in self.spaces.items()},
                    **job,
                },
                default=lambda x: np.asarray(x).tolist(),
            )
        )

    # -- the data

    def _measure_data(self) -> None:
        parts = {f"data-{a:08d}": (a, b) for a, b in chunks(len(self.data), READ_BATCH)}

        def sums(name: str) -> Tensors:
            images = to_uint8(self.data.batch(range(*parts[name]))[0])
            self.progress(f"data: {parts[name][1]} of {len(self.data)} images")
            found = {"pixels": _pixel_sums(images)}
            for space, network in self.spaces.items():
                found |= _feature_sums(space, extract(network, from_uint8(images)))
            return found

        each = self.files.shared([*parts], sums)
        total = {key: torch.stack([part[key] for part in each]).sum(0) for key in each[0]}
        self.real = {
            name: Gaussian.of_sums(*(total[f"{name}.{k}"] for k in ("count", "total", "outer")))
            for name in self.spaces
        }
        self.pixels = _pixel_moments(total["pixels"])
        n = self.job.block * BLOCKS
        order = np.random.default_rng(self.job.seed).permutation(len(self.data))
        rows = np.sort(np.resize(order, n))  # again from the start where the data are fewer

        def features(_: str) -> Tensors:
            images = to_uint8(self.data.batch(rows)[0])
            return {"features": extract(next(iter(self.spaces.values())), from_uint8(images))}

        shuffled = np.random.default_rng(self.job.seed).permutation(n)
        (kept,) = self.files.shared(["data-rows"], features)
        self.real_rows = kept["features"][shuffled].split(self.job.block)

    # -- the samples

    def _entry(self, calls: int) -> dict[str, Any]:
        return stored_entry(self.model.config, calls, self.job.guiding)

    def _space(self, entry: dict[str, Any]) -> Space:
        # at zero terminal SNR x_T is eps itself, which cannot be scaled
        scales_eps = entry["alpha_bar"][0] > 0
        return replace(self.job.space, scales_eps=scales_eps, formulas=is_fitted(entry))

    def outcome(self, calls: int) -> Outcome:
        """Return what was found for one number of calls."""
        self.progress.begin(calls)
        before = self.predictor.evaluations
        entry = self._entry(calls)
        current, space = Setting.of(entry), self._space(entry)
        analytic = formulas_entry(self.model.config, calls, self.job.guiding)
        shares = [
            [t / len(self.model.alpha_bar) for t in each["timesteps"]] for each in (entry, analytic)
        ]
        lands_on_data = entry["alpha_bar"][-1] == 1
        ends = sorted({*self.job.space.end_scales, current.end_scale})
        first = next(iter(self.spaces))

        def say(line: str) -> None:
            self.progress(f"{calls} calls: {line}")

        def samples(kind: str) -> Samples:
            def measure(bases: Sequence[Setting], start: int, stop: int) -> list[Tensors]:
                return self._measure(kind, calls, ends, bases, start, stop)

            return Samples(
                self.real, measure, ends, lambda s: s.acting(shares[s.formulas], lands_on_data)
            )

        searched = samples("search")
        ranked = search(searched, space, first, current, say)
        held_out = samples(HELD_OUT)
        more = [replace(ranked[0], end_scale=scale) for scale in ends]
        more.sort(key=lambda setting: searched.distance(setting, first))
        tries = searched.distinct([current, *ranked, *more])[1 : 1 + TRIES]

        def verdicts() -> Iterator[Verdict]:
            for setting in tries:
                verdict = compare(setting, current, held_out, list(self.spaces))
                say(f"held out: {setting}, gain {verdict.gain}; {verdict.why_not or 'chosen'}")
                yield verdict

        chosen, tried = choose(verdicts())
        spent = sum(self.team.gather([self.predictor.evaluations - before]))
        return Outcome(calls, current, chosen, tuple(tried), spent)

    def _measure(
        self,
        kind: str,
        calls: int,
        ends: Sequence[float],
        bases: Sequence[Setting],
        start: int,
        stop: int,
    ) -> list[Tensors]:
        named = {
            f"{kind}-{calls}-{_digest([base.config(), base.formulas, ends])}-{start}-{stop}": base
            for base in bases
        }

        def make(name: str) -> Tensors:
            place = [*named].index(name) + 1
            self.progress.tick(f"{calls} calls: {kind}, setting {place} of {len(named)}")
            finished = self._sample(kind, calls, named[name], start, stop)
            blocks = finished.split(self.job.block)
            each = [
                [self._measured((block * end).cpu(), start + i, kind == HELD_OUT) for end in ends]
                for i, block in enumerate(blocks)
            ]
            return {
                key: torch.stack([torch.stack([found[key] for found in row]) for row in each])
                for key in each[0][0]
            }

        return self.files.shared([*named], make)

    def _measured(self, finished: torch.Tensor, block: int, guarded: bool) -> Tensors:
        images = to_uint8(finished)
        features = {
            name: extract(network, from_uint8(images)) for name, network in self.spaces.items()
        }
        found: Tensors = {}
        for name, rows in features.items():
            found |= _feature_sums(name, rows)
        if not guarded:
            return found
        first = features[next(iter(self.spaces))]
        near = neighbour_metrics(self.real_rows[block % BLOCKS], first, NEIGHBOURS)
        pixels = _pixel_moments(_pixel_sums(images))
        apart = [abs(a - b) for a, b in zip(pixels, self.pixels, strict=True)]
        both = (near["precision"] + near["recall"]) / 2
        guards = [1 - near["recall"], 1 - both, *apart]
        assert len(guards) == len(FLOORS)
        return {**found, "guards": torch.tensor(guards, dtype=torch.float64)}

    def _sample(self, kind: str, calls: int, base: Setting, start: int, stop: int) -> torch.Tensor:
        """Return finished samples of blocks start .. stop - 1, before any clamping."""
        scheduler = sampler_of(self.model.config, calls, base, self.job.guiding)
        x = self._noise(kind, start, stop, "x_T")
        for i, t in enumerate(scheduler.timesteps):
            output = torch.cat(
                [
                    self.predictor.output(x[a:b], t, start * self.job.block + a)
                    for a, b in chunks(len(x), self.job.batch_size)
                ]
            )
            z = self._noise(kind, start, stop, i) if base.eta else None
            stepped: Any = scheduler.step(output, t, x, variance_noise=z)
            x = stepped.prev_sample
        return x

    def _noise(self, kind: str, start: int, stop: int, what: int | str) -> torch.Tensor:
        """Return the noise of some blocks, the same for every setting and number of calls."""
        shape = (self.job.block, *self.shape)
        blocks = [
            torch.randn(shape, generator=generator(self.job.seed, "samples", kind, block, what))
            for block in range(start, stop)
        ]
        return torch.cat(blocks).to(self.device)


def _feature_sums(name: str, features: torch.Tensor) -> Tensors:
    rows = features.double()
    return {
        f"{name}.count": torch.tensor(float(len(rows)), dtype=torch.float64),
        f"{name}.total": rows.sum(0),
        f"{name}.outer": rows.T @ rows,
    }


def _pixel_sums(images: np.ndarray) -> torch.Tensor:
    """Return how many values, their sum, the sum of squares, and how many are at a bound, (4,)."""
    values = images.astype(np.float64) / 127.5 - 1
    at_bound = ((images == 0) | (images == 255)).sum()
    return torch.tensor(
        [values.size, values.sum(), np.square(values).sum(), float(at_bound)], dtype=torch.float64
    )


def _pixel_moments(sums: torch.Tensor) -> list[float]:
    """Return the share of clamped pixels, the mean and the deviation, in the order of `FLOORS`."""
    count, total, squares, at_bound = sums.tolist()
    mean = total / count
    return [at_bound / count, mean, max(squares / count - mean**2, 0.0) ** 0.5]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
