"""`GeneralizedDDIMScheduler` against DDIM's equations in float64, and its own settings."""

import math

import numpy as np
import pytest
import torch

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
SHAPE = (2, 3, 4, 4)


def _scheduler(**settings):
    return GeneralizedDDIMScheduler(**{"clip_sample": False, **settings})


def _random_plan(random, steps=1000):
    size = int(random.integers(1, 40))
    return sorted(random.choice(steps, size, replace=False).tolist(), reverse=True)


def _levels(alpha_bar, plan, end=1.0):
    a_t = [alpha_bar[t] for t in plan]
    return list(zip(a_t, [*a_t[1:], end], strict=True))


def _x_t(x0, eps, a_t):
    return math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps


# -- every step within 1e-6 of the float64 closed form


def _worst_error(closed_form, step_error, trials=30):
    """Largest error over random trajectories and random admissible sigma, float32 inputs.

    In units of |k_x x_t| + |k_eps eps| + |std z|, elementwise: what rounding to float32 can do.
    """
    random = np.random.default_rng(0)
    worst = 0.0
    for trial in range(trials):
        schedule = SCHEDULES[trial % len(SCHEDULES)]
        alpha_bar = closed_form.alpha_bar(schedule)
        plan = _random_plan(random)
        bounds = [math.sqrt(1 - a_s) for _, a_s in _levels(alpha_bar, plan)]
        sigma = [float(random.uniform(0, 1) * bound) for bound in bounds]
        scheduler = _scheduler(beta_schedule=schedule)
        scheduler.set_timesteps(timesteps=plan, sigma=sigma)
        for t, (a_t, a_s), std in zip(plan, _levels(alpha_bar, plan), sigma, strict=True):
            x, eps, z = torch.randn(3, *SHAPE)
            for noise in (z, torch.zeros_like(z)):
                got = scheduler.step(eps, t, x, variance_noise=noise).prev_sample
                k_x = math.sqrt(a_s / a_t)
                k_eps = math.sqrt(1 - a_s - std**2) if a_s < 1 else 0.0
                k_eps -= math.sqrt(a_s) * math.sqrt(1 - a_t) / math.sqrt(a_t)
                k_x, k_eps, std = step_error(k_x, k_eps, std)
                exact = k_x * x.double() + k_eps * eps.double() + std * noise.double()
                scale = (k_x * x.double()).abs() + (k_eps * eps.double()).abs()
                scale += (std * noise.double()).abs()
                worst = max(worst, float(((got.double() - exact).abs() / scale).max()))
    return worst


def test_every_step_is_the_closed_form_within_1e_6(closed_form):
    """With zero noise the unit is |k_x x_t| + |k_eps eps| alone, for every admissible sigma."""
    assert _worst_error(closed_form, lambda *k: k) < 1e-6


@pytest.mark.parametrize(
    "mutation",
    [
        lambda k_x, k_eps, std: (k_x * (1 + 3e-6), k_eps, std),
        lambda k_x, k_eps, std: (k_x, k_eps, std**2),
        lambda k_x, k_eps, std: (k_x, k_eps + 1e-5, std),
    ],
)
def test_a_slightly_wrong_coefficient_is_noticed(closed_form, mutation):
    assert _worst_error(closed_form, mutation, trials=3) > 1e-6


