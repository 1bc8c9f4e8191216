"""The network as a restoration sees it: x0_hat and eps_hat, their Jacobian, and what they cost."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ddim_schedulers.parameterization import clip, dynamic_threshold
from ddim_schedulers.pipelines.interfaces import Network, Scheduler
from ddim_schedulers.pipelines.sampling import Levels, predict

# v -> J^T v with J the Jacobian of x0_hat by x_t, both (B, C, H, W): one backward pass.
Pullback = Callable[[torch.Tensor], torch.Tensor]


class Prediction(NamedTuple):
    """Predictions at x_t: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, unless x0 was clipped.

    Attributes:
        x0: x0_hat, (B, C, H, W).
        eps: eps_hat, (B, C, H, W).
        shift: what a method adds to x_s after the transition, None for nothing.
    """

    x0: torch.Tensor
    eps: torch.Tensor
    shift: torch.Tensor | None = None


class Denoiser:
    """Predictions of a network, clipped as the scheduler's config says.

    Args:
        network: (x_t, t) -> output with `.sample`; guided ones are, too.
        scheduler: says what the output means and how x0_hat is clipped.
        batch_size: of the largest batch, for a compiled network; see `predict`.

    Attributes:
        network_calls: forward passes of a batch so far.
        backward_passes: of a batch so far.
        solver_residual: largest relative residual of the linear systems that a method solved with
            the Jacobian so far, (); 0 where there were none.
    """

    def __init__(self, network: Network, scheduler: Scheduler, batch_size: int = 0) -> None:
        self.network, self.config, self.batch_size = network, scheduler.config, batch_size
        self.levels = Levels(scheduler)
        self.network_calls = self.backward_passes = 0
        self.solver_residual = torch.zeros(())

    def __call__(self, x_t: torch.Tensor, t: int) -> Prediction:
        """Return the prediction for x_t (B, C, H, W) at timestep t."""
        output = self._output(x_t, t)
        x0 = self.limit(self.levels.x0(output, x_t, t))
        return Prediction(x0, self.levels.eps(output, x_t, t))

    def with_pullback(self, x_t: torch.Tensor, t: int) -> tuple[Prediction, Pullback]:
        """Return the prediction, and the transposed Jacobian of x0_hat before it is clipped."""
        # the pipeline may be called under inference_mode, whose tensors cannot be differentiated
        with torch.inference_mode(False), torch.enable_grad():
            at = x_t.detach().clone().requires_grad_()
            output = self._output(at, t)
            x0 = self.levels.x0(output, at, t)

        def pullback(v: torch.Tensor) -> torch.Tensor:
            self.backward_passes += 1
            with torch.inference_mode(False):
                return torch.autograd.grad(x0, at, v.clone(), retain_graph=True)[0]

        eps = self.levels.eps(output.detach(), x_t, t)
        return Prediction(self.limit(x0.detach()), eps), pullback

    def limit(self, x0: torch.Tensor) -> torch.Tensor:
        """Return x0_hat clipped or thresholded, as the scheduler's config says."""
        config = self.config
        if config.get("thresholding"):
            ratio = config.get("dynamic_thresholding_ratio", 0.995)
            return dynamic_threshold(x0, ratio, config.get("sample_max_value", 1.0))
        if config.get("clip_sample"):
            return clip(x0, config.get("clip_sample_range", 1.0))
        return x0

    def _output(self, x_t: torch.Tensor, t: int) -> torch.Tensor:
        self.network_calls += 1
        return predict(self.network, x_t, t, self.batch_size)
