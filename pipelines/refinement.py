"""Fixed-point refinement of an encoding step: towards the exact inverse of the decoding step."""

from collections.abc import Callable

import torch
from diffusers.utils import logging

from ddim_schedulers import GeneralizedDDIMInverseScheduler
from ddim_schedulers.pipelines.interfaces import Network
from ddim_schedulers.pipelines.sampling import AfterStep, Levels, Step, predict

logger = logging.get_logger(__name__)


class Refinement:
    """Iterates x_t <- (x_s - b eps(x_t, t)) / a after each step of plain inversion.

    With x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s) eps_hat (DDIM, Eq. 12 at sigma = 0) and x0_hat
    written with x_t and eps_hat, the iteration is x_t <- A x_s + B eps(x_t, t),

        A = sqrt(abar_t / abar_s)        B = sqrt(1 - abar_t) - A sqrt(1 - abar_s)

    It converges where |B| times the Lipschitz constant of eps(., t) is below 1, so for steps that
    are not too long. Each sample stops on its own when its change is within the tolerance.

    For v_prediction the same step is x_s = cos(phi) x_t - sin(phi) v, phi the angle between the two
    levels, and the iteration is in v: eps says little about v where alpha_bar_t is small, and
    nothing at 0, where every x_t is its own eps_hat.

    Args:
        network: the denoiser; a caller may replace `refinement.network` between two chunks.
        inverse: the encoding scheduler, with its trajectory set.
        refinements: iterations of each step, >= 0.
        tolerance: root mean square change at which a sample stops, > 0.
        batch_size: of the largest batch, for a compiled network; see `predict`.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        network: Network,
        inverse: GeneralizedDDIMInverseScheduler,
        refinements: int,
        tolerance: float,
        batch_size: int = 0,
    ) -> None:
        if isinstance(refinements, bool) or not isinstance(refinements, int) or refinements < 0:
            raise ValueError(f"`refinements` is {refinements!r}; it must be an integer >= 0.")
        if not isinstance(tolerance, int | float) or not tolerance > 0:
            raise ValueError(f"`tolerance` is {tolerance!r}; it must be a number > 0.")
        self.network, self.refinements, self.tolerance = network, refinements, float(tolerance)
        self.batch_size = batch_size
        self.levels = Levels(inverse)
        self.pairs = inverse.planned_pairs()
        self.end = inverse.alpha_bar_end
        self._chunks: list[list[torch.Tensor]] = []

    def following(self, then: Callable[[], object]) -> AfterStep:
        """Return what to do after each step of a chunk: refine it, then call `then`."""
        rows: list[torch.Tensor] = []
        self._chunks.append(rows)

        def after(step: Step) -> None:
            if self.refinements:
                step.x_s, residual = self.refine(step.x_t, step.x_s, *self.pairs[step.index])
                rows.append(residual)
            then()

        return after

    def refine(
        self, x_s: torch.Tensor, x_t: torch.Tensor, t: int, s: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refine x_t, a first guess of what decodes to x_s; both (B, C, H, W).

        Returns:
            the refined x_t, and the root mean square change of each sample's last iteration, (B,).
        """
        a_t, a_s = self.levels.at(t), self.end if s < 0 else self.levels.at(s)
        in_v = self.levels.prediction_type == "v_prediction"
        if in_v:
            cos = (a_s * a_t) ** 0.5 + ((1 - a_s) * (1 - a_t)) ** 0.5
            a, b = 1 / cos, ((a_s * (1 - a_t)) ** 0.5 - (a_t * (1 - a_s)) ** 0.5) / cos
        else:
            a = (a_t / a_s) ** 0.5
            b = (1 - a_t) ** 0.5 - a * (1 - a_s) ** 0.5
        residual = torch.full((len(x_t),), torch.inf, dtype=x_t.dtype, device=x_t.device)
        for _ in range(self.refinements):
            m = predict(self.network, x_t, t, self.batch_size)
            m = m[:, : x_t.shape[1]] if in_v else self.levels.eps(m, x_t, t)
            change = a * x_s + b * m - x_t
            # ~(<=) rather than >: a NaN stays active, and is reported
            active = ~(residual <= self.tolerance)
            measured = change.square().flatten(1).mean(dim=1).sqrt()
            residual = torch.where(active, measured, residual)
            x_t = torch.where(active.view(-1, 1, 1, 1), x_t + change, x_t)
            if bool((residual <= self.tolerance).all()):
                break
        return x_t, residual

    def residual(self) -> torch.Tensor | None:
        """Return the residuals of all steps and images, float64 (S, N) on the CPU."""
        if not self.refinements:
            return None
        return torch.cat([torch.stack(rows) for rows in self._chunks], dim=1).double().cpu()

    def calls(self, steps: int) -> int:
        """Return the largest number of network calls that an image may have taken."""
        return steps * (1 + self.refinements)

    def report(self, residual: torch.Tensor) -> bool:
        """Return whether everything converged, and warn if not."""
        late = ~(residual <= self.tolerance)
        if not bool(late.any()):
            return True
        worst = float(residual.nan_to_num(nan=torch.inf).max())
        logger.warning(
            f"Refinement has not converged: after {self.refinements} iteration(s) "
            f"{int(late.sum())} of {late.numel()} steps (of {int(late.any(dim=0).sum())} of "
            f"{late.shape[1]} images) still change by more than tolerance={self.tolerance:g}, the "
            f"worst by {worst:.3g}. Use more refinements or more inference steps, or read "
            "`residual`."
        )
        return False
