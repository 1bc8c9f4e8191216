"""The tables of coefficients: (process, plan, sigma, noise) -> one row for every timestep.

All are computed in float64 on the CPU and rounded once. The formula that uses the columns is at the
top of `scheduling_base`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .betas import alpha_bar_before, has_linear_betas
from .multistep import multistep_weights
from .optimal import late_noise_cap
from .parameterization import Coefficients, eps_coefficients, x0_coefficients
from .reverse_noise import FixedNoise, LearnedNoise, Noise, Steps
from .scales import UNSCALED, Scales, scaled_eps, scaled_predictions
from .sigmas import sigma_eta
from .transition import Transition, transition


class Multistep(NamedTuple):
    """What a step of higher order adds: sum_j w_j (e_j - e_0), see `multistep`.

    weights has shape (m + 1, T, m), m predictions remembered, first index how many are known.
    before is the planned timestep before each, (T,), -2 where there is none. estimate holds the
    columns e_x0, e_x, e_m of e_0 = eps_hat, (T, 3); without it e_0 is x0_hat.

    A stored table of S steps (`solver_tables`) adds d . [x_T, e_0, e_1, ...] in a run from its
    first timestep on: differences has shape (T, S + 1), and place holds i for the i-th planned
    timestep, -1 elsewhere, (T,).
    """

    weights: torch.Tensor
    before: torch.Tensor
    estimate: torch.Tensor | None
    differences: torch.Tensor | None = None
    place: torch.Tensor | None = None

    @property
    def memory(self) -> int:
        """Return how many predictions of earlier steps are remembered."""
        own = self.weights.shape[0] - 1
        return own if self.differences is None else max(own, self.differences.shape[1] - 2)


class Table(NamedTuple):
    """Rows of one (trajectory, eta), float32 or float64, and what is known of all of them.

    The columns are x0_x, x0_m, out_x0, out_x, out_m, std and, where the network tells the noise,
    its bounds log_std_min and log_std_max.
    """

    rows: torch.Tensor
    uses_sample: bool  # is out_x needed with a clipped x0_hat?
    uses_output: bool  # is out_m needed with a clipped x0_hat?
    multistep: Multistep | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Table":
        """Return the table with each of its tensors changed."""
        multistep = self.multistep
        if multistep is not None:
            changed: Any = (None if part is None else change(part) for part in multistep)
            multistep = Multistep(*changed)
        return self._replace(rows=change(self.rows), multistep=multistep)


def reverse_table(
    steps: Steps,
    noise: Noise,
    prediction_type: str,
    clips: bool,
    rederive: bool,
    dtype: torch.dtype,
    scales: Scales = UNSCALED,
) -> Table:
    """Return the table of the reverse transitions.

    Where the network tells the noise, the column of the std is 1, and its bounds follow it.

    Args:
        steps: every timestep and where it lands, (T,).
        noise: that is added.
        prediction_type: what the network predicts.
        clips: whether x0_hat is clipped or thresholded.
        rederive: let eps_hat follow the clipped x0_hat, eps_hat = (x_t - sqrt(abar_t) x0_hat) /
            sqrt(1 - abar_t); otherwise it is the network's own, as in stock DDIM. It makes no
            difference where nothing is clipped.
        dtype: of the table.
        scales: of eps_hat and of the finished sample.
    """
    a_t, a_s = steps.alpha_bar_t, steps.alpha_bar_s
    before = alpha_bar_before(a_t)
    x0 = x0_coefficients(prediction_type, a_t, before)
    eps = eps_coefficients(prediction_type, a_t, before)
    x0, eps = scaled_predictions(x0, eps, a_t, scales.eps)
    bounds: list[torch.Tensor] = []
    if isinstance(noise, FixedNoise):
        std = noise.std(steps)
    else:
        assert isinstance(noise, LearnedNoise)
        std, bounds = torch.ones_like(steps.sigma), noise.bounds(steps)
    std = torch.where(a_s == 1, 0.0, std)  # the step that lands on x_0 adds none
    row = transition(a_s, steps.sigma, std)
    if clips and rederive:
        weight = row.eps / (1 - a_t).sqrt()
        out = [row.x0 - weight * a_t.sqrt(), weight, torch.zeros_like(weight)]
    else:
        out = fold(x0, eps, row, clips)
    moved = [*out, row.std]
    if scales.end is not None:
        moved = [column * scales.end for column in moved]
    rows = torch.stack([*x0, *moved, *bounds], dim=1)
    return Table(rows.to(dtype), rederive or prediction_type != "epsilon", not rederive)


def encoding_table(
    alpha_bar: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    prediction_type: str,
    clips: bool,
    dtype: torch.dtype,
    scales: Scales = UNSCALED,
) -> Table:
    """Return the table of the deterministic member run backwards, from s up to t.

    Scales of the forward steps are undone: eps_hat is that of the forward step, and a finished
    sample is divided first.

    Args:
        alpha_bar: of every timestep t, (T,).
        alpha_bar_s: from where the step goes up, (T,).
        prediction_type: what the network predicts.
        clips: whether x0_hat is clipped.
        dtype: of the table.
        scales: those of the forward step from t.
    """
    x0, eps = _encoding_coefficients(alpha_bar, alpha_bar_s, prediction_type)
    x0, eps = scaled_predictions(x0, eps, alpha_bar_s, scales.eps)
    if scales.end is not None:
        x0, eps = (x0[0] / scales.end, x0[1]), (eps[0] / scales.end, eps[1])
    none = torch.zeros_like(alpha_bar)
    rows = torch.stack([*x0, *fold(x0, eps, transition(alpha_bar, none), clips), none], dim=1)
    return Table(rows.to(dtype), prediction_type != "epsilon", True)


def _encoding_coefficients(
    a_t: torch.Tensor, a_s: torch.Tensor, prediction: str
) -> tuple[Coefficients, Coefficients]:
    """Return those of x0_hat and eps_hat, from x_s and the prediction."""
    if prediction in ("epsilon", "v_prediction"):
        return x0_coefficients(prediction, a_s), eps_coefficients(prediction, a_s)
    # both at one level would make x_t = x_s: a step that goes nowhere
    e_x, e_m = eps_coefficients(prediction, a_t, alpha_bar_before(a_t))
    rest = (1 - a_s).sqrt()
    x0 = (1 - rest * e_x) / a_s.sqrt(), -rest * e_m / a_s.sqrt()
    if prediction == "posterior_mean":
        return x0, (e_x, e_m)
    first = a_s == 1
    at_s = x0_coefficients(prediction, a_s), eps_coefficients(prediction, a_s)
    x0 = torch.where(first, x0[0], at_s[0][0]), torch.where(first, x0[1], at_s[0][1])
    return x0, (torch.where(first, e_x, at_s[1][0]), torch.where(first, e_m, at_s[1][1]))


def fold(x0: Coefficients, eps: Coefficients, row: Transition, clipped: bool) -> list[torch.Tensor]:
    """Return the columns out_x0, out_x, out_m of a transition whose eps_hat is the network's own.

    Without clipping x0_hat = x0_x x_t + x0_m m is folded in, in float64: x0_hat itself is large and
    nearly cancels at large t, where a float32 step that goes through it loses digits.
    """
    if clipped:
        return [row.x0, row.eps * eps[0], row.eps * eps[1]]
    zero = torch.zeros_like(row.x0)
    return [zero, row.x0 * x0[0] + row.eps * eps[0], row.x0 * x0[1] + row.eps * eps[1]]


def multistep_of(
    alpha_bar: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    sigma: torch.Tensor,
    plan: list[int],
    form: str,
    order: int,
    corrector: bool,
    lower_order_final: bool,
    prediction_type: str | None,
    dtype: torch.dtype,
    scales: Scales = UNSCALED,
    variable_name: str | None = None,
    weights_name: str = "exact",
    corrector_order: int | None = None,
) -> Multistep:
    """Return what a step adds to the first-order one; rows that are not planned add nothing.

    Args:
        alpha_bar: of every timestep, (T,).
        alpha_bar_s: where each step lands, (T,).
        sigma: the member, (T,).
        plan: the trajectory, strictly decreasing.
        form: of the solver, as `order`, `corrector` and `lower_order_final`; see `multistep`.
        order: 2 or more.
        corrector: whether each step is taken once more.
        lower_order_final: end with a step of order 1.
        prediction_type: where eps_hat is the network's own; None where it follows a clipped x0_hat.
        dtype: of the result.
        scales: of eps_hat and of the finished sample.
        variable_name: of the solver, as `weights_name` and `corrector_order`.
        weights_name: see `multistep`.
        corrector_order: see `multistep`.
    """
    planned = multistep_weights(
        form,
        order,
        alpha_bar[plan],
        alpha_bar_s[plan],
        sigma[plan],
        corrector,
        lower_order_final,
        variable_name,
        weights_name,
        corrector_order,
    )
    weights = planned.new_zeros(planned.shape[0], len(alpha_bar), planned.shape[2])
    weights[:, plan] = planned
    if scales.end is not None:
        weights = weights * scales.end[:, None]
    # -1 means no step yet
    before = torch.full((len(alpha_bar),), -2, dtype=torch.int64, device="cpu")
    before[plan[1:]] = torch.tensor(plan, dtype=torch.int64, device="cpu")[:-1]
    estimate = None
    if form == "epsilon":
        rest, zero = (1 - alpha_bar).sqrt(), torch.zeros_like(alpha_bar)
        columns = (-alpha_bar.sqrt() / rest, 1 / rest, zero)
        if prediction_type is not None:
            before_t = alpha_bar_before(alpha_bar)
            eps = eps_coefficients(prediction_type, alpha_bar, before_t)
            columns = (zero, *scaled_eps(eps, scales.eps))
        estimate = torch.stack(columns, dim=1).to(dtype)
    return Multistep(weights.to(dtype), before, estimate)


def late_noise_limit(
    pixels: float | None,
    alpha_bar: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    landing: torch.Tensor,
    sigma: torch.Tensor,
    plan: list[int],
) -> torch.Tensor:
    """Return the largest std of measured noise, (T,): a cap on that of the second-to-last step.

    Args:
        pixels: `late_noise_cap` of a config; without one, as in Analytic-DPM, App. F: 2 for DDPM on
            its linear schedule, 1 otherwise.
        alpha_bar: of every timestep, (T,).
        alpha_bar_s: where each step lands, (T,).
        landing: the timestep there, (T,).
        sigma: the member, (T,).
        plan: the trajectory, strictly decreasing.
    """
    if pixels is None:
        ddpm = sigma_eta(alpha_bar, alpha_bar_s, 1.0)[plan]
        is_ddpm = torch.allclose(sigma[plan], ddpm, rtol=1e-6, atol=0.0)
        pixels = 2.0 if is_ddpm and has_linear_betas(alpha_bar) else 1.0
    is_late = landing == plan[-1]
    return torch.full_like(sigma, math.inf).masked_fill(is_late, late_noise_cap(pixels))
