"""Optimal variance and trajectory: the paper's formula, brute force, exact Gaussian marginals."""

import itertools
import json
import math

import pytest
import torch
from tiny_models import gaussian_eps

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    optimal,
    to_portable,
)
from ddim_schedulers.betas import alpha_bar_from_betas, make_betas
from ddim_schedulers.optimal import (
    best_trajectory,
    cost_matrix,
    late_noise_cap,
    optimal_timesteps,
    statistics_of,
    x0_variance,
)
from ddim_schedulers.reverse_noise import optimal_variance
from ddim_schedulers.sigmas import sigma_eta, sigma_hat

pytestmark = pytest.mark.usefixtures("float64")

ALPHA_BAR = alpha_bar_from_betas(make_betas())


def _gamma(alpha_bar=ALPHA_BAR, c=0.25):
    return (1 - alpha_bar) / (alpha_bar * c + 1 - alpha_bar)


def _calibration(alpha_bar=ALPHA_BAR, c=0.25):
    return {"gamma": _gamma(alpha_bar, c).tolist()}


def test_variance_is_that_of_the_paper():
    gamma = _gamma()
    for t, s, eta in itertools.product((999, 500, 40), (300, 30, 1, 0), (0.0, 0.4, 1.0)):
        if s >= t:
            continue
        a_t, a_s = ALPHA_BAR[t], ALPHA_BAR[s]
        lam = sigma_eta(a_t, a_s, eta)
        b_t, b_s, alpha = 1 - a_t, 1 - a_s, a_t / a_s
        # Theorem 1 of arXiv:2201.06503, in terms of the norm of the score
        paper = lam**2 + ((b_t / alpha).sqrt() - (b_s - lam**2).sqrt()) ** 2 * (1 - gamma[t])
        own = x0_variance(gamma, ALPHA_BAR, math.inf)[t]
        torch.testing.assert_close(optimal_variance(a_t, a_s, lam, own), paper, rtol=1e-9, atol=0)


def test_x0_variance_is_bounded():
    gamma = torch.tensor([1.2, 0.0, 1.0, 0.5])
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.0])
    assert x0_variance(gamma, alpha_bar).tolist() == [0.0, 1.0, 0.0, 1.0]
    assert x0_variance(gamma, alpha_bar, 0.25).tolist() == [0.0, 0.25, 0.0, 0.25]


def _marginals(scheduler, mean, c, eta):
    """Variance of x_s over samples and noise along a trajectory, with the perfect network.

    Every step is affine, so that it is known from its values at 0 and 1.
    """
    alpha_bar = scheduler.alpha_bar
    slope, shift = gaussian_eps(alpha_bar, mean, c)
    level, rows = alpha_bar[scheduler.timesteps[0]], []
    variance, centre = float(level * c + 1 - level), float(level.sqrt() * mean)
    for t, s in scheduler.planned_pairs():
        x, z = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0]])
        output = slope[t] * x + shift[t]
        out = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        gain, std = float(out[1] - out[0]), float(out[2] - out[0])
        variance = gain**2 * variance + std**2
        centre = float(out[0]) + gain * centre
        rows.append((s, centre, variance))
    return rows


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [2, 7, 100])
def test_samples_of_gaussian_data_have_the_exact_variance(eta, n):
    c, mean = 0.25, 0.3
    for spacing in ("linspace", "optimal"):
        scheduler = GeneralizedDDIMScheduler(
            eta=eta,
            reverse_variance="optimal",
            clip_sample=False,
            timestep_spacing=spacing,
            calibration=_calibration(),
        )
        scheduler.set_timesteps(n)
        for s, centre, variance in _marginals(scheduler, mean, c, eta)[:-1]:
            a = float(scheduler.alpha_bar[s])
            assert centre == pytest.approx(math.sqrt(a) * mean, abs=1e-9)
            assert variance == pytest.approx(a * c + 1 - a, rel=1e-9)
    # the member's own noise loses variance, which is what the optimal one puts back
    scheduler = GeneralizedDDIMScheduler(eta=eta, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(n)
    if n == 7:
        s, _, variance = _marginals(scheduler, mean, c, eta)[-2]
        a = float(scheduler.alpha_bar[s])
        assert variance < 0.99 * (a * c + 1 - a)


def test_the_markovian_class_adds_the_same_noise():
    settings = {"clip_sample": True, "calibration": _calibration(), "timestep_spacing": "linspace"}
    ddim = GeneralizedDDIMScheduler(eta=1.0, reverse_variance="optimal", **settings)
    ddpm = MarkovianDDPMScheduler(variance_type="optimal", **settings)
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(10)
    x, m = torch.randn(2, 2, 1, 4, 4)
    for t in ddpm.timesteps.tolist():
        outs = []
        for scheduler in (ddim, ddpm):
            extra = {"use_clipped_model_output": True} if scheduler is ddim else {}
            generator = torch.Generator().manual_seed(t)
            outs.append(scheduler.step(m, t, x, generator=generator, **extra).prev_sample)
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)


