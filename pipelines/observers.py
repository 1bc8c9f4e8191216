"""Observers of the sampling loop: the path of the samples, and how much the clipping cuts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging

from ddim_schedulers.pipelines.sampling import Levels, Step

logger = logging.get_logger(__name__)

CLIP_MARGIN = 0.1
CLIP_WARN_SHARE = 0.05
CLIP_WARN_SHARE_GREY = 0.25
CLIP_WINDOW = (0.2, 0.8)


@dataclass
class SamplingPath:
    """The way of every sample from x_T to x_0.

    Attributes:
        timesteps: tau, S timesteps in the order of sampling.
        x_t: (S + 1, N, C, H, W) on the CPU, model space: x_t at `timesteps`, then the result.
        x0: (S, N, C, H, W) on the CPU, model space: x0_hat at `timesteps`, as the scheduler used
            it, or unclipped for schedulers that do not tell.
    """

    timesteps: list[int]
    x_t: torch.Tensor
    x0: torch.Tensor


class PathRecorder:
    """Copies x_t and x0_hat of each step to the CPU. This waits for the device at every step."""

    def __init__(self, timesteps: list[int], num_images: int, x: torch.Tensor) -> None:
        shape = (num_images, *x.shape[1:])
        self.path = SamplingPath(
            timesteps,
            torch.empty((len(timesteps) + 1, *shape), dtype=x.dtype),
            torch.empty((len(timesteps), *shape), dtype=x.dtype),
        )

    def record(self, start: int, step: Step, levels: Levels) -> None:
        """Store a step of the images from `start` on."""
        rows = slice(start, start + len(step.x_t))
        x0 = step.x0
        if x0 is None:
            x0 = levels.x0(step.model_output, step.x_t, self.path.timesteps[step.index])
        self.path.x_t[step.index, rows] = step.x_t.cpu()
        self.path.x0[step.index, rows] = x0.cpu()
        self.path.x_t[step.index + 1, rows] = step.x_s.cpu()


@dataclass
class ClipCounter:
    """Share of the predicted values that clipping cuts by a real amount, in mid-sampling.

    Touching the bound is normal: a good model of images with black backgrounds leaves [-1, 1] in a
    fifth of its values, by a hundredth. At high noise every x0_hat overshoots, and near the end the
    earlier clipping has bent the sample into the bounds. So a value counts when |x0_hat| before
    clipping exceeds `clip_sample_range` by more than 10 %, in steps with 0.2 <= alpha_bar_t <= 0.8.
    There a good pixel model stays at 0, while data with unit variance, as latents, lose about a
    tenth of their values. More than 5 % is warned about; with one channel, which is a picture and
    no latent, 25 %: a network that was trained little clips a tenth there, as it should. The count
    stays on the device and is read once, at the end.
    """

    config: Any
    levels: Levels
    count: torch.Tensor | None = field(default=None, init=False)
    values: int = field(default=0, init=False)

    def record(self, step: Step, t: int) -> None:
        """Count the values of a step at t, if the scheduler clips and t is in the window."""
        clips = self.config.get("clip_sample") and not self.config.get("thresholding")
        if not clips or not CLIP_WINDOW[0] <= self.levels.at(t) <= CLIP_WINDOW[1]:
            return
        bound = (1 + CLIP_MARGIN) * self.config.get("clip_sample_range", 1.0)
        cut = (self.levels.x0(step.model_output, step.x_t, t).abs() > bound).sum()
        self.count = cut if self.count is None else self.count + cut
        self.values += step.x_t.numel()

    def share(self) -> float | None:
        """Return the share, None if nothing was counted."""
        return None if self.count is None else int(self.count) / self.values


def warn_of_clipping(share: float | None, config: Any, channels: int) -> None:  # noqa: ANN401
    """Warn when the share of `ClipCounter` is large for images of so many channels."""
    limit = CLIP_WARN_SHARE_GREY if channels == 1 else CLIP_WARN_SHARE
    if share is not None and share > limit:
        logger.warning(
            f"Clipping cut {share:.1%} of the predicted values by more than {CLIP_MARGIN:.0%} "
            f"of clip_sample_range={config.get('clip_sample_range', 1.0)} in "
            "mid-sampling. A network that was trained little does that; where the data are "
            "latents, or unbounded otherwise, set clip_sample=False in the scheduler's config."
        )
