r"""A trajectory tau for pictures: the S timesteps whose jumps miss the fine trajectory least.

A fine run of the probability-flow ODE with N steps tells, for every two of its timesteps, by how
much one step from t to s would miss the point x_s that the fine run reaches. Dynamic programming
finds the S timesteps with the least sum of mean squared misses (GITS, arXiv:2405.11326, where
it is Euler's step that misses). Here it is the step of the solver that will be used, planned as of
order 2 after the planned step before it.

All of this needs the inner products of the predictions eps_hat(t_i) alone, averaged over samples:
xbar = x / sqrt(alpha_bar) moves by eps d rho. Trajectories bend alike and lie almost in a plane
(the same paper, Sec. 3), so the N predictions are kept as a curve in a few dimensions that has
these inner products: `calibration["trajectory"]`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .multistep import has_line, line_moment, multistep_weights, step_moments, variable
from .timesteps import check_timesteps

# What an embedding leaves out, as a share of the mean squared norm.
EMBEDDING_TOLERANCE = 1e-6
# The costs of all pairs of jumps have N^3 entries.
MAX_FINE_STEPS = 256


class Trajectory(NamedTuple):
    """The curve of eps_hat along a fine trajectory.

    timesteps: N of them, strictly decreasing from T - 1. points: float64 (N, r), with the inner
    products E<eps_i, eps_j> / d.
    """

    timesteps: list[int]
    points: torch.Tensor


def embed(gram: torch.Tensor) -> torch.Tensor:
    """Return points (N, r) with the inner products `gram`, (N, N), in as few dimensions as needed.

    What is left out is at most `EMBEDDING_TOLERANCE` of the trace.

    Raises:
        ValueError: if an inner product is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            "`trajectory` is not finite; for timestep_spacing='calibrated' it must be. Without "
            "clipping, the samples of this network diverge."
        )
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    left = values.sum() - values.cumsum(0)
    rank = int((left > EMBEDDING_TOLERANCE * values.sum()).sum()) + 1
    return vectors[:, :rank] * values[:rank].sqrt()


def trajectory_of(calibration: Any, num_train_timesteps: int) -> Trajectory:
    """Return the checked trajectory of a scheduler's `calibration`.

    Raises:
        ValueError: if it has none, or one with timesteps or points that do not fit.
    """
    measured = calibration.get("trajectory") if isinstance(calibration, Mapping) else None
    if not isinstance(measured, Mapping):
        raise ValueError(
            "`calibration` has no `trajectory`; timestep_spacing='calibrated' must have one. "
            "`ddim-schedulers calibrate --objective trajectory` measures it and adds it to the "
            "config."
        )
    timesteps = check_timesteps(measured.get("timesteps"), num_train_timesteps)  # type: ignore[arg-type]
    rows = measured.get("points")
    if timesteps[0] != num_train_timesteps - 1 or not 2 <= len(timesteps) <= MAX_FINE_STEPS:
        raise ValueError(
            f"`calibration['trajectory']['timesteps']` has {len(timesteps)} values from "
            f"{timesteps[0]} on; it must have 2 to {MAX_FINE_STEPS} from T - 1 on."
        )
    points = _points(rows, len(timesteps))
    return Trajectory(timesteps, points)


def _points(rows: Any, count: int) -> torch.Tensor:
    try:
        points = torch.tensor(rows, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        points = torch.empty(0)
    fits = points.ndim == 2 and points.shape[0] == count and 1 <= points.shape[1] <= count
    if not fits or not bool(torch.isfinite(points).all()):
        raise ValueError(
            f"`calibration['trajectory']['points']` must be {count} lists of as many finite "
            "numbers each, one for each of its timesteps."
        )
    return points


def calibrated_timesteps(
    trajectory: Trajectory,
    alpha_bar: torch.Tensor,
    alpha_bar_end: float,
    num_inference_steps: int,
    order: int = 1,
    form: str = "sample",
    lower_order_final: bool = False,
    variable_name: str | None = None,
    weights_name: str = "exact",
) -> list[int]:
    """Return the S timesteps from T - 1 on with the least sum of misses, decreasing.

    Args:
        trajectory: of N timesteps.
        alpha_bar: (T,), of the training chain.
        alpha_bar_end: where the last step lands.
        num_inference_steps: S, from 1 to N.
        order: of the solver; 3 and 4 are planned as 2.
        form: of the solver, see `multistep`.
        lower_order_final: as there.
        variable_name: as there.
        weights_name: as there.

    Raises:
        ValueError: for S out of range, or alpha_bar = 0 at T - 1, from where rho is infinite.
    """
    n = len(trajectory.timesteps)
    if not 1 <= num_inference_steps <= n:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps!r}; with timestep_spacing='calibrated' "
            f"it must lie in 1 .. {n}, the number of timesteps of the calibration."
        )
    a_t = alpha_bar[trajectory.timesteps]
    if bool(a_t[0] == 0):
        raise ValueError(
            "`timestep_spacing` is 'calibrated', which needs alpha_bar > 0 at T - 1; with "
            "`rescale_betas_zero_snr` use 'trailing'."
        )
    end = torch.full_like(a_t[:1], alpha_bar_end)
    solver = order, form, lower_order_final, variable_name, weights_name
    cost = jump_costs(trajectory.points, a_t, end, *solver)
    return [trajectory.timesteps[i] for i in _best_path(cost, num_inference_steps)]


