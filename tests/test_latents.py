"""Pipelines of latents: encoded at the start, decoded at the end, saved so that nothing is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, LDMPipeline
from PIL import Image
from tiny_models import ExactVae, latent_pipeline, latent_unet, tiny_unet, tiny_vae

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.export import FORMS, export_folder, save_pipeline
from ddim_schedulers.latent_pipeline import LatentPipeline
from ddim_schedulers.network_config import check_saved
from ddim_schedulers.pipelines import (
    AnnealedLangevinPipeline,
    GenerationPipeline,
    InterpolationPipeline,
    InversionPipeline,
    RestorationPipeline,
)
from ddim_schedulers.pipelines.codec import AUTOENCODERS, Codec, note_scale, scale_in
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.evaluation.config import parse_evaluation
from ddim_schedulers.training.evaluation.report import evaluate
from ddim_schedulers.training.sharing import cards

KINDS = ("kl", "tiny", "vq")
FEW = {"num_inference_steps": 3, "eta": 0.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.5, 0.0), (2.5, -0.75)])
def test_the_scale_is_applied_both_ways(kind, scale, shift):
    vae = tiny_vae(kind)
    note_scale(vae, scale, shift)
    assert scale_in(type(vae).from_config(vae.config).config) == (scale, shift)
    codec, x = Codec(vae), torch.rand(2, 1, 8, 8) * 2 - 1
    encoded = vae.encode(x)
    z = encoded.latent_dist.mean if kind == "kl" else encoded.latents
    assert torch.allclose(codec.encode(x), (z - shift) * scale, atol=1e-6)
    assert torch.allclose(codec.decode((z - shift) * scale), vae.decode(z).sample, atol=1e-5)
    assert codec.latent_shape((1, 8, 8)) == (4, 4, 4)
    assert codec.picture_shape((4, 4, 4)) == (1, 8, 8)


def test_draws_of_the_encoder_are_those_of_diffusers():
    vae = tiny_vae()
    x, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    codec = Codec(vae)
    expected = (posterior.mean + posterior.std * noise) * codec.scale
    assert torch.allclose(codec.latents(codec.moments(x), noise), expected, atol=1e-6)


def test_samples_are_the_decoded_latents_in_every_output_type():
    pipe = latent_pipeline()
    call = {"seeds": [5, 6, 7], **FEW}
    z = pipe(output_type="latent", **call).images
    assert z.shape == (3, 4, 4, 4)
    pixels = pipe.codec.decode(z)
    expected = (pixels / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe(output_type="pt", **call).images, expected, atol=1e-6)
    found = pipe(output_type="np", batch_size=2, **call).images
    assert np.abs(found - expected.movedim(1, -1).numpy()).max() < 1e-5
    assert [image.size for image in pipe(**call).images] == [(8, 8)] * 3
    alone = latent_pipeline()
    alone.vae.enable_slicing()
    assert torch.allclose(alone(output_type="pt", **call).images, expected, atol=1e-5)
    alone.vae.enable_tiling()
    alone.vae.tile_sample_min_size, alone.vae.tile_latent_min_size = 4, 2
    alone.vae.tile_overlap_factor = 0.5
    tiled = (alone.codec.decode(z) / 2 + 0.5).clamp(0, 1)
    assert not torch.allclose(tiled, expected, atol=1e-3)  # tiles do not see each other
    assert torch.allclose(alone(output_type="pt", **call).images, tiled, atol=1e-5)


@pytest.mark.parametrize("where", ["vae", "vqvae"])
def test_the_autoencoder_may_be_given_by_either_name(where):
    vae = tiny_vae()
    parts = {"unet": latent_unet(), "scheduler": GeneralizedDDIMScheduler()}
    pipe = GenerationPipeline(**parts, **{where: vae})
    assert pipe.vae is vae and pipe.components["vqvae"] is vae
    with pytest.raises(ValueError, match="`vae` and `vqvae` are both given"):
        GenerationPipeline(**parts, vae=vae, vqvae=vae)


def test_other_pipelines_encode_images_and_decode_what_they_make():
    exact = ExactVae()
    note_scale(exact, 1.0, 0.0)
    images = torch.rand(2, 1, 8, 8)
    inverter = latent_pipeline(exact, InversionPipeline)
    z = exact.encode(images * 2 - 1).latents
    assert torch.allclose(
        inverter(images, **_steps()).latents, inverter.encode(z, **_steps()).latents
    )
    # an orthogonal codec keeps squared errors
    found = inverter.reconstruct(images, output_type="pt", **_steps())
    again = inverter.decode(found.inversion.latents, output_type="latent", **_steps())
    assert torch.allclose(found.error, ((again - z) / 2).double().square().flatten(1).mean(1))
    assert found.images.shape == (2, 1, 8, 8)
    between = latent_pipeline(exact, InterpolationPipeline)
    chain = between(images=images, num_points=3, output_type="pt", **_steps())
    assert chain.images.shape == (3, 1, 8, 8) and chain.latents.shape == (3, 4, 4, 4)
    ends = inverter.decode(chain.latents[:1], output_type="pt", **_steps())
    assert torch.allclose(chain.images[:1], ends, atol=1e-5)
    mixed = between.diffuse(images, 500, num_points=2, output_type="pt", **_steps())
    assert mixed.images.shape == (2, 1, 8, 8) and mixed.latents.shape == (2, 4, 4, 4)
    langevin = latent_pipeline(exact, AnnealedLangevinPipeline)
    assert langevin(seeds=[1], inner_steps=1, output_type="np", **_steps()).images.shape == (
        1,
        8,
        8,
        1,
    )


def _steps():
    return {"num_inference_steps": 3}


def test_guidance_samples_latents_and_they_are_decoded():
    unet = latent_unet(num_class_embeds=3)
    note_class_labels(unet, 2, ("cat", "dog"))
    pipe = latent_pipeline(unet=unet)
    call = {"seeds": [1, 2], "class_labels": "dog", "guidance_scale": 2.0, **FEW}
    z = pipe(output_type="latent", **call).images
    expected = (pipe.codec.decode(z) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe(output_type="pt", **call).images, expected, atol=1e-6)


def test_restoration_refuses_latents_and_says_why():
    with pytest.raises(ValueError, match="`vae` is AutoencoderKL; it must be left out.*of pixels"):
        latent_pipeline(cls=RestorationPipeline)
    with pytest.raises(ValueError, match="of pixels"):
        RestorationPipeline.from_pipe(latent_pipeline())


def test_an_autoencoder_that_does_not_fit_is_refused():
    cases = {
        "it must be one of AutoencoderKL": torch.nn.Identity(),
        "latents of 3 channels; they must have 4": tiny_vae(latent_channels=3),
        "without its encoder": tiny_vae(),
        "maps 1 channels to 3": tiny_vae(out_channels=3),
        "`vae.config.scaling_factor` is nan": tiny_vae(scaling_factor=float("nan")),
        "`vae.config.shift_factor` is 'x'": tiny_vae(shift_factor="x"),
    }
    del cases["without its encoder"].encoder
    for message, vae in cases.items():
        with pytest.raises(ValueError, match=message):
            latent_pipeline(vae)
    pipe = latent_pipeline()
    pipe.vqvae = tiny_vae(latent_channels=3)  # as for a scheduler, the next call sees it
    with pytest.raises(ValueError, match="latents of 3 channels"):
        pipe(seeds=[0], **FEW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ldm_loads_and_decodes_as_there(kind, tmp_path):
    vae = tiny_vae(kind)
    note_scale(vae, 0.7, 0.0)
    stock = LDMPipeline(vqvae=vae, unet=latent_unet(), scheduler=_plain())
    stock.save_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    pipe = GenerationPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    theirs = stock(
        generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np"
    )
    mine = pipe(seeds=[3], num_inference_steps=4, eta=0.0, output_type="np")
    assert np.abs(mine.images - theirs.images).max() < 1e-4
    assert isinstance(pipe.vae, AUTOENCODERS) and pipe.codec.scale == 0.7


def _plain():
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_the_decoder_and_its_scale(form, tmp_path):
    pipe = latent_pipeline()
    note_scale(pipe.vae, 0.6, 0.0)
    expected = pipe(seeds=[1], output_type="np", **FEW).images
    save_pipeline(pipe, tmp_path, form)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline" and "vqvae" in index
    loaded = GenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.abs(loaded(seeds=[1], output_type="np", **FEW).images - expected).max() < 1e-5
    stock = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=form == "self-contained")
    assert isinstance(stock, LDMPipeline) and stock.vqvae.config.scaling_factor == 0.6


def _own_latents(what):
    """Returns a pipeline that `LDMPipeline` would sample wrongly."""
    unet = latent_unet(num_class_embeds=None if what == "shift" else 3)
    if what != "shift":
        note_class_labels(unet, 2, ("cat", "dog"))
        torch.nn.init.normal_(unet.class_embedding.weight)
    pipe = latent_pipeline(unet=unet)
    note_scale(pipe.vae, 0.6, 0.0 if what == "classes" else 0.5)
    return pipe


@pytest.mark.parametrize("what", ["shift", "classes"])
def test_what_ldm_would_lose_is_refused_in_the_portable_form(what, tmp_path):
    pipe = _own_latents(what)
    with pytest.raises(ValueError, match=f"`form` is 'portable'.*{what}"):
        save_pipeline(pipe, tmp_path / "portable", "portable")
    assert not (tmp_path / "portable").exists()
    for form in ("plug-in", "self-contained"):
        save_pipeline(pipe, tmp_path / form, form)
        index = json.loads((tmp_path / form / "model_index.json").read_text())
        # diffusers refuses the first by name; the second is a file of the folder
        expected = "GenerationPipeline"
        if form == "self-contained":
            (code,) = tmp_path.joinpath(form).glob("*.py")
            expected = [code.stem, "LatentPipeline"]
        assert index["_class_name"] == expected
        loaded = GenerationPipeline.from_pretrained(tmp_path / form)
        assert loaded.codec.shift == pipe.codec.shift
        card = cards.render(export_folder(tmp_path / form, form), "me/model", form)
        assert "pipe = GenerationPipeline.from_pretrained" in card
        assert ("trust_remote_code=True" in card) == (form == "self-contained")
        assert "of diffusers loads the repository" not in card
        with pytest.raises(ValueError, match="`form` is 'portable'"):
            export_folder(tmp_path / form, "portable")
        for other in ("plug-in", "self-contained"):
            again = json.loads(export_folder(tmp_path / form, other).files["model_index.json"])
            assert isinstance(again["_class_name"], list) == (other == "self-contained")


def test_self_contained_folders_of_latents_need_no_package(tmp_path, fresh_python):
    common = {"num_inference_steps": 3, "output_type": "np", "num_images": 2}
    classes = {"class_labels": ["dog", "cat"], "guidance_scale": 2.0}
    calls = {"shift": common, "classes": common | classes, "both": common | classes}
    for what, call in calls.items():
        pipe = _own_latents(what)
        noise = [torch.Generator().manual_seed(s) for s in (0, 1)]
        np.save(tmp_path / f"{what}.npy", pipe(generator=noise, **call).images)
        save_pipeline(pipe, tmp_path / what, "self-contained")
    done = fresh_python(
        f"""
