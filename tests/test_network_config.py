"""What a saved network says of itself is checked before a network of that size is built."""

import json
import tracemalloc

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ddim_schedulers.network_config import check_network_config
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.likelihood.measured_model import load_subject
from ddim_schedulers.training.networks.models import PRESETS

BAD = {
    "sample_size": (0, -8, 10**9, 8.0, "8", [8], [8, 8, 8], True),
    "in_channels": (0, None, 10**9, 1.0, [1]),
    "block_out_channels": ([], [8] * 99, [8, 10**9], [8, -8], [8, "8"], 8, None, "88", {"a": 8}),
    "down_block_types": ([5, 5], None, "DownBlock2D", ["x" * 1000] * 2, ["DownBlock2D"]),
    "layers_per_block": (0, 10**9, 1.0, None, True),
    "norm_num_groups": (0, "4", 10**400),
    "norm_eps": (float("nan"), -1, "x"),
    "dropout": (None, 2, "0"),
    "act_fn": (None, 5, []),
    "attention_head_dim": (0, "8", 8.5),
    "time_embedding_type": (None, "x", []),
    "add_attention": (1, "true"),
    "num_class_embeds": (10**12, "5"),
}


@pytest.fixture(scope="module")
def saved(tiny_ddpm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_ddpm(DDPMScheduler(num_train_timesteps=12, beta_end=0.5)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", BAD)
def test_a_value_that_no_network_has_is_named(saved, key):
    path = saved / "unet" / "config.json"
    whole = path.read_text()
    for value in BAD[key]:
        path.write_text(json.dumps(json.loads(whole) | {key: value}))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="config.json") as caught:
                load_subject(saved)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
            path.write_text(whole)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    load_subject(saved)


def test_every_published_kind_of_network_passes():
    for name, preset in PRESETS.items():
        check_network_config(preset, name)
    check_network_config(UNet2DModel().config, "diffusers' own defaults")


def test_weights_that_are_not_there_are_named(saved, tmp_path, capsys):
    DDPMPipeline.from_pretrained(saved).save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="lack 1 tensors .* conv_in.weight"):
        load_subject(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors' cannot be read: .* no whole"):
        load_subject(tmp_path)
    arguments = ["--pipeline", str(tmp_path), "--num_images", "1", "--output", str(tmp_path / "o")]
    capsys.readouterr()
    assert main(["sample", *arguments]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors' cannot be read" in said and len(said.splitlines()) == 1
