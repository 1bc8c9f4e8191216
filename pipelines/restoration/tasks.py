"""Tasks of restoration by name: the operator, what one would do without a model, and how y looks.

inpaint      some pixels are known: `half` (the left half), `centre` (all but a square in the
             middle), `random` (every pixel with probability 1/2), or a mask
superresN    pixels N times as large in both directions: `box` or `bicubic`
colorize     the grey value of every pixel
deblur       a Gaussian blur with periodic borders
sense        random numbers that each see the whole image
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddim_schedulers.pipelines.fingerprints import fingerprint_of
from ddim_schedulers.pipelines.noise import MAX_SEED
from ddim_schedulers.pipelines.restoration.operators import (
    Blur,
    CompressedSensing,
    Inpainting,
    SingularOperator,
    bicubic_superresolution,
    box_superresolution,
    gaussian_kernel,
    grey_from_colour,
)
from ddim_schedulers.pipelines.restoration.operators.blur import DEFAULT_TRUNCATION
from ddim_schedulers.pipelines.restoration.operators.operator import ImageShape

MASKS = ("half", "centre", "random")
KERNELS = {"box": box_superresolution, "bicubic": bicubic_superresolution}
# The options of each task, with their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "inpaint": {"mask": "half", "operator_seed": 0},
    "superresN": {"kernel": "box"},
    "colorize": {},
    "deblur": {"blur_std": 1.5, "truncation": DEFAULT_TRUNCATION},
    "sense": {"ratio": 0.25, "operator_seed": 0},
}

Picture = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A measurement that people know by name.

    Attributes:
        name: of the task.
        operator: A.
        settings: all that A depends on beside the image's shape, as JSON types.
        plain: measurements to images (N, C, H, W) without a model: the mean in the hole, bicubic
            interpolation, grey, the blurred image, A^+ y.
        shown: measurements to pictures (N, C, H, W) of what was measured.
    """

    name: str
    operator: SingularOperator
    settings: dict[str, Any]
    plain: Picture
    shown: Picture


def task_named(name: str, image_shape: ImageShape, **options: Any) -> Task:
    """Return a task.

    Args:
        name: `inpaint`, `superresN` with a number N, `colorize`, `deblur` or `sense`.
        image_shape: (C, H, W) of the images.
        **options: of the task, see `OPTIONS`: `mask` (a name of `MASKS`, or a tensor as
            `Inpainting` takes it), `kernel` (`box`, `bicubic`), `blur_std` in pixels, `truncation`,
            `ratio`, `operator_seed`.

    Raises:
        ValueError: for an unknown name, an option of another task, or what the operator refuses.
    """
    found = re.fullmatch(r"superres([1-9]\d{0,3})", name) if isinstance(name, str) else None
    kind = "superresN" if found else name
    if kind not in OPTIONS or name == "superresN":
        raise ValueError(
            f"`task` is {name!r}; it must be one of {tuple(OPTIONS)} with a number for N."
        )
    for option in options:
        if option not in OPTIONS[kind]:
            own = ", ".join(OPTIONS[kind]) or "no options"
            raise ValueError(
                f"`{option}` does not belong to the task {name!r}; allowed are: {own}."
            )
    given = {**OPTIONS[kind], **options}
    seed = given.get("operator_seed", 0)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"`operator_seed` is {seed!r}; it must be an integer in 0 .. 2**63 - 1.")
    if kind == "inpaint":
        return _inpaint(image_shape, **given)
    if found:
        return _superres(name, image_shape, int(found[1]), **given)
    if kind == "colorize":
        return _colorize(image_shape)
    if kind == "deblur":
        blur = Blur(gaussian_kernel(given["blur_std"]), image_shape, given["truncation"])
        return Task(name, blur, given, _same, _same)
    sensing = CompressedSensing(image_shape, given["ratio"], given["operator_seed"])
    return Task(name, sensing, given, sensing.A_dagger, sensing.A_dagger)


def mask_named(name: str, image_shape: ImageShape, seed: int = 0) -> torch.Tensor:
    """Return a mask (H, W), bool, True where the image is known.

    Raises:
        ValueError: for an unknown name.
    """
    _, height, width = image_shape
    if name == "half":
        return (torch.arange(width) < width // 2).expand(height, width)
    if name == "centre":
        down, across = (
            (torch.arange(side) >= side // 4) & (torch.arange(side) < side - side // 4)
            for side in (height, width)
        )
        return ~(down[:, None] & across)
    if name == "random":
        source = torch.Generator("cpu").manual_seed(seed)
        return torch.rand(height, width, generator=source) < 0.5
    raise ValueError(f"`mask` is {name!r}; it must be one of {MASKS}, or a mask.")


def _inpaint(image_shape: ImageShape, mask: Any, operator_seed: int) -> Task:  # noqa: ANN401
    by_name = isinstance(mask, str)
    operator = Inpainting(
        mask_named(mask, image_shape, operator_seed) if by_name else mask, image_shape
    )
    said = mask if by_name else fingerprint_of({"mask": operator.mask})

    def plain(y: torch.Tensor) -> torch.Tensor:
        known = operator.mask.to(y.dtype).to(y.device)
        count = known.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        mean = (y * known).sum(dim=(2, 3), keepdim=True) / count
        return torch.where(known > 0, y, mean)

    return Task(
        "inpaint", operator, {"mask": said, "operator_seed": operator_seed}, plain, operator.seen
    )


def _superres(name: str, image_shape: ImageShape, factor: int, kernel: str) -> Task:
    if kernel not in KERNELS:
        raise ValueError(f"`kernel` is {kernel!r}; it must be one of {tuple(KERNELS)}.")
    operator = KERNELS[kernel](image_shape, factor)

    def plain(y: torch.Tensor) -> torch.Tensor:
        size = image_shape[1:]
        return torch.nn.functional.interpolate(y, size, mode="bicubic", align_corners=False)

    def shown(y: torch.Tensor) -> torch.Tensor:
        return y.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)

    return Task(name, operator, {"kernel": kernel}, plain, shown)


def _colorize(image_shape: ImageShape) -> Task:
    def grey(y: torch.Tensor) -> torch.Tensor:
        return y.expand(-1, 3, -1, -1)

    return Task("colorize", grey_from_colour(image_shape), {}, grey, grey)


def _same(y: torch.Tensor) -> torch.Tensor:
    return y
