"""One transition of the family as three numbers: the rows of the schedulers' coefficient tables."""

from typing import NamedTuple

import torch

from .sigmas import tolerance


class Transition(NamedTuple):
    """Coefficients of x_s = x0 * x0_hat + eps * eps_hat + std * z, z ~ N(0, I) (DDIM, Eq. 12).

    Tensors of the same shape, e.g. (T,): one row for every timestep.
    """

    x0: torch.Tensor
    eps: torch.Tensor
    std: torch.Tensor


def transition(
    alpha_bar_s: torch.Tensor, sigma: torch.Tensor, std: torch.Tensor | None = None
) -> Transition:
    """Return the transition to alpha_bar_s of the member `sigma`.

    Args:
        alpha_bar_s: where the step lands, in [0, 1].
        sigma: the member, 0 <= sigma^2 <= 1 - alpha_bar_s; out of these bounds `eps` is NaN
            (`sigmas.check_sigma` is the check that raises).
        std: standard deviation of the noise that is added; `None` means `sigma` itself. It may
            differ from sigma (sigma-hat, a learned or an optimal variance): the direction keeps
            sigma.
    """
    return Transition(
        alpha_bar_s.sqrt(), direction(alpha_bar_s, sigma), sigma if std is None else std
    )


def direction(alpha_bar_s: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return sqrt(1 - alpha_bar_s - sigma^2), the weight of eps_hat (DDIM, Eq. 12).

    NaN where sigma^2 exceeds 1 - alpha_bar_s by more than rounding.
    """
    rest = 1 - alpha_bar_s - sigma**2
    return torch.where(rest < -tolerance(sigma, alpha_bar_s), torch.nan, rest.clamp(min=0)).sqrt()
