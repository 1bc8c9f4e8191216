"""`RestorationPipeline`: samples of the images that a measurement may have come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput, logging
from PIL import Image

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.base import (
    DEFAULT_BATCH_SIZE,
    UnconditionalPipeline,
    check_batch_size,
    check_callback,
    chunks,
)
from ddim_schedulers.pipelines.conditions import BoundConditions, Conditions
from ddim_schedulers.pipelines.images import OutputBuffer, to_pil, to_uint8, to_unit_range
from ddim_schedulers.pipelines.interfaces import Network
from ddim_schedulers.pipelines.noise import Generators, Noise, check_seeds, draw, make_noise
from ddim_schedulers.pipelines.restoration.checks import (
    check_measurement,
    check_method,
    check_noise_std,
    check_operator,
    measures_nothing,
)
from ddim_schedulers.pipelines.restoration.denoiser import Denoiser
from ddim_schedulers.pipelines.restoration.loop import restore
from ddim_schedulers.pipelines.restoration.methods import Method, Mmps, Problem
from ddim_schedulers.pipelines.restoration.operators import Operator
from ddim_schedulers.pipelines.restoration.plan import Step, steps_of
from ddim_schedulers.pipelines.sampling import denoise, plan, step_arguments

logger = logging.get_logger(__name__)

DEFAULT_STEPS = 100
# A relative residual of a linear system that is told of.
UNSOLVED = 1e-2
Advance = Callable[[], object]
# (network, x_T, its generators, what to call after each step) -> x_0
Unmeasured = Callable[[Network, torch.Tensor, Generators, Advance], torch.Tensor]


@dataclass
class RestorationOutput(BaseOutput):
    """What a restoration returns: K samples for each of N measurements.

    Attributes:
        images: N K images in the output type; those of measurement i are i K .. (i + 1) K - 1.
        seeds: the seed of each image, None if the caller's generators drew the noise.
        mean: mean of the samples of each measurement, N images in the output type; None for K = 1.
        std: their standard deviation (over K), as the output type shows it: in units of [0, 1] for
            np and pt and of [-1, 1] for latent; pil doubles it, so that the largest possible, 0.5,
            is white. None for K = 1.
        residual: max |A x - y| of each image before it is clamped, float64 (N K,), in units of
            images in [-1, 1].
        residual_clamped: the same of the image in [-1, 1].
        network_calls: forward passes that an image took.
        backward_passes: of the network, that an image took at most.
        solver_residual: largest relative residual of the linear systems that `mmps` solved; None
            for methods without one.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    seeds: list[int] | None
    mean: list[Image.Image] | np.ndarray | torch.Tensor | None
    std: list[Image.Image] | np.ndarray | torch.Tensor | None
    residual: torch.Tensor
    residual_clamped: torch.Tensor
    network_calls: int
    backward_passes: int
    solver_residual: float | None = None


@dataclass(frozen=True)
class _Run:
    """One call's settings, the same for every chunk."""

    method: Method
    operator: Operator
    y: torch.Tensor
    noise_std: float
    each: int
    noise: Noise
    latents: torch.Tensor | None
    steps: list[Step]
    unmeasured: Unmeasured | None
    conditions: BoundConditions


