"""How an image of one size becomes one of another: `DataConfig.fit`, as geometry and on tensors."""

import numpy as np
import torch
import torch.nn.functional as F

from ddim_schedulers.pipelines.image_files import Fit


def fit_image(
    image: torch.Tensor, size: tuple[int, int], how: str, crop: np.ndarray | None = None
) -> torch.Tensor:
    """Return an image (C, H, W) at `size`: padded, cut or resized, as `DataConfig.fit` says.

    Padding takes a batch (B, C, H, W) too.
    """
    height, width = image.shape[-2:]
    if (height, width) == size or how == "exact":
        return image
    if how == "pad":
        below, right = size[0] - height, size[1] - width
        pad = (right // 2, right - right // 2, below // 2, below - below // 2)
        return F.pad(image, pad, value=-1.0)
    fit = Fit(size, how)
    if fit.resizes:
        image = _resize(image, fit.resized((height, width)))
    top, left = fit.corner((image.shape[-2], image.shape[-1]), crop)
    return image[:, top : top + size[0], left : left + size[1]]


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    # Cubic interpolation overshoots; the clamp is to the range that the data have.
    resized = F.interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(-1, 1)


def check_fit(have: tuple[int, int], want: tuple[int, int], how: str, name: str) -> None:
    """Raise `ValueError` if an image of size `have` cannot become `want` in the way `how`."""
    small = have[0] < want[0] or have[1] < want[1]
    large = have[0] > want[0] or have[1] > want[1]
    if how == "exact" and have != want:
        raise ValueError(
            f"`fit` is 'exact', but {name} is {have[0]}x{have[1]}, and `image_size` is {want[0]}; "
            "set `fit` to pad, crop, resize_crop or squash"
        )
    if (how == "pad" and large) or (how == "crop" and small):
        raise ValueError(
            f"`fit` is {how!r}, which cannot make {name}, {have[0]}x{have[1]}, into {want[0]}; it "
            "must be resize_crop or squash"
        )
