"""What a person chooses in the playground, as a scheduler, a command line and lines of Python.

The choice is read by the parser of the commands, so that the command that is shown cannot differ
from what runs.
"""

import argparse
import shlex
from dataclasses import dataclass
from typing import Any, NoReturn

from ddim_schedulers.training.commands import _loading, _model_options

# Stock classes that fit the pipelines; the command line has ours alone.
STOCK = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
SCHEDULERS = ("saved", "ddim", "ddpm", *STOCK)
_OPTIONS = (
    "preset",
    "num_inference_steps",
    "eta",
    "timestep_spacing",
    "solver_order",
    "solver_form",
    "solver_variable",
    "solver_weights",
)
# What a stock class has no word for.
_OURS = ("preset", *_OPTIONS[4:], "solver_corrector")


@dataclass(frozen=True)
class Settings:
    """What to sample, and how; None leaves a setting to the pipeline.

    Attributes:
        scheduler: one of `SCHEDULERS`.
        preset: as `--preset`: few or calibrated.
        num_inference_steps: S.
        eta: of the family.
        timestep_spacing: of the scheduler.
        solver_order: of the solver, as are the four below.
        solver_form: see `docs/solvers.md`.
        solver_variable: see `docs/solvers.md`.
        solver_weights: see `docs/solvers.md`.
        solver_corrector: see `docs/solvers.md`.
        seed: image i has the seed `seed` + i.
        num_images: how many.
        labels: classes by name or number: image i has class i modulo their number.
        guidance_scale: w of classifier-free guidance.
    """

    scheduler: str = "saved"
    preset: str | None = None
    num_inference_steps: int | None = 20
    eta: float | None = None
    timestep_spacing: str | None = None
    solver_order: int | None = None
    solver_form: str | None = None
    solver_variable: str | None = None
    solver_weights: str | None = None
    solver_corrector: bool | None = None
    seed: int = 0
    num_images: int = 4
    labels: tuple[str, ...] = ()
    guidance_scale: float | None = None

    def sampler_words(self) -> list[str]:
        """Return the options of the command line that set the sampler."""
        words = [] if self.scheduler == "saved" else ["--scheduler", self.scheduler]
        for key in _OPTIONS:
            if (value := getattr(self, key)) is not None:
                words += [f"--{key}", str(value)]
        if self.solver_corrector is not None:
            words.append("--solver_corrector" if self.solver_corrector else "--no-solver_corrector")
        return words

    def condition_words(self) -> list[str]:
        """Return the options that set classes and guidance."""
        words = ["--labels", *self.labels] if self.labels else []
        if self.guidance_scale is not None:
            words += ["--guidance_scale", str(self.guidance_scale)]
        return words

    def conditions(self, count: int) -> dict[str, Any]:
        """Return the arguments of a pipeline that set classes and guidance of `count` images."""
        found: dict[str, Any] = {}
        if self.labels:
            found["class_labels"] = [self.labels[i % len(self.labels)] for i in range(count)]
        if self.guidance_scale is not None:
            found["guidance_scale"] = self.guidance_scale
        return found


@dataclass(frozen=True)
class Choice:
    """Settings as they are used.

    Attributes:
        scheduler: a new one.
        arguments: of the pipeline's call: steps and eta.
        options: the parsed options; None for a stock class, which the command line does not have.
        imports: a line of Python that imports the class, '' for the saved one.
        lines: lines of Python that put the scheduler into `pipe`.
    """

    scheduler: Any
    arguments: dict[str, Any]
    options: argparse.Namespace | None
    imports: str
    lines: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def choose(settings: Settings, saved: Any) -> Choice:  # noqa: ANN401
    """Return the scheduler of `settings` on the config of the `saved` one, and what makes it.

    Raises:
        ValueError: for settings that do not fit each other or the scheduler.
    """
    if settings.scheduler not in SCHEDULERS:
        raise ValueError(f"`scheduler` is {settings.scheduler!r}; it must be one of {SCHEDULERS}.")
    if settings.scheduler in STOCK:
        return _stock(settings, saved)
    parser = _Parser(add_help=False, allow_abbrev=False)
    _model_options.add_model_arguments(parser)
    args = parser.parse_args(["--pipeline", "", *settings.sampler_words()])
    _model_options.apply_preset(args)
    cls, given = _loading.scheduler_settings(args)
    scheduler = saved if cls is None else cls.from_config(saved.config, **given)
    _loading.check_own_scheduler(scheduler, args)
    arguments = {
        "num_inference_steps": args.num_inference_steps,
        "eta": _model_options.eta_of_call(args),
    }
    made = {} if cls is None else given
    return Choice(scheduler, _given(arguments), args, *_python(cls, "ddim_schedulers", made))


def _stock(settings: Settings, saved: Any) -> Choice:  # noqa: ANN401
    import diffusers

    for key in _OURS:
        if (value := getattr(settings, key)) is not None:
            raise ValueError(
                f"`{key}` is {value!r}; it must be left out with {settings.scheduler}, for it "
                "belongs to the schedulers of this package."
            )
    cls = getattr(diffusers, settings.scheduler)
    given = _given({"timestep_spacing": settings.timestep_spacing})
    scheduler = cls.from_config(saved.config, **given)
    arguments = {"num_inference_steps": settings.num_inference_steps, "eta": settings.eta}
    return Choice(scheduler, _given(arguments), None, *_python(cls, "diffusers", given))


def _python(cls: Any, package: str, given: dict[str, Any]) -> tuple[str, tuple[str, ...]]:  # noqa: ANN401
    if cls is None:
        return "", ()
    line = called(f"{cls.__name__}.from_config", "pipe.scheduler.config", **given)
    return f"from {package} import {cls.__name__}", (f"pipe.scheduler = {line}",)


def called(name: str, *arguments: str, **named: Any) -> str:
    """Return a call as Python text; `arguments` are text already."""
    words = [*arguments, *(f"{key}={value!r}" for key, value in named.items())]
    return f"{name}({', '.join(words)})"


def command_line(verb: str, place: str, choice: Choice, settings: Settings, *words: str) -> str:
    """Return the command of a verb with the settings, or why there is none."""
    if choice.options is None:
        return (
            f"# The command line has the schedulers ddim and ddpm of this package; "
            f"{settings.scheduler} is for the Python lines."
        )
    line = ["ddim-schedulers", verb, "--pipeline", place, *settings.sampler_words()]
    return shlex.join([*line, *settings.condition_words(), *words])


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}
