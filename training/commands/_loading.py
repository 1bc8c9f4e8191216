"""Loading the pipeline that the options of `_model_options` ask for, on its device."""

import argparse
import inspect
import os
import reprlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddim_schedulers.plain_files import DamagedFileError, read_json
from ddim_schedulers.training.commands._model_options import NAMES, SCHEDULER_OPTIONS, eta_of_call

if TYPE_CHECKING:
    from ddim_schedulers.pipelines.base import UnconditionalPipeline

P = TypeVar("P", bound="UnconditionalPipeline")


def load_guides(pipe: "UnconditionalPipeline", args: argparse.Namespace) -> dict[str, Any]:
    """Load the networks of `--guide` and `--classifier` to where the pipeline is.

    Raises:
        ValueError: for one that cannot be read, or a guide of another process than the pipeline's.
    """
    found: dict[str, Any] = {}
    if args.guide is not None:
        from ddim_schedulers.pipelines.conditions import check_same_process

        saved = read_saved(args.guide, allow_pickle=args.allow_pickle, option="--guide")
        check_same_process(pipe.scheduler, saved.scheduler, "guide")
        found["guide"] = saved.to(pipe.device).speed_up(dtype=pipe.unet.dtype).unet
    if args.classifier is not None:
        from ddim_schedulers.training.networks.noisy_classifier import load_noisy_classifier

        classifier: Any = load_noisy_classifier(args.classifier)
        found["classifier"] = classifier.to(pipe.device)
    return found


def load(cls: type[P], args: argparse.Namespace) -> P:
    """Load the pipeline as `cls`, with the scheduler that was asked for, on the device.

    Raises:
        ValueError: for a pipeline that cannot be read or does not fit, or options that the chosen
            scheduler does not have.
    """
    import torch

    saved = read_saved(args.pipeline, revision=args.revision, allow_pickle=args.allow_pickle)
    if args.scheduler == "saved" and not isinstance(saved.scheduler, cls.accepted_schedulers):
        raise ValueError(
            f"`--pipeline` is {args.pipeline!r}, saved with {type(saved.scheduler).__name__}, "
            f"which does not fit {cls.__name__}; use --scheduler ddim or ddpm."
        )
    pipe = cls.from_pipe(saved, scheduler=_scheduler(saved.scheduler, args))
    # the name of from_pretrained's own argument for the dtype differs between versions of diffusers
    return moved(pipe, device_named(args.device)).speed_up(
        compile=args.compile,
        channels_last=args.channels_last,
        dtype=getattr(torch, args.dtype),
    )


def table_used(pipe: "UnconditionalPipeline") -> str:
    """Return in words that a pipeline has just sampled with a stored table, or ''."""
    scheduler: Any = pipe.scheduler
    if not getattr(scheduler, "follows_table", False):
        return ""
    return f"; sampled with the stored table of {len(scheduler.planned_pairs())} calls"


def read_saved(
    place: str,
    weights: str = "averaged",
    revision: str | None = None,
    allow_pickle: bool = False,
    option: str = "--pipeline",
) -> "UnconditionalPipeline":
    """Read a pipeline or checkpoint with any scheduler, which the options may replace.

    Args:
        place: a folder of a pipeline, a run or a checkpoint, or a name on the Hub.
        weights: see `places`.
        revision: of a name on the Hub.
        allow_pickle: see `repositories.fetch`.
        option: what gave `place`, for the messages.

    Raises:
        ValueError: saying in one sentence what is wrong with `place`.
    """
    from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel
    from diffusers.utils import logging

    from ddim_schedulers.pipelines.base import UnconditionalPipeline
    from ddim_schedulers.pipelines.sampling_job import process_of
    from ddim_schedulers.training.common import repositories
    from ddim_schedulers.training.networks import places

    class Saved(UnconditionalPipeline):
        def __init__(
            self,
            unet: UNet2DModel,
            scheduler: SchedulerMixin,
            vae: Any = None,  # noqa: ANN401
            vqvae: Any = None,  # noqa: ANN401
        ) -> None:
            DiffusionPipeline.__init__(self)
            vqvae = vqvae if vae is None else vae
            self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae)

    logging.disable_progress_bar()
    place = repositories.pinned(place, revision)
    found = places.find(place, option, weights)
    if found.checkpoint is not None:
        from ddim_schedulers.training.networks.checkpoint_network import (
            load_checkpoint,
            load_checkpoint_vae,
        )

        unet, scheduler, said = load_checkpoint(found.checkpoint, weights)
        if process_of()[0] == 0:
            print(f"{option}: {said}", file=sys.stderr)
        return Saved(unet, scheduler, vae=load_checkpoint_vae(found.checkpoint))
    try:
        there = repositories.fetch(found.name, option, allow_pickle=allow_pickle)
        _check_parts(there.folder, place, option)
        saved: Saved = there.read(Saved)
    except DamagedFileError as error:
        raise ValueError(f"`{option}` is {place!r}; its files must be whole: {error}") from error
    except OSError as error:
        raise ValueError(
            f"`{option}` is {place!r}; it must be a pipeline that can be loaded: "
            f"{' '.join(str(error).split())}"
        ) from error
    there.finish(saved.unet, saved.vae)
    if there.commit:
        saved.register_to_config(_name_or_path=there.commit)
    return saved