class RestorationPipeline(UnconditionalPipeline):
    """Solves linear inverse problems with an unconditional model, without training."""

    _refuses_vae = (
        "a measurement is of pixels, which no linear operator gives from latents; restoration "
        "works with a network of pixels"
    )

    @torch.no_grad()
    def __call__(
        self,
        measurement: torch.Tensor,
        operator: Operator,
        noise_std: float = 0.0,
        method: str | Method = "ddnm",
        *,
        num_samples: int | None = None,
        measurement_range: tuple[float, float] = (-1, 1),
        seeds: Sequence[int] | int | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        eta_rule: str = "family",
        callback_on_step_end: Callable[[], object] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **conditions: Any,
    ) -> RestorationOutput:
        """Sample images x with y = A x + noise_std n.

        Args:
            measurement: y, floating point (N, ...), what `operator.A` gives of N images.
            operator: A; see `restoration.operators`. Any object with A, A_adjoint and A_dagger.
            noise_std: of the measurement, >= 0, in its units.
            method: `ddnm`, `ddrm`, `repaint`, `dps`, `pigdm` or `mmps`, or one of the classes of
                `restoration.methods` with its settings. docs/restore.md says which one when.
            num_samples: K, samples for each measurement; None takes it from `seeds`, else 1.
            measurement_range: of the images that were measured, (-1, 1) or (0, 1); of the latter y
                becomes 2 y - A(1), and its noise twice as large.
            seeds: one for each of the N K images, as in generation: an image depends on its seed
                and its measurement alone.
            generator: instead of seeds, as in generation.
            latents: (N K, C, H, W), the noise of which the method makes x_T, instead of drawn
                noise.
            batch_size: images in one network call.
            num_inference_steps: number of steps; None: the scheduler's own trajectory if its config
                keeps one, else 100.
            timesteps: explicit trajectory instead, strictly decreasing.
            eta: the member; None takes the scheduler's, which is 0 unless its config says so, and 1
                for a DDPM scheduler.
            eta_rule: `family`, sigma = eta sigma(1), or `paper`, sigma = eta sqrt(1 - alpha_bar_s),
                as DDRM and DDNM have it.
            callback_on_step_end: called without arguments after each network call that steps.
            output_type: pil, np, pt or latent, as in generation.
            return_dict: False returns the tuple `(images,)`.
            **conditions: `class_labels`, `guidance_scale` and so on, as in generation; labels are
                one for all or one for each of the N K images.

        Raises:
            ValueError: before the first network call, for a measurement, operator, noise or method
                that do not fit each other, the network or the scheduler; and for samples that are
                not finite.
        """
        self.check()
        check_callback(callback_on_step_end)
        device, shape = self._execution_device, self.image_shape
        chosen, noise_std = check_method(method), check_noise_std(noise_std)
        uses_adjoint = chosen.uses_adjoint(noise_std)
        of_ones = check_operator(operator, shape, self.state_dtype, device, uses_adjoint)
        config = self.scheduler.config
        limit = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
        y = check_measurement(measurement, operator, of_ones, noise_std, measurement_range, limit)
        scale = 2.0 if tuple(measurement_range) == (0, 1) else 1.0
        latents = None if latents is None else self.check_latents(latents)
        each = _samples_of_each(num_samples, len(y), seeds, generator, latents)
        noise = make_noise(len(y) * each, seeds, generator, latents)
        bound = BoundConditions(
            Conditions.of_call(conditions), self.unet, self.scheduler, noise.num_images, device
        )
        tau = self.planned(num_inference_steps, timesteps, device)
        steps = steps_of(self.scheduler, [int(t) for t in tau.tolist()], eta, eta_rule)
        unmeasured = None
        if measures_nothing(operator, of_ones, shape):
            chosen = Method()
            unmeasured = self._unmeasured(tau, steps, eta, eta_rule)
        chosen.check(operator, noise_std, steps)
        noise_std *= scale
        run = _Run(chosen, operator, y, noise_std, each, noise, latents, steps, unmeasured, bound)
        named = noise.seeds if latents is None else None
        output = OutputBuffer(output_type, noise.num_images, shape, named)
        parts = chunks(noise.num_images, check_batch_size(batch_size))
        result = self._restore(run, parts, output, callback_on_step_end)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (output.result(),)  # type: ignore[return-value]
        return result

    def _restore(
        self,
        run: _Run,
        parts: list[tuple[int, int]],
        output: OutputBuffer,
        after_step: Advance | None,
    ) -> RestorationOutput:
        forward = run.method.calls(len(run.steps))
        largest, kept, residuals, backward = parts[0][1], [], [], 0
        unsolved = 0.0
        with self.progress_bar(total=len(parts) * forward) as bar:

            def advance() -> None:
                bar.update()
                if after_step is not None:
                    after_step()

            for start, stop in parts:
                denoiser = Denoiser(run.conditions.of(start, stop), self.scheduler, largest)
                x = self._restore_chunk(run, start, stop, denoiser, advance)
                output.add(start, x)
                rows = [i // run.each for i in range(start, stop)]
                residuals.append(_residuals(run.operator, x, run.y[rows]))
                kept.append(x.cpu())
                backward = max(backward, denoiser.backward_passes)
                unsolved = max(unsolved, float(denoiser.solver_residual))
        mean = std = None
        if run.each > 1:
            mean, std = _spread(torch.cat(kept), run.each, output.output_type)
        solver = unsolved if isinstance(run.method, Mmps) else None
        if unsolved > UNSOLVED and self._warns_of_clipping:
            logger.warning(
                "The linear systems of mmps were left with relative residuals of up to "
                f"{unsolved:.2g}. Use more `max_iterations`, or a `noise_std` above 0."
            )
        seeds = None if run.noise.seeds is None else list(run.noise.seeds)
        residual, clamped = torch.cat(residuals, dim=1)
        return RestorationOutput(
            output.result(), seeds, mean, std, residual, clamped, forward, backward, solver
        )

    def _restore_chunk(
        self, run: _Run, start: int, stop: int, denoiser: Denoiser, advance: Advance
    ) -> torch.Tensor:
        generator, device = run.noise.of(start, stop), self._execution_device
        shape = (stop - start, *self.image_shape)

        def fresh() -> torch.Tensor:
            return draw(shape, generator, device, self.state_dtype)

        z = fresh() if run.latents is None else run.latents[start:stop].to(device)
        if run.unmeasured is not None:
            return run.unmeasured(denoiser.network, z, generator, advance)
        y = run.y[[i // run.each for i in range(start, stop)]]
        problem = Problem(run.operator, y, run.noise_std, run.operator.A_dagger(y))
        x_t = run.method.start(problem, z, run.steps[0].alpha_bar_t)
        return restore(run.method, problem, denoiser, x_t, run.steps, fresh, advance)

    def _unmeasured(
        self, tau: torch.Tensor, steps: list[Step], eta: float | None, eta_rule: str
    ) -> Unmeasured | None:
        """Return ordinary sampling of the same member, to the bit: there is nothing to do."""
        if eta_rule == "paper":
            scheduler, config = self.scheduler, self.scheduler.config
            own = [config.get(key) for key in ("eta", "eta_interval")]
            if not isinstance(scheduler, GeneralizedDDIMScheduler) or own != [None, None]:
                return None
            scheduler.set_timesteps(
                timesteps=tau.tolist(), sigma=[s.sigma for s in steps], device=tau.device
            )
            eta = None

        def sample(
            network: Network, x_t: torch.Tensor, generator: Generators, advance: Advance
        ) -> torch.Tensor:
            arguments = step_arguments(self.scheduler, generator, eta)

            def after_step(_: object) -> None:
                advance()

            return denoise(network, self.scheduler, x_t, tau, arguments, after_step)

        return sample

    def planned(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        device: torch.device | str,
    ) -> torch.Tensor:
        """Set the scheduler's trajectory and return its timesteps.

        Raises:
            ValueError: as `sampling.plan`.
        """
        config = self.scheduler.config
        keeps = config.get("timesteps") is not None or bool(config.get("sigma"))
        if num_inference_steps is None and timesteps is None and not keeps:
            num_inference_steps = DEFAULT_STEPS
        return plan(self.scheduler, num_inference_steps, timesteps, device)


def _samples_of_each(
    num_samples: int | None,
    count: int,
    seeds: Sequence[int] | int | None,
    generator: Generators | None,
    latents: torch.Tensor | None,
) -> int:
    """Return K, of which N K images follow."""
    each = num_samples
    if each is None:
        given = len(check_seeds(seeds)) if seeds is not None else None
        given = len(generator) if isinstance(generator, list) else given
        given = given if latents is None else len(latents)
        if given is None:
            return 1
        if given % count or not given:
            name = "latents" if latents is not None else "seeds"
            name = "generator" if latents is None and isinstance(generator, list) else name
            raise ValueError(
                f"`{name}` has {given} for {count} measurements; there must be as many for each of "
                "them."
            )
        return given // count
    if isinstance(each, bool) or not isinstance(each, int) or each < 1:
        raise ValueError(f"`num_samples` is {each!r}; it must be an integer >= 1.")
    return each


def _residuals(operator: Operator, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return max |A x - y| of each image, as it is and clamped, float64 (2, B) on the CPU."""
    both = [
        (operator.A(image) - y).flatten(1).abs().amax(dim=1).cpu().double()
        for image in (x, x.clamp(-1, 1))
    ]
    return torch.stack(both)


def _spread(x: torch.Tensor, each: int, output_type: str) -> tuple[Any, Any]:
    """Return mean and standard deviation of every `each` images, in the output type."""
    shown = x if output_type == "latent" else to_unit_range(x)
    grouped = shown.view(-1, each, *x.shape[1:])
    mean, std = grouped.mean(dim=1), grouped.std(dim=1, correction=0)
    if output_type == "pil":
        # the largest standard deviation of values in [0, 1] is 0.5
        return to_pil(to_uint8(2 * mean - 1)), to_pil(to_uint8(4 * std - 1))
    if output_type == "np":
        return mean.movedim(1, -1).float().numpy(), std.movedim(1, -1).float().numpy()
    return mean, std
