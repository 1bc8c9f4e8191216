"""DPS: a step down the gradient of the residual's norm (arXiv:2209.14687)."""

import math
from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser, Prediction
from ddim_schedulers.pipelines.restoration.methods.method import Method, Problem
from ddim_schedulers.pipelines.restoration.plan import Step


@dataclass(frozen=True)
class Dps(Method):
    """x_s <- x_s - zeta / |y - A x0_hat| grad_{x_t} |y - A x0_hat|^2 (Alg. 1, Eq. 16 and App. C).

    x0_hat and eps_hat stay the network's own. The result agrees with the measurement only as far as
    the last steps carry it. One backward pass a step.

    Args:
        zeta: the paper's zeta', > 0. (The authors' program leaves out the 2 of the square: its
            scale is twice our zeta.)

    Raises:
        ValueError: for a `zeta` that is not finite and > 0.
    """

    zeta: float = 1.0
    name = "dps"

    def __post_init__(self) -> None:
        zeta = self.zeta
        if isinstance(zeta, bool) or not isinstance(zeta, int | float) or not 0 < zeta < math.inf:
            raise ValueError(f"`zeta` is {zeta!r}; it must be a finite number > 0.")

    def uses_adjoint(self, noise_std: float) -> bool:
        """Tell that it does."""
        return True

    def predict(
        self, problem: Problem, denoiser: Denoiser, x_t: torch.Tensor, step: Step
    ) -> Prediction:
        """Return the network's own prediction, and the gradient's step."""
        (x0, eps, _), pullback = denoiser.with_pullback(x_t, step.timestep)
        residual = problem.residual(x0)
        norm = residual.flatten(1).norm(dim=1)
        # grad |r|^2 = -2 J^T A^T r; where nothing is left to correct there is no direction
        scale = torch.where(norm > 0, 2 * self.zeta / torch.where(norm > 0, norm, 1.0), 0.0)
        pushed = pullback(problem.operator.A_adjoint(residual))
        return Prediction(x0, eps, scale.view(-1, 1, 1, 1) * pushed)
