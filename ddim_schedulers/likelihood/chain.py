"""The reverse chain whose likelihood is bounded: what each of its steps does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..betas import alpha_bar_before
from ..optimal import x0_variance
from ..reverse_noise import (
    BOUND_VARIANCES,
    LearnedNoise,
    Noise,
    Steps,
    fixed_noise,
    noise_named,
    variance_range,
    x0_weight,
)
from ..sigmas import check_sigma, sigma_eta
from ..timesteps import check_timesteps

VARIANCES = BOUND_VARIANCES


@dataclass(frozen=True)
class Chain:
    """A reverse chain: what each of its S steps does, in the order of sampling.

    Attributes:
        timesteps: strictly decreasing, the last one 0.
        alpha_bar: at each timestep, float64 (S,).
        alpha_bar_before: alpha_bar_{t-1} of the training chain, (S,), for `posterior_mean`.
        posterior_variance: sigma^2 of the member, (S,); 0 in the last step, which is L_0.
        weight: of x_0 in the posterior's mean, (S,).
        variance: of the reverse step, (S,); the last one is L_0's. For `learned_range` it is the
            lower of the two bounds.
        log_variance_range: logarithms of the bounds of `learned_range`, (S, 2), else None.
    """

    timesteps: list[int]
    alpha_bar: torch.Tensor
    alpha_bar_before: torch.Tensor
    posterior_variance: torch.Tensor
    weight: torch.Tensor
    variance: torch.Tensor
    log_variance_range: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)


def first_posterior_variance(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return the posterior variance of timestep 1 of the training chain, 0-d.

    L_0 takes it for the fixed variances (the authors' code of DDPM and of Analytic-DPM): the
    posterior variance of timestep 0 is 0. With T = 1 it is beta_0.
    """
    if alpha_bar.shape[0] == 1:
        return 1 - alpha_bar[0]
    return sigma_eta(alpha_bar[1], alpha_bar[0], 1.0) ** 2


def make_chain(
    alpha_bar: torch.Tensor,
    timesteps: Sequence[int],
    variance: str = "fixed_small",
    *,
    eta: float = 1.0,
    sigma: Sequence[float] | torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    x0_limit: float = 1.0,
) -> Chain:
    """Return the reverse chain whose bound is asked for.

    Args:
        alpha_bar: of the training chain, float64 (T,).
        timesteps: trajectory, strictly decreasing within 0 .. T - 1; the last one must be 0.
        variance: `fixed_small` (sigma^2), `fixed_large` (1 - a_t / a_s, for eta = 1),
            `learned_range` (between the two, eta = 1) or `optimal`.
        eta: the member, sigma = eta sigma(1); > 0.
        sigma: the member as one std for each step, > 0 except the last, which lands on x_0;
            excludes `eta`.
        gamma: E||eps_theta||^2 / d, (T,), for `optimal`.
        x0_limit: largest |x_0|; its square bounds Var(x_0 | x_t) in `optimal`.

    Returns:
        A chain that is differentiable in `alpha_bar`.

    Raises:
        ValueError: for a trajectory without timestep 0, a member with sigma = 0 (its bound is
            infinite), a variance that does not go with the member, or missing statistics.
    """
    tau = check_timesteps(timesteps, alpha_bar.shape[0])
    if tau[-1] != 0:
        raise ValueError(
            f"`timesteps` ends at {tau[-1]}; a likelihood needs a trajectory that contains "
            "timestep 0 (for an even one, timestep_spacing='linspace')."
        )
    noise = noise_named("variance", variance)
    if not noise.any_member and not (sigma is None and eta == 1):
        said = "an explicit `sigma`" if sigma is not None else f"eta={eta!r}"
        raise ValueError(f"`variance` is {variance!r}, which needs eta=1; got {said}.")
    a_t = alpha_bar[tau]
    a_s = torch.cat([a_t[1:], torch.ones_like(a_t[:1])])
    std = _member(a_t, a_s, eta, sigma)
    own = _x0_variance(noise, gamma, alpha_bar, tau, x0_limit)
    first, bounds = first_posterior_variance(alpha_bar), None
    # without the last step, whose sigma is 0, every square root has a gradient
    inner_t, inner_s, inner_std = a_t[:-1], a_s[:-1], std[:-1]
    if isinstance(noise, LearnedNoise):
        small, large = reverse_pair(a_t, a_s, first)
        bounds, reverse = torch.stack([small.log(), large.log()], dim=1), small
    else:
        inner_own = None if own is None else own[:-1]
        inner = fixed_noise(variance).variance(Steps(inner_t, inner_s, inner_std, inner_own))
        reverse = torch.cat([inner, first[None] if own is None else own[-1:]])
    if gamma is not None and own is not None and float(own[-1].detach()) <= 0:
        raise ValueError(
            f"`gamma[0]` is {float(gamma[0])}; for L_0 with the optimal variance it must be below "
            "1. Calibrate with more images, or take a fixed variance."
        )
    one = torch.ones_like(a_t[:1])
    return Chain(
        tau,
        a_t,
        alpha_bar_before(alpha_bar)[tau],
        std**2,
        torch.cat([x0_weight(inner_t, inner_s, inner_std), one]),
        reverse,
        bounds,
    )


def reverse_pair(
    alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two variances between which `learned_range` lies, (S,) each.

    The lower one of the last step is `first`, as in the authors' code (`variance_range`).
    """
    return variance_range(alpha_bar_t, alpha_bar_s, first)


def _member(
    a_t: torch.Tensor,
    a_s: torch.Tensor,
    eta: float,
    sigma: Sequence[float] | torch.Tensor | None,
) -> torch.Tensor:
    if sigma is None:
        inner = sigma_eta(a_t[:-1], a_s[:-1], eta)
        std, said = torch.cat([inner, torch.zeros_like(a_t[:1])]), f"`eta` is {eta!r}"
        check_sigma(std.detach(), a_s.detach(), eta)
    else:
        std = torch.as_tensor(sigma, dtype=a_t.dtype)
        if std.shape != a_t.shape:
            raise ValueError(
                f"`sigma` has shape {tuple(std.shape)}; it must have one value for each of the "
                f"{len(a_t)} steps."
            )
        check_sigma(std, a_s.detach())
        said = "`sigma` is 0 in a step before the last"
    if len(std) > 1 and not bool((std[:-1] > 0).all()):
        raise ValueError(
            f"`sigma` must be > 0 in every step before the last, but {said}: q(x_s | x_t, x_0) is "
            "then a point, and its divergence from any Gaussian is infinite, as is the bound."
        )
    return std


def _x0_variance(
    noise: Noise,
    gamma: torch.Tensor | None,
    alpha_bar: torch.Tensor,
    tau: list[int],
    x0_limit: float,
) -> torch.Tensor | None:
    if not noise.needs_calibration:
        return None
    if gamma is None:
        name = noise.variance_types[0]
        raise ValueError(
            f"`gamma` is None; for variance={name!r} it must be that of a calibration."
        )
    return x0_variance(gamma.to(alpha_bar), alpha_bar, x0_limit**2)[tau]
