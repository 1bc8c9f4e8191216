r"""Amplitudes that a sampler corrects: that of eps_hat, and that of the finished sample.

A network's eps_hat is a little too large along its own samples, whose noise level differs from that
of training (exposure bias; ADM-ES, arXiv:2308.15321, divides by a number or by a line in t):

    eps_hat' = eps_hat / k(t)          k(t) = k_0 + (k_T - k_0) t / T
    x0_hat'  = (x_t - sqrt(1 - abar_t) eps_hat') / sqrt(abar_t)

before anything is clipped, whatever the network predicts. The finished sample is multiplied by a
number of its own: a network that is trained on squared errors predicts means, whose amplitude is
too small.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from .parameterization import Coefficients


class Scales(NamedTuple):
    """What the rows of a table are scaled by; None means 1.

    eps is k(t), (T,). end multiplies what a step returns, (T,): 1 but where it finishes the sample.
    """

    eps: torch.Tensor | None = None
    end: torch.Tensor | None = None


UNSCALED = Scales()


def check_scales(eps_scale: Any, end_scale: Any) -> None:
    """Check the two settings of a config.

    Args:
        eps_scale: k, or the line [k at t = 0, k at t = T].
        end_scale: what the finished sample is multiplied by.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    if not all(_is_scale(k) for k in _ends(eps_scale)):
        raise ValueError(
            f"`eps_scale` is {eps_scale!r}; it must be a finite number > 0, or two of them, "
            "[at t = 0, at t = T]."
        )
    if not _is_scale(end_scale):
        raise ValueError(f"`end_scale` is {end_scale!r}; it must be a finite number > 0.")


def is_one(eps_scale: Any) -> bool:
    """Tell whether eps_hat stays as it is."""
    return all(k == 1 for k in _ends(eps_scale))


def scales_of(eps_scale: Any, end_scale: Any, landing: torch.Tensor) -> Scales:
    """Return what the settings mean for the rows of a table.

    Args:
        eps_scale: as `check_scales` takes it.
        end_scale: as `check_scales` takes it.
        landing: the timestep where a step from each t lands, (T,), negative for the end.
    """
    eps, end, big_t = None, None, landing.shape[0]
    if not is_one(eps_scale):
        first, last = _ends(eps_scale)
        share = torch.arange(big_t, dtype=torch.float64, device="cpu") / big_t
        eps = first + (last - first) * share
    if end_scale != 1:
        end = torch.ones(big_t, dtype=torch.float64, device="cpu")
        end = end.masked_fill(landing < 0, float(end_scale))
    return Scales(eps, end)


def scaled_eps(eps: Coefficients, scale: torch.Tensor | None) -> Coefficients:
    """Return the coefficients of eps_hat' = eps_hat / scale, scale = k(t), (T,), or None for 1."""
    return eps if scale is None else (eps[0] / scale, eps[1] / scale)


def scaled_predictions(
    x0: Coefficients, eps: Coefficients, alpha_bar: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Coefficients, Coefficients]:
    """Return the coefficients of x0_hat' and eps_hat'.

    Args:
        x0: coefficients of x0_hat, (T,) each.
        eps: coefficients of eps_hat, (T,) each.
        alpha_bar: of the sample that both belong to, in (0, 1], (T,).
        scale: k(t), (T,), or None for 1.
    """
    if scale is None:
        return x0, eps
    x, m = scaled_eps(eps, scale)
    root, rest = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return ((1 - rest * x) / root, -rest * m / root), (x, m)


def _ends(eps_scale: Any) -> tuple[Any, Any]:
    """Return k at t = 0 and at t = T; a list of another length counts as no numbers."""
    if isinstance(eps_scale, list | tuple):
        return tuple(eps_scale) if len(eps_scale) == 2 else (None, None)
    return eps_scale, eps_scale


def _is_scale(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value)) and value > 0
