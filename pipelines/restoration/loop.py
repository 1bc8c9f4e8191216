"""The loop that every method of restoration shares."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser
from ddim_schedulers.pipelines.restoration.methods import Method, Problem
from ddim_schedulers.pipelines.restoration.methods.method import Draw
from ddim_schedulers.pipelines.restoration.plan import Step


def restore(
    method: Method,
    problem: Problem,
    denoiser: Denoiser,
    x_t: torch.Tensor,
    steps: Sequence[Step],
    draw: Draw,
    after_step: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Return x_0, (B, C, H, W): the last x0_hat of the method, not clamped.

    Args:
        method: what is done with the measurement.
        problem: the measurement.
        denoiser: the network.
        x_t: x_T, the method's `start`.
        steps: the plan.
        draw: gives standard normal noise (B, C, H, W).
        after_step: called after each step forward.
    """
    levels = [step.alpha_bar_t for step in steps] + [steps[-1].alpha_bar_s]
    way = method.positions(len(steps))
    for here, there in pairwise(way):
        if there < here:
            # q(x_t | x_s), the forward process of DDPM, Eq. 2, over one planned step
            ratio = levels[there] / levels[here]
            x_t = ratio**0.5 * x_t + (1 - ratio) ** 0.5 * draw()
            continue
        prediction = method.predict(problem, denoiser, x_t, steps[here])
        x_t = method.transition(problem, steps[here], prediction, draw)
        if after_step is not None:
            after_step()
    return x_t
