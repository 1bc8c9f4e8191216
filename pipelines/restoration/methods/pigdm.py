"""PiGDM: guidance by the pseudo-inverse (Song et al., ICLR 2023)."""

from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser, Prediction
from ddim_schedulers.pipelines.restoration.methods.method import Method, Problem
from ddim_schedulers.pipelines.restoration.operators import SingularOperator
from ddim_schedulers.pipelines.restoration.plan import Step
from ddim_schedulers.pipelines.restoration.solvers import default_tolerance, gmres

# Products with A alone cost no network call.
_MAX_PRODUCTS = 1000


@dataclass(frozen=True)
class Pigdm(Method):
    """The score of y under x_0 | x_t ~ N(x0_hat, r^2 I), r^2 = 1 - alpha_bar_t (Eq. 7 and 8).

        g = J^T A^T (r^2 A A^T + noise_std^2 I)^-1 (y - A x0_hat)        J = d x0_hat / d x_t
        x0_hat <- x0_hat + sqrt(alpha_bar_t) r^2 g

    and eps_hat stays the network's own, as in the authors' program. The weight is not the (1 -
    alpha_bar_t) / sqrt(alpha_bar_t) of Tweedie's formula: where the pixels of the data belong
    together r^2 is far too small, and that weight overshoots. Without noise r^2 A^T (r^2 A A^T)^-1
    is A^+. One backward pass a step.
    """

    name = "pigdm"

    def uses_adjoint(self, noise_std: float) -> bool:
        """Tell that it does where there is noise."""
        return noise_std > 0

    def predict(
        self, problem: Problem, denoiser: Denoiser, x_t: torch.Tensor, step: Step
    ) -> Prediction:
        """Return the guided x0_hat, and the network's eps_hat."""
        (x0, eps, _), pullback = denoiser.with_pullback(x_t, step.timestep)
        a = step.alpha_bar_t
        pushed = pullback(_weighted(problem, problem.residual(x0), 1 - a))
        return Prediction(x0 + a**0.5 * pushed, eps)


def _weighted(problem: Problem, residual: torch.Tensor, variance: float) -> torch.Tensor:
    """Return variance A^T (variance A A^T + noise_std^2 I)^-1 residual, (B, C, H, W)."""
    operator, noise = problem.operator, problem.noise_std**2
    if not noise:
        return operator.A_dagger(residual)
    if isinstance(operator, SingularOperator):
        back = operator.A_adjoint(residual)
        return operator.filtered(back, lambda s: variance / (variance * s.square() + noise))

    def product(u: torch.Tensor) -> torch.Tensor:
        return variance * operator.A(operator.A_adjoint(u)) + noise * u

    found = gmres(product, residual, default_tolerance(residual.dtype), _MAX_PRODUCTS)
    return variance * operator.A_adjoint(found.x)
