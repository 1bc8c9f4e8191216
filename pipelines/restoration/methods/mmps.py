"""MMPS: guidance with the covariance that the network knows (arXiv:2405.13712)."""

from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser, Prediction
from ddim_schedulers.pipelines.restoration.methods.method import (
    Method,
    Problem,
    check_signal,
    rederived,
)
from ddim_schedulers.pipelines.restoration.operators import Operator
from ddim_schedulers.pipelines.restoration.plan import Step
from ddim_schedulers.pipelines.restoration.solvers import default_tolerance, gmres


@dataclass(frozen=True)
class Mmps(Method):
    """The score of y under x_0 | x_t ~ N(x0_hat, V), V = (1 - abar_t) / sqrt(abar_t) J^T (Eq. 15).

        x0_hat <- x0_hat + V A^T (A V A^T + noise_std^2 I)^-1 (y - A x0_hat)

    with J = d x0_hat / d x_t, which for an exact network is symmetric; eps_hat is re-derived. On
    Gaussian data it is the posterior mean of x_0 given x_t and y. The system is solved by GMRES to
    convergence, with a backward pass for each product.

    Args:
        tolerance: relative residual at which the solution of a sample is done, > 0; None takes
            that of rounding in float64, and 1e-3 in float32, where a network's own error is larger.
        max_iterations: backward passes of a step at most, >= 1. `solver_residual` of the output
            tells how far they came, and a warning where that is not far.

    Raises:
        ValueError: for arguments out of range.
    """

    tolerance: float | None = None
    max_iterations: int = 50
    name = "mmps"

    def __post_init__(self) -> None:
        limit = self.tolerance
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1
        ):
            raise ValueError(f"`tolerance` is {limit!r}; it must be None or lie in (0, 1).")
        most = self.max_iterations
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"`max_iterations` is {most!r}; it must be an integer >= 1.")

    def check(self, operator: Operator, noise_std: float, steps: list[Step]) -> None:
        """Refuse levels without signal."""
        check_signal("mmps", steps)

    def uses_adjoint(self, noise_std: float) -> bool:
        """Tell that it does."""
        return True

    def predict(
        self, problem: Problem, denoiser: Denoiser, x_t: torch.Tensor, step: Step
    ) -> Prediction:
        """Return the guided x0_hat, and the eps_hat that belongs to it."""
        (x0, _, _), pullback = denoiser.with_pullback(x_t, step.timestep)
        a, operator, noise = step.alpha_bar_t, problem.operator, problem.noise_std**2
        scale = (1 - a) / a**0.5

        images = []  # V A^T u of each vector u that the solver tries: x0_hat moves in their span

        def product(u: torch.Tensor) -> torch.Tensor:
            images.append(scale * pullback(operator.A_adjoint(u)))
            return operator.A(images[-1]) + noise * u

        residual = problem.residual(x0)
        tolerance = self.tolerance
        if tolerance is None:
            exact = residual.dtype == torch.float64
            tolerance = default_tolerance(residual.dtype) if exact else 1e-3
        found = gmres(product, residual, tolerance, self.max_iterations)
        # read once, at the end of the run
        worst = denoiser.solver_residual.to(found.residual)
        denoiser.solver_residual = torch.maximum(worst, found.residual.max())
        for weight, image in zip(found.weights.unbind(1), images, strict=True):
            x0 = x0 + weight.view(-1, 1, 1, 1) * image
        return rederived(x0, x_t, step)
