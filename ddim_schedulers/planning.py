"""From a config to the timesteps of a plan, calibration included."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .optimal import Statistics, optimal_timesteps, statistics_of
from .reverse_noise import Noise, cost_name, noise_named
from .solver_tables import check_solver_tables
from .timesteps import TIMESTEP_SPACINGS, check_num_inference_steps, check_timesteps, make_timesteps
from .trajectory import calibrated_timesteps, trajectory_of

# A scheduler knows the network, so two of its trajectories come from measurements of it.
SCHEDULER_SPACINGS = (*TIMESTEP_SPACINGS, "optimal", "calibrated")

# Planned trajectories by what they were planned from.
Kept = dict[tuple[Any, ...], list[int]]


def planned_timesteps(
    config: Any,
    alpha_bar: torch.Tensor,
    alpha_bar_end: float,
    member: tuple[str, float],
    kept: Kept,
    num_inference_steps: int | None,
    timesteps: Iterable[int] | None,
) -> list[int]:
    """Return the trajectory that the arguments and the config ask for, strictly decreasing.

    Args:
        config: of a scheduler.
        alpha_bar: of its process, (T,).
        alpha_bar_end: where the last step lands.
        member: the variance and eta whose bound `timestep_spacing='optimal'` minimises.
        kept: trajectories that were planned before; what is planned here is added.
        num_inference_steps: of the caller, or None.
        timesteps: of the caller, or None.

    Raises:
        ValueError: naming the argument or the setting, its value and what is allowed.
    """
    big_t = config.num_train_timesteps
    if timesteps is not None:
        if num_inference_steps is not None:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r} and `timesteps` is given; "
                "pass one of them."
            )
        return check_timesteps(timesteps, big_t)
    if config.timesteps is not None:
        planned = check_timesteps(config.timesteps, big_t)
        _check_length("timesteps", len(planned), num_inference_steps)
        return planned
    if num_inference_steps is None:
        raise ValueError(
            "`num_inference_steps` is None and no `timesteps` are given; pass one of them."
        )
    check_num_inference_steps(num_inference_steps, big_t)
    if config.timestep_spacing == "optimal":
        return list(_optimal(config, alpha_bar, member, kept, num_inference_steps))
    if config.timestep_spacing == "calibrated":
        return list(_calibrated(config, alpha_bar, alpha_bar_end, kept, num_inference_steps))
    return make_timesteps(
        config.timestep_spacing,
        num_inference_steps,
        big_t,
        config.steps_offset,
        config.quadratic_end,
        config.original_inference_steps,
    )


def check_calibration(config: Any, alpha_bar: torch.Tensor, noise: Noise) -> None:
    """Check what `calibration` holds: statistics, a trajectory, tables of solvers, or all of them.

    Args:
        config: of a scheduler.
        alpha_bar: of its process, (T,).
        noise: that it adds.

    Raises:
        ValueError: for what is missing or does not fit.
    """
    calibration = config.get("calibration")
    measured = set(calibration) if isinstance(calibration, Mapping) else set()
    has_trajectory, has_tables = "trajectory" in measured, "solver" in measured
    if has_trajectory or config.timestep_spacing == "calibrated":
        trajectory_of(calibration, config.num_train_timesteps)
    if has_tables:
        check_solver_tables(calibration, config.num_train_timesteps)
    needed = noise.needs_calibration or config.timestep_spacing == "optimal"
    alone = (has_trajectory or has_tables) and "gamma" not in measured
    if needed or (calibration is not None and not alone):
        measured_statistics(config, alpha_bar)


def measured_statistics(config: Any, alpha_bar: torch.Tensor) -> Statistics:
    """Return the checked statistics of a config's `calibration`.

    Raises:
        ValueError: without them.
    """
    calibration = config.get("calibration")
    if calibration is None:
        raise ValueError(
            "`calibration` is None; for 'optimal' noise or spacing it must hold the statistics of "
            "the network. `ddim-schedulers calibrate` measures them and adds them to the config."
        )
    return statistics_of(calibration, alpha_bar)


def largest_x0(config: Any) -> float:
    """Return the largest |x_0|: of thresholded data 1, of any other `clip_sample_range`."""
    if config.get("thresholding", False):
        return 1.0
    return float(config.get("clip_sample_range", 1.0))


def bound_member(config: Any) -> tuple[str, float]:
    """Return the variance and eta whose bound `timestep_spacing='optimal'` minimises.

    Where sigma may be 0, also outside an `eta_interval`, the bound is infinite, and the Markovian
    member's with the optimal variance takes its place.
    """
    eta = config.get("eta")
    if not eta or config.get("eta_interval") is not None:
        return "optimal", 1.0
    name = config.get("reverse_variance", "sigma")
    return cost_name(noise_named("reverse_variance", name)), float(eta)


def _optimal(
    config: Any, alpha_bar: torch.Tensor, member: tuple[str, float], kept: Kept, steps: int
) -> list[int]:
    statistics, limit = measured_statistics(config, alpha_bar), largest_x0(config)
    numbers = (tuple(values.tolist()) for values in statistics)
    key = (steps, *member, limit, *numbers)
    if key not in kept:
        kept[key] = optimal_timesteps(alpha_bar, statistics, steps, *member, limit)
    return kept[key]


def _calibrated(
    config: Any, alpha_bar: torch.Tensor, alpha_bar_end: float, kept: Kept, steps: int
) -> list[int]:
    trajectory = trajectory_of(config.get("calibration"), config.num_train_timesteps)
    solver = (
        config.get("solver_order", 1),
        config.get("solver_form", "sample"),
        bool(config.get("lower_order_final", False)),
        config.get("solver_variable"),
        config.get("solver_weights", "exact"),
    )
    curve = tuple(trajectory.points.flatten().tolist())
    key = ("calibrated", steps, *solver, *trajectory.timesteps, *curve)
    if key not in kept:
        kept[key] = calibrated_timesteps(trajectory, alpha_bar, alpha_bar_end, steps, *solver)
    return kept[key]


def _check_length(name: str, length: int, num_inference_steps: int | None) -> None:
    if num_inference_steps is not None and num_inference_steps != length:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}, but `{name}` has {length} values; "
            f"pass {length} or None."
        )
