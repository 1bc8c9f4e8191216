"""`calibrate --objective solver`: fit tables to a network, test them on other noise, store them.

Processes share the chunks of samples. What is summed over them is kept in files, one for each sum
and chunk, so that an interrupted run goes on: it does again what it did, from the files, up to the
first sum that is missing.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers import CALIBRATED, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.sampling import Step, denoise
from ddim_schedulers.solver_rows import analytic_steps, differences_of
from ddim_schedulers.solver_tables import MAX_WEIGHT, SolverTable, pack_solver_table
from ddim_schedulers.timesteps import make_timesteps
from ddim_schedulers.training.calibration.predictor import Predictor, check_model
from ddim_schedulers.training.calibration.progress import Progress, cost_line
from ddim_schedulers.training.calibration.solver_fit import (
    END,
    Chunk,
    Fit,
    Table,
    Tensors,
)
from ddim_schedulers.training.calibration.solver_job import NEUTRAL, Outcome, SolverJob
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.sealed_parts import SealedParts, discard_parts
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel

METHOD = 2  # changes with everything that changes the numbers of a sum
CLAIM = "solver.json"
# Where the timesteps are before they are fitted: t / T = (1 - i / S) ** power, of the powers the
# one whose step-by-step fit ends nearest.
POWERS = (1.0, 1.25, 1.5)


Item = tuple[str, int]  # what is computed, and of which chunk


class SolverFiles(SealedParts[Item]):
    """The sums of one run, by name and chunk."""

    settings_name = CLAIM
    # of a fine trajectory, of one number of calls
    names = ("part-fine-*.safetensors", "part-[0-9]*-[a-z]*.safetensors")

    def path_of(self, item: Item) -> Path:
        """Return where a part is, or will be."""
        return self.folder / f"part-{item[0]}-{item[1]:05d}.safetensors"


def calibrate_solver(
    model: MeasuredModel,
    job: SolverJob,
    *,
    work_dir: Path,
    team: Team | None = None,
    progress: Callable[[str], object] | None = None,
) -> tuple[list[Outcome], dict[str, Any]]:
    """Fit a table for each number of calls, and measure it on noise that was not fitted.

    Args:
        model: network and process; the samples have its labels, in turn.
        job: what is calibrated.
        work_dir: where sums are kept; all processes must see it. An interrupted run goes on.
        team: the processes that share it; None for this one alone.
        progress: called with a line of text now and then, or None.

    Returns:
        One outcome for each number of calls, and the cost: `evaluations` of the network (a sample
        each), `seconds`, `processes`.

    Raises:
        FolderInUseError: another process owns `work_dir`.
        ValueError: for a number out of range, a config with thresholding, or `work_dir` with the
            parts of another run.
    """
    team = Team() if team is None else team
    job.check(len(model.alpha_bar))
    check_model(model, job.guiding)
    begun = time.perf_counter()
    numbers = {k: v for k, v in asdict(job).items() if k != "guiding"}
    own = {
        "method": METHOD,
        "network": model.fingerprint(),
        "end": GeneralizedDDIMScheduler.from_config(model.config, **NEUTRAL).alpha_bar_end,
        "dtype": str(model.dtype),
        "device": Predictor(model).device.type,
        "labels": None if model.labels is None else model.labels.tolist(),
        **job.guiding.settings(),
        **json.loads(json.dumps(numbers)),
    }
    with own_together(work_dir, "calibrate", team, transient=True) as owner:
        files = SolverFiles(work_dir, own, team, owner)
        files.claim()
        calibration = _Calibration(model, job, files, progress)
        outcomes = [calibration.outcome(calls) for calls in job.calls]
    cost = {
        "evaluations": sum(team.gather([calibration.predictor.evaluations])),
        "seconds": time.perf_counter() - begun,
        "processes": team.count,
    }
    return outcomes, cost


def discard(work_dir: Path) -> None:
    """Delete the parts of a run that is done, and the folder unless it holds anything else."""
    discard_parts(work_dir, SolverFiles)


class _Calibration:
    def __init__(
        self,
        model: MeasuredModel,
        job: SolverJob,
        files: SolverFiles,
        progress: Callable[[str], object] | None,
    ) -> None:
        self.model, self.job, self.files = model, job, files
        self.predictor = Predictor(model, job.guiding)
        self.grid = make_timesteps("trailing", job.steps, len(model.alpha_bar))
        self.limit = model.clip
        self.choices = [None] if self.limit is None else [None, self.limit]
        self.starts = {calls: self._starts(calls) for calls in job.calls}
        costs = {
            calls: job.most_evaluations(calls, len(starts), len(self.choices))
            for calls, starts in self.starts.items()
        }
        fine = (job.num_samples + job.held_out) * job.steps * job.guiding.calls
        costs[job.calls[0]] += fine  # the first is what needs them
        team = files.team
        self.progress = Progress(progress, costs, lambda: self.predictor.evaluations, team.count)
        if team.index == 0:
            self.progress(f"{cost_line(costs)}; {fine:,} of them for fine trajectories")
        wanted = {t for starts in self.starts.values() for tau in starts for t in tau}
        self.kept = [*sorted(wanted, reverse=True), END]
        self.analytic = GeneralizedDDIMScheduler.from_config(
            model.config, **{**NEUTRAL, **CALIBRATED, "solver_calibrated": False}
        )

        self._chunks: dict[int, Chunk] = {}
        self._goals: dict[int, torch.Tensor] = {}

    def _starts(self, calls: int) -> list[list[int]]:
        """Return trajectories of S timesteps of the fine one, each from T - 1 on."""
        found = []
        for power in POWERS:
            places = [(1 - i / calls) ** power for i in range(calls)]
            at, tau = 0, []
            for i, place in enumerate(places):
                wanted = place * len(self.model.alpha_bar) - 1
                rest = range(at, self.job.steps - (calls - 1 - i))
                at = min(rest, key=lambda j: abs(self.grid[j] - wanted))
                tau.append(self.grid[at])
                at += 1
            if tau not in found:
                found.append(tau)
        return found

    def _fitted(self, name: str, make: Callable[[int], Tensors]) -> list[Tensors]:
        """Return results of all chunks of the samples that tables are fitted to."""
        return self._over(name, self.job.num_samples, make)

    def _over(self, name: str, samples: int, make: Callable[[int], Tensors]) -> list[Tensors]:
        chunks = range(math.ceil(samples / self.job.chunk))
        return self.files.shared([(name, c) for c in chunks], lambda item: make(item[1]))

    # -- samples

    def _noise(self, purpose: str, samples: int, c: int) -> torch.Tensor:
        size = self.model.unet.config.sample_size
        shape = (self.model.channels, *((size, size) if isinstance(size, int) else size))
        count = min(self.job.chunk, samples - c * self.job.chunk)
        noise = torch.randn(count, *shape, generator=generator(self.job.seed, purpose, c))
        return noise.to(self.predictor.device, self.model.state_dtype)

    def _predict(self, x: torch.Tensor, t: int, c: int) -> torch.Tensor:
        return self.predictor(x, t, c * self.job.chunk, len(self._chunk(c).x_T))

    def _fine(self, x: torch.Tensor, kept: Sequence[int], c: int) -> Tensors:
        """Follow the probability-flow ODE, order 3 with corrector and without clipping."""
        scheduler = GeneralizedDDIMScheduler.from_config(
            self.model.config,
            **{
                **NEUTRAL,
                "clip_sample": False,
                "solver_order": 3,
                "solver_corrector": True,
                "solver_calibrated": False,
            },
        )
        scheduler.set_timesteps(timesteps=self.grid)
        states, done = [], 0

        def keep(step: Step) -> None:
            nonlocal done
            done += 1
            self.progress.tick(f"fine trajectories, chunk {c + 1}: step {done} of {self.job.steps}")
            if int(step.timestep) in kept:
                states.append(step.x_t)

        end = self._run(scheduler, x, c, keep)
        return {"states": torch.stack([*states, end])}

    def _run(
        self,
        scheduler: GeneralizedDDIMScheduler,
        x: torch.Tensor,
        c: int,
        keep: Callable[[Step], None] | None = None,
    ) -> torch.Tensor:
        """Return where the loop of the pipelines ends, from x_T of a chunk."""
        network = self.predictor.network(len(x), c * self.job.chunk)
        return denoise(network, scheduler, x, scheduler.timesteps, {}, keep)

    def _chunk(self, c: int) -> Chunk:
        if c not in self._chunks:
            x_T = self._noise("solver", self.job.num_samples, c)

            def make(_: Item) -> Tensors:
                self.progress(f"fine trajectories, chunk {c + 1}")
                return self._fine(x_T, self.kept, c)

            states = self.files.part(("fine", c), make)["states"].to(x_T.device)
            self._chunks[c] = Chunk(x_T, dict(zip(self.kept, states, strict=True)))
        return self._chunks[c]

    def _goal(self, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise and the fine end points of a chunk of the samples held out."""
        x_T = self._noise("solver-held-out", self.job.held_out, c)
        if c not in self._goals:

            def make(_: Item) -> Tensors:
                self.progress(f"fine trajectories held out, chunk {c + 1}")
                return self._fine(x_T, (), c)

            states = self.files.part(("fine-held-out", c), make)["states"]
            self._goals[c] = states[-1].to(x_T.device)
        return x_T, self._goals[c]

    # -- tables

    def outcome(self, calls: int) -> Outcome:
        """Fit the table of S steps, without clipping and, if the config clips, with it.

        The better of the two after one iteration goes on.
        """
        self.progress.begin(calls)
        started = [self._start(calls, clip) for clip in self.choices]
        table, fit = min(started, key=lambda each: each[0].loss)
        table = fit.improve(table, self.job.constants.iterations - 1)
        steps = analytic_steps(table.timesteps, self.model.alpha_bar, self.analytic.alpha_bar_end)
        weights = [row.tolist() for row in differences_of(table.rows, *steps[:2])]
        if max(abs(weight) for row in weights for weight in row) > MAX_WEIGHT:
            weights = [[0.0] * len(row) for row in weights]  # a fit that no config can hold is none
        levels = self.model.alpha_bar[table.timesteps].tolist()
        stored = SolverTable(
            timesteps=table.timesteps,
            weights=weights,
            eta=0.0,
            clip=fit.clip,
            clips=self.limit,
            alpha_bar=[*levels, self.analytic.alpha_bar_end],
            shape=list(self._noise("solver", 1, 0).shape[1:]),
            **self.job.guiding.settings(),
        )
        entry = pack_solver_table(stored)
        held_out, analytic = self._test(calls, entry)
        how = {
            "n": self.job.num_samples,
            "held_out": _short(held_out),
            "analytic": _short(analytic),
        }
        return Outcome(calls, {**entry, **how}, held_out, analytic)

    def _start(self, calls: int, clip: float | None) -> tuple[Table, Fit]:
        """Fit step by step from each start, and improve the best once."""
        label = f"{calls}-{'free' if clip is None else 'clipped'}"
        name = f"{calls} calls, {'no clipping' if clip is None else f'clipping at {clip:g}'}: "
        fits = []
        for number, tau in enumerate(self.starts[calls]):
            fit = Fit(
                f"{label}-{number}",
                self._predict,
                self.model.alpha_bar,
                self.analytic.alpha_bar_end,
                clip,
                self.limit,
                self._chunk,
                self._fitted,
                self.job.constants,
                lambda line: self.progress(name + line),
                lambda line: self.progress.tick(name + line),
                self.job.batch_size,
            )
            fits.append((fit.greedy(tau), fit))
        table, fit = min(fits, key=lambda each: each[0].loss)
        self.progress(f"{name}step by step, error {table.loss:.3g}")
        return fit.improve(table, 1), fit

    def _test(self, calls: int, entry: dict[str, Any]) -> tuple[float, float]:
        """Return the held-out errors of a table, as it is read from a config, and of none."""
        with_table = GeneralizedDDIMScheduler.from_config(
            self.model.config,
            **{**NEUTRAL, **CALIBRATED, "calibration": {"solver": {str(calls): entry}}},
        )

        def of(c: int) -> Tensors:
            found: Tensors = {}
            x_T, goal = self._goal(c)
            for name, scheduler in (("stored", with_table), ("analytic", self.analytic)):
                scheduler.set_timesteps(calls)
                x = self._run(scheduler, x_T, c)
                miss = x - goal if self.limit is None else _clamped_miss(x, goal, self.limit)
                found[name] = miss.double().square().sum()
            return {**found, "count": torch.tensor(float(goal.numel()), dtype=torch.float64)}

        parts = self._over(f"{calls}-held-out", self.job.held_out, of)
        total = {name: float(torch.stack([p[name] for p in parts]).sum()) for name in parts[0]}
        return total["stored"] / total["count"], total["analytic"] / total["count"]


def _clamped_miss(x: torch.Tensor, goal: torch.Tensor, limit: float) -> torch.Tensor:
    return x.clamp(-limit, limit) - goal.clamp(-limit, limit)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