def test_every_prediction_is_the_closed_form(closed_form):
    """float64 samples, so that only the formulas count; with and without clipping."""
    random = np.random.default_rng(1)
    for kind in ("epsilon", "sample", "v_prediction", "posterior_mean"):
        for schedule in SCHEDULES:
            alpha_bar = closed_form.alpha_bar(schedule)
            for limit in (
                {"clip_sample": False},
                {"clip_sample": True, "clip_sample_range": 0.7},
                {"clip_sample": True, "thresholding": True, "sample_max_value": 1.5},
            ):
                scheduler = _scheduler(beta_schedule=schedule, prediction_type=kind, **limit)
                plan = _random_plan(random)
                scheduler.set_timesteps(timesteps=plan)
                for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
                    x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
                    before = alpha_bar[t - 1] if t else 1.0
                    x0, eps = closed_form.predictions(kind, m, x, a_t, before)
                    x0 = closed_form.limited(x0, scheduler.config)
                    for rederive in (False, True):
                        hat = closed_form.rederived(x, x0, a_t) if rederive else eps
                        sigma = closed_form.sigma(a_t, a_s, 0.5)
                        expected = closed_form.ddim(x0, hat, a_s, sigma, z)
                        got = scheduler.step(
                            m, t, x, eta=0.5, use_clipped_model_output=rederive, variance_noise=z
                        )
                        scale = float(x0.abs().max() + hat.abs().max())
                        torch.testing.assert_close(
                            got.pred_original_sample, x0, rtol=0, atol=1e-11 * scale
                        )
                        torch.testing.assert_close(
                            got.prev_sample, expected, rtol=0, atol=1e-11 * scale
                        )


# -- the family


def test_a_fixed_x0_oracle_leaves_variance_one_minus_alpha_bar_s(closed_form):
    """The columns of a step on unit inputs are its coefficients; variances of x_t and z add."""
    random = np.random.default_rng(2)
    one, zero = torch.ones(2, 1, 1, 1, 1, dtype=torch.float64)[0], torch.zeros(1, 1, 1, 1)
    zero = zero.double()
    for schedule in SCHEDULES:
        alpha_bar = closed_form.alpha_bar(schedule)
        plan = _random_plan(random)
        levels = _levels(alpha_bar, plan)
        sigma = [float(random.uniform(0, 1) * math.sqrt(1 - a_s)) for _, a_s in levels]
        scheduler = _scheduler(beta_schedule=schedule)
        scheduler.set_timesteps(timesteps=plan, sigma=sigma)
        for t, (a_t, a_s) in zip(plan, levels, strict=True):
            # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e, and the oracle answers e: x_s as a
            # function of (x_0, e, z) is linear
            columns = []
            for x0, e, z in ((one, zero, zero), (zero, one, zero), (zero, zero, one)):
                step = scheduler.step(e, t, _x_t(x0, e, a_t), variance_noise=z)
                columns.append(float(step.prev_sample))
            assert columns[0] == pytest.approx(math.sqrt(a_s), abs=1e-11)
            assert columns[1] ** 2 + columns[2] ** 2 == pytest.approx(1 - a_s, abs=1e-11)


def test_eta_one_is_the_ddpm_posterior(closed_form):
    """To 1e-12 in float64, clipped or not, once eps_hat is re-derived."""
    for schedule in SCHEDULES:
        alpha_bar = closed_form.alpha_bar(schedule)
        for clip in (False, True):
            scheduler = _scheduler(beta_schedule=schedule, clip_sample=clip)
            scheduler.set_timesteps(1000)
            for t in range(0, 1000, 29):
                a_t, a_s = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
                x0, e, z = torch.randn(3, *SHAPE, dtype=torch.float64)
                x, m = _x_t(x0, e, a_t), e + 0.1 * x0
                got = scheduler.step(
                    m, t, x, eta=1.0, use_clipped_model_output=True, variance_noise=z
                )
                hat, _ = closed_form.predictions("epsilon", m, x, a_t)
                hat = closed_form.limited(hat, scheduler.config)
                std = closed_form.sigma(a_t, a_s)
                expected = closed_form.ddpm(hat, x, a_t, a_s, std, z)
                scale = max(1.0, float(hat.abs().max()))
                assert float((got.prev_sample - expected).abs().max()) < 1e-12 * scale


