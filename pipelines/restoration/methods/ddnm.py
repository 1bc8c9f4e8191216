"""DDNM: the part of x0_hat that was measured is replaced (arXiv:2212.00490)."""

from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser, Prediction
from ddim_schedulers.pipelines.restoration.methods.ddrm import spectral_transition
from ddim_schedulers.pipelines.restoration.methods.method import (
    Draw,
    Method,
    Problem,
    family,
    need_singular_values,
)
from ddim_schedulers.pipelines.restoration.operators import Operator
from ddim_schedulers.pipelines.restoration.plan import Step


@dataclass(frozen=True)
class Ddnm(Method):
    """x0_hat <- A^+ y + (I - A^+ A) x0_hat (Eq. 10); eps_hat stays the network's own.

    x0_hat is clipped first and projected last, so that A x = A A^+ y holds for the result.

    With noise in the measurement it is the authors' DDNM+, in the basis of the singular vectors
    (Sec. 3.3 and its program): x0_hat <- x0_hat + Lambda A^+ (y - A x0_hat), where Lambda and the
    noise that is added are such that x_s has noise of variance 1 - alpha_bar_s, that of y included.
    That is the transition of DDRM with eta_b = 1.
    """

    name = "ddnm"

    def check(self, operator: Operator, noise_std: float, steps: list[Step]) -> None:
        """Refuse noise where the singular values are not known."""
        if noise_std:
            need_singular_values("ddnm", operator, f" with `noise_std` {noise_std:g}")

    def predict(
        self, problem: Problem, denoiser: Denoiser, x_t: torch.Tensor, step: Step
    ) -> Prediction:
        """Return the projected x0_hat, and the network's eps_hat."""
        x0, eps, _ = denoiser(x_t, step.timestep)
        if not problem.noise_std:
            operator = problem.operator
            x0 = problem.inverse + (x0 - operator.A_dagger(operator.A(x0)))
        return Prediction(x0, eps)

    def transition(
        self, problem: Problem, step: Step, prediction: Prediction, draw: Draw
    ) -> torch.Tensor:
        """Return x_s."""
        if not problem.noise_std:
            return family(step, prediction, draw)
        return spectral_transition(problem, step, prediction, 1.0, draw)
