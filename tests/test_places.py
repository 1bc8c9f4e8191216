"""A pipeline, a run or a checkpoint: what the verbs find, and the verb `export`."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from tiny_runs import PLAIN_UNET, quick_config

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.networks import places
from ddim_schedulers.training.train import train

# SHA-256 of the weights that come with the package
DIGITS = "225c8a226d8ef53b334c8a6b88686354363b8b19a47662708bfe599995d2de03"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped at step 2 of 4, which therefore has no pipeline."""
    root = tmp_path_factory.mktemp("runs")
    (root / "unet.json").write_text(json.dumps(PLAIN_UNET))
    steps = {"batch_size": 4, "max_train_steps": 4, "stop_after": 2, "lr_warmup_steps": 1}
    result = train(quick_config(root, "run", prediction_type="v_prediction", **steps))
    assert result.pipeline_dir is None
    assert f"sample --pipeline {root / 'run'}" in result.summary()
    return root / "run", result


def words(verb, place, output, *extra):
    return [verb, "--pipeline", str(place), "--output", str(output), *extra]


SAMPLE = ("--num_images", "1", "--num_inference_steps", "2", "--device", "cpu")


def test_a_run_and_a_checkpoint_are_sampled(stopped, tmp_path, capsys):
    run, _ = stopped
    checkpoint = run / "checkpoints" / "step-00000002"
    checkpoint = checkpoint if checkpoint.is_dir() else next((run / "checkpoints").iterdir())
    for name, place in (("run", run), ("checkpoint", checkpoint)):
        assert main(words("sample", place, tmp_path / name, *SAMPLE)) == 0
        err = capsys.readouterr().err
        assert "step 2" in err and "averaged weights" in err
    images = [(tmp_path / n / "images" / "000000.png").read_bytes() for n in ("run", "checkpoint")]
    assert images[0] == images[1]


@pytest.mark.parametrize("form", [None, "portable", "plug-in", "self-contained"])
def test_export_makes_a_pipeline_of_a_run(stopped, tmp_path, form):
    run, result = stopped
    extra = [] if form is None else ["--form", form]
    assert main(words("export", run, tmp_path / "made", *extra)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"]  # nothing half-made is left
    unet = UNet2DModel.from_pretrained(tmp_path / "made" / "unet")
    trained = result.unet.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in unet.state_dict().items())
    scheduler = MarkovianDDPMScheduler.from_pretrained(tmp_path / "made" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert main(words("sample", tmp_path / "made", tmp_path / "samples", *SAMPLE)) == 0


def test_export_takes_the_raw_weights_where_they_are_asked_for(stopped, tmp_path):
    run, _ = stopped
    for weights, folder in (("averaged", "unet_ema"), ("raw", "unet")):
        place = tmp_path / weights
        assert main(words("export", run, place, "--weights", weights)) == 0
        checkpoint = next((run / "checkpoints").iterdir())
        kept = UNet2DModel.from_pretrained(checkpoint, subfolder=folder).state_dict()
        made = UNet2DModel.from_pretrained(place / "unet").state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in made.items())


def test_export_refuses_a_folder_that_is_not_empty(stopped, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert main(words("export", stopped[0], tmp_path)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_of_a_run_the_pipeline_is_taken_unless_a_checkpoint_is_younger(
    stopped, tmp_path, tiny_ddpm
):
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    checkpoint = next((run / "checkpoints").iterdir())
    assert places.find(str(run)) == places.Place("", checkpoint)
    tiny_ddpm(MarkovianDDPMScheduler()).save_pretrained(run / "pipeline")
    index = run / "pipeline" / "model_index.json"
    for age, found in ((-10, places.Place("", checkpoint)), (10, places.Place(str(index.parent)))):
        at = (checkpoint / "state.json").stat().st_mtime + age
        os.utime(index, (at, at))
        assert places.find(str(run)) == found
        assert places.find(str(run), weights="raw") == places.Place("", checkpoint)
    assert places.find(str(run / "pipeline")) == places.Place(str(run / "pipeline"))
    (checkpoint / "state.json").write_text("{}")  # damaged: the pipeline is what is left
    with pytest.warns(UserWarning, match="damaged"):
        found = places.find(str(run))
    assert found == places.Place(str(run / "pipeline"))


def test_what_is_no_pipeline_is_said(stopped, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _ = stopped
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    data = ["--data", "digits", "--cpu"]
    for verb in (["likelihood", *data, "--output_dir", "o"], ["push", "--repo_id", "me/model"]):
        for place, message in (
            (run, "ddim-schedulers export --pipeline"),
            (tmp_path / "empty", "has no model_index.json"),
            (tmp_path / "file", "a file; it must be"),
            (tmp_path / "none", "does not exist"),
            ("./none", "does not exist"),
            ("empty/none", "does not exist"),
        ):
            assert main([verb[0], "--pipeline", str(place), *verb[1:]]) == 2, (verb, place)
            assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(stopped, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(next((stopped[0] / "checkpoints").iterdir()), folder)
    weights = next((folder / "unet_ema").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(words("sample", folder, tmp_path / "out", *SAMPLE)) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_loaded_export_is_a_pipeline_of_diffusers(stopped, tmp_path):
    assert main(words("export", stopped[0], tmp_path / "made")) == 0
    pipe = DDPMPipeline.from_pretrained(tmp_path / "made")
    assert (pipe.scheduler.config.variance_type, type(pipe).__name__) == (
        "fixed_small",
        "DDPMPipeline",
    )


def test_what_is_pushed_is_here_and_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    from ddim_schedulers.training.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["push", "--pipeline", "nothere", "--repo_id", "a/b"]) == 2
    said = capsys.readouterr().err
    assert (
        "'nothere', which does not exist; it must be a pipeline's folder" in said
        and "Hub" not in said
    )


def test_the_pipeline_that_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = places.find("digits")
    weights = Path(found.name) / "unet" / "diffusion_pytorch_model.safetensors"
    # made by the commands of its README; other weights need another line here
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == DIGITS
    assert sum(p.stat().st_size for p in Path(found.name).rglob("*") if p.is_file()) < 2**20
    config = json.loads((weights.parent / "config.json").read_text())
    assert "_name_or_path" not in config  # where it was on the machine that made it
    pipe = GenerationPipeline.from_pretrained(found.name)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(seeds=range(32), num_inference_steps=20, output_type="pt").images
    assert images.shape == (32, 1, 8, 8)
    # a digit is dark at its border and light inside
    assert float(images[..., 2:6, 2:6].mean()) > 0.35 > 0.2 > float(images[..., 0].mean())


def test_a_folder_of_the_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "model_index.json").write_text("{}")
    assert places.find("digits") == places.Place("digits")
