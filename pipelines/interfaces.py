"""What the pipelines use of a network and of a scheduler; both are diffusers' own objects."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Network(Protocol):
    """An unconditional denoiser, as `UNet2DModel`: (sample, timestep) -> output with `.sample`."""

    @property
    def config(self) -> Any:  # noqa: ANN401
        """Return the configuration."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor | int) -> Any:  # noqa: ANN401
        """Predict for sample (B, C, H, W) at timestep."""


class Scheduler(Protocol):
    """A diffusers scheduler on the variance-preserving grid."""

    config: Any
    timesteps: torch.Tensor
    alphas_cumprod: torch.Tensor

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """Plan the trajectory."""

    @property
    def step(self) -> Callable[..., Any]:
        """Take one step."""


class Bar(Protocol):
    """A progress bar, as tqdm's."""

    def update(self) -> object:
        """Count one step."""
