"""The card of an example model: its texts, and the measurements of its metrics.json."""

import re
from importlib import resources
from typing import Any

from ddim_schedulers.training.common.storage import slug
from ddim_schedulers.training.evaluation.tables import how, section

# The texts of the card of an example model: the keys of `card` in the settings.
CARD_TEXTS = (
    "title",
    "summary",
    "licence",
    "datasets",
    "folder",
    "intro",
    "discussion",
    "data",
    "commands",
    "limits",
)


def check_card(card: dict[str, Any]) -> None:
    """Check that a card has all its texts and no other.

    Raises:
        ValueError: naming what is missing or unknown.
    """
    missing = [name for name in CARD_TEXTS if name not in card and name != "discussion"]
    unknown = [name for name in card if name not in CARD_TEXTS]
    if missing or unknown:
        raise ValueError(
            f"`card` has other keys: missing {missing}, unknown {unknown}; it "
            f"must have {CARD_TEXTS}"
        )


def render_example(results: dict[str, Any]) -> str:
    """Return the card of an example model, from its metrics.json alone.

    Args:
        results: of `evaluate`, with `card`.

    Raises:
        ValueError: as `check_card`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    card = results["card"]
    check_card(card)
    classes = results.get("classes")  # an earlier version recorded none
    # the Hub's task stays the nearest one; the tag tells that a class is asked for
    task = "unconditional-image-generation"
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=results["data"]["name"],
            dataset_name=results["data"]["name"],
            metric_type="frechet_distance",
            metric_name=f"Frechet distance in {name}, n = {table['n']}, S = {cell['steps']}, "
            f"{cell['row']}",
            metric_value=round(cell["metrics"][name]["frechet"]["mean"], 4),
        )
        for table in results["tables"]
        for name in results["features"]
        for cell in best_cells(table, name)
    ]
    data = ModelCardData(
        library_name="diffusers",
        license=card["licence"],
        tags=["ddim-schedulers", "ddpm", "ddim", "class-conditional" if classes else task],
        pipeline_tag=None if classes else task,
        datasets=card["datasets"],
        model_name=card["title"],
        eval_results=measured or None,
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in sorted(results["versions"].items())
    )
    made = f"Seed {results['seed']}. Versions: {versions}."
    if results["commit"]:
        made += f" Commit {results['commit']}."
    template = resources.files("ddim_schedulers.model_cards").joinpath("example.md")
    text = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        first=slug(results["tables"][0]["name"]),
        how="\n".join(how(results)),
        tables=[
            {"name": table["name"], "text": "\n".join(section(table, results)).strip()}
            for table in results["tables"]
            if table["cells"]
        ],
        made=made,
        classes=classes,
        **{**{"discussion": ""}, **{k: v for k, v in card.items() if k in CARD_TEXTS}},
    )
    return re.sub(r"\n{3,}", "\n\n", str(text)).strip() + "\n"


def best_cells(table: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the cell with the smallest Frechet distance for each number of steps."""
    best: dict[int, dict[str, Any]] = {}
    for cell in table["cells"]:
        kept = best.get(cell["steps"])
        value = cell["metrics"][name]["frechet"]["mean"]
        if kept is None or value < kept["metrics"][name]["frechet"]["mean"]:
            best[cell["steps"]] = cell
    return [best[s] for s in sorted(best)]
