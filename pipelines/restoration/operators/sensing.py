"""Compressed sensing: few numbers, each of which sees the whole image."""

import math

import torch

from ddim_schedulers.pipelines.restoration.operators.operator import ImageShape, SingularOperator


class CompressedSensing(SingularOperator):
    """y = rows of D (r x): random signs r, the cosine transform D, and a random choice of rows.

    The rows of A are orthonormal, A A^T = I, so that A^+ = A^T and every singular value is 1 or 0.
    The signs spread each image over all frequencies. (The papers take a Hadamard transform, which
    needs sides that are powers of two.)

    Args:
        image_shape: (C, H, W) of the images.
        ratio: of the numbers that are measured, in (0, 1].
        seed: of the signs and the rows, 0 .. 2^63 - 1; the same operator on every machine.

    Raises:
        ValueError: for a ratio or seed out of range.
    """

    def __init__(self, image_shape: ImageShape, ratio: float, seed: int = 0) -> None:
        super().__init__(image_shape, 0.0)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"`ratio` is {ratio!r}; it must lie in (0, 1].")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"`seed` is {seed!r}; it must be an integer in 0 .. 2**63 - 1.")
        count = math.prod(self.image_shape)
        rows = max(1, round(ratio * count))
        source = torch.Generator("cpu").manual_seed(seed)
        picked = torch.randperm(count, generator=source, device="cpu")[:rows]
        self._rows = picked.sort().values
        signs = torch.randint(0, 2, self.image_shape, generator=source, device="cpu")
        self._signs = 2 * signs.double() - 1
        self._down, self._across = (_cosines(side) for side in self.image_shape[1:])
        # the largest sum of a row's absolute values is at most sqrt(n) times its norm
        self._largest = math.sqrt(count)

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """Return (m,)."""
        return (len(self._rows),)

    @property
    def largest(self) -> float:
        """Return sqrt(C H W): the norm of an image in [-1, 1] is no larger."""
        return self._largest

    @property
    def singular_values(self) -> torch.Tensor:
        """Return 1 for each row and 0 for what is not measured, (C H W,)."""
        values = torch.zeros(math.prod(self.image_shape), dtype=torch.float64, device="cpu")
        values[: len(self._rows)] = 1.0
        return values

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        down, across = self._constant("_down", x), self._constant("_across", x)
        spread = down @ (x * self._constant("_signs", x)) @ across.T
        return spread.flatten(1)[:, self._rows.to(x.device)]

    def _transpose(self, y: torch.Tensor) -> torch.Tensor:
        spread = y.new_zeros(len(y), math.prod(self.image_shape))
        spread[:, self._rows.to(y.device)] = y
        down, across = self._constant("_down", y), self._constant("_across", y)
        image = down.T @ spread.view(-1, *self.image_shape) @ across
        return image * self._constant("_signs", y)

    def _invert(self, y: torch.Tensor) -> torch.Tensor:
        return self._transpose(y)

    def _filter(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # all ones come first, and all zeros last
        measured, other = float(weights[0]), float(weights[-1])
        if self._rows.numel() == weights.numel():
            return measured * x
        return other * x + (measured - other) * self._transpose(self._measure(x))


def _cosines(side: int) -> torch.Tensor:
    """Return the orthogonal matrix of the cosine transform (DCT-II), (side, side)."""
    at = torch.arange(side, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / side * at[:, None] * (at + 0.5)) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