def test_without_rederiving_a_clipped_eta_one_is_not_ddpm(closed_form):
    """The mutation of the test above, and stock's default: why the argument exists."""
    scheduler = _scheduler(clip_sample=True)
    scheduler.set_timesteps(1000)
    alpha_bar = closed_form.alpha_bar()
    x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
    hat = closed_form.predictions("epsilon", m, x, alpha_bar[900])[0].clamp(-1, 1)
    std = closed_form.sigma(alpha_bar[900], alpha_bar[899])
    expected = closed_form.ddpm(hat, x, alpha_bar[900], alpha_bar[899], std, z)
    got = scheduler.step(m, 900, x, eta=1.0, variance_noise=z).prev_sample
    assert float((got - expected).abs().max()) > 0.1


def test_a_subsequence_is_the_scheduler_of_its_own_betas(closed_form):
    """A plan over T timesteps and a training chain with only those give the same samples."""
    random = np.random.default_rng(4)
    for eta in (0.0, 0.5, 1.0):
        plan = _random_plan(random)
        long = _scheduler()
        long.set_timesteps(timesteps=plan)
        alpha_bar = long.alpha_bar[plan[::-1]]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        short = _scheduler(
            num_train_timesteps=len(plan), trained_betas=(1 - alpha_bar / before).tolist()
        )
        short.set_timesteps(len(plan))
        x = other = torch.randn(SHAPE, dtype=torch.float64)
        for i, t in enumerate(plan):
            m, z = torch.randn(2, *SHAPE, dtype=torch.float64)
            x = long.step(m, t, x, eta=eta, variance_noise=z).prev_sample
            index = len(plan) - 1 - i
            other = short.step(m, index, other, eta=eta, variance_noise=z).prev_sample
            torch.testing.assert_close(x, other, rtol=1e-10, atol=1e-10)


SPACINGS = ("leading", "trailing", "linspace", "quadratic")
VARIANCES = (
    *({"eta": eta} for eta in (0.0, 0.5, 1.0)),
    {"eta": 1.0, "reverse_variance": "sigma_hat"},
    {"eta": 1.0, "reverse_variance": "learned_range"},
)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_last_step_returns_x0_hat_for_every_variance(spacing):
    """With `set_alpha_to_one=True`, also where the last planned timestep is not 0."""
    for settings in VARIANCES:
        for clip in (False, True):
            scheduler = _scheduler(
                timestep_spacing=spacing, clip_sample=clip, steps_offset=1, **settings
            )
            scheduler.set_timesteps(10)
            t = int(scheduler.timesteps[-1])
            x = torch.randn(SHAPE)
            channels = 6 if settings.get("reverse_variance") == "learned_range" else 3
            m = torch.randn(2, channels, 4, 4)
            step = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(step.prev_sample, step.pred_original_sample)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_set_alpha_to_one_false_lands_on_alpha_bar_0_exactly(spacing, closed_form):
    end = closed_form.alpha_bar()[0]
    for eta in (0.0, 0.5, 1.0):
        scheduler = _scheduler(timestep_spacing=spacing, set_alpha_to_one=False, steps_offset=1)
        assert float(scheduler.final_alpha_cumprod) == pytest.approx(end)
        scheduler.set_timesteps(10)
        t = int(scheduler.timesteps[-1])
        a_t = closed_form.alpha_bar()[t]
        x0, e, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        got = scheduler.step(e, t, _x_t(x0, e, a_t), eta=eta, variance_noise=z).prev_sample
        sigma = closed_form.sigma(a_t, end, eta)
        torch.testing.assert_close(got, closed_form.ddim(x0, e, end, sigma, z), atol=1e-12, rtol=0)


