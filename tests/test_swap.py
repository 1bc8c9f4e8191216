"""Our schedulers in stock pipelines, beside the stock schedulers that they replace."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusionPipeline
from diffusers.pipelines.ddpm import pipeline_ddpm
from test_swap_pipelines import (
    LATENT_TRAINING,
    SIZE,
    build,
    image_to_image,
    images,
    prompt,
    swap,
    with_eta,
)
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

# Largest difference of a pixel in [0, 1], in float32.
LIMIT = 1e-4


def _unet():
    return tiny_unet(
        3,
        32,
        (8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _ddpm_images(pipeline, steps):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        batch_size=2,
        num_inference_steps=steps,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.mark.parametrize(
    ("ours", "stock", "steps"),
    [(MarkovianDDPMScheduler, DDPMScheduler, 12), (GeneralizedDDIMScheduler, DDIMScheduler, 8)],
)
def test_ddpm_pipeline(ours, stock, steps):
    """`pipe.scheduler = Ours.from_config(pipe.scheduler.config)` gives stock's images."""
    pipeline = DDPMPipeline(unet=_unet(), scheduler=stock())
    images = [_ddpm_images(pipeline, steps)]
    pipeline.scheduler = ours.from_config(pipeline.scheduler.config)
    images.append(_ddpm_images(pipeline, steps))
    assert images[0].shape == (2, 32, 32, 3) and images[0].std() > 0.05
    np.testing.assert_allclose(*images, atol=LIMIT)


def test_more_ddim_steps_of_a_random_network_amplify_the_rounding(monkeypatch):
    """12 steps go beyond `LIMIT`, and stock goes as far from itself in float64."""
    drawn = pipeline_ddpm.randn_tensor
    made = {}
    for dtype in (torch.float32, torch.float64):

        def same_noise(shape, dtype=dtype, **kwargs):
            return drawn(shape, **{**kwargs, "dtype": torch.float32}).to(dtype)

        monkeypatch.setattr(pipeline_ddpm, "randn_tensor", same_noise)
        for cls in (DDIMScheduler, GeneralizedDDIMScheduler):
            pipeline = DDPMPipeline(unet=_unet().to(dtype), scheduler=cls())
            made[cls, dtype] = _ddpm_images(pipeline, 12)
    stock, stock64, ours, ours64 = (
        made[cls, dtype]
        for cls in (DDIMScheduler, GeneralizedDDIMScheduler)
        for dtype in (torch.float32, torch.float64)
    )
    assert np.abs(stock - stock64).max() > LIMIT
    assert np.abs(ours - stock).max() < 2 * np.abs(stock - stock64).max()
    np.testing.assert_allclose(ours64, stock64, atol=1e-5)  # what stock's float32 tables leave


def test_ddpm_pipeline_with_generators_for_each_image():
    pipeline = DDPMPipeline(unet=_unet(), scheduler=MarkovianDDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            batch_size=len(seeds), num_inference_steps=5, output_type="np", generator=generators
        ).images

    np.testing.assert_allclose(images([3, 4])[1:], images([4]), atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stable_diffusion_rewrites_the_config_and_it_counts():
    """Its constructor sets steps_offset=1 and clip_sample=False in the finished scheduler."""
    parts = build(with_eta)[0].components
    made = []
    for cls in (DDIMScheduler, GeneralizedDDIMScheduler):
        scheduler = cls(**LATENT_TRAINING, clip_sample=True)
        pipeline = StableDiffusionPipeline(
            **{**parts, "scheduler": scheduler}, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.scheduler.config.steps_offset == 1
        assert pipeline.scheduler.config.clip_sample is False
        made.append(images(pipeline, prompt(height=SIZE, width=SIZE)))
        assert int(pipeline.scheduler.timesteps[-1]) == 1
    np.testing.assert_allclose(*made, atol=LIMIT)


def test_eta_of_the_config_counts_in_a_pipeline():
    """The pipeline passes eta=0.0 unasked; the config's 1.0 is what the user set."""
    pipeline, call = build(with_eta)
    asked = images(swap(pipeline), call, eta=1.0)
    np.testing.assert_array_equal(asked, images(swap(pipeline, eta=1.0), call, eta=0.0))


SOLVERS = [
    {"solver_order": 2},
    {"solver_order": 3},
    {"solver_order": 2, "solver_corrector": True},
    {"solver_order": 2, "solver_form": "epsilon"},
]


def _solved(case, steps, times=1, **arguments):
    """Pictures with guidance; `times` > 1 makes them again with one scheduler."""
    solver = {k: arguments.pop(k) for k in tuple(arguments) if k.startswith("solver_")}
    pipeline, call = build(case)
    swap(pipeline, timestep_spacing="trailing", **solver)
    call |= {"eta": 0.0, "guidance_scale": 3.0, "num_inference_steps": steps, **arguments}
    made = [images(pipeline, call) for _ in range(times)]
    assert all(np.array_equal(made[0], again) for again in made)
    return made[0]


def test_a_higher_order_is_nearer_to_the_fine_solution():
    fine = _solved(with_eta, 100, solver_order=3)
    distance = {}
    for i, solver in enumerate([{}, *SOLVERS]):
        made = _solved(with_eta, 25, 1 + (i == 1), **solver)
        distance[i] = np.abs(made - fine).mean()
    assert max(distance[i] for i in range(1, len(distance))) < distance[0]


def test_img2img_at_a_higher_order():
    """It starts in the middle of the plan, where no history is, and has one from there on."""
    euler = _solved(image_to_image, 10)
    for solver in SOLVERS:
        made = _solved(image_to_image, 10, 2, **solver)
        assert 0 < np.abs(made - euler).mean() < 0.1, solver
    made = _solved(image_to_image, 10, **SOLVERS[1], strength=0.1)  # one step, which has order 1
    assert np.array_equal(made, _solved(image_to_image, 10, strength=0.1))
