"""`AnnealedLangevinPipeline`: the score-model (NCSN) view of the same network.

A denoiser knows the score of every noise level, grad log q(x_t) = -eps_hat / sqrt(1 - abar_t)
(DDPM, Sec. 3.2), so the same weights can be sampled by Langevin dynamics: at a fixed level

    x <- x + epsilon score(x) + sqrt(2 epsilon) z          z ~ N(0, I)

has q(x_t) as its stationary distribution, up to the size of epsilon. Annealing walks the levels
down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.base import (
    DEFAULT_BATCH_SIZE,
    UnconditionalPipeline,
    check_batch_size,
    chunks,
)
from ddim_schedulers.pipelines.conditions import BoundConditions, Conditions
from ddim_schedulers.pipelines.interfaces import Bar, Network, Scheduler
from ddim_schedulers.pipelines.labels import count_of
from ddim_schedulers.pipelines.noise import Generators, draw, make_noise
from ddim_schedulers.pipelines.sampling import (
    Levels,
    Step,
    alpha_bar_table,
    denoise,
    plan,
    predict,
    step_arguments,
)

STEP_RULES = ("sample", "expected")

# These settings give pictures; docs/pipelines.md shows others. With a predictor, which brings a
# sample near its level, few small corrections suffice. Without it they also follow the levels.
DEFAULT_LEVELS = 100
DEFAULT_CORRECTOR = {"inner_steps": 15, "snr": 0.16}
DEFAULT_WITH_PREDICTOR = {"inner_steps": 2, "snr": 0.1}


@dataclass
class LangevinOutput(BaseOutput):
    """What Langevin sampling returns.

    Attributes:
        images: N images in the output type.
        seeds: the seed of each image, None if the caller's generators drew the noise.
        network_calls: calls of the network for each image.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    seeds: list[int] | None
    network_calls: int


@dataclass(frozen=True)
class Corrector:
    """Langevin steps at one noise level, with the signal-to-noise rule of arXiv:2011.13456, Alg. 5.

    The step is epsilon = 2 alpha_t (snr |z| / |score|)^2 with alpha_t = 1 - beta_t. The paper's
    code averages both norms over the batch; here an image must not depend on its batch, so there
    are two other rules: `sample` takes the norms of each sample apart, and `expected` takes their
    expectations, |z|^2 = d and |score|^2 = d / (1 - abar_t), so that epsilon = 2 alpha_t snr^2 (1 -
    abar_t) is the same for all. In many dimensions the rules agree; in few, only `expected` leaves
    q(x_t) stationary, for a step that depends on the score it multiplies does not.
    """

    levels: Levels
    network: Network
    inner_steps: int
    snr: float
    rule: str

    def __call__(self, x: torch.Tensor, t: int, generator: Generators) -> torch.Tensor:
        """Return x (B, C, H, W) after `inner_steps` Langevin steps at level t."""
        a_t = self.levels.at(t)
        alpha = a_t / self.levels.at(t - 1)
        for _ in range(self.inner_steps):
            score = self.levels.score(predict(self.network, x, t), x, t)
            z = draw(tuple(x.shape), generator, x.device, x.dtype)
            if self.rule == "expected":
                size = 2 * alpha * self.snr**2 * (1 - a_t)
                x = x + size * score + (2 * size) ** 0.5 * z
            else:
                ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
                sizes = (2 * alpha * (self.snr * ratio).square()).view(-1, 1, 1, 1)
                x = x + sizes * score + (2 * sizes).sqrt() * z
        return x