def _stds(scheduler, eta=0.0):
    x = torch.zeros(1, 1, 1, 1)
    out = []
    for t in scheduler.timesteps.tolist():
        pair = [
            scheduler.step(x, t, x, eta=eta, variance_noise=torch.full_like(x, z)).prev_sample
            for z in (0.0, 1.0)
        ]
        out.append(float(pair[1] - pair[0]))
    return out


def test_late_noise_is_capped_in_sampling_of_pixels_only():
    def stds(n=10, **settings):
        scheduler = GeneralizedDDIMScheduler(
            reverse_variance="optimal",
            timestep_spacing="linspace",
            calibration=_calibration(c=1.0),
            **settings,
        )
        scheduler.set_timesteps(n)
        return _stds(scheduler)

    free = stds(eta=1.0, clip_sample=False)
    two = stds(eta=1.0)
    one = stds(eta=0.0)
    assert two[-2] == pytest.approx(late_noise_cap(2.0), rel=1e-6) and two[-2] < free[-2]
    assert one[-2] == pytest.approx(late_noise_cap(1.0), rel=1e-6)
    assert two[:-2] == free[:-2] and two[-1] == free[-1] == 0.0
    cosine = stds(eta=1.0, beta_schedule="squaredcos_cap_v2")
    assert cosine[-2] == pytest.approx(late_noise_cap(1.0), rel=1e-6)
    # the cap follows the process and the member, not how they are spelt
    linear = make_betas("linear", 1000)
    spelt = {"trained_betas": linear.tolist()}, {"trained_betas": linear.float().tolist()}
    for betas in spelt:
        assert stds(eta=1.0, **betas)[-2] == pytest.approx(two[-2], rel=1e-6)
        assert stds(eta=0.0, **betas)[-2] == pytest.approx(one[-2], rel=1e-6)
    betas = make_betas("squaredcos_cap_v2", 1000).tolist()
    assert stds(eta=1.0, trained_betas=betas)[-2] == pytest.approx(cosine[-2], rel=1e-6)
    plain = GeneralizedDDIMScheduler(timestep_spacing="linspace")
    plain.set_timesteps(10)
    alpha_bar = torch.cat([plain.alpha_bar[plain.timesteps], torch.ones(1, dtype=torch.float64)])
    sigma = sigma_eta(alpha_bar[:-1], alpha_bar[1:], 1.0).tolist()
    assert stds(sigma=sigma)[-2] == pytest.approx(two[-2], rel=1e-6)
    assert stds(sigma=[0.9 * s for s in sigma])[-2] == pytest.approx(one[-2], rel=1e-6)
    assert GeneralizedDDIMScheduler.from_config(plain.config).config.late_noise_cap is None


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MarkovianDDPMScheduler])
def test_late_noise_cap_is_a_setting(cls):
    chosen = (
        {"eta": 1.0, "reverse_variance": "optimal"}
        if cls is GeneralizedDDIMScheduler
        else {"variance_type": "optimal"}
    )
    for clips in (True, False):
        for pixels in (0.5, 1, 3.0):
            scheduler = cls(
                timestep_spacing="linspace",
                calibration=_calibration(c=1.0),
                clip_sample=clips,
                late_noise_cap=pixels,
                **chosen,
            )
            scheduler = cls.from_config(scheduler.config)
            scheduler.set_timesteps(10)
            x, t = torch.zeros(1, 1, 1, 1), int(scheduler.timesteps[-2])
            noises = [torch.full_like(x, z) for z in (0.0, 1.0)]
            ends = [scheduler.step(x, t, x, variance_noise=z).prev_sample for z in noises]
            assert float(ends[1] - ends[0]) == pytest.approx(late_noise_cap(pixels), rel=1e-6)
    for wrong in (0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match="`late_noise_cap` is "):
            cls(late_noise_cap=wrong)


