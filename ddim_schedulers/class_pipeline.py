"""The pipeline of a network with classes that a self-contained repository carries.

No class of diffusers samples a `UNet2DModel` with classes: `DDPMPipeline` raises "class_labels
should be provided". This one is enough to use such a repository where this package is not
installed. `ddim_schedulers.pipelines.GenerationPipeline` does the same and more.
"""

import inspect
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .class_labels import ClassLabels, class_labels_of


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images of classes, with classifier-free guidance (arXiv:2207.12598).

    Args:
        unet: a `UNet2DModel` with classes.
        scheduler: any scheduler whose `step` takes the network's output as it is.
    """

    model_cpu_offload_seq = "unet"  # type: ignore[assignment]
    stands_for = "DDPMPipeline"  # in the folder of one that no repository carries

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `model_index.json`, which names the file of this class where it has one."""
        index = json.loads(self.to_json_string())
        code = os.path.splitext(os.path.basename(__file__))[0]
        if code.startswith("ddim_schedulers_"):
            folder = os.path.dirname(os.path.abspath(json_file_path))
            target = os.path.join(folder, f"{code}.py")
            if os.path.abspath(target) != os.path.abspath(__file__):
                shutil.copyfile(__file__, target)
            index["_class_name"] = [code, type(self).__name__]
        else:
            index["_class_name"] = self.stands_for
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        negative_label: int | str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images.

        Args:
            class_labels: a class for all images, or one for each; names or numbers.
            num_images: how many; None: as many as labels, else 1.
            guidance_scale: w: eps_null + w (eps_class - eps_null), in one call of a doubled batch.
                1 is the class alone; 0 the null class, for which no label is needed.
            negative_label: a class in the place of the null class.
            generator: of the noise, one, or one for each image.
            num_inference_steps: number of steps.
            eta: passed to a scheduler that takes it.
            output_type: pil, np or pt.
            return_dict: False returns the tuple `(images,)`.

        Raises:
            ValueError: labels, a scale, a number of images or steps, an eta or an output type that
                do not fit.
        """
        for name, value in (
            ("num_images", num_images),
            ("num_inference_steps", num_inference_steps),
        ):
            if (value is not None or name != "num_images") and (
                type(value) is not int or value < 1
            ):
                raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 1.")
        if eta is not None and not (_is_number(eta) and eta >= 0):
            raise ValueError(f"`eta` is {eta!r}; it must be None or a number >= 0.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; it must be 'pil', 'np' or 'pt'.")
        classes = self._classes()
        labels = _labels(class_labels, classes, num_images, guidance_scale)
        other = _other_label(classes, negative_label, guidance_scale)
        device, config = self._execution_device, self.unet.config
        asked = None if classes is None else torch.tensor(labels, device=device)
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), config.in_channels, height, width)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "note_guidance"):  # ours, whose stored samplers belong to one w
            self.scheduler.note_guidance(guidance_scale)
            if negative_label is not None:
                self.scheduler.without_table("guidance")
        step = self.scheduler.step
        takes = inspect.signature(step).parameters
        settings = {"eta": eta, "generator": generator}
        settings = {k: v for k, v in settings.items() if v is not None and k in takes}
        for t in self.progress_bar(self.scheduler.timesteps):
            output = _predict(self.unet, x, t, asked, other, guidance_scale)
            x = step(output, t, x, **settings).prev_sample
        pixels = self._pixels(x)
        self.maybe_free_model_hooks()
        processor = VaeImageProcessor(vae_scale_factor=1)
        images = processor.postprocess(pixels.clamp(-1, 1), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _classes(self) -> ClassLabels | None:
        """Return the classes of the network."""
        classes = class_labels_of(self.unet)
        if classes is None:
            raise ValueError("`unet` has no classes; use DDPMPipeline.")
        return classes

    def _pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Return finished samples as images (N, C, H, W), about [-1, 1]."""
        return x


def _predict(
    unet: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor | None,
    other: int | None,
    w: float,
) -> torch.Tensor:
    """Return the guided prediction; where there is a learned variance, that of the class."""
    if labels is None:
        return unet(x.to(unet.dtype), t).sample.to(x.dtype)
    if other is None or w in (0, 1):
        labels = labels if w != 0 or other is None else torch.full_like(labels, other)
        return unet(x.to(unet.dtype), t, class_labels=labels).sample.to(x.dtype)
    both = torch.cat([torch.full_like(labels, other), labels])
    outputs = unet(torch.cat([x, x]).to(unet.dtype), t, class_labels=both).sample.to(x.dtype)
    base, conditional = outputs.chunk(2)
    mean, rest = conditional.tensor_split([x.shape[1]], dim=1)
    base = base[:, : x.shape[1]]
    return torch.cat([base + w * (mean - base), rest], dim=1)


def _labels(given: Any, classes: ClassLabels | None, count: int | None, w: float) -> list[int]:
    """Return the class of each image; zeros where there are none."""
    if classes is None:
        if given is not None:
            raise ValueError(
                f"`class_labels` is {given!r}, but `unet` has no classes; leave it out."
            )
        return [0] * (1 if count is None else count)
    if given is None:
        if w != 0 or classes.null_class is None:
            raise ValueError(f"`class_labels` is None; it must be {classes.allowed()}.")
        return [classes.null_class] * (1 if count is None else count)
    given = given.tolist() if hasattr(given, "tolist") else given  # an array or a tensor
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [classes.number(given)] * (1 if count is None else count)
    labels = [classes.number(label) for label in given]
    if not labels or count not in (None, len(labels)):
        raise ValueError(
            f"`class_labels` has {len(labels)} labels for {count} images; it must have one for "
            "each, or be a single label for all."
        )
    return labels


def _other_label(classes: ClassLabels | None, negative: int | str | None, w: float) -> int | None:
    """Return what guidance leads away from: a class, or the null class."""
    if not _is_number(w):
        raise ValueError(f"`guidance_scale` is {w!r}; it must be a finite number.")
    if classes is None:
        if w != 1 or negative is not None:
            raise ValueError(
                f"`guidance_scale` is {w!r} and `negative_label` {negative!r}, but `unet` has no "
                "classes; leave them out."
            )
        return None
    if negative is not None:
        return classes.number(negative, "negative_label")
    if classes.null_class is None and w != 1:
        raise ValueError(
            f"`guidance_scale` is {w!r}, but the network was trained without a null class; it must "
            "be 1, or give `negative_label`."
        )
    return classes.null_class


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < float("inf")  # type: ignore[arg-type]
