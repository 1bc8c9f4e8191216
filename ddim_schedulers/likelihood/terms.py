"""The two ends of the bound: L_T against the prior, and L_0, the likelihood of the pixel's bin."""

import math

import torch

# Pixels are float32 at best; a bin of 16-bit data is 256 times this wide.
GRID_TOLERANCE = 2e-7


def prior_kl(x0: torch.Tensor, alpha_bar_last: torch.Tensor) -> torch.Tensor:
    """Return L_T = KL(N(sqrt(a) x_0, (1 - a) I) || N(0, I)) in nats per image, (B,).

    Args:
        x0: (B, ...).
        alpha_bar_last: alpha_bar at the trajectory's largest timestep, 0-d, in [0, 1).
    """
    a = alpha_bar_last.to(torch.float64)
    square = x0.to(torch.float64).flatten(1) ** 2
    return 0.5 * (a * square - a - torch.log1p(-a)).sum(1)


def grid_levels(x0: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Return the index 0 .. num_bins - 1 of each value on the grid of [-1, 1], int64 like `x0`.

    Raises:
        ValueError: if num_bins < 2 or a value is not on the grid (up to float32 rounding).
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 2:
        raise ValueError(f"`num_bins` is {num_bins!r}; it must be an integer >= 2.")
    position = (x0.to(torch.float64) + 1) * ((num_bins - 1) / 2)
    level = position.round()
    off = (position - level).abs() > GRID_TOLERANCE * num_bins
    if bool((off | (level < 0) | (level >= num_bins) | ~torch.isfinite(position)).any()):
        bad = (off | (level < 0) | (level >= num_bins) | ~torch.isfinite(position)).flatten()
        value = float(x0.flatten()[int(bad.nonzero()[0])])
        raise ValueError(
            f"`x0` holds {value!r}; each value must be one of the {num_bins} equally spaced values "
            "of [-1, 1]. Use data without resizing, noise or augmentation, or another `num_bins`."
        )
    return level.long()


def log_normal_interval(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return log(Phi(high) - Phi(low)) elementwise for finite low < high; float64.

    Accurate in both tails, to rounding: the interval is mirrored to the left one, where log Phi(x)
    = log erfcx(-x / sqrt 2) - x^2 / 2 + const, and the difference of the squares is taken exactly.
    A narrow interval is its midpoint's density times its width.
    """
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    width, middle = high - low, 0.5 * (high + low)
    log_high = torch.special.log_ndtr(high)
    # log(1 - exp(gap)), gap = log Phi(low) - log Phi(high) < 0
    ratio = torch.special.erfcx(-low / math.sqrt(2)) / torch.special.erfcx(
        (-high / math.sqrt(2)).clamp(min=0)
    )
    left = width * middle + ratio.log()
    gap = torch.where(high <= 0, left, torch.special.log_ndtr(low) - log_high)
    wide = log_high + torch.log(-torch.expm1(gap.clamp(max=-1e-300)))
    # the relative error is width^2 (middle^2 - 1) / 24, below 1e-11 where this is used
    is_narrow = width * (1 + middle.abs()) < 1e-5
    safe_width = torch.where(is_narrow, width, 1.0)
    safe_middle = torch.where(is_narrow, middle, 0.0)
    narrow = -0.5 * safe_middle**2 - 0.5 * math.log(2 * math.pi) + safe_width.log()
    return torch.where(is_narrow, narrow, wide)


def decoder_nll(
    x0: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    num_bins: int | None = 256,
    floor: float | None = None,
) -> torch.Tensor:
    """Return L_0 = -log p(x_0 | x_1) in nats per image, (B,) (DDPM, Eq. 13).

    Each value gets the probability of its bin under N(mean, variance); the bins of -1 and 1 are
    open towards infinity.

    Args:
        x0: (B, ...), on the grid of `num_bins` values of [-1, 1].
        mean: x0_hat, like `x0`.
        variance: > 0, broadcasts against `x0`.
        num_bins: 256 for 8-bit data; `None` takes the Gaussian density instead, for continuous
            data.
        floor: smallest probability of a bin. `None` is the exact bound; DDPM's code has 1e-12,
            with which it is no longer a bound.

    Raises:
        ValueError: for data off the grid or a variance that is not > 0.
    """
    x, mean, variance = (v.to(torch.float64) for v in (x0, mean, variance))
    if not bool((variance.detach() > 0).all()):
        raise ValueError("`variance` must be > 0 everywhere.")
    if num_bins is None:
        nll = 0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance))
        return (nll + torch.zeros_like(x)).flatten(1).sum(1)
    level = grid_levels(x0, num_bins)
    half = 1 / (num_bins - 1)
    centre = level.to(torch.float64) * (2 * half) - 1
    std = variance.sqrt()
    low, high = (centre - half - mean) / std, (centre + half - mean) / std
    # an open tail: everything beyond this far holds less than the smallest float64
    beyond = 1e8 * (1 + torch.maximum(low.abs(), high.abs()))
    low, high = (
        torch.where(level == 0, low - beyond, low),
        torch.where(level == num_bins - 1, high + beyond, high),
    )
    log_p = log_normal_interval(low, high)
    if floor is not None:
        log_p = log_p.clamp(min=math.log(floor))
    return -log_p.flatten(1).sum(1)