def test_explicit_sigma_goes_with_the_optimal_noise():
    scheduler = GeneralizedDDIMScheduler(
        reverse_variance="optimal", clip_sample=False, calibration=_calibration()
    )
    member = [0.2, 0.005, 0.0]
    scheduler.set_timesteps(3, sigma=member)
    pairs = scheduler.planned_pairs()
    own = x0_variance(_gamma(), ALPHA_BAR)
    got = _stds(scheduler)
    for (t, s), sigma, std in zip(pairs[:-1], member, got, strict=False):
        lam = torch.tensor(sigma)
        want = optimal_variance(ALPHA_BAR[t], ALPHA_BAR[s], lam, own[t]).sqrt()
        assert std == pytest.approx(float(want))


# -- trajectory -----------------------------------------------------------------------------------


def trajectory_cost(cost, timesteps):
    """Returns the sum of the costs of the steps of a trajectory, without its last step to x_0."""
    t = torch.tensor(timesteps)
    return float(cost[t[:-1], t[1:]].sum())


def _brute_force(cost, steps):
    big_t = cost.shape[0]
    inner = itertools.combinations(range(1, big_t - 1), steps - 2)
    return min(trajectory_cost(cost, [big_t - 1, *c[::-1], 0]) for c in inner)


def test_dynamic_programming_is_exact():
    for seed in range(5):
        big_t = 9
        generator = torch.Generator().manual_seed(seed)
        cost = torch.rand(big_t, big_t, generator=generator)
        cost = torch.where(torch.ones(big_t, big_t).tril(-1) > 0, cost, math.inf)
        for steps in range(2, big_t + 1):
            path = best_trajectory(cost, steps)
            assert len(path) == steps and path[0] == big_t - 1 and path[-1] == 0
            assert all(t > s for t, s in itertools.pairwise(path))
            assert trajectory_cost(cost, path) == pytest.approx(_brute_force(cost, steps))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "optimal"])
def test_dynamic_programming_on_the_bound(variance):
    alpha_bar = alpha_bar_from_betas(make_betas("linear", 11, 0.01, 0.4))
    statistics = statistics_of(
        {"gamma": _gamma(alpha_bar) * 1.02, "eps_error": (1 - _gamma(alpha_bar)).tolist()},
        alpha_bar,
    )
    own = x0_variance(statistics.gamma, alpha_bar)
    cost = cost_matrix(alpha_bar, variance, statistics.x0_error, 1.0, own)
    assert bool((cost.tril(-1)[1:, 0] >= 0).all())
    for steps in range(2, 12):
        path = optimal_timesteps(alpha_bar, statistics, steps, variance)
        assert trajectory_cost(cost, path) == pytest.approx(_brute_force(cost, steps))
    even = [10, 7, 5, 2, 0]
    best = optimal_timesteps(alpha_bar, statistics, 5, variance)
    assert trajectory_cost(cost, best) <= trajectory_cost(cost, even)


