"""The report of an evaluation: a Markdown page with pictures, a model card, and what is printed."""

from pathlib import Path
from typing import Any

import torch

from ddim_schedulers.pipelines.files import check_folders, write_bytes
from ddim_schedulers.training.common.figures import save_figure
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.storage import slug
from ddim_schedulers.training.evaluation.card import render_example
from ddim_schedulers.training.evaluation.cells import Evaluation
from ddim_schedulers.training.evaluation.config import EvaluationConfig
from ddim_schedulers.training.evaluation.pictures import (
    curves,
    guidance_figure,
    nearest_figure,
    samples_figure,
)
from ddim_schedulers.training.evaluation.references import Progress
from ddim_schedulers.training.evaluation.results import run
from ddim_schedulers.training.evaluation.tables import (
    distances,
    expectations,
    how,
    section,
    unsaid_lines,
)


def markdown(results: dict[str, Any]) -> str:
    """Return the report as a Markdown page."""
    lines = ["# Evaluation", ""]
    if results["not_run"]:
        lines += [f"**{results['not_run']}**", ""]
    lines += [*how(results), ""]
    for table in results["tables"]:
        lines += [f"## {table['name']}", "", *section(table, results)]
    lines += [*expectations(results)]
    return "\n".join(lines).rstrip() + "\n"


def short(results: dict[str, Any]) -> str:
    """Return what the terminal shows: row by S the Frechet distance in every feature space."""
    lines = []
    for table in results["tables"]:
        lines += [f"## {table['name']}", "", *distances(table, results), *unsaid_lines(table)]
        if table["missing"]:
            lines += [f"Not run: {len(table['missing'])} cells.", ""]
    return "\n".join(lines)


def evaluate(
    config: EvaluationConfig,
    team: Team | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda line: None,
    sample: bool = True,
    warns: bool = True,
) -> tuple[Evaluation, dict[str, Any], list[Path]]:
    """Measure all cells, showing the steps, and write the report; the folder is owned meanwhile.

    Args:
        config: what is asked for.
        team: the processes that share the work.
        device: of the network and the feature spaces.
        progress: called with a line of text now and then.
        sample: else only the cells that are there are gathered.
        warns: of values that are clipped.

    Returns:
        The evaluation, what is in metrics.json, and the files that this process wrote.
    """
    import matplotlib  # noqa: F401  # the pictures come last: miss it before the work

    team = team or Team()
    check_folders(Path(config.output_dir), "cells", "output_dir")
    with own_together(Path(config.output_dir), "evaluate", team) as owner:
        evaluation = Evaluation(config, team, device, progress)
        evaluation.shows_steps, evaluation.pipe._warns_of_clipping = True, warns
        results = run(evaluation, sample)
        written: list[Path] = []
        if team.index == 0:
            owner.check()
            written = write_report(evaluation, results)
        team.wait()
    return evaluation, results, written


def write_report(evaluation: Evaluation, results: dict[str, Any]) -> list[Path]:
    """Write report.md and its pictures beside metrics.json; their paths."""
    folder, written = evaluation.folder, []
    for table in results["tables"]:
        if not table["cells"]:
            continue
        stem = slug(table["name"])
        pictures = {
            f"{stem}.png": curves(table, results["features"], evaluation.config.pictured),
            f"{stem}-samples.png": samples_figure(evaluation, table),
            f"{stem}-nearest.png": nearest_figure(evaluation, table),
        }
        if table["guidance"]:
            pictures[f"{stem}-guidance.png"] = guidance_figure(table, results["features"])
        for name, figure in pictures.items():
            save_figure(figure, folder / name)
            written.append(folder / name)
    texts = {"report.md": markdown(results)}
    if results["card"]:
        texts["README.md"] = render_example(results)
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    return [*(folder / name for name in texts), *written]
