"""The demo, end to end with the smallest settings: what it writes is whole and loads."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_schedulers.training import demo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = demo.DemoSettings(
        tmp_path_factory.mktemp("digits"), 0, 8, 12, 16, steps=(3, 5), long_steps=6
    )
    return settings, demo.run_demo(settings)


def test_table_has_every_cell_with_the_same_n(run):
    settings, results = run
    cells = {(cell["member"], cell["steps"]) for cell in results["table"]}
    every = {(member.name, s) for member in demo.MEMBERS for s in settings.steps}
    assert cells == every | {(member.name, settings.long_steps) for member in demo.LONG_MEMBERS}
    assert {cell["n"] for cell in results["table"]} == {settings.num_images}
    assert all(cell["network_calls"] == cell["steps"] for cell in results["table"])
    assert json.loads((settings.output / "results.json").read_text()) == results


def test_page_shows_each_cell_and_picture(run):
    settings, results = run
    page = (settings.output / "results.md").read_text()
    for cell in results["table"]:
        assert format(cell["frechet"], ".2f") in page
    for picture in [*results["pictures"], "reconstruction.png"]:
        assert f"({picture})" in page
        pixels = np.asarray(Image.open(settings.output / picture).convert("L"))
        assert pixels.std() > 10, f"{picture} is blank"


def test_pipeline_loads_without_this_package_and_without_a_warning(run):
    settings, _ = run
    program = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "sys.modules['ddim_schedulers'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(settings.output / 'pipeline')!r})\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "print(type(pipe.scheduler).__name__, len(pipe(num_inference_steps=2).images))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DDPMScheduler", "1"]
    complaints = [
        line for line in done.stderr.splitlines() if line and "Loading pipeline" not in line
    ]
    assert not complaints, done.stderr


def test_judge_tells_digits_from_noise_and_from_a_shift():
    data = demo._Digits()
    judge = demo._Judge(data)
    assert judge.real["held_out_accuracy"] >= 0.95
    real = judge.training_images(256, 0)
    noise = judge(torch.randn(256, 1, 8, 8))
    shifted = judge(data.train[:256].roll(1, dims=-1))  # a mutation: all digits one pixel off
    assert real["frechet"] < 0.2 * shifted["frechet"] < noise["frechet"]
    assert real["classes"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_images": 1}, "`num_images` is 1"), ({"steps": (0, 10)}, "`steps` is \\(0, 10\\)")],
)
def test_settings_out_of_range_are_refused_before_training(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        demo.run_demo(demo.DemoSettings(tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_its_folder_has_one_owner(tmp_path, monkeypatch):
    """A `sample` into the folder is refused meanwhile, and a second demo while it samples."""
    from ddim_schedulers.pipelines import alive, ownership

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_train", lambda settings: record(settings.output))
        found = []

        def record(folder):
            found.append(json.loads((folder / ".owner-0.json").read_text())["verb"])
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(demo.DemoSettings(tmp_path))
    assert found == ["demo"] and not list(tmp_path.iterdir())
    other = alive.identity() | {"verb": "sample", "token": "x", "rank": 0, "host": "b"}
    (tmp_path / ".owner-0.json").write_text(json.dumps(other | {"system": "b", "parts": None}))
    with pytest.raises(ownership.FolderInUseError, match="in use by `sample` on host b"):
        demo.run_demo(demo.DemoSettings(tmp_path))
