"""What the playground does, without a browser: settings in, pictures and code out."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddim_schedulers.class_labels import class_labels_of
from ddim_schedulers.pipelines import (
    GenerationPipeline,
    InterpolationPipeline,
    InversionPipeline,
    RestorationPipeline,
    make_grid,
    path_grid,
)
from ddim_schedulers.pipelines.image_files import BadImageError, Reading, decode
from ddim_schedulers.pipelines.images import PIL_MODES, read_image, to_model_space, to_pil, to_uint8
from ddim_schedulers.pipelines.restoration.tasks import MASKS, task_named
from ddim_schedulers.training.app.settings import Choice, Settings, called, choose, command_line
from ddim_schedulers.training.commands import _loading, _model_options
from ddim_schedulers.training.common.repositories import divided
from ddim_schedulers.training.data.fitting import fit_image
from ddim_schedulers.training.networks.places import SHIPPED, pipeline_folder

FITS = ("exact", "resize_crop", "squash")
COLUMNS = 10  # steps that are shown of a path
PICTURE, MASK = "picture.png", "mask.png"

# Told after each network call what is going on, with a picture where there is one. An exception
# that it raises ends the run.
Report = Callable[[str, Image.Image | None], None]


@dataclass(frozen=True)
class Limits:
    """What one run may ask for: images, network calls of a sample, pixels of an upload."""

    num_images: int = 16
    steps: int = 250
    pixels: int = 32_000_000


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        images: PIL images, one or more.
        captions: one for each image.
        python: lines that make the same.
        command: a command that makes the same, or a comment on why there is none.
        note: a sentence on the result, or ''.
        files: pictures by the names that the code and the command use.
    """

    images: list[Image.Image]
    captions: list[str]
    python: str
    command: str
    note: str = ""
    files: dict[str, Image.Image] = field(default_factory=dict)


def silent(text: str, picture: Image.Image | None) -> None:
    """Take a report and say nothing."""


