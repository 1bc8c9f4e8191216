"""`InterpolationPipeline`: between seeds, latents or images, the DDIM way and the DDPM way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from ddim_schedulers.pipelines.base import DEFAULT_BATCH_SIZE, UnconditionalPipeline
from ddim_schedulers.pipelines.compatibility import (
    MULTISTEP,
    SINGLE_STEP,
    check_scheduler,
    is_deterministic,
)
from ddim_schedulers.pipelines.conditions import Conditions
from ddim_schedulers.pipelines.generation import GenerationPipeline
from ddim_schedulers.pipelines.images import ImageInput
from ddim_schedulers.pipelines.inversion import InversionOutput, InversionPipeline
from ddim_schedulers.pipelines.labels import ClassLabelInput, ClassMixture, count_of
from ddim_schedulers.pipelines.noise import check_seeds, draw
from ddim_schedulers.pipelines.sampling import Levels, nearest_planned, plan
from ddim_schedulers.pipelines.slerp import slerp_chain, slerp_grid
from ddim_schedulers.process import q_sample


@dataclass
class InterpolationOutput(BaseOutput):
    """What interpolation returns.

    Attributes:
        images: in the output type, in order from the first end to the last, or row by row.
        latents: what was decoded, (N, C, H, W) on the CPU: x_T, or the mixed x_t.
        rows: how many rows the pictures form.
        inversion: what encoding the ends returned, where images were given.
        timestep: of `diffuse`: the planned timestep t of `latents`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor
    rows: int
    inversion: InversionOutput | None = None
    timestep: int | None = None


@dataclass(frozen=True)
class _Ends:
    """The ends of an interpolation as latents, and the pipeline that decodes them."""

    latents: torch.Tensor
    decoder: GenerationPipeline
    inversion: InversionOutput | None


