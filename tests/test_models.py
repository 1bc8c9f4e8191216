"""Which networks are trained, and which are refused."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks.models import PRESETS, load_unet, make_scheduler, make_unet


def on_meta(*args, **kwargs):
    with torch.device("meta"):
        return make_unet(*args, **kwargs)


@pytest.mark.parametrize(
    ("preset", "channels", "side", "millions"),
    [("ddpm-cifar10", 3, 32, 35.7), ("ddpm-256", 3, 256, 113.7), ("small", 1, 32, 1.1)],
)
def test_presets_have_the_size_of_the_papers(preset, channels, side, millions):
    """DDPM, App. B: 35.7 M parameters for CIFAR-10 and 114 M at 256x256."""
    unet = on_meta(preset, channels=channels, size=(side, side))
    count = sum(p.numel() for p in unet.parameters())
    assert round(count / 1e6, 1) == millions
    assert unet.config.sample_size == side


def test_every_preset_is_made_and_documented_by_the_help():
    for preset in PRESETS:
        assert isinstance(on_meta(preset, channels=1, size=(32, 32)), UNet2DModel)


def test_channels_follow_the_data_and_the_variance():
    unet = on_meta("tiny", channels=5, size=(8, 16), learned_variance=True, dropout=0.25)
    assert (unet.config.in_channels, unet.config.out_channels) == (5, 10)
    assert unet.config.sample_size == (8, 16) and unet.config.dropout == 0.25


def test_a_config_file_of_diffusers_is_taken_and_checked(tmp_path):
    path = tmp_path / "config.json"

    def write(**changes):
        values = dict(on_meta("tiny", channels=1, size=(8, 8)).config) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if k[0] != "_"}))
        return str(path)

    same = on_meta(write(in_channels=1, sample_size=4), channels=1, size=(8, 8))
    assert same.config.block_out_channels == (32, 64) or same.config.block_out_channels == [32, 64]
    with pytest.raises(ValueError, match="whose `in_channels` is 3; it must be 1"):
        on_meta(write(in_channels=3), channels=1, size=(8, 8))
    with pytest.raises(ValueError, match="are none of UNet2DModel"):
        on_meta(write(depth=3), channels=1, size=(8, 8))
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="must be that of a UNet2DModel"):
        on_meta(str(path), channels=1, size=(8, 8))
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        on_meta(str(path), channels=1, size=(8, 8))
    with pytest.raises(ValueError, match="it must be one of .*ddpm-cifar10"):
        on_meta("huge", channels=1, size=(8, 8))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"num_class_embeds": 10}, "is class-conditional, and class_conditional is false"),
        ({"class_embed_type": "timestep"}, "`class_embed_type` is 'timestep'; it must be null"),
    ],
)
def test_conditional_networks_are_refused_where_no_classes_are_asked_for(tmp_path, key, said):
    values = {k: v for k, v in PRESETS["tiny"].items()} | key
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        on_meta(str(tmp_path / "config.json"), channels=1, size=(8, 8))
    unet = UNet2DModel(**PRESETS["tiny"], **key, in_channels=1, out_channels=1, sample_size=8)
    unet.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=said):
        load_unet(str(tmp_path / "trained"), channels=1, size=(8, 8), learned_variance=False)


def test_a_config_file_with_classes_fits_the_data_or_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS["tiny"] | {"num_class_embeds": 11}))
    unet = on_meta(str(path), channels=1, size=(8, 8), num_class_embeds=11)
    assert unet.config.num_class_embeds == 11
    with pytest.raises(ValueError, match="whose `num_class_embeds` is 11; it must be 4"):
        on_meta(str(path), channels=1, size=(8, 8), num_class_embeds=4)


def test_sizes_that_the_network_cannot_halve_are_refused():
    with pytest.raises(ValueError, match="images of 28x30, .* multiples of 4"):
        on_meta("small", channels=1, size=(28, 30))


def test_fine_tuning_starts_from_a_pipeline_or_a_unet(tmp_path):
    unet = make_unet("tiny", channels=1, size=(8, 8))
    DDPMPipeline(unet=unet, scheduler=make_scheduler(TrainingConfig())).save_pretrained(
        tmp_path / "p"
    )
    fits = {"channels": 1, "size": (8, 8), "learned_variance": False}
    for place in ("p", "p/unet"):
        loaded = load_unet(str(tmp_path / place), **fits)
        assert all(map(torch.equal, loaded.parameters(), unet.parameters()))
    with pytest.raises(ValueError, match="1 channels in and 1 out; they must be 1 and 2"):
        load_unet(str(tmp_path / "p"), **(fits | {"learned_variance": True}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must have a UNet2DModel that can be loaded"):
        load_unet(str(tmp_path / "empty"), **fits)
