"""Inpainting: some pixels are known."""

import torch

from ddim_schedulers.pipelines.restoration.operators.operator import (
    ImageShape,
    SingularOperator,
    check_image_shape,
)


class Inpainting(SingularOperator):
    """y = m x for a mask m of zeros and ones; y has the shape of the image, and 0 where m is 0.

    What a measurement holds where the mask is 0 is not looked at; the pipeline wants finite numbers
    there, too. A is a projection: A = A^T = A^+, and its singular values are those of the mask.

    Args:
        mask: 1 (or True) where the image is known, bool or numbers, (H, W), (1, H, W) or (C, H, W).
        image_shape: (C, H, W) of the images.

    Raises:
        ValueError: for a mask of another type, shape or with values between.
    """

    def __init__(self, mask: torch.Tensor, image_shape: ImageShape) -> None:
        super().__init__(image_shape, 0.0)
        if not isinstance(mask, torch.Tensor) or mask.is_complex():
            kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"`mask` is {kind}; it must be a tensor of bool, or of zeros and ones."
            )
        channels, height, width = check_image_shape(image_shape)
        allowed = [*dict.fromkeys([(height, width), *((c, height, width) for c in (1, channels))])]
        if tuple(mask.shape) not in allowed:
            raise ValueError(f"`mask` has shape {tuple(mask.shape)}; it must be one of {allowed}.")
        values = mask.detach().cpu().double()
        if not bool(((values == 0) | (values == 1)).all()):
            raise ValueError(
                f"`mask` has values in [{float(values.min()):g}, {float(values.max()):g}]; each "
                "must be 0 or 1 (True where the image is known)."
            )
        self.mask = values.expand(self.image_shape).contiguous()

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """Return (C, H, W)."""
        return self.image_shape

    @property
    def largest(self) -> float:
        """Return 1."""
        return 1.0

    @property
    def singular_values(self) -> torch.Tensor:
        """Return the mask, (C, H, W)."""
        return self.mask

    def seen(self, y: torch.Tensor) -> torch.Tensor:
        """Return y with zeros where the mask is 0."""
        return self.A(y)

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        # not by a product: outside of the mask a measurement may hold anything
        return torch.where(self._constant("mask", x) > 0, x, 0.0)

    def _transpose(self, y: torch.Tensor) -> torch.Tensor:
        return self._measure(y)

    def _invert(self, y: torch.Tensor) -> torch.Tensor:
        return self._measure(y)

    def _filter(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x * weights.to(x.dtype).to(x.device)
