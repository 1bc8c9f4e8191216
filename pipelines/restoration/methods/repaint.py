"""RePaint: what is known is put in at every level, and steps are taken again (arXiv:2201.09865)."""

from dataclasses import dataclass

import torch

from ddim_schedulers.pipelines.restoration.denoiser import Prediction
from ddim_schedulers.pipelines.restoration.methods.method import Draw, Method, Problem, family
from ddim_schedulers.pipelines.restoration.operators import Operator
from ddim_schedulers.pipelines.restoration.plan import Step


@dataclass(frozen=True)
class RePaint(Method):
    """x_s = P (sqrt(abar_s) A^+ y + sqrt(1 - abar_s) z) + (I - P) x_s', P = A^+ A (Eq. 8).

    x_s' is the family's step. Then the trajectory goes back in time, by the forward process, and
    comes again, so that the two parts grow together (Sec. 4.2 and the authors' schedule). For a
    mask P is the mask; other operators put in their row space.

    Args:
        resamplings: r, how often each stretch is gone through, >= 1.
        jump_length: j, planned steps of a return, >= 1.

    Raises:
        ValueError: for arguments out of range.
    """

    resamplings: int = 5
    jump_length: int = 1
    name = "repaint"

    def __post_init__(self) -> None:
        for name in ("resamplings", "jump_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 1.")

    def check(self, operator: Operator, noise_std: float, steps: list[Step]) -> None:
        """Refuse noise, and returns that are longer than the trajectory."""
        if noise_std:
            raise ValueError(
                f"`noise_std` is {noise_std:g}; `method` 'repaint' takes the measurement as exact: "
                "use 'ddnm', 'ddrm', 'mmps' or 'pigdm' for a noisy one."
            )
        if self.resamplings > 1 and self.jump_length >= len(steps):
            raise ValueError(
                f"`jump_length` is {self.jump_length}; it must be below the number of steps, "
                f"{len(steps)}, or nothing is taken again."
            )

    def transition(
        self, problem: Problem, step: Step, prediction: Prediction, draw: Draw
    ) -> torch.Tensor:
        """Return x_s, what is known put in."""
        operator, x_s = problem.operator, family(step, prediction, draw)
        free = x_s - operator.A_dagger(operator.A(x_s))
        known = step.x0 * problem.inverse
        if step.alpha_bar_s < 1:
            z = operator.A_dagger(operator.A(draw()))
            known = known + (1 - step.alpha_bar_s) ** 0.5 * z
        return known + free

    def positions(self, steps: int) -> list[int]:
        """Return the way with its returns; after the last step there is none."""
        left = dict.fromkeys(range(0, steps - self.jump_length, self.jump_length), 0)
        left = {at: self.resamplings - 1 for at in left}
        way, position = [0], 0
        while position < steps:
            position += 1
            way.append(position)
            below = steps - position - 1  # the paper's t, of which 0 is the last before the image
            if left.get(below, 0) > 0:
                left[below] -= 1
                for _ in range(self.jump_length):
                    position -= 1
                    way.append(position)
        return way