class AnnealedLangevinPipeline(UnconditionalPipeline):
    """Samples by annealed Langevin dynamics, or by a predictor with Langevin corrections."""

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        *,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        inner_steps: int | None = None,
        snr: float | None = None,
        step_rule: str = "sample",
        predictor: bool = False,
        eta: float | None = None,
        final_denoising: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **conditions: Any,
    ) -> LangevinOutput:
        """Generate images.

        Without a predictor (arXiv:1907.05600, Alg. 1): `inner_steps` Langevin steps at each level
        of tau, and between the levels x_t / sqrt(abar_t), the NCSN variable, is kept. With it
        (arXiv:2011.13456, Alg. 1): one step of the scheduler to the next level, then `inner_steps`
        corrections there; the last step, to x_0, is not corrected.

        Args:
            num_images: as in generation.
            seeds: one for each image, as in generation.
            generator: as in generation.
            latents: x_T instead of drawn noise.
            batch_size: images in one network call.
            num_inference_steps: number of levels, on the scheduler's grid. Without a predictor
                neighbouring levels must overlap: more levels, or more inner steps at each. None:
                with a predictor as in generation, without one `geometric_timesteps(scheduler,
                100)`; a trajectory that the scheduler's config keeps goes first.
            timesteps: explicit levels instead, strictly decreasing.
            inner_steps: Langevin steps at each level, >= 1 (>= 0 with a predictor); None: 15, with
                a predictor 2.
            snr: signal-to-noise ratio of a step, > 0; None: 0.16, with a predictor 0.1.
            step_rule: `sample` or `expected`; see `Corrector`.
            predictor: alternate with steps of the scheduler.
            eta: of the predictor, as in generation.
            final_denoising: without a predictor, end on x0_hat of the last level (one call more)
                rather than on its noisy sample.
            output_type: pil, np, pt or latent.
            return_dict: False returns the tuple `(images,)`.
            **conditions: `class_labels`, `guidance_scale` and so on, as in generation; see
                `Conditions`. With w not 1 the score is that of the guided field, which at a fixed
                level is a density, but not that of the noisy data.

        Raises:
            TypeError: for an argument that does not exist.
            ValueError: for arguments that are out of range or do not fit together, and for samples
                that are not finite.
        """
        self.check()
        defaults = DEFAULT_WITH_PREDICTOR if predictor else DEFAULT_CORRECTOR
        inner_steps = int(defaults["inner_steps"]) if inner_steps is None else inner_steps
        snr = defaults["snr"] if snr is None else snr
        corrector = self._corrector(inner_steps, snr, step_rule, predictor)
        order = self.scheduler.config.get("solver_order", 1)
        if predictor and isinstance(self.scheduler, GeneralizedDDIMScheduler) and order > 1:
            raise ValueError(
                f"`predictor` is True with solver_order={order}: corrections come between its "
                "steps, whose predictions then belong to no one trajectory; use solver_order=1."
            )
        if eta is not None and not predictor:
            raise ValueError(f"`eta` is {eta!r} without `predictor`; it is the predictor's.")
        latents = None if latents is None else self.check_latents(latents)
        asked = Conditions.of_call(conditions)
        noise = make_noise(num_images, seeds, generator, latents, count_of(asked.class_labels))
        named = noise.seeds if latents is None else None
        output = self.buffer(output_type, noise.num_images, named)
        device = self._execution_device
        bound = BoundConditions(asked, self.unet, self.scheduler, noise.num_images, device)
        levels = (num_inference_steps, timesteps, self.scheduler.config.get("timesteps"))
        if predictor or any(said is not None for said in levels):
            tau = plan(self.scheduler, num_inference_steps, timesteps, device)
        else:
            tau = torch.tensor(geometric_timesteps(self.scheduler, DEFAULT_LEVELS), device=device)
        steps = [int(t) for t in tau.tolist()]
        parts = chunks(noise.num_images, check_batch_size(batch_size))
        with self.progress_bar(total=len(parts) * len(steps)) as bar:
            for start, stop in parts:
                source = noise.of(start, stop)
                corrector = replace(corrector, network=bound.of(start, stop))
                if latents is None:
                    shape = (stop - start, *self.image_shape)
                    x = draw(shape, source, device, self.state_dtype)
                else:
                    x = latents[start:stop].to(device)
                if predictor:
                    x = self._predict_and_correct(x, tau, steps, corrector, source, eta, bar)
                else:
                    x = self._anneal(x, steps, corrector, source, final_denoising, bar)
                output.add(start, x)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (output.result(),)  # type: ignore[return-value]
        kept = None if noise.seeds is None else list(noise.seeds)
        calls = _network_calls(len(steps), inner_steps, predictor, final_denoising)
        return LangevinOutput(output.result(), kept, calls)

    def _corrector(self, inner_steps: int, snr: float, rule: str, predictor: bool) -> Corrector:
        least = 0 if predictor else 1
        if isinstance(inner_steps, bool) or not isinstance(inner_steps, int) or inner_steps < least:
            raise ValueError(f"`inner_steps` is {inner_steps!r}; it must be an integer >= {least}.")
        if not isinstance(snr, int | float) or not 0 < snr < float("inf"):
            raise ValueError(f"`snr` is {snr!r}; it must be a finite number > 0.")
        if rule not in STEP_RULES:
            raise ValueError(f"`step_rule` is {rule!r}; it must be one of {STEP_RULES}.")
        return Corrector(Levels(self.scheduler), self.unet, inner_steps, snr, rule)

    def _anneal(
        self,
        x: torch.Tensor,
        steps: list[int],
        corrector: Corrector,
        source: Generators,
        final_denoising: bool,
        bar: Bar,
    ) -> torch.Tensor:
        levels = corrector.levels
        if levels.at(steps[0]) == 0:
            raise ValueError(
                f"`timesteps` has t={steps[0]}, where alpha_bar = 0 and x_t / sqrt(abar_t) does "
                "not exist; leave it out, or use `predictor=True`."
            )
        for t, s in zip(steps, [*steps[1:], -1], strict=True):
            x = corrector(x, t, source)
            if s < 0 and final_denoising:
                x = levels.x0(predict(corrector.network, x, t), x, t)
            else:
                x = x * (levels.at(s) / levels.at(t)) ** 0.5
            bar.update()
        return x

    def _predict_and_correct(
        self,
        x: torch.Tensor,
        tau: torch.Tensor,
        steps: list[int],
        corrector: Corrector,
        source: Generators,
        eta: float | None,
        bar: Bar,
    ) -> torch.Tensor:
        def correct(step: Step) -> None:
            if step.index + 1 < len(steps):
                step.x_s = corrector(step.x_s, steps[step.index + 1], source)
            bar.update()

        arguments = step_arguments(self.scheduler, source, eta)
        return denoise(corrector.network, self.scheduler, x, tau, arguments, correct)


