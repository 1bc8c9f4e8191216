"""`ddim-schedulers calibrate`: statistics for optimal noise and trajectory, and fitted samplers."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ddim_schedulers.training.commands import _calibrate_samples

if TYPE_CHECKING:  # `--help` needs neither torch nor diffusers
    import torch

    from ddim_schedulers.pipelines.ownership import Owner
    from ddim_schedulers.training.common.processes import AccelerateTeam
    from ddim_schedulers.training.likelihood.measured_model import MeasuredModel

HELP = "Measure a pipeline for the optimal noise and trajectory, or fit a sampler to it."


# What acts in each kind of call; the rest is refused rather than ignored.
_WHERE = {"pipeline", "revision", "allow_pickle", "output"}
_RUN = {"objective", "num_images", "batch_size", "seed", "cpu"}
_OF_SPEED = {"dtype", "compile", "channels_last"}
_OF_TABLES = {"calls", "guidance_scale", "guidance_interval"}
_OF_SOLVER = {*_OF_TABLES, "held_out"}
_OF_SAMPLES = {*_OF_TABLES, "features"}
_IDLE_IN_SAMPLES = {"clip", "held_out", "trajectory_steps", "undo"}
_ACTS = {
    "--undo": _WHERE | {"undo", "cpu"},
    "--objective trajectory": _WHERE | _RUN | _OF_SPEED | {"trajectory_steps", "labels"},
    "--objective solver": (
        _WHERE | _RUN | _OF_SPEED | {"trajectory_steps", "work_dir", "labels"} | _OF_SOLVER
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from ddim_schedulers.training.commands._model_options import (
        add_repository_arguments,
        add_speed_arguments,
    )
    from ddim_schedulers.training.likelihood.measured_data import (
        add_data_arguments,
        add_label_arguments,
    )

    parser.add_argument("--pipeline", required=True, help="folder or Hub name of the pipeline")
    add_repository_arguments(parser)
    parser.add_argument(
        "--objective",
        choices=("likelihood", "trajectory", "solver", "samples"),
        default="likelihood",
        help="likelihood: statistics of all timesteps, for the 'optimal' noise and spacing, which "
        "need --data; trajectory: fine trajectories from noise, for the 'calibrated' spacing; "
        "solver: a table of weights and timesteps for each number of --calls, fitted to fine "
        "trajectories from noise, for --preset calibrated; samples: eta, its interval and two "
        "amplitudes for each number of --calls, by the distance of pictures to --data, on top of "
        "the stored table or of the formulas (likelihood)",
    )
    add_data_arguments(parser, required=False)
    add_label_arguments(parser)
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="for a network with classes: 'data' for the class of each image, and for samples all "
        "classes in turn; 'null' for the null class; of samples also classes, names or numbers, "
        "that are taken in turn (data)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        metavar="W",
        help="solver, samples: calibrate with classifier-free guidance at this scale; the preset "
        "then takes the table at this scale alone (no guidance)",
    )
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="solver, samples: the shares of t / T between which guidance acts (everywhere)",
    )
    _calibrate_samples.add_arguments(parser)
    parser.add_argument(
        "--num_images",
        type=int,
        help="likelihood: images M, each costs T network calls (100); trajectory: samples, each "
        "costs --trajectory_steps network calls (48); solver: samples that tables are fitted to "
        "(128); samples: pictures of a setting that comes to the end of the search (2000)",
    )
    parser.add_argument(
        "--calls",
        type=int,
        nargs="+",
        help="solver: numbers of network calls, each gets a table (5 7 10 15 20); samples: each "
        "gets settings of its own (5 10 20)",
    )
    parser.add_argument(
        "--held_out",
        type=int,
        default=64,
        help="solver: samples of other noise; a table that is no better there than the formulas "
        "is not stored (64)",
    )
    parser.add_argument(
        "--trajectory_steps",
        type=int,
        default=100,
        help="timesteps of the fine trajectory, which calibrated ones are chosen from or follow "
        "(100)",
    )
    parser.add_argument(
        "--output",
        help="folder or .json file for the scheduler's config with the statistics, made where it "
        "is missing; the pipeline's own otherwise. What it replaces is kept beside it",
    )
    parser.add_argument(
        "--undo",
        action="store_true",
        help="put back the config that the last calibration replaced, and measure nothing",
    )
    parser.add_argument(
        "--clip",
        choices=("config", "on", "off"),
        default="config",
        help="clip x0_hat to [-1, 1] where its error is measured (config: as the scheduler does)",
    )
    add_speed_arguments(parser, "trajectory, solver, samples: ")
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `likelihood` has too."""
    parser.add_argument("--batch_size", type=int, default=64, help="images in a call (64)")
    parser.add_argument("--seed", type=int, default=0, help="of images and noise (0)")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument(
        "--work_dir",
        help="where parts are kept until the end, so that an interrupted run goes on; all "
        "processes must see it",
    )


