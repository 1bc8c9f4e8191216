"""`GenerationPipeline`: samples from a trained model, one seed for each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from ddim_schedulers.pipelines.base import (
    DEFAULT_BATCH_SIZE,
    UnconditionalPipeline,
    check_batch_size,
    check_callback,
    chunks,
)
from ddim_schedulers.pipelines.compatibility import (
    MULTISTEP,
    SINGLE_STEP,
    check_scheduler,
    is_deterministic,
)
from ddim_schedulers.pipelines.conditions import BoundConditions, Conditions, one_class
from ddim_schedulers.pipelines.images import ImageInput, OutputBuffer
from ddim_schedulers.pipelines.interfaces import Network
from ddim_schedulers.pipelines.labels import ClassLabelInput, Label, count_of
from ddim_schedulers.pipelines.noise import Generators, Noise, check_seeds, draw, make_noise
from ddim_schedulers.pipelines.observers import (
    ClipCounter,
    PathRecorder,
    SamplingPath,
    warn_of_clipping,
)
from ddim_schedulers.pipelines.sampling import (
    Levels,
    Step,
    denoise,
    nearest_planned,
    plan,
    step_arguments,
)
from ddim_schedulers.pipelines.source import Source, make_source, steps_of

Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass
class GenerationOutput(BaseOutput):
    """What generation returns.

    Attributes:
        images: N images in the output type: PIL images, an array (N, H, W, C) or a tensor (N, C, H,
            W) in [0, 1], or latents in model space.
        seeds: the seed of each image, None if the caller's generators drew the noise.
        path: x_t and x0_hat along tau, if asked for.
        clipped_share: see `ClipCounter`; None where nothing is clipped.
        class_labels: the class of each image; None for an unconditional network, or mixtures.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    seeds: list[int] | None = None
    path: SamplingPath | None = None
    clipped_share: float | None = None
    class_labels: list[int] | None = None


@dataclass
class VariationsOutput(BaseOutput):
    """Images that share x_t with an original.

    Attributes:
        original: the image that all x_t come from, one image in the output type.
        images: for each level, its variations in the output type.
        timesteps: the levels t at which x_t was shared.
    """

    original: Any
    images: list[Any]
    timesteps: list[int]


@dataclass(frozen=True)
class _Run:
    """One call's settings, the same for every chunk."""

    noise: Noise
    latents: torch.Tensor | None
    source: Source | None
    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    start_timestep: int | None
    eta: float | None
    use_clipped_model_output: bool | None
    callback: Callback | None
    callback_inputs: tuple[str, ...]
    conditions: BoundConditions