def _sampled_moments(closed_form, eta, plan, wrong=1.0):
    """Mean and standard deviation that a Gaussian N(3, 0.4^2) comes back with, both exactly.

    eps is optimal, E[eps | x_t], so that each step is linear and the two moments can be followed
    through it without sampling: two points give its slope and offset, `z = 1` its noise.
    """
    mu, var = 3.0, 0.4**2
    alpha_bar = closed_form.alpha_bar()
    scheduler = _scheduler()
    scheduler.set_timesteps(timesteps=plan)
    first = alpha_bar[plan[0]]
    mean, variance = math.sqrt(first) * mu, first * var + 1 - first
    for t in plan:
        a_t = alpha_bar[t]
        total = a_t * var + 1 - a_t

        def eps(x, a_t=a_t, total=total):
            return wrong * math.sqrt(1 - a_t) * (x - math.sqrt(a_t) * mu) / total

        x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None]
        z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None]
        y = scheduler.step(eps(x), t, x, eta=eta, variance_noise=z).prev_sample[:, 0].tolist()
        slope, noise = y[1] - y[0], y[2] - y[0]
        mean, variance = y[0] + slope * mean, slope**2 * variance + noise**2
    return mean, math.sqrt(variance)


def test_gaussian_data_arrives_at_its_mean_and_variance(closed_form):
    full = list(range(999, -1, -1))
    for eta in (0.0, 0.5, 1.0):
        mean, std = _sampled_moments(closed_form, eta, full)
        assert mean == pytest.approx(3.0, abs=2e-3), eta
        assert std == pytest.approx(0.4, rel=2e-2), eta
    # fewer steps are less exact, and converge at first order for eta = 0
    errors = []
    for n in (10, 20, 40, 80):
        plan = [round(i * 999 / (n - 1)) for i in reversed(range(n))]
        errors.append(abs(_sampled_moments(closed_form, 0.0, plan)[1] - 0.4))
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_an_eps_that_is_one_percent_wrong_is_noticed(closed_form):
    mean, std = _sampled_moments(closed_form, 0.0, list(range(999, -1, -1)), wrong=1.01)
    assert abs(mean - 3.0) > 2e-3 or abs(std / 0.4 - 1) > 2e-2


# -- trajectories


@pytest.mark.parametrize("spacing", SPACINGS)
def test_each_step_goes_to_the_next_planned_timestep(spacing, closed_form):
    """Also where stock guesses t - T // n and misses: `trailing`, `linspace`, n not dividing T."""
    alpha_bar = closed_form.alpha_bar()
    for n in (1, 3, 7, 10, 150):
        scheduler = _scheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        plan = scheduler.timesteps.tolist()
        assert scheduler.planned_pairs() == list(zip(plan, [*plan[1:], -1], strict=True))
        for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
            x, e = torch.randn(2, *SHAPE, dtype=torch.float64)
            x0, _ = closed_form.predictions("epsilon", e, x, a_t)
            expected = closed_form.ddim(x0, e, a_s, 0.0, e)
            got = scheduler.step(e, t, x).prev_sample
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_an_unplanned_timestep_lands_on_the_planned_one_below(closed_form):
    alpha_bar = closed_form.alpha_bar()
    scheduler = _scheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    x, e = torch.randn(2, *SHAPE, dtype=torch.float64)
    for t, s in ((950, 900), (901, 900), (899, 500), (101, 100), (99, -1), (0, -1)):
        assert scheduler.previous_timestep(t) == s
        x0, _ = closed_form.predictions("epsilon", e, x, alpha_bar[t])
        expected = closed_form.ddim(x0, e, alpha_bar[s] if s >= 0 else 1.0, 0.0, e)
        torch.testing.assert_close(scheduler.step(e, t, x).prev_sample, expected)


def test_timesteps_in_the_config():
    scheduler = _scheduler(timesteps=[900, 500, 100])
    for n in (None, 3):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == [900, 500, 100]
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 4, but `timesteps` has 3"):
        scheduler.set_timesteps(4)
    scheduler.set_timesteps(timesteps=[7, 3])  # an argument wins over the config
    assert scheduler.planned_pairs() == [(7, 3), (3, -1)]


# -- explicit sigma


