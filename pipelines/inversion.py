"""`InversionPipeline`: images to the latents that DDIM decodes to them, and back.

DDIM at sigma = 0 is an ODE solver, so it can be run backwards (DDIM, Sec. 4.3 and 5.4). One
decoding step is x_s = a x_t + b eps(x_t, t). Plain inversion solves it for x_t with eps(x_s, t) in
the place of eps(x_t, t), an error of first order; fixed-point refinement iterates

    x_t <- (x_s - b eps(x_t, t)) / a

from there, whose fixed point is the exact inverse of the decoding step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from PIL import Image

from ddim_schedulers import GeneralizedDDIMInverseScheduler, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.base import (
    DEFAULT_BATCH_SIZE,
    UnconditionalPipeline,
    check_batch_size,
    chunks,
)
from ddim_schedulers.pipelines.conditions import BoundConditions, Conditions
from ddim_schedulers.pipelines.generation import GenerationPipeline
from ddim_schedulers.pipelines.images import (
    ImageInput,
    OutputBuffer,
    check_finite,
    to_model_space,
)
from ddim_schedulers.pipelines.labels import ClassLabelInput
from ddim_schedulers.pipelines.refinement import (
    DEFAULT_TOLERANCE,
    encode_and_refine,
    network_calls,
    warn_of_residual,
)
from ddim_schedulers.pipelines.sampling import plan, predict

logger = logging.get_logger(__name__)

# The share of x_0 in x_T may differ by this much between two models that share x_T.
SHARED_LEVEL = 0.05


@dataclass
class InversionOutput(BaseOutput):
    """What encoding returns.

    Attributes:
        latents: x_t at the end of the trajectory, (N, C, H, W) on the CPU, model space.
        timesteps: tau in the order of encoding (increasing), S timesteps.
        network_calls: calls of the network for each image.
        residual: float64 (S, N): root mean square change of x_t in the last refinement of each
            step, or with mixing of the iterate that is returned; see `Refinement.refine`. None
            without refinement.
        converged: whether every residual is within the tolerance; None without refinement.
    """

    latents: torch.Tensor
    timesteps: list[int]
    network_calls: int
    residual: torch.Tensor | None = None
    converged: bool | None = None


@dataclass
class ReconstructionOutput(BaseOutput):
    """What reconstruction returns.

    Attributes:
        images: the reconstructions, in the output type.
        error: float64 (N,): mean squared error per dimension with images scaled to [0, 1], of the
            unclamped reconstruction (the measure of DDIM, Table 2). Of a pipeline of latents that
            of the decoded images, which includes what the autoencoder loses.
        inversion: what encoding returned.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    error: torch.Tensor
    inversion: InversionOutput


