"""One measurement after another."""

import torch

from ddim_schedulers.pipelines.restoration.operators.operator import (
    ImageShape,
    LinearOperator,
    Operator,
)


class Composition(LinearOperator):
    """y = A_n ... A_2 A_1 x; A^+ is found by iterations to rounding, for it is no product.

    Args:
        image_shape: (C, H, W) of the images.
        parts: A_1, A_2, ...: the first sees the image, each other one what the one before gave.
            Those of this package are built for the shape that they see.

    Raises:
        ValueError: for no parts, something that is no operator, or parts that do not fit.
    """

    def __init__(self, image_shape: ImageShape, *parts: Operator) -> None:
        super().__init__(image_shape)
        if not parts:
            raise ValueError("`parts` is empty; a composition needs at least one operator.")
        for i, part in enumerate(parts):
            if not isinstance(part, Operator):
                raise ValueError(
                    f"`parts[{i}]` is {type(part).__name__}; it must have A, A_adjoint and "
                    "A_dagger."
                )
        self.parts = parts
        probe = torch.zeros(1, *self.image_shape, dtype=torch.float64, device="cpu")
        bounds = [part.largest if isinstance(part, LinearOperator) else None for part in parts]
        self._largest: float | None = 1.0
        for bound in bounds:
            known = self._largest is not None and bound is not None
            self._largest = self._largest * bound if known else None  # type: ignore[operator]
        for i, part in enumerate(parts):
            try:
                probe = part.A(probe)
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"`parts[{i}]` does not take what comes to it, {tuple(probe.shape)}: {error}"
                ) from error
        self._measured_shape = tuple(probe.shape[1:])

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """Return the shape that the last part gives."""
        return self._measured_shape

    @property
    def largest(self) -> float | None:
        """Return the product of those of the parts."""
        return self._largest

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part.A(x)
        return x

    def _transpose(self, y: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            y = part.A_adjoint(y)
        return y
