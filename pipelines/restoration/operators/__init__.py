"""Linear measurements y = A x of images, and what a method asks of them."""

from ddim_schedulers.pipelines.restoration.operators.blur import Blur, gaussian_kernel
from ddim_schedulers.pipelines.restoration.operators.composition import Composition
from ddim_schedulers.pipelines.restoration.operators.inpainting import Inpainting
from ddim_schedulers.pipelines.restoration.operators.matrix import Matrix
from ddim_schedulers.pipelines.restoration.operators.operator import (
    LinearOperator,
    Operator,
    SingularOperator,
    adjoint_error,
)
from ddim_schedulers.pipelines.restoration.operators.sensing import CompressedSensing
from ddim_schedulers.pipelines.restoration.operators.separable import (
    Separable,
    bicubic_superresolution,
    box_superresolution,
    grey_from_colour,
)

__all__ = [
    "Blur",
    "Composition",
    "CompressedSensing",
    "Inpainting",
    "LinearOperator",
    "Matrix",
    "Operator",
    "Separable",
    "SingularOperator",
    "adjoint_error",
    "bicubic_superresolution",
    "box_superresolution",
    "gaussian_kernel",
    "grey_from_colour",
]
