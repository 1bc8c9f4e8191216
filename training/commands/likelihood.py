"""`ddim-schedulers likelihood`: bits per dimension, term by term."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` needs neither torch nor diffusers
    from ddim_schedulers.pipelines.ownership import Owner
    from ddim_schedulers.training.common.processes import AccelerateTeam

HELP = "Compute a pipeline's bits per dimension, term by term."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from ddim_schedulers.training.commands._model_options import add_repository_arguments
    from ddim_schedulers.training.commands.calibrate import add_run_arguments
    from ddim_schedulers.training.likelihood.measured_data import (
        add_condition_arguments,
        add_data_arguments,
    )

    parser.add_argument("--pipeline", required=True, help="folder or Hub name of the pipeline")
    add_repository_arguments(parser)
    add_data_arguments(parser)
    add_condition_arguments(parser)
    parser.add_argument("--num_images", type=int, default=64, help="images (64)")
    parser.add_argument(
        "--output_dir", "--output", required=True, help="folder for JSON, table and plot"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[10, 25, 50, 100, 1000],
        help="lengths S of tau (10 25 50 100 1000)",
    )
    parser.add_argument(
        "--variances",
        nargs="+",
        help="reverse variances: fixed_small, fixed_large, learned_range or optimal; both fixed "
        "ones, and optimal where the pipeline is calibrated",
    )
    parser.add_argument(
        "--trajectories",
        nargs="+",
        choices=("even", "optimal", "linspace", "quadratic", "leading"),
        default=["even"],
        help="tau; each must hold timestep 0, and optimal needs a calibration (even)",
    )
    parser.add_argument("--eta", type=float, default=1.0, help="the member, > 0; 1 is DDPM (1.0)")
    parser.add_argument(
        "--clip",
        choices=("config", "on", "off"),
        default="config",
        help="clip x0_hat to [-1, 1] (config: as the scheduler does)",
    )
    parser.add_argument("--bins", type=int, help="values of a pixel; as the data say otherwise")
    parser.add_argument(
        "--estimator",
        choices=("all", "uniform", "stratified", "importance"),
        default="all",
        help="which t are evaluated: all, or an unbiased subset of --num_calls for each image",
    )
    parser.add_argument("--num_calls", type=int, help="network calls for each image and chain")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write likelihood.json, .md and .png."""
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.reverse_noise import noise_named
    from ddim_schedulers.training.common.processes import AccelerateTeam, own_together

    for name in args.variances or ():
        noise_named("variance", name)
    check_folders(Path(args.output_dir), "", "--output_dir")
    team = AccelerateTeam(args.cpu)
    output = Path(args.output_dir)
    work_dir = Path(args.work_dir) if args.work_dir else output / "likelihood-parts"
    check_folders(work_dir, "", "--work_dir")
    with (
        own_together(output, "likelihood", team) as owner,
        own_together(work_dir, "likelihood", team, transient=True),
    ):
        return _evaluate(args, team, output, work_dir, owner)


def _evaluate(
    args: argparse.Namespace, team: "AccelerateTeam", output: Path, work_dir: Path, owner: "Owner"
) -> int:
    from ddim_schedulers.pipelines.files import write_bytes
    from ddim_schedulers.training.common.figures import can_plot
    from ddim_schedulers.training.common.repositories import pinned
    from ddim_schedulers.training.common.storage import to_json
    from ddim_schedulers.training.common.versions import versions
    from ddim_schedulers.training.likelihood import table
    from ddim_schedulers.training.likelihood.error_sweep import discard
    from ddim_schedulers.training.likelihood.measured_data import (
        kind_of_labels,
        load_measured_images,
    )
    from ddim_schedulers.training.likelihood.measured_model import clip_limit, load_measured_model

    measured_model = load_measured_model(
        pinned(args.pipeline, args.revision), team.state.device, allow_pickle=args.allow_pickle
    )
    if measured_model.codec is not None:
        raise ValueError(
            f"`--pipeline` is {args.pipeline!r}, a model of latents: its bound is one of the "
            "latents, which are continuous, and gives no bits per dimension of pixels; it must be "
            "a model of pixels"
        )
    data, images, measured_model = load_measured_images(args, measured_model, args.num_images)
    bins = data.levels if args.bins is None else args.bins
    if bins is None:
        raise ValueError(
            "`--bins` is not set, but these data are continuous; it must be the number of values "
            "that a pixel can take"
        )
    variances = args.variances or ["fixed_small", "fixed_large"] + (
        ["optimal"] if measured_model.calibration is not None else []
    )
    settings = table.LikelihoodSettings(
        steps=tuple(args.steps),
        variances=tuple(variances),
        trajectories=tuple(args.trajectories),
        eta=args.eta,
        clip=clip_limit(measured_model, args.clip),
        num_bins=bins,
        estimator=args.estimator,
        num_calls=args.num_calls,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    report = table.evaluate(
        measured_model,
        images,
        settings,
        work_dir,
        team=team,
        progress=lambda line: print(f"process {team.index}: {line}", file=sys.stderr, flush=True),
    )
    if team.index == 0:
        made_with = versions("ddim_schedulers", "diffusers", "torch")
        report |= {
            "data": args.data,
            "pipeline": measured_model.commit or args.pipeline,
            "versions": made_with,
        }
        report["found"] = data.inventory.counts()
        if (kind := kind_of_labels(args, measured_model)) is not None:
            report["labels"] = kind
        lines = table.table(report)
        owner.check()
        for name, content in (
            ("likelihood.json", to_json(report)),
            ("likelihood.md", ("\n".join(lines) + "\n").encode()),
        ):
            write_bytes(output / name, content)
        if args.estimator == "all" and can_plot():
            table.plot(report, output / "likelihood.png")
        discard(work_dir)
        print(*lines, sep="\n")
        cost = report["cost"]
        print(
            f"{len(images)} images, {cost['network_calls']} network calls, "
            f"{cost['seconds']:.1f} s, {cost['processes']} processes; written to {output}"
        )
    team.wait()
    return 0
