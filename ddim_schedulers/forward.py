"""Noise for training: x_t and v of given x_0 and noise."""

import torch

from .family_plan import FamilyPlanMixin
from .modes import outside_modes
from .step_inputs import check_pair, compute_dtype, holds_numbers, pick_rows


class FamilyForwardMixin(FamilyPlanMixin):
    """The forward process of a scheduler, q(x_t | x_0)."""

    # sqrt(abar_t) and sqrt(1 - abar_t) by device and dtype
    _forward: dict[tuple, torch.Tensor]

    def _forward_coefficients(
        self, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._follow()
        # as stock: training scripts index `alphas_cumprod` with timesteps of the device they train
        # on
        elsewhere = self._public["alphas_cumprod"].device != sample.device
        if elsewhere and not sample.is_meta and holds_numbers(sample):
            moved = self._public["alphas_cumprod"].to(device=sample.device)
            self._publish("alphas_cumprod", moved)
        key = (sample.device, compute_dtype(sample))
        if key not in self._forward:
            made = self._make_roots(key[1]).to(key[0])
            if torch.jit.is_tracing() or not holds_numbers(made):
                return self._picked(made, timesteps, sample.ndim)
            self._forward[key] = made
        return self._picked(self._forward[key], timesteps, sample.ndim)

    @outside_modes
    def _make_roots(self, dtype: torch.dtype) -> torch.Tensor:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), (T, 2)."""
        return torch.stack([self._alpha_bar.sqrt(), (1 - self._alpha_bar).sqrt()], dim=1).to(dtype)

    @staticmethod
    def _picked(
        roots: torch.Tensor, timesteps: torch.Tensor, ndim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        picked = pick_rows(roots, timesteps, "timesteps")
        shape = (-1,) + (1,) * (ndim - 1)
        return picked[:, 0].reshape(shape), picked[:, 1].reshape(shape)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, Eq. 4).

        Args:
            original_samples: x_0, (B, ...), any floating dtype; computed in float32 or better.
            noise: standard Gaussian, the same shape.
            timesteps: integers in 0 .. T - 1, shape (B,), (1,) or ().
        """
        check_pair(original_samples=original_samples, noise=noise)
        root, rest = self._forward_coefficients(original_samples, timesteps)
        dtype = torch.promote_types(original_samples.dtype, noise.dtype)
        return (root * original_samples + rest * noise).to(dtype)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (arXiv:2202.00512, App. D).

        Args:
            sample: x_0, (B, ...), any floating dtype; computed in float32 or better.
            noise: standard Gaussian, the same shape.
            timesteps: integers in 0 .. T - 1, shape (B,), (1,) or ().
        """
        check_pair(sample=sample, noise=noise)
        root, rest = self._forward_coefficients(sample, timesteps)
        return (root * noise - rest * sample).to(torch.promote_types(sample.dtype, noise.dtype))