class InterpolationPipeline(UnconditionalPipeline):
    """Interpolates between samples of a trained model.

    `__call__` and `grid` mix x_T spherically and decode deterministically (DDIM, Sec. 5.3 and App.
    D.5); seeds and latents go through the pipeline's own scheduler, so that the ends are its plain
    samples, and images through `InversionPipeline`, with clipping off both ways. `diffuse` is
    DDPM's interpolation (Sec. 4.3).
    """

    accepted_schedulers = SINGLE_STEP + MULTISTEP

    @torch.no_grad()
    def __call__(
        self,
        *,
        seeds: Sequence[int] | int | None = None,
        latents: torch.Tensor | None = None,
        images: ImageInput | None = None,
        num_points: int = 8,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        refinements: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        output_type: str = "pil",
        **conditions: Any,
    ) -> InterpolationOutput:
        """Interpolate along a chain of two or more ends.

        Args:
            seeds: ends as seeds of x_T; exactly one of `seeds`, `latents` and `images` is given.
            latents: ends as x_T (K, C, H, W).
            images: ends as images, which are encoded first; see `to_model_space`.
            num_points: pictures of each stretch, both its ends included, >= 2.
            num_inference_steps: as in generation.
            timesteps: as in generation.
            refinements: of the encoding of images; see `InversionPipeline`.
            batch_size: images in one network call.
            output_type: pil, np, pt or latent.
            **conditions: as in generation, `class_labels` and so on; see `Conditions`. One class
                for all, or one for each end: in between, the prediction goes over linearly from
                class to class, see `ClassMixture`. With `images` labels alone, for a guided sample
                has no inverse that is as sure.

        Returns:
            (K - 1) (num_points - 1) + 1 images; each end appears once.

        Raises:
            TypeError: for an argument that does not exist.
            ValueError: for a scheduler that draws noise in its steps, fewer than two ends, or
                arguments that do not fit.
        """
        _check_count("num_points", num_points)
        common = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        asked = Conditions.of_call(conditions)
        ends = self._ends(seeds, latents, images, refinements, batch_size, common, asked)
        if len(ends.latents) < 2:
            raise ValueError(
                f"`{_given(seeds, latents)}` has {len(ends.latents)} end; an interpolation must "
                "have at least two."
            )
        weights = [i / (num_points - 1) for i in range(num_points - 1)]
        mixed = slerp_chain(ends.latents, weights)
        labels = _along_chain(asked.class_labels, weights)
        return self._decode(
            ends, mixed, 1, batch_size, output_type, common | conditions | {"class_labels": labels}
        )

    @torch.no_grad()
    def grid(
        self,
        *,
        seeds: Sequence[int] | int | None = None,
        latents: torch.Tensor | None = None,
        images: ImageInput | None = None,
        rows: int = 8,
        columns: int = 8,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        refinements: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        output_type: str = "pil",
        **conditions: Any,
    ) -> InterpolationOutput:
        """Interpolate between four corners (DDIM, App. D.5): down the sides, then across.

        Args:
            seeds: four corners, top left, top right, bottom left, bottom right; or `latents` or
                `images`.
            latents: as in `__call__`.
            images: as in `__call__`.
            rows: >= 2.
            columns: >= 2.
            num_inference_steps: as in `__call__`.
            timesteps: as in `__call__`.
            refinements: as in `__call__`.
            batch_size: as in `__call__`.
            output_type: as in `__call__`.
            **conditions: as in `__call__`; one class for all, or one for each corner.

        Returns:
            rows * columns images, row by row.

        Raises:
            ValueError: unless there are four corners; otherwise as `__call__`.
        """
        _check_count("rows", rows)
        _check_count("columns", columns)
        common = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        asked = Conditions.of_call(conditions)
        ends = self._ends(seeds, latents, images, refinements, batch_size, common, asked)
        if len(ends.latents) != 4:
            raise ValueError(
                f"`{_given(seeds, latents)}` has {len(ends.latents)} corners; a grid must have "
                "four."
            )
        mixed = slerp_grid(ends.latents, rows, columns)
        labels = _over_grid(asked.class_labels, rows, columns)
        return self._decode(
            ends,
            mixed,
            rows,
            batch_size,
            output_type,
            common | conditions | {"class_labels": labels},
        )

    @torch.no_grad()
    def diffuse(
        self,
        images: ImageInput,
        timestep: int,
        *,
        num_points: int = 8,
        noise: str = "separate",
        noise_seeds: Sequence[int] = (0, 1),
        seed: int = 0,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        output_type: str = "pil",
        **conditions: Any,
    ) -> InterpolationOutput:
        """Interpolate between two images the DDPM way (DDPM, Sec. 4.3 and Fig. 8).

        Both images are diffused, x_t ~ q(x_t | x_0) and x_t' ~ q(x_t | x_0'), mixed linearly as
        (1 - w) x_t + w x_t', and decoded by the reverse process from t. The noise is fixed for all
        w, so that x_t and x_t' stay the same; the noise of the reverse steps is that of `seed` for
        all w, too.

        Args:
            images: two images; see `to_model_space`.
            timestep: t; where it is not on the trajectory, the nearest timestep that is takes its
                place, and a warning says which. The paper shows 500 of 1000. A larger t mixes
                more freely.
            num_points: pictures, both ends included, >= 2.
            noise: `separate`: each image gets its own draw, as the paper writes it; the mix then
                has less variance than x_t. `same`: both get the first draw; the mix of the noise
                keeps its variance.
            noise_seeds: of the two draws.
            seed: of the noise in the reverse steps.
            num_inference_steps: of the whole trajectory, of which the part from t down is run.
            timesteps: explicit trajectory instead.
            eta: as in generation.
            batch_size: as in `__call__`.
            output_type: as in `__call__`.
            **conditions: as in `__call__`.

        Raises:
            ValueError: unless there are two images, or for arguments that do not fit.
        """
        self.check()
        check_scheduler(self.scheduler, SINGLE_STEP, "`diffuse`")
        _check_count("num_points", num_points)
        x0 = self.x0_of(images, batch_size)
        if len(x0) != 2:
            raise ValueError(f"`images` holds {len(x0)}; DDPM's interpolation must have two.")
        eps = self._two_draws(noise, noise_seeds)
        planned = plan(
            self.scheduler, num_inference_steps, timesteps, self._execution_device
        ).tolist()
        t = nearest_planned(self._check_timestep(timestep), planned, "timestep")
        x_t = q_sample(x0, eps, Levels(self.scheduler).at(t))
        weights = [i / (num_points - 1) for i in range(num_points)]
        labels = Conditions.of_call(conditions).class_labels
        _check_ends(labels, 2)
        mixed = torch.stack([(1 - w) * x_t[0] + w * x_t[1] for w in weights])
        images_out = self.sibling(GenerationPipeline)(
            latents=mixed,
            start_timestep=t,
            seeds=[seed] * num_points,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            eta=eta,
            batch_size=batch_size,
            output_type=output_type,
            **conditions | {"class_labels": _along_chain(labels, weights[:-1])},
        ).images
        return InterpolationOutput(images_out, mixed, 1, timestep=t)

    def _check_timestep(self, timestep: int) -> int:
        big_t = self.scheduler.config.num_train_timesteps
        if isinstance(timestep, bool) or not isinstance(timestep, int) or not 0 <= timestep < big_t:
            raise ValueError(
                f"`timestep` is {timestep!r}; it must be an integer in 0 .. {big_t - 1}."
            )
        return timestep

    def _two_draws(self, noise: str, noise_seeds: Sequence[int]) -> torch.Tensor:
        if noise not in ("separate", "same"):
            raise ValueError(f"`noise` is {noise!r}; it must be 'separate' or 'same'.")
        checked = check_seeds(noise_seeds, "noise_seeds")
        if len(checked) != 2:
            raise ValueError(f"`noise_seeds` has {len(checked)} seeds; it must have two.")
        first, second = checked
        return self._noise_of([first, first if noise == "same" else second])

    def _noise_of(self, seeds: Sequence[int]) -> torch.Tensor:
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
        shape = (len(seeds), *self.image_shape)
        return draw(shape, generators, torch.device("cpu"), self.state_dtype)

    def _ends(
        self,
        seeds: Sequence[int] | int | None,
        latents: torch.Tensor | None,
        images: ImageInput | None,
        refinements: int,
        batch_size: int,
        common: dict[str, Any],
        asked: Conditions,
    ) -> _Ends:
        self.check()
        if sum(x is not None for x in (seeds, latents, images)) != 1:
            raise ValueError(
                "`seeds` or `latents` or `images` must be given, and only one of them."
            )
        if images is not None:
            if useless := sorted(asked.given() - {"class_labels"}):
                raise ValueError(
                    f"`{useless[0]}` is given with `images`, which are encoded and decoded without "
                    "guidance; it must be left out."
                )
            inverter = self.sibling(InversionPipeline)
            inversion = inverter(
                images,
                refinements=refinements,
                batch_size=batch_size,
                class_labels=asked.class_labels,
                **common,
            )
            decoder = self.sibling(GenerationPipeline, scheduler=inverter.decoding_scheduler())
            return _Ends(inversion.latents, decoder, inversion)
        if not is_deterministic(self.scheduler):
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__} that draws noise in its steps, "
                "so x_T does not determine the image; use "
                "GeneralizedDDIMScheduler.from_config(scheduler.config), whose eta is 0, or "
                "`diffuse` for DDPM's own interpolation."
            )
        if seeds is not None:
            x_end = self._noise_of(check_seeds(seeds))
        else:
            assert latents is not None
            x_end = self.check_latents(latents).cpu()
        _check_ends(asked.class_labels, len(x_end))
        return _Ends(x_end, self.sibling(GenerationPipeline), None)

    def _decode(
        self,
        ends: _Ends,
        mixed: torch.Tensor,
        rows: int,
        batch_size: int,
        output_type: str,
        settings: dict[str, Any],
    ) -> InterpolationOutput:
        # the seeds serve nothing: the decoder is deterministic
        output = ends.decoder(
            latents=mixed,
            seeds=[0] * len(mixed),
            batch_size=batch_size,
            output_type=output_type,
            **settings,
        )
        return InterpolationOutput(output.images, mixed, rows, ends.inversion)


