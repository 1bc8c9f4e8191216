"""Checks of the inputs of a restoration, before the first network call."""

from typing import Any

import torch

from ddim_schedulers.pipelines.restoration.methods import METHODS, Method
from ddim_schedulers.pipelines.restoration.operators import (
    LinearOperator,
    Operator,
    adjoint_error,
)

RANGES = ((-1, 1), (0, 1))
# Methods take its square, which float32 must hold.
LARGEST_NOISE = 1e15
# How far a measurement may leave the range that the operator gives images in [-1, 1]: the rounding
# of 8 bits, and this many standard deviations of the noise.
_ROUNDING = 1 / 128
_DEVIATIONS = 10
# The error by rounding that a linear operator may make, as a share of its largest value.
_LINEAR = 1e-3
# How far off an adjoint may be: half precision inside of an operator gives 1e-3, and projectors
# with grids of their own a few percent.
_ADJOINT = 5e-2


def check_method(method: str | Method) -> Method:
    """Return the method that is named or given.

    Raises:
        ValueError: for an unknown name, or something that is no method.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"`method` is {method!r}; it must be one of {tuple(METHODS)}, or one of their classes "
            "with its settings, as `Ddrm(eta_b=0.9)`."
        )
    return METHODS[method]()


def check_noise_std(noise_std: float) -> float:
    """Return `noise_std` if it is a number in 0 .. `LARGEST_NOISE`.

    Raises:
        ValueError: otherwise.
    """
    if (
        isinstance(noise_std, bool)
        or not isinstance(noise_std, int | float)
        or not 0 <= noise_std <= LARGEST_NOISE
    ):
        raise ValueError(
            f"`noise_std` is {noise_std!r}; it must be a number in 0 .. {LARGEST_NOISE:g}."
        )
    return float(noise_std)


def check_operator(
    operator: Any,  # noqa: ANN401
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    uses_adjoint: bool,
) -> torch.Tensor:
    """Check that an operator takes images of `shape` and gives them back; return A(1), (1, ...).

    Args:
        operator: A.
        shape: (C, H, W) of the images.
        dtype: of the images.
        device: of the images.
        uses_adjoint: whether the method calls A_adjoint. Otherwise it is only compared with A in a
            `LinearOperator`, whose A_dagger may be made of it.

    Raises:
        ValueError: for something without the three methods, an operator for other images, one that
            is not linear, mixes the images of a batch, changes the shape on the way back, or has
            another adjoint.
    """
    kind = type(operator).__name__
    if isinstance(operator, type) or not isinstance(operator, Operator):
        raise ValueError(
            f"`operator` is {operator if isinstance(operator, type) else kind}; it must be an "
            "object with the methods A, A_adjoint and A_dagger."
        )
    if isinstance(operator, LinearOperator) and operator.image_shape != shape:
        raise ValueError(
            f"`operator` is a {kind} for images of {operator.image_shape} (C, H, W); the network's "
            f"are {shape}."
        )
    ones = torch.ones(1, *shape, dtype=dtype, device=device)
    of_ones = _applied(operator, "A", ones)
    of_zeros = _applied(operator, "A", torch.zeros_like(ones))
    if bool(of_zeros.any()):
        raise ValueError(f"`operator.A` of {kind} is not linear; A(0) must be 0.")
    pair = _probe(2, ones)
    measured = _applied(operator, "A", pair)
    first, second = measured
    together = _applied(operator, "A", pair[:1] - 2 * pair[1:])[0]
    # of two images, for a median is linear in the scale of one
    error = (together - (first - 2 * second)).abs().max()
    if float(error) > _LINEAR * float(together.abs().max()):
        raise ValueError(
            f"`operator.A` of {kind} is not linear, or mixes the images of a batch; A(x - 2 z) "
            "must be A(x) - 2 A(z), also where x and z are in one batch."
        )
    _check_back(operator, "A_adjoint", measured, pair)
    if uses_adjoint or isinstance(operator, LinearOperator):
        off = adjoint_error(operator, shape, dtype, device)
        if not off <= _ADJOINT:
            raise ValueError(
                f"`operator.A_adjoint` of {kind} is off by {off:.2g} of its size; it must be the "
                "adjoint of A, <A(x), y> = <x, A_adjoint(y)> for all x and y."
            )
    _check_back(operator, "A_dagger", measured, pair)
    return of_ones


def _check_back(operator: Any, name: str, y: torch.Tensor, images: torch.Tensor) -> None:  # noqa: ANN401
    """Check that a method takes the measurement of images to their shape."""
    back = _applied(operator, name, y)
    if back.shape != images.shape:
        raise ValueError(
            f"`operator.{name}` of {type(operator).__name__} changes the shape: it gives "
            f"{tuple(back.shape[1:])} for a measurement of images; it must give "
            f"{tuple(images.shape[1:])}."
        )


def _applied(operator: Any, name: str, given: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    kind, shape = type(operator).__name__, tuple(given.shape)
    try:
        result = getattr(operator, name)(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`operator.{name}` of {kind} fails for {shape}: {error}") from error
    if not isinstance(result, torch.Tensor) or result.ndim < 2 or len(result) != len(given):
        said = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(
            f"`operator.{name}` of {kind} gives {said} for {shape}; it must be a tensor with one "
            "row for each image."
        )
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"`operator.{name}` of {kind} gives values that are not finite; all must be."
        )
    return result


def check_measurement(
    measurement: Any,  # noqa: ANN401
    operator: Operator,
    of_ones: torch.Tensor,
    noise_std: float,
    measurement_range: tuple[float, float],
    limit: float | None,
) -> torch.Tensor:
    """Return the measurement (N, ...) of images in [-1, 1], in the dtype and place of `of_ones`.

    Args:
        measurement: (N, ...) as it was given.
        operator: A.
        of_ones: A(1), (1, ...).
        noise_std: as it was given.
        measurement_range: of the images that were measured.
        limit: the largest value of an image, None where the model's data have none.

    Raises:
        ValueError: for another type, shape or range, or values that are not finite.
    """
    if not isinstance(measurement_range, tuple | list) or tuple(measurement_range) not in RANGES:
        raise ValueError(
            f"`measurement_range` is {measurement_range!r}; it must be one of {RANGES}."
        )
    if not isinstance(measurement, torch.Tensor) or not measurement.is_floating_point():
        is_tensor = isinstance(measurement, torch.Tensor)
        kind = measurement.dtype if is_tensor else type(measurement).__name__
        raise ValueError(f"`measurement` is {kind}; it must be a floating-point tensor (N, ...).")
    if measurement.layout is not torch.strided or measurement.is_meta:
        kind = "on the meta device" if measurement.is_meta else str(measurement.layout)
        raise ValueError(f"`measurement` is {kind}; it must be a dense tensor with values.")
    wanted = tuple(of_ones.shape[1:])
    if tuple(measurement.shape[1:]) != wanted or measurement.ndim < 2 or not len(measurement):
        raise ValueError(
            f"`measurement` has shape {tuple(measurement.shape)}; `operator` gives (N, "
            f"{', '.join(map(str, wanted))})."
        )
    if not bool(measurement.isfinite().all()):
        raise ValueError("`measurement` holds values that are not finite; all must be.")
    y = measurement.detach().to(of_ones.dtype).to(of_ones.device)
    ours = operator if isinstance(operator, LinearOperator) else None
    y = y if ours is None else ours.seen(y)
    if tuple(measurement_range) == (0, 1):
        # A (2 x - 1) = 2 A x - A 1
        y, noise_std = 2 * y - of_ones, 2 * noise_std
    if limit is not None and ours is not None and ours.largest is not None:
        bound = limit * ours.largest * (1 + _ROUNDING) + _DEVIATIONS * noise_std
        low, high = float(y.min()), float(y.max())
        if max(-low, high) > bound:
            raise ValueError(
                f"`measurement` has values in [{low:.4g}, {high:.4g}] in units of images in "
                f"[-1, 1]; with `noise_std` they must lie in [-{bound:.4g}, {bound:.4g}]. Divide "
                "bytes by 255, and say measurement_range=(0, 1) where the images that were "
                "measured lie in [0, 1]."
            )
    return y


def measures_nothing(operator: Operator, of_ones: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether A is 0: a random image is not in the null space of any other operator."""
    return not bool(operator.A(_probe(1, of_ones.new_empty(1, *shape))).any())


def _probe(rows: int, like: torch.Tensor) -> torch.Tensor:
    """Return random images, always the same ones, as `like` (1, C, H, W)."""
    source = torch.Generator("cpu").manual_seed(0)
    shape = (rows, *like.shape[1:])
    probe = torch.randn(shape, generator=source, dtype=like.dtype, device="cpu")
    return probe.to(like.device)