def jump_costs(
    points: torch.Tensor,
    alpha_bar_t: torch.Tensor,
    alpha_bar_end: torch.Tensor,
    order: int,
    form: str,
    lower_order_final: bool = False,
    variable_name: str | None = None,
    weights_name: str = "exact",
) -> torch.Tensor:
    """Return the mean squared miss of every jump, shape (N + 1, N, N + 1).

    Entry [p, i, k] is that of a step from point i to point k, or the end for k = N, after a step
    from p; p = N is a step of order 1. Infinite for k <= i and p >= i.
    """
    n = alpha_bar_t.shape[0]
    rho = ((1 - alpha_bar_t) / alpha_bar_t).sqrt()
    rho_end = ((1 - alpha_bar_end) / alpha_bar_end).sqrt()
    landing, rho_s = torch.cat([alpha_bar_t, alpha_bar_end]), torch.cat([rho, rho_end])
    path = fine_path(points, alpha_bar_t, landing[1:])
    euler = path[:n, None] + (rho_s[None, :, None] - rho[:, None, None]) * points[:, None]
    miss = (euler - path) * landing.sqrt()[:, None]  # (N, N + 1, r)
    after = torch.arange(n + 1, device="cpu")[None, :] > torch.arange(n, device="cpu")[:, None]
    cost = torch.full((n + 1, n, n + 1), math.inf, dtype=torch.float64, device="cpu")
    cost[n] = torch.where(after, miss.square().sum(-1), math.inf)
    if order == 1:
        cost[:n] = torch.where(after[:, :n, None], cost[n], math.inf)
        return cost
    a_t, a_s = alpha_bar_t[:, None].expand_as(after), landing[None, :].expand_as(after)
    a_s = torch.where(after, a_s, 0.5 * (1 + a_t))  # keeps the formulas finite elsewhere
    step_of = form, a_t, a_s, torch.zeros_like(a_t), variable_name
    gain = line_moment(step_moments(*step_of)[0], *step_of, weights_name)
    gain = torch.where(has_line(a_s, variable_name), gain, 0.0)
    if lower_order_final:
        gain[:, n] = 0
    node = variable(form, alpha_bar_t, variable_name)
    e = points if form == "epsilon" else path[:n] - rho[:, None] * points
    for i in range(1, n):
        apart = torch.ones_like(node[:i]) if variable_name == "step" else node[:i] - node[i]
        slope = (e[:i] - e[i]) / apart[:, None]
        missed = miss[i, i + 1 :] + gain[i, i + 1 :, None] * slope[:, None]
        cost[:i, i, i + 1 :] = missed.square().sum(-1)
    return cost


def fine_path(
    points: torch.Tensor, alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor
) -> torch.Tensor:
    """Return xbar along the fine trajectory less xbar at its start, (N + 1, r), by order 2."""
    none = torch.zeros_like(alpha_bar_t)
    weights = multistep_weights("epsilon", 2, alpha_bar_t, alpha_bar_s, none)[1, :, :1]
    rho_t, rho_s = (((1 - a) / a).sqrt()[:, None] for a in (alpha_bar_t, alpha_bar_s))
    before = torch.cat([points[:1], points[:-1]])
    steps = (rho_s - rho_t) * points + weights / alpha_bar_s.sqrt()[:, None] * (before - points)
    return torch.cat([torch.zeros_like(points[:1]), steps.cumsum(0)])


def _best_path(cost: torch.Tensor, steps: int) -> list[int]:
    """Return the indices of the best S points: exact, over all pairs (step before, present one)."""
    n = cost.shape[1]
    value = torch.full((n + 1, n), math.inf, dtype=torch.float64, device="cpu")
    value[n, 0] = 0
    came_from: list[torch.Tensor] = []
    for _ in range(steps - 1):
        best = (value[:, :, None] + cost[:, :, :n]).min(dim=0)
        value = torch.full_like(value, math.inf)
        value[:n] = best.values
        came_from.append(best.indices)
    last = int((value + cost[:, :, n]).argmin())
    before, present = divmod(last, n)
    path = [present]
    for origin in reversed(came_from):
        path.append(before)
        before, present = int(origin[before, present]), before
    return path[::-1]


def pack_trajectory(timesteps: Sequence[int], gram: torch.Tensor) -> dict[str, Any]:
    """Return what `trajectory_of` reads: plain lists, with nine digits."""
    rows = embed(gram).tolist()
    points = [[float(f"{value:.9g}") for value in row] for row in rows]
    return {"timesteps": [int(t) for t in timesteps], "points": points}
