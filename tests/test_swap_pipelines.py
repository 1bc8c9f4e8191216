"""Ours in the place of the stock scheduler, in the pipelines of diffusers that people use.

Every pipeline is built from configs with tiny random weights, run with the stock scheduler, and run
again after `pipe.scheduler = Ours.from_config(pipe.scheduler.config)` with the same seed. Prompt
embeddings are passed in, so that no tokenizer is needed. `DDPMPipeline` is in test_swap.py.
"""

import inspect
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    IFPipeline,
    LDMPipeline,
    MotionAdapter,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers import LEditsPPPipelineStableDiffusion as LEditsPP
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import compute_noise
from diffusers.training_utils import compute_snr

from ddim_schedulers import (
    CALIBRATED,
    FEW_STEPS,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)

# diffusers' own SDXL pipeline calls its own deprecated `upcast_vae` in float16
pytestmark = pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")

# of Stable Diffusion 1.5's scheduler
LATENT = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LATENT_TRAINING = {k: LATENT[k] for k in ("beta_start", "beta_end", "beta_schedule")}
# arXiv:2305.08891: zero terminal SNR, v-prediction, trailing timesteps
ZERO_SNR = {
    **LATENT,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}
STEPS = 5  # divides T, so that stock's trailing neighbour is the right one
SIZE = 8


def unet(channels=4, out=4, **options):
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=out,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def vae():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def picture(channels=3):
    """A batch with one image in [0, 1]."""
    return torch.rand(1, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def mask():
    half = torch.zeros(1, 1, SIZE, SIZE)
    half[..., SIZE // 2 :] = 1
    return half


def prompt(pooled=False, **more):
    noise = torch.Generator().manual_seed(4)
    words = {
        "prompt_embeds": torch.randn(1, 6, 8, generator=noise),
        "negative_prompt_embeds": torch.randn(1, 6, 8, generator=noise),
    }
    if pooled:
        words["pooled_prompt_embeds"] = torch.randn(1, 8, generator=noise)
        words["negative_pooled_prompt_embeds"] = torch.randn(1, 8, generator=noise)
    return {**words, "output_type": "np", "num_inference_steps": STEPS, **more}


def stable_diffusion(cls=StableDiffusionPipeline, scheduler=LATENT, network=None, **components):
    return cls(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet() if network is None else network,
        scheduler=DDIMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


def xl(cls=StableDiffusionXLPipeline, **scheduler):
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    return cls(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        scheduler=DDIMScheduler(**{**LATENT, **scheduler}),
        add_watermarker=False,
    )


def inpaint():
    pipe = stable_diffusion(StableDiffusionInpaintPipeline)
    return pipe, prompt(image=picture(), mask_image=mask(), strength=0.8, height=SIZE, width=SIZE)


def inpaint_of_nine_channels():
    pipe = stable_diffusion(StableDiffusionInpaintPipeline, network=unet(channels=9))
    return pipe, prompt(image=picture(), mask_image=mask(), height=SIZE, width=SIZE)


def instruct():
    pipe = stable_diffusion(StableDiffusionInstructPix2PixPipeline, network=unet(channels=8))
    return pipe, prompt(image=picture())


def controlnet():
    network = unet()
    control = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4,))
    torch.nn.init.normal_(control.controlnet_mid_block.weight)
    pipe = stable_diffusion(StableDiffusionControlNetPipeline, network=network, controlnet=control)
    return pipe, prompt(image=picture())


def with_eta():
    return stable_diffusion(), prompt(eta=1.0, height=SIZE, width=SIZE)


def image_to_image():
    """It starts in the middle of the plan and noises the image with `add_noise`."""
    return stable_diffusion(StableDiffusionImg2ImgPipeline), prompt(image=picture(), strength=0.6)


def zero_snr_with_guidance_rescale():
    pipe = stable_diffusion(scheduler=ZERO_SNR)
    return pipe, prompt(guidance_rescale=0.7, height=SIZE, width=SIZE)


def sdxl():
    return xl(), prompt(pooled=True, height=SIZE, width=SIZE, guidance_rescale=0.7)


def sdxl_half_way():
    """The first half of an ensemble of experts."""
    return xl(), prompt(pooled=True, height=SIZE, width=SIZE, denoising_end=0.6)


def sdxl_inpaint():
    return xl(StableDiffusionXLInpaintPipeline), prompt(
        pooled=True, image=picture(), mask_image=mask(), height=SIZE, width=SIZE, strength=0.8
    )


def animatediff():
    motion = MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    pipe = AnimateDiffPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        motion_adapter=motion,
        scheduler=DDIMScheduler(**{**LATENT, "beta_schedule": "linear"}),
    )
    return pipe, prompt(num_frames=2, height=SIZE, width=SIZE)


