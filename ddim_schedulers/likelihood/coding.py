"""What is reported of a bound: bits per dimension, its mean over images, progressive coding."""

import math
from dataclasses import dataclass

import torch

from .bound import Terms
from .chain import Chain


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error (NaN for one image)."""

    mean: float
    std_error: float
    count: int


def estimate(values: torch.Tensor) -> Estimate:
    """Return mean and standard error of independent values, (N,).

    The spread over images holds every source of chance: the image, its noise, and its draws of t.
    """
    n = len(values)
    error = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), error, n)


def bits_per_dim(nats: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Return nats per image as bits per dimension."""
    return nats / (dimensions * math.log(2))


@dataclass(frozen=True)
class CodingPoint:
    """One point of the progressive-coding curve: what is known once x_t has been received.

    Attributes:
        timestep: t.
        rate: bits per dimension spent until x_t is known.
        distortion: root mean squared error of x0_hat(x_t), in grey levels (0 .. num_bins - 1).
        term: what the step from t costs, bits per dimension: L_{t-1}, or L_0 at t = 0.
    """

    timestep: int
    rate: float
    distortion: float
    term: float


def coding_curve(chain: Chain, terms: Terms, num_bins: int | None = 256) -> list[CodingPoint]:
    """Return the progressive lossy coding of DDPM (Sec. 4.3, Fig. 5 and Table 4), from T to 0.

    A receiver that has x_t has been sent L_T and the steps above t, and shows x0_hat(x_t). The last
    point's rate is the paper's rate, its `term` the paper's distortion in bits (L_0).

    Args:
        chain: what each step does.
        terms: of it, with the estimator `all`.
        num_bins: scale of the distortion; None leaves it on [-1, 1].

    Raises:
        ValueError: if not every step was evaluated.
    """
    if terms.index.shape[1] != len(chain) - 1 or not bool((terms.weight == 1).all()):
        raise ValueError("`terms` must hold every step once: use estimator='all'.")
    scale = 1.0 if num_bins is None else (num_bins - 1) / 2
    nats = torch.cat([terms.value, terms.decoder[:, None]], dim=1).mean(0)
    cost = bits_per_dim(nats, terms.dimensions)
    prior = bits_per_dim(terms.prior.mean()[None], terms.dimensions)
    rate = torch.cat([prior, prior + cost[:-1].cumsum(0)])
    rmse = terms.x0_error.mean(0).sqrt() * scale
    return [
        CodingPoint(t, float(r), float(e), float(c))
        for t, r, e, c in zip(chain.timesteps, rate, rmse, cost, strict=True)
    ]
