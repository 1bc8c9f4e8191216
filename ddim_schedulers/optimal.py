r"""The reverse variance and the trajectory that minimise the variational bound.

With `a` for alpha_bar and b = 1 - a, the posterior q(x_s | x_t, x_0) of the member sigma and the
reverse step p(x_s | x_t) differ in their means by

    weight (x_0 - x0_hat),    weight = sqrt(a_s) - sqrt((b_s - sigma^2) a_t / b_t)

so that their KL divergence, and the variance that minimises it, need one number for every t: the
mean squared error of x0_hat. It follows from two statistics of a trained network, expectations over
data and noise that are estimated once and serve every member and every trajectory (Analytic-DPM,
arXiv:2201.06503):

    gamma_t     = E ||eps_theta(x_t, t)||^2 / d       1 - gamma_t = eps_error_t if it is perfect
    eps_error_t = E ||eps - eps_theta(x_t, t)||^2 / d
    x0_error_t  = E ||x_0 - x0_hat(x_t, t)||^2 / d    (b_t / a_t) eps_error_t if nothing is clipped

All tensors are float64; statistics and alpha_bar have shape (T,), index t = 0 .. T - 1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .reverse_noise import Steps, fixed_noise, x0_weight
from .sigmas import sigma_eta

# The matrix of costs has T^2 entries, and nine of its size are alive at once: 1.2 GB at this T.
MAX_TIMESTEPS = 4_000


def check_statistic(name: str, values: Iterable[float], num_train_timesteps: int) -> torch.Tensor:
    """Return a statistic as float64 of shape (T,) after checking it.

    Args:
        name: what the message calls it, e.g. `gamma`.
        values: T finite numbers >= 0 (a list, an array or a tensor).
        num_train_timesteps: T.

    Raises:
        ValueError: for a wrong length or a number that is negative or not finite, naming the first.
    """
    given = values if isinstance(values, torch.Tensor) else list(values)
    table = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    if table.shape != (num_train_timesteps,):
        raise ValueError(
            f"`{name}` has shape {tuple(table.shape)}; it must have one value for each of the "
            f"`num_train_timesteps`={num_train_timesteps} timesteps."
        )
    valid = torch.isfinite(table) & (table >= 0)
    if not bool(valid.all()):
        t = int((~valid).nonzero()[0])
        raise ValueError(f"`{name}[{t}]` is {float(table[t])}; it must be finite and >= 0.")
    return table


class Statistics(NamedTuple):
    """What the optimal variance and trajectory need of a network, float64 (T,) each."""

    gamma: torch.Tensor
    x0_error: torch.Tensor


def statistics_of(calibration: Any, alpha_bar: torch.Tensor) -> Statistics:
    """Return the checked statistics of a scheduler's `calibration`.

    Args:
        calibration: mapping with `gamma`, and `x0_error` or `eps_error` where they were measured;
            a missing x0_error follows from eps_error, a missing eps_error is 1 - gamma.
        alpha_bar: (T,).

    Raises:
        ValueError: if it is no mapping, has no `gamma`, or a list that `check_statistic` refuses.
    """
    has_gamma = isinstance(calibration, Mapping) and calibration.get("gamma") is not None
    if not has_gamma and isinstance(calibration, Mapping) and "trajectory" in calibration:
        raise ValueError(
            "`calibration` holds a trajectory alone; for 'optimal' noise or spacing it must hold "
            "the statistics of all timesteps (`gamma`). `ddim-schedulers calibrate --data ...` "
            "measures them and adds them to the config."
        )
    if not has_gamma:
        raise ValueError(
            f"`calibration` is {str(calibration)[:60]!r}; it must be a dictionary with the list "
            "`gamma` (and `x0_error` or `eps_error`), as `ddim-schedulers calibrate` writes it."
        )
    given = {
        name: check_statistic(f"calibration[{name!r}]", calibration[name], alpha_bar.shape[0])
        for name in ("gamma", "eps_error", "x0_error")
        if calibration.get(name) is not None
    }
    gamma = given["gamma"]
    error = given.get("eps_error", (1 - gamma).clamp(min=0))
    return Statistics(gamma, given.get("x0_error", x0_error_from_eps(error, alpha_bar)))


def optimal_timesteps(
    alpha_bar: torch.Tensor,
    statistics: Statistics,
    num_inference_steps: int,
    variance: str = "optimal",
    eta: float = 1.0,
    x0_limit: float = 1.0,
) -> list[int]:
    """Return the trajectory of S timesteps with the smallest expected bound, strictly decreasing.

    Raises:
        ValueError: as `cost_matrix` and `best_trajectory`.
    """
    own = x0_variance(statistics.gamma, alpha_bar, x0_limit**2)
    cost = cost_matrix(alpha_bar, variance, statistics.x0_error, eta, own)
    return best_trajectory(cost, num_inference_steps)


def x0_error_from_eps(eps_error: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return (b_t / a_t) eps_error, the error of x0_hat that an error of eps_hat means, (T,).

    Infinite at a_t = 0, where eps says nothing about x_0.
    """
    return torch.where(alpha_bar > 0, (1 - alpha_bar) / alpha_bar * eps_error, math.inf)