def test_explicit_sigma_in_the_config_and_as_an_argument(closed_form):
    plan, sigma = [900, 500, 100], [0.3, 0.1, 0.0]
    alpha_bar = closed_form.alpha_bar()
    in_config = _scheduler(timesteps=plan, sigma=sigma)
    in_config.set_timesteps()
    as_argument = _scheduler()
    as_argument.set_timesteps(timesteps=plan, sigma=sigma)
    for t, (a_t, a_s), std in zip(plan, _levels(alpha_bar, plan), sigma, strict=True):
        x, e, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        x0, _ = closed_form.predictions("epsilon", e, x, a_t)
        expected = closed_form.ddim(x0, e, a_s, std, z)
        for scheduler in (in_config, as_argument):
            got = scheduler.step(e, t, x, variance_noise=z).prev_sample
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_a_sigma_of_the_config_says_how_many_steps():
    scheduler = _scheduler(sigma=[0.3, 0.005, 0.0])
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 3
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"`sigma` has 3 values, but the trajectory has 4"):
        scheduler.set_timesteps(4)


def test_sigma_may_use_the_whole_bound_and_no_more(closed_form):
    alpha_bar = closed_form.alpha_bar()
    bound = math.sqrt(1 - alpha_bar[500])
    _scheduler().set_timesteps(timesteps=[900, 500], sigma=[bound, 0.0])
    with pytest.raises(ValueError, match=r"`sigma` is .* in step 0 .*between 0 and"):
        _scheduler().set_timesteps(timesteps=[900, 500], sigma=[bound * 1.001, 0.0])
    with pytest.raises(ValueError, match=r"`sigma` is 0.1 in step 1 .* = 0 there"):
        _scheduler().set_timesteps(timesteps=[900, 500], sigma=[0.1, 0.1])
    end = math.sqrt(1 - alpha_bar[0])
    _scheduler(set_alpha_to_one=False).set_timesteps(timesteps=[900, 500], sigma=[0.1, end])


def test_an_unplanned_timestep_with_explicit_sigma_is_an_error():
    scheduler = _scheduler()
    scheduler.set_timesteps(timesteps=[900, 500], sigma=[0.1, 0.0])
    x = torch.zeros(SHAPE)
    for t in (501, torch.tensor(501), torch.tensor([900, 501]), 0, np.int64(499)):
        with pytest.raises(ValueError, match=r"`timestep` is \d+, which is not planned.*900"):
            scheduler.step(x, t, x)
    scheduler.step(x, torch.tensor([900, 500]), x)


def test_a_new_plan_forgets_the_explicit_sigma():
    scheduler = _scheduler()
    scheduler.set_timesteps(timesteps=[900, 500], sigma=[0.1, 0.0])
    scheduler.set_timesteps(10)
    x = torch.zeros(SHAPE)
    assert torch.equal(scheduler.step(x, 450, x).prev_sample, x)


# -- eta and the reverse variance


def test_eta_of_the_config_wins_over_the_zero_that_pipelines_pass():
    x, m, z = torch.randn(3, *SHAPE)
    expected = []
    for settings, eta in (({}, 1.0), ({"eta": 1.0}, 0.0)):
        scheduler = _scheduler(**settings)
        scheduler.set_timesteps(10)
        expected.append(scheduler.step(m, 500, x, eta=eta, variance_noise=z).prev_sample)
    assert torch.equal(*expected)


def test_a_contradicting_eta_is_warned_about_once(caplog):
    scheduler = _scheduler(eta=1.0)
    scheduler.set_timesteps(10)
    x = torch.zeros(SHAPE)
    for eta in (0.0, 1.0, 0.5, 0.5, 0.2):
        scheduler.step(x, 500, x, eta=eta)
    (message,) = (m for m in caplog.messages if "eta" in m)
    assert "0.5" in message


