"""The evaluation of a network with classes: balanced labels, scales, what is recognised."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from sklearn.datasets import load_digits

from ddim_schedulers.class_labels import ClassLabels, note_class_labels
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.data.images import load_data
from ddim_schedulers.training.evaluation.config import parse_evaluation
from ddim_schedulers.training.evaluation.references import RealImages, labels_of, rows_of
from ddim_schedulers.training.evaluation.report import evaluate, markdown
from ddim_schedulers.training.metrics.distances import recognised

GRID = [
    {
        "steps": [2],
        "members": [0],
        "guidance": [0, 1, 2, {"scale": 3, "interval": [0.2, 0.8]}, {"scale": 2, "guide": "EARLY"}],
    }
]


def tiny_unet(seed, classes=11):
    unet = tiny_models.tiny_unet(seed=seed, num_class_embeds=classes)
    if classes is not None:
        note_class_labels(unet, 10, [f"digit {i}" for i in range(10)])
    return unet


def settings(folder, early, **changes):
    grid = json.loads(json.dumps(GRID).replace("EARLY", str(early)))
    return {
        "pipeline": str(folder / "classes"),
        "output_dir": str(folder / "out"),
        "data": {"data": "digits"},
        "features": ["classifier"],
        "classifier_epochs": 1,
        "batch_size": 8,
        "tables": [{"name": "Sweep", "n": 20, "grid": grid}],
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    scheduler = DDPMScheduler(num_train_timesteps=12, beta_end=0.5)
    for name, unet in (("classes", tiny_unet(0)), ("early", tiny_unet(1))):
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder / name)
    other = DDPMScheduler(num_train_timesteps=12, beta_end=0.4)
    DDPMPipeline(unet=tiny_unet(1), scheduler=other).save_pretrained(folder / "other")
    plain = DDPMPipeline(unet=tiny_unet(0, None), scheduler=scheduler)
    plain.save_pretrained(folder / "plain")
    return folder


def test_a_sweep_over_the_guidance_scale(folder, log):
    config = parse_evaluation(settings(folder, folder / "early"))
    evaluation, results, written = evaluate(config, warns=False)
    assert "float32" not in log.text
    (table,) = results["tables"]
    rows = [cell["row"] for cell in table["cells"]]
    name = "eta 0, trailing"
    assert rows == [
        f"{name}, w 0",
        f"{name}, w 1",
        f"{name}, w 2",
        f"{name}, w 3, interval 0.2 0.8",
        f"{name}, w 2, guide early",
    ]
    for cell in table["cells"]:
        measured = cell["metrics"]["classifier"]
        if cell["row"].endswith("w 0"):  # no class was asked for
            assert "recognised" not in measured
            continue
        shares = measured["recognised_by_class"]
        assert list(shares) == [f"digit {i}" for i in range(10)]
        assert measured["recognised"]["mean"] == pytest.approx(np.mean(list(shares.values())))
    assert table["guidance"][rows[3]] == {
        "base": name,
        "guidance_scale": 3,
        "guidance_interval": (0.2, 0.8),
    }
    text = markdown(results)
    assert "| share recognised | S | mean | digit 0 |" in text and "| recognised |" in text
    (picture,) = [p for p in written if p.name == "sweep-guidance.png"]
    assert np.asarray(Image.open(picture)).std() > 1
    # another call measures nothing anew, and other guidance has cells of its own
    again = evaluate(config, warns=False)[1]
    assert again["tables"][0]["cells"] == table["cells"]


def test_what_is_recognised_is_counted_by_class():
    logits = torch.eye(3)[[0, 1, 1, 2, 0]]
    assert recognised(logits, [5, 5, 7, 9, 9], [5, 7, 9]) == {5: 0.5, 7: 1.0, 9: 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("2", r"`guidance` is '2'; it must be a mapping"),
        ({"weight": 2}, "`weight` is an unknown key"),
        ({"scale": 2, "interval": [0.8, 0.2]}, "guidance: `interval` is"),
        ({"interval": [0.2, 0.8]}, "guidance: `scale` is None, and `interval` would"),
        ({"scale": float("nan")}, "guidance: `scale` is nan"),
        ({"scale": 2, "guide": 3}, "`guide` is 3; it must be a path"),
    ],
)
def test_bad_guidance_is_named_when_the_file_is_read(folder, change, message):
    tables = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0], "guidance": [change]}]}]
    with pytest.raises(ValueError, match=message):
        parse_evaluation(settings(folder, "", tables=tables))


@pytest.mark.parametrize(
    ("pipeline", "change", "message"),
    [
        ("plain", 2, "`scale` is 2, but `unet` is unconditional"),
        ("classes", {"scale": 2, "labels": ["digit 11"]}, r"`labels\[0\]` is 'digit 11'"),
        ("classes", {"scale": 2, "guide": "other"}, "`guide` was trained with other noise levels"),
        ("classes", {"scale": 2, "guide": "nothing"}, "nothing"),
    ],
)
def test_what_does_not_fit_is_refused_before_sampling(folder, tmp_path, pipeline, change, message):
    if isinstance(change, dict) and "guide" in change:
        change = {**change, "guide": str(folder / change["guide"])}
    tables = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0], "guidance": [change]}]}]
    asked = settings(
        folder,
        "",
        pipeline=str(folder / pipeline),
        output_dir=str(tmp_path),
        tables=tables,
        features=["pixels"],
    )
    with pytest.raises(ValueError, match=message):
        evaluate(parse_evaluation(asked))
    assert not list(tmp_path.glob("cells/*"))


def _texts(tmp_path, **changes):
    """Returns a config for digits whose labels are texts: a0 .. a9 in the order 9 .. 0."""
    digits = load_digits()
    path = tmp_path / "digits.npz"
    images = (digits.images * 15.9).astype(np.uint8)[..., None]
    np.savez(path, images=images, kind=np.array([f"a{9 - n}" for n in digits.target]))
    data = {"data": str(path), "array_key": "images", "validation_fraction": 0.5}
    asked = settings(tmp_path, "", data=data, labels="kind", classifier_epochs=4, **changes)
    return parse_evaluation({**asked, "output_dir": str(tmp_path / "out"), "tables": [TABLE]})


TABLE = {"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}


def test_classes_are_recognised_by_name(tmp_path):
    # the network has the order of the digits, the data that of the texts
    config = _texts(tmp_path)
    classes = ClassLabels(11, 10, {n: f"a{9 - n}" for n in range(10)})
    for _ in range(2):  # trained, then read
        real = RealImages(config, Team(), torch.device("cpu"), (1, 8, 8), lambda _: None)
        real.prepare()
        features = real.features["classifier"].held_out
        labels = load_digits().target[real.held_out.ids]
        found = real.measure("classifier", features, labels.tolist(), classes)
        assert found["recognised"] > 0.6
        assert set(found["recognised_by_class"]) == {f"a{n}" for n in range(10)}
        # the mutation: in the order of the data no class but the middle ones would be right
        plain = real.measure("classifier", features, labels.tolist(), ClassLabels(11, 10))
        assert plain["recognised"] < 0.3


def test_a_classifier_of_other_classes_recognises_none():
    network = ClassLabels(4, 0, {1: "cat", 2: "dog", 3: "owl"})
    assert rows_of(["owl", "cat", "dog"], network) == [3, 1, 2]
    assert rows_of(["owl", "cat"], network) == [3, 1]  # the data have no dog
    assert rows_of(["owl", "cat", "bee"], network) is None
    assert rows_of([0, 1, 2], network) == [1, 2, 3]
    assert rows_of([0, 1], network) is None
    assert rows_of(["owl", "cat", "dog"], ClassLabels(4, 0)) == [1, 2, 3]


def test_labels_of_a_classifier_are_read_as_in_training(tmp_path):
    for split in ("train", "test"):  # folders of splits are no classes
        for name in ("2", "10"):
            (tmp_path / "sets" / split / name).mkdir(parents=True)
            for i in range(2):
                image = Image.new("L", (8, 8), int(name) * 20 + i)
                image.save(tmp_path / "sets" / split / name / f"{i}.png")
    data = {"data": str(tmp_path / "sets" / "train"), "image_mode": "L", "validation_fraction": 0}
    config = parse_evaluation(settings(tmp_path, "", data=data, labels="folders", tables=[TABLE]))
    labels, called = labels_of(load_data(config.data)[0], config)
    assert called == ["2", "10"] and labels.tolist() == [1, 1, 0, 0]
    for change, message in (
        ({"labels": "nothing"}, "`labels` is 'nothing': .*'nothing'"),
        ({"labels": None}, "`labels` is not set"),
    ):
        asked = settings(tmp_path, "", data=data, tables=[TABLE], **change)
        config = parse_evaluation(asked)
        with pytest.raises(ValueError, match=message):
            labels_of(load_data(config.data)[0], config)
