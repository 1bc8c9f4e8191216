"""PiGDM: guidance by the pseudo-inverse (Song et al., ICLR 2023)."""

from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser, Prediction
from ddim_schedulers.pipelines.restoration.methods.method import (
    Method,
    Problem,
    check_signal,
    rederived,
)
from ddim_schedulers.pipelines.restoration.operators import Operator, SingularOperator
from ddim_schedulers.pipelines.restoration.plan import Step
from ddim_schedulers.pipelines.restoration.solvers import default_tolerance, gmres

# Products with A alone cost no network call.
_MAX_PRODUCTS = 1000


@dataclass(frozen=True)
class Pigdm(Method):
    """The score of y under x_0 | x_t ~ N(x0_hat, r^2 I), r^2 = 1 - alpha_bar_t (Eq. 7).

        g = J^T A^T (r^2 A A^T + noise_std^2 I)^-1 (y - A x0_hat)        J = d x0_hat / d x_t
        x0_hat <- x0_hat + (1 - alpha_bar_t) / sqrt(alpha_bar_t) g

    and eps_hat is re-derived: both are what Tweedie's formula makes of the score of x_t given y.
    Without noise A^T (A A^T)^-1 is A^+. One backward pass a step. (The paper's own Alg. 1 adds
    sqrt(alpha_bar_t) r^2 g to x_s instead, whatever the step.)
    """

    name = "pigdm"

    def check(self, operator: Operator, noise_std: float, steps: list[Step]) -> None:
        """Refuse levels without signal."""
        check_signal("pigdm", steps)

    def predict(
        self, problem: Problem, denoiser: Denoiser, x_t: torch.Tensor, step: Step
    ) -> Prediction:
        """Return the guided x0_hat, and the eps_hat that belongs to it."""
        (x0, _, _), pullback = denoiser.with_pullback(x_t, step.timestep)
        a = step.alpha_bar_t
        pushed = pullback(_weighted(problem, problem.residual(x0), 1 - a))
        return rederived(x0 + (1 - a) / a**0.5 * pushed, x_t, step)


def _weighted(problem: Problem, residual: torch.Tensor, variance: float) -> torch.Tensor:
    """Return A^T (variance A A^T + noise_std^2 I)^-1 residual, (B, C, H, W)."""
    operator, noise = problem.operator, problem.noise_std**2
    if not noise:
        return operator.A_dagger(residual) / variance
    if isinstance(operator, SingularOperator):
        back = operator.A_adjoint(residual)
        return operator.filtered(back, lambda s: 1 / (variance * s.square() + noise))

    def product(u: torch.Tensor) -> torch.Tensor:
        return variance * operator.A(operator.A_adjoint(u)) + noise * u

    found = gmres(product, residual, default_tolerance(residual.dtype), _MAX_PRODUCTS)
    return operator.A_adjoint(found.x)