def x0_variance(gamma: torch.Tensor, alpha_bar: torch.Tensor, limit: float = 1.0) -> torch.Tensor:
    """Return the mean variance of x_0 given x_t, (T,): (b_t / a_t)(1 - gamma_t) within [0, limit].

    Data in [-1, 1] have no more variance than 1 (Analytic-DPM, Theorem 2 and App. F), and an
    estimate of gamma may exceed 1.

    Args:
        gamma: E||eps_theta||^2 / d, (T,).
        alpha_bar: (T,).
        limit: r^2 for data in [-r, r]; > 0.
    """
    return x0_error_from_eps((1 - gamma).clamp(min=0), alpha_bar).clamp(max=limit)


def late_noise_cap(pixels: float) -> float:
    """Return the largest std of the noise of the second-to-last step, for 8-bit data in [-1, 1].

    Such noise moves a pixel by `pixels` of its 256 levels in the mean, E|std z| = pixels 2 / 255
    (Analytic-DPM, App. F). It is a bound for samples that are looked at, never for likelihoods.
    """
    return pixels * (2 / 255) * math.sqrt(math.pi / 2)


def step_kl(
    posterior_variance: torch.Tensor,
    reverse_variance: torch.Tensor,
    weight: torch.Tensor,
    x0_error: torch.Tensor,
) -> torch.Tensor:
    """Return KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats per dimension (DDPM, Eq. 8).

    Args:
        posterior_variance: sigma^2 of the member, > 0.
        reverse_variance: of p, the same for every dimension, > 0.
        weight: as `x0_weight` gives it.
        x0_error: ||x_0 - x0_hat||^2 / d of one image, or its expectation.
    """
    ratio = posterior_variance / reverse_variance
    return 0.5 * (ratio - 1 - torch.log(ratio) + weight**2 * x0_error / reverse_variance)


def cost_matrix(
    alpha_bar: torch.Tensor,
    variance: str,
    x0_error: torch.Tensor,
    eta: float = 1.0,
    x0_variance_t: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cost of every step t -> s in the bound, nats per dimension, shape (T, T).

    Entry [t, s] is the expected KL of that step; it is infinite for s >= t. The whole matrix costs
    one statistic for each t (Watson et al., arXiv:2106.03802, Sec. 3.2). With a perfect network and
    the optimal variance it is half the logarithm of the ratio of optimal and posterior variance
    (Analytic-DPM, Sec. 4).

    Args:
        alpha_bar: (T,), T <= 4,000.
        variance: one of `reverse_noise.COST_VARIANCES`.
        x0_error: E||x_0 - x0_hat||^2 / d, (T,).
        eta: the member, > 0.
        x0_variance_t: Var(x_0 | x_t), (T,), for `optimal`.

    Raises:
        ValueError: for a longer chain, eta = 0 (the bound is infinite) or an unknown variance.
    """
    big_t = alpha_bar.shape[0]
    if big_t > MAX_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` is {big_t}; the optimal trajectory needs a matrix of its "
            f"square and is limited to {MAX_TIMESTEPS}."
        )
    if eta <= 0:
        raise ValueError(f"`eta` is {eta!r}; a cost in the bound needs eta > 0.")
    a_t, a_s = alpha_bar[:, None], alpha_bar[None, :]
    below = torch.ones(big_t, big_t, dtype=torch.bool, device="cpu").tril(-1)
    # outside the triangle nothing is defined: any admissible pair keeps the formulas finite there
    a_s = torch.where(below, a_s, 0.5 * (1 + a_t))
    sigma = sigma_eta(a_t, a_s, eta)
    own = None if x0_variance_t is None else x0_variance_t[:, None]
    reverse = fixed_noise(variance).variance(Steps(a_t, a_s, sigma, own))
    cost = step_kl(sigma**2, reverse, x0_weight(a_t, a_s, sigma), x0_error[:, None])
    return torch.where(below, cost, math.inf)


def best_trajectory(cost: torch.Tensor, num_inference_steps: int) -> list[int]:
    """Return the S timesteps from T - 1 to 0 whose steps cost least in sum, strictly decreasing.

    Exact dynamic programming: S - 2 relaxations of all T values through the matrix (Watson et al.,
    arXiv:2106.03802, Algorithm 1), O(S T^2).

    Args:
        cost: (T, T), entry [t, s] for the step t -> s, infinite for s >= t.
        num_inference_steps: S, from 2 to T (both ends are on the trajectory).

    Raises:
        ValueError: for S out of range, or if every trajectory of S timesteps costs infinity.
    """
    big_t, steps = cost.shape[0], num_inference_steps
    if not 2 <= steps <= big_t:
        raise ValueError(
            f"`num_inference_steps` is {steps!r}; the optimal trajectory holds both 0 and T - 1 "
            f"and needs 2 to {big_t} timesteps."
        )
    # rows are where a step lands, so that the minimum runs over contiguous memory; after k steps
    # only timesteps below T - k can have been reached
    landing, value, came_from = cost.T.contiguous(), cost[-1], []
    for k in range(1, steps - 1):
        reached = big_t - k
        best = (landing[:reached, :reached] + value[:reached]).min(dim=1)
        value = best.values
        came_from.append(best.indices)
    if not math.isfinite(float(value[0])):
        raise ValueError(
            "`cost` is infinite or NaN on every trajectory from T - 1 to 0; it must be finite on "
            "one of them."
        )
    path = [0]
    for origin in reversed(came_from):
        path.append(int(origin[path[-1]]))
    return [big_t - 1, *reversed(path)]
