"""Tables of an evaluation as Markdown, from its metrics.json alone."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ddim_schedulers.training.common.storage import slug
from ddim_schedulers.training.metrics.distances import METRICS


def how(results: dict[str, Any]) -> list[str]:
    """Return how the measurements were made, in a few sentences."""
    data, network = results["data"], results["network"]
    lines = [
        f"Reference: {data['reference_n']:,} images of {data['name']}, {shape(data['shape'])}; "
        "uint8 on both sides. Lower is better for the "
        f"{_names_of(results, distances=True)} distances, "
        f"higher for {_names_of(results, distances=False)}.",
        "",
        f"Network: {network['parameters']:,} parameters, {network['dtype']}"
        f"{', compiled' if network['compiled'] else ''}"
        f"{', channels_last' if network['channels_last'] else ''}, {network['batch_size']} images "
        f"a call, on {results['device']} ({results['threads']} threads), {results['processes']} "
        f"processes. Sample i of repetition r has the seed {results['seed']} + r n + i.",
    ]
    if results["classifier"]:
        facts = results["classifier"]
        lines += [
            "",
            f"The feature space `classifier` is a small network that tells the {facts['classes']} "
            f"classes apart ({facts['accuracy']:.1%} right on {facts['held_out_n']:,} images "
            "that it was not trained on): its features, and its probabilities for the Inception "
            "score.",
        ]
    if said := made_with(results):
        lines += ["", said]
    return lines


def _names_of(results: dict[str, Any], distances: bool) -> str:
    spaces = [s for t in results["tables"] for c in t["cells"] for s in c["metrics"].values()]
    *names, last = (
        metric.name
        for key, metric in METRICS.items()
        if metric.distance == distances and any(key in space for space in spaces)
    )
    return f"{', '.join(names)} and {last}" if names else last


def made_with(results: dict[str, Any]) -> str:
    """Return what the cells were sampled with: `12 cells: commit 1a2b, cpu, ...`."""
    parts = []
    for note in results.get("made_with", []):
        if "commit" not in note:  # of an earlier version
            parts.append(f"{note['cells']} cells: not recorded")
            continue
        said = [f"commit {note['commit']}" if note["commit"] else "no commit"]
        said += [note["device"], f"{note['threads']} threads"]
        said += [name for name in ("compiled", "channels_last") if note[name]]
        parts.append(f"{note['cells']} cells: {', '.join(said)}")
    return f"Sampled with, as the cells recorded it: {'; '.join(parts)}." if parts else ""


def shape(chw: Sequence[int]) -> str:
    """Return a shape in words: `32x32, 1 channel`."""
    return f"{chw[1]}x{chw[2]}, {chw[0]} channel{'s' if chw[0] > 1 else ''}"


def section(table: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Return one table: Frechet distance row by S in each feature space, then everything."""
    stem = slug(table["name"])
    lines = distances(table, results) + unsaid_lines(table)
    if table["missing"]:
        lines += [f"Not run: {len(table['missing'])} cells.", ""]
    if not table["cells"]:
        return lines
    lines += [f"![Frechet distance against network calls and seconds]({stem}.png)", ""]
    lines += [f"![Samples, the same seeds in every row]({stem}-samples.png)", ""]
    if table.get("guidance"):  # an earlier version recorded none
        lines += [f"![Quality against diversity over the guidance scale]({stem}-guidance.png)", ""]
        lines += ["A guided network call has a batch of twice the images.", ""]
    for name in results["features"]:
        lines += recognised_lines(table, name)
    lines += ["<details><summary>Everything that was measured</summary>", ""]
    for name in results["features"]:
        lines += [f"In `{name}`, n = {table['n']}:", "", *everything(table, name), ""]
    lines += ["</details>", "", *nearest_lines(table, stem)]
    return lines


