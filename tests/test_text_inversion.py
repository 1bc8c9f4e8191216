"""`invert`: the latents that Stable Diffusion and SDXL decode to given pictures, or a word."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from test_swap_pipelines import (
    SIZE,
    build,
    controlnet,
    inpaint,
    instruct,
    sdxl,
    stable_diffusion,
    swap,
    with_eta,
)

from ddim_schedulers import GeneralizedDDIMInverseScheduler, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import encode_and_refine, invert
from ddim_schedulers.pipelines.refinement import AndersonMixing

SET_BY_INVERSION = ("num_inference_steps", "output_type", "eta", "guidance_rescale")


def ready(case=with_eta, guided=False, count=1, **scheduler):
    """A pipeline with our scheduler, the prompts of a call, and x_0 of `count` pictures."""
    pipe, call = build(case)
    swap(pipe, **scheduler)
    call = {k: v for k, v in call.items() if k not in SET_BY_INVERSION}
    if not guided:
        call = {k: v for k, v in call.items() if not k.startswith("negative")}
    for name, value in call.items():
        if name.endswith("embeds"):
            call[name] = value.repeat_interleave(count, dim=0)
    noise = torch.Generator().manual_seed(5)
    return pipe, call, torch.randn(count, 4, SIZE, SIZE, generator=noise)


def decoded(pipe, call, found, steps, scale=1.0):
    return pipe(
        **call,
        latents=found.latents,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
    ).images


def error(x, y):
    return float((x - y).square().mean())


@pytest.mark.parametrize("case", [with_eta, sdxl, controlnet], ids=lambda case: case.__name__)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_same_pipeline_decodes_the_picture(case, scale):
    pipe, call, x_0 = ready(case, guided=scale > 1)
    scheduler, modules = pipe.scheduler, dict(pipe.components)
    options = {"latents": x_0, "num_inference_steps": 10, "guidance_scale": scale}
    found = invert(pipe, **options, refinements=40, mixing=4, **call)
    assert found.converged.all() and found.residual.shape == (10, 1)
    assert error(decoded(pipe, call, found, 10, scale), x_0) < 1e-5
    plain = invert(pipe, **options, refinements=0, **call)
    assert plain.residual is None and plain.converged is None
    assert error(decoded(pipe, call, plain, 10, scale), x_0) > 1e-3
    # the pipeline is as it was
    assert pipe.scheduler is scheduler and dict(pipe.components) == modules


def test_the_same_network_directly_gives_the_same_bits():
    pipe, call, x_0 = ready()
    found = invert(pipe, latents=x_0, num_inference_steps=5, refinements=4, tolerance=1e-9, **call)
    words, unet = call["prompt_embeds"], pipe.unet
    inverse = GeneralizedDDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(5)

    def network(x, t):
        return unet(x, torch.as_tensor(t), encoder_hidden_states=words).sample

    with torch.no_grad():
        direct = encode_and_refine(network, x_0, inverse, 4, 1e-9)
    assert torch.equal(direct.latents, found.latents)
    assert torch.equal(direct.residual, found.residual)


def test_it_says_which_pictures_have_not_converged(log):
    pipe, call, x_0 = ready(guided=True, count=2)
    x_0[0] = 0  # an easy one
    options = {"num_inference_steps": 5, "guidance_scale": 7.5, "tolerance": 1e-4}
    found = invert(pipe, latents=x_0, refinements=3, **options, **call)
    late = (~found.converged).nonzero().flatten().tolist()
    assert late and f"{len(late)} of 2 images: {', '.join(map(str, late))}, counted" in log.text
    assert torch.equal(found.converged, (found.residual <= 1e-4).all(dim=0))


def test_mixing_converges_where_the_plain_iteration_does_not():
    """A linear map whose eigenvalues lie beyond 1: x + f runs away, Anderson's method does not."""
    matrix = torch.diag(torch.tensor([-3.0, -2.0, 0.5, 0.9], dtype=torch.float64))
    x = plain = torch.ones(2, 4, dtype=torch.float64)
    mixing = AndersonMixing(4)
    for _ in range(12):
        x, plain = mixing.next(x, x @ matrix + 1 - x), plain @ matrix + 1
    solution = 1 / (1 - matrix.diagonal())
    assert (x - solution).abs().max() < 1e-5
    assert (plain - solution).abs().max() > 1e3


def test_the_residual_of_mixing_is_that_of_what_is_returned():
    pipe, call, x_0 = ready()
    options = {"num_inference_steps": 3, "refinements": 6, "tolerance": 1e-9}
    found = invert(pipe, latents=x_0, mixing=3, **options, **call)
    decoding = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)
    decoding.set_timesteps(3)
    t, s = decoding.planned_pairs()[0]
    with torch.no_grad():
        eps = pipe.unet(found.latents, t, encoder_hidden_states=call["prompt_embeds"]).sample
    x_s = decoding.step(eps, t, found.latents).prev_sample
    step_before = invert(
        pipe,
        latents=x_0,
        timesteps=[tau for tau, _ in decoding.planned_pairs()[1:]],
        mixing=3,
        refinements=6,
        tolerance=1e-9,
        **call,
    )
    a_t, a_s = decoding.alpha_bar[[t, s]]
    missed = (step_before.latents - x_s) * (a_t / a_s) ** 0.5
    assert torch.allclose(missed.square().mean().sqrt(), found.residual[-1].float(), atol=1e-6)