def _check_parts(folder: Path, place: str, option: str) -> None:
    parts = read_json(folder / "model_index.json")
    for name, alone in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        # the oldest repositories have their files beside the index
        if name not in parts or not ((folder / name).is_dir() or (folder / alone).is_file()):
            raise ValueError(
                f"`{option}` is {place!r}, which has no {name}; it must have a unet "
                "and a scheduler."
            )


def check_own_scheduler(scheduler: Any, args: argparse.Namespace) -> None:  # noqa: ANN401
    """Check the options that go to the pipeline's own scheduler, and say what it leaves out.

    Raises:
        ValueError: for an option that it does not take, naming the option that helps.
    """
    from ddim_schedulers.pipelines.compatibility import has_argument
    from ddim_schedulers.pipelines.sampling_job import process_of

    name = type(scheduler).__name__
    if eta_of_call(args) is not None and not has_argument(scheduler.step, "eta"):
        raise ValueError(f"`--eta` is {args.eta}, which does not fit {name}; use --scheduler ddim.")
    if args.timesteps is not None and not has_argument(scheduler.set_timesteps, "timesteps"):
        raise ValueError(
            f"`--timesteps` is {args.timesteps}, which does not fit {name}; use "
            "--scheduler ddim or ddpm."
        )
    left_out = _left_out(scheduler, args)
    if left_out and process_of()[0] == 0:
        owner, settings = left_out
        print(
            f"warning: {name} stands in for {owner} and does not apply {', '.join(settings)}; "
            f"--scheduler {NAMES[owner]} does.",
            file=sys.stderr,
        )


def _left_out(scheduler: Any, args: argparse.Namespace) -> tuple[str, list[str]] | None:  # noqa: ANN401
    """Return the class that a portable export replaces, and its settings that are not applied."""
    import ddim_schedulers
    from ddim_schedulers.plugin import SETTINGS_KEY

    private = scheduler.config.get(SETTINGS_KEY)
    owner = private.get("class") if isinstance(private, dict) else None
    if owner not in NAMES:
        return None
    restored = getattr(ddim_schedulers, owner).from_config(scheduler.config).config
    defaults = inspect.signature(getattr(ddim_schedulers, owner).__init__).parameters
    # not named: they repeat the betas, or only act through other settings
    silent = {"trained_betas", "beta_schedule", "calibration"}
    if args.eta == restored.get("eta"):
        silent.add("eta")
    # the private key also holds settings that this class does not have; they are not applied
    settings = [
        f"{key}={reprlib.repr(restored[key])}"
        for key in sorted((private["settings"].keys() & defaults.keys()) - silent)
        if restored[key] != scheduler.config.get(key, defaults[key].default)
    ]
    return (owner, settings) if settings else None


def _scheduler(saved: Any, args: argparse.Namespace) -> Any:  # noqa: ANN401
    cls, given = scheduler_settings(args)
    return saved if cls is None else cls.from_config(saved.config, **given)


def scheduler_settings(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the scheduler class that is asked for and its settings; None for the saved one.

    Raises:
        ValueError: for an option that the scheduler does not have.
    """
    given = {k: getattr(args, k) for k in SCHEDULER_OPTIONS if getattr(args, k) is not None}
    if args.scheduler == "saved":
        for key, value in given.items():
            raise ValueError(
                f"`--{key}` is {value!r}; it must be left out where the saved scheduler stays as "
                "it is (it needs --scheduler ddim or ddpm)."
            )
        return None, {}
    from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

    if args.eps_scale is not None and len(args.eps_scale) == 1:
        (given["eps_scale"],) = args.eps_scale
    cls = GeneralizedDDIMScheduler if args.scheduler == "ddim" else MarkovianDDPMScheduler
    own = inspect.signature(cls.__init__).parameters
    for key in given:
        if key not in own:
            raise ValueError(
                f"`--{key}` is {given[key]!r}; it must be left out with --scheduler "
                f"{args.scheduler}, which does not have it."
            )
    if args.scheduler == "ddim" and args.eta is not None:
        given["eta"] = args.eta
    if args.preset is not None:  # a preset replaces the saved trajectory and noise
        given = {"timesteps": None, "sigma": None, "eta_interval": None, "eta": None, **given}
    if given.get("solver_order") == 1 and "solver_corrector" not in given:
        given |= {
            "solver_corrector": False,
            "solver_corrector_order": None,
        }  # for order > 1
    return cls, given


def moved(pipe: P, device: str) -> P:
    """Return the pipeline on a device.

    Raises:
        ValueError: for a device that torch cannot use.
    """
    try:
        return pipe.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"`--device` is {device!r}; it must be a device that torch can use: {error}"
        ) from error


def device_named(name: str | None) -> str:
    """Return the device that is asked for, else an accelerator where there is one."""
    import torch

    if name is not None:
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
