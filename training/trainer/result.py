"""What a run leaves, and how it fails."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from ddim_schedulers import MarkovianDDPMScheduler


class NonFiniteError(RuntimeError):
    """A step whose loss or gradient was not finite. It was not applied."""


@dataclass
class TrainingResult:
    """What a run leaves.

    Attributes:
        output_dir: folder of the run.
        pipeline_dir: the diffusers pipeline, with the weights that `weights` names; None if the run
            was stopped before its end.
        unet: the network with those weights, on the training device, in evaluation mode.
        scheduler: the process it was trained for.
        weights: 'ema' or 'raw'.
        steps: optimiser steps done, in all sessions.
        losses: loss of every step of this session, over the global batch.
        final_loss: mean of the last (at most 100) of them; NaN if there were none.
        seconds: time of this session's steps.
        stopped_by: signal that ended the session early, 'stop_after', or None.
        skipped_steps: steps of this session that were not finite and not applied.
        replaced_images: broken images of this session for which a neighbour was used.
        left_out: names of images whose header could not be read, and which were not used at all.
        evaluations: what validation found, oldest first.
    """

    output_dir: Path
    pipeline_dir: Path | None
    unet: UNet2DModel
    scheduler: MarkovianDDPMScheduler
    weights: str
    steps: int
    losses: list[float]
    final_loss: float
    seconds: float
    stopped_by: str | None = None
    skipped_steps: int = 0
    replaced_images: int = 0
    left_out: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> str:
        """Return two or three lines for the terminal."""
        lines = [f"{self.steps} steps, {self.seconds:.1f} s, loss {self.final_loss:.4f}"]
        if not self.losses:
            lines = [
                f"the run was complete: all {self.steps} steps were done before, and none in this "
                "session; a larger max_train_steps goes on"
            ]
        if self.skipped_steps:
            lines.append(f"{self.skipped_steps} steps were not finite and were not applied")
        if self.replaced_images:
            lines.append(f"{self.replaced_images} broken images were replaced by their neighbours")
        if self.left_out:
            lines.append(describe_left_out(self.left_out))
        if self.stopped_by:
            lines.append(
                f"stopped by {self.stopped_by}; continue with --resume latest, or look at it with "
                f"`ddim-schedulers sample --pipeline {self.output_dir} ...`"
            )
        if self.pipeline_dir:
            lines.append(f"pipeline with the {self.weights} weights: {self.pipeline_dir}")
        return "\n".join(lines)


def describe_left_out(names: list[str]) -> str:
    """Tell how many images were left out as unreadable, and the names of the first."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"images that cannot be read and are left out: {len(names)} ({shown})"
