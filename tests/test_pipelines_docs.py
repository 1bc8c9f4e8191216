"""docs/pipelines.md: its code runs, and makes the pictures that the page shows."""

import re
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from tiny_models import tiny_unet

PAGE = Path(__file__).parents[1] / "docs" / "pipelines.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHOWN = re.findall(r"\]\(images/(.*?)\)", TEXT)
MADE_BY_PROOFS = {"reconstruction_error.png"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "my-model"
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_runs_and_makes_its_pictures(number, model, tmp_path, monkeypatch):
    (tmp_path / "my-model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"{PAGE.name}, block {number}", "exec"), {})
    made = {p.name for p in tmp_path.glob("*.png")}
    assert made and made <= set(SHOWN)


def test_every_picture_shown_is_there_and_small():
    made = set(re.findall(r"\.save\(\"(.*?)\"\)", "".join(BLOCKS)))
    assert made | MADE_BY_PROOFS == set(SHOWN)
    for name in SHOWN:
        path = PAGE.parent / "images" / name
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            image.verify()
