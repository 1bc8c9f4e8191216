"""Linear systems that are known by their products alone, solved for each sample of a batch apart.

A sample stops on its own, so that its solution does not depend on the batch that it is in.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

Product = Callable[[torch.Tensor], torch.Tensor]

# A residual below this many epsilons of its dtype is rounding.
_ROUNDING = 8
# Of `least_squares`. An operator that needs more has no useful pseudo-inverse.
MAX_ITERATIONS = 1000


class Solution(NamedTuple):
    """What `gmres` found.

    Attributes:
        x: the solution, in the shape of the right side.
        residual: |b - M x| / |b| of each sample, (B,), by the recursion; 0 where b is 0.
        weights: (B, k): x is the sum of the k vectors that M was applied to, with these weights.
    """

    x: torch.Tensor
    residual: torch.Tensor
    weights: torch.Tensor


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the relative residual at which rounding in `dtype` ends what can be gained."""
    return _ROUNDING * torch.finfo(dtype).eps


def gmres(product: Product, b: torch.Tensor, tolerance: float, max_iterations: int) -> Solution:
    """Return x with M x = b, by GMRES from x = 0 without restarts (Saad and Schultz, 1986).

    M need be neither symmetric nor definite: the Jacobian of a network is only nearly so. A
    singular M is fine where b lies in its range.

    Args:
        product: x -> M x, for a batch (B, ...).
        b: the right sides, (B, ...).
        tolerance: relative residual at which a sample stops.
        max_iterations: products at most; the memory is that many batches.
    """
    right = b.flatten(1)
    size = right.norm(dim=1)
    count, steps = len(right), min(max_iterations, right.shape[1])
    basis = [right / torch.where(size > 0, size, 1.0)[:, None]]
    triangle = torch.eye(steps, dtype=right.dtype, device=right.device).repeat(count, 1, 1)
    turned = right.new_zeros(count, steps + 1)  # the right side after the rotations
    turned[:, 0] = size
    rotations: list[tuple[torch.Tensor, torch.Tensor]] = []
    active = size > 0
    residual = active.to(right.dtype)
    done = 0
    while done < steps and bool(active.any()):
        column, following, grown = _arnoldi(product(basis[-1].view_as(b)).flatten(1), basis)
        for i, (cos, sin) in enumerate(rotations):
            above, below = column[i], column[i + 1]
            column[i], column[i + 1] = cos * above + sin * below, cos * below - sin * above
        radius = torch.hypot(column[done], column[done + 1])
        # a column of zeros: M is singular, and b has a part outside its range
        active = active & (radius > torch.finfo(right.dtype).eps * torch.stack(column).norm(dim=0))
        safe = torch.where(active, radius, 1.0)
        cos, sin = column[done] / safe, column[done + 1] / safe
        rotations.append((cos, sin))
        stacked = torch.stack([*column[:done], radius], dim=1)
        unit = triangle[:, : done + 1, done]
        triangle[:, : done + 1, done] = torch.where(active[:, None], stacked, unit)
        last = turned[:, done].clone()
        turned[:, done] = torch.where(active, cos * last, 0.0)
        turned[:, done + 1] = torch.where(active, -sin * last, last)
        basis.append(following)
        done += 1
        left = turned[:, done].abs() / torch.where(size > 0, size, 1.0)
        residual = torch.where(active, left, residual)
        active = active & grown & (left > tolerance)
        # a system that has converged keeps its residual in the last entry in use
        turned[:, done] = torch.where(active, turned[:, done], 0.0)
    if not done:
        return Solution(torch.zeros_like(b), residual, right.new_zeros(count, 0))
    weights = torch.linalg.solve_triangular(
        triangle[:, :done, :done], turned[:, :done, None], upper=True
    )
    x = (torch.stack(basis[:done], dim=2) @ weights).view_as(b)
    return Solution(x, residual, weights[:, :, 0])


def _arnoldi(
    image: torch.Tensor, basis: list[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the image's shares of the basis and the length of the rest, the rest, and if any."""
    rest, column = image, [image.new_zeros(len(image)) for _ in basis]
    for _ in range(2):  # a second pass makes it orthogonal up to rounding
        for i, vector in enumerate(basis):
            share = (vector * rest).sum(dim=1)
            column[i] = column[i] + share
            rest = rest - share[:, None] * vector
    length = rest.norm(dim=1)
    grown = length > torch.finfo(image.dtype).eps * image.norm(dim=1)
    following = rest / torch.where(grown, length, 1.0)[:, None]
    return [*column, length], torch.where(grown[:, None], following, 0.0), grown


def least_squares(
    measure: Product,
    transpose: Product,
    y: torch.Tensor,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> torch.Tensor:
    """Return A^+ y: of all x with the least |A x - y|, the smallest, by CGLS from x = 0.

    Conjugate gradients on A^T A x = A^T y (Hestenes and Stiefel, 1952), run until the gradient is
    down to rounding.

    Args:
        measure: x -> A x.
        transpose: y -> A^T y.
        y: measurements (B, ...).
        tolerance: |A^T (y - A x)| / |A^T y| at which a sample stops; None takes that of rounding.
        max_iterations: None takes `MAX_ITERATIONS`.
    """
    rest = y
    gradient = transpose(rest)
    x, direction = torch.zeros_like(gradient), gradient
    limit = default_tolerance(y.dtype) if tolerance is None else tolerance
    steps = MAX_ITERATIONS if max_iterations is None else max_iterations
    now = _squares(gradient)
    goal = limit**2 * now
    for _ in range(steps):
        active = now > goal
        if not bool(active.any()):
            break
        image = measure(direction)
        below = _squares(image)
        active = active & (below > 0)
        length = torch.where(active, now / torch.where(active, below, 1.0), 0.0)
        x = x + _each(length, direction) * direction
        rest = rest - _each(length, image) * image
        gradient = transpose(rest)
        new = torch.where(active, _squares(gradient), 0.0)
        ratio = torch.where(active, new / torch.where(active, now, 1.0), 0.0)
        direction = gradient + _each(ratio, direction) * direction
        now = new
    return x


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().sum(dim=1)


def _each(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return one number for each sample, shaped to multiply `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))