def run(args: argparse.Namespace) -> int:
    """Calibrate, and write the statistics into the scheduler's config."""
    from ddim_schedulers.training.common.repositories import pinned

    _refuse_idle(args)
    args.pipeline = pinned(args.pipeline, args.revision)
    if args.objective == "likelihood" and args.labels is not None:
        if args.labels not in (["data"], ["null"]):
            raise ValueError(
                f"`--labels` is {args.labels}; it must be data or null with --objective likelihood"
            )
        (args.labels,) = args.labels
    if args.undo:
        return _undo(args)
    if args.objective == "trajectory":
        return _run_trajectory(args)
    if args.objective in ("likelihood", "samples") and args.data is None:
        raise ValueError(
            "`--data` is missing; it must name the images that --objective "
            f"{args.objective} measures"
        )
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.training.common.processes import AccelerateTeam, own_together

    target = config_file(args.output, args.pipeline)
    team = AccelerateTeam(args.cpu)
    work_dir = Path(args.work_dir) if args.work_dir else target.parent / "calibration-parts"
    check_folders(work_dir, "", "--work_dir")
    with (
        own_together(owned_folder(target), "calibrate", team) as owner,
        own_together(work_dir, "calibrate", team, transient=True),
    ):
        model = _load_model(args, target, team.state.device)
        if args.objective == "solver":
            return _fit_solver(args, model, target, team, work_dir, owner)
        if args.objective == "samples":
            return _calibrate_samples.run(args, model, target, team, work_dir, owner)
        return _run_pass(args, model, target, team, work_dir, owner)


def _load_model(
    args: argparse.Namespace, target: Path, device: "torch.device | str"
) -> "MeasuredModel":
    import torch

    from ddim_schedulers.pipelines.sampling import speed_up
    from ddim_schedulers.training.likelihood.calibration import check_target
    from ddim_schedulers.training.likelihood.measured_model import load_measured_model

    model = load_measured_model(args.pipeline, device, allow_pickle=args.allow_pickle)
    if args.output is not None:
        check_target(target, model)
    speed_up(
        model.unet,
        compile=args.compile,
        channels_last=args.channels_last,
        dtype=getattr(torch, args.dtype),
    )
    return model


