"""The standard deviation of the noise that a step adds.

`alpha_bar_t` and `alpha_bar_s` are tensors of the same shape with
0 <= alpha_bar_t <= alpha_bar_s <= 1; results are standard deviations, never variances. These bounds
are not checked, which would read tensors back from the device; sigma and eta are.
"""

import math
import sys
from collections.abc import Iterable

import torch

from .config_types import check_numbers, listed

# Rounding of float64 tables: sigma(1)^2 = 1 - alpha_bar_s exactly at zero terminal SNR.
TOLERANCE = 1e-12
# The largest float. An integer may be larger and cannot be multiplied with a float then.
MAX_FLOAT = sys.float_info.max


def sigma_eta(
    alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, eta: float = 1.0
) -> torch.Tensor:
    """Return eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s) (DDIM, Eq. 16).

    eta = 0 is the deterministic member, eta = 1 the Markovian DDPM, whose posterior standard
    deviation it is (DDPM, Eq. 7).

    Args:
        alpha_bar_t: in [0, 1).
        alpha_bar_s: in [alpha_bar_t, 1].
        eta: >= 0 and finite; values above 1 are admissible as far as sigma^2 <= 1 - alpha_bar_s.

    Raises:
        ValueError: if eta is negative or not finite.
    """
    check_eta(eta)
    return (
        eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt() * sigma_hat(alpha_bar_t, alpha_bar_s)
    )


def sigma_tau(alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, tau: float) -> torch.Tensor:
    """Return sqrt(1 - abar_s) sqrt(1 - exp(-2 tau^2 h)), the noise of SA-Solver's tau.

    h = log(rho_t / rho_s) is the step in log rho (arXiv:2309.05019, Sec. 4). With eta it is

        1 - exp(-2 tau^2 h) = eta^2 (1 - exp(-2 h))

    so that tau = eta where either is 0 or 1, and for short steps; between 0 and 1 eta is the larger
    one.

    Args:
        alpha_bar_t: in (0, 1).
        alpha_bar_s: in [alpha_bar_t, 1].
        tau: >= 0 and finite.

    Raises:
        ValueError: if tau is negative or not finite.
    """
    _check_factor("tau", tau)
    rest_t, rest_s = 1 - alpha_bar_t, 1 - alpha_bar_s
    square = (rest_s / rest_t) * (alpha_bar_t / alpha_bar_s)  # exp(-2 h)
    return (rest_s * (1 - square**tau**2)).sqrt()


def sigma_hat(alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor) -> torch.Tensor:
    """Return sigma-hat = sqrt(1 - abar_t / abar_s), DDPM's larger choice of noise (DDIM, Sec. 5).

    It is a standard deviation of added noise only, never the sigma of a member of the family: near
    x_0 its square exceeds 1 - abar_s.
    """
    # a chain so long that abar underflows has 0 / 0 between two such steps: nothing of x_s is left
    # in x_t
    ratio = torch.where(alpha_bar_s > 0, alpha_bar_t / alpha_bar_s, torch.zeros_like(alpha_bar_t))
    return (1 - ratio).clamp(min=0).sqrt()


def check_eta(eta: float) -> float:
    """Return `eta` if it is a finite number >= 0.

    Raises:
        ValueError: otherwise.
    """
    return _check_factor("eta", eta)


def _check_factor(name: str, value: float) -> float:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not 0 <= value <= MAX_FLOAT:
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number >= 0.")
    return value


def tolerance(sigma: torch.Tensor, alpha_bar_s: torch.Tensor) -> float:
    """Return by how much sigma^2 may exceed 1 - alpha_bar_s through rounding of either."""
    is_double = sigma.dtype == alpha_bar_s.dtype == torch.float64
    return TOLERANCE if is_double else 1e-6


def check_sigma(
    sigma: torch.Tensor, alpha_bar_s: torch.Tensor, eta: float | None = None
) -> torch.Tensor:
    """Return `sigma` if 0 <= sigma^2 <= 1 - alpha_bar_s holds in every step (DDIM, Eq. 7).

    Args:
        sigma: standard deviations, shape (S,), in the order of stepping, or one for each sample.
        alpha_bar_s: alpha_bar where each step lands, broadcasts against `sigma`.
        eta: what the caller gave if sigma was made of it; the message then speaks of it.

    Raises:
        ValueError: naming the first offending step.
    """
    admissible = (sigma >= 0) & (sigma**2 <= 1 - alpha_bar_s + tolerance(sigma, alpha_bar_s))
    if not bool(admissible.all()):
        i = int((~admissible).flatten().nonzero()[0])
        values, landings = (x.flatten() for x in torch.broadcast_tensors(sigma, alpha_bar_s))
        value, bound = float(values[i]), math.sqrt(1 - float(landings[i]))
        given, it, largest = f"`sigma` is {value:.6g}", "it", ""
        if eta is not None:
            given, it = f"`eta` is {eta!r}, which gives sigma = {value:.6g}", "sigma"
            noisy = values > 0  # sigma is proportional to eta; rounded down, and 1 always fits
            share = float(((1 - landings[noisy]).sqrt() / values[noisy]).min())
            largest = f"; `eta` may be at most {max(math.floor(eta * share * 1e4) / 1e4, 1.0):g}"
        raise ValueError(
            f"{given} in step {i} (counted from 0); {it} must lie between 0 and "
            f"sqrt(1 - alpha_bar_s) = {bound:.6g} there{largest}."
        )
    return sigma


def as_sigma(values: Iterable[float]) -> torch.Tensor:
    """Return explicit standard deviations, one for each step, in float64.

    Raises:
        ValueError: for what is no list of finite numbers.
    """
    plain = listed("sigma", values)
    numbers = list(plain) if isinstance(plain, Iterable) and not isinstance(plain, str) else plain
    check_numbers("sigma", numbers)
    sigma = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if not bool(torch.isfinite(sigma).all()):
        raise ValueError(
            f"`sigma` must be a list of finite numbers, one for each step; got {values!r}."
        )
    return sigma