def latent_diffusion():
    network = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    decoder = VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16
    )
    pipe = LDMPipeline(decoder, network, DDIMScheduler(**{**LATENT, "steps_offset": 0}))
    return pipe, {"num_inference_steps": STEPS, "output_type": "np", "eta": 0.3}


def dit():
    network = DiTTransformer2DModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=8,  # predicts a variance too, which the pipeline drops
        num_layers=1,
        patch_size=4,
        attention_head_dim=4,
        num_attention_heads=2,
        num_embeds_ada_norm=1000,  # the pipeline's empty class is number 1000
    )
    pipe = DiTPipeline(network, vae(), DDIMScheduler(clip_sample=False))
    return pipe, {"class_labels": [1], "num_inference_steps": STEPS, "output_type": "np"}


def pixart():
    network = PixArtTransformer2DModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=8,  # predicts a variance too, which the pipeline drops
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        cross_attention_dim=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    trained = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler = DDIMScheduler.from_config(trained.config)
    pipe = PixArtSigmaPipeline(None, None, vae(), network, scheduler)
    words, mask = torch.ones(1, 4, 8), torch.ones(1, 4)
    call = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
    call |= {"prompt_embeds": words, "prompt_attention_mask": mask}
    call |= {"negative_prompt_embeds": -words, "negative_prompt_attention_mask": mask}
    call |= {"height": SIZE, "width": SIZE}
    return pipe, {**call, "num_inference_steps": STEPS, "output_type": "np"}


CASES = [
    inpaint,
    inpaint_of_nine_channels,
    instruct,
    controlnet,
    with_eta,
    image_to_image,
    zero_snr_with_guidance_rescale,
    sdxl,
    sdxl_half_way,
    sdxl_inpaint,
    animatediff,
    latent_diffusion,
    dit,
    pixart,
]


def build(case, dtype=torch.float32):
    torch.manual_seed(0)
    pipe, call = case()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if dtype != torch.float32:
        pipe.to(dtype=dtype)
    call = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and k.endswith("embeds") else v
        for k, v in call.items()
    }
    return pipe, call


def images(pipe, call, seed=1, **more):
    torch.manual_seed(2)  # for what a pipeline draws without its generator
    out = pipe(**{**call, **more}, generator=torch.Generator().manual_seed(seed))
    found = out.frames if hasattr(out, "frames") else out.images
    found = np.asarray(found)
    assert np.isfinite(found).all()
    return found


def processors_of(pipe):
    """The attention processors of all networks: every one of these pipelines has some."""
    found = {}
    for name, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            for path, module in network.named_modules():
                if hasattr(module, "processor"):
                    found[f"{name}.{path}"] = module.processor
    assert found
    return found


def swap(pipe, cls=GeneralizedDDIMScheduler, **settings):
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **settings)
    return pipe


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_same_images_as_stock(case, log):
    pipe, call = build(case)
    log.clear()
    stock = images(pipe, call)
    told_by_stock = [record.getMessage() for record in log.records]
    processors = processors_of(pipe)
    log.clear()
    ours = images(swap(pipe), call)
    assert [record.getMessage() for record in log.records] == told_by_stock
    assert ours.shape == stock.shape
    assert np.abs(ours - stock).max() <= 1e-4
    assert processors_of(pipe) == processors  # the very same objects
    # the comparison can fail: another eta, or another seed, gives other images
    other = images(swap(pipe, eta=0.8), call)
    assert np.abs(other - stock).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "case",
    [inpaint, controlnet, zero_snr_with_guidance_rescale, sdxl, animatediff, dit],
    ids=lambda case: case.__name__,
)
def test_low_precision_is_as_close_to_the_truth_as_stock(case, dtype):
    exact_pipe, exact_call = build(case)
    exact = images(exact_pipe, exact_call)
    pipe, call = build(case, dtype)
    stock = np.abs(images(pipe, call) - exact).mean()
    swap(pipe)
    ours = np.abs(images(pipe, call) - exact).mean()
    assert ours <= 1.5 * stock + 1e-3
    sample = torch.zeros(1, 4, SIZE, SIZE, dtype=dtype)
    pipe.scheduler.set_timesteps(STEPS)
    t = pipe.scheduler.timesteps[0]
    assert pipe.scheduler.step(sample, t, sample).prev_sample.dtype == dtype


@pytest.mark.parametrize("case", [with_eta, sdxl, controlnet], ids=lambda case: case.__name__)
def test_timesteps_of_the_user(case):
    pipe, call = build(case)
    swap(pipe)
    usual = images(pipe, call)
    planned = pipe.scheduler.timesteps.tolist()
    call = {**call, "num_inference_steps": None}
    assert np.array_equal(images(pipe, call, timesteps=planned), usual)
    own = [980, 640, 333, 111, 7]
    seen = []

    def note(pipe, i, t, tensors):
        seen.append(int(t))
        return tensors

    images(pipe, call, timesteps=own, callback_on_step_end=note)
    assert seen == own
    assert pipe.scheduler.planned_pairs() == list(zip(own, [*own[1:], -1], strict=True))
    with pytest.raises(ValueError, match="timesteps"):
        images(pipe, call, timesteps=[1, 2, 3])


