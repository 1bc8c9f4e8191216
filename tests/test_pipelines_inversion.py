"""`InversionPipeline`: the inverse of the plain DDIM step, and what may go in."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline, InversionPipeline
from ddim_schedulers.pipelines.images import to_model_space
from ddim_schedulers.pipelines.inversion import unit_error
from ddim_schedulers.pipelines.refinement import Refinement, warn_of_residual

SIZE = 8


class Oracle(ModelMixin, ConfigMixin):
    """A bent version of the best network for x_0 ~ N(0, 0.5^2 I), in any parameterisation.

    Its Lipschitz constant is about 1, so that refinement converges at every step length.
    """

    @register_to_config
    def __init__(self, prediction_type="epsilon", sample_size=SIZE, in_channels=1, out_channels=1):
        super().__init__()
        weight = torch.zeros(1, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.alpha_bar = GeneralizedDDIMScheduler().alpha_bar

    def forward(self, x, timestep):
        a = float(self.alpha_bar[int(timestep)])
        eps = (1 - a) ** 0.5 * (x / (0.25 * a + 1 - a) + 0.02 * torch.sin(3 * x.roll(1, dims=-1)))
        if self.config.prediction_type == "epsilon":
            return UNet2DOutput(sample=eps)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        if self.config.prediction_type == "sample":
            return UNet2DOutput(sample=x0)
        return UNet2DOutput(sample=a**0.5 * eps - (1 - a) ** 0.5 * x0)


def pipeline(prediction_type="epsilon", **config):
    config = {"clip_sample": False, **config}
    scheduler = DDIMScheduler(prediction_type=prediction_type, **config)
    pipe = InversionPipeline(unet=Oracle(prediction_type), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def some_images(n=3):
    return torch.rand((n, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("steps", [10, 50])
def test_plain_inversion_is_stock_on_the_same_trajectory(steps):
    pipe = pipeline(clip_sample=True)
    x0 = some_images() * 2 - 1
    config, unet, x = pipe.scheduler.config, pipe.unet, x0
    with torch.no_grad():
        for cls in (DDIMInverseScheduler, DDIMScheduler):
            stock = cls.from_config(config, clip_sample=False)
            stock.set_timesteps(steps)
            for t in stock.timesteps:
                x = stock.step(unet(x, t).sample, t, x).prev_sample
            if cls is DDIMInverseScheduler:
                latents = x
    expected = unit_error(x, x0)
    output = pipe.reconstruct(some_images(), num_inference_steps=steps, output_type="latent")
    assert (output.inversion.latents - latents).abs().max() < 1e-4  # stock's tables are float32
    assert ((output.error - expected) / expected).abs().max() < 0.01
    assert output.inversion.residual is None and output.inversion.converged is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timesteps", [list(range(980, -1, -20)), [900, 640, 333, 100, 7]])
def test_refinement_inverts_the_plain_step_exactly(prediction_type, timesteps):
    pipe = pipeline(prediction_type)
    exact = pipe.reconstruct(
        some_images(), timesteps=timesteps, refinements=400, tolerance=1e-11, output_type="latent"
    )
    assert exact.inversion.converged
    assert exact.error.max() < 1e-18
    plain = pipe.reconstruct(some_images(), timesteps=timesteps, output_type="latent")
    assert exact.error.max() < 1e-6 * plain.error.min()
    assert exact.inversion.timesteps == timesteps[::-1]


def test_a_wrong_coefficient_is_caught_by_the_same_check(monkeypatch):
    right = Refinement.refine

    def one_level_off(self, x_s, x_t, t, s):
        return right(self, x_s, x_t, min(t + 1, 999), s)

    monkeypatch.setattr(Refinement, "refine", one_level_off)
    output = pipeline().reconstruct(
        some_images(),
        num_inference_steps=10,
        refinements=400,
        tolerance=1e-11,
        output_type="latent",
    )
    assert output.error.max() > 1e-8


def test_encoding_finds_the_latents_of_generated_images():
    pipe = pipeline()
    generator = GenerationPipeline(unet=pipe.unet, scheduler=pipe.decoding_scheduler())
    generator.set_progress_bar_config(disable=True)
    made = generator(
        seeds=[3, 4], num_inference_steps=20, eta=0.0, output_type="latent", return_path=True
    )
    found = pipe.encode(made.images, num_inference_steps=20, refinements=400, tolerance=1e-11)
    assert (found.latents - made.path.x_t[0]).abs().max() < 1e-8


def test_each_sample_stops_on_its_own():
    pipe, images = pipeline(), some_images(4)
    common = {"num_inference_steps": 10, "refinements": 12, "tolerance": 1e-6}
    together = pipe(images, **common)
    apart = pipe(images, batch_size=1, **common)
    assert (together.latents - apart.latents).abs().max() < 1e-10
    assert together.residual.shape == (10, 4)
    assert torch.allclose(together.residual, apart.residual, atol=1e-12)


def test_clipping_is_off_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        pipeline(clip_sample=True)(some_images(1), num_inference_steps=3)
    assert "clip_sample is on" in caplog.text and "off" in caplog.text
    # it is so with most pipelines: no warning
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pipeline()(some_images(1), num_inference_steps=3)
    assert "clip_sample" not in caplog.text


def test_failing_to_converge_is_never_silent(caplog):
    with caplog.at_level(logging.WARNING):
        output = pipeline()(some_images(2), num_inference_steps=5, refinements=1, tolerance=1e-9)
    assert output.converged is False and "not converged" in caplog.text
    assert output.network_calls == 10 and output.residual.max() > 1e-9


def test_a_residual_that_is_not_a_number_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        assert not warn_of_residual(torch.tensor([[1e-9, torch.nan]]), 1, 1e-3)
    assert "1 of 2 steps" in caplog.text


def test_ddpm_repositories_serve_and_stay_as_they_are():
    pipe = InversionPipeline(unet=Oracle(), scheduler=DDPMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    before = pipe.scheduler.timesteps.clone()
    output = pipe(some_images(1), num_inference_steps=3)
    assert output.timesteps == [332, 666, 999]
    assert torch.equal(pipe.scheduler.timesteps, before) and pipe.scheduler.config.clip_sample


@pytest.mark.parametrize(
    "settings",
    [
        {"solver_order": 2},
        {"solver_order": 3, "solver_form": "epsilon", "solver_corrector": True},
        {"eta": 1.0, "timestep_spacing": "optimal", "calibration": {"gamma": [0.5] * 1000}},
    ],
)
def test_decoding_takes_the_steps_that_were_encoded(settings):
    scheduler = GeneralizedDDIMScheduler(clip_sample=False, **settings)
    pipe = InversionPipeline(unet=Oracle(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = some_images()
    result = pipe.reconstruct(images, num_inference_steps=20, refinements=60, tolerance=1e-13)
    assert result.inversion.converged
    assert result.error.max() < 1e-20
    assert scheduler.config.solver_order == settings.get("solver_order", 1)
    decoder, encoder = pipe.decoding_scheduler(), pipe.inverse_scheduler()
    for scheduler in (decoder, encoder):
        scheduler.set_timesteps(20)
    assert encoder.planned_pairs() == decoder.planned_pairs()[::-1]


def test_refinement_inverts_the_step_from_zero_snr():
    """At alpha_bar = 0 every x_t is a fixed point of an iteration in eps."""
    pipe = pipeline("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    result = pipe.reconstruct(
        some_images(), num_inference_steps=20, refinements=60, tolerance=1e-13
    )
    assert result.inversion.timesteps[-1] == 999
    assert pipe.inverse_scheduler().alpha_bar[999] == 0
    assert result.inversion.converged
    assert result.error.max() < 1e-20


def test_quadratic_trajectory_from_the_config():
    pipe = pipeline()
    pipe.scheduler = GeneralizedDDIMScheduler(timestep_spacing="quadratic", clip_sample=False)
    output = pipe.reconstruct(
        some_images(1), num_inference_steps=6, refinements=400, tolerance=1e-10
    )
    assert output.inversion.timesteps[-1] == 800 and output.error.max() < 1e-12


def test_all_kinds_of_images_mean_the_same():
    array = (some_images(2)[:, 0].numpy() * 255).round().astype(np.uint8)
    kinds = [
        [Image.fromarray(a) for a in array],
        array[..., None],
        (array[..., None] / 255).astype(np.float64),
        torch.from_numpy(array[:, None]),
        torch.from_numpy(array[:, None] / 255),
    ]
    batches = [to_model_space(k, (1, SIZE, SIZE), torch.float64) for k in kinds]
    for batch in batches:
        assert torch.allclose(batch, batches[0], atol=1e-12) and batch.min() >= -1
    single = to_model_space(kinds[0][0], (1, SIZE, SIZE), torch.float32)
    assert single.shape == (1, 1, SIZE, SIZE)


def test_paths_are_images_as_a_viewer_shows_them(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8))
    path, turned = tmp_path / "a.png", tmp_path / "turned.png"
    picture.save(path)
    exif = Image.Exif()
    exif[0x0112] = 8  # the camera was turned: a viewer turns it by 90 degrees
    picture.save(turned, exif=exif)
    shape = (1, SIZE, SIZE)
    expected = to_model_space(picture, shape, torch.float32)
    for given in (path, str(path), [path]):
        assert torch.equal(to_model_space(given, shape, torch.float32), expected)
    both = to_model_space([picture, turned], shape, torch.float32)
    assert torch.equal(both[1], expected[0].rot90(1, (1, 2)))
    for bad, message in ((tmp_path, "is no regular file"), (tmp_path / "none", "does not exist")):
        with pytest.raises(ValueError, match=message):
            to_model_space(bad, shape, torch.float32)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png', which cannot be read: it is not an image"):
        to_model_space(tmp_path / "text.png", shape, torch.float32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Image.new("RGB", (SIZE, SIZE)), "mode 'RGB'"),
        (Image.new("L", (SIZE, 9)), "8x9"),
        ([], "non-empty"),
        ("picture.png", "`images` has 'picture.png', which cannot be read: it does not exist"),
        ([5], "list"),
        (np.zeros((2, 1, SIZE, SIZE), np.uint8), "shape"),
        (np.zeros((SIZE, SIZE), np.uint8), "shape"),
        (torch.zeros(1, 3, SIZE, SIZE), "shape"),
        (torch.zeros(1, 1, SIZE, SIZE, dtype=torch.int64), "int64"),
        (torch.full((1, 1, SIZE, SIZE), -0.5), r"\(x \+ 1\) / 2"),
        (torch.full((1, 1, SIZE, SIZE), 255.0), "255"),
        (torch.full((1, 1, SIZE, SIZE), torch.nan), "nan"),
    ],
)
def test_bad_images_raise(images, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(images, num_inference_steps=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"refinements": -1}, "refinements"),
        ({"refinements": 1.5}, "refinements"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_bad_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(some_images(1), num_inference_steps=2, **kwargs)


def test_latents_that_come_out_not_finite_raise():
    pipe = pipeline()
    pipe.unet.forward = lambda x, t: UNet2DOutput(sample=x * torch.nan)
    with pytest.raises(ValueError, match="2 of 2 samples are not finite: images 0, 1"):
        pipe.reconstruct(some_images(2), num_inference_steps=2)
