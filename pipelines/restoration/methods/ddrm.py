"""DDRM: each singular direction has its own noise (arXiv:2201.11793)."""

from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Prediction
from ddim_schedulers.pipelines.restoration.methods.method import (
    Draw,
    Method,
    Problem,
    need_singular_values,
)
from ddim_schedulers.pipelines.restoration.operators import Operator, SingularOperator
from ddim_schedulers.pipelines.restoration.plan import Step


@dataclass(frozen=True)
class Ddrm(Method):
    """The variational family of DDRM, Eq. 7 and 8.

    In the direction of a singular value s, y / s is x_0 with noise of standard deviation
    noise_std / s. Where x_s is noisier than that, it starts from y / s; where it is cleaner, the
    measurement's error takes the place of eps_hat; what was not measured is the family.

    Args:
        eta_b: share of y / s in the mean, in [0, 1].

    Raises:
        ValueError: for an `eta_b` out of range.
    """

    eta_b: float = 1.0
    name = "ddrm"

    def __post_init__(self) -> None:
        if (
            isinstance(self.eta_b, bool)
            or not isinstance(self.eta_b, int | float)
            or not 0 <= self.eta_b <= 1
        ):
            raise ValueError(f"`eta_b` is {self.eta_b!r}; it must lie in [0, 1].")

    def check(self, operator: Operator, noise_std: float, steps: list[Step]) -> None:
        """Refuse operators without singular values."""
        need_singular_values("ddrm", operator, "")

    def start(self, problem: Problem, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """Return x_T around what was measured (Eq. 7)."""
        operator = problem.operator
        assert isinstance(operator, SingularOperator)

        def std(s: torch.Tensor) -> torch.Tensor:
            error = alpha_bar * (problem.noise_std * operator.inverse_of(s)) ** 2
            free = 1 - alpha_bar - error
            # where y / s is noisier than x_T would be, it says nothing
            return torch.where(free >= 0, free, 1 - alpha_bar).sqrt()

        mean = operator.filtered(
            problem.inverse, lambda s: _is_used(operator, problem, s, alpha_bar).double()
        )
        return alpha_bar**0.5 * mean + operator.filtered(noise, std)

    def transition(
        self, problem: Problem, step: Step, prediction: Prediction, draw: Draw
    ) -> torch.Tensor:
        """Return x_s (Eq. 8)."""
        return spectral_transition(problem, step, prediction, self.eta_b, draw)


def _is_used(
    operator: SingularOperator, problem: Problem, s: torch.Tensor, alpha_bar: float
) -> torch.Tensor:
    """Tell where s was measured, and y / s has no more noise than x at `alpha_bar`."""
    error = alpha_bar * (problem.noise_std * operator.inverse_of(s)) ** 2
    return (s > operator.threshold) & (error <= 1 - alpha_bar)


def spectral_transition(
    problem: Problem, step: Step, prediction: Prediction, eta_b: float, draw: Draw
) -> torch.Tensor:
    """Return x_s of DDRM, Eq. 8, multiplied by sqrt(alpha_bar_s): theirs is variance-exploding.

    With e = noise_std / s, and sigma that of the member (the paper's is eta sqrt(1 - abar_s)):

        s = 0:                     sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps + sigma z
        abar_s e^2 <= 1 - abar_s:  sqrt(abar_s) (x0 + eta_b (y / s - x0))
                                   + sqrt(1 - abar_s - abar_s eta_b^2 e^2) z
        else:                      sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) (y / s - x0) / e
                                   + sigma z
    """
    operator, x0 = problem.operator, prediction.x0
    assert isinstance(operator, SingularOperator)
    a_s, std = step.alpha_bar_s, problem.noise_std

    def measured(s: torch.Tensor) -> torch.Tensor:
        error = torch.where(s > 0, std / torch.where(s > 0, s, 1.0), 1.0)
        weak = step.eps / torch.where(error > 0, error, 1.0)
        used = _is_used(operator, problem, s, a_s)
        return torch.where(s > operator.threshold, torch.where(used, step.x0 * eta_b, weak), 0.0)

    def noise(s: torch.Tensor) -> torch.Tensor:
        error = a_s * (eta_b * std * operator.inverse_of(s)) ** 2
        fresh = (1 - a_s - error).clamp(min=0).sqrt()
        return torch.where(_is_used(operator, problem, s, a_s), fresh, step.sigma)

    kept = operator.filtered(x0, lambda s: (s > operator.threshold).double())
    x_s = step.x0 * x0 + operator.filtered(problem.inverse - kept, measured)
    if step.eps:
        unmeasured = operator.filtered(prediction.eps, lambda s: (s <= operator.threshold).double())
        x_s = x_s + step.eps * unmeasured
    if a_s < 1:
        x_s = x_s + operator.filtered(draw(), noise)
    return x_s
