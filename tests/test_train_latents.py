"""Training behind an autoencoder: exact where the codec is, the same cached or on the fly."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LDMPipeline
from PIL import Image as PIL
from safetensors.torch import load_file, save_file
from tiny_models import ExactVae, tiny_vae
from tiny_runs import PLAIN_UNET, quick_config

from ddim_schedulers.export import export_folder
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.codec import Codec, note_scale
from ddim_schedulers.training.commands._loading import read_saved
from ddim_schedulers.training.data import latents as of_data
from ddim_schedulers.training.data.images import load_data
from ddim_schedulers.training.networks.autoencoders import load_vae
from ddim_schedulers.training.networks.models import make_unet
from ddim_schedulers.training.parsing import load_config
from ddim_schedulers.training.train import train
from ddim_schedulers.training.trainer import latents as of_trainer
from ddim_schedulers.training.trainer.trainer import Trainer


@pytest.fixture
def settings(tmp_path):
    """Settings of a quick run behind a random AutoencoderKL, on 40 grey images of 8x8."""
    (tmp_path / "unet.json").write_text(json.dumps(PLAIN_UNET | {"block_out_channels": [8, 16]}))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    tiny_vae().save_pretrained(tmp_path / "kl")

    def make(name="run", **changes):
        values = {
            "data": str(tmp_path / "images.npy"),
            "vae": str(tmp_path / "kl"),
            "validation_fraction": 0.2,
            "max_train_steps": 6,
            "log_every": 1,
        }
        return quick_config(tmp_path, name, **values | changes)

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


def test_a_resumed_run_is_the_run_without_a_break(settings, tmp_path):
    whole = train(settings("whole")).losses
    first = train(settings("parts", stop_after=3, vae_cache="off")).losses
    # the scale is the checkpoint's, and where the autoencoder lies does not matter
    (tmp_path / "kl").rename(tmp_path / "elsewhere")
    later = train(settings("parts", resume="latest", vae=str(tmp_path / "elsewhere")))
    assert first + later.losses == pytest.approx(whole, 1e-5) and len(whole) == 6
    tiny_vae(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`resume`.*vae was"):
        train(settings("parts", resume="latest", vae=str(tmp_path / "other")))


def test_a_run_leaves_a_pipeline_that_diffusers_samples_with_the_measured_scale(settings, tmp_path):
    result = train(settings())
    vae = json.loads((tmp_path / "run/pipeline/vqvae/config.json").read_text())
    images = torch.from_numpy(np.load(tmp_path / "images.npy"))[:, None] / 127.5 - 1
    raw = Codec(load_vae(str(tmp_path / "kl")))
    ids = np.sort(np.random.default_rng(0).permutation(40)[8:])  # those that are not held out
    mean, log_variance = raw.moments(images[ids]).double().chunk(2, dim=1)
    expected = (mean.var(unbiased=False) + log_variance.exp().mean()).sqrt()
    assert vae["scaling_factor"] == pytest.approx(1 / float(expected), rel=1e-5)
    pipe = GenerationPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert not result.scheduler.config.clip_sample and not pipe.scheduler.config.clip_sample
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert isinstance(stock, LDMPipeline)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    pipe = GenerationPipeline.from_pipe(pipe, scheduler=stock.scheduler)
    pipe.set_progress_bar_config(disable=True)
    mine = pipe(seeds=[3], num_inference_steps=4, eta=0.0, output_type="np").images
    stock.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(3)
    theirs = stock(generator=source, num_inference_steps=4, output_type="np").images
    assert np.abs(mine - theirs).max() < 1e-3
    # a checkpoint finds the run's autoencoder, with the same scale
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-*")
    saved = read_saved(str(checkpoint))
    assert Codec(saved.vae).scale == pytest.approx(vae["scaling_factor"])
    assert not saved.scheduler.config.clip_sample


def test_latents_are_encoded_once_and_again_for_other_contents(settings, tmp_path, monkeypatch):
    calls = []
    encode = Codec.moments

    def counted(codec, x):
        calls.append(len(x))
        return encode(codec, x)

    monkeypatch.setattr(Codec, "moments", counted)
    losses = train(settings(random_flip=True)).losses
    assert sum(calls) == 32 + 2 * 32  # for the scale; and both views of 32 images
    calls.clear()
    again = settings(random_flip=True, max_train_steps=8, resume="latest")
    train(again)
    assert sum(calls) == 32
    (chunk,) = (tmp_path / "run/latents").iterdir()
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    calls.clear()
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert train(settings(random_flip=True)).losses == losses  # a damaged file is made again
    assert sum(calls) == 32 + 2 * 32
    tiny_vae(seed=5).save_pretrained(tmp_path / "kl")
    calls.clear()
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(settings())
    assert sum(calls) == 32 + 32


@pytest.mark.parametrize("kind", ["kl", "vq", "tiny"])
def test_processes_share_the_encoding_and_find_the_same(settings, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(of_data, "CHUNK", 10)
    data = load_data(settings())[0]
    codec = Codec(tiny_vae(kind))
    caches = [
        of_data.LatentCache(tmp_path / name, "f", data, True, print) for name in ("one", "two")
    ]
    assert caches[0].fill(codec.moments) == 4
    assert [caches[1].fill(codec.moments, i, 3) for i in range(3)] == [2, 1, 1]
    rows = np.array([31, 0, 9, 10, 9])
    for one, two in zip(caches[0].rows(rows), caches[1].rows(rows), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    plain, mirrored, used = caches[0].rows(rows)
    images = data.batch(rows)[0]
    assert torch.allclose(plain, codec.moments(images), atol=1e-5)
    assert torch.allclose(mirrored, codec.moments(images.flip(-1)), atol=1e-5)
    assert used.tolist() == data.ids[rows].tolist()
    assert len(pickle.loads(pickle.dumps(caches[0]))._open) == 0


def test_each_epoch_draws_anew_from_seed_step_and_position(settings):
    trainer = Trainer(settings(batch_size=32))
    with trainer.loader(2) as loader:
        first, second = list(loader)
    assert not torch.equal(first["posterior"], second["posterior"])
    assert not torch.equal(first["posterior"], first["noise"])
    parted = Trainer(settings(batch_size=32, gradient_accumulation_steps=4))
    with parted.loader(1) as loader:
        parts = torch.cat([part["posterior"] for part in loader])
    assert torch.equal(parts, first["posterior"])


def test_the_scale_is_measured_unless_the_configs_is_right(settings, tmp_path):
    def of(scaling_factor, shift_factor=None, **changes):
        vae = tiny_vae(scaling_factor=scaling_factor, shift_factor=shift_factor)
        vae.save_pretrained(tmp_path / "kl")
        return Trainer(settings(**changes)).latents.codec

    measured = of(0.18215)
    assert 0.18215 != measured.scale
    for near in (1.08, 0.92):
        claimed = of(near * measured.scale)
        assert claimed.scale == near * measured.scale and claimed.shift == 0.0
    for far in (1.15, 0.85):
        assert of(far * measured.scale).scale == measured.scale
    assert of(1.5 * measured.scale, vae_scale="config").scale == 1.5 * measured.scale
    with pytest.raises(ValueError, match="`vae_scale` is 'config'.*deviation"):
        of(0.18215 * measured.scale, vae_scale="config")


def test_a_shift_is_measured_stored_and_not_lost(settings, tmp_path):
    vae = tiny_vae("vq")
    with torch.no_grad():
        vae.quant_conv.bias += 5.0
    vae.save_pretrained(tmp_path / "kl")
    train(settings())
    codec = GenerationPipeline.from_pretrained(tmp_path / "run/pipeline").codec
    assert codec.shift > 2
    images = torch.from_numpy(np.load(tmp_path / "images.npy"))[:, None] / 127.5 - 1
    z = codec.encode(images)
    assert abs(float(z.mean())) < 0.1 and float(z.std()) == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="`form` is 'portable'.*the shift"):
        export_folder(tmp_path / "run/pipeline", "portable")
    with pytest.raises(AttributeError, match="GenerationPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")


def broken(vae, how, folder):
    vae.save_pretrained(folder)
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    if how == "nan":
        tensors["decoder.conv_in.weight"][0, 0, 0, 0] = float("nan")
    elif how == "decoder":
        tensors = {name: t for name, t in tensors.items() if not name.startswith("encoder")}
    elif how == "class":
        values["_class_name"] = "ConsistencyDecoderVAE"
    elif how == "scale":
        values["scaling_factor"] = 0.0
    elif how == "huge":
        values["latent_channels"] = 10**9
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(values))
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])


@pytest.mark.parametrize(
    "how, message",
    [
        ("nan", "decoder.conv_in.weight' is not finite"),
        ("decoder", "an encoder and a decoder.*encoder"),
        ("class", "ConsistencyDecoderVAE; it must be one of AutoencoderKL"),
        ("scale", "scaling_factor` is 0.0; it must be a finite number above 0"),
        ("huge", "`latent_channels` is '?1000000000'?; it must be an integer"),
        ("no config", "has no config.json of an autoencoder"),
        ("no weights", "no weights as safetensors"),
        ("cut", "files must be whole"),
    ],
)
def test_a_wrong_autoencoder_is_refused_before_training(settings, tmp_path, how, message):
    broken(tiny_vae(), how, tmp_path / "kl")
    with pytest.raises(ValueError, match=rf"(?s)(vae|kl).*{message}"):
        train(settings())
    assert not (tmp_path / "run/checkpoints").exists()


def test_what_does_not_fit_is_refused_before_training(settings, tmp_path):
    tiny_vae(channels=3).save_pretrained(tmp_path / "colour")
    wide = {"block_out_channels": (4, 4, 4, 8)}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    tiny_vae(**wide, **blocks).save_pretrained(tmp_path / "deep")
    np.save(tmp_path / "odd.npy", np.zeros((4, 6, 8), dtype=np.uint8))
    flat = tiny_vae("tiny")
    for weight in flat.encoder.parameters():
        torch.nn.init.zeros_(weight)
    flat.save_pretrained(tmp_path / "flat")
    cases = {
        "images of 3 channels": {"vae": str(tmp_path / "colour")},
        "multiples of 8": {"vae": str(tmp_path / "deep"), "data": str(tmp_path / "odd.npy")},
        "tells no images apart": {"vae": str(tmp_path / "flat")},
        "no folder": {"vae": str(tmp_path / "nowhere")},
        "`vae_revision` is 'main'": {"vae_revision": "main"},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            train(settings(**changes))
    for message, changes in {
        "`vae_cache` is 'on'": {"random_crop": True, "fit": "crop", "image_size": 8},
        "`vae_scale` is 'config'; it needs vae": {"vae": None, "vae_scale": "config"},
        "`vae_cache` is 'maybe'": {"vae_cache": "maybe"},
        "`hub_form` is 'portable' with vae": {
            "push_to_hub": True,
            "hub_repo_id": "me/model",
            "class_conditional": True,
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            settings(**changes)


def test_yaml_may_say_on_and_off(tmp_path):
    for word in ("off", "on"):
        (tmp_path / "run.yaml").write_text(f"vae: x/y\nvae_cache: {word}\n")
        assert load_config(tmp_path / "run.yaml").vae_cache == word


def test_random_crops_and_streams_are_encoded_on_the_fly(settings, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 10, 10), dtype=np.uint8)
    np.save(tmp_path / "larger.npy", images)
    crops = {"random_crop": True, "fit": "crop", "image_size": 8, "vae_cache": "off"}
    result = train(settings("crops", data=str(tmp_path / "larger.npy"), **crops))
    assert np.isfinite(result.losses).all() and not (tmp_path / "crops/latents").exists()
    from datasets import Dataset, Features, Image

    rows = [PIL.fromarray(image) for image in np.load(tmp_path / "images.npy")]
    table = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    table.to_parquet(tmp_path / "set.parquet")
    stream = {"data": str(tmp_path / "set.parquet"), "streaming": True, "shuffle_buffer": 4}
    whole = train(settings("stream", **stream))
    assert np.isfinite(whole.losses).all() and not (tmp_path / "stream/latents").exists()
    halves = train(settings("halves", stop_after=3, **stream)).losses
    halves += train(settings("halves", resume="latest", **stream)).losses
    assert halves == pytest.approx(whole.losses, 1e-5)


def test_pictures_distances_and_losses_of_a_run_are_of_decoded_samples(settings, tmp_path):
    watched = {"validate_every": 3, "sample_every": 3, "sample_images": 4, "sample_steps": 3}
    result = train(settings(frechet_images=6, validation_images=8, **watched))
    assert {"validation_loss", "frechet", "channel_mean_drift"} <= result.evaluations[-1].keys()
    assert len(result.evaluations[-1]["channel_mean_drift"]) == 1  # of images, not of latents
    with PIL.open(tmp_path / "run/pictures/samples-00000006.png") as grid:
        assert grid.size == (6 * (2 * 8 + 1),) * 2  # two by two, a gap, enlarged six times


def test_presets_fit_the_latents_they_are_named_by():
    for name, side in (("latent-32", 32), ("latent-64", 64)):
        with torch.device("meta"):
            unet = make_unet(name, channels=4, size=(side, side))
        assert unet.config.sample_size == side and unet.config.in_channels == 4
