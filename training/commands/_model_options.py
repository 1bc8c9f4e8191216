"""Options that `sample`, `reconstruct` and `interpolate` share: model, scheduler, device."""

import argparse
from typing import Any

from ddim_schedulers.former import former
from ddim_schedulers.training.config import DTYPES

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
# Further options of sampling that encoding does not use.
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
RENAMED = {"class_labels": "--labels"}  # see `cli`
# The names of our classes in `--scheduler`.
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
        "--objective solver` stored for the number of calls, with its own timesteps, and few for "
        "any other; options that are given win",
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
    add_speed_arguments(parser)


def add_speed_arguments(parser: argparse.ArgumentParser, where: str = "") -> None:
    """Add what makes a network faster, for `speed_up`.

    Args:
        parser: of the verb.
        where: what help begins with: where they act, if not everywhere.
    """
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help=f"{where}of the network (float32)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help=f"{where}torch.compile the network: a minute at the start",
    )
    parser.add_argument(
        "--channels_last",
        action="store_true",
        help=f"{where}the network in channels_last memory format",
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
    if args.preset == "calibrated":  # the table holds eta
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


__getattr__ = former(
    __name__,
    "ddim_schedulers.training.commands._loading",
    ("check_own_scheduler", "load", "load_guides", "read_saved"),
)
