"""Our schedulers in stock pipelines, beside the stock schedulers that they replace."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.ddpm import pipeline_ddpm
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

SD_SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


# Largest difference of a pixel in [0, 1], in float32.
LIMIT = 1e-4


class Tokenizer:
    """Stands in for CLIP's, whose vocabulary would be a download: one id for each character."""

    model_max_length = 77

    def __call__(self, prompt, **_):
        texts = [prompt] if isinstance(prompt, str) else prompt
        rows = [[0, *(1 + ord(c) % 900 for c in text)][:76] for text in texts]
        ids = torch.tensor([row + [999] * (77 - len(row)) for row in rows])
        return type("Tokens", (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})()

    def batch_decode(self, ids):
        return [""] * len(ids)


@pytest.fixture(scope="module")
def components():
    """Stable Diffusion with tiny random networks."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=2,
    )
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=999,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=8,
            num_hidden_layers=2,
            pad_token_id=1,
            vocab_size=1000,
        )
    )
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
    }


def _stable_diffusion(pipeline_class, components, scheduler):
    pipeline = pipeline_class(**components, scheduler=scheduler, requires_safety_checker=False)
    pipeline.tokenizer = Tokenizer()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _prompt_embeds(components):
    with torch.no_grad():
        return [
            components["text_encoder"](Tokenizer()(text).input_ids)[0] for text in ("a cat", "")
        ]


def _images(pipeline, components, **arguments):
    embeds, negative = _prompt_embeds(components)
    return pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        guidance_scale=3.0,
        **arguments,
    ).images


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


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_stable_diffusion(components, eta):
    images = []
    for scheduler in (
        DDIMScheduler(**SD_SETTINGS, set_alpha_to_one=False, steps_offset=1),
        GeneralizedDDIMScheduler(**SD_SETTINGS, set_alpha_to_one=False, steps_offset=1),
    ):
        pipeline = _stable_diffusion(StableDiffusionPipeline, components, scheduler)
        images.append(
            _images(pipeline, components, num_inference_steps=8, eta=eta, height=32, width=32)
        )
    assert images[0].shape == (1, 32, 32, 3) and images[0].std() > 0.005
    np.testing.assert_allclose(*images, atol=LIMIT)


def test_stable_diffusion_with_the_markovian_scheduler(components):
    images = []
    for cls in (DDPMScheduler, MarkovianDDPMScheduler):
        settings = {**SD_SETTINGS, "timestep_spacing": "linspace", "steps_offset": 1}
        pipeline = _stable_diffusion(StableDiffusionPipeline, components, cls(**settings))
        images.append(_images(pipeline, components, num_inference_steps=8, height=32, width=32))
    np.testing.assert_allclose(*images, atol=LIMIT)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stable_diffusion_rewrites_the_config_and_it_counts(components):
    """Its constructor sets steps_offset=1 and clip_sample=False in the finished scheduler."""
    settings = {**SD_SETTINGS, "clip_sample": True}
    images = []
    for cls in (DDIMScheduler, GeneralizedDDIMScheduler):
        pipeline = _stable_diffusion(StableDiffusionPipeline, components, cls(**settings))
        assert pipeline.scheduler.config.steps_offset == 1
        assert pipeline.scheduler.config.clip_sample is False
        images.append(_images(pipeline, components, num_inference_steps=6, height=32, width=32))
        assert int(pipeline.scheduler.timesteps[-1]) == 1
    np.testing.assert_allclose(*images, atol=LIMIT)


def test_eta_of_the_config_counts_in_a_pipeline(components):
    """The pipeline passes eta=0.0 unasked; the config's 1.0 is what the user set."""
    images = []
    for scheduler, eta in (
        (GeneralizedDDIMScheduler(**SD_SETTINGS, steps_offset=1), 1.0),
        (GeneralizedDDIMScheduler(**SD_SETTINGS, steps_offset=1, eta=1.0), 0.0),
    ):
        pipeline = _stable_diffusion(StableDiffusionPipeline, components, scheduler)
        images.append(
            _images(pipeline, components, num_inference_steps=4, eta=eta, height=32, width=32)
        )
    np.testing.assert_array_equal(*images)


def test_custom_timesteps_through_a_pipeline(components):
    """Stock DDIM has no `timesteps`; the pipeline hands ours through."""
    scheduler = GeneralizedDDIMScheduler(**SD_SETTINGS, steps_offset=1)
    pipeline = _stable_diffusion(StableDiffusionPipeline, components, scheduler)
    image = _images(pipeline, components, timesteps=[900, 600, 100], height=32, width=32)
    assert pipeline.scheduler.timesteps.tolist() == [900, 600, 100]
    assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(MarkovianDDPMScheduler, DDPMScheduler), (GeneralizedDDIMScheduler, DDIMScheduler)],
)
def test_img2img(components, ours, stock):
    """It starts in the middle of the plan and noises the image with `add_noise`."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    images = []
    for cls in (stock, ours):
        scheduler = cls(**SD_SETTINGS, steps_offset=1)
        pipeline = _stable_diffusion(StableDiffusionImg2ImgPipeline, components, scheduler)
        images.append(
            _images(pipeline, components, image=picture, strength=0.6, num_inference_steps=10)
        )
    assert images[0].shape == (1, 32, 32, 3)
    np.testing.assert_allclose(*images, atol=LIMIT)


SOLVERS = [
    {"solver_order": 2},
    {"solver_order": 3},
    {"solver_order": 2, "solver_corrector": True},
    {"solver_order": 2, "solver_form": "epsilon"},
]


def _solved(components, pipeline_class, steps, times=1, **arguments):
    """Pictures with guidance; `times` > 1 makes them again with one scheduler."""
    solver = {k: arguments.pop(k) for k in tuple(arguments) if k.startswith("solver_")}
    scheduler = GeneralizedDDIMScheduler(
        **SD_SETTINGS, steps_offset=1, timestep_spacing="trailing", **solver
    )
    pipeline = _stable_diffusion(pipeline_class, components, scheduler)
    made = [
        _images(pipeline, components, num_inference_steps=steps, **arguments) for _ in range(times)
    ]
    assert all(np.array_equal(made[0], again) for again in made)
    return made[0]


def test_a_higher_order_is_nearer_to_the_fine_solution(components):
    size = {"height": 32, "width": 32}
    fine = _solved(components, StableDiffusionPipeline, 100, solver_order=3, **size)
    distance = {}
    for i, solver in enumerate([{}, *SOLVERS]):
        made = _solved(components, StableDiffusionPipeline, 25, 1 + (i == 1), **solver, **size)
        distance[i] = np.abs(made - fine).mean()
    assert max(distance[i] for i in range(1, len(distance))) < distance[0]


def test_img2img_at_a_higher_order(components):
    """It starts in the middle of the plan, where no history is, and has one from there on."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    arguments = {"image": picture, "strength": 0.6}
    pipeline_class = StableDiffusionImg2ImgPipeline
    euler = _solved(components, pipeline_class, 10, **arguments)
    for solver in SOLVERS:
        made = _solved(components, pipeline_class, 10, 2, **solver, **arguments)
        assert 0 < np.abs(made - euler).mean() < 0.1, solver
    last = {"image": picture, "strength": 0.1}  # one step, which is of order 1
    made = _solved(components, pipeline_class, 10, **SOLVERS[1], **last)
    assert np.array_equal(made, _solved(components, pipeline_class, 10, **last))