def test_eta_above_one_as_far_as_it_is_admissible():
    scheduler = _scheduler()
    scheduler.set_timesteps(1000)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"`eta` is .* in step .*between 0 and sqrt"):
        scheduler.step(x, 500, x, eta=300.0)
    scheduler = _scheduler(timesteps=[900, 800], eta=1.05)
    scheduler.set_timesteps()
    assert torch.isfinite(scheduler.step(x, 900, x).prev_sample).all()
    with pytest.raises(ValueError, match=r"`eta` is .*between 0 and sqrt"):
        _scheduler(timesteps=[900, 800], eta=5.0).set_timesteps()


def test_sigma_hat_replaces_the_noise_and_keeps_the_direction(closed_form):
    alpha_bar = closed_form.alpha_bar()
    scheduler = _scheduler(eta=1.0, reverse_variance="sigma_hat")
    scheduler.set_timesteps(10)
    plan = scheduler.timesteps.tolist()
    for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
        x, e, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        x0, _ = closed_form.predictions("epsilon", e, x, a_t)
        std = math.sqrt(1 - a_t / a_s) if a_s < 1 else 0.0
        expected = closed_form.ddim(x0, e, a_s, closed_form.sigma(a_t, a_s), z, std=std)
        got = scheduler.step(e, t, x, variance_noise=z).prev_sample
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_learned_range_interpolates_between_the_two(closed_form):
    """Improved DDPM, Eq. 15, with the network's v in [-1, 1]."""
    alpha_bar = closed_form.alpha_bar()
    scheduler = _scheduler(eta=1.0, reverse_variance="learned_range")
    scheduler.set_timesteps(20)
    plan = scheduler.timesteps.tolist()
    for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
        x, e, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        v = torch.rand(SHAPE, dtype=torch.float64) * 2 - 1
        x0, _ = closed_form.predictions("epsilon", e, x, a_t)
        small, large = closed_form.sigma(a_t, a_s), math.sqrt(1 - a_t / a_s)
        share = (v + 1) / 2
        std = large**share * max(small, 1e-10) ** (1 - share) if a_s < 1 else 0.0
        expected = closed_form.ddim(x0, e, a_s, small, z, std=std)
        got = scheduler.step(torch.cat([e, v], 1), t, x, variance_noise=z).prev_sample
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", ["sigma_hat", "learned_range"])
def test_the_other_variances_need_eta_one(variance):
    for settings in ({}, {"eta": 0.0}, {"eta": 0.5}, {"sigma": [0.0]}, {"eta": None}):
        with pytest.raises(ValueError, match=rf"`reverse_variance` is '{variance}'.*`eta=1"):
            _scheduler(reverse_variance=variance, **settings)
    scheduler = _scheduler(reverse_variance=variance, eta=1.0)
    with pytest.raises(ValueError, match=r"`sigma` is given, .*eta=1"):
        scheduler.set_timesteps(timesteps=[9], sigma=[0.0])


def test_a_variance_type_of_a_ddpm_config_changes_nothing():
    for variance in ("fixed_large", "learned_range"):
        config = MarkovianDDPMScheduler(variance_type=variance, clip_sample=False).config
        scheduler = GeneralizedDDIMScheduler.from_config(config)
        assert scheduler.config.reverse_variance == "sigma"
        plain = _scheduler()
        x, m, z = torch.randn(3, *SHAPE)
        for each in (scheduler, plain):
            each.set_timesteps(10)
        got, expected = (
            each.step(m, 500, x, eta=1.0, variance_noise=z).prev_sample
            for each in (scheduler, plain)
        )
        assert torch.equal(got, expected)