def test_a_greedy_path_would_be_noticed(monkeypatch):
    def greedy(cost, steps):
        path = [cost.shape[0] - 1]
        while len(path) < steps - 1:
            left = steps - 1 - len(path)
            path.append(int(cost[path[-1]][left : path[-1]].argmin()) + left)
        return [*path, 0]

    monkeypatch.setattr(optimal, "best_trajectory", greedy)
    with pytest.raises(AssertionError):
        test_dynamic_programming_on_the_bound("fixed_large")


def test_cost_is_the_paper_s_logarithm_for_a_perfect_network():
    gamma = _gamma()
    own = x0_variance(gamma, ALPHA_BAR)
    cost = cost_matrix(ALPHA_BAR, "optimal", own, 0.6, own)
    for t, s in ((999, 10), (500, 499), (3, 0)):
        sigma = sigma_eta(ALPHA_BAR[t], ALPHA_BAR[s], 0.6)
        best = optimal_variance(ALPHA_BAR[t], ALPHA_BAR[s], sigma, own[t])
        torch.testing.assert_close(cost[t, s], 0.5 * torch.log(best / sigma**2))
    assert bool(torch.isinf(cost[torch.ones_like(cost).triu() > 0]).all())
    assert bool(torch.isfinite(cost[torch.ones_like(cost).tril(-1) > 0]).all())
    large = cost_matrix(ALPHA_BAR, "fixed_large", own)
    ratio = (sigma_eta(ALPHA_BAR[7], ALPHA_BAR[2]) / sigma_hat(ALPHA_BAR[7], ALPHA_BAR[2])) ** 2
    assert float(large[7, 2]) > float(0.5 * (ratio - 1 - ratio.log()))


def _uneven(alpha_bar=ALPHA_BAR):
    """Statistics of data with two variances, for which no trajectory is as good as any other."""
    gamma = 0.5 * (_gamma(alpha_bar, 1.0) + _gamma(alpha_bar, 0.001))
    return {"gamma": gamma.tolist(), "num_images": 3}


def test_spacing_optimal_in_every_class(monkeypatch):
    calls = []
    real = best_trajectory
    monkeypatch.setattr(optimal, "best_trajectory", lambda c, n: calls.append(n) or real(c, n))
    short = alpha_bar_from_betas(make_betas("linear", 300))
    settings = {
        "num_train_timesteps": 300,
        "timestep_spacing": "optimal",
        "calibration": _uneven(short),
    }
    plans = {}
    for name, scheduler in {
        "small": MarkovianDDPMScheduler(variance_type="fixed_small", **settings),
        "large": MarkovianDDPMScheduler(variance_type="fixed_large", **settings),
        "best": MarkovianDDPMScheduler(variance_type="optimal", **settings),
        "ddim small": GeneralizedDDIMScheduler(eta=1.0, **settings),
        "ddim best": GeneralizedDDIMScheduler(eta=1.0, reverse_variance="optimal", **settings),
        "ddim 0": GeneralizedDDIMScheduler(eta=0.0, **settings),
        "ddim": GeneralizedDDIMScheduler(**settings),
        "half": GeneralizedDDIMScheduler(eta=0.5, **settings),
    }.items():
        scheduler.set_timesteps(10)
        plans[name] = scheduler.timesteps.tolist()
        assert len(plans[name]) == 10 and plans[name][0] == 299 and plans[name][-1] == 0
        before = len(calls)
        scheduler.set_timesteps(10)
        assert len(calls) == before  # remembered
        scheduler.set_timesteps(4)
        assert len(calls) == before + 1 and len(scheduler.timesteps) == 4
    assert plans["small"] == plans["ddim small"] and plans["best"] == plans["ddim best"]
    assert plans["best"] == plans["ddim 0"] == plans["ddim"]
    assert plans["small"] != plans["large"]
    forward = GeneralizedDDIMScheduler(eta=0.5, **settings)
    inverse = GeneralizedDDIMInverseScheduler.from_config(forward.config)
    for scheduler in (forward, inverse):
        scheduler.set_timesteps(10)
    assert inverse.planned_pairs() == forward.planned_pairs()[::-1]
    for n in (1, 0, 301):
        with pytest.raises(ValueError, match="num_inference_steps"):
            forward.set_timesteps(n)
    forward.set_timesteps(300)
    assert forward.timesteps.tolist() == list(range(299, -1, -1))


