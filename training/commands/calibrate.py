"""`ddim-schedulers calibrate`: estimate the statistics behind the optimal noise and trajectory."""

import argparse
import sys
from pathlib import Path

HELP = "Estimate a pipeline's statistics for the optimal noise and trajectory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    from ddim_schedulers.training.measured_data import add_data_arguments

    parser.add_argument("--pipeline", required=True, help="folder or Hub name of the pipeline")
    add_data_arguments(parser)
    parser.add_argument(
        "--num_images", type=int, default=100, help="images M; each costs T network calls (100)"
    )
    parser.add_argument(
        "--output",
        help="scheduler folder or config file to write into; the pipeline's own otherwise",
    )
    parser.add_argument(
        "--clip",
        choices=("config", "on", "off"),
        default="config",
        help="clip x0_hat to [-1, 1] where its error is measured (config: as the scheduler does)",
    )
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `likelihood` has too."""
    parser.add_argument("--batch_size", type=int, default=64, help="images in a call (64)")
    parser.add_argument("--seed", type=int, default=0, help="of images and noise (0)")
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument(
        "--work_dir",
        help="where parts are kept until the end, so that an interrupted run goes on; all "
        "processes must see it",
    )


def run(args: argparse.Namespace) -> int:
    """Calibrates, and writes the statistics into the scheduler's config."""
    from ddim_schedulers.training import calibration as library
    from ddim_schedulers.training.measured_data import load_measured_data
    from ddim_schedulers.training.passes import AccelerateTeam, discard
    from ddim_schedulers.training.subject import clip_limit, load_subject

    target = config_file(args.output, args.pipeline)
    team = AccelerateTeam(args.cpu)
    subject = load_subject(args.pipeline, team.state.device)
    data = load_measured_data(args, subject)
    chosen = library.choose_images(len(data), args.num_images, args.seed)
    images, _ = data.batch(chosen)
    work_dir = Path(args.work_dir) if args.work_dir else target.parent / "calibration-parts"
    result, cost = library.calibrate(
        subject,
        images,
        clip=clip_limit(subject, args.clip),
        seed=args.seed,
        batch_size=args.batch_size,
        work_dir=work_dir,
        team=team,
        progress=lambda line: print(f"process {team.index}: {line}", file=sys.stderr, flush=True),
    )
    if team.index == 0:
        library.save_calibration(result, target)
        discard(work_dir)
        last = len(subject.alpha_bar) - 1
        print(*library.summary(result, sorted({0, 1, last // 4, last // 2, last})), sep="\n")
        print(
            f"{args.num_images} images, {cost['network_calls']} network calls, "
            f"{cost['seconds']:.1f} s, {cost['processes']} processes; written to {target}"
        )
    team.wait()
    return 0


def config_file(output: str | None, pipeline: str) -> Path:
    """The scheduler's config that is written into.

    Raises:
        ValueError: if there is none.
    """
    from ddim_schedulers.training.calibration import CONFIG_NAME

    path = Path(output) if output is not None else Path(pipeline) / "scheduler"
    target = path if path.suffix == ".json" else path / CONFIG_NAME
    if not target.is_file():
        raise ValueError(
            f"output: {target} does not exist; statistics go into the config of a scheduler that "
            "was saved before (for a pipeline of the Hub, download it first)"
        )
    return target
