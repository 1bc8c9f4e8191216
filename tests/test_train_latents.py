"""Training behind an autoencoder: exact where the codec is, the same cached or not, refused early."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline
from safetensors.torch import load_file, save_file

from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.codec import Codec, note_scale
from ddim_schedulers.training.commands._loading import read_saved
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks.autoencoders import load_vae
from ddim_schedulers.training.parsing import load_config
from ddim_schedulers.training.train import train
from ddim_schedulers.training.trainer import latents as of_trainer
from ddim_schedulers.training.trainer.trainer import Trainer

_spec = importlib.util.spec_from_file_location(
    "latent_models", Path(__file__).with_name("latent_models.py")
)
_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_models)
ExactVae, small_vae = _models.ExactVae, _models.small_vae

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture
def settings(tmp_path):
    """Settings of a quick run behind a random AutoencoderKL, on 40 grey images of 8x8."""
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    small_vae().save_pretrained(tmp_path / "kl")

    def make(name="run", **changes):
        values = {
            "output_dir": str(tmp_path / name),
            "model": str(tmp_path / "unet.json"),
            "data": str(tmp_path / "images.npy"),
            "vae": str(tmp_path / "kl"),
            "validation_fraction": 0.2,
            "cpu": True,
            "batch_size": 8,
            "max_train_steps": 6,
            "lr": 1e-3,
            "lr_warmup_steps": 2,
            "ema_decay": 0.9,
            "progress_bar": False,
            "log_every": 1,
            "checkpoint_every": 0,
        }
        return TrainingConfig(**values | changes)

    return make


@pytest.fixture
def exact(monkeypatch):
    """Lets a run load an orthogonal codec, with the scale 1 in its config."""
    vae = ExactVae().eval().requires_grad_(False)
    note_scale(vae, 1.0, 0.0)
    monkeypatch.setattr(of_trainer, "load_vae", lambda *place: vae)
    return vae


def weights(folder):
    return load_file(Path(folder) / "unet_raw" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("cache", ["on", "off"])
def test_an_exact_codec_trains_as_on_its_latents_to_the_bit(settings, exact, tmp_path, cache):
    # steps of 1/128 and their doubles are exact in float32, in every order of the operations here
    rng = np.random.default_rng(1)
    pixels = (rng.integers(-64, 65, (40, 8, 8)) / 64).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    z = exact.encode(torch.from_numpy(pixels)[:, None]).latents
    np.save(tmp_path / "latents.npy", z.movedim(1, -1).numpy())
    common = {"value_range": [-1.0, 1.0], "max_train_steps": 20}
    behind = train(
        settings(
            "a", data=str(tmp_path / "pixels.npy"), vae_scale="config", vae_cache=cache, **common
        )
    )
    plain = train(settings("b", data=str(tmp_path / "latents.npy"), vae=None, **common))
    assert behind.losses == plain.losses and len(plain.losses) == 20
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_train_as_those_on_the_fly(settings, posterior, flip):
    common = {"vae_posterior": posterior, "random_flip": flip}
    cached = train(settings("cached", **common)).losses
    assert cached == pytest.approx(train(settings("fly", vae_cache="off", **common)).losses, 1e-5)
