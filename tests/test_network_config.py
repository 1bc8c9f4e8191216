"""What a saved network says of itself is checked before a network of that size is built."""

import json
import resource
import shutil
import sys
import time
import tracemalloc

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ddim_schedulers.network_config import check_network_config
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.commands._loading import read_saved
from ddim_schedulers.training.likelihood.measured_model import load_measured_model
from ddim_schedulers.training.networks.models import PRESETS, make_unet

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
                load_measured_model(saved)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
            path.write_text(whole)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    load_measured_model(saved)


WIDEST = {
    "block_out_channels": [16384] * 12,
    "down_block_types": ["AttnDownBlock2D"] * 12,
    "up_block_types": ["AttnUpBlock2D"] * 12,
    "layers_per_block": 16,
}
WHOLES = {
    "parameters": (WIDEST, r"has 3\d{12} parameters; it must have at most 4000000000"),
    "classes": ({"num_class_embeds": 10**6, "block_out_channels": [16384] * 4}, "parameters"),
    "pixels": ({"sample_size": 16384, "in_channels": 3}, "805306368 values"),
    "blocks": ({"up_block_types": ["UpBlock2D", "Nothing", "UpBlock2D", "UpBlock2D"]}, "Nothing"),
    "groups": ({"norm_num_groups": 5}, "no UNet2DModel has these settings"),
    "as many": ({"block_out_channels": [32] * 3}, "`block_out_channels` has 3, `down_block_ty"),
    "number of blocks": ({"down_block_types": ["DownBlock2D"] * 10_000}, "1 to 12 names"),
}


@pytest.mark.parametrize(("change", "message"), WHOLES.values(), ids=list(WHOLES))
def test_the_whole_network_is_bounded_before_it_takes_memory(change, message, saved, tmp_path):
    """Each number may be within its own bound; the network is counted without its memory."""
    config = {
        key: list(v) if isinstance(v, tuple) else v for key, v in UNet2DModel().config.items()
    }
    config = {key: v for key, v in config.items() if not key.startswith("_")} | change
    (tmp_path / "unet.json").write_text(json.dumps(config))
    shutil.copytree(saved, tmp_path / "p")
    # of another class by its own word: the index decides what diffusers builds
    other = {**config, "_class_name": "AutoencoderKL"}
    (tmp_path / "p" / "unet" / "config.json").write_text(json.dumps(other))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=message):
        make_unet(str(tmp_path / "unet.json"), channels=3, size=(32, 32))
    for load in (load_measured_model, read_saved):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / "p"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert time.process_time() - begun < 30


def test_counting_draws_no_random_numbers():
    torch.manual_seed(0)
    check_network_config({}, "diffusers' own defaults")
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("unet", ["diffusers", "UNet2DConditionModel"]),
        ("unet", ["os", "system"]),
        ("unet", "UNet2DModel"),
        ("scheduler", ["os", "system"]),
        ("scheduler", ["antigravity", "AnyScheduler"]),
        ("scheduler", ["diffusers", 5]),
        ("scheduler", 5),
    ],
)
def test_an_index_names_no_other_classes(part, entry, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "p")
    path = tmp_path / "p" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: entry}))
    with pytest.raises(ValueError, match=f"`{part}` is .*; it must be a"):
        read_saved(str(tmp_path / "p"))
    assert "antigravity" not in sys.modules


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
        load_measured_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors' cannot be read: .* no whole"):
        load_measured_model(tmp_path)
    arguments = ["--pipeline", str(tmp_path), "--num_images", "1", "--output", str(tmp_path / "o")]
    capsys.readouterr()
    assert main(["sample", *arguments]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors' cannot be read" in said and len(said.splitlines()) == 1
