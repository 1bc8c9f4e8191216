"""docs/restore.md: its code runs, and its pictures are there."""

import re
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "restore.md"


def test_the_code_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "my-model")
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
