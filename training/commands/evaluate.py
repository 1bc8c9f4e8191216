"""`ddim-schedulers evaluate`: which scheduler, how many steps, which eta, at what cost."""

import argparse
import dataclasses
import sys

from ddim_schedulers.training.commands import _recommend

HELP = "Measure samples of any scheduler, eta and number of steps against real images; resumable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; the file holds everything else."""
    parser.add_argument("--config", required=True, help="YAML or JSON file: what is to be compared")
    parser.add_argument("--pipeline", help="folder or Hub name, in place of the file's")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--data", help="data set, in place of the file's")
    parser.add_argument(
        "--output_dir", "--output", help="folder for all that is written; goes on where it was"
    )
    parser.add_argument("--cache_dir", help="where features of the real images are kept")
    parser.add_argument("--classifier", help="file of the classifier; trained if it is missing")
    parser.add_argument("--batch_size", type=int, help="images in a network call")
    parser.add_argument("--dtype", help="of the network: float32, bfloat16, ...")
    parser.add_argument(
        "--compile", action="store_true", default=None, help="torch.compile the network"
    )
    parser.add_argument(
        "--channels_last", action="store_true", default=None, help="memory format of the network"
    )
    parser.add_argument(
        "--report", action="store_true", help="sample nothing: tables of the cells that are there"
    )
    _recommend.add_arguments(parser)
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument(
        "--trust_code",
        action="store_true",
        help="let --config name code to import (features module:Name)",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the tables of the distances; 0 when it is done."""
    from ddim_schedulers.training.common.repositories import pinned
    from ddim_schedulers.training.evaluation.config import load_evaluation

    recommends = _recommend.check(args)
    names = "pipeline data output_dir cache_dir classifier batch_size dtype compile channels_last"
    overrides = {name: getattr(args, name) for name in names.split()}
    config = load_evaluation(args.config, args.trust_code, **overrides)
    if recommends:
        _recommend.check_config(args, config)
    config = dataclasses.replace(config, pipeline=pinned(config.pipeline, args.revision))
    from ddim_schedulers.training.common.processes import AccelerateTeam
    from ddim_schedulers.training.evaluation.report import evaluate, short

    team = AccelerateTeam(args.cpu)

    def progress(line: str) -> None:
        # one write for the whole line: processes share the terminal
        sys.stderr.write(f"process {team.index}: {line}\n")
        sys.stderr.flush()

    _, results, written = evaluate(config, team, team.state.device, progress, not args.report)
    if team.index == 0:
        print(short(results))
        print("Written:", *written)
        if recommends:
            _recommend.run(args, config, results)
    return 0