def distances(table: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Return the Frechet distance of a table, row by S, in each feature space."""
    lines: list[str] = []
    for name in results["features"]:
        real = table["real"][name]
        lines += [
            f"Frechet distance in `{name}`, n = {table['n']} samples in every cell; "
            f"{real['n']} held-out real images get {real['frechet']:.3f}{_own_n(real, table)}.",
            *_ceiling(name, table),
            "",
            *pivot(
                table["cells"],
                partial(_frechet_text, name),
                partial(_frechet_mean, name),
            ),
            "",
        ]
    return lines


def unsaid_lines(table: dict[str, Any]) -> list[str]:
    """Return the settings that are no defaults and that the names of the rows do not say."""
    groups: dict[str, list[str]] = {}
    for row, settings in table.get("unsaid", {}).items():  # an earlier version recorded none
        if settings:
            said = ", ".join(f"`{key}={value!r}`" for key, value in settings.items())
            groups.setdefault(said, []).append(row)
    parts = [f"{said} in {'; '.join(rows)}" for said, rows in groups.items()]
    return [f"Settings that the names do not say: {'. '.join(parts)}.", ""] if parts else []


def _ceiling(name: str, table: dict[str, Any]) -> list[str]:
    if "ceiling" not in table:
        return []
    found = table["ceiling"][name]
    return [
        f"The autoencoder's own ceiling: {found['n']} held-out images, encoded and decoded, get "
        f"{found['frechet']:.3f}{_own_n(found, table)}."
    ]


def _own_n(real: dict[str, Any], table: dict[str, Any]) -> str:
    return "" if real["n"] == table["n"] else " (another n: not to be compared with the table)"


def everything(table: dict[str, Any], name: str) -> list[str]:
    """Return all measurements of a table in one feature space, a line for each cell."""
    of_cells = [cell["metrics"][name] for cell in table["cells"]]
    keys = [key for key in METRICS if any(key in measured for measured in of_cells)]
    headings = [METRICS[key].heading for key in keys]
    head = ["", "S", "seeds", *headings, "network calls", "seconds", "images/s"]
    lines = [_line(head), "|---|" + "---:|" * (len(head) - 1)]
    real = table["real"][name]
    if real["n"] == table["n"]:  # the rows of a table have the same n
        own = [_value({"mean": real[key], "std": None}, key) if key in real else "" for key in keys]
        lines.append(_line(["real images, held out", "", "", *own, "", "", ""]))
    for cell in table["cells"]:
        measured = cell["metrics"][name]
        values = [_value(measured[key], key) if key in measured else "" for key in keys]
        cost = [
            "" if cell[key] is None else format(cell[key], ".1f")
            for key in ("seconds", "images_per_second")
        ]
        calls = [str(cell["network_calls"]), *cost]
        lines.append(
            _line([cell["row"], str(cell["steps"]), str(cell["repeats"]), *values, *calls])
        )
    return lines


def recognised_lines(table: dict[str, Any], name: str) -> list[str]:
    """Return which share of each class the classifier takes for it, a line for each cell."""
    cells = [c for c in table["cells"] if "recognised_by_class" in c["metrics"][name]]
    if not cells:
        return []
    classes = list(cells[0]["metrics"][name]["recognised_by_class"])
    lines = [_line(["share recognised", "S", "mean", *classes])]
    lines.append("|---|" + "---:|" * (len(classes) + 2))
    for cell in cells:
        measured = cell["metrics"][name]
        shares = [f"{measured['recognised_by_class'].get(each, 0.0):.3f}" for each in classes]
        mean = _value(measured["recognised"], "recognised")
        lines.append(_line([cell["row"], str(cell["steps"]), mean, *shares]))
    return [*lines, ""]


def nearest_lines(table: dict[str, Any], stem: str) -> list[str]:
    """Return whether samples lie closer to training images than other real images do."""
    found = table["memorisation"]
    return [
        f"Nearest training images of {found['n']} samples ({found['row']}, S = {found['steps']}): "
        f"the median distance is {found['samples_median']:.4f} (smallest "
        f"{found['samples_min']:.4f}); for {found['held_out_n']} held-out images it is "
        f"{found['held_out_median']:.4f} (smallest {found['held_out_min']:.4f}), root mean "
        "squared, pixels on [0, 1]. Copies would lie far "
        "closer than held-out images do.",
        "",
        f"![Samples and their nearest training images]({stem}-nearest.png)",
        "",
    ]


def expectations(results: dict[str, Any]) -> list[str]:
    """Return measurements of others beside ours, for a recipe that names them."""
    if not results["expected"]:
        return []
    head = ["row", "S", "features", "metric", "expected", "tolerance", "source", "found", "within"]
    lines = ["## Expected measurements", "", _line(head), "|---|" * 1 + "---|" * (len(head) - 1)]
    for e in results["expected"]:
        found = _find(results, e)
        within = "not run" if found is None else str(abs(found - e["value"]) <= e["tolerance"])
        shown = "" if found is None else f"{found:.2f}"
        lines.append(
            _line(
                [
                    *(str(e[k]) for k in ("row", "steps", "features", "metric", "value")),
                    f"+- {e['tolerance']}",
                    str(e["source"]),
                    shown,
                    within.lower(),
                ]
            )
        )
    return [*lines, ""]


def _find(results: dict[str, Any], wanted: dict[str, Any]) -> float | None:
    for table in results["tables"]:
        for cell in table["cells"]:
            measured = cell["metrics"].get(wanted["features"], {})
            if (cell["row"], cell["steps"]) == (wanted["row"], wanted["steps"]):
                return measured[wanted["metric"]]["mean"] if wanted["metric"] in measured else None
    return None


def pivot(
    cells: Sequence[dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    rank: Callable[[dict[str, Any]], float] | None = None,
    row: str = "row",
) -> list[str]:
    """Return a Markdown table with a line for each row and a column for each number of steps.

    Args:
        cells: with the keys `row` and `steps`.
        text: the text of a cell.
        rank: a number by which the smallest of a column is set in bold, or None.
        row: the key that says which line a cell belongs to.
    """
    steps = sorted({cell["steps"] for cell in cells})
    lines = ["| | " + " | ".join(f"S = {s}" for s in steps) + " |", "|---|" + "---:|" * len(steps)]
    best = {}
    if rank is not None:
        best = {s: min(rank(c) for c in cells if c["steps"] == s) for s in steps}
    for name in dict.fromkeys(cell[row] for cell in cells):
        found = {cell["steps"]: cell for cell in cells if cell[row] == name}
        texts = []
        for s in steps:
            shown = text(found[s]) if s in found else ""
            first = s in found and rank is not None and rank(found[s]) == best[s]
            texts.append(f"**{shown}**" if first else shown)
        lines.append(_line([name, *texts]))
    return lines


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _frechet_text(name: str, cell: dict[str, Any]) -> str:
    return _value(cell["metrics"][name]["frechet"], "frechet")


def _frechet_mean(name: str, cell: dict[str, Any]) -> float:
    return float(cell["metrics"][name]["frechet"]["mean"])


def _value(measured: dict[str, Any], key: str) -> str:
    scale, form = METRICS[key].scale, METRICS[key].form
    text = format(measured["mean"] * scale, form)
    return text if measured["std"] is None else f"{text} +- {measured['std'] * scale:{form}}"