class Playground:
    """A pipeline that is read once, and one method for each tab; one run at a time.

    Args:
        place: folder of a saved pipeline or of a run, or a name on the Hub.
        device: of torch; None takes an accelerator where there is one.
        limits: see `Limits`.

    Raises:
        ValueError: for a place or a device that cannot be used.
    """

    def __init__(self, place: str, device: str | None = None, limits: Limits | None = None) -> None:
        found = pipeline_folder(place, "--pipeline")
        # the code that is shown names what comes with the package, wherever that is installed
        self.shipped = found == str(SHIPPED.get(place))
        self.place = place if self.shipped else found
        self.limits = Limits() if limits is None else limits
        saved = _loading.read_saved(found)
        self.device = _loading.device_named(device)
        self.saved = _loading.moved(saved, self.device)
        self.labels = class_labels_of(self.saved.unet)
        self._lock = threading.Lock()

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the images, which are decoded where the network has latents."""
        return self.saved.picture_shape

    @property
    def no_restoration(self) -> str | None:
        """Return why pictures cannot be restored; None where they can."""
        return None if self.saved.vae is None else RestorationPipeline._refuses_vae

    def class_names(self) -> list[str]:
        """Return the names of the classes, their numbers where they have none; [] without any."""
        if self.labels is None:
            return []
        return [self.labels.name(number) for number in self.labels.ids]

    def sample(self, settings: Settings, report: Report = silent) -> Result:
        """Return samples of `num_images` seeds."""
        choice, pipe = self._pipe(GenerationPipeline, settings)
        arguments = self._arguments(settings, choice)
        with self._run(report):
            images = pipe(**arguments).images
        python = self._python(
            "GenerationPipeline", choice, f"images = {called('pipe', **arguments)}.images"
        )
        return Result(
            images, self._captions(settings), python, self._sample_command(settings, choice)
        )

    def watch(self, settings: Settings, report: Report = silent) -> Result:
        """Return x_t and x0_hat along the trajectory, a row for each image; reports each step."""
        choice, pipe = self._pipe(GenerationPipeline, settings)
        arguments = {**self._arguments(settings, choice), "return_path": True}

        def step(_: Any, index: int, t: int, tensors: dict[str, torch.Tensor]) -> None:  # noqa: ANN401
            found = [x for x in tensors.values() if x is not None]
            frame = to_pil(to_uint8(pipe.pixels_of(torch.cat(found).cpu())))
            report(f"step {index + 1}, t = {int(t)}", make_grid(frame, settings.num_images))

        with self._run(report):
            output = pipe(
                **arguments,
                callback_on_step_end=step,
                callback_on_step_end_tensor_inputs=("latents", "pred_original_sample"),
            )
        path = output.path
        picked = np.linspace(0, len(path.x_t) - 1, min(COLUMNS, len(path.x_t))).round().astype(int)
        frames = path.x_t[picked.tolist()]
        noisy = pipe.pixels_of(frames.transpose(0, 1).flatten(0, 1))
        decode = None if self.saved.vae is None else pipe.pixels_of
        decoded = "" if decode is None else ", decode=pipe.pixels_of"
        lines = (
            f"output = {called('pipe', **arguments)}",
            f'path_grid(output.path, {COLUMNS}{decoded}).save("path.png")',
        )
        python = self._python("GenerationPipeline, path_grid", choice, *lines)
        strips = [
            make_grid(to_pil(to_uint8(noisy)), len(picked)),
            path_grid(path, COLUMNS, decode=decode),
        ]
        command = self._sample_command(settings, choice)
        return Result(strips, ["x_t", "x0_hat"], python, command)

    def compare(self, first: Settings, second: Settings, report: Report = silent) -> Result:
        """Return samples of two samplers; seeds, classes and guidance are those of `first`."""
        same = ("seed", "num_images", "labels", "guidance_scale")
        second = replace(second, **{key: getattr(first, key) for key in same})
        for settings in (first, second):  # both are checked before the first network call
            self._arguments(settings, choose(settings, self.saved.scheduler))
        one, other = self.sample(first, report), self.sample(second, report)
        arrays = [np.stack([np.asarray(i) for i in r.images]) / 255 for r in (one, other)]
        difference = float(np.abs(arrays[0] - arrays[1]).mean())
        return Result(
            [make_grid(r.images) for r in (one, other)],
            ["first", "second"],
            f"# first\n{one.python}\n\n# second\n{other.python}",
            f"{one.command}\n{other.command.replace('--output samples', '--output samples-2')}",
            f"Mean absolute difference of the two, for values in 0 .. 1: {difference:.4f}.",
        )

    def interpolate(
        self, settings: Settings, other_seed: int, num_points: int = 8, report: Report = silent
    ) -> Result:
        """Return a chain of `num_points` images from `settings.seed` to `other_seed`."""
        self._within("num_points", num_points, 2, self.limits.num_images)
        choice, pipe = self._pipe(InterpolationPipeline, settings)
        if settings.eta:
            raise ValueError(f"`eta` is {settings.eta}; it must be 0, for no noise is drawn here.")
        arguments = {
            "seeds": [_integer("seed", settings.seed), _integer("other_seed", other_seed)],
            "num_points": num_points,
            **self._steps(choice),
            **settings.conditions(2),
        }
        with self._run(report):
            images = pipe(**arguments).images
        python = self._python(
            "InterpolationPipeline", choice, f"images = {called('pipe', **arguments)}.images"
        )
        words = ["--seeds", str(settings.seed), str(other_seed), "--num_points", str(num_points)]
        both = replace(settings, labels=tuple(arguments.get("class_labels", ())))
        command = self._command("interpolate", both, choice, *words, "--output", "chain")
        captions = [f"{i / (num_points - 1):.2f}" for i in range(num_points)]
        return Result(images, captions, python, command)

    def reconstruct(
        self,
        settings: Settings,
        picture: str | None,
        fit: str = "exact",
        refinements: int = 0,
        report: Report = silent,
    ) -> Result:
        """Encode a picture with DDIM and decode it again."""
        self._within("refinements", refinements, 0, 20)
        settings = replace(settings, num_images=1, labels=settings.labels[:1], guidance_scale=None)
        choice, pipe = self._pipe(InversionPipeline, settings)
        if choice.options is not None:
            _model_options.refuse_solver(
                choice.options, "reconstruction is plain DDIM of order 1 both ways"
            )
        if settings.eta:
            raise ValueError(
                f"`eta` is {settings.eta}; it must be 0, for reconstruction is deterministic."
            )
        image, note = self._picture(picture, fit)
        arguments = {"refinements": refinements, **self._steps(choice), **settings.conditions(1)}
        with self._run(report):
            output = pipe.reconstruct(image, **arguments)
        line = called("pipe.reconstruct", f'"{PICTURE}"', **arguments)
        python = self._python("InversionPipeline", choice, f"images = {line}.images")
        words = ["--images", PICTURE, "--refinements", str(refinements), "--output", "again"]
        command = self._command("reconstruct", settings, choice, *words)
        error = float(output.error.mean())
        return Result(
            [image, output.images[0]],
            ["picture", "reconstruction"],
            python,
            command,
            f"{note}Error per dimension, for values in 0 .. 1: {error:.6g}.",
            {PICTURE: image},
        )

    def restore(
        self,
        settings: Settings,
        picture: str | None,
        fit: str = "exact",
        mask: str = "half",
        mask_file: str | None = None,
        report: Report = silent,
    ) -> Result:
        """Fill the hole of a picture `num_images` times (DDNM).

        Args:
            settings: of the sampler; the first of its classes is that of the picture.
            picture: an image file.
            fit: how it becomes as large as the network's images.
            mask: `half`, `centre` or `random`; not used with `mask_file`.
            mask_file: an image whose white pixels are known, the others black.
            report: see `Report`.
        """
        if mask not in MASKS:
            raise ValueError(f"`mask` is {mask!r}; it must be one of {MASKS}.")
        settings = replace(settings, labels=settings.labels[:1])
        choice, pipe = self._pipe(RestorationPipeline, settings)
        image, note = self._picture(picture, fit)
        files, given, line = {PICTURE: image}, mask, repr(mask)
        known: Any = mask
        if mask_file is not None:
            files[MASK] = self._mask(mask_file, fit)
            known, given = torch.from_numpy(np.array(files[MASK]) == 255), MASK
            line = f'torch.from_numpy(np.array(Image.open("{MASK}")) == 255)'
        task = task_named("inpaint", self.picture_shape, mask=known)
        y = task.operator.A(to_model_space(image, self.picture_shape, pipe.state_dtype))
        arguments = self._arguments(settings, choice)
        count = {"method": "ddnm", "num_samples": settings.num_images}
        with self._run(report):
            images = pipe(y, task.operator, **count, **arguments).images
        lines = (
            f'task = task_named("inpaint", pipe.image_shape, mask={line})',
            f'picture = to_model_space("{PICTURE}", pipe.image_shape, pipe.state_dtype)',
            "y = task.operator.A(picture)",
            f"images = {called('pipe', 'y', 'task.operator', **count, **arguments)}.images",
        )
        imports = [
            "from ddim_schedulers.pipelines.images import to_model_space",
            "from ddim_schedulers.pipelines.restoration.tasks import task_named",
        ]
        if mask_file is not None:
            imports = ["import numpy as np", "import torch", "from PIL import Image", *imports]
        python = "\n".join([*imports, self._python("RestorationPipeline", choice, *lines)])
        words = ["--images", PICTURE, "--task", "inpaint", "--mask", given]
        words += ["--num_samples", str(settings.num_images), "--seed", str(settings.seed)]
        command = self._command("restore", settings, choice, *words, "--output", "restored")
        seen = to_pil(to_uint8(task.shown(y)))[0]
        captions = ["picture", "what is known", *self._captions(settings)]
        return Result([image, seen, *images], captions, python, command, note.strip(), files)

    def _pipe(self, cls: Any, settings: Settings) -> tuple[Choice, Any]:  # noqa: ANN401
        choice = choose(settings, self.saved.scheduler)
        pipe = cls.from_pipe(self.saved, scheduler=choice.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return choice, pipe

    def _steps(self, choice: Choice) -> dict[str, Any]:
        """Return the number of steps as an argument, if it is given; checks it."""
        steps = choice.arguments.get("num_inference_steps")
        if steps is None:
            return {}
        self._within("num_inference_steps", steps, 1, self.limits.steps)
        return {"num_inference_steps": steps}

    def _arguments(self, settings: Settings, choice: Choice) -> dict[str, Any]:
        self._within("num_images", settings.num_images, 1, self.limits.num_images)
        first = _integer("seed", settings.seed)
        return {
            "seeds": list(range(first, first + settings.num_images)),
            **self._steps(choice),
            **({"eta": choice.arguments["eta"]} if "eta" in choice.arguments else {}),
            **settings.conditions(settings.num_images),
        }

    def _within(self, name: str, value: object, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer in {low} .. {high}.")

    def _captions(self, settings: Settings) -> list[str]:
        names = settings.conditions(settings.num_images).get("class_labels")
        seeds = [f"seed {settings.seed + i}" for i in range(settings.num_images)]
        return seeds if names is None else [f"{s}, {n}" for s, n in zip(seeds, names, strict=True)]

    def _sample_command(self, settings: Settings, choice: Choice) -> str:
        words = ["--num_images", str(settings.num_images), "--seed", str(settings.seed)]
        return self._command("sample", settings, choice, *words, "--output", "samples")

    def _command(self, verb: str, settings: Settings, choice: Choice, *words: str) -> str:
        return command_line(verb, self.place, choice, settings, *words, "--device", self.device)

    def _python(self, classes: str, choice: Choice, *lines: str) -> str:
        name, revision = divided(self.place)
        named = {} if revision is None else {"revision": revision}
        cls = classes.partition(",")[0]
        there = f"SHIPPED[{name!r}]" if self.shipped else repr(name)
        start = called(f"{cls}.from_pretrained", there, **named)
        device = "" if self.device == "cpu" else f".to({self.device!r})"
        shipped = "from ddim_schedulers.training.networks.places import SHIPPED"
        return "\n".join(
            [
                *([choice.imports] if choice.imports else []),
                f"from ddim_schedulers.pipelines import {classes}",
                *([shipped] if self.shipped else []),
                f"pipe = {start}{device}",
                *choice.lines,
                *lines,
            ]
        )

    def _picture(self, path: str | None, fit: str) -> tuple[Image.Image, str]:
        """Return an uploaded picture as the network takes it, and what was done to it."""
        if path is None:
            raise ValueError("`picture` is missing; it must be an image file.")
        if fit not in FITS:
            raise ValueError(f"`fit` is {fit!r}; it must be one of {FITS}.")
        channels, height, width = self.picture_shape
        if fit == "exact":
            image = read_image(path, "picture")
            to_model_space(image, self.picture_shape, torch.float32)
            return image, ""
        pixels = self._pixels(path, PIL_MODES.get(channels, "RGB"), "picture")
        have = pixels.shape[-2:]
        fitted = fit_image(torch.from_numpy(pixels) / 127.5 - 1, (height, width), fit)
        how = {"resize_crop": "resized and cut to its middle", "squash": "resized"}[fit]
        note = f"The picture of {have[1]}x{have[0]} was {how}: {width}x{height}. "
        return to_pil(to_uint8(fitted[None]))[0], "" if have == (height, width) else note

    def _mask(self, path: str, fit: str) -> Image.Image:
        """Return a mask as large as the network's images, of black and white alone."""
        _, height, width = self.picture_shape
        pixels = torch.from_numpy(self._pixels(path, "L", "mask"))
        if not bool(((pixels == 0) | (pixels == 255)).all()):
            raise ValueError("`mask` has grey pixels; each must be black or white.")
        fitted = fit_image(pixels / 127.5 - 1, (height, width), fit)
        if tuple(fitted.shape[-2:]) != (height, width):
            raise ValueError(
                f"`mask` is {pixels.shape[-1]}x{pixels.shape[-2]}; it must be {width}x{height}, or "
                "`fit` resize_crop or squash."
            )
        return Image.fromarray(np.where(fitted[0].numpy() > 0, 255, 0).astype(np.uint8))

    def _pixels(self, path: str, mode: str, name: str) -> np.ndarray:
        reading = Reading(mode=mode, max_pixels=self.limits.pixels, setting=name)
        try:
            return decode(Path(path), repr(Path(path).name), reading)
        except BadImageError as error:
            raise ValueError(
                f"`{name}` is {error.name}, which cannot be read: {error.reason}; it must be an "
                "image."
            ) from error

    @contextmanager
    def _run(self, report: Report) -> Iterator[None]:
        """Let one run have the network; reports each of its calls."""
        calls = 0

        def before(_: torch.nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            t = torch.as_tensor(inputs[1] if len(inputs) > 1 else named["timestep"])
            report(f"network call {calls}, t = {int(t.max())}", None)

        with self._lock:
            module: Any = self.saved.unet
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 0.")
    return value
