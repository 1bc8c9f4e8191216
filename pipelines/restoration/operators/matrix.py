"""Any linear operator, as a matrix."""

import torch

from ddim_schedulers.pipelines.restoration.operators.operator import (
    ImageShape,
    SingularOperator,
    real_tensor,
)


class Matrix(SingularOperator):
    """y = M x for images as vectors of C H W numbers (channel by channel, row by row).

    Args:
        matrix: M, (m, C H W).
        image_shape: (C, H, W) of the images.
        truncation: singular values up to this share of the largest count as zero in A^+.

    Raises:
        ValueError: for a matrix of another shape, or values that are not finite.
    """

    def __init__(
        self, matrix: torch.Tensor, image_shape: ImageShape, truncation: float = 1e-6
    ) -> None:
        super().__init__(image_shape, truncation)
        channels, height, width = self.image_shape
        count = channels * height * width
        values = real_tensor(matrix, "matrix", f"a matrix (m, {count})")
        if values.ndim != 2 or values.shape[1] != count or not values.shape[0]:
            raise ValueError(
                f"`matrix` has shape {tuple(values.shape)}; it must be (m, {count}), a column for "
                f"each of the {channels} x {height} x {width} numbers of an image."
            )
        self._matrix = values
        u, s, vh = torch.linalg.svd(values, full_matrices=False)
        self._u, self._v = u, vh.T.contiguous()
        self._count = count
        self._values = torch.cat([s, s.new_zeros(count - len(s))])

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """Return (m,)."""
        return (len(self._matrix),)

    @property
    def largest(self) -> float:
        """Return the largest sum of a row's absolute values."""
        return float(self._matrix.abs().sum(dim=1).max())

    @property
    def singular_values(self) -> torch.Tensor:
        """Return all, zeros last, (C H W,)."""
        return self._values

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self._constant("_matrix", x).T

    def _transpose(self, y: torch.Tensor) -> torch.Tensor:
        return (y @ self._constant("_matrix", y)).view(-1, *self.image_shape)

    def _invert(self, y: torch.Tensor) -> torch.Tensor:
        v = self._constant("_v", y)
        weights = self.inverse_of(self._values[: v.shape[1]]).to(y.dtype).to(y.device)
        return ((y @ self._constant("_u", y) * weights) @ v.T).view(-1, *self.image_shape)

    def _filter(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        v, flat = self._constant("_v", x), x.flatten(1)
        weights = weights.to(x.dtype).to(x.device)
        inner = flat @ v
        if v.shape[1] == self._count:
            return ((inner * weights) @ v.T).view_as(x)
        # every direction outside of the thin V has the singular value 0
        rest = weights[-1]
        return (rest * flat + (inner * (weights[: v.shape[1]] - rest)) @ v.T).view_as(x)
