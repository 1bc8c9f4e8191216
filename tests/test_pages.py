"""Pages whose code is run here: it works, and the pictures that a page shows are there."""

import copy
import re
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels

DOCS = Path(__file__).parents[1] / "docs"
MADE_BY_PROOFS = {"reconstruction_error.png"}


def text_of(page):
    return (DOCS / f"{page}.md").read_text()


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def shown_on(page):
    return re.findall(r"\]\(images/(.*?)\)", text_of(page))


def run(page, blocks, names):
    """Runs blocks of a page one after the other with the same names, which it returns."""
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder that the pages work in, with their model."""
    monkeypatch.chdir(tmp_path)
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained("my-model")
    return tmp_path


@pytest.mark.parametrize("block", blocks_of("pipelines"))
def test_each_block_about_pipelines_makes_its_pictures(block, folder):
    run("pipelines", [block], {})
    made = {p.name for p in folder.glob("*.png")}
    assert made and made <= set(shown_on("pipelines"))


@pytest.mark.parametrize("block", blocks_of("edit"))
def test_each_block_about_editing_runs(block):
    assert {"edited", "made", "found"} & set(run("edit", [block], {}))


def test_the_blocks_about_restoration_run():
    blocks = blocks_of("restore")
    restored = run("restore", blocks, {})["restored"]
    assert len(blocks) == 1 and len(restored.images) == 6 and len(restored.mean) == 2
    assert float(restored.residual.max()) < 1e-6


def test_the_blocks_about_guidance_run():
    unet = tiny_unet(num_class_embeds=3)
    note_class_labels(unet, 2, ["cat", "dog"])
    scheduler = GeneralizedDDIMScheduler(timesteps=[900, 500, 100])  # three steps are enough here
    earlier = DDPMPipeline(unet=copy.deepcopy(unet), scheduler=scheduler)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained("my-classes")
    blocks = blocks_of("guidance")
    names = run("guidance", blocks, {"earlier": earlier})
    assert len(blocks) == 3 and names["pipe"].unet.config.num_class_embeds == 3


@pytest.mark.parametrize("page", ["pipelines", "restore"])
def test_every_picture_shown_is_there_and_small(page):
    shown = shown_on(page)
    assert len(shown) >= 2
    if page == "pipelines":
        made = set(re.findall(r"\.save\(\"(.*?)\"\)", "".join(blocks_of(page))))
        assert made | MADE_BY_PROOFS == set(shown)
    for name in shown:
        path = DOCS / "images" / name
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            image.verify()
