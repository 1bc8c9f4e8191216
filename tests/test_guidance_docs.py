"""docs/guidance.md: its code runs."""

import copy
import re
from pathlib import Path

from diffusers import DDPMPipeline
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels

PAGE = Path(__file__).parents[1] / "docs" / "guidance.md"


def test_the_code_runs(tmp_path, monkeypatch):
    unet = tiny_unet(num_class_embeds=3)
    note_class_labels(unet, 2, ["cat", "dog"])
    scheduler = GeneralizedDDIMScheduler(timesteps=[900, 500, 100])  # three steps are enough here
    earlier = DDPMPipeline(unet=copy.deepcopy(unet), scheduler=scheduler)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "my-classes")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"earlier": earlier}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert len(blocks) == 3 and names["pipe"].unet.config.num_class_embeds == 3
