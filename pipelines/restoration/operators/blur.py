"""Blur by any kernel, with periodic borders."""

import math

import torch

from ddim_schedulers.pipelines.restoration.operators.operator import (
    ImageShape,
    SingularOperator,
    real_tensor,
)

# Frequencies that the blur weakens below this share drown in any noise (the authors of DDNM, too).
DEFAULT_TRUNCATION = 0.03
LARGEST_STD = 1000  # pixels; the kernel has six of them a side


class Blur(SingularOperator):
    """y = k * x, circular convolution of each channel; the kernel's centre is at (h // 2, w // 2).

    The Fourier transform diagonalises A: its singular values are |K| of each frequency. Noise in
    the image is noise of the same size in every frequency, for the transform is orthogonal.

    Args:
        kernel: (h, w), no larger than the image, of any sum and sign, not all 0.
        image_shape: (C, H, W) of the images.
        truncation: frequencies with |K| up to this share of the largest are not inverted by A^+.

    Raises:
        ValueError: for a kernel of another shape, or values that are not finite.
    """

    def __init__(
        self,
        kernel: torch.Tensor,
        image_shape: ImageShape,
        truncation: float = DEFAULT_TRUNCATION,
    ) -> None:
        super().__init__(image_shape, truncation)
        values = real_tensor(kernel, "kernel", "a matrix of numbers")
        _, height, width = self.image_shape
        if values.ndim != 2 or values.shape[0] > height or values.shape[1] > width:
            raise ValueError(
                f"`kernel` has shape {tuple(values.shape)}; it must be (h, w), at most "
                f"({height}, {width})."
            )
        if not bool(values.any()):
            raise ValueError("`kernel` is 0 everywhere; a blur must let something through.")
        padded = torch.zeros(height, width, dtype=torch.float64, device="cpu")
        padded[: values.shape[0], : values.shape[1]] = values
        shifts = (-(values.shape[0] // 2), -(values.shape[1] // 2))
        centred = padded.roll(shifts, (0, 1))
        self._largest = float(values.abs().sum())
        self._response = torch.fft.rfft2(centred)
        self._adjoint = self._response.conj().resolve_conj()
        self._values = self._response.abs()

    @property
    def measured_shape(self) -> tuple[int, ...]:
        """Return (C, H, W)."""
        return self.image_shape

    @property
    def largest(self) -> float:
        """Return the sum of the kernel's absolute values."""
        return self._largest

    @property
    def singular_values(self) -> torch.Tensor:
        """Return |K|, (H, W // 2 + 1): half of the frequencies, the others are the same."""
        return self._values

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return self._in_frequencies(x, self._constant("_response", x))

    def _transpose(self, y: torch.Tensor) -> torch.Tensor:
        return self._in_frequencies(y, self._constant("_adjoint", y))

    def _filter(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._in_frequencies(x, weights.to(x.dtype).to(x.device))

    def _in_frequencies(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * factors, s=x.shape[-2:])


def gaussian_kernel(std: float, size: int | None = None) -> torch.Tensor:
    """Return a Gaussian kernel of sum 1, float64 (size, size).

    Args:
        std: standard deviation in pixels, > 0 and at most `LARGEST_STD`.
        size: odd; None takes what reaches three standard deviations to each side.

    Raises:
        ValueError: for a std out of range, or a size that is not odd and >= 1.
    """
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std <= LARGEST_STD:
        raise ValueError(f"`std` is {std!r}; it must be a number > 0, at most {LARGEST_STD}.")
    size = 2 * math.ceil(3 * std) + 1 if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"`size` is {size!r}; it must be an odd integer >= 1.")
    at = torch.arange(size, dtype=torch.float64, device="cpu") - size // 2
    line = torch.exp(-0.5 * (at / std) ** 2)
    line = line / line.sum()
    return line[:, None] * line
