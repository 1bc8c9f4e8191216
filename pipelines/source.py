"""Sampling from a picture (SDEdit, arXiv:2108.01073): noise is added and removed again."""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch

from ddim_schedulers.pipelines.images import ImageInput
from ddim_schedulers.process import q_sample


@dataclass(frozen=True)
class Source:
    """The pictures that sampling starts from, and how far back it goes.

    Attributes:
        x_0: (1, C, H, W) for all images, or (N, C, H, W), in the space of the network; on the CPU.
        strength: share of the steps that are run, in (0, 1].
    """

    x_0: torch.Tensor
    strength: float

    @property
    def count(self) -> int | None:
        """Return for how many images pictures are; None for one that serves all."""
        return None if len(self.x_0) == 1 else len(self.x_0)

    def x_t(self, start: int, stop: int, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """Return the samples of the images start .. stop - 1 at a noise level.

        Args:
            start: number of the first image.
            stop: number after that of the last.
            noise: (stop - start, C, H, W), on the device of the result.
            alpha_bar: of the level.
        """
        rows = self.x_0 if self.count is None else self.x_0[start:stop]
        return q_sample(rows.to(noise).expand_as(noise), noise, alpha_bar)


def make_source(
    image: ImageInput | None,
    strength: float | None,
    x0_of: Callable[[ImageInput], torch.Tensor],
    **others: object,
) -> Source | None:
    """Return the source of a call, None without one.

    Args:
        image: see `to_model_space`.
        strength: in (0, 1].
        x0_of: encodes pictures as samples of the network, see `UnconditionalPipeline.x0_of`.
        **others: arguments that also say where sampling starts; None where not given.

    Raises:
        ValueError: for an image that does not fit, a strength out of range, one of the two without
            the other, or another start beside them.
    """
    check_strength(image, strength)
    if image is None:
        return None
    if both := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"`image` and `{both[0]}` are both given; pass one of the two.")
    assert strength is not None
    return Source(x0_of(image), float(strength))


def check_strength(image: Any, strength: float | None) -> None:  # noqa: ANN401
    """Check a strength, and that it goes with an image.

    Raises:
        ValueError: naming what is wrong.
    """
    if image is None and strength is None:
        return
    if image is None:
        raise ValueError(
            f"`strength` is {strength!r} without `image`; it must be None, or give the image."
        )
    if not isinstance(strength, int | float) or isinstance(strength, bool) or not 0 < strength <= 1:
        raise ValueError(
            f"`strength` is {strength!r} with `image`; it must be a number with 0 < strength <= 1, "
            "the share of the steps that are run."
        )


def steps_of(strength: float, timesteps: Sized) -> int:
    """Return how many steps are run: the last int(S strength) of S, as in diffusers.

    Args:
        strength: in (0, 1].
        timesteps: the trajectory, S timesteps.

    Raises:
        ValueError: if it is none.
    """
    steps = min(int(len(timesteps) * strength), len(timesteps))
    if steps < 1:
        raise ValueError(
            f"`strength` is {strength!r}, which leaves none of {len(timesteps)} steps; it must be "
            f"at least {1 / len(timesteps):g}, or use more steps."
        )
    return steps
