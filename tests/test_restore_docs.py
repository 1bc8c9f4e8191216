"""docs/restore.md: its code runs, and its pictures are there."""

import re
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from tiny_models import tiny_unet

PAGE = Path(__file__).parents[1] / "docs" / "restore.md"


def test_the_code_runs(tmp_path, monkeypatch):
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    restored = names["restored"]
    assert len(blocks) == 1 and len(restored.images) == 6 and len(restored.mean) == 2
    assert float(restored.residual.max()) < 1e-6


def test_every_picture_shown_is_there_and_small():
    shown = re.findall(r"\]\(images/(.*?)\)", PAGE.read_text())
    assert len(shown) >= 2
    for name in shown:
        path = PAGE.parent / "images" / name
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            image.verify()