def _given(seeds: Sequence[int] | int | None, latents: torch.Tensor | None) -> str:
    """Return the name of the argument that gave the ends."""
    return "seeds" if seeds is not None else "images" if latents is None else "latents"


def _check_ends(labels: ClassLabelInput | None, ends: int) -> None:
    if count_of(labels) not in (None, ends):
        raise ValueError(
            f"`class_labels` has {count_of(labels)} labels for {ends} ends; it must have one for "
            "each, or be a single label for all."
        )


def _along_chain(labels: ClassLabelInput | None, weights: list[float]) -> ClassLabelInput | None:
    """Return the labels of a chain of ends: each stretch at `weights`, then the last end."""
    if count_of(labels) is None:
        return labels
    ends = _listed(labels)
    pairs = [[a, b] for a, b in zip(ends, ends[1:], strict=False) for _ in weights]
    shares = [[1 - u, u] for _ in ends[1:] for u in weights]
    return ClassMixture([*pairs, [ends[-1]] * 2], [*shares, [1.0, 0.0]])


def _over_grid(labels: ClassLabelInput | None, rows: int, columns: int) -> ClassLabelInput | None:
    """Return the labels of a grid of four corners, row by row."""
    if count_of(labels) is None:
        return labels
    down = [i / (rows - 1) for i in range(rows)]
    across = [i / (columns - 1) for i in range(columns)]
    shares = [[(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u] for v in down for u in across]
    return ClassMixture(_listed(labels), shares)


def _listed(labels: Any) -> list[Any]:  # noqa: ANN401
    if isinstance(labels, ClassMixture):
        raise ValueError(
            "`class_labels` is a ClassMixture; it must be a class, or one for each end."
        )
    return labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else list(labels)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 2.")