def test_settings_survive_every_kind_of_saving(tmp_path):
    settings = {"timestep_spacing": "optimal", "calibration": _uneven()}
    for scheduler in (
        MarkovianDDPMScheduler(variance_type="optimal", **settings),
        GeneralizedDDIMScheduler(eta=0.5, reverse_variance="optimal", **settings),
    ):
        scheduler.set_timesteps(6)
        scheduler.save_pretrained(tmp_path / "own")
        stock, notes = to_portable(scheduler)
        text = " ".join(notes)
        assert "optimal" in text and "timestep_spacing" in text
        assert "variance_type" in text or "reverse_variance" in text
        stock.set_timesteps(6)
        stock.save_pretrained(tmp_path / "stock")
        json.loads((tmp_path / "stock" / "scheduler_config.json").read_text())
        for folder in ("own", "stock"):
            again = type(scheduler).from_pretrained(tmp_path / folder)
            again.set_timesteps(6)
            assert torch.equal(again.timesteps, scheduler.timesteps)
            x = torch.randn(1, 1, 2, 2)
            outs = [
                s.step(x, 999, x, generator=torch.Generator().manual_seed(0)).prev_sample
                for s in (again, scheduler)
            ]
            assert torch.equal(*outs)
        # from one class to the other
        other = GeneralizedDDIMScheduler.from_config(stock.config, reverse_variance="optimal")
        assert other.config.calibration["gamma"] == scheduler.config.calibration["gamma"]


@pytest.mark.parametrize(
    "calibration, message",
    [
        (None, "calibrate"),
        ({}, "gamma"),
        ([1.0] * 1000, "dictionary"),
        ({"gamma": [1.0] * 999}, "1000"),
        ({"gamma": [1.0] * 999 + [math.nan]}, r"\['gamma'\]\[999\]|\[999\]"),
        ({"gamma": [1.0] * 999 + [-0.1]}, "finite and >= 0"),
        ({"gamma": [1.0] * 1000, "x0_error": [math.inf] * 1000}, "x0_error"),
    ],
)
def test_bad_statistics_are_refused_at_once(calibration, message):
    for make in (
        lambda **k: MarkovianDDPMScheduler(variance_type="optimal", **k),
        lambda **k: GeneralizedDDIMScheduler(reverse_variance="optimal", **k),
        lambda **k: GeneralizedDDIMInverseScheduler(timestep_spacing="optimal", **k),
    ):
        with pytest.raises(ValueError, match=message):
            make(calibration=calibration)


def test_bad_costs_are_refused():
    cost = torch.full((5, 5), math.inf)
    with pytest.raises(ValueError, match="infinite"):
        best_trajectory(cost, 3)
    with pytest.raises(ValueError, match="eta"):
        cost_matrix(ALPHA_BAR, "optimal", _gamma(), 0.0, _gamma())
    with pytest.raises(ValueError, match="4000"):
        cost_matrix(torch.ones(10_001), "fixed_small", torch.ones(10_001))
    with pytest.raises(ValueError, match="variance"):
        cost_matrix(ALPHA_BAR, "small", _gamma())
    with pytest.raises(ValueError, match="statistics"):
        cost_matrix(ALPHA_BAR, "optimal", _gamma())
