r"""The forward process and its Gaussian conditionals.

Notation of the whole package. x_0 is data, x_t its noisy version with

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)    DDPM (arXiv:2006.11239), Eq. 4

where alpha_bar decreases in t, 0 <= alpha_bar_t < alpha_bar_s <= 1 for s earlier than t. This is
the only constraint: t and s need not be neighbours, and the chain need not be Markovian. The DDIM
paper (arXiv:2010.02502) writes alpha for what is alpha_bar here.

Shapes: `x_t`, `x_s`, `x0`, `noise` are batches (B, C, H, W) or anything else; `alpha_bar_t`,
`alpha_bar_s` and `sigma` are floats or tensors that broadcast against them, e.g. (B, 1, 1, 1).
Every function is pure. A number for alpha_bar is checked to lie in [0, 1]; a tensor's values and
the order of alpha_bar_t and alpha_bar_s are not, which would read them back from the device: out of
bounds they give NaN or a negative variance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .betas import betas_from_alpha_bar
from .sigmas import check_sigma, sigma_eta
from .timesteps import check_timesteps
from .transition import direction

Coefficient = torch.Tensor | float


class Gaussian(NamedTuple):
    """A Gaussian with diagonal covariance: `mean` and `variance` broadcast against each other."""

    mean: torch.Tensor
    variance: torch.Tensor


def q_sample(x0: torch.Tensor, noise: torch.Tensor, alpha_bar_t: Coefficient) -> torch.Tensor:
    """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (DDPM, Eq. 4)."""
    a = _alpha_bar(alpha_bar_t)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def q_t_given_s(x_s: torch.Tensor, alpha_bar_t: Coefficient, alpha_bar_s: Coefficient) -> Gaussian:
    """Return q(x_t | x_s) of the Markovian process (DDPM, Eq. 2, over several steps at once).

    Its mean is sqrt(alpha_bar_t / alpha_bar_s) x_s and its variance 1 - alpha_bar_t / alpha_bar_s,
    for 0 <= alpha_bar_t < alpha_bar_s <= 1.
    """
    ratio = _alpha_bar(alpha_bar_t) / _alpha_bar(alpha_bar_s)
    return Gaussian(ratio.sqrt() * x_s, 1 - ratio)


def q_s_given_t_0(
    x_t: torch.Tensor,
    x0: torch.Tensor,
    alpha_bar_t: Coefficient,
    alpha_bar_s: Coefficient,
    sigma: Coefficient | None = None,
) -> Gaussian:
    """Return q_sigma(x_s | x_t, x_0), the family of DDIM (Eq. 7).

    With `sigma=None` it is the posterior of the Markovian process (DDPM, Eq. 6-7), the member
    eta = 1.

    Args:
        x_t: noisy batch.
        x0: clean batch.
        alpha_bar_t: in [0, 1), below `alpha_bar_s`.
        alpha_bar_s: in (0, 1].
        sigma: standard deviation of the member, 0 <= sigma^2 <= 1 - alpha_bar_s.

    Raises:
        ValueError: if sigma is out of bounds.
    """
    a_t, a_s = _alpha_bar(alpha_bar_t), _alpha_bar(alpha_bar_s)
    std = sigma_eta(a_t, a_s, 1.0) if sigma is None else check_sigma(_as_tensor(sigma), a_s)
    eps = (x_t - a_t.sqrt() * x0) / (1 - a_t).sqrt()
    return Gaussian(a_s.sqrt() * x0 + direction(a_s, std) * eps, std**2)


def q_t_given_s_0(
    x_s: torch.Tensor,
    x0: torch.Tensor,
    alpha_bar_t: Coefficient,
    alpha_bar_s: Coefficient,
    sigma: Coefficient,
) -> Gaussian:
    """Return q_sigma(x_t | x_s, x_0), the non-Markovian forward process of DDIM.

    It follows from Bayes' rule (DDIM, Sec. 3.1, below Eq. 7): with b = 1 - alpha_bar and
    k = sqrt(b_s - sigma^2), the pair (x_s, x_t) given x_0 is jointly Gaussian with variances b_s,
    b_t and covariance k sqrt(b_t), hence

        mean = sqrt(alpha_bar_t) x_0 + (k sqrt(b_t) / b_s) (x_s - sqrt(alpha_bar_s) x_0)
        variance = b_t sigma^2 / b_s.

    At alpha_bar_s = 1, x_s is x_0 itself and the result is q(x_t | x_0). With sigma(1) of the
    Markovian process x_0 drops out and it is q(x_t | x_s).

    Raises:
        ValueError: if sigma is out of bounds, 0 <= sigma^2 <= 1 - alpha_bar_s.
    """
    a_t, a_s = _alpha_bar(alpha_bar_t), _alpha_bar(alpha_bar_s)
    b_t, b_s = 1 - a_t, 1 - a_s
    std = check_sigma(_as_tensor(sigma), a_s)
    at_end = b_s == 0
    safe_b_s = torch.where(at_end, torch.ones_like(b_s), b_s)
    gain = direction(a_s, std) * b_t.sqrt() / safe_b_s
    variance = torch.where(at_end, b_t, b_t * std**2 / safe_b_s)
    return Gaussian(a_t.sqrt() * x0 + gain * (x_s - a_s.sqrt() * x0), variance)


def respace(alpha_bar: torch.Tensor, timesteps: Sequence[int]) -> torch.Tensor:
    """Return the betas of the shorter Markovian chain that visits only `timesteps`.

    Its own alpha_bar equals the long chain's at those timesteps, so that a sub-sequence is simply
    another diffusion (DDIM, Sec. 4.2).

    Args:
        alpha_bar: shape (T,), of the training chain.
        timesteps: strictly decreasing, within 0 .. T - 1.

    Returns:
        Betas of shape (len(timesteps),), in increasing order of time.

    Raises:
        ValueError: for timesteps that do not decrease strictly or leave the range.
    """
    kept = check_timesteps(timesteps, alpha_bar.shape[0])
    return betas_from_alpha_bar(alpha_bar[torch.tensor(kept[::-1], device="cpu")])


def gaussian_kl(p: Gaussian, q: Gaussian) -> torch.Tensor:
    """Return KL(p || q) of two Gaussians elementwise, in nats; the joint KL is the sum.

    0.5 (log(v_q / v_p) + (v_p + (m_p - m_q)^2) / v_q - 1), for variances > 0 (a zero one gives inf
    or nan).
    """
    ratio = p.variance / q.variance
    return 0.5 * (ratio - 1 - torch.log(ratio) + (p.mean - q.mean) ** 2 / q.variance)


def _alpha_bar(value: Coefficient) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) and not 0 <= value <= 1:
        raise ValueError(f"`alpha_bar` is {value!r}; it must lie in [0, 1].")
    return _as_tensor(value)


def _as_tensor(value: Coefficient) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    # float64: 1 - alpha_bar of a float32 loses four digits near x_0; a number does not promote
    return torch.tensor(value, dtype=torch.float64, device="cpu")
