"""Options that `sample`, `reconstruct` and `interpolate` share: model, scheduler, device."""

import argparse
import inspect
import os
import reprlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddim_schedulers.plain_files import DamagedFileError, read_json
from ddim_schedulers.training.config import DTYPES

if TYPE_CHECKING:
    from ddim_schedulers.pipelines.base import UnconditionalPipeline

P = TypeVar("P", bound="UnconditionalPipeline")

# Options that set something in a scheduler of ours, by the config key.
SOLVER_OPTIONS = (
    "solver_order",
    "solver_form",
    "solver_variable",
    "solver_weights",
    "solver_corrector",
    "solver_corrector_order",
    "lower_order_final",
    "solver_calibrated",
)
# What else belongs to a sampler alone: encoding has no use for it.
SCALE_OPTIONS = ("eta_interval", "eps_scale", "end_scale")
SCHEDULER_OPTIONS = (
    "timestep_spacing",
    "quadratic_end",
    "reverse_variance",
    "variance_type",
    *SOLVER_OPTIONS,
    *SCALE_OPTIONS,
    "clip_sample",
    "clip_sample_range",
)
PIPELINE_HELP = "folder of a saved pipeline, a run or a checkpoint, or a Hub name"
PRESETS = ("few", "calibrated")
FEW_CALLS = 10  # steps of a preset, unless another number is given
# What `--scheduler` calls our classes.
NAMES = {"GeneralizedDDIMScheduler": "ddim", "MarkovianDDPMScheduler": "ddpm"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from ddim_schedulers.multistep import (
        MAX_ORDER,
        SOLVER_FORMS,
        SOLVER_VARIABLES,
        SOLVER_WEIGHTS,
    )
    from ddim_schedulers.planning import SCHEDULER_SPACINGS
    from ddim_schedulers.reverse_noise import REVERSE_VARIANCES, VARIANCE_TYPES

    parser.add_argument("--pipeline", required=True, help=PIPELINE_HELP)
    add_repository_arguments(parser)
    parser.add_argument(
        "--scheduler",
        choices=("saved", "ddim", "ddpm"),
        default="saved",
        help="the pipeline's own, or the scheduler classes of this package on its config (saved)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="few: good pictures in 5 to 50 network calls, by ddim with eta 0, solver_order 2, "
        "solver_corrector and trailing timesteps; calibrated: the table that `calibrate "
        "--objective solver` stored for the number of calls, and few for any other; options that "
        "are given win",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        help=f"steps; the trajectory of the config, else 50; {FEW_CALLS} with --preset",
    )
    parser.add_argument("--timesteps", type=int, nargs="+", help="explicit trajectory, decreasing")
    parser.add_argument("--eta", type=float, help="DDIM's eta; the saved one, else 0")
    parser.add_argument(
        "--eta_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of ddim: the shares of t / T between which eta acts; the saved ones, else everywhere",
    )
    parser.add_argument(
        "--eps_scale",
        type=float,
        nargs="+",
        metavar="K",
        help="of ddim or ddpm: divide eps by K, or by a line in t, K at t = 0 and K at t = T; the "
        "saved one if not given",
    )
    parser.add_argument(
        "--end_scale",
        type=float,
        help="of ddim or ddpm: multiply the finished sample by it; the saved one if not given",
    )
    parser.add_argument(
        "--timestep_spacing",
        choices=SCHEDULER_SPACINGS,
        help="of ddim or ddpm; the saved one if not given",
    )
    parser.add_argument(
        "--quadratic_end",
        type=float,
        help="of ddim or ddpm: where the quadratic trajectory ends, as a share of T; the saved one",
    )
    parser.add_argument(
        "--reverse_variance",
        choices=REVERSE_VARIANCES,
        help="of ddim, e.g. sigma_hat with --eta 1; the saved one if not given",
    )
    parser.add_argument(
        "--variance_type",
        choices=VARIANCE_TYPES,
        help="of ddpm, e.g. fixed_large; the saved one if not given",
    )
    orders = range(1, MAX_ORDER + 1)
    parser.add_argument(
        "--solver_order",
        type=int,
        choices=orders,
        help="of ddim: how many predictions a step uses; the saved one if not given",
    )
    parser.add_argument(
        "--solver_form",
        choices=SOLVER_FORMS,
        help="of ddim: what is interpolated at a higher order; the saved one if not given",
    )
    parser.add_argument(
        "--solver_variable",
        choices=SOLVER_VARIABLES,
        help="of ddim: what it is a polynomial of; the saved one if not given",
    )
    parser.add_argument(
        "--solver_weights",
        choices=SOLVER_WEIGHTS,
        help="of ddim: how a step of order 2 weighs the two predictions, with --solver_variable "
        "log_rho; the saved one if not given",
    )
    parser.add_argument(
        "--solver_corrector_order",
        type=int,
        choices=range(2, MAX_ORDER + 2),
        help="of ddim: how many predictions the corrector uses; the saved number if not given",
    )
    for option, what in (
        ("solver_corrector", "take each step of a higher order once more, at no network call"),
        ("lower_order_final", "end with a step of order 1"),
        ("solver_calibrated", "use the table that is stored for the number of calls"),
    ):
        parser.add_argument(
            f"--{option}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=f"of ddim: {what}; the saved setting if not given",
        )
    parser.add_argument(
        "--clip_sample",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="clip x_0-hat in ddim or ddpm; the saved setting if not given",
    )
    parser.add_argument(
        "--clip_sample_range",
        type=float,
        help="of ddim or ddpm: the largest |x_0-hat|; the saved one if not given",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images in one network call (64)"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; an accelerator where there is one"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the network (float32)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the network: a minute at the start"
    )
    parser.add_argument(
        "--channels_last", action="store_true", help="the network in channels_last memory format"
    )


def add_condition_arguments(parser: argparse.ArgumentParser, labels: str) -> None:
    """Add what says which classes are asked for, and how much they count.

    Args:
        parser: of the verb.
        labels: help of `--labels`.
    """
    parser.add_argument("--labels", nargs="+", metavar="CLASS", help=labels)
    parser.add_argument(
        "--guidance_scale",
        type=float,
        metavar="W",
        help="1: the class alone; above: it counts for more; 0: no class, or the guide alone",
    )
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the shares of t / T between which guidance acts (everywhere)",
    )
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        metavar="PHI",
        help="0 .. 1: give the prediction its deviation back (0)",
    )
    parser.add_argument(
        "--negative_label", metavar="CLASS", help="lead away from this class, not from no class"
    )
    parser.add_argument(
        "--guide",
        metavar="PATH",
        help="a pipeline, run or checkpoint of a weaker network, to lead away from",
    )
    parser.add_argument(
        "--classifier",
        metavar="PATH",
        help="a classifier of `train-classifier`, to lead to --labels",
    )