# -- zero terminal SNR


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "posterior_mean"])
def test_zero_terminal_snr_is_right_from_the_first_step(kind, closed_form):
    """x_T is pure noise; an oracle of x_0 brings every sample there."""
    alpha_bar = closed_form.alpha_bar("scaled_linear", zero_snr=True)
    for eta in (0.0, 1.0):
        scheduler = _scheduler(
            beta_schedule="scaled_linear",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type=kind,
        )
        scheduler.set_timesteps(10)
        assert int(scheduler.timesteps[0]) == 999 and float(scheduler.alpha_bar[999]) == 0
        x0, x = torch.randn(2, *SHAPE, dtype=torch.float64)
        for t in scheduler.timesteps.tolist():
            a_t, before = alpha_bar[t], alpha_bar[t - 1]
            eps = (x - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
            if kind == "sample":
                m = x0
            elif kind == "v_prediction":
                m = math.sqrt(a_t) * eps - math.sqrt(1 - a_t) * x0
            else:
                of_x0, of_x, _ = closed_form.posterior(a_t, before)
                m = of_x0 * x0 + of_x * x
            step = scheduler.step(m, t, x, eta=eta)
            torch.testing.assert_close(step.pred_original_sample, x0, rtol=0, atol=1e-7)
            x = step.prev_sample
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-9)


def test_zero_terminal_snr_with_epsilon_is_an_error_only_where_it_matters():
    scheduler = _scheduler(rescale_betas_zero_snr=True)
    scheduler.set_timesteps(10)  # `leading` starts at 900
    x = torch.randn(SHAPE)
    assert torch.isfinite(scheduler.step(x, 900, x).prev_sample).all()
    for arguments in ({"num_inference_steps": 1000}, {"timesteps": [999, 5]}):
        with pytest.raises(ValueError, match="`prediction_type` is 'epsilon'.*alpha_bar = 0"):
            scheduler.set_timesteps(**arguments)
    # a refused plan leaves the former one in place
    assert scheduler.planned_pairs()[0] == (900, 800) and len(scheduler.timesteps) == 10
    assert torch.isfinite(scheduler.step(x, 900, x).prev_sample).all()


# -- the posterior mean of the training chain


@pytest.mark.parametrize("spacing", SPACINGS)
def test_posterior_mean_is_of_the_training_chain_at_every_spacing(spacing, closed_form):
    alpha_bar = closed_form.alpha_bar()
    for n in (5, 100):
        scheduler = _scheduler(timestep_spacing=spacing, prediction_type="posterior_mean")
        scheduler.set_timesteps(n)
        x0, e = torch.randn(2, *SHAPE, dtype=torch.float64)
        x = _x_t(x0, e, alpha_bar[int(scheduler.timesteps[0])])
        for t, s in scheduler.planned_pairs():
            of_x0, of_x, _ = closed_form.posterior(alpha_bar[t], alpha_bar[t - 1] if t else 1.0)
            x = scheduler.step(of_x0 * x0 + of_x * x, t, x).prev_sample
            expected = _x_t(x0, e, alpha_bar[s]) if s >= 0 else x0
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


# -- a long training chain


def test_one_hundred_thousand_training_timesteps(closed_form):
    alpha_bar = closed_form.alpha_bar("linear", 100_000, 1e-6, 2e-4)
    scheduler = _scheduler(num_train_timesteps=100_000, beta_start=1e-6, beta_end=2e-4)
    scheduler.set_timesteps(10)
    plan = scheduler.timesteps.tolist()
    for t, (a_t, a_s) in zip(plan, _levels(alpha_bar, plan), strict=True):
        x, e, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        x0, _ = closed_form.predictions("epsilon", e, x, a_t)
        expected = closed_form.ddim(x0, e, a_s, closed_form.sigma(a_t, a_s), z)
        got = scheduler.step(e, t, x, eta=1.0, variance_noise=z).prev_sample
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("beta_end", [0.02, 0.03])
def test_an_alpha_bar_that_underflows_gives_no_nan(beta_end):
    """Stock's betas over 100,000 steps: alpha_bar ends as a subnormal number, or as 0."""
    scheduler = _scheduler(
        num_train_timesteps=100_000, beta_end=beta_end, prediction_type="v_prediction"
    )
    assert float(scheduler.alpha_bar[-1]) < 1e-300
    scheduler.set_timesteps(20)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(-x, t, x, eta=1.0).prev_sample
        assert bool(torch.isfinite(x).all())
