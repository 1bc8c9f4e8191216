"""What a linear measurement y = A x is: the protocol, and the two bases of our operators.

A is linear from images x (B, C, H, W) in [-1, 1] to measurements y (B, ...), with

    <A x, y> = <x, A^T y>        A A^+ A = A        A^+ A A^+ = A^+

The names of the three methods are those of the library deepinv, whose physics fit as they are.

An operator whose singular values are known, A = U S V^T, offers one thing more, V f(S) V^T x for
any function f (`filtered`). It is all that DDRM and the closed forms of the other methods need, and
it hides the layout: V is never handed out. Noise can be drawn in the image, for V is orthogonal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Protocol, runtime_checkable

import torch

from ddim_schedulers.pipelines.restoration.solvers import least_squares

Function = Callable[[torch.Tensor], torch.Tensor]
ImageShape = tuple[int, int, int]


@runtime_checkable
class Operator(Protocol):
    """A linear measurement, ours or of another library."""

    def A(self, x: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Return the measurement (B, ...) of images (B, C, H, W)."""

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Return A^T y, (B, C, H, W)."""

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Return A^+ y, (B, C, H, W)."""


class LinearOperator(ABC):
    """Base of our operators. Constants are float64 on the CPU, and follow the images they meet.

    Args:
        image_shape: (C, H, W) of the images.
    """

    def __init__(self, image_shape: ImageShape) -> None:
        self.image_shape = check_image_shape(image_shape)
        self._kept: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    @property
    @abstractmethod
    def measured_shape(self) -> tuple[int, ...]:
        """Return the shape of one measurement."""

    @property
    def largest(self) -> float | None:
        """Return the largest |A x| of an image in [-1, 1], None if unknown."""
        return None

    def A(self, x: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Return the measurement of images x (B, C, H, W), in their dtype.

        Raises:
            ValueError: for images of another shape.
        """
        self._check(x, "x", self.image_shape)
        return self._measure(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Return A^T y, (B, C, H, W).

        Raises:
            ValueError: for measurements of another shape.
        """
        self._check(y, "y", self.measured_shape)
        return self._transpose(y)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Return A^+ y, (B, C, H, W): of all images that come nearest to y, the smallest.

        Raises:
            ValueError: for measurements of another shape.
        """
        self._check(y, "y", self.measured_shape)
        return self._invert(y)

    def seen(self, y: torch.Tensor) -> torch.Tensor:
        """Return y with 0 in places that were not measured, as outside of a mask."""
        self._check(y, "y", self.measured_shape)
        return y

    @abstractmethod
    def _measure(self, x: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _transpose(self, y: torch.Tensor) -> torch.Tensor: ...

    def _invert(self, y: torch.Tensor) -> torch.Tensor:
        return least_squares(self._measure, self._transpose, y)

    def _constant(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return the attribute `name` in the dtype and on the device of `like`."""
        key = (name, like.dtype, like.device)
        if key not in self._kept:
            value: torch.Tensor = getattr(self, name)
            dtype = like.dtype.to_complex() if value.is_complex() else like.dtype
            if like.dtype == torch.float64 or value.dtype == torch.float64:
                value = value.to(dtype)  # first: some devices have no float64
            self._kept[key] = value.to(dtype).to(like.device)
        return self._kept[key]

    def _check(self, given: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(f"`{name}` is {kind}; it must be a floating-point tensor.")
        if tuple(given.shape[1:]) != shape or given.ndim != len(shape) + 1:
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(
                f"`{name}` has shape {tuple(given.shape)}; {type(self).__name__} takes ({wanted})."
            )


class SingularOperator(LinearOperator):
    """An operator whose singular values are known.

    Args:
        image_shape: (C, H, W) of the images.
        truncation: singular values up to this share of the largest count as zero in A^+, in [0, 1).
    """

    def __init__(self, image_shape: ImageShape, truncation: float) -> None:
        super().__init__(image_shape)
        if (
            isinstance(truncation, bool)
            or not isinstance(truncation, int | float)
            or not 0 <= truncation < 1
        ):
            raise ValueError(f"`truncation` is {truncation!r}; it must lie in [0, 1).")
        self.truncation = float(truncation)

    @property
    @abstractmethod
    def singular_values(self) -> torch.Tensor:
        """Return all of them, zeros for what is not measured, float64, in a layout of their own."""

    @property
    def threshold(self) -> float:
        """Return the singular value up to which A^+ sees nothing."""
        return self.truncation * float(self.singular_values.max())

    def filtered(self, x: torch.Tensor, function: Function) -> torch.Tensor:
        """Return V f(S) V^T x, (B, C, H, W).

        Args:
            x: images (B, C, H, W).
            function: f, from the singular values in float64 to one number for each.
        """
        self._check(x, "x", self.image_shape)
        return self._filter(x, function(self.singular_values))

    def inverse_of(self, s: torch.Tensor) -> torch.Tensor:
        """Return 1 / s, and 0 where s is at most the threshold."""
        kept = s > self.threshold
        return torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)

    @abstractmethod
    def _filter(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...

    def _invert(self, y: torch.Tensor) -> torch.Tensor:
        # A^+ = V S^+ U^T = V S^+2 V^T A^T
        weights = self.inverse_of(self.singular_values).square()
        return self._filter(self._transpose(y), weights)


@torch.no_grad()
def adjoint_error(
    operator: Operator,
    image_shape: ImageShape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Return how far `A_adjoint` is from the adjoint of `A`, from one call of each.

    Compares <A x, y> with <x, A_adjoint(y)> for two random images x and measurements y, always the
    same ones. The result estimates the Frobenius norm of A_adjoint - A^T as a share of those of A
    and A_adjoint: about 1e-7 by rounding in float32, 0.1 to 1.5 for a wrong factor or a flip.

    Args:
        operator: any object with A and A_adjoint, linear.
        image_shape: (C, H, W) of its images.
        dtype: of the images, float32 or float64.
        device: of the images.

    Raises:
        ValueError: if A_adjoint gives another shape than that of images.
    """
    source = torch.Generator("cpu").manual_seed(1)

    def normal(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=source, dtype=dtype, device="cpu")

    x = normal((2, *check_image_shape(image_shape)), dtype)
    forward = operator.A(x.to(device))
    y = normal(forward.shape, forward.dtype)
    back = operator.A_adjoint(y.to(forward.device))
    if back.shape != x.shape:
        raise ValueError(
            f"`operator.A_adjoint` of {type(operator).__name__} gives {tuple(back.shape)}; it must "
            f"be the shape of the images, {tuple(x.shape)}."
        )
    forward, back = forward.cpu().double(), back.cpu().double()
    gap = (forward * y.double()).flatten(1).sum(1) - (x.double() * back).flatten(1).sum(1)
    size = (forward.square().sum() + back.square().sum()) / 2
    return float((gap.square().sum() / size).sqrt()) if size else 0.0


def check_image_shape(shape: ImageShape) -> ImageShape:
    """Return `shape` if it is (C, H, W).

    Raises:
        ValueError: otherwise.
    """
    sides = tuple(shape) if isinstance(shape, Sequence) else ()
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if len(sides) == 3 and whole and min(sides) >= 1:
        return (int(sides[0]), int(sides[1]), int(sides[2]))
    raise ValueError(f"`image_shape` is {shape!r}; it must be (C, H, W), three integers >= 1.")


def real_tensor(values: object, name: str, what: str) -> torch.Tensor:
    """Return finite real numbers as a float64 tensor on the CPU.

    Raises:
        ValueError: for anything else; `what` says what is allowed.
    """
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` is {type(values).__name__}; it must be {what}.") from error
    if tensor.is_complex() or not bool(tensor.double().isfinite().all()):
        raise ValueError(f"`{name}` holds values that are not finite real numbers; all must be.")
    return tensor.double()