CONDITION_OPTIONS = ("guidance_scale", "guidance_interval", "guidance_rescale", "negative_label")


def conditions_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of generation that the options of guidance set; not the networks."""
    return {key: v for key in CONDITION_OPTIONS if (v := getattr(args, key)) is not None}


def labels_of(args: argparse.Namespace) -> Any:  # noqa: ANN401
    """Return `--labels` as the pipelines take them: one for all, or a list."""
    return args.labels[0] if args.labels is not None and len(args.labels) == 1 else args.labels


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
        found["guide"] = saved.unet.to(device=pipe.device, dtype=pipe.unet.dtype)
    if args.classifier is not None:
        from ddim_schedulers.training.networks.noisy_classifier import load_noisy_classifier

        found["classifier"] = load_noisy_classifier(args.classifier).to(pipe.device)
    return found


def add_repository_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a repository of the Hub is read."""
    parser.add_argument(
        "--revision",
        help="branch, tag or commit of a Hub name; `--pipeline USER/NAME@REVISION` says the same",
    )
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read weights from a .bin file where there are none as safetensors",
    )


def apply_preset(args: argparse.Namespace) -> None:
    """Put the settings of `--preset` where no option says otherwise.

    Raises:
        ValueError: for `--scheduler ddpm`, which has none of them.
    """
    if args.preset is None:
        return
    from ddim_schedulers import CALIBRATED, FEW_STEPS

    if args.scheduler == "ddpm":
        raise ValueError(
            f"`--preset` is {args.preset!r}; it must be left out with --scheduler ddpm, for it "
            "belongs to ddim."
        )
    args.scheduler = "ddim"
    # a solver of higher order follows the ODE, even if the saved scheduler adds noise
    few = {**FEW_STEPS, "eta": 0.0, "reverse_variance": "sigma"}
    if args.preset == "calibrated":  # the table says which eta
        few = {**CALIBRATED, "reverse_variance": "sigma"}
    if args.solver_order == 1:
        del few["solver_corrector"]
    for key, value in few.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.num_inference_steps is None and args.timesteps is None:
        args.num_inference_steps = FEW_CALLS


