"""The committed model cards: each is what its own metrics.json renders to, byte for byte."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from ddim_schedulers.training.evaluation import tables
from ddim_schedulers.training.evaluation.card import (
    CARD_TEXTS,
    best_cells,
    check_card,
    render_example,
)
from ddim_schedulers.training.evaluation.config import load_evaluation
from ddim_schedulers.training.metrics.distances import Metric

FOLDER = Path(str(files("ddim_schedulers.model_cards")))
CARDS = sorted(path.parent for path in FOLDER.glob("*/metrics.json"))


def _cell(row, steps, value):
    measured = {"frechet": {"mean": value, "std": 0.25}, "kernel": {"mean": 0.001, "std": None}}
    for name in ("precision", "recall", "density", "coverage"):
        measured[name] = {"mean": 0.5, "std": None}
    return {
        "row": row,
        "steps": steps,
        "n": 40,
        "repeats": 3,
        "network_calls": steps,
        "images_per_second": 12.5,
        "seconds": 3.2,
        "processes": 1,
        "metrics": {"pixels": measured},
    }


@pytest.fixture
def results():
    real = {key: 0.5 for key in ("kernel", "precision", "recall", "density", "coverage")}
    table = {
        "name": "Few steps",
        "n": 40,
        "cells": [_cell("eta 0", 5, 7.125), _cell("eta 1", 5, 9.5), _cell("eta 0", 10, 3.0)],
        "missing": [],
        "real": {"pixels": {"n": 40, "frechet": 1.5, **real}},
        "memorisation": {
            "row": "eta 0",
            "steps": 10,
            "n": 16,
            "held_out_n": 200,
            "samples_median": 0.1,
            "samples_min": 0.05,
            "held_out_median": 0.11,
            "held_out_min": 0.04,
            "nearest": [1],
        },
    }
    return {
        "data": {"name": "digits", "shape": [1, 8, 8], "reference_n": 1437, "held_out_n": 360},
        "features": ["pixels"],
        "classifier": None,
        "network": {
            "parameters": 1234,
            "dtype": "float32",
            "compiled": False,
            "channels_last": True,
            "batch_size": 10,
        },
        "seed": 3,
        "device": "cpu",
        "threads": 1,
        "processes": 1,
        "commit": "abc123",
        "expected": [],
        "not_run": None,
        "versions": {"torch": "9.9"},
        "tables": [table],
        "card": {
            **{name: f"The {name}." for name in CARD_TEXTS},
            "licence": "mit",
            "datasets": ["some/data"],
            "limits": ["small"],
        },
    }


def test_a_card_says_what_was_measured_and_how(results):
    text = render_example(results)
    head, body = text.split("---\n")[1:3]
    data = yaml.safe_load(head)
    assert data["library_name"] == "diffusers" and data["license"] == "mit"
    assert "ddim-schedulers" in data["tags"] and data["datasets"] == ["some/data"]
    measured = data["model-index"][0]["results"][0]["metrics"]
    assert [(f["type"], f["value"]) for f in measured] == [
        ("frechet_distance", 7.125),
        ("frechet_distance", 3.0),
    ]
    assert "n = 40" in measured[0]["name"] and "S = 5" in measured[0]["name"]
    for name in CARD_TEXTS:
        if name not in ("licence", "datasets", "limits"):
            assert f"The {name}." in body, name
    assert "**7.125 +- 0.250**" in body and "9.500 +- 0.250" in body and "- small" in body
    assert "n = 40 samples in every cell; 40 held-out real images get 1.500" in body
    assert "Seed 3" in body and "torch 9.9" in body and "Commit abc123" in body
    assert "few-steps-samples.png" in body and "float32, channels_last" in body


def test_a_row_of_the_table_of_metrics_is_all_that_a_page_needs(results, monkeypatch):
    more = Metric("means", 0, 1, scale=10, distance=True, form=".4f")
    monkeypatch.setitem(tables.METRICS, "mean", more)
    (table,) = results["tables"]
    for cell in table["cells"]:
        cell["metrics"]["pixels"]["mean"] = {"mean": 0.25, "std": 0.5}
    table["real"]["pixels"]["mean"] = 0.125
    text = "\n".join([*tables.how(results), *tables.everything(table, "pixels")])
    assert "for the Frechet, kernel and means distances, higher for precision" in text
    assert "coverage | means x 10 | network calls" in text
    assert text.count("2.5000 +- 5.0000") == 3 and "| 1.2500 |" in text


def test_a_measurement_that_changes_changes_the_card(results):
    before = render_example(results)
    results["tables"][0]["cells"][1]["metrics"]["pixels"]["frechet"]["mean"] = 9.501
    assert render_example(results) != before
    assert render_example(json.loads(json.dumps(results, sort_keys=True))) == render_example(
        results
    )


def test_the_best_of_each_number_of_steps(results):
    best = best_cells(results["tables"][0], "pixels")
    assert [(c["row"], c["steps"]) for c in best] == [("eta 0", 5), ("eta 0", 10)]


def test_texts_that_are_missing_or_unknown_are_named(results):
    card = dict(results["card"])
    del card["limits"]
    with pytest.raises(ValueError, match=r"missing \['limits'\], unknown \['limit'\]"):
        check_card({**card, "limit": []})
    without = {k: v for k, v in results["card"].items() if k != "discussion"}
    assert "What the numbers say" not in render_example({**results, "card": without})


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_committed_cards_are_rendered_from_their_measurements(folder):
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert render_example(results) == text
    for line in text.splitlines():
        if line.startswith("!["):
            picture = folder / line.split("](")[1].rstrip(")")
            assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_hub_reads_the_metadata_of_committed_cards(folder, loopback_hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", loopback_hub.url)
    card = ModelCard.load(folder / "README.md")
    card.validate()
    found = metadata_load(folder / "README.md")
    assert found["license"] and found["library_name"] == "diffusers"
    measured = model_index_to_eval_results(found["model-index"])[1]
    assert measured == card.data.eval_results and len(measured) >= 4
    assert all(isinstance(result.metric_value, float) for result in measured)


@pytest.mark.parametrize("name", ["digits-8", "fashion-mnist-32", "fashion-mnist-32-conditional"])
def test_examples_have_the_texts_of_a_card(name):
    config = load_evaluation(
        str(Path(str(files("ddim_schedulers.training"))) / "configs" / f"{name}-evaluate.yaml")
    )
    assert config.card is not None and config.card["title"] == name


def test_the_card_of_a_network_with_classes_asks_for_one(results):
    results["classes"] = ["cat", "dog"]
    card = render_example(results)
    assert "asked for by name or number: cat, dog." in card
    assert 'pipe(class_labels="cat", guidance_scale=2.0' in card
    assert "- class-conditional" in card and "pipeline_tag" not in card
    assert "DiffusionPipeline.from_pretrained" not in card  # its class cannot sample a class
    del results["classes"]
    assert "asked for by name" not in render_example(results)
