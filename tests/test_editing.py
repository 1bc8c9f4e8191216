"""SDEdit and translation: pictures that sampling starts from, and those of another model."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
)
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from test_pipelines_inversion import SIZE, Oracle, pipeline, some_images
from tiny_models import ExactVae, latent_pipeline, latent_unet, tiny_vae

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline, InversionPipeline
from ddim_schedulers.pipelines.codec import Codec
from ddim_schedulers.pipelines.sampling_job import SamplingJob, sample_to_directory
from ddim_schedulers.training import cli

CALL = {"num_inference_steps": 10, "output_type": "latent"}


def generator(**config):
    scheduler = GeneralizedDDIMScheduler(**{"clip_sample": False, **config})
    pipe = GenerationPipeline(unet=Oracle(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(seed):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, SIZE, SIZE, generator=drawn, dtype=torch.float64)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.99, 1.0])
def test_sampling_starts_at_q_of_the_picture(strength):
    pipe, pictures = generator(), some_images(2)
    made = pipe(image=pictures, strength=strength, seeds=[3, 4], return_path=True, **CALL)
    steps = int(10 * strength)
    pipe.scheduler.set_timesteps(10)
    t = int(pipe.scheduler.timesteps[-steps])
    a = pipe.scheduler.alpha_bar[t]
    x_t = a.sqrt() * (pictures * 2 - 1) + (1 - a).sqrt() * torch.cat([noise(3), noise(4)])
    assert made.path.x_t.shape[0] in (steps, steps + 1)
    assert torch.allclose(made.path.x_t[0], x_t, atol=1e-12)
    expected = pipe(latents=x_t, start_timestep=t, **CALL).images
    assert torch.allclose(made.images, expected, atol=1e-12)
    # an image depends on its own seed and picture, not on its batch
    apart = pipe(image=pictures, strength=strength, seeds=[3, 4], batch_size=1, **CALL)
    assert torch.allclose(apart.images, made.images, atol=1e-10)


def test_one_picture_serves_all_seeds_and_a_small_strength_keeps_it():
    pipe, picture = generator(), some_images(1)
    errors = []
    for strength in (0.1, 0.5, 1.0):
        made = pipe(image=picture, strength=strength, seeds=[1, 2, 3], **CALL).images
        assert len(made) == 3
        errors.append(float((made - (picture * 2 - 1)).square().mean()))
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "`strength` is 0.5 without `image`"),
        ({"image": some_images(1)}, "`strength` is None with `image`"),
        ({"image": some_images(1), "strength": 0}, "`strength` is 0 with"),
        ({"image": some_images(1), "strength": 1.01}, "`strength` is 1.01 with"),
        ({"image": some_images(1), "strength": float("nan")}, "`strength` is nan with"),
        ({"image": some_images(1), "strength": True}, "`strength` is True with"),
        ({"image": some_images(1), "strength": 0.09}, "leaves none of 10 steps"),
        ({"image": torch.zeros(1, 1, 4, 4), "strength": 0.5}, "`image` has shape"),
        ({"image": some_images(2), "strength": 0.5, "seeds": [1, 2, 3]}, "contradict"),
        ({"image": some_images(1), "strength": 0.5, "latents": noise(1)}, "`image` and `latents`"),
    ],
)
def test_bad_pictures_and_strengths(arguments, message):
    with pytest.raises(ValueError, match=message):
        generator()(**CALL, **arguments)


def test_a_scheduler_with_a_memory_cannot_start_in_the_middle():
    pipe = generator()
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="`image`"):
        pipe(image=some_images(1), strength=0.5, **CALL)


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_a_job_names_the_check_sums_of_its_pictures(tmp_path, pictures):
    pipe, output = generator(), tmp_path / "out"
    settings = {"batch_size": 2, "num_inference_steps": 4, "strength": 0.5}
    job = SamplingJob(3, image=tuple(pictures), **settings)
    assert sample_to_directory(pipe, output, job).written == 3
    told = json.loads((output / "sample.json").read_text())["job"]
    assert told["strength"] == 0.5 and len(told["image"]) == 2 and pictures[0] not in str(told)
    made = pipe(
        image=[pictures[i % 2] for i in range(3)],
        strength=0.5,
        seeds=range(3),
        num_inference_steps=4,
    )
    for i, image in enumerate(made.images):
        assert np.array_equal(
            np.asarray(image), np.asarray(Image.open(output / f"images/{i:06d}.png"))
        )
    # the same pictures by another name go on; other pictures, or none, do not
    moved = tmp_path / "moved.png"
    moved.write_bytes((tmp_path / "0.png").read_bytes())
    again = SamplingJob(3, image=(str(moved), pictures[1]), **settings)
    assert sample_to_directory(pipe, output, again).written == 0
    for other in (
        SamplingJob(3, image=(pictures[0],), **settings),
        SamplingJob(3, **{**settings, "strength": None}),
    ):
        with pytest.raises(ValueError, match="image"):
            sample_to_directory(pipe, output, other)


def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    pipe, job = generator(), SamplingJob(2, num_inference_steps=2)
    sample_to_directory(pipe, tmp_path / "out", job)
    path = tmp_path / "out" / "sample.json"
    told = json.loads(path.read_text())
    del told["job"]["image"], told["job"]["strength"]
    path.write_text(json.dumps(told))
    assert sample_to_directory(pipe, tmp_path / "out", job).present == 2


def test_a_job_whose_picture_is_bad_writes_nothing(tmp_path):
    job = SamplingJob(1, num_inference_steps=2, image=(str(tmp_path / "none.png"),), strength=0.5)
    with pytest.raises(ValueError, match="`image`"):
        sample_to_directory(generator(), tmp_path / "out", job)
    assert not (tmp_path / "out" / "sample.json").exists()


def test_options_of_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    assert "--strength" in capsys.readouterr().out


def test_translation_to_the_model_itself_is_reconstruction():
    pipe, images = pipeline(), some_images()
    options = {"num_inference_steps": 10, "refinements": 300, "tolerance": 1e-11}
    made = pipe.translate(images, pipe, cycle=True, output_type="latent", **options)
    assert (made.images - (images * 2 - 1)).abs().max() < 1e-8
    assert made.cycle_error.max() < 1e-16 and made.back.converged


class Wider(Oracle):
    """The network of images of another deviation."""

    def forward(self, x, timestep):
        output = super().forward(x, timestep)
        output.sample = output.sample * 0.7
        return output


def test_translation_decodes_the_shared_latents_with_the_other_model():
    pipe, images = pipeline(), some_images()
    target = GenerationPipeline(unet=Wider(), scheduler=DDIMScheduler(clip_sample=False))
    options = {"num_inference_steps": 10, "refinements": 300, "tolerance": 1e-11}
    made = pipe.translate(images, target, cycle=True, output_type="latent", **options)
    other = InversionPipeline.from_pipe(target)
    other.set_progress_bar_config(disable=True)
    expected = other.decode(
        pipe(images, **options).latents, num_inference_steps=10, output_type="latent"
    )
    assert torch.equal(made.images, expected)
    assert (made.images - (images * 2 - 1)).abs().max() > 0.1
    assert made.cycle_error.max() < 1e-14
    plain = pipe.translate(images, target, cycle=True, num_inference_steps=10)
    assert plain.cycle_error.min() > 1e-6 and len(plain.images) == 3


def test_a_target_that_does_not_fit():
    pipe = pipeline()
    small = InversionPipeline(unet=Oracle(sample_size=4), scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="`target` makes images of shape"):
        pipe.translate(some_images(), small)
    early = InversionPipeline(unet=Oracle(), scheduler=DDIMScheduler(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="`target` begins at"):
        pipe.translate(some_images(), early, num_inference_steps=3)


class SameShape(ExactVae):
    """Pictures and latents of one shape: only the sign says which of the two a tensor is."""

    def encode(self, x):
        return AutoencoderTinyOutput(latents=-x)

    def decode(self, z):
        return DecoderOutput(sample=-z)


@pytest.fixture
def same_shape(monkeypatch):
    """A pipeline of latents whose pictures have the shape of the latents."""
    monkeypatch.setattr(Codec, "factor", 1)
    unet = latent_unet(8)
    vae = SameShape()
    vae.register_to_config(in_channels=4, out_channels=4)
    return latent_pipeline(vae, unet=unet)


def test_a_picture_is_encoded_where_it_could_be_taken_for_a_latent(same_shape):
    pictures = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 10, "seeds": [1, 2]}
    path = same_shape(image=pictures, strength=0.1, return_path=True, **options).path
    pixels = GenerationPipeline(unet=same_shape.unet, scheduler=same_shape.scheduler)
    pixels.set_progress_bar_config(disable=True)
    mirrored = pixels(image=1 - pictures, strength=0.1, return_path=True, **options).path
    assert torch.allclose(path.x_t[0], mirrored.x_t[0], atol=1e-6)
    pipe = same_shape.sibling(InversionPipeline)
    made = pipe.translate(pictures, pipe, num_inference_steps=3, cycle=True, output_type="pt")
    expected = pipe.reconstruct(pictures, num_inference_steps=3, output_type="pt")
    assert torch.equal(made.inversion.latents, expected.inversion.latents)
    assert torch.equal(made.images, expected.images)


@pytest.mark.parametrize("kind", ["kl", "tiny", "vq"])
def test_editing_of_latents_encodes_and_decodes_pictures(kind):
    pipe = latent_pipeline(tiny_vae(kind), InversionPipeline)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    made = pipe.translate(images, pipe, num_inference_steps=3, cycle=True, output_type="pt")
    expected = pipe.reconstruct(images, num_inference_steps=3, output_type="pt")
    assert torch.equal(made.images, expected.images) and made.images.shape == images.shape
    latents = pipe.translate(images, pipe, num_inference_steps=3, output_type="latent").images
    assert latents.shape == (2, 4, 4, 4)
    assert torch.allclose(made.images, ((pipe.pixels_of(latents) + 1) / 2).clamp(0, 1), atol=1e-6)
    # what the autoencoder loses is part of the error, as of that of reconstruction
    again = pipe.decode(made.back.latents, num_inference_steps=3, output_type="latent")
    lost = (pipe.pixels_of(again) - (images * 2 - 1)).double() / 2
    assert torch.allclose(made.cycle_error, lost.square().mean(dim=(1, 2, 3)), rtol=1e-4)
    edited = pipe.sibling(GenerationPipeline)(
        image=images, strength=0.5, seeds=[0, 1], num_inference_steps=4, output_type="pt"
    )
    assert edited.images.shape == images.shape
    with pytest.raises(ValueError, match="`image` has shape"):
        pipe.sibling(GenerationPipeline)(image=latents.sigmoid(), strength=0.5)
    with pytest.raises(ValueError, match="`images` has shape"):
        pipe.translate(latents.sigmoid(), pipe)


def test_a_target_of_pixels_does_not_fit_latents_of_its_shape():
    pipe = latent_pipeline(cls=InversionPipeline)
    pixels = InversionPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    for source, target in ((pipe, pixels), (pixels, pipe)):
        with pytest.raises(ValueError, match="`target` makes images of shape"):
            source.translate(torch.rand(1, *source.picture_shape), target)


def test_mixing_converges_in_fewer_calls_and_is_checked():
    pipe, images = pipeline(), some_images()
    options = {"num_inference_steps": 5, "refinements": 12, "tolerance": 1e-9}
    plain, mixed = (pipe(images, mixing=m, **options) for m in (0, 3))
    assert mixed.residual.max() < 0.1 * plain.residual.max()
    for call in (pipe, pipe.reconstruct, lambda i, **k: pipe.translate(i, pipe, **k)):
        with pytest.raises(ValueError, match="`mixing` is -1"):
            call(images, mixing=-1)
