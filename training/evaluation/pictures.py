"""Pictures of an evaluation: curves, samples of every row, and nearest training images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ddim_schedulers.pipelines.pictures import tiled
from ddim_schedulers.training.common.figures import panels_figure, rows_figure
from ddim_schedulers.training.evaluation.cells import Evaluation
from ddim_schedulers.training.evaluation.references import from_uint8

SHOWN_ROWS, SHOWN_IMAGES, SHOWN_STEPS = 8, 10, 3


def curves(
    table: dict[str, Any], features: Sequence[str], named: Sequence[str] | None = None
) -> Any:
    """Plot the Frechet distance against network calls, and against seconds for an image.

    With `named`, the other rows are grey, with one entry in the legend: twenty colours tell
    nothing apart.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(features) + 1.6), layout="constrained")
    axes = figure.subplots(len(features), 2, squeeze=False, sharey="row")
    rows = list(dict.fromkeys(cell["row"] for cell in table["cells"]))
    coloured = [row for row in rows if not named or row in named] or rows
    rows = [*coloured, *(row for row in rows if row not in coloured)]
    ten: Any = colormaps["tab10"]
    colours, markers = ten.colors, "osD^v<>P"
    for name, (left, right) in zip(features, axes, strict=True):
        for number, row in enumerate(rows):
            cells = sorted(
                (c for c in table["cells"] if c["row"] == row), key=lambda c: c["network_calls"]
            )
            style: dict[str, Any] = {
                "color": colours[number % 10],
                "marker": markers[number // 10 % 8],
                "linewidth": 1.0,
                "markersize": 4,
                "label": row,
            }
            if row not in coloured:
                is_first = number == len(coloured)
                label = "other rows" if is_first else None
                style |= {"color": "0.75", "zorder": 1, "markersize": 2, "label": label}
            y = [c["metrics"][name]["frechet"]["mean"] for c in cells]
            std = [c["metrics"][name]["frechet"]["std"] or 0.0 for c in cells]
            left.errorbar([c["network_calls"] for c in cells], y, std, **style)
            timed = [
                (1 / c["images_per_second"], v)
                for c, v in zip(cells, y, strict=True)
                if c["images_per_second"]
            ]
            if timed:
                right.plot(*zip(*timed, strict=True), **style)
        real = table["real"][name]
        for axis, label in ((left, "network calls"), (right, "seconds for an image")):
            if real["n"] == table["n"]:
                axis.axhline(real["frechet"], color="0.5", linestyle=":", linewidth=1)
            axis.set(xlabel=label, xscale="log", yscale="log")
            axis.grid(alpha=0.3, which="both")
        calls = sorted({cell["network_calls"] for cell in table["cells"]})
        left.set_xticks(calls, labels=map(str, calls))
        left.set_xticks([], minor=True)
        left.set_ylabel(f"Frechet distance, {name}")
        left.set_title(f"n = {table['n']}; dotted: real images", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def guidance_figure(table: dict[str, Any], features: Sequence[str]) -> Any:
    """Plot over the guidance scale w: Frechet distance, precision against recall, recognised.

    A line is a sampler at one number of steps; its points are its guidance scales.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6 * len(features) + 0.8), layout="constrained")
    axes = figure.subplots(len(features), 3, squeeze=False)
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for cell in table["cells"]:
        said = table["guidance"].get(cell["row"])
        if said is not None:
            others = {k: v for k, v in said.items() if k not in ("base", "guidance_scale")}
            name = ", ".join([said["base"], f"S = {cell['steps']}", *map(str, others.values())])
            lines.setdefault(name, []).append((said.get("guidance_scale", 1.0), cell["metrics"]))
    for feature, (left, middle, right) in zip(features, axes, strict=True):
        for name, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            scales = [w for w, _ in points]
            values = {
                key: [metrics[feature][key]["mean"] for _, metrics in points]
                for key in ("frechet", "precision", "recall")
            }
            left.plot(scales, values["frechet"], "o-", label=name)
            middle.plot(values["recall"], values["precision"], "o-")
            for w, x, y in zip(scales, values["recall"], values["precision"], strict=True):
                middle.annotate(f"{w:g}", (x, y), fontsize=7)
            known = [
                (w, m[feature]["recognised"]["mean"])
                for w, m in points
                if "recognised" in m[feature]
            ]
            if known:
                right.plot(*zip(*known, strict=True), "o-")
        left.set(xlabel="guidance scale w", ylabel=f"Frechet distance, {feature}", yscale="log")
        middle.set(xlabel="recall (diversity)", ylabel="precision (quality)")
        middle.set_title(f"the numbers are w; n = {table['n']}", fontsize=9)
        right.set(xlabel="guidance scale w", ylabel="share recognised")
        for axis in (left, middle, right):
            axis.grid(alpha=0.3)
        if not right.lines:  # a space that calls no classes
            right.axis("off")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def samples_figure(evaluation: Evaluation, table: dict[str, Any]) -> Any:
    """Return rows of samples from the same seeds: one for each scheduler, a block for each S."""
    cells = {
        (c.sampler.name, c.steps): c
        for t in evaluation.config.tables
        if t.name == table["name"]
        for c in t.cells
        if c.repeat == 0 and evaluation.files.path_of(c).exists()
    }
    rows = [r for r in dict.fromkeys(row for row, _ in cells)]
    asked = evaluation.config.pictured
    rows = [r for r in rows if r in asked] if asked else rows[:SHOWN_ROWS]
    rows = rows or [next(iter(cells))[0]]
    steps = sorted({s for row, s in cells if row in rows})[:SHOWN_STEPS]
    blank = torch.ones(SHOWN_IMAGES, *evaluation.real.train.shape)
    panels = []
    for row in rows:
        for s in steps:
            cell = cells.get((row, s))
            images = from_uint8(evaluation.first_images.read(cell)) if cell is not None else blank
            title = f"{row}, S = {s}" if cell is not None else ""
            panels.append((title, tiled(images[:SHOWN_IMAGES], min(SHOWN_IMAGES, len(images)))))
    return panels_figure(panels, len(steps), 4.0)


def nearest_figure(evaluation: Evaluation, table: dict[str, Any]) -> Any:
    """Return samples above their nearest training images."""
    found = table["memorisation"]
    cell = next(
        c
        for c in evaluation.config.cells
        if (c.sampler.name, c.steps, c.n, c.repeat) == (found["row"], found["steps"], table["n"], 0)
    )
    samples = from_uint8(evaluation.first_images.read(cell))[: found["n"]]
    nearest = evaluation.real.train.batch(np.array(found["nearest"]))[0]
    return rows_figure([("samples", samples), ("nearest training images", nearest)])
