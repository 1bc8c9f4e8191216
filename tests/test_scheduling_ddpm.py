"""`MarkovianDDPMScheduler` against DDPM's equations in float64, and its variances."""

import math

import pytest
import torch

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

SHAPE = (2, 3, 4, 4)
FIXED = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
SPACINGS = ("leading", "trailing", "linspace", "quadratic")


def _scheduler(**settings):
    return MarkovianDDPMScheduler(**{"clip_sample": False, **settings})


def _levels(alpha_bar, plan):
    a_t = [alpha_bar[t] for t in plan]
    return list(zip(a_t, [*a_t[1:], 1.0], strict=True))


def _std(closed_form, variance, a_t, a_s, raw=None):
    """Standard deviation by the names of DDPM, Sec. 3.2, and Improved DDPM, Eq. 15."""
    if a_s == 1:
        return 0.0
    small, large = closed_form.sigma(a_t, a_s), math.sqrt(1 - a_t / a_s)
    if variance.startswith("fixed_small"):
        return small
    if variance.startswith("fixed_large"):
        return large
    if variance == "learned":
        return raw.sqrt()
    share = (raw + 1) / 2
    return torch.exp(share * math.log(large) + (1 - share) * math.log(small))


def _assert_variance(closed_form, variance, spacing, std_of):
    alpha_bar = closed_form.alpha_bar()
    scheduler = _scheduler(variance_type=variance, timestep_spacing=spacing)
    scheduler.set_timesteps(15)
    plan = scheduler.timesteps.tolist()
    assert scheduler.planned_pairs() == list(zip(plan, [*plan[1:], -1], strict=True))
    for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
        x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        raw = torch.rand(SHAPE, dtype=torch.float64)
        output = torch.cat([m, raw], 1) if variance.startswith("learned") else m
        x0, _ = closed_form.predictions("epsilon", m, x, a_t)
        expected = closed_form.ddpm(x0, x, a_t, a_s, std_of(variance, a_t, a_s, raw), z)
        got = scheduler.step(output, t, x, variance_noise=z)
        torch.testing.assert_close(got.prev_sample, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.pred_original_sample, x0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variance", [*FIXED, "learned", "learned_range"])
def test_every_variance_is_its_formula_at_every_spacing(variance, closed_form):
    for spacing in SPACINGS:
        _assert_variance(closed_form, variance, spacing, lambda *a: _std(closed_form, *a))


@pytest.mark.parametrize("variance", [*FIXED, "learned", "learned_range"])
def test_a_variance_for_a_standard_deviation_is_noticed(variance, closed_form):
    with pytest.raises(AssertionError):
        _assert_variance(closed_form, variance, "leading", lambda *a: _std(closed_form, *a) ** 2)


def test_every_prediction_clipped_or_not(closed_form):
    for kind in ("epsilon", "sample", "v_prediction", "posterior_mean"):
        for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
            alpha_bar = closed_form.alpha_bar(schedule)
            for limit in (
                {"clip_sample": False},
                {"clip_sample": True, "clip_sample_range": 0.7},
                {"thresholding": True, "sample_max_value": 1.5},
            ):
                scheduler = _scheduler(beta_schedule=schedule, prediction_type=kind, **limit)
                scheduler.set_timesteps(12)
                plan = scheduler.timesteps.tolist()
                for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
                    x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
                    before = alpha_bar[t - 1] if t else 1.0
                    x0, _ = closed_form.predictions(kind, m, x, a_t, before)
                    x0 = closed_form.limited(x0, scheduler.config)
                    std = _std(closed_form, "fixed_small", a_t, a_s)
                    expected = closed_form.ddpm(x0, x, a_t, a_s, std, z)
                    got = scheduler.step(m, t, x, variance_noise=z).prev_sample
                    scale = max(1.0, float(x0.abs().max()))
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * scale)


def test_float32_steps_are_within_1e_6_of_the_closed_form(closed_form):
    """Elementwise, in units of |k_x x_t| + |k_eps eps|, without noise."""
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        alpha_bar = closed_form.alpha_bar(schedule)
        scheduler = _scheduler(beta_schedule=schedule)
        for t in range(0, 1000, 9):
            a_t, a_s = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
            x, m = torch.randn(2, *SHAPE)
            got = scheduler.step(m, t, x, variance_noise=torch.zeros(SHAPE)).prev_sample
            of_x0, of_x, _ = closed_form.posterior(a_t, a_s)
            k_x = of_x + of_x0 / math.sqrt(a_t)
            k_m = -of_x0 * math.sqrt(1 - a_t) / math.sqrt(a_t)
            exact = k_x * x.double() + k_m * m.double()
            scale = (k_x * x.double()).abs() + (k_m * m.double()).abs()
            assert float(((got.double() - exact).abs() / scale).max()) < 1e-6


def test_without_set_timesteps_it_walks_the_training_chain(closed_form):
    alpha_bar = closed_form.alpha_bar()
    scheduler = _scheduler()
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    assert scheduler.num_inference_steps is None
    for t in (999, 500, 1, 0):
        assert scheduler.previous_timestep(t) == t - 1
        x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        a_t, a_s = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
        x0, _ = closed_form.predictions("epsilon", m, x, a_t)
        std = closed_form.sigma(a_t, a_s)
        expected = closed_form.ddpm(x0, x, a_t, a_s, std, z)
        torch.testing.assert_close(scheduler.step(m, t, x, variance_noise=z).prev_sample, expected)