def geometric_timesteps(scheduler: Scheduler, num_levels: int) -> list[int]:
    """Return timesteps whose NCSN noise levels fall in about equal ratios, as annealing wants them.

    The noise level of the NCSN variable x_t / sqrt(abar_t) is sqrt((1 - abar_t) / abar_t). Near x_0
    neighbouring timesteps are further apart than the ratio asks for, so the list may be shorter.

    Args:
        scheduler: gives the noise schedule.
        num_levels: how many, >= 2.

    Returns:
        strictly decreasing timesteps from T - 1 (or the last with alpha_bar > 0) to 0.

    Raises:
        ValueError: if `num_levels` is below 2.
    """
    if num_levels < 2:
        raise ValueError(f"`num_levels` is {num_levels!r}; it must be >= 2.")
    a = alpha_bar_table(scheduler)
    log_noise = ((1 - a) / a).log()[a > 0]
    wanted = torch.linspace(float(log_noise[-1]), float(log_noise[0]), num_levels).double()
    nearest = (log_noise[None] - wanted[:, None]).abs().argmin(dim=1)
    return sorted(set(nearest.tolist()), reverse=True)


def _network_calls(steps: int, inner_steps: int, predictor: bool, final_denoising: bool) -> int:
    if predictor:
        return steps + (steps - 1) * inner_steps
    return steps * inner_steps + int(final_denoising)
