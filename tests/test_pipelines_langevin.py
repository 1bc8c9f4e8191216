"""`AnnealedLangevinPipeline`: it reaches the moments of a mixture whose score is exact."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines import AnnealedLangevinPipeline, geometric_timesteps
from ddim_schedulers.pipelines import langevin as module

SIZE = 4
MEANS, WEIGHTS, STD = (-0.5, 0.6), (0.3, 0.7), 0.2
# noise levels sqrt((1 - abar) / abar) in about equal ratios, as NCSN has them
LEVELS = [999, 850, 720, 610, 520, 440, 370, 310, 255, 205, 165, 130, 100, 75, 55, 38, 25, 15, 8, 3]


class Mixture(ModelMixin, ConfigMixin):
    """The exact eps of a mixture of two Gaussians N(m 1, STD^2 I): -sqrt(1 - a) times the score."""

    @register_to_config
    def __init__(self, sample_size=SIZE, in_channels=1, out_channels=1):
        super().__init__()
        weight = torch.zeros(1, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.alpha_bar = GeneralizedDDIMScheduler().alpha_bar

    def forward(self, x, timestep):
        a = float(self.alpha_bar[int(timestep)])
        variance = a * STD**2 + 1 - a
        distances = [(x - a**0.5 * m) for m in MEANS]
        logits = [
            -d.square().flatten(1).sum(dim=1) / (2 * variance) + torch.tensor(w).log()
            for d, w in zip(distances, WEIGHTS, strict=True)
        ]
        shares = torch.stack(logits).softmax(dim=0)
        parts = zip(shares, distances, strict=True)
        pull = sum(p.view(-1, 1, 1, 1) * d for p, d in parts)
        return UNet2DOutput(sample=(1 - a) ** 0.5 * pull / variance)


def pipeline(scheduler=None):
    scheduler = scheduler or GeneralizedDDIMScheduler(clip_sample=False)
    pipe = AnnealedLangevinPipeline(unet=Mixture(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moments(x):
    """(share of the upper mode, its mean, its standard deviation)."""
    upper = x.flatten(1).mean(dim=1) > 0
    return float(upper.double().mean()), float(x[upper].mean()), float(x[upper].std())


def check(x, rule="expected"):
    share, mean, std = moments(x)
    # 384 images: the share has a standard error of 0.023
    assert abs(share - WEIGHTS[1]) < 0.08 and abs(mean - MEANS[1]) < 0.02
    # in 16 dimensions the norms of each sample scatter, and their rule is biased
    assert abs(std - STD) < (0.025 if rule == "expected" else 0.04)


def test_annealed_langevin_reaches_the_moments():
    x = pipeline()(
        seeds=range(384),
        batch_size=384,
        timesteps=LEVELS,
        inner_steps=40,
        snr=0.2,
        step_rule="expected",
        final_denoising=False,
        output_type="latent",
    )
    assert x.network_calls == 40 * len(LEVELS)
    check(x.images)


def test_a_score_without_its_scale_is_caught_by_the_same_check(monkeypatch):
    monkeypatch.setattr(module.Levels, "score", lambda self, m, x, t: -self.eps(m, x, t))
    x = pipeline()(
        seeds=range(128),
        batch_size=128,
        timesteps=LEVELS,
        inner_steps=10,
        snr=0.2,
        step_rule="expected",
        final_denoising=False,
        output_type="latent",
    )
    with pytest.raises(AssertionError):
        check(x.images)


@pytest.mark.parametrize("scheduler", [GeneralizedDDIMScheduler, DDIMScheduler])
def test_the_defaults_are_those_that_give_pictures(scheduler):
    """What docs/pipelines.md shows; stock DDIM takes no timesteps, and needs to plan none."""
    pipe = pipeline(scheduler(clip_sample=False))
    common = {"seeds": range(48), "output_type": "latent"}
    made, levels = pipe(**common), geometric_timesteps(pipe.scheduler, 100)
    assert made.network_calls == 15 * len(levels) + 1
    _, mean, std = moments(made.images)
    assert abs(mean - MEANS[1]) < 0.06 and abs(std - STD) < 0.04
    if scheduler is DDIMScheduler:
        return
    asked = pipe(timesteps=levels, inner_steps=15, snr=0.16, **common)
    assert torch.equal(made.images, asked.images)
    made = pipe(predictor=True, **common)
    asked = pipe(predictor=True, num_inference_steps=50, inner_steps=2, snr=0.1, **common)
    assert torch.equal(made.images, asked.images) and made.network_calls == 50 + 49 * 2
    kept = pipeline(GeneralizedDDIMScheduler(clip_sample=False, timesteps=LEVELS))
    assert kept(seeds=[0]).network_calls == 15 * len(LEVELS) + 1


@pytest.mark.parametrize("step_rule", ["sample", "expected"])
def test_predictor_corrector_reaches_the_moments(step_rule):
    pipe = pipeline(MarkovianDDPMScheduler(clip_sample=False))
    x = pipe(
        seeds=range(512),
        batch_size=512,
        timesteps=LEVELS,
        inner_steps=10,
        snr=0.2,
        step_rule=step_rule,
        predictor=True,
        output_type="latent",
    )
    assert x.network_calls == 20 + 19 * 10
    check(x.images, step_rule)


def test_corrections_repair_a_coarse_deterministic_predictor():
    pipe = pipeline()
    common = {"seeds": range(256), "batch_size": 256, "timesteps": LEVELS, "predictor": True}
    common |= {"output_type": "latent", "step_rule": "expected", "snr": 0.2}
    stds = [moments(pipe(inner_steps=k, **common).images)[2] for k in (0, 10)]
    assert abs(stds[1] - STD) < 0.03


def test_an_image_depends_on_its_seed_alone():
    pipe = pipeline()
    for kwargs in ({}, {"predictor": True, "eta": 1.0}):
        runs = [
            pipe(
                seeds=range(5),
                batch_size=b,
                timesteps=[900, 300, 20],
                output_type="latent",
                **kwargs,
            )
            for b in (5, 2)
        ]
        assert (runs[0].images - runs[1].images).abs().max() < 1e-10


def test_without_corrections_the_predictor_is_the_plain_sampler():
    from ddim_schedulers.pipelines import GenerationPipeline

    pipe = pipeline()
    plain = GenerationPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    kwargs = {"seeds": [1, 2], "timesteps": LEVELS, "output_type": "latent"}
    expected = plain(**kwargs).images
    assert torch.equal(pipe(predictor=True, inner_steps=0, **kwargs).images, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"inner_steps": 0}, "inner_steps"),
        ({"snr": 0.0}, "snr"),
        ({"snr": "0.1"}, "snr"),
        ({"step_rule": "batch"}, "step_rule"),
        ({"eta": 0.5}, "eta"),
    ],
)
def test_bad_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(num_inference_steps=2, **kwargs)


def test_diverging_steps_raise():
    with pytest.raises(ValueError, match="seeds 4, 5[.].*`snr`"):
        pipeline()(seeds=[4, 5], num_inference_steps=10, snr=1e200)


def test_geometric_levels_fall_in_equal_ratios():
    scheduler = GeneralizedDDIMScheduler()
    levels = geometric_timesteps(scheduler, 40)
    assert levels[0] == 999 and levels[-1] == 0 and levels == sorted(set(levels), reverse=True)
    a = scheduler.alpha_bar[levels]
    ratios = ((1 - a) / a).sqrt().log().diff()[:20]
    assert (ratios / ratios.mean() - 1).abs().max() < 0.2
    with pytest.raises(ValueError, match="num_levels"):
        geometric_timesteps(scheduler, 1)


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        pipeline(DPMSolverMultistepScheduler())
    zero_snr = GeneralizedDDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        pipeline(zero_snr)(num_inference_steps=2)
    with pytest.raises(ValueError, match="solver_order=2"):
        pipeline(GeneralizedDDIMScheduler(solver_order=2))(predictor=True, num_inference_steps=2)