def test_it_is_the_member_eta_one():
    """The same object as DDIM(eta = 1) with eps_hat re-derived, sigma-hat and all."""
    for clip in (False, True):
        for variance, reverse in (("fixed_small", "sigma"), ("fixed_large", "sigma_hat")):
            ddpm = _scheduler(variance_type=variance, clip_sample=clip)
            ddim = GeneralizedDDIMScheduler(eta=1.0, reverse_variance=reverse, clip_sample=clip)
            for scheduler in (ddpm, ddim):
                scheduler.set_timesteps(20)
            for t in ddpm.timesteps:
                x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
                one = ddpm.step(m, t, x, variance_noise=z).prev_sample
                other = ddim.step(
                    m, t, x, use_clipped_model_output=True, variance_noise=z
                ).prev_sample
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_fixed_large_log_is_not_nan():
    """Stock takes the square root of a logarithm there."""
    x, m = torch.randn(2, *SHAPE)
    results = []
    for variance in ("fixed_large", "fixed_large_log"):
        scheduler = _scheduler(variance_type=variance)
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(m, 500, x, generator=generator).prev_sample)
    assert torch.isfinite(results[1]).all() and torch.equal(*results)


@pytest.mark.parametrize("variance", [*FIXED, "learned", "learned_range"])
def test_no_noise_on_the_step_that_lands_on_x0(variance):
    """Also where the last planned timestep is above 0, on which stock adds noise."""
    scheduler = _scheduler(variance_type=variance, steps_offset=1)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[-1]) == 1
    x, m = torch.randn(2, *SHAPE)
    output = torch.cat([m, m.abs()], 1) if variance.startswith("learned") else m
    step = scheduler.step(output, 1, x)
    torch.testing.assert_close(step.prev_sample, step.pred_original_sample)
    if variance == "learned":  # ... and a negative "variance" of the last step is no NaN either
        step = scheduler.step(torch.cat([m, -m.abs() - 1], 1), 1, x)
        torch.testing.assert_close(step.prev_sample, step.pred_original_sample)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variances_need_twice_the_channels(variance):
    scheduler = _scheduler(variance_type=variance)
    x = torch.zeros(SHAPE)
    with pytest.raises(
        ValueError, match=r"`model_output` has shape \(2, 3, 4, 4\).*\(2, 6, 4, 4\)"
    ):
        scheduler.step(x, 5, x)


def test_custom_timesteps(closed_form):
    scheduler = _scheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100] and scheduler.custom_timesteps
    assert scheduler.planned_pairs() == [(900, 500), (500, 100), (100, -1)]
    assert [scheduler.previous_timestep(t) for t in (900, 700, 500, 99)] == [500, 500, 100, -1]
    scheduler.set_timesteps(4)
    assert not scheduler.custom_timesteps and len(scheduler.timesteps) == 4
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 4 and `timesteps` is given"):
        scheduler.set_timesteps(4, timesteps=[5, 3])
    in_config = _scheduler(timesteps=[900, 500, 100])
    in_config.set_timesteps()
    assert in_config.timesteps.tolist() == [900, 500, 100]
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 4, but `timesteps` has 3"):
        in_config.set_timesteps(4)


@pytest.mark.parametrize("name", ["other", "fixed", "", None])
def test_an_unknown_variance_type_is_an_error(name):
    with pytest.raises(ValueError, match=r"`variance_type` is .*('fixed_small'|a name)"):
        _scheduler(variance_type=name)


def test_zero_terminal_snr(closed_form):
    alpha_bar = closed_form.alpha_bar("linear", zero_snr=True)
    with pytest.raises(ValueError, match="`prediction_type` is 'epsilon'"):
        _scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing").set_timesteps(10)
    scheduler = _scheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    scheduler.set_timesteps(10)
    x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
    a_s = alpha_bar[899]
    expected = closed_form.ddpm(-m, x, 0.0, a_s, math.sqrt(1 - a_s), z)
    torch.testing.assert_close(
        scheduler.step(m, 999, x, variance_noise=z).prev_sample, expected, rtol=0, atol=1e-11
    )


def test_gaussian_data_arrives_at_its_mean_and_variance(closed_form):
    """With the optimal eps and 1000 steps; each step is linear, so that no sampling is needed."""
    mu, var = -2.0, 0.25
    alpha_bar = closed_form.alpha_bar()

    def arrive(variance, wrong=1.0):
        scheduler = _scheduler(variance_type=variance)
        first = alpha_bar[999]
        mean, total = math.sqrt(first) * mu, first * var + 1 - first
        for t in range(999, -1, -1):
            a_t = alpha_bar[t]
            x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None]
            z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None]
            eps = math.sqrt(1 - a_t) * (x - math.sqrt(a_t) * mu) / (a_t * var + 1 - a_t)
            y = scheduler.step(wrong * eps, t, x, variance_noise=z).prev_sample[:, 0].tolist()
            slope, noise = y[1] - y[0], y[2] - y[0]
            mean, total = y[0] + slope * mean, slope**2 * total + noise**2
        return mean, math.sqrt(total)

    for variance in ("fixed_small", "fixed_large"):
        mean, std = arrive(variance)
        assert mean == pytest.approx(mu, abs=2e-3) and std == pytest.approx(0.5, rel=2e-2)
    mean, std = arrive("fixed_small", wrong=1.02)
    assert abs(mean - mu) > 2e-3 or abs(std / 0.5 - 1) > 2e-2