def _refuse_idle(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    every = {action.dest for action in parser._actions}
    kind = "--undo" if args.undo else f"--objective {args.objective}"
    idle = {"trajectory_steps", *_OF_SPEED, *_OF_SOLVER, *_OF_SAMPLES}
    acts = _ACTS.get(kind, every - (_IDLE_IN_SAMPLES if "samples" in kind else idle))
    for name, value in vars(args).items():
        if name in every - acts and value != parser.get_default(name):
            raise ValueError(f"`--{name}` is {value!r}; it does nothing with {kind}, leave it out")


def _run_pass(
    args: argparse.Namespace,
    measured_model: "MeasuredModel",
    target: Path,
    team: "AccelerateTeam",
    work_dir: Path,
    owner: "Owner",
) -> int:
    from ddim_schedulers.training.likelihood import calibration
    from ddim_schedulers.training.likelihood.error_sweep import discard
    from ddim_schedulers.training.likelihood.measured_data import load_measured_images
    from ddim_schedulers.training.likelihood.measured_model import clip_limit

    num_images = 100 if args.num_images is None else args.num_images
    _, images, measured_model = load_measured_images(args, measured_model, num_images)
    result, cost = calibration.calibrate(
        measured_model,
        images,
        clip=clip_limit(measured_model, args.clip),
        seed=args.seed,
        batch_size=args.batch_size,
        work_dir=work_dir,
        team=team,
        progress=lambda line: print(f"process {team.index}: {line}", file=sys.stderr, flush=True),
    )
    if team.index == 0:
        owner.check()
        calibration.save_calibration(result, target, measured_model.saved)
        discard(work_dir)
        last = len(measured_model.alpha_bar) - 1
        print(*calibration.summary(result, sorted({0, 1, last // 4, last // 2, last})), sep="\n")
        print(
            f"{num_images} images, {cost['network_calls']} network calls, "
            f"{cost['seconds']:.1f} s, {cost['processes']} processes; written to {target}"
        )
    team.wait()
    return 0


def _fit_solver(
    args: argparse.Namespace,
    measured_model: "MeasuredModel",
    target: Path,
    team: "AccelerateTeam",
    work_dir: Path,
    owner: "Owner",
) -> int:
    from ddim_schedulers.training.calibration import solver_job, solver_run
    from ddim_schedulers.training.likelihood import calibration
    from ddim_schedulers.training.likelihood.measured_data import labels_in_turn

    job = solver_job.SolverJob(
        calls=solver_job.SolverJob.calls if args.calls is None else tuple(args.calls),
        num_samples=128 if args.num_images is None else args.num_images,
        held_out=args.held_out,
        steps=args.trajectory_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        guiding=_calibrate_samples.guiding_of(args),
    )
    outcomes, cost = solver_run.calibrate_solver(
        measured_model.labelled(labels_in_turn(args.labels, measured_model, job.num_samples)),
        job,
        work_dir=work_dir,
        team=team,
        progress=lambda line: print(f"process {team.index}: {line}", file=sys.stderr, flush=True),
    )
    if team.index == 0:
        owner.check()
        better = {str(each.calls): each.entry for each in outcomes if each.is_better}
        before = {}
        if better:
            before = calibration.add_to_calibration(
                {"solver": better}, target, measured_model.saved
            )
        solver_run.discard(work_dir)
        print(*solver_job.summary(outcomes), sep="\n")
        for line in solver_job.remarks(before, better, measured_model.saved):
            print(line)
        print(
            f"{cost['evaluations']} network evaluations, {cost['seconds']:.1f} s, "
            f"{cost['processes']} processes; "
            + (f"written to {target}" if better else "nothing is written")
        )
    team.wait()
    return 0


def _undo(args: argparse.Namespace) -> int:
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.training.likelihood.calibration import undo

    target = config_file(args.output, args.pipeline)
    with own(owned_folder(target), "calibrate"):
        print(f"{target} is again what {undo(target)} kept")
    return 0


def _run_trajectory(args: argparse.Namespace) -> int:
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.pipelines.sampling_job import process_of

    _, processes = process_of()
    if processes > 1:
        raise ValueError(
            f"`--objective` is 'trajectory', one short run, but {processes} processes are started; "
            "it must be started alone."
        )
    target = config_file(args.output, args.pipeline)
    with own(owned_folder(target), "calibrate") as owner:
        return _measure_trajectory(args, target, owner)


def _measure_trajectory(args: argparse.Namespace, target: Path, owner: "Owner") -> int:
    import torch

    from ddim_schedulers import GeneralizedDDIMScheduler
    from ddim_schedulers.training.likelihood import calibration
    from ddim_schedulers.training.likelihood.measured_data import labels_in_turn

    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    measured_model = _load_model(args, target, device)
    num_samples = 48 if args.num_images is None else args.num_images
    measured, cost = calibration.measure_trajectory(
        measured_model.labelled(labels_in_turn(args.labels, measured_model, num_samples)),
        num_samples=num_samples,
        steps=args.trajectory_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    owner.check()
    calibration.add_to_calibration(measured, target, measured_model.saved)
    scheduler = GeneralizedDDIMScheduler.from_config(
        measured_model.config,
        calibration=measured,
        timestep_spacing="calibrated",
        solver_order=2,
        solver_corrector_order=None,
        reverse_variance="sigma",
        sigma=None,
    )
    for steps in (5, 10, 20):
        if steps <= args.trajectory_steps:
            scheduler.set_timesteps(steps)
            print(f"{steps:>3} steps: {' '.join(str(t) for t, _ in scheduler.planned_pairs())}")
    print(f"{cost['network_calls']} network calls, {cost['seconds']:.1f} s; written to {target}")
    return 0


def owned_folder(target: Path) -> Path:
    """Return the folder to own while a scheduler's config changes: its pipeline's, if any."""
    pipeline = target.parent.parent
    return pipeline if (pipeline / "model_index.json").is_file() else target.parent


def config_file(output: str | None, pipeline: str) -> Path:
    """Return the scheduler's config that is written: an existing one, or a new one at `output`.

    Raises:
        ValueError: if there is none, or it cannot be written.
    """
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.training.likelihood.calibration import CONFIG_NAME
    from ddim_schedulers.training.networks.places import INDEX, pipeline_folder

    if output is None:
        path = Path(pipeline_folder(pipeline, "--pipeline")) / "scheduler"
    else:
        path = Path(output)
        path = path / "scheduler" if (path / INDEX).exists() else path
    target = path if path.suffix == ".json" else path / CONFIG_NAME
    if output is None and not target.is_file():
        raise ValueError(
            f"`--pipeline` is {pipeline!r}, but {target} does not exist; statistics go into the "
            "config of a scheduler that was saved before. For a pipeline of the Hub, name a new "
            "folder with --output"
        )
    check_folders(target.parent, "", "--pipeline" if output is None else "--output")
    return target
