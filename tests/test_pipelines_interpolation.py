"""Slerp and `InterpolationPipeline`: ends are ends, and between them is the sphere."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines import (
    GenerationPipeline,
    InterpolationPipeline,
    InversionPipeline,
    sampling,
    slerp,
)
from ddim_schedulers.pipelines import interpolation as module
from ddim_schedulers.pipelines.slerp import angle, slerp_chain, slerp_grid

SIZE = 8
STEPS = {"num_inference_steps": 5, "output_type": "latent"}


def pipeline(scheduler=None):
    pipe = InterpolationPipeline(
        unet=tiny_unet().double(), scheduler=scheduler or GeneralizedDDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_samples(pipe, **kwargs):
    generator = GenerationPipeline.from_pipe(pipe)
    generator.set_progress_bar_config(disable=True)
    return generator(**kwargs, **STEPS).images


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_slerp_on_a_circle():
    x, y = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    for w in (0.0, 0.25, 0.5, 1.0):
        expected = [[math.cos(w * math.pi / 2), math.sin(w * math.pi / 2)]]
        assert torch.allclose(slerp(x, y, w), torch.tensor(expected).double(), atol=1e-12)


def test_slerp_keeps_each_samples_norm_and_lerp_does_not():
    x, y = gaussian(4, 1, 16, 16), gaussian(4, 1, 16, 16, seed=1)
    y = y * (x.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    norms = slerp(x, y, 0.5).flatten(1).norm(dim=1)
    assert torch.allclose(norms, x.flatten(1).norm(dim=1), rtol=1e-12)
    assert ((x + y) / 2).flatten(1).norm(dim=1).max() < 0.9 * norms.min()
    # sample by sample: a batch is its parts
    assert torch.equal(slerp(x, y, 0.3)[2:3], slerp(x[2:3], y[2:3], 0.3))


def test_slerp_is_safe_for_nearly_parallel_samples():
    x = gaussian(1, 64).float()
    for gap in (0.0, 1e-7, 1e-5, 1e-3, 1e-2):
        y = x + gap * gaussian(1, 64, seed=1).float()
        middle = slerp(x, y, 0.5)
        assert middle.isfinite().all() and (middle - (x + y) / 2).abs().max() < gap**2 + 1e-6
    assert float(angle(x, x)) == 0.0 and abs(float(angle(x, -x)) - math.pi) < 1e-12


def test_slerp_refuses_what_has_no_arc():
    x = gaussian(2, 64)
    for y, message in ((-x, "opposite"), (torch.zeros_like(x), "zero"), (x[:, :3], "shape")):
        with pytest.raises(ValueError, match=message):
            slerp(x, y, 0.5)
    with pytest.raises(ValueError, match="weight"):
        slerp(x, x, 1.5)


def test_chain_and_grid_contain_their_ends_to_the_bit():
    ends = gaussian(4, 1, 4, 4).float()
    chain = slerp_chain(ends, [0.0, 0.5])
    assert chain.shape == (7, 1, 4, 4) and torch.equal(chain[::2], ends)
    grid = slerp_grid(ends, 3, 5)
    assert grid.shape == (15, 1, 4, 4) and torch.equal(grid[[0, 4, 10, 14]], ends)


def test_the_ends_of_an_interpolation_are_plain_samples():
    pipe = pipeline()
    seeds = [5, 9, 2]
    expected = plain_samples(pipe, seeds=seeds)
    output = pipe(seeds=seeds, num_points=4, batch_size=3, **STEPS)
    assert len(output.images) == 7
    assert (output.images[::3] - expected).abs().max() < 1e-10
    latents = gaussian(2, 1, SIZE, SIZE)
    from_latents = pipe(latents=latents, num_points=2, **STEPS).images
    assert (from_latents - plain_samples(pipe, latents=latents)).abs().max() < 1e-10
    grid = pipe.grid(seeds=[5, 9, 2, 1], rows=2, columns=3, **STEPS)
    corners = plain_samples(pipe, seeds=[5, 9, 2, 1])
    assert (grid.images[[0, 2, 3, 5]] - corners).abs().max() < 1e-10 and grid.rows == 2


def test_lerp_in_its_place_is_caught_by_the_variance(monkeypatch):
    pipe = pipeline()
    ends = pipe(seeds=[0, 1], num_points=3, **STEPS).latents
    spread = float(ends[1].norm())
    assert float(ends[[0, 2]].flatten(1).norm(dim=1).min()) < spread * 1.001
    assert float(ends[[0, 2]].flatten(1).norm(dim=1).max()) > spread * 0.999
    monkeypatch.setattr(
        module, "slerp_chain", lambda ends, weights: torch.stack([ends[0], ends.mean(0), ends[1]])
    )
    wrong = float(pipe(seeds=[0, 1], num_points=3, **STEPS).latents[1].norm())
    # two independent ends: the mean of them has the standard deviation sqrt(1/2)
    assert abs(wrong / spread - 0.5**0.5) < 0.1


def test_images_are_encoded_first():
    pipe = pipeline(GeneralizedDDIMScheduler(clip_sample=False))
    images = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3)).double()
    # short steps at low noise, where any smooth network is a contraction
    steps = {"timesteps": [60, 40, 20, 0], "output_type": "latent"}
    output = pipe(images=images, num_points=3, refinements=60, **steps)
    inverter = InversionPipeline.from_pipe(pipe)
    inverter.set_progress_bar_config(disable=True)
    expected = inverter(images, timesteps=steps["timesteps"], refinements=60).latents
    assert torch.equal(output.latents[[0, 2]], expected)
    assert (output.images[[0, 2]] / 2 + 0.5 - images).abs().max() < 1e-3
    assert output.inversion.converged


def test_ddpm_interpolation_mixes_diffused_images(monkeypatch):
    tau = [800, 500, 200, 10]
    scheduler = MarkovianDDPMScheduler()
    pipe = pipeline(scheduler)
    images = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3)).double()
    common = {"timesteps": tau, "output_type": "latent", "num_points": 3}
    a = float(scheduler.alpha_bar[500])
    root, rest = math.sqrt(a), math.sqrt(1 - a)
    draws = {
        s: torch.randn(
            (1, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(s), dtype=torch.float64
        )[0]
        for s in (0, 1)
    }
    for noise, second in (("separate", 1), ("same", 0)):
        output = pipe.diffuse(images, 500, noise=noise, **common)
        x, y = (
            root * (images[0] * 2 - 1) + rest * draws[0],
            root * (images[1] * 2 - 1) + rest * draws[second],
        )
        expected = torch.stack([x, (x + y) / 2, y])
        assert (output.latents - expected).abs().max() < 1e-12
        # the noise is fixed for all weights: each picture is decoded with that of the same seed
        alone = plain_from(pipe, expected[1:2], 500, tau)
        assert (output.images[1:2] - alone).abs().max() < 1e-10
    for bad, message in (
        ({"timestep": 1000}, "timestep"),
        ({"timestep": 500, "noise": "x"}, "noise"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.diffuse(images, **{**common, **bad})
    with pytest.raises(ValueError, match="two"):
        pipe.diffuse(images[:1], 500, **common)
    expected, warned = pipe.diffuse(images, 200, **common), []
    monkeypatch.setattr(sampling.logger, "warning", warned.append)
    for t in (200, 300, 106):  # the nearest planned timestep is meant
        output = pipe.diffuse(images, t, **common)
        assert output.timestep == 200 and torch.equal(output.latents, expected.latents)
    assert pipe.diffuse(images, 350, **common).timestep == 500  # of two, the larger
    assert len(warned) == 3 and "350, which is not on the trajectory of 4 steps; 500" in warned[2]


def plain_from(pipe, x_t, t, tau):
    generator = GenerationPipeline.from_pipe(pipe)
    generator.set_progress_bar_config(disable=True)
    return generator(
        latents=x_t, start_timestep=t, timesteps=tau, seeds=[0], output_type="latent"
    ).images


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match="diffuse"):
        pipeline(DDPMScheduler())(seeds=[1, 2])
    with pytest.raises(ValueError, match="draws noise"):
        pipeline(GeneralizedDDIMScheduler(eta=0.5))(seeds=[1, 2])
    pipe = pipeline()
    with pytest.raises(ValueError, match="must be given, and only one of them"):
        pipe(seeds=[1, 2], latents=gaussian(2, 1, SIZE, SIZE))
    with pytest.raises(ValueError, match="at least two"):
        pipe(seeds=[1])
    with pytest.raises(ValueError, match="`seeds` is {1: 2}; it must be an integer, or a list"):
        pipe(seeds={1: 2})
    with pytest.raises(ValueError, match="`seeds` has 2 corners; a grid must have four"):
        pipe.grid(seeds=[1, 2])
    with pytest.raises(ValueError, match="`latents` has 3 corners"):
        pipe.grid(latents=gaussian(3, 1, SIZE, SIZE))
    with pytest.raises(ValueError, match="num_points"):
        pipe(seeds=[1, 2], num_points=1)