def test_pictures_are_encoded_with_the_mean_of_the_vae():
    pipe, call, _ = ready()
    pixels = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    found = invert(pipe, pixels, num_inference_steps=2, refinements=0, **call)
    x = torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert torch.allclose(found.start, expected, atol=1e-6)


def test_an_image_to_image_pipeline_serves():
    pipe, call, x_0 = ready()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected = invert(pipe, latents=x_0, num_inference_steps=3, refinements=2, **call)
    found = invert(other, latents=x_0, num_inference_steps=3, refinements=2, **call)
    assert torch.equal(found.latents, expected.latents)


@pytest.mark.parametrize("case", [inpaint, instruct], ids=lambda case: case.__name__)
def test_another_loop_is_refused_with_the_reason(case):
    pipe, _ = build(case)
    with pytest.raises(ValueError, match="`pipe` is a .*which has no inverse here: it"):
        invert(swap(pipe), latents=torch.zeros(1, 4, SIZE, SIZE), prompt="")


def test_a_subclass_with_a_loop_of_its_own_is_refused():
    class Own(StableDiffusionPipeline):
        def __call__(self, prompt):
            return super().__call__(prompt)

    pipe = stable_diffusion(Own)
    with pytest.raises(ValueError, match="not known to be the plain one"):
        invert(swap(pipe), latents=torch.zeros(1, 4, SIZE, SIZE), prompt="")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "is a DDIMScheduler; it must be a GeneralizedDDIMScheduler"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler.*clip_sample=False"),
        (GeneralizedDDIMScheduler(clip_sample=True), "clip_sample=True"),
        (GeneralizedDDIMScheduler(clip_sample=False, eta=0.5), "eta=0.5"),
        (GeneralizedDDIMScheduler(clip_sample=False, solver_order=2), "solver_order=2"),
        (GeneralizedDDIMScheduler(clip_sample=False, eps_scale=1.01), "eps_scale=1.01"),
    ],
)
def test_a_scheduler_without_an_inverse_is_refused(scheduler, message):
    pipe, call, x_0 = ready()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        invert(pipe, latents=x_0, num_inference_steps=2, **call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(1, 4, SIZE, SIZE + 1)}, "`latents` is"),
        ({"latents": torch.full((1, 4, SIZE, SIZE), torch.nan)}, "not finite"),
        ({"latents": None}, "`images` or `latents` must be given"),
        ({"latents": None, "images": torch.zeros(1, 3, SIZE, 2 * SIZE)}, "`images` has shape"),
        ({"height": 12}, "`height` is 12; it must be a multiple of 8"),
        ({"guidance_scale": 7.5}, "`negative_prompt` is None at `guidance_scale` 7.5"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"negative_prompt": "x"}, "does not use it at `guidance_scale` 1.0"),
        ({"prompt_embeds": torch.zeros(2, 6, 8)}, "has 2 prompts for 1 pictures"),
        ({"generator": torch.Generator()}, "`generator` must be left out"),
        ({"eta": 1.0}, "`eta` must be left out"),
        ({"refinements": -1}, "`refinements` is -1"),
        ({"mixing": 1.5}, "`mixing` is 1.5"),
        ({"tolerance": 0}, "`tolerance` is 0"),
    ],
)
def test_bad_arguments(options, message):
    pipe, call, x_0 = ready()
    with pytest.raises(ValueError, match=message):
        invert(pipe, **{"latents": x_0, "num_inference_steps": 2, **call, **options})


def test_an_argument_that_the_pipeline_does_not_have():
    pipe, call, x_0 = ready()
    with pytest.raises(TypeError, match="`guidance` is given; .*StableDiffusionPipeline"):
        invert(pipe, latents=x_0, guidance=3, **call)


def test_a_controlnet_in_a_part_of_the_steps_is_refused():
    pipe, call, x_0 = ready(controlnet)
    with pytest.raises(ValueError, match="`control_guidance_end` is 0.5; it must be 1.0"):
        invert(pipe, latents=x_0, control_guidance_end=0.5, **call)


def test_half_precision_and_a_safety_checker_are_told(log):
    pipe, call, x_0 = ready()
    pipe.to(dtype=torch.bfloat16)
    pipe.safety_checker = object()
    call["prompt_embeds"] = call["prompt_embeds"].bfloat16()
    found = invert(pipe, latents=x_0, num_inference_steps=3, **call)
    assert found.latents.dtype == torch.bfloat16 and not found.converged.any()
    assert "safety checker" in log.text and "rounded" in log.text