@dataclass
class TranslationOutput(BaseOutput):
    """What translation returns.

    Attributes:
        images: the translated images, in the output type.
        inversion: what encoding with the first model returned; its latents are shared by both.
        cycle_error: float64 (N,): mean squared error per dimension on [0, 1] of the images that
            were translated there and back, unclamped in between; None unless asked for. Of a
            pipeline of latents that of the decoded images, which includes what the autoencoder
            loses; between the two ways latents stay latents.
        back: the encoding of the way back; None unless asked for.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    inversion: InversionOutput
    cycle_error: torch.Tensor | None = None
    back: InversionOutput | None = None


class InversionPipeline(UnconditionalPipeline):
    """Encodes images to latents along any trajectory and reconstructs them.

    The scheduler gives its config: noise schedule, prediction type and trajectory. Encoding runs
    `GeneralizedDDIMInverseScheduler` and decoding `GeneralizedDDIMScheduler` at eta = 0, both built
    from it with clipping and thresholding **off**, because a clipped step has no inverse (a warning
    says so when the config has them on), and of order 1 for every `solver_order`, because a step
    that depends on the steps before it has no inverse of its own. `eps_scale` and `end_scale`,
    which correct samples from noise, are left out both ways. The component itself is neither used
    to step nor changed.
    """

    @torch.no_grad()
    def __call__(
        self,
        images: ImageInput,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        refinements: int = 0,
        tolerance: float = DEFAULT_TOLERANCE,
        mixing: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        class_labels: ClassLabelInput | None = None,
    ) -> InversionOutput:
        """Encode images.

        Args:
            images: PIL images, arrays or tensors; see `to_model_space`.
            num_inference_steps: S; None: the trajectory kept in the scheduler's config, else 50.
            timesteps: explicit trajectory instead, strictly **decreasing**, as for decoding.
            refinements: fixed-point iterations of each step, each one network call; 0 is plain
                inversion.
            tolerance: root mean square change of x_t at which an image's iteration stops, > 0 (x_t
                has a standard deviation of about 1). What has not reached it after `refinements` is
                warned about.
            mixing: how many earlier iterates Anderson's method combines with the last; 0 is the
                plain iteration. 3 to 5 may converge where that does not. See `Refinement`.
            batch_size: images in one network call; bounds the memory. A sample stops on its own, so
                the result does not depend on the batch.
            class_labels: of a conditional network: the class of all images, or one for each; see
                `Conditions`. The guidance scale is 1: the iteration of `refinements` is the less
                sure to converge, the larger it is.

        Returns:
            latents with residuals.

        Raises:
            ValueError: for images that do not fit the network, or arguments out of range.
        """
        self.check()
        x0 = self.x0_of(images, batch_size)
        return self.encode(
            x0,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            refinements=refinements,
            tolerance=tolerance,
            mixing=mixing,
            batch_size=batch_size,
            class_labels=class_labels,
        )

    @torch.no_grad()
    def encode(
        self,
        x0: torch.Tensor,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        refinements: int = 0,
        tolerance: float = DEFAULT_TOLERANCE,
        mixing: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        class_labels: ClassLabelInput | None = None,
    ) -> InversionOutput:
        """Encode samples x0 (N, C, H, W) in model space, of any range; the rest as in `__call__`.

        Raises:
            ValueError: for samples that do not fit the network, arguments out of range, or latents
                that come out not finite.
        """
        x0 = self.check_latents(x0, "x0")
        inverse, device = self.inverse_scheduler(), self._execution_device
        tau = plan(inverse, num_inference_steps, timesteps, device)
        parts = chunks(len(x0), check_batch_size(batch_size))
        largest = parts[0][1] - parts[0][0]
        conditions = BoundConditions(Conditions(class_labels), self.unet, inverse, len(x0), device)
        latents, residuals = torch.empty(x0.shape, dtype=x0.dtype), []
        with self.progress_bar(total=len(parts) * len(tau)) as bar:
            for start, stop in parts:
                call = partial(predict, conditions.of(start, stop), batch_size=largest)
                x = x0[start:stop].to(device)
                encoding = encode_and_refine(
                    call,
                    x,
                    inverse,
                    refinements,
                    tolerance,
                    mixing=mixing,
                    after_step=bar.update,
                )
                check_finite(encoding.latents, start)
                latents[start:stop] = encoding.latents.cpu()
                residuals += [] if encoding.residual is None else [encoding.residual]
        self.maybe_free_model_hooks()
        residual = torch.cat(residuals, dim=1) if residuals else None
        converged = None
        if residual is not None:
            converged = warn_of_residual(residual, refinements, tolerance)
        steps = [int(t) for t in tau.tolist()]
        calls = network_calls(len(steps), refinements)
        return InversionOutput(latents, steps, calls, residual, converged)

    def decode(
        self,
        latents: torch.Tensor,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        class_labels: ClassLabelInput | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode latents (N, C, H, W) with DDIM at eta = 0 and without clipping.

        Args:
            latents: as `__call__` returned them.
            num_inference_steps: as for encoding.
            timesteps: as for encoding.
            batch_size: as for encoding.
            class_labels: as for encoding.
            output_type: pil, np, pt or latent (the unclamped sample in model space).

        Raises:
            ValueError: for latents that do not fit the network, or arguments out of range.
        """
        decoder = self.sibling(GenerationPipeline, scheduler=self.decoding_scheduler())
        return decoder(
            latents=latents,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            eta=0.0,
            batch_size=batch_size,
            class_labels=class_labels,
            output_type=output_type,
        ).images

    def reconstruct(
        self,
        images: ImageInput,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        refinements: int = 0,
        tolerance: float = DEFAULT_TOLERANCE,
        mixing: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        class_labels: ClassLabelInput | None = None,
        output_type: str = "pil",
    ) -> ReconstructionOutput:
        """Encode images and decode the latents, both on the same trajectory (DDIM, Sec. 5.4).

        Args:
            images: as in `__call__`.
            num_inference_steps: S steps each way.
            timesteps: explicit trajectory instead, strictly decreasing.
            refinements: as in `__call__`.
            tolerance: as in `__call__`.
            mixing: as in `__call__`.
            batch_size: as in `__call__`.
            class_labels: as in `__call__`, both ways.
            output_type: pil, np, pt or latent.

        Returns:
            reconstructions with their error per dimension on [0, 1].

        Raises:
            ValueError: as `__call__`.
        """
        self.check()
        pixels = to_model_space(images, self.picture_shape, self.state_dtype)
        x0 = self.x0_of(images, batch_size)
        common: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "batch_size": batch_size,
            "class_labels": class_labels,
        }
        inversion = self.encode(
            x0, refinements=refinements, tolerance=tolerance, mixing=mixing, **common
        )
        again: Any = self.decode(inversion.latents, output_type="latent", **common)
        shown = self.pixels_of(again, batch_size)
        buffer = OutputBuffer(output_type, len(x0), self.picture_shape)
        buffer.add(0, again if output_type == "latent" else shown)
        return ReconstructionOutput(buffer.result(), unit_error(shown, pixels), inversion)

    def translate(
        self,
        images: ImageInput,
        target: DiffusionPipeline,
        *,
        class_labels: ClassLabelInput | None = None,
        target_class_labels: ClassLabelInput | None = None,
        cycle: bool = False,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        refinements: int = 0,
        tolerance: float = DEFAULT_TOLERANCE,
        mixing: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        output_type: str = "pil",
    ) -> TranslationOutput:
        """Encode images with this model and decode them with another: they become its images.

        Dual diffusion implicit bridges (arXiv:2203.08382): both models map their images to the same
        Gaussian x_T by their own probability-flow ODE. No pairs are needed, and neither model knows
        of the other.

        Args:
            images: as in `__call__`.
            target: a pipeline of the other model, with `unet` and `scheduler`, for images of the
                same size and channels; a pipeline of latents fits one whose latents have the same
                shape, each with its own autoencoder. Each model steps with its own scheduler's
                noise levels.
            class_labels: of this model, as in `__call__`.
            target_class_labels: of the other model; another class of the same model will do.
            cycle: also translate back, and measure the error; this triples the network calls.
            num_inference_steps: S steps each way.
            timesteps: explicit trajectory instead, strictly decreasing.
            refinements: as in `__call__`.
            tolerance: as in `__call__`.
            mixing: as in `__call__`.
            batch_size: as in `__call__`.
            output_type: pil, np, pt or latent.

        Raises:
            ValueError: for a target that does not fit; otherwise as `__call__`.
        """
        self.check()
        other = InversionPipeline.from_pipe(target)
        other.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        common: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "batch_size": batch_size,
        }
        self._check_target(other, num_inference_steps, timesteps)
        pixels = to_model_space(images, self.picture_shape, self.state_dtype)
        x0 = self.x0_of(images, batch_size)
        refined = {
            **common,
            "refinements": refinements,
            "tolerance": tolerance,
            "mixing": mixing,
        }
        inversion = self.encode(x0, class_labels=class_labels, **refined)
        made: Any = other.decode(
            inversion.latents, class_labels=target_class_labels, output_type="latent", **common
        )
        buffer = OutputBuffer(output_type, len(x0), self.picture_shape)
        buffer.add(0, made if output_type == "latent" else other.pixels_of(made, batch_size))
        if not cycle:
            return TranslationOutput(buffer.result(), inversion)
        back = other.encode(made, class_labels=target_class_labels, **refined)
        again: Any = self.decode(
            back.latents, class_labels=class_labels, output_type="latent", **common
        )
        error = unit_error(self.pixels_of(again, batch_size), pixels)
        return TranslationOutput(buffer.result(), inversion, error, back)

    def _check_target(
        self,
        other: "InversionPipeline",
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
    ) -> None:
        for what, theirs, ours in (
            ("images", other.picture_shape, self.picture_shape),
            ("samples", other.image_shape, self.image_shape),
        ):
            if theirs != ours:
                raise ValueError(
                    f"`target` makes {what} of shape {theirs} (C, H, W); it must be {ours}, as "
                    "this pipeline's."
                )
        ends = []
        for scheduler in (self.decoding_scheduler(), other.decoding_scheduler()):
            tau = plan(scheduler, num_inference_steps, timesteps, "cpu")
            ends.append(float(scheduler.alpha_bar[int(tau[0])]) ** 0.5)
        if abs(ends[0] - ends[1]) > SHARED_LEVEL:
            raise ValueError(
                f"`target` begins at sqrt(alpha_bar) = {ends[1]:.3g}, and this pipeline ends at "
                f"{ends[0]:.3g}: x_T does not mean the same there. The two must be within "
                f"{SHARED_LEVEL}; use the same `timestep_spacing`, or more steps."
            )

    def inverse_scheduler(self) -> GeneralizedDDIMInverseScheduler:
        """Return the encoding scheduler: the reverse of the decoding one."""
        config = self.scheduler.config
        clipping = [k for k in ("clip_sample", "thresholding") if config.get(k)]
        if clipping:
            logger.info(  # true of most pipelines, so it is no warning
                f"{' and '.join(clipping)} is on in the scheduler's config; InversionPipeline "
                "encodes and decodes with it off, because a clipped step has no inverse."
            )
        scales = [k for k in ("eps_scale", "end_scale") if config.get(k, 1.0) != 1]
        if scales:
            logger.info(
                f"{' and '.join(scales)} of the scheduler's config correct samples from noise; "
                "InversionPipeline encodes and decodes without them."
            )
        # of the decoder's config: an optimal or calibrated trajectory depends on member and solver
        return GeneralizedDDIMInverseScheduler.from_config(self.decoding_scheduler().config)

    def decoding_scheduler(self) -> GeneralizedDDIMScheduler:
        """Return the decoding scheduler: clipping and scales off, the member eta = 0, order 1."""
        return GeneralizedDDIMScheduler.from_config(
            self.scheduler.config,
            clip_sample=False,
            thresholding=False,
            eta=None,
            eta_interval=None,
            sigma=None,
            reverse_variance="sigma",
            eps_scale=1.0,
            end_scale=1.0,
            solver_order=1,
            solver_corrector=False,
            solver_corrector_order=None,
        )


def unit_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each sample, float64 (N,), with [-1, 1] scaled to [0, 1]."""
    return ((x.double() - y.double()) / 2).square().flatten(1).mean(dim=1)
