"""All cells of an evaluation and what they were measured with: the contents of metrics.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers.class_labels import class_labels_of
from ddim_schedulers.pipelines.files import write_json
from ddim_schedulers.pipelines.ownership import Owner
from ddim_schedulers.training.common.processes import own_together
from ddim_schedulers.training.common.versions import device_name, versions
from ddim_schedulers.training.evaluation.cells import Evaluation
from ddim_schedulers.training.evaluation.config import CLASSIFIER
from ddim_schedulers.training.metrics.classifier import classifier_facts
from ddim_schedulers.training.metrics.distances import METRICS
from ddim_schedulers.training.metrics.features import commit_of


def run(evaluation: Evaluation, sample: bool = True) -> dict[str, Any]:
    """Measure every cell and return everything; process 0 writes it to metrics.json.

    Args:
        evaluation: the model and the data.
        sample: else only the cells that are there are gathered.

    Raises:
        FolderInUseError: another process writes to the folder of the evaluation.
    """
    with own_together(evaluation.folder, "evaluate", evaluation.team) as owner:
        return _run(evaluation, sample, owner)


def _run(evaluation: Evaluation, sample: bool, owner: Owner) -> dict[str, Any]:
    config, team = evaluation.config, evaluation.team
    done: dict[str, dict[str, Any]] = {}
    for number, cell in enumerate(config.cells):
        if sample or not evaluation.missing(cell):
            evaluation.progress(f"cell {number + 1} of {len(config.cells)}: {cell.label}")
            done[cell.label] = evaluation.measure(cell)
    evaluation.discard_fine()
    tables = []
    for table in config.tables:
        cells = [cell for cell in table.cells if cell.label in done]
        entry: dict[str, Any] = {"name": table.name, "n": table.n}
        entry["cells"] = summarise([done[cell.label] for cell in cells], config.features)
        entry["missing"] = [cell.label for cell in table.cells if cell.label not in done]
        entry["guidance"] = {
            cell.sampler.name: {"base": cell.sampler.base, **cell.sampler.conditions}
            for cell in cells
            if cell.sampler.conditions
        }
        entry["unsaid"] = {cell.sampler.name: evaluation.unsaid(cell) for cell in cells}
        if team.index == 0:
            entry["real"] = evaluation.real.self_check[table.n]
            if (ceiling := evaluation.ceiling(table.n)) is not None:
                entry["ceiling"] = ceiling
        if cells and team.index == 0:
            name = config.features[0]
            first = [cell for cell in cells if cell.repeat == 0]
            best = min(first, key=lambda c: done[c.label]["metrics"][name]["frechet"])
            entry["memorisation"] = evaluation.memorisation(best)
        tables.append(entry)
    made_with = _counted([cell.get("made_with", {}) for cell in done.values()])
    results = {**about(evaluation), "made_with": made_with, "tables": tables}
    if team.index == 0:
        owner.check()
        write_json(evaluation.folder / "metrics.json", results)
    team.wait()
    return results


def _counted(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinct notes in the order of their first cells, with the numbers of cells."""
    distinct = [note for i, note in enumerate(notes) if note not in notes[:i]]
    return [{**note, "cells": notes.count(note)} for note in distinct]


def summarise(cells: list[dict[str, Any]], features: list[str]) -> list[dict[str, Any]]:
    """Join cells of the same row and steps: means over the repetitions, with their spread."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        grouped.setdefault((cell["row"], cell["steps"]), []).append(cell)
    summary = []
    for (row, steps), group in grouped.items():
        first = group[0]
        rates = [c["images_per_second"] for c in group if c["images_per_second"]]
        entry: dict[str, Any] = {
            "row": row,
            "steps": steps,
            "n": first["n"],
            "repeats": len(group),
            "network_calls": first["network_calls"],
            "images_per_second": float(np.mean(rates)) if rates else None,
            "seconds": first["n"] / float(np.mean(rates)) if rates else None,
            "processes": first["processes"],
            "metrics": {},
        }
        for name in features:
            values = [c["metrics"][name] for c in group]
            entry["metrics"][name] = {
                key: _mean_and_std([v[key] for v in values])
                for key in METRICS
                if all(key in v for v in values)
            }
            if by_class := [v["recognised_by_class"] for v in values if "recognised" in v]:
                entry["metrics"][name]["recognised_by_class"] = {
                    label: float(np.mean([shares[label] for shares in by_class]))
                    for label in by_class[0]
                }
        summary.append(entry)
    return summary


def _mean_and_std(values: list[float]) -> dict[str, float | None]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def about(evaluation: Evaluation) -> dict[str, Any]:
    """Return what the measurements depend on besides the cells, as JSON types."""
    config = evaluation.config
    classifier = None
    if CLASSIFIER in config.features:
        classifier = classifier_facts(evaluation.real.classifier_path())
    network: Any = evaluation.pipe.unet
    classes = class_labels_of(network)
    return {
        "data": {
            "name": Path(config.data.data).name,
            "shape": list(evaluation.real.train.shape),
            "reference_n": len(evaluation.real.order),
            "held_out_n": len(evaluation.real.held_out),
            "found": evaluation.real.train.inventory.counts(),
        },
        "classes": None if classes is None else [classes.name(i) for i in classes.ids],
        "features": config.features,
        "reference_fingerprints": {
            name: evaluation.real.features[name].fingerprint for name in config.features
        },
        "classifier": classifier,
        "network": {
            "parameters": sum(p.numel() for p in network.parameters()),
            "dtype": config.dtype,
            "compiled": config.compile,
            "channels_last": config.channels_last,
            "batch_size": config.batch_size,
        },
        "scheduler_config": json.loads(
            json.dumps(
                {
                    k: v
                    for k, v in dict(evaluation.pipe.scheduler.config).items()
                    if not k.startswith("_") and k != "calibration"
                },
                default=str,
            )
        ),
        "seed": config.seed,
        "device": device_name(evaluation.device),
        "threads": torch.get_num_threads(),
        "processes": evaluation.team.count,
        "commit": evaluation.commit,
        # a folder has no commit; its weights identify it
        "pipeline": evaluation.pipeline_commit or None,
        "feature_commits": {
            name: told
            for name, network in evaluation.real.networks.items()
            if (told := commit_of(network))
        },
        "expected": config.expected,
        "not_run": config.not_run,
        "versions": versions(
            "ddim-schedulers", "diffusers", "torch", "torchmetrics", "numpy", "python"
        ),
        "card": config.card,
    }