class GenerationPipeline(UnconditionalPipeline):
    """Samples images with any scheduler of the family, or a stock multistep one."""

    accepted_schedulers = SINGLE_STEP + MULTISTEP
    _callback_tensor_inputs = ("latents", "model_output", "pred_original_sample")

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        *,
        seeds: Sequence[int] | int | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        start_timestep: int | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        class_labels: ClassLabelInput | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        negative_label: Label | None = None,
        guide: Network | None = None,
        classifier: torch.nn.Module | None = None,
        return_path: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> GenerationOutput:
        """Generate images.

        Args:
            num_images: how many; None takes it from `seeds`, `generator`, `latents` or a list of
                `class_labels`, else 1.
            seeds: one for each image, 0 .. 2^63 - 1, or that of a single image: an image depends on
                its seed and its class alone. Without seeds and generator, seeds come from torch's
                global generator and are returned.
            generator: instead of seeds, as in diffusers: one for all (the noise then depends on
                `batch_size`), or a list with one for each image.
            latents: x_T (N, C, H, W) instead of drawn noise; seeds then serve the noise of the
                steps alone.
            batch_size: images in one network call; bounds the memory.
            num_inference_steps: number of steps; None: the scheduler's own trajectory if its config
                keeps one, else 50.
            timesteps: explicit trajectory instead, strictly decreasing.
            start_timestep: a timestep of the trajectory to start at: `latents` is then x_t at it.
                Not for stock multistep schedulers; a `solver_order` of ours has no history there.
            image: a picture to start from, one for all images or one for each (SDEdit): its x_t is
                drawn from q(x_t | x_0) with the noise of each seed, and sampled from there. See
                `to_model_space`; a pipeline of latents encodes it, to the mean where the encoder
                gives a Gaussian. Schedulers as for `start_timestep`.
            strength: with `image`: share of the steps that are run, in (0, 1]. Small values keep
                the picture, 1 keeps nothing but what x_T holds of it.
            eta: DDIM's eta, passed to schedulers that take one; None leaves theirs.
            use_clipped_model_output: passed to schedulers that take it; None leaves theirs.
            class_labels: classes, one for all images or one for each; this and the six arguments
                below are explained in `Conditions`.
            guidance_scale: w; None is 1, without guidance.
            guidance_interval: [low, high], shares of t / T where guidance acts. Where a step
                crosses an edge, a scheduler of a higher order forgets its history.
            guidance_rescale: phi in 0 .. 1.
            negative_label: a class in the place of the null class.
            guide: a weaker network, for auto guidance.
            classifier: a module (x_t, t) -> logits, for classifier guidance.
            return_path: also return x_t and x0_hat along tau: (2 S + 1) times the memory of the
                output, and a wait for the device at each step.
            callback_on_step_end: called as `callback(pipe, index, t, tensors)` after each step; may
                return `{"latents": ...}` to replace the sample.
            callback_on_step_end_tensor_inputs: which of latents, model_output, pred_original_sample
                it gets.
            output_type: pil, np, pt (CPU tensor in [0, 1]) or latent (CPU tensor in model space,
                not clamped).
            return_dict: False returns the tuple `(images,)`.

        Returns:
            images with their seeds, path and clipped share.

        Raises:
            ValueError: for arguments that contradict each other, are out of range, or that the
                scheduler would ignore, and for samples that are not finite.
        """
        self.check()
        check_callback(callback_on_step_end)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; allowed: "
                f"{self._callback_tensor_inputs}."
            )
        if latents is not None:
            latents = self.check_latents(latents)
        starts = {"latents": latents, "start_timestep": start_timestep}
        encode = partial(self.x0_of, batch_size=batch_size, name="image")
        source = make_source(image, strength, encode, **starts)
        conditions = Conditions(
            class_labels,
            guidance_scale,
            guidance_interval,
            guidance_rescale,
            negative_label,
            guide,
            classifier,
        )
        pictures = None if source is None else source.count
        noise = make_noise(
            num_images, seeds, generator, latents, count_of(class_labels), num_pictures=pictures
        )
        bound = BoundConditions(
            conditions, self.unet, self.scheduler, noise.num_images, self._execution_device
        )
        run = _Run(
            noise,
            latents,
            source,
            num_inference_steps,
            timesteps,
            start_timestep,
            eta,
            use_clipped_model_output,
            callback_on_step_end,
            tuple(callback_on_step_end_tensor_inputs),
            bound,
        )
        # with latents the seeds, if there are any, do not say which image it is
        named = noise.seeds if latents is None else None
        output = self.buffer(output_type, noise.num_images, named)
        path, share = self._generate(
            run, chunks(noise.num_images, check_batch_size(batch_size)), output, return_path
        )
        self.maybe_free_model_hooks()
        if self._warns_of_clipping:
            warn_of_clipping(share, self.scheduler.config, self.image_shape[0])
        if not return_dict:
            return (output.result(),)  # type: ignore[return-value]
        kept = None if noise.seeds is None else list(noise.seeds)
        return GenerationOutput(output.result(), kept, path, share, bound.numbers)

    def _generate(
        self, run: _Run, parts: list[tuple[int, int]], output: OutputBuffer, return_path: bool
    ) -> tuple[SamplingPath | None, float | None]:
        levels = Levels(self.scheduler)
        watch = _Watch(self, run, levels, ClipCounter(self.scheduler.config, levels))
        for part, (start, stop) in enumerate(parts):
            tau = self._plan(run)
            generator = run.noise.of(start, stop)
            x = self._start(run, start, stop, generator, levels.at(int(tau[0])))
            if part == 0:
                watch.steps = [int(t) for t in tau.tolist()]
                watch.bar = self.progress_bar(total=len(parts) * len(watch.steps))
                if return_path:
                    watch.recorder = PathRecorder(watch.steps, run.noise.num_images, x)
            watch.start = start
            arguments = step_arguments(
                self.scheduler, generator, run.eta, run.use_clipped_model_output
            )
            largest = parts[0][1] - parts[0][0]
            network = run.conditions.of(start, stop)
            output.add(start, denoise(network, self.scheduler, x, tau, arguments, watch, largest))
        watch.bar.close()
        path = None if watch.recorder is None else watch.recorder.path
        return path, watch.clipped.share()

    def _plan(self, run: _Run) -> torch.Tensor:
        """Plan tau (multistep schedulers forget the chunk before) and cut it at the start."""
        starts = {"start_timestep": run.start_timestep, "image": run.source}
        for name, given in starts.items():
            if given is not None:
                check_scheduler(self.scheduler, SINGLE_STEP, f"`{name}`")
        tau = plan(self.scheduler, run.num_inference_steps, run.timesteps, self._execution_device)
        if run.source is not None:
            return tau[-steps_of(run.source.strength, tau) :]
        if run.start_timestep is None:
            return tau
        planned = tau.tolist()
        if run.latents is None:
            raise ValueError(
                f"`start_timestep` is {run.start_timestep}; `latents` must be given with it, the "
                "x_t to start from."
            )
        if run.start_timestep not in planned:
            raise ValueError(
                f"`start_timestep` is {run.start_timestep!r}; it must be on the trajectory "
                f"{planned}."
            )
        return tau[planned.index(run.start_timestep) :]

    def _start(
        self, run: _Run, start: int, stop: int, generator: Generators, alpha_bar: float
    ) -> torch.Tensor:
        device = self._execution_device
        if run.latents is not None:
            return run.latents[start:stop].to(device)
        noise = draw((stop - start, *self.image_shape), generator, device, self.state_dtype)
        return noise if run.source is None else run.source.x_t(start, stop, noise, alpha_bar)

    def variations(
        self,
        seed: int,
        share_at: Sequence[int],
        variation_seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        output_type: str = "pil",
        **conditions: Any,
    ) -> VariationsOutput:
        """Generate images that share x_t with one original, for several t (DDPM, Fig. 7).

        The original runs from its seed; at each level its x_t is taken, and the rest of the chain
        is run again with the noise of each variation seed. Late levels share everything but detail.

        Args:
            seed: of the original.
            share_at: timesteps at which to share x_t; where one is not on the trajectory, the
                nearest timestep that is takes its place, and a warning says which.
            variation_seeds: one for each variation of a level; the same ones serve every level.
            num_inference_steps: as in generation.
            timesteps: as in generation.
            eta: as in generation; the sampler must draw noise, so 0 raises.
            batch_size: as in generation.
            output_type: as in generation.
            **conditions: as in generation, `class_labels` and so on; one class for all.

        Raises:
            ValueError: for a deterministic sampler, whose variations would all be equal, or a level
                that is no timestep of the training chain.
        """
        self.check()
        if not eta and is_deterministic(self.scheduler):
            raise ValueError(
                f"`eta` is {eta!r} with {type(self.scheduler).__name__}; it must be > 0, or the "
                "scheduler DDPM's: without noise after x_t all variations would be equal."
            )
        common: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "eta": eta,
            "batch_size": batch_size,
            "output_type": output_type,
            **one_class(conditions),
        }
        check_scheduler(self.scheduler, SINGLE_STEP, "`variations`")
        device = self._execution_device
        planned = plan(self.scheduler, num_inference_steps, timesteps, device).tolist()
        big_t = self.scheduler.config.num_train_timesteps
        integers = [t for t in share_at if isinstance(t, Integral) and type(t) is not bool]
        if wrong := [t for t in share_at if t not in integers or not 0 <= t < big_t]:
            raise ValueError(
                f"`share_at` has {wrong}; each must be an integer in 0 .. {big_t - 1}."
            )
        levels = [nearest_planned(int(t), planned, "share_at") for t in share_at]
        if not check_seeds(variation_seeds, "variation_seeds"):
            raise ValueError("`variation_seeds` is empty; it must have one for each variation.")
        original = self(seeds=[seed], return_path=True, **common)
        assert isinstance(original, GenerationOutput) and original.path is not None
        images = []
        for t in levels:
            x_t = original.path.x_t[planned.index(t)].expand(len(variation_seeds), -1, -1, -1)
            images.append(
                self(latents=x_t, start_timestep=t, seeds=variation_seeds, **common).images
            )
        return VariationsOutput(original.images[0], images, levels)


