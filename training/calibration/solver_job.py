"""What `calibrate --objective solver` is asked for and what it found, and how it says so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddim_schedulers import CALIBRATED
from ddim_schedulers.pipelines.base import check_batch_size
from ddim_schedulers.settings import restore_settings
from ddim_schedulers.solver_tables import MAX_CALLS, SOLVER_BASE
from ddim_schedulers.training.calibration.predictor import UNGUIDED, Guiding, check_calls
from ddim_schedulers.training.calibration.solver_fit import Constants

CHUNK = 128
# The scheduler that tables are differences from, whatever the config says of these.
NEUTRAL: dict[str, Any] = {
    **SOLVER_BASE,
    "calibration": None,
    "end_scale": 1.0,
    "eps_scale": 1.0,
    "eta": None,
    "eta_interval": None,
    "original_inference_steps": None,
    "reverse_variance": "sigma",
    "sigma": None,
    "timesteps": None,
}


@dataclass(frozen=True)
class SolverJob:
    """What is calibrated.

    Attributes:
        calls: numbers of network calls; each gets a table.
        num_samples: n, that tables are fitted to.
        held_out: samples of other noise that they are tested on.
        steps: of the fine trajectory.
        seed: of the noise.
        batch_size: samples in a network call, where there are as many: chunks have at most
            `CHUNK`, but derivatives are computed side by side.
        constants: of the method.
        guiding: how the network is guided.
    """

    calls: tuple[int, ...] = (5, 7, 10, 15, 20)
    num_samples: int = 128
    held_out: int = 64
    steps: int = 100
    seed: int = 0
    batch_size: int = 64
    constants: Constants = Constants()
    guiding: Guiding = UNGUIDED

    @property
    def chunk(self) -> int:
        """Return how many samples a chunk has."""
        return min(self.batch_size, CHUNK)

    def most_evaluations(self, calls: int, starts: int, choices: int) -> int:
        """Return how often a table of S steps asks the network for a sample, at most.

        Args:
            calls: S.
            starts: trajectories that the fit step by step begins with.
            choices: of clipping.
        """
        derivatives = sum((i + 2) * (calls - 1 - i) + (calls - i if i else 0) for i in range(calls))
        # three dampings are tried, and the table before them runs again
        iteration = derivatives + 4 * calls
        iterations = choices + self.constants.iterations - 1
        fit = choices * starts * calls + iterations * iteration
        return (self.num_samples * fit + self.held_out * 2 * calls) * self.guiding.calls

    def check(self, big_t: int) -> None:
        """Check the numbers against a chain of `big_t` timesteps.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        most = min(big_t, 2 * MAX_CALLS)
        if not 2 <= self.steps <= most:
            raise ValueError(f"`trajectory_steps` is {self.steps}; it must be 2 to {most}")
        half = f", half of `trajectory_steps`={self.steps}"
        check_calls(self.calls, self.steps // 2, half)
        for name, value in (("num_images", self.num_samples), ("held_out", self.held_out)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1")
        check_batch_size(self.batch_size)


@dataclass(frozen=True)
class Outcome:
    """What was found for one number of calls.

    Attributes:
        calls: S.
        entry: of `calibration["solver"]`.
        held_out: mean squared error at the clamped end points, on noise that was not fitted.
        analytic: the same of the formulas (`FEW_STEPS`).
    """

    calls: int
    entry: dict[str, Any]
    held_out: float
    analytic: float

    @property
    def is_better(self) -> bool:
        """Tell whether the table is nearer to the fine trajectory than the formulas."""
        return self.held_out < self.analytic


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return lines of a table: held-out errors, and what is stored."""
    lines = [f"{'calls':>6} {'analytic':>10} {'table':>10} {'ratio':>7}"]
    for each in outcomes:
        ratio = each.held_out / each.analytic if each.analytic else math.inf
        clip = each.entry["clip"]
        said = f"timesteps {' '.join(map(str, each.entry['timesteps']))}, " + (
            "no clipping" if clip is None else f"clipping at {clip:g}"
        )
        if not each.is_better:
            said = "no better than the analytic one: not stored"
        lines.append(
            f"{each.calls:>6} {each.analytic:>10.4g} {each.held_out:>10.4g} {ratio:>7.3f}  {said}"
        )
    return lines


def is_fitted(entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry's steps are not those of the formulas."""
    return any(weight for row in entry["weights"] for weight in row)


def lost(before: Any, stored: Mapping[str, Any]) -> list[str]:  # noqa: ANN401
    """Return a line for each new table that replaces what it is no better version of.

    Args:
        before: the former `calibration["solver"]`, or None.
        stored: the new entries, by their number of calls.
    """
    tables, lines = before if isinstance(before, Mapping) else {}, []
    for calls, entry in stored.items():
        old = tables.get(calls)
        if not isinstance(old, Mapping):
            continue
        scales = [each.get("guidance_scale") or 1 for each in (old, entry)]
        if scales[0] != scales[1]:
            lines.append(
                f"{calls} calls: the table before, made at guidance scale {scales[0]:g}, is gone; "
                "take this back with --undo"
            )
        elif "samples" in old and "samples" not in entry:
            lines.append(
                f"{calls} calls: eta and the scales that --objective samples chose for the table "
                "before are gone; run it again, or take this back with --undo"
            )
        elif is_fitted(old) and not is_fitted(entry):
            lines.append(
                f"{calls} calls: the fitted table is gone, because the formulas give nearer "
                "pictures; take this back with --undo"
            )
    return lines


def remarks(
    before: Mapping[str, Any], stored: Mapping[str, Any], saved: Mapping[str, Any] | None
) -> list[str]:
    """Return what is to be said of tables that were stored.

    Args:
        before: the former `calibration` of the config.
        stored: the new entries, by their number of calls.
        saved: the scheduler's config, as it was saved, or None.
    """
    return lost(before.get("solver"), stored) + (not_used_with(saved or {}) if stored else [])


def not_used_with(saved: Mapping[str, Any]) -> list[str]:
    """Return a line if a scheduler's config says what keeps `CALIBRATED` from stored tables.

    Args:
        saved: the config, as it was saved.
    """
    config = restore_settings(dict(saved))
    own = {k: v for k, v in NEUTRAL.items() if k not in (*CALIBRATED, "calibration")}
    own = {k: v for k, v in own.items() if config.get(k, v) != v}
    if not own:
        return []
    said = ", ".join(f"{key}={config[key]!r}" for key in own)
    needed = ", ".join(f"{key}={value!r}" for key, value in own.items())
    return [f"the scheduler's config says {said}: CALIBRATED uses the tables with {needed} alone"]
