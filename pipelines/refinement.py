"""Encoding with fixed-point refinement: towards the exact inverse of DDIM's decoding steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from ddim_schedulers import GeneralizedDDIMInverseScheduler
from ddim_schedulers.pipelines.sampling import Levels

logger = logging.get_logger(__name__)

DEFAULT_TOLERANCE = 1e-4

Denoise = Callable[[torch.Tensor, torch.Tensor | int], torch.Tensor]


@dataclass(frozen=True)
class Encoding:
    """Latents, and how far each step is from the inverse of the decoding step.

    Attributes:
        latents: x_t at the end of the trajectory, (N, C, H, W), on the device of x_0.
        residual: float64 (S, N) on the CPU: root mean square change of x_t in the last refinement
            of each step; None without refinement. See `Refinement.refine`.
        converged: bool (N,) on the CPU: whether all residuals of an image are within the tolerance;
            None without refinement.
    """

    latents: torch.Tensor
    residual: torch.Tensor | None = None
    converged: torch.Tensor | None = None


def encode_and_refine(
    denoise: Denoise,
    x_0: torch.Tensor,
    scheduler: GeneralizedDDIMInverseScheduler,
    refinements: int = 0,
    tolerance: float = DEFAULT_TOLERANCE,
    *,
    mixing: int = 0,
    after_step: Callable[[], object] = lambda: None,
) -> Encoding:
    """Encode samples along a trajectory with any network call, each step refined.

    One step up from x_s to x_t takes one call, plain inversion (DDIM, Sec. 4.3), and one more for
    each refinement. An image that has not converged causes no error: read `converged`.

    Args:
        denoise: (x_t, t) -> the model output, of the scheduler's `prediction_type` and in the dtype
            of x_t; with guidance, ControlNet or whatever else the decoding uses. x_t is (N, C, H,
            W), t an integer or a tensor () of one. Channels after C, of a learned variance, are
            left out.
        x_0: (N, C, H, W), in the space of the network: latents for a latent network. x_t is kept
            in its dtype, in which the decoding keeps it; half precision is rounded at each step.
        scheduler: the inverse of the decoding scheduler, without clipping, and with its trajectory
            set by `set_timesteps`.
        refinements: fixed-point iterations of each step, >= 0; 0 is plain inversion.
        tolerance: see `Refinement`.
        mixing: see `Refinement`.
        after_step: called after each step.

    Raises:
        ValueError: for arguments out of range.
    """
    refinement = Refinement(denoise, scheduler, refinements, tolerance, mixing)
    x, rows = x_0, []
    for t, pair in zip(scheduler.timesteps, refinement.pairs, strict=True):
        model_output = denoise(x, t)[:, : x.shape[1]]
        x_t = scheduler.step(model_output, t, x, return_dict=False)[0]
        if refinements:
            x_t, residual = refinement.refine(x, x_t, *pair)
            rows.append(residual)
        x = x_t
        after_step()
    if not rows:
        return Encoding(x)
    found = torch.stack(rows).double().cpu()
    return Encoding(x, found, (found <= tolerance).all(dim=0))


class Refinement:
    """Iterates x_t <- (x_s - b eps(x_t, t)) / a after a step of plain inversion.

    With x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s) eps_hat (DDIM, Eq. 12 at sigma = 0) and x0_hat
    written with x_t and eps_hat, the iteration is x_t <- A x_s + B eps(x_t, t),

        A = sqrt(abar_t / abar_s)        B = sqrt(1 - abar_t) - A sqrt(1 - abar_s)

    It converges where |B| times the Lipschitz constant of eps(., t) is below 1, so for steps that
    are not too long. Each sample stops on its own when its change is within the tolerance.

    For v_prediction the same step is x_s = cos(phi) x_t - sin(phi) v, phi the angle between the two
    levels, and the iteration is in v: eps says little about v where alpha_bar_t is small, and
    nothing at 0, where every x_t is its own eps_hat.

    Args:
        denoise: the network call, see `encode_and_refine`.
        inverse: the encoding scheduler, with its trajectory set.
        refinements: iterations of each step, >= 0.
        tolerance: root mean square change at which a sample stops, > 0 (x_t has a standard
            deviation of about 1).
        mixing: how many earlier iterates Anderson's method combines with the last, >= 0; 0 is the
            plain iteration. See `AndersonMixing`.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        denoise: Denoise,
        inverse: GeneralizedDDIMInverseScheduler,
        refinements: int,
        tolerance: float,
        mixing: int = 0,
    ) -> None:
        for name, value in (("refinements", refinements), ("mixing", mixing)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 0.")
        is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
        if not is_number or not tolerance > 0:
            raise ValueError(f"`tolerance` is {tolerance!r}; it must be a number > 0.")
        self.denoise, self.refinements, self.tolerance = denoise, refinements, float(tolerance)
        self.mixing = mixing
        self.levels = Levels(inverse)
        self.pairs = inverse.planned_pairs()
        self.end = inverse.alpha_bar_end

    def refine(
        self, x_s: torch.Tensor, x_t: torch.Tensor, t: int, s: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refine x_t, a first guess of what decodes to x_s; both (B, C, H, W).

        Returns:
            the refined x_t, and a residual (B,), a root mean square over each sample. Of the plain
            iteration it is the last change, so the residual of the iterate before the one that is
            returned. With `mixing` it is that of the one that is returned, the best one found.
        """
        a, b, in_v = self._coefficients(t, s)

        wide = torch.promote_types(x_s.dtype, torch.float32)

        def change(x: torch.Tensor) -> torch.Tensor:
            m = self.denoise(x, t).to(wide)
            m = m[:, : x.shape[1]] if in_v else self.levels.eps(m, x.to(wide), t)
            return a * x_s.to(wide) + b * m - x

        if self.mixing:
            return self._mixed(x_t, change)
        residual = torch.full((len(x_t),), torch.inf, dtype=wide, device=x_t.device)
        for _ in range(self.refinements):
            difference = change(x_t)
            # ~(<=) rather than >: a NaN stays active, and is reported
            active = ~(residual <= self.tolerance)
            residual = torch.where(active, root_mean_square(difference), residual)
            moved = (x_t + difference).to(x_t.dtype)
            x_t = torch.where(active.view(-1, 1, 1, 1), moved, x_t)
            if bool((residual <= self.tolerance).all()):
                break
        return x_t, residual

    def _coefficients(self, t: int, s: int) -> tuple[float, float, bool]:
        """Return A and B of the iteration, and whether it is in v."""
        a_t, a_s = self.levels.at(t), self.end if s < 0 else self.levels.at(s)
        if self.levels.prediction_type == "v_prediction":
            cos = (a_s * a_t) ** 0.5 + ((1 - a_s) * (1 - a_t)) ** 0.5
            return 1 / cos, ((a_s * (1 - a_t)) ** 0.5 - (a_t * (1 - a_s)) ** 0.5) / cos, True
        a = (a_t / a_s) ** 0.5
        return a, (1 - a_t) ** 0.5 - a * (1 - a_s) ** 0.5, False

    def _mixed(
        self, x_t: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixing = AndersonMixing(self.mixing)
        best = x_t
        residual = torch.full((len(x_t),), torch.inf, device=x_t.device)
        for _ in range(self.refinements):
            difference = change(x_t)
            measured = root_mean_square(difference)
            better = ~(residual <= self.tolerance) & (measured < residual)
            residual = torch.where(better, measured, residual.to(measured))
            best = torch.where(better.view(-1, 1, 1, 1), x_t, best)
            if bool((residual <= self.tolerance).all()):
                break
            x_t = mixing.next(x_t, difference)
        return best, residual


class AndersonMixing:
    """Anderson's method for a fixed point x = g(x), for each sample of a batch on its own.

    With f = g(x) - x, the differences dX and dF of the last `memory` iterates, and gamma that
    minimizes |f - dF gamma|, the next iterate is x + f - (dX + dF) gamma (Walker and Ni 2011, SIAM
    J. Numer. Anal. 49(4), type II). It may converge where x + f does not.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        self._dx: list[torch.Tensor] = []
        self._df: list[torch.Tensor] = []

    def next(self, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """Return the iterate after x (B, ...), where g(x) - x is f (B, ...)."""
        if self._before is not None:
            for kept, now, before in zip((self._dx, self._df), (x, f), self._before, strict=True):
                kept.append((now - before).flatten(1).double())
                del kept[: -self.memory]
        self._before = x, f
        if not self._df:
            return x + f
        dx, df = torch.stack(self._dx, dim=2), torch.stack(self._df, dim=2)
        gram = df.mT @ df
        # what is kept may be as good as parallel: so little that it changes nothing else
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-300)
        ridge = 1e-10 * scale[:, None, None] * torch.eye(gram.shape[1]).to(gram)
        right = df.mT @ f.flatten(1).double()[..., None]
        gamma = torch.linalg.solve_ex(gram + ridge, right).result
        return (x + f - ((dx + df) @ gamma).view_as(f).to(f)).to(x.dtype)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each sample, (B,)."""
    return x.square().flatten(1).mean(dim=1).sqrt()


def network_calls(steps: int, refinements: int) -> int:
    """Return the largest number of network calls that an image may have taken."""
    return steps * (1 + refinements)


def warn_of_residual(residual: torch.Tensor, refinements: int, tolerance: float) -> bool:
    """Return whether everything converged, and warn if not.

    Args:
        residual: (S, N).
        refinements: that were allowed.
        tolerance: that was asked for.
    """
    late = ~(residual <= tolerance)
    if not bool(late.any()):
        return True
    worst = float(residual.nan_to_num(nan=torch.inf).max())
    images = late.any(dim=0).nonzero().flatten().tolist()
    named = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
    logger.warning(
        f"Refinement has not converged: after {refinements} iteration(s) "
        f"{int(late.sum())} of {late.numel()} steps (of {len(images)} of {late.shape[1]} images: "
        f"{named}, counted from 0) still change by more than tolerance={tolerance:g}, the worst by "
        f"{worst:.3g}. Use more refinements or more inference steps, or read `residual`."
    )
    return False
