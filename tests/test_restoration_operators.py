"""Operators of inverse problems: identities in float64, what they compute, what they refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_schedulers.pipelines.restoration.operators import (
    Blur,
    Composition,
    CompressedSensing,
    Inpainting,
    Matrix,
    Operator,
    Separable,
    SingularOperator,
    adjoint_error,
    bicubic_superresolution,
    box_superresolution,
    gaussian_kernel,
    grey_from_colour,
)
from ddim_schedulers.pipelines.restoration.solvers import gmres, least_squares

SHAPE = (3, 8, 12)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def half(shape=SHAPE):
    mask = torch.zeros(shape[1:])
    mask[:, : shape[2] // 2] = 1
    return mask


OPERATORS = {
    "inpainting": lambda: Inpainting(half(), SHAPE),
    "inpainting per channel": lambda: Inpainting(normal(*SHAPE) > 0, SHAPE),
    "all": lambda: Inpainting(torch.ones(8, 12, dtype=torch.bool), SHAPE),
    "nothing": lambda: Inpainting(torch.zeros(1, 8, 12), SHAPE),
    "box": lambda: box_superresolution(SHAPE, 4),
    "bicubic": lambda: bicubic_superresolution(SHAPE, 2),
    "grey": lambda: grey_from_colour(SHAPE),
    "separable": lambda: Separable(SHAPE, normal(4, 3), normal(5, 8), normal(13, 12)),
    "blur": lambda: Blur(gaussian_kernel(0.7), SHAPE, truncation=1e-9),
    "blur of an odd kernel": lambda: Blur(normal(4, 5), SHAPE, truncation=0.2),
    "sensing": lambda: CompressedSensing(SHAPE, 0.3, seed=5),
    "everything sensed": lambda: CompressedSensing(SHAPE, 1.0),
    "matrix": lambda: Matrix(normal(40, 288), SHAPE),
    "tall matrix": lambda: Matrix(normal(300, 288), SHAPE),
    "matrix of low rank": lambda: Matrix(normal(40, 3) @ normal(3, 288), SHAPE),
    "composition": lambda: Composition(
        SHAPE,
        Blur(gaussian_kernel(0.6), SHAPE),
        grey_from_colour(SHAPE),
        box_superresolution((1, 8, 12), 2),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_and_pseudo_inverse(name):
    operator = OPERATORS[name]()
    assert isinstance(operator, Operator)
    x, y = normal(2, *SHAPE), normal(2, *operator.measured_shape)
    y = operator.A(operator.A_adjoint(y)) + 0.1 * y
    a, adjoint, inverse = operator.A, operator.A_adjoint, operator.A_dagger
    assert a(x).shape == y.shape and adjoint(y).shape == inverse(y).shape == x.shape
    left, right = (a(x) * y).flatten(1).sum(1), (x * adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    kept = inverse(a(x))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(inverse(a(kept)), kept, **close)  # A^+ A is a projection
    torch.testing.assert_close(inverse(a(inverse(y))), inverse(y), **close)
    # its own transpose, both ways
    other = normal(2, *SHAPE).flip(1)
    torch.testing.assert_close((inverse(a(other)) * x).sum(), (other * kept).sum(), **close)
    if name != "blur of an odd kernel":  # which is truncated
        torch.testing.assert_close(a(kept), a(x), **close)
        fit = a(inverse(y))
        torch.testing.assert_close((fit * y).sum(), fit.square().sum(), **close)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_error_of_an_adjoint_is_rounding(name):
    assert adjoint_error(OPERATORS[name](), SHAPE) < 1e-6
    assert adjoint_error(OPERATORS[name](), SHAPE, torch.float64) < 1e-14


class Paired:
    """Two maps that may belong together."""

    def __init__(self, forward, back):
        self.A, self.A_adjoint = forward, back


def test_the_error_of_an_adjoint_is_the_share_that_is_wrong():
    blur = Blur(normal(3, 4), SHAPE)
    for share in (1e-3, 1e-1):
        off = adjoint_error(Paired(blur.A, lambda y, s=share: (1 + s) * blur.A_adjoint(y)), SHAPE)
        assert share / 3 < off < 3 * share
    assert adjoint_error(Paired(blur.A, blur.A), SHAPE) > 0.1
    assert adjoint_error(Paired(blur.A, torch.zeros_like), SHAPE) > 0.1
    mixed = Paired(blur.A, lambda y: blur.A_adjoint(y.flip(0)))
    assert adjoint_error(mixed, SHAPE) > 0.1
    with pytest.raises(ValueError, match=r"`operator.A_adjoint` of Paired gives \(2, 3, 12, 8\)"):
        adjoint_error(Paired(blur.A, lambda y: y.mT), SHAPE)


SINGULAR = [n for n, make in OPERATORS.items() if isinstance(make(), SingularOperator)]


@pytest.mark.parametrize("name", SINGULAR)
def test_functions_of_the_singular_values(name):
    operator, x = OPERATORS[name](), normal(2, *SHAPE)
    gram = operator.A_adjoint(operator.A(x))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(operator.filtered(x, torch.ones_like), x, **close)
    torch.testing.assert_close(operator.filtered(x, torch.square), gram, **close)
    measured = operator.filtered(x, lambda s: (s > operator.threshold).double())
    torch.testing.assert_close(operator.A_dagger(operator.A(x)), measured, **close)
    # V is orthogonal: the roots of a function, applied twice, are the function
    root = operator.filtered(x, lambda s: (1 + s).sqrt())
    torch.testing.assert_close(
        operator.filtered(root, lambda s: (1 + s).sqrt()),
        operator.filtered(x, lambda s: 1 + s),
        **close,
    )
    assert (operator.singular_values >= 0).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_the_largest_value_bounds_every_measurement(name):
    operator = OPERATORS[name]()
    x = normal(50, *SHAPE).sign()
    assert operator.A(x).abs().max() <= operator.largest + 1e-12


def test_boxes_are_means_and_bicubic_is_pillows():
    shape = (1, 16, 16)
    x = normal(1, *shape)
    mean = x.view(1, 1, 4, 4, 4, 4).mean(dim=(3, 5))
    torch.testing.assert_close(box_superresolution(shape, 4).A(x), mean, rtol=0, atol=1e-12)
    picture = Image.fromarray(x[0, 0].float().numpy())
    resized = np.asarray(picture.resize((4, 4), Image.Resampling.BICUBIC))
    ours = bicubic_superresolution(shape, 4).A(x)[0, 0]
    np.testing.assert_allclose(ours, resized, atol=1e-6)


def test_grey_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    grey = np.array(Image.fromarray(pixels).convert("L"))
    x = torch.from_numpy(pixels).movedim(-1, 0)[None].double()
    assert (grey_from_colour(SHAPE).A(x)[0, 0] - torch.from_numpy(grey)).abs().max() <= 1


def test_blur_is_circular_convolution():
    kernel, x = normal(3, 4), normal(1, *SHAPE)
    expected = torch.zeros_like(x)
    for i in range(3):
        for j in range(4):
            expected += kernel[i, j] * x.roll((i - 1, j - 2), (2, 3))
    torch.testing.assert_close(Blur(kernel, SHAPE).A(x), expected, rtol=0, atol=1e-12)


def test_rows_of_compressed_sensing_are_orthonormal():
    operator = CompressedSensing(SHAPE, 0.25, seed=3)
    y = normal(2, *operator.measured_shape)
    torch.testing.assert_close(operator.A(operator.A_adjoint(y)), y, rtol=0, atol=1e-12)
    assert operator.measured_shape == (72,)
    again = CompressedSensing(SHAPE, 0.25, seed=3)
    assert torch.equal(again.A(normal(1, *SHAPE)), operator.A(normal(1, *SHAPE)))
    other = CompressedSensing(SHAPE, 0.25, seed=4)
    assert not torch.allclose(other.A(normal(1, *SHAPE)), operator.A(normal(1, *SHAPE)))


def test_the_mask_hides_what_a_measurement_holds_elsewhere():
    operator = Inpainting(half(), SHAPE)
    y = operator.A(normal(1, *SHAPE))
    painted = torch.where(half() > 0, y, torch.inf)
    for method in (operator.A_adjoint, operator.A_dagger):
        assert torch.equal(method(painted), y)


@pytest.mark.parametrize("name", OPERATORS)
def test_float32_in_float32_out(name):
    operator, x = OPERATORS[name](), normal(2, *SHAPE)
    y = operator.A(x.float())
    assert y.dtype == operator.A_adjoint(y).dtype == operator.A_dagger(y).dtype == torch.float32
    torch.testing.assert_close(y.double(), operator.A(x), rtol=1e-5, atol=1e-4)


REFUSED = {
    "Inpainting(torch.rand(8, 12), SHAPE)": "`mask` has values in",
    "Inpainting(half() * 255, SHAPE)": "`mask` has values in [0, 255]; each must be 0 or 1",
    "Inpainting(half() * torch.nan, SHAPE)": "`mask` has values in",
    "Inpainting(half().numpy(), SHAPE)": "`mask` is ndarray; it must be a tensor",
    "Inpainting(half() + 0j, SHAPE)": "`mask` is torch.complex64",
    "Inpainting('half', SHAPE)": "`mask` is str",
    "Inpainting(torch.ones(12, 8), SHAPE)": "`mask` has shape (12, 8); it must be one of [(8, 12)",
    "Inpainting(torch.ones(2, 8, 12), SHAPE)": "`mask` has shape (2, 8, 12)",
    "Inpainting(half(), (3, 8))": "`image_shape` is (3, 8)",
    "Inpainting(half(), (0, 8, 12))": "`image_shape` is (0, 8, 12)",
    "Inpainting(half(), (3.0, 8, 12))": "`image_shape` is (3.0, 8, 12); it must be (C, H, W)",
    "Inpainting(half(), (True, 8, 12))": "`image_shape` is (True, 8, 12)",
    "Inpainting(half(), 3)": "`image_shape` is 3",
    "box_superresolution(SHAPE, 3)": "`factor` is 3; it must divide both sides of images of 8x12",
    "box_superresolution(SHAPE, 0)": "`factor` is 0; it must be an integer >= 1",
    "bicubic_superresolution(SHAPE, 2.0)": "`factor` is 2.0",
    "bicubic_superresolution(SHAPE, True)": "`factor` is True",
    "grey_from_colour((1, 8, 8))": "`image_shape` is (1, 8, 8); grey from colour needs 3 channels",
    "grey_from_colour(SHAPE, (1, 2))": "`weights` is (1, 2)",
    "grey_from_colour(SHAPE, (0, 0, 0))": "`weights` is (0, 0, 0)",
    "Separable(SHAPE, rows=normal(3, 9))": "`rows` has shape (3, 9); it must be (n, 8)",
    "Separable(SHAPE, rows=normal(3, 8) * torch.nan)": "`rows` holds values that are not finite",
    "Separable(SHAPE, rows=normal(3, 8), truncation=1)": "`truncation` is 1; it must lie in [0, 1)",
    "Blur(normal(9, 3), SHAPE)": "`kernel` has shape (9, 3); it must be (h, w), at most (8, 12)",
    "Blur(normal(3), SHAPE)": "`kernel` has shape (3,)",
    "Blur(torch.zeros(3, 3), SHAPE)": "`kernel` is 0 everywhere",
    "Blur('gauss', SHAPE)": "`kernel` is str",
    "Blur(normal(3, 3), SHAPE, truncation=-0.1)": "`truncation` is -0.1",
    "gaussian_kernel(0)": "`std` is 0; it must be a number > 0, at most 1000",
    "gaussian_kernel(1e9)": "`std` is 1000000000.0; it must be a number > 0, at most 1000",
    "gaussian_kernel(float('nan'))": "`std` is nan",
    "gaussian_kernel(1.0, 4)": "`size` is 4; it must be an odd integer",
    "CompressedSensing(SHAPE, 0)": "`ratio` is 0; it must lie in (0, 1]",
    "CompressedSensing(SHAPE, 1.5)": "`ratio` is 1.5",
    "CompressedSensing(SHAPE, 0.5, seed=-1)": "`seed` is -1",
    "Matrix(normal(5, 5), SHAPE)": "`matrix` has shape (5, 5); it must be (m, 288)",
    "Composition(SHAPE)": "`parts` is empty",
    "Composition(SHAPE, 3)": "`parts[0]` is int; it must have A, A_adjoint and A_dagger",
    "Composition(SHAPE, grey_from_colour(SHAPE), grey_from_colour(SHAPE))": "`parts[1]`",
    "box_superresolution(SHAPE, 4).A(normal(1, 3, 8, 8))": "`x` has shape (1, 3, 8, 8)",
    "box_superresolution(SHAPE, 4).A_adjoint(normal(1, 3, 8, 8))": "`y` has shape (1, 3, 8, 8); "
    "Separable takes (B, 3, 2, 3)",
    "Inpainting(half(), SHAPE).A(torch.zeros(1, 3, 8, 12).long())": "`x` is torch.int64",
    "Inpainting(half(), SHAPE).A_dagger(None)": "`y` is NoneType; it must be",
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_is_refused(call):
    with pytest.raises(ValueError) as caught:
        eval(call)
    assert REFUSED[call] in str(caught.value)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gmres_solves_each_sample_apart(symmetric):
    matrices = normal(4, 9, 9) + 3 * torch.eye(9)
    if symmetric:
        matrices = matrices @ matrices.transpose(1, 2)
    b = normal(4, 9)
    b[2] = 0

    def product(x, rows=slice(None)):
        return (matrices[rows] @ x[..., None])[..., 0]

    found = gmres(product, b, 1e-14, 50)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrices, b), rtol=1e-9, atol=1e-9)
    assert found.residual.max() < 1e-10 and found.residual[2] == 0 and found.weights.shape[1] <= 9
    alone = gmres(lambda x: product(x, [1]), b[1:2], 1e-14, 50)
    torch.testing.assert_close(alone.x, found.x[1:2], rtol=1e-12, atol=1e-12)


def test_gmres_of_a_singular_system():
    singular = torch.diag(torch.tensor([2.0, 3.0, 0.0, 0.0], dtype=torch.float64))
    b = torch.tensor([[4.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]).double()
    found = gmres(lambda x: x @ singular, b, 1e-12, 50)
    torch.testing.assert_close(found.x[0], torch.tensor([2.0, 1.0, 0.0, 0.0]).double())
    assert found.residual[0] < 1e-12 and found.residual[1] > 0.5 and found.residual[2] == 1
    assert found.x.isfinite().all()


def test_gmres_tells_when_it_was_stopped():
    matrix = torch.diag(torch.arange(1.0, 21.0).double())
    found = gmres(lambda x: x @ matrix, normal(2, 20), 1e-12, 3)
    assert (found.residual > 1e-3).all() and found.weights.shape == (2, 3)


def test_least_squares_of_each_sample():
    matrix, y = normal(6, 3) @ normal(3, 10), normal(4, 6)
    y[1] = 0
    found = least_squares(lambda x: x @ matrix.T, lambda r: r @ matrix, y)
    torch.testing.assert_close(found, y @ torch.linalg.pinv(matrix).T, rtol=1e-9, atol=1e-9)