@pytest.mark.parametrize("case", [with_eta, sdxl, animatediff], ids=lambda case: case.__name__)
def test_callback_on_step_end(case):
    def run(pipe, call):
        seen = []

        def note(pipe, i, t, tensors):
            seen.append((i, int(t), tensors["latents"].clone()))
            if i == 2:  # what a callback returns is what goes on
                return {"latents": tensors["latents"] * 0.5}
            return {}

        made = images(pipe, call, callback_on_step_end=note)
        return made, seen

    pipe, call = build(case)
    stock, told_by_stock = run(pipe, call)
    ours, told = run(swap(pipe), call)
    assert np.abs(ours - stock).max() <= 1e-4
    assert [line[:2] for line in told] == [line[:2] for line in told_by_stock]
    for (*_, latents), (*_, latents_of_stock) in zip(told, told_by_stock, strict=True):
        assert (latents - latents_of_stock).abs().max() <= 1e-4
    assert np.abs(ours - images(pipe, call)).max() > 1e-3  # the callback did something


def test_a_callback_may_stop_the_loop():
    pipe, call = build(with_eta)
    swap(pipe)
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = i == 1
        return {}

    images(pipe, call, callback_on_step_end=stop)
    assert seen == [0, 1]


@pytest.mark.parametrize("case", [with_eta, sdxl], ids=lambda case: case.__name__)
def test_offload_hooks(case):
    """The hooks of `enable_model_cpu_offload`, with the CPU at both of their ends.

    `enable_sequential_cpu_offload` does not run without an accelerator, with stock neither.
    """
    pytest.importorskip("accelerate")
    pipe, call = build(case)
    stock = images(pipe, call)
    pipe.enable_model_cpu_offload(device="cpu")
    swap(pipe)
    assert np.abs(images(pipe, call) - stock).max() <= 1e-4
    assert np.abs(images(pipe, call) - stock).max() <= 1e-4
    pipe.remove_all_hooks()


@pytest.mark.parametrize("case", [with_eta, image_to_image], ids=lambda case: case.__name__)
def test_markovian_ddpm_in_a_latent_pipeline(case):
    """With DDPM it is the same chain as that of stock's DDPMScheduler."""
    pipe, call = build(case)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    stock = images(pipe, call)
    ours = images(swap(pipe, MarkovianDDPMScheduler), call)
    assert np.abs(ours - stock).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("cls", "stock"),
    [(MarkovianDDPMScheduler, DDPMScheduler), (GeneralizedDDIMScheduler, DDIMScheduler)],
)
def test_in_the_training_scripts_of_diffusers(cls, stock, dtype):
    """What train_text_to_image.py and its kin do with `noise_scheduler`, line by line."""
    theirs, ours = stock(**LATENT_TRAINING), cls.from_config(stock(**LATENT_TRAINING).config)
    noise = torch.Generator().manual_seed(5)
    latents = torch.randn(4, 4, 8, 8, generator=noise).to(dtype)
    eps = torch.randn(4, 4, 8, 8, generator=noise).to(dtype)
    t = torch.randint(0, ours.config.num_train_timesteps, (4,), generator=noise).long()
    close = {"rtol": 0, "atol": 5e-6 if dtype == torch.float32 else 4e-3}
    for scheduler in (theirs, ours):
        scheduler.register_to_config(prediction_type="v_prediction")
    assert ours.config.prediction_type == "v_prediction"
    torch.testing.assert_close(
        ours.add_noise(latents, eps, t), theirs.add_noise(latents, eps, t), **close
    )
    torch.testing.assert_close(
        ours.get_velocity(latents, eps, t), theirs.get_velocity(latents, eps, t), **close
    )
    torch.testing.assert_close(compute_snr(ours, t), compute_snr(theirs, t), rtol=1e-5, atol=0)
    assert ours.alphas_cumprod.dtype == theirs.alphas_cumprod.dtype
    assert ours.alphas_cumprod.to("cpu")[t].shape == (4,)
    # a sample on `meta` has no values: stock's table moves there and is lost, ours stays whole
    for scheduler in (theirs, ours):
        assert scheduler.add_noise(latents.to("meta"), eps.to("meta"), t.to("meta")).is_meta
    assert theirs.alphas_cumprod.is_meta
    torch.testing.assert_close(ours.alphas_cumprod, stock(**LATENT_TRAINING).alphas_cumprod)


