"""What `calibrate --objective samples` is asked for, what it found, and what a config holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddim_schedulers import CALIBRATED, FEW_STEPS, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.base import check_batch_size
from ddim_schedulers.solver_tables import (
    MAX_CALLS,
    SOLVER_BASE,
    SolverTable,
    guidance_of,
    misfit,
    pack_solver_table,
    solver_table_of,
)
from ddim_schedulers.training.calibration.predictor import UNGUIDED, Guiding, check_calls
from ddim_schedulers.training.calibration.samples_search import BLOCKS, Verdict
from ddim_schedulers.training.calibration.samples_space import Setting, Space
from ddim_schedulers.training.calibration.solver_job import NEUTRAL

NEIGHBOURS = 5


@dataclass(frozen=True)
class SamplesJob:
    """What is calibrated.

    Attributes:
        calls: numbers of network calls, each with settings of its own.
        num_images: samples of a setting that came to the end of a race, in eight blocks with noise
            of their own; as many of held-out noise, or up to four times as many, of each setting
            that is compared at the end.
        seed: of the noise.
        batch_size: samples in a network call.
        space: what is searched.
        guiding: how the network is guided.
    """

    calls: tuple[int, ...] = (5, 10, 20)
    num_images: int = 2000
    seed: int = 0
    batch_size: int = 500
    space: Space = field(default_factory=Space)
    guiding: Guiding = UNGUIDED

    def check(self, big_t: int) -> None:
        """Check the numbers against a chain of `big_t` timesteps.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        check_calls(self.calls, min(big_t, MAX_CALLS))
        least = BLOCKS * (NEIGHBOURS + 1)
        if self.num_images < least:
            raise ValueError(f"`num_images` is {self.num_images}; it must be at least {least}")
        check_batch_size(self.batch_size)

    @property
    def block(self) -> int:
        """Return how many samples a block has."""
        return -(-self.num_images // BLOCKS)

    @property
    def held_out(self) -> int:
        """Return how many samples a verdict is made of at first."""
        return self.block * BLOCKS


@dataclass(frozen=True)
class Outcome:
    """What was found for one number of calls.

    Attributes:
        calls: S.
        current: the setting that was there.
        chosen: the verdict on the setting that takes its place, or None where none does.
        tried: every verdict, in order; the chosen one is the last.
        evaluations: of the network, a sample each, of all processes in this session.
    """

    calls: int
    current: Setting
    chosen: Verdict | None
    tried: tuple[Verdict, ...]
    evaluations: int

    @property
    def setting(self) -> Setting:
        """Return the setting that is in place now."""
        return self.current if self.chosen is None else self.chosen.setting

    def entry(
        self, config: Mapping[str, Any], spaces: Sequence[str], job: SamplesJob
    ) -> dict[str, Any]:
        """Return the entry of `calibration["solver"]` with what was chosen, which there must be.

        Args:
            config: of the pipeline's scheduler, as ours reads it.
            spaces: names of the feature spaces.
            job: what was calibrated.
        """
        assert self.chosen is not None
        evidence = {
            "features": spaces[0],
            "n": job.block * self.chosen.blocks,
            **self.chosen.record(),
        }
        entry = entry_of(config, self.calls, self.setting, job.guiding)
        return {**entry, "samples": evidence}

    def lines(self, spaces: Sequence[str]) -> list[str]:
        """Return what was found, in words."""
        said = [f"{self.calls} calls: {self.setting}"]
        if self.chosen is None:
            said[0] += " (as before)"
        for verdict in self.tried:
            gain = f"{verdict.before:.4g} -> {verdict.distance:.4g}, gain {verdict.gain}"
            why = verdict.why_not
            said.append(
                f"  Frechet in {spaces[0]} {gain}"
                + (f"; kept out, {why}" if why else "; chosen")
                + f" ({verdict.setting})"
            )
            if not why:
                said += [
                    f"    {g.name}: {g.before:.4g} -> {g.value:.4g} +- {g.more.std_error:.2g}"
                    for g in verdict.guards
                ]
        return said


def stored_entry(
    config: Mapping[str, Any], calls: int, guiding: Guiding = UNGUIDED
) -> dict[str, Any]:
    """Return the present sampler of a number of calls: a stored table, or the analytic steps.

    A table that was made at other guidance does not count.

    Args:
        config: of the pipeline's scheduler, as ours reads it.
        calls: S.
        guiding: how the network is guided.
    """
    found = ((config.get("calibration") or {}).get("solver") or {}).get(str(calls))
    if found is not None:
        own = guidance_of(found.get("guidance_scale"), found.get("guidance_interval"))
        if own == guidance_of(guiding.scale, guiding.interval):
            return dict(found)
    return formulas_entry(config, calls, guiding)


def formulas_entry(
    config: Mapping[str, Any], calls: int, guiding: Guiding = UNGUIDED
) -> dict[str, Any]:
    """Return the entry of the analytic steps; the arguments are those of `stored_entry`."""
    analytic = GeneralizedDDIMScheduler.from_config(
        config, **{**NEUTRAL, **SOLVER_BASE, **FEW_STEPS}
    )
    analytic.set_timesteps(calls)
    timesteps = [t for t, _ in analytic.planned_pairs()]
    clip = float(analytic.config.clip_sample_range) if analytic.config.clip_sample else None
    table = SolverTable(
        timesteps,
        [[0.0] * (i + 2) for i in range(calls)],
        0.0,
        clip,
        clip,
        [*analytic.alpha_bar[timesteps].tolist(), analytic.alpha_bar_end],
        **guiding.settings(),
    )
    return pack_solver_table(table)


def entry_of(
    config: Mapping[str, Any], calls: int, setting: Setting, guiding: Guiding = UNGUIDED
) -> dict[str, Any]:
    """Return the entry of `calibration["solver"]` with a setting in the place of its own."""
    base = (formulas_entry if setting.formulas else stored_entry)(config, calls, guiding)
    kept = {k: v for k, v in base.items() if k != "samples"}
    return {**kept, **setting.config()}


def sampler_of(
    config: Mapping[str, Any], calls: int, setting: Setting, guiding: Guiding = UNGUIDED
) -> GeneralizedDDIMScheduler:
    """Return the scheduler that takes `calls` steps with a setting, planned.

    Args:
        config: of the pipeline's scheduler, as ours reads it.
        calls: S.
        setting: what is chosen.
        guiding: how the network is guided.

    Raises:
        ValueError: if a stored table does not fit the config.
    """
    stored = {"solver": {str(calls): entry_of(config, calls, setting, guiding)}}
    scheduler = GeneralizedDDIMScheduler.from_config(
        config, **{**NEUTRAL, **SOLVER_BASE, **CALIBRATED, "calibration": stored}
    )
    process = scheduler.alpha_bar, scheduler.alpha_bar_end
    table = solver_table_of(stored, calls, len(scheduler))
    assert table is not None
    if why := misfit(table, scheduler.config, *process):
        raise ValueError(
            f"`calibration['solver']['{calls}']` does not fit the scheduler's config: {why}; it "
            "must be calibrated again by `--objective solver`, or removed"
        )
    scheduler.set_timesteps(calls)
    if guiding.scale is not None:
        scheduler.note_guidance(guiding.scale, guiding.interval)
    return scheduler
