"""Spherical interpolation of Gaussian latents (DDIM, App. D.5), sample by sample."""

from collections.abc import Sequence

import torch

# Below this angle (radians) the arc and the chord agree to 1e-7, and sin(theta) loses digits.
NEARLY_PARALLEL = 1e-3
NEARLY_OPPOSITE = 1e-6


def slerp(x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the point at w on the arc from x to y, for each sample of the batch on its own.

    With theta the angle between the two samples, the point is

        sin((1 - w) theta) / sin(theta) x + sin(w theta) / sin(theta) y.

    The mean of two Gaussian samples has a smaller variance; the point on the arc looks like a
    Gaussian sample. Weights 0 and 1 give x and y to the bit. Nearly parallel samples are mixed
    linearly, which is the limit.

    Args:
        x: (N, ...), floating point.
        y: (N, ...), the same shape.
        weight: w in [0, 1].

    Returns:
        (N, ...), in the dtype of x; the angle is computed in float64.

    Raises:
        ValueError: for shapes that differ, a weight out of range, a zero sample, or samples that
            point in opposite directions, between which no shortest arc exists.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"`y` has shape {tuple(y.shape)}; it must be that of `x`, {tuple(x.shape)}."
        )
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"`weight` is {weight!r}; it must lie in [0, 1].")
    theta = angle(x, y)
    if not bool(theta.isfinite().all()):
        raise ValueError(
            "`x` or `y` has a sample that is zero or not finite; each must have a direction."
        )
    if bool((theta > torch.pi - NEARLY_OPPOSITE).any()):
        raise ValueError(
            "`x` and `y` have samples in opposite directions; there must be a shortest arc between "
            "them."
        )
    safe = theta.clamp(min=NEARLY_PARALLEL)
    parallel = theta < NEARLY_PARALLEL
    a = torch.where(parallel, 1.0 - weight, torch.sin((1 - weight) * safe) / torch.sin(safe))
    b = torch.where(parallel, weight, torch.sin(weight * safe) / torch.sin(safe))
    shape = (-1,) + (1,) * (x.ndim - 1)
    return (a.view(shape) * x.double() + b.view(shape) * y.double()).to(x.dtype)


def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the angle between samples (N, ...) in radians, float64 (N,); NaN where one is zero.

    2 atan2(|u - v|, |u + v|) of the unit vectors keeps its digits at every angle, unlike arccos.
    """
    u, v = (_unit(z.flatten(1).double()) for z in (x, y))
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def _unit(z: torch.Tensor) -> torch.Tensor:
    return z / z.norm(dim=1, keepdim=True)


def slerp_chain(ends: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the points between each end and the next, at `weights`, then the last end.

    Args:
        ends: (K, C, H, W), K >= 2.
        weights: positions of each stretch from 0 (included) to 1 (left out).

    Returns:
        ((K - 1) len(weights) + 1, C, H, W).
    """
    points = [slerp(ends[:-1], ends[1:], w) for w in weights]
    stretches = torch.stack(points, dim=1).flatten(0, 1)
    return torch.cat([stretches, ends[-1:]])


def slerp_grid(corners: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the grid between four corners: first down the two sides, then across (DDIM, App. D.5).

    Args:
        corners: (4, C, H, W): top left, top right, bottom left, bottom right.
        rows: >= 2.
        columns: >= 2.

    Returns:
        (rows * columns, C, H, W), row by row; the corners are the given samples to the bit.
    """
    lines = []
    for i in range(rows):
        sides = slerp(corners[:2], corners[2:], i / (rows - 1))
        line = [slerp(sides[:1], sides[1:], j / (columns - 1)) for j in range(columns)]
        lines.append(torch.cat(line))
    return torch.cat(lines)