def refuse_solver(args: argparse.Namespace, why: str) -> None:
    """Refuse options of the solver where every step is plain DDIM, of order 1.

    Raises:
        ValueError: naming the option.
    """
    for key in ("preset", *SOLVER_OPTIONS, *SCALE_OPTIONS):
        if getattr(args, key) is not None:
            raise ValueError(
                f"`--{key}` is {getattr(args, key)!r}; it must be left out here: {why}."
            )


def eta_of_call(args: argparse.Namespace) -> float | None:
    """Return the eta to pass in sampling; with `--scheduler ddim` the config holds it instead."""
    return None if args.scheduler == "ddim" else args.eta


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
    try:
        pipe = pipe.to(_device(args.device))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"`--device` is {args.device!r}; it must be a device that torch can use: {error}"
        ) from error
    return pipe.speed_up(
        compile=args.compile,
        channels_last=args.channels_last,
        dtype=getattr(torch, args.dtype),
    )


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
        def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
            DiffusionPipeline.__init__(self)
            self.register_modules(unet=unet, scheduler=scheduler)

    logging.disable_progress_bar()
    place = repositories.pinned(place, revision)
    found = places.find(place, option, weights)
    if found.checkpoint is not None:
        from ddim_schedulers.training.networks.checkpoint_network import load_checkpoint

        unet, scheduler, said = load_checkpoint(found.checkpoint, weights)
        if process_of()[0] == 0:
            print(f"{option}: {said}", file=sys.stderr)
        return Saved(unet, scheduler)
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
    there.finish(saved.unet)
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
    # the same betas in numbers, and a measurement that other settings make use of
    silent = {"trained_betas", "beta_schedule", "calibration"}
    if args.eta == restored.get("eta"):
        silent.add("eta")
    # the private key also holds what travels with the class unused: its own settings are applied
    settings = [
        f"{key}={reprlib.repr(restored[key])}"
        for key in sorted((private["settings"].keys() & defaults.keys()) - silent)
        if restored[key] != scheduler.config.get(key, defaults[key].default)
    ]
    return (owner, settings) if settings else None


def _scheduler(saved: Any, args: argparse.Namespace) -> Any:  # noqa: ANN401
    given = {k: getattr(args, k) for k in SCHEDULER_OPTIONS if getattr(args, k) is not None}
    if args.scheduler == "saved":
        for key, value in given.items():
            raise ValueError(
                f"`--{key}` is {value!r}; it must be left out where the saved scheduler stays as "
                "it is (it needs --scheduler ddim or ddpm)."
            )
        return saved
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
    if args.preset is not None:  # the trajectory and the noise of the saved one are not its own
        given = {"timesteps": None, "sigma": None, "eta_interval": None, "eta": None, **given}
    if given.get("solver_order") == 1 and "solver_corrector" not in given:
        given |= {"solver_corrector": False, "solver_corrector_order": None}  # of a higher order
    return cls.from_config(saved.config, **given)


def _device(name: str | None) -> str:
    import torch

    if name is not None:
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
