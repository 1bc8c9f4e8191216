"""The recommendation of `ddim-schedulers evaluate`: printed, and written where it is asked for."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` needs neither torch nor diffusers
    from pathlib import Path

    from ddim_schedulers.training.evaluation.config import EvaluationConfig
    from ddim_schedulers.training.evaluation.recommend import Recommendation

LEAST_REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--best_under_calls", type=int, metavar="N", help="name the best row of at most N calls"
    )
    parser.add_argument(
        "--best_under_seconds",
        type=float,
        metavar="T",
        help="name the best row that samples the n images of its table in at most T seconds",
    )
    parser.add_argument(
        "--best_by", metavar="METRIC", default="frechet", help="what decides (frechet)"
    )
    parser.add_argument(
        "--write_best",
        choices=("clear", "lowest"),
        help="write the best row's settings into the config of the pipeline's scheduler; clear: "
        "only if every other row is further away than the scatter explains; lowest: also among "
        f"rows that cannot be told apart. Either needs all cells, and {LEAST_REPEATS} repetitions "
        "of each row under the limit",
    )


def check(args: argparse.Namespace) -> bool:
    """Return whether a recommendation is asked for.

    Raises:
        ValueError: an option without a limit.
    """
    asked = args.best_under_calls is not None or args.best_under_seconds is not None
    for name in ("write_best", "best_by"):
        if not asked and getattr(args, name) not in (None, "frechet"):
            raise ValueError(
                f"`--{name}` is {getattr(args, name)!r}; it must be left out, as it goes with "
                "--best_under_calls and --best_under_seconds alone"
            )
    return asked


def check_config(args: argparse.Namespace, config: EvaluationConfig) -> None:
    """Check, before anything is sampled, that the evaluation can give the recommendation.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    from ddim_schedulers.training.metrics.distances import METRICS

    calls, seconds = args.best_under_calls, args.best_under_seconds
    allowed = [name for name in METRICS if name != "endpoint" or config.endpoint]
    if args.best_by not in allowed:
        more = "" if config.endpoint else ", and endpoint where the file says `endpoint: true`"
        raise ValueError(f"`best_by` is {args.best_by!r}; it must be one of {allowed}{more}")
    least = min(cell.steps for cell in config.cells)
    if calls is not None and calls < least:
        raise ValueError(
            f"`best_under_calls` is {calls}; it must be at least {least}, the fewest steps of a row"
        )
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`best_under_seconds` is {seconds}; it must be above 0")
    if len(sizes := sorted({table.n for table in config.tables})) != 1:
        raise ValueError(f"`n` is {sizes} in the tables; it must be one to compare rows")
    repeats = Counter((cell.sampler.name, cell.steps) for cell in config.cells)
    sure = args.write_best is not None and seconds is None  # a slow row may be over the limit
    for (row, steps), number in repeats.items():
        if sure and steps <= calls and number == 1:
            raise ValueError(
                f"`write_best` is {args.write_best!r}; it must be left out, as row {row!r}, S = "
                f"{steps}, has one repetition and can be told apart from no other"
            )


def run(args: argparse.Namespace, config: EvaluationConfig, results: dict[str, Any]) -> None:
    """Print the recommendation; write it where it is asked for.

    Raises:
        ValueError: as `recommend`, or for evidence that is missing.
    """
    from ddim_schedulers.training.evaluation.recommend import recommend

    found = recommend(
        results,
        calls=args.best_under_calls,
        seconds=args.best_under_seconds,
        metric=args.best_by,
    )
    print(*found.lines(), sep="\n")
    if args.write_best is not None:
        check_evidence(found, results, args.write_best)
        target = write(found, config)
        print(f"Written to {target}; the number of steps is yours to give: {found.best.steps}.")
        print(
            "The cells here were measured with the config before; to go on with them, take this "
            "back with `ddim-schedulers calibrate --undo`, or name another --output_dir."
        )


def check_evidence(found: Recommendation, results: dict[str, Any], asked: str) -> None:
    """Refuse to write without the evidence that is asked for.

    Raises:
        ValueError: naming what is missing.
    """
    if left := [label for table in results["tables"] for label in table["missing"]]:
        raise ValueError(
            f"`write_best` is {asked!r}; it must be left out, as it needs all cells, {len(left)} "
            "are not measured"
        )
    few = [each for each in (found.best, *found.rivals) if each.repeats < LEAST_REPEATS]
    if few:
        raise ValueError(
            f"`write_best` is {asked!r}; it must be left out, as it needs {LEAST_REPEATS} "
            f"repetitions of a row, {few[0].row!r} has {few[0].repeats}"
        )
    if asked == "clear" and found.rivals:
        raise ValueError(
            f"`write_best` is {asked!r}; it must be 'lowest' or left out, as "
            f"{found.rivals[0].row!r}, S = {found.rivals[0].steps}, is within the scatter of "
            f"{found.best.row!r}"
        )


def write(found: Recommendation, config: EvaluationConfig) -> Path:
    """Write the settings of a row into the config of the pipeline's scheduler, and return its file.

    Raises:
        ValueError: for a row of another class than the config can hold.
    """
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.plugin import STOCK_CLASSES
    from ddim_schedulers.reading import read_json
    from ddim_schedulers.settings import SETTINGS_KEY
    from ddim_schedulers.training.commands.calibrate import config_file, owned_folder
    from ddim_schedulers.training.evaluation.grid import scheduler_class
    from ddim_schedulers.training.likelihood.calibration import replace_config

    (sampler,) = {
        cell.sampler.name: cell.sampler
        for cell in config.cells
        if cell.sampler.name == found.best.row
    }.values()
    target = config_file(None, config.pipeline)
    content = read_json(target)
    saved = content.get("_class_name")
    if saved == sampler.scheduler:
        content |= sampler.settings
    elif sampler.scheduler in STOCK_CLASSES and saved not in STOCK_CLASSES:
        # a scheduler of stock diffusers carries settings of ours
        private = content.get(SETTINGS_KEY) or {"settings": {}, "stand_ins": {}}
        settings = {**private.get("settings", {}), **sampler.settings}
        content[SETTINGS_KEY] = {**private, "class": sampler.scheduler, "settings": settings}
    else:
        raise ValueError(
            f"`class` of the best row is {sampler.scheduler!r}; it must be that of the pipeline's "
            f"scheduler, {saved!r}, or one of this package: save the pipeline with "
            f"{sampler.scheduler}.from_config(...)"
        )
    cls: Any = scheduler_class(sampler.scheduler)
    cls.from_config(content).set_timesteps(found.best.steps)  # what it refuses is not written
    with own(owned_folder(target), "evaluate") as owner:
        owner.check()
        replace_config(content, target)
    return target
