"""What a method may change of sampling: the start, the prediction, the transition, the order.

The base changes nothing: it is the family itself, and so is every method for an operator that
measures nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Denoiser, Prediction
from ddim_schedulers.pipelines.restoration.operators import Operator, SingularOperator
from ddim_schedulers.pipelines.restoration.plan import Step

Draw = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """y = A x_0 + noise_std n for one batch.

    Attributes:
        operator: A.
        y: the measurements, (B, ...).
        noise_std: >= 0, in the units of y.
        inverse: A^+ y, (B, C, H, W).
    """

    operator: Operator
    y: torch.Tensor
    noise_std: float
    inverse: torch.Tensor

    def residual(self, x0: torch.Tensor) -> torch.Tensor:
        """Return y - A x_0, (B, ...)."""
        return self.y - self.operator.A(x0)


@dataclass(frozen=True)
class Method:
    """The family, without a measurement."""

    name = "none"

    def check(self, operator: Operator, noise_std: float, steps: list[Step]) -> None:
        """Refuse what the method cannot do, before the first network call.

        Raises:
            ValueError: naming the argument.
        """

    def uses_adjoint(self, noise_std: float) -> bool:
        """Tell whether the method calls `A_adjoint` of an operator."""
        return False

    def start(self, problem: Problem, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """Return x_T (B, C, H, W) at `alpha_bar`, made of standard normal noise."""
        return noise

    def predict(
        self, problem: Problem, denoiser: Denoiser, x_t: torch.Tensor, step: Step
    ) -> Prediction:
        """Return x0_hat and eps_hat, given the measurement."""
        return denoiser(x_t, step.timestep)

    def transition(
        self, problem: Problem, step: Step, prediction: Prediction, draw: Draw
    ) -> torch.Tensor:
        """Return x_s; `draw` gives standard normal noise (B, C, H, W)."""
        return family(step, prediction, draw)

    def positions(self, steps: int) -> list[int]:
        """Return where the trajectory goes: 0 is x_T, `steps` the image; back by one is allowed."""
        return list(range(steps + 1))

    def calls(self, steps: int) -> int:
        """Return how many steps forward there are, each of them one network call."""
        return sum(there > here for here, there in pairwise(self.positions(steps)))

    def settings(self) -> dict[str, float | int | str | None]:
        """Return the method's name and arguments, as JSON types."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


def family(step: Step, prediction: Prediction, draw: Draw) -> torch.Tensor:
    """Return x_s of the family (DDIM, Eq. 12), and what the method adds to it."""
    x_s = step.x0 * prediction.x0
    if step.eps:
        x_s = x_s + step.eps * prediction.eps
    if step.sigma:
        x_s = x_s + step.sigma * draw()
    return x_s if prediction.shift is None else x_s + prediction.shift


def rederived(x0: torch.Tensor, x_t: torch.Tensor, step: Step) -> Prediction:
    """Return x0_hat with the eps_hat that belongs to it, (x_t - sqrt(abar_t) x0_hat) / ..."""
    a = step.alpha_bar_t
    return Prediction(x0, (x_t - a**0.5 * x0) / (1 - a) ** 0.5)


def need_singular_values(name: str, operator: Operator, why: str) -> SingularOperator:
    """Return the operator if its singular values are known.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(operator, SingularOperator):
        return operator
    raise ValueError(
        f"`operator` is {type(operator).__name__}, whose singular values are not known; `method` "
        f"{name!r} needs them{why}. Inpainting, Separable, Blur, CompressedSensing and Matrix have "
        "them; for others use 'mmps', 'pigdm' or 'dps'."
    )


def check_signal(name: str, steps: list[Step]) -> None:
    """Refuse a level without signal, where 1 / sqrt(alpha_bar_t) does not exist.

    Raises:
        ValueError: naming the timestep.
    """
    for step in steps:
        if step.alpha_bar_t == 0:
            raise ValueError(
                f"`timesteps` holds t={step.timestep} with alpha_bar = 0, by whose root "
                f"`method` {name!r} divides; leave it out."
            )