import numpy as np, torch
from diffusers import DiffusionPipeline
def sample(path, call):
    pipe = DiffusionPipeline.from_pretrained(path, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(s) for s in (0, 1)]
    return pipe, pipe(generator=noise, **call).images
for what, call in {calls!r}.items():
    pipe, images = sample(what, call)
    pipe.save_pretrained("again " + what)
    again = sample("again " + what, call)[1]
    np.savez("found " + what, images=images, again=again)
""",
        without_package=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for what in calls:
        for found in np.load(tmp_path / f"found {what}.npz").values():
            assert np.abs(found - np.load(tmp_path / f"{what}.npy")).max() < 1e-4


def test_a_stock_scheduler_needs_the_pipeline_of_latents_alone(tmp_path):
    pipe = _own_latents("both")
    pipe.scheduler = _plain()
    for form in ("plug-in", "self-contained"):
        save_pipeline(pipe, tmp_path / form, form)
        assert len([*(tmp_path / form).rglob("*.py")]) == (form == "self-contained")
    with pytest.raises(ValueError, match="`form` is 'portable'"):
        save_pipeline(pipe, tmp_path / "portable", "portable")
    with pytest.raises(ValueError, match="`form` is 'portable'"):
        export_folder(tmp_path / "plug-in", "portable")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_labels": 0}, "`class_labels` is 0, but `unet` has no classes"),
        ({"guidance_scale": 2.0}, "`guidance_scale` is 2.0 and `negative_label` None, but"),
        ({"num_images": 0}, "`num_images` is 0"),
    ],
)
def test_the_bundled_pipeline_of_latents_names_what_is_wrong(settings, message):
    pipe = LatentPipeline(**_own_latents("shift").components)
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=1, **settings)


@pytest.mark.parametrize("name", ["DDPMPipeline", "LDMPipeline", "GenerationPipeline"])
def test_a_folder_may_call_the_autoencoder_vae(name, tmp_path, capsys):
    pipe = latent_pipeline()
    pipe.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    index["vae"], index["_class_name"] = index.pop("vqvae"), name
    (tmp_path / "ours" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "ours" / "vqvae").rename(tmp_path / "ours" / "vae")
    asked = {"seeds": [1], "num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(**asked).images
    loaded = GenerationPipeline.from_pretrained(tmp_path / "ours")
    assert set(loaded.components) == {"unet", "scheduler", "vqvae"}
    torch.testing.assert_close(loaded(**asked).images, expected)
    for form in FORMS:
        files = export_folder(tmp_path / "ours", form).files
        written = json.loads(files["model_index.json"])
        assert written["_class_name"] == "LDMPipeline" and "vae" not in written
        assert {"vqvae/config.json", "vqvae/diffusion_pytorch_model.safetensors"} <= set(files)
    words = ["export", "--pipeline", str(tmp_path / "ours"), "--output", str(tmp_path / "portable")]
    assert main(words) == 0
    stock = LDMPipeline.from_pretrained(tmp_path / "portable")
    assert stock.vqvae.config.scaling_factor == pipe.vae.config.scaling_factor
    np.save(tmp_path / "images.npy", np.zeros((4, 8, 8), np.uint8))
    data = ["--data", str(tmp_path / "images.npy"), "--output_dir", str(tmp_path / "bound")]
    words = ["likelihood", "--pipeline", str(tmp_path / "ours"), *data]
    assert main(words) == 2
    assert "latents" in capsys.readouterr().err


def test_a_folder_with_another_class_as_vae_is_refused(tmp_path):
    latent_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"] = ["os", "system"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"`vae` is .*; it must be one of AutoencoderKL"):
        check_saved(tmp_path)


def test_a_pipeline_of_pixels_is_saved_as_ever(tmp_path):
    pipe = GenerationPipeline(unet=tiny_unet(), scheduler=GeneralizedDDIMScheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {key for key in index if key[0] != "_"} == {"unet", "scheduler"}
    assert pipe.components.keys() == {"unet", "scheduler"} and pipe.codec is None
    assert isinstance(DDPMPipeline(**pipe.components), DDPMPipeline)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder of a model of latents, and 24 grey images of 8x8 beside it."""
    monkeypatch.chdir(tmp_path)
    pipe = latent_pipeline()
    note_scale(pipe.vae, 0.6, 0.0)
    save_pipeline(pipe, "model", "portable")
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.save("images.npy", images)
    for i in range(2):
        Image.fromarray(images[i]).save(f"{i}.png")
    return pipe