def test_from_pretrained_with_our_scheduler_is_quiet(log, tmp_path):
    pipe, call = build(with_eta)
    stock = images(pipe, call)
    pipe.save_pretrained(tmp_path)
    own = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**LATENT).config)
    log.clear()
    again = StableDiffusionPipeline.from_pretrained(
        tmp_path, scheduler=own, text_encoder=None, tokenizer=None, safety_checker=None
    )
    told = [record.getMessage() for record in log.records]
    assert again.scheduler is own
    again.set_progress_bar_config(disable=True)
    assert np.abs(images(again, call) - stock).max() <= 1e-4
    log.clear()
    StableDiffusionPipeline.from_pretrained(
        tmp_path,
        scheduler=DDIMScheduler(**LATENT),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
    )
    assert told == [record.getMessage() for record in log.records]


def test_swapping_back_and_forth_loses_nothing():
    pipe, call = build(sdxl)
    stock = images(pipe, call)
    swap(pipe, eta=0.4, timestep_spacing="quadratic", sigma=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    assert np.array_equal(images(pipe, call), stock)
    again = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)
    assert again.config.eta == 0.4


def test_ledits_keeps_ours_and_finds_the_same_noise():
    """It asks whether the scheduler is a DDIM, and computes with its private methods."""
    stock = DDIMScheduler(**LATENT)
    ours = GeneralizedDDIMScheduler.from_config(stock.config)
    parts = {**stable_diffusion().components, "scheduler": ours}
    parts = {k: parts[k] for k in inspect.signature(LEditsPP.__init__).parameters if k in parts}
    assert LEditsPP(**parts).scheduler is ours
    x, earlier, eps = torch.randn(3, 1, 4, SIZE, SIZE)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    for t in (901, 101, 1):
        expected = compute_noise(stock, earlier, x, t, eps, 1.0)
        found = compute_noise(ours, earlier, x, t, eps, 1.0)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_passes_the_variance_to_the_scheduler():
    """DeepFloyd IF splits it off only where the config names no learned variance."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("SimpleCrossAttnDownBlock2D",),
        up_block_types=("SimpleCrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        encoder_hid_dim=8,
        encoder_hid_dim_type="text_proj",
    ).eval()
    trained = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
    trained |= {"thresholding": True, "sample_max_value": 1.5}
    parts = (None, None, network, DDPMScheduler(**trained), None, None, None)
    pipe = IFPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    words = torch.ones(1, 4, 8)
    call = {"prompt_embeds": words, "negative_prompt_embeds": -words, "num_inference_steps": STEPS}
    call |= {"height": SIZE, "width": SIZE, "output_type": "np"}
    stock = images(pipe, call)
    assert abs(images(swap(pipe, MarkovianDDPMScheduler), call) - stock).max() < 1e-4
    with pytest.raises(ValueError, match="`reverse_variance` is not set"):
        images(swap(pipe), call, eta=0.5)
    with_variance = images(pipe, call)
    # the pipeline splits it off itself when nothing in the config tells of it
    untold = DDPMScheduler(**{**trained, "variance_type": "fixed_small"}).config
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(untold)
    assert np.array_equal(images(pipe, call), with_variance)


@pytest.mark.parametrize(
    ("guidance_scale", "shape", "word"),
    [(7.5, None, "guidance"), (1.0, [1, 32, 32], "shape"), (1.0, None, None)],
)
def test_a_stored_table_in_a_pipeline_of_diffusers(
    guidance_scale, shape, word, caplog, monkeypatch
):
    """It acts for samples of its size, and not where the batch is doubled for guidance."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    plain = GeneralizedDDIMScheduler.from_config(DDIMScheduler(**LATENT).config, **FEW_STEPS)
    tau = [990, 700, 400, 200, 80]
    entry = {
        "version": 1,
        "timesteps": tau,
        "weights": [[0.0] * (i + 1) + [0.1] for i in range(5)],
        "eta": 0.0,
        "clip": None,
        "shape": shape,
        "alpha_bar": [*plain.alpha_bar[tau].tolist(), float(plain.alpha_bar[0])],
    }

    def pictures(settings, cls=StableDiffusionPipeline, **call):
        torch.manual_seed(0)
        pipe = stable_diffusion(cls)
        pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, **settings)
        pipe.set_progress_bar_config(disable=True)
        words = prompt(height=SIZE, width=SIZE, guidance_scale=guidance_scale, **call)
        return pipe(**words, generator=torch.Generator().manual_seed(7)).images

    stored = {**CALIBRATED, "calibration": {"solver": {"5": entry}}}
    found = pictures(stored)
    told = [m.split("do not fit: ")[1].split(".")[0] for m in caplog.messages if "do not fit" in m]
    analytic = pictures({**FEW_STEPS, "timesteps": tau})
    assert np.isfinite(found).all() and told == ([] if word is None else [word])
    assert np.array_equal(found, analytic) == (word is not None)
