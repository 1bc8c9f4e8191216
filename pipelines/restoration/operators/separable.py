"""Operators that are a product of three small matrices, of channels, rows and columns.

A = M_c (x) M_h (x) M_w has the singular values s_c s_h s_w, and its U and V are those of the three.
"""

import math
from collections.abc import Callable

import torch

from ddim_schedulers.pipelines.restoration.operators.operator import (
    ImageShape,
    SingularOperator,
    check_image_shape,
    real_tensor,
)

# Rounding of the three decompositions; singular values below this share are none.
_ROUNDING = 1e-12
# Red, green and blue in the grey value of ITU-R BT.601, which Pillow's mode L is.
LUMA = (0.299, 0.587, 0.114)


class Separable(SingularOperator):
    """y = M_c x M_h^T M_w^T, each matrix on its own axis; y is (B, C', H', W').

    Args:
        image_shape: (C, H, W) of the images.
        channels: M_c, (C', C); None leaves the axis as it is.
        rows: M_h, (H', H); None leaves the axis as it is.
        columns: M_w, (W', W); None leaves the axis as it is.
        truncation: singular values up to this share of the largest count as zero in A^+.

    Raises:
        ValueError: for a matrix that does not fit its axis or is not finite.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        channels: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        truncation: float = _ROUNDING,
    ) -> None:
        super().__init__(image_shape, truncation)
        self._axes: list[int] = []
        shape, values, bound = list(self.image_shape), [], 1.0
        for axis, (name, given) in enumerate(
            (("channels", channels), ("rows", rows), ("columns", columns))
        ):
            side = self.image_shape[axis]
            if given is None:
                values.append(torch.ones(side, dtype=torch.float64, device="cpu"))
                continue
            matrix = real_tensor(given, name, f"a matrix (n, {side})")
            if matrix.ndim != 2 or matrix.shape[1] != side or not matrix.shape[0]:
                raise ValueError(
                    f"`{name}` has shape {tuple(matrix.shape)}; it must be (n, {side})."
                )
            u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
            self._axes.append(axis)
            for part, value in (("matrix", matrix), ("u", u[:, : len(s)]), ("v", vh.T)):
                setattr(self, f"_{part}{axis}", value.contiguous())
            shape[axis] = matrix.shape[0]
            values.append(torch.cat([s, s.new_zeros(side - len(s))]))
            bound *= float(matrix.abs().sum(dim=1).max())
        self._measured_shape, self._largest = tuple(shape), bound
        products = values[0][:, None, None] * values[1][:, None] * values[2]
        self._values = torch.where(products > _ROUNDING * products.max(), products, 0.0)

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """Return (C', H', W')."""
        return self._measured_shape

    @property
    def largest(self) -> float:
        """Return the product of the three largest sums of a row's absolute values."""
        return self._largest

    @property
    def singular_values(self) -> torch.Tensor:
        """Return s_c s_h s_w, (C, H, W)."""
        return self._values

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return self._along(x, "matrix")

    def _transpose(self, y: torch.Tensor) -> torch.Tensor:
        return self._along(y, "matrix", transposed=True)

    def _invert(self, y: torch.Tensor) -> torch.Tensor:
        coefficients = self._along(y, "u", transposed=True)
        pads: list[int] = []
        for axis in (2, 1, 0):
            pads += [0, self.image_shape[axis] - coefficients.shape[axis + 1]]
        coefficients = torch.nn.functional.pad(coefficients, pads)
        weights = self.inverse_of(self._values).to(y.dtype).to(y.device)
        return self._along(coefficients * weights, "v")

    def _filter(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        coefficients = self._along(x, "v", transposed=True)
        return self._along(coefficients * weights.to(x.dtype).to(x.device), "v")

    def _along(self, x: torch.Tensor, part: str, transposed: bool = False) -> torch.Tensor:
        """Multiply every axis by its matrix, or its transpose."""
        for axis in self._axes:
            matrix = self._constant(f"_{part}{axis}", x)
            matrix = matrix.T if transposed else matrix
            x = torch.movedim(torch.movedim(x, axis + 1, -1) @ matrix.T, -1, axis + 1)
        return x


def box_superresolution(image_shape: ImageShape, factor: int) -> Separable:
    """Return the mean over squares of factor x factor pixels, to (C, H / factor, W / factor).

    Raises:
        ValueError: for a factor that does not divide both sides.
    """
    return _smaller(image_shape, factor, _box)


def bicubic_superresolution(image_shape: ImageShape, factor: int) -> Separable:
    """Return bicubic reduction by `factor`, as Pillow resizes: Keys' kernel with a = -1/2.

    The kernel is as wide as 4 factor pixels, so that nothing is aliased, and is cut off and
    normalised again at the borders.

    Raises:
        ValueError: for a factor that does not divide both sides.
    """
    return _smaller(image_shape, factor, _bicubic)


def grey_from_colour(
    image_shape: ImageShape, weights: tuple[float, float, float] = LUMA
) -> Separable:
    """Return the grey value of each pixel, to (1, H, W).

    Args:
        image_shape: (3, H, W).
        weights: of red, green and blue; those of ITU-R BT.601 unless given. The papers of DDRM and
            DDNM take a third each.

    Raises:
        ValueError: for images without three channels, or weights that are no three numbers.
    """
    shape = check_image_shape(image_shape)
    if shape[0] != 3:
        raise ValueError(f"`image_shape` is {shape}; grey from colour needs 3 channels.")
    row = real_tensor(weights, "weights", "three numbers")
    if tuple(row.shape) != (3,) or not bool(row.any()):
        raise ValueError(f"`weights` is {weights!r}; it must be three numbers, not all of them 0.")
    return Separable(shape, channels=row[None])


def _smaller(
    image_shape: ImageShape, factor: int, make: Callable[[int, int], torch.Tensor]
) -> Separable:
    channels, height, width = check_image_shape(image_shape)
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"`factor` is {factor!r}; it must be an integer >= 1.")
    if height % factor or width % factor:
        raise ValueError(
            f"`factor` is {factor}; it must divide both sides of images of {height}x{width}."
        )
    return Separable(
        (channels, height, width), rows=make(height, factor), columns=make(width, factor)
    )


def _box(side: int, factor: int) -> torch.Tensor:
    eye = torch.eye(side // factor, dtype=torch.float64, device="cpu")
    return eye.repeat_interleave(factor, dim=1) / factor


def _bicubic(side: int, factor: int) -> torch.Tensor:
    matrix = torch.zeros(side // factor, side, dtype=torch.float64, device="cpu")
    for i in range(side // factor):
        for j in range(side):
            # centres of pixels, in units of the pixels that come out
            matrix[i, j] = _keys((j + 0.5) / factor - (i + 0.5))
    return matrix / matrix.sum(dim=1, keepdim=True)


def _keys(x: float) -> float:
    """Return Keys' cubic convolution kernel (1981) with a = -1/2."""
    x = math.fabs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