def test_the_commands_decode(saved, tmp_path, capsys):
    common = ["--pipeline", "model", "--num_inference_steps", "3", "--device", "cpu"]
    assert main(["sample", *common, "--num_images", "5", "--batch_size", "2", "--output", "s"]) == 0
    expected = saved(seeds=range(5), batch_size=2, num_inference_steps=3).images
    for i, image in enumerate(expected):
        with Image.open(tmp_path / f"s/images/{i:06d}.png") as found:
            assert found.size == (8, 8)
            assert np.abs(np.asarray(found).astype(int) - np.asarray(image)).max() <= 1
    pictures = ["--images", "0.png", "1.png"]
    assert main(["reconstruct", *common, *pictures, "--output", "r"]) == 0
    assert main(["interpolate", *common, *pictures, "--num_points", "3", "--output", "i"]) == 0
    for path in ("r/images/000000-0.png", "i/images/000001.png"):
        with Image.open(tmp_path / path) as found:
            assert found.size == (8, 8)
    assert main(["export", "--pipeline", "model", "--output", "e", "--form", "plug-in"]) == 0
    assert GenerationPipeline.from_pretrained("e").codec.scale == 0.6


def test_likelihood_refuses_and_calibrate_measures_the_latents(saved, tmp_path, capsys):
    data = ["--pipeline", "model", "--data", "images.npy", "--cpu"]
    assert main(["likelihood", *data, "--output_dir", "l"]) == 2
    assert "no bits per dimension of pixels" in capsys.readouterr().err
    assert main(["calibrate", *data, "--num_images", "2", "--batch_size", "100"]) == 0
    config = json.loads(Path("model/scheduler/scheduler_config.json").read_text())
    assert "calibration" in config["_ddim_schedulers"]["settings"]


def test_an_evaluation_tells_the_autoencoders_ceiling(saved, tmp_path):
    config = parse_evaluation(
        {
            "pipeline": "model",
            "output_dir": "ev",
            "data": {"data": "images.npy", "validation_fraction": 0.5},
            "features": ["pixels"],
            "neighbours": 2,
            "batch_size": 4,
            "tables": [{"name": "t", "n": 8, "grid": [{"steps": [3], "members": [0]}]}],
        }
    )
    results = evaluate(config)[1]
    (table,) = results["tables"]
    ceiling = table["ceiling"]["pixels"]
    assert ceiling["n"] == 8 and ceiling["frechet"] != table["real"]["pixels"]["frechet"]
    report = (tmp_path / "ev/report.md").read_text()
    assert (
        f"ceiling: 8 held-out images, encoded and decoded, get {ceiling['frechet']:.3f}" in report
    )