class _Watch:
    """After each step: counting, recording, the callback of the caller, the bar."""

    def __init__(
        self, pipe: GenerationPipeline, run: _Run, levels: Levels, clipped: ClipCounter
    ) -> None:
        self.pipe, self.run, self.levels, self.clipped = pipe, run, levels, clipped
        self.recorder: PathRecorder | None = None
        self.steps: list[int] = []
        self.bar: Any = None
        self.start = 0

    def __call__(self, step: Step) -> None:
        self.clipped.record(step, self.steps[step.index])
        if self.run.callback is not None:
            self._call_back(step)
        if self.recorder is not None:
            self.recorder.record(self.start, step, self.levels)
        self.bar.update()

    def _call_back(self, step: Step) -> None:
        available = {
            "latents": step.x_s,
            "model_output": step.model_output,
            "pred_original_sample": step.x0,
        }
        tensors = {name: available[name] for name in self.run.callback_inputs}
        assert self.run.callback is not None
        answer = self.run.callback(self.pipe, step.index, step.timestep, tensors)
        if answer is None:
            return
        if set(answer) - {"latents"}:
            raise ValueError(
                f"`callback_on_step_end` returned {sorted(answer)}; it may return 'latents' alone."
            )
        latents = answer.get("latents", step.x_s)
        if latents.shape != step.x_s.shape:
            raise ValueError(
                f"`callback_on_step_end` returned `latents` of shape {tuple(latents.shape)}; it "
                f"must be {tuple(step.x_s.shape)}."
            )
        step.x_s = latents
