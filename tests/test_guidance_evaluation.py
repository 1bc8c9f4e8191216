"""The evaluation of a network with classes: balanced labels, scales, what is recognised."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.training.evaluation.config import parse_evaluation
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
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
    ).eval()
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


def test_a_sweep_over_the_guidance_scale(folder):
    config = parse_evaluation(settings(folder, folder / "early"))
    evaluation, results, written = evaluate(config, warns=False)
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
        ({"scale": 2, "interval": [0.8, 0.2]}, "guidance: `guidance_interval` is"),
        ({"interval": [0.2, 0.8]}, "guidance: `guidance_scale` is None"),
        ({"scale": float("nan")}, "guidance: `guidance_scale` is nan"),
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
        ("plain", 2, "`guidance_scale` is 2, but `unet` is unconditional"),
        ("classes", {"scale": 2, "labels": ["digit 11"]}, "'digit 11'"),
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
