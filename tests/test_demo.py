"""The demo, end to end with the smallest settings: what it writes is whole and loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_schedulers.training import demo
from ddim_schedulers.training.common.storage import slug
from ddim_schedulers.training.metrics.classifier import load_classifier

# of stock code, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = demo.DemoSettings(
        tmp_path_factory.mktemp("digits"), 0, 8, 12, 16, steps=(3, 5), long_steps=6, few_steps=(2,)
    )
    return settings, demo.run_demo(settings)


def test_table_has_every_cell_with_the_same_n(run):
    settings, results = run
    cells = {(cell["member"], cell["steps"]) for cell in results["table"]}
    rows = ["eta 0", "eta 0.2", "eta 0.5", "eta 1", "sigma-hat"]
    every = {(f"{row}, trailing", s) for row in rows for s in settings.steps}
    long = {(f"{row}, trailing", settings.long_steps) for row in (rows[0], rows[-1])}
    few = {(row, s) for row in demo.FEW for s in settings.few_steps}
    assert cells == every | long | few
    assert {cell["n"] for cell in results["table"]} == {settings.num_images}
    assert all(cell["network_calls"] == cell["steps"] for cell in results["table"])
    assert all(0 <= c["sure_share"] <= 1 <= c["classes"] <= 10 for c in results["table"])
    written = json.loads((settings.output / "results.json").read_text())
    assert written | {"short": results["short"]} == results


def test_page_shows_each_cell_and_picture(run):
    settings, results = run
    page = (settings.output / "results.md").read_text()
    report = settings.output / "evaluation" / "report.md"
    assert f"({report.relative_to(settings.output)})" in page and results["short"] in page
    for cell in results["table"]:
        assert format(cell["frechet"], ".3f") in page and format(cell["seconds"], ".1f") in page
        assert format(cell["frechet"], ".3f") in report.read_text()
    for picture in ("samples.png", "few.png", "ways.png", "evaluation/digits-nearest.png"):
        assert f"({picture})" in page
        pixels = np.asarray(Image.open(settings.output / picture).convert("L"))
        assert pixels.std() > 10, f"{picture} is blank"


def test_the_share_of_sure_samples_is_that_of_the_stored_images(run):
    settings, results = run
    folder = settings.output / "evaluation"
    network = load_classifier(folder / "classifier.safetensors")
    for cell in results["table"]:
        (place,) = folder.glob(f"cells/{slug(cell['member'])}-S{cell['steps']}-*/shards/*.npz")
        images = torch.from_numpy(np.load(place)["images"]).movedim(-1, 1) / 127.5 - 1
        highest = network.head(network(images)).softmax(1).amax(1)
        assert cell["sure_share"] == pytest.approx(float((highest >= demo.SURE).float().mean()))


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
        patch.setattr(demo, "train", lambda config: record(Path(config.output_dir).parent))
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
