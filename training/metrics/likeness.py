"""How like its truth an image is: PSNR and SSIM, torchmetrics', one value for each image."""

from typing import cast

import torch


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (N,); infinite for equal ones.

    Args:
        images: (N, C, H, W) in [0, 1].
        truth: (N, C, H, W) in [0, 1].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        images.double(), truth.double(), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor | None:
    """Return the structural similarity of each image, (N,), with a Gaussian window of 11 pixels.

    None for images with a side below 11, which are smaller than the window.

    Args:
        images: (N, C, H, W) in [0, 1].
        truth: (N, C, H, W) in [0, 1].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images.shape[-2:]) < 11:
        return None
    found = structural_similarity_index_measure(
        images.double(), truth.double(), data_range=1.0, reduction="none"
    )
    return cast(torch.Tensor, found).view(-1)
