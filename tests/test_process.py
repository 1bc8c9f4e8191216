"""The forward process: Gaussian identities in float64, each with a wrong formula that fails."""

import math

import numpy as np
import pytest
import torch

from ddim_schedulers.betas import alpha_bar_from_betas, make_betas
from ddim_schedulers.process import (
    Gaussian,
    gaussian_kl,
    q_s_given_t_0,
    q_sample,
    q_t_given_s,
    q_t_given_s_0,
    respace,
)
from ddim_schedulers.sigmas import sigma_eta

pytestmark = pytest.mark.usefixtures("float64")


def _random_levels(count=200, seed=0):
    """Random (alpha_bar_t, alpha_bar_s, sigma), sigma admissible, over many orders of magnitude."""
    random = np.random.default_rng(seed)
    levels = []
    for _ in range(count):
        a_t, a_s = sorted(1 / (1 + np.exp(random.uniform(-9, 9, size=2))))
        sigma = random.uniform(0, 1) * math.sqrt(1 - a_s)
        levels.append((float(a_t), float(a_s), float(sigma)))
    return levels


def q_t_given_0(x0, a_t):
    """q(x_t | x_0) (DDPM, Eq. 4)."""
    a_t = torch.as_tensor(a_t)
    return Gaussian(a_t.sqrt() * x0, 1 - a_t)


def _log_density(x, gaussian):
    std = torch.as_tensor(gaussian.variance).sqrt()
    return torch.distributions.Normal(gaussian.mean, std).log_prob(x)


def test_q_sample_and_q_t_given_0(closed_form):
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    for a_t, _, _ in _random_levels(20):
        x_t = q_sample(x0, noise, a_t)
        torch.testing.assert_close(x_t, math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * noise)
        gaussian = q_t_given_0(x0, a_t)
        torch.testing.assert_close((x_t - gaussian.mean) / gaussian.variance.sqrt(), noise)
    per_sample = torch.tensor([0.1, 0.5, 0.9, 0.99, 1.0]).view(5, 1, 1, 1)
    assert torch.equal(q_sample(x0, noise, per_sample)[4], x0[4])


def _assert_composes(step):
    """q(x_t | x_0) is q(x_t | x_s) averaged over q(x_s | x_0)."""
    x0 = torch.randn(7)
    for a_t, a_s, _ in _random_levels():
        first, second = q_t_given_0(x0, a_s), step(torch.zeros(7), a_t, a_s)
        gain = step(torch.ones(7), a_t, a_s).mean
        whole = q_t_given_0(x0, a_t)
        torch.testing.assert_close(gain * first.mean, whole.mean, rtol=1e-12, atol=1e-12)
        variance = gain**2 * first.variance + second.variance
        torch.testing.assert_close(variance, whole.variance.expand(7), rtol=1e-12, atol=1e-12)


def test_forward_steps_compose():
    _assert_composes(q_t_given_s)


def test_a_forward_step_with_a_wrong_variance_is_noticed():
    def wrong(x_s, a_t, a_s):
        return Gaussian(q_t_given_s(x_s, a_t, a_s).mean, torch.tensor(1 - a_t))

    with pytest.raises(AssertionError):
        _assert_composes(wrong)


def _assert_ddpm_posterior(posterior, closed_form):
    x_t, x0 = torch.randn(2, 9)
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        alpha_bar = [*closed_form.alpha_bar(schedule), 1.0]  # index -1 is the end
        for t in range(0, 1000, 7):
            got = posterior(x_t, x0, alpha_bar[t], alpha_bar[t - 1] if t else 1.0)
            of_x0, of_x, variance = closed_form.posterior(
                alpha_bar[t], alpha_bar[t - 1] if t else 1.0
            )
            expected = of_x0 * x0 + of_x * x_t
            torch.testing.assert_close(got.mean, expected, rtol=0, atol=1e-12)
            assert abs(float(got.variance) - variance) < 1e-12


def test_sigma_none_is_the_ddpm_posterior(closed_form):
    _assert_ddpm_posterior(q_s_given_t_0, closed_form)


def test_a_standard_deviation_for_a_variance_is_noticed(closed_form):
    def wrong(*args):
        mean, variance = q_s_given_t_0(*args)
        return Gaussian(mean, variance.sqrt())

    with pytest.raises(AssertionError):
        _assert_ddpm_posterior(wrong, closed_form)


def _assert_marginal(posterior):
    """Averaged over q(x_t | x_0), every member leaves q(x_s | x_0) (DDIM, Lemma 1)."""
    x0 = torch.randn(5)
    for a_t, a_s, sigma in _random_levels():
        at_mean = posterior(q_t_given_0(x0, a_t).mean, x0, a_t, a_s, sigma)
        gain = posterior(torch.ones(5), torch.zeros(5), a_t, a_s, sigma).mean
        whole = q_t_given_0(x0, a_s)
        torch.testing.assert_close(at_mean.mean, whole.mean, rtol=1e-11, atol=1e-11)
        variance = gain**2 * (1 - a_t) + at_mean.variance
        torch.testing.assert_close(variance, whole.variance.expand(5), rtol=1e-11, atol=1e-11)


def test_every_member_has_the_same_marginals():
    _assert_marginal(q_s_given_t_0)


def test_a_direction_without_sigma_is_noticed():
    def wrong(x_t, x0, a_t, a_s, sigma):
        mean = q_s_given_t_0(x_t, x0, a_t, a_s, 0.0).mean
        return Gaussian(mean, torch.tensor(sigma**2))

    with pytest.raises(AssertionError):
        _assert_marginal(wrong)


def _assert_bayes(forward):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s, x_0) q(x_s | x_0), as densities at points."""
    x_s, x_t, x0 = torch.randn(3, 50)
    for a_t, a_s, sigma in _random_levels(100):
        sigma = max(sigma, 0.02 * math.sqrt(1 - a_s))  # densities need a variance
        left = _log_density(x_s, q_s_given_t_0(x_t, x0, a_t, a_s, sigma))
        left = left + _log_density(x_t, q_t_given_0(x0, a_t))
        right = _log_density(x_t, forward(x_s, x0, a_t, a_s, sigma))
        right = right + _log_density(x_s, q_t_given_0(x0, a_s))
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


def test_non_markovian_forward_is_bayes_rule():
    _assert_bayes(q_t_given_s_0)


def test_the_markovian_forward_is_not_bayes_rule_of_another_member():
    with pytest.raises(AssertionError):
        _assert_bayes(lambda x_s, x0, a_t, a_s, sigma: q_t_given_s(x_s, a_t, a_s))


def test_non_markovian_forward_marginalises():
    """Averaged over q(x_s | x_0), the non-Markovian forward leaves q(x_t | x_0)."""
    x0 = torch.randn(5)
    for a_t, a_s, sigma in _random_levels():
        at_mean = q_t_given_s_0(q_t_given_0(x0, a_s).mean, x0, a_t, a_s, sigma)
        gain = q_t_given_s_0(torch.ones(5), torch.zeros(5), a_t, a_s, sigma).mean
        whole = q_t_given_0(x0, a_t)
        torch.testing.assert_close(at_mean.mean, whole.mean, rtol=1e-11, atol=1e-11)
        variance = gain**2 * (1 - a_s) + at_mean.variance
        torch.testing.assert_close(variance, whole.variance.expand(5), rtol=1e-11, atol=1e-11)


def test_non_markovian_forward_of_sigma_one_forgets_x0():
    """With sigma(1) the forward process is DDPM's own, x_0 or no x_0 (DDIM, Sec. 4.1)."""
    x_s, x0 = torch.randn(2, 5)
    for a_t, a_s, _ in _random_levels():
        sigma = float(sigma_eta(torch.tensor(a_t), torch.tensor(a_s), 1.0))
        got, expected = q_t_given_s_0(x_s, x0, a_t, a_s, sigma), q_t_given_s(x_s, a_t, a_s)
        torch.testing.assert_close(got.mean, expected.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.variance, expected.variance, rtol=1e-10, atol=1e-10)


def test_non_markovian_forward_from_the_end_is_q_t_given_0():
    x0 = torch.randn(5)
    got, expected = q_t_given_s_0(x0, x0, 0.3, 1.0, 0.0), q_t_given_0(x0, 0.3)
    torch.testing.assert_close(got.mean, expected.mean)
    torch.testing.assert_close(got.variance, expected.variance)


@pytest.mark.parametrize("function", [q_s_given_t_0, q_t_given_s_0])
@pytest.mark.parametrize("sigma", [-0.1, 0.8, math.nan])
def test_sigma_out_of_bounds(function, sigma):
    with pytest.raises(ValueError, match=r"`sigma` is .*between 0 and sqrt"):
        function(torch.zeros(3), torch.zeros(3), 0.3, 0.5, sigma)


def _assert_respaced(spaced):
    random = np.random.default_rng(1)
    for schedule in ("linear", "squaredcos_cap_v2", "sigmoid"):
        alpha_bar = alpha_bar_from_betas(make_betas(schedule))
        for _ in range(10):
            size = int(random.integers(1, 60))
            timesteps = sorted(random.choice(1000, size, replace=False).tolist(), reverse=True)
            betas = spaced(alpha_bar, timesteps)
            kept = alpha_bar[timesteps[::-1]]
            torch.testing.assert_close(alpha_bar_from_betas(betas), kept, rtol=1e-11, atol=0)


def test_respaced_chain_has_the_alpha_bar_of_the_long_one():
    _assert_respaced(respace)


def test_picking_betas_instead_of_respacing_is_noticed():
    def wrong(alpha_bar, timesteps):
        return make_betas("linear")[timesteps[::-1]]

    with pytest.raises(AssertionError):
        _assert_respaced(wrong)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [([5, 5], "decrease strictly"), ([10], r"0 \.\. 9"), ([], "empty")],
)
def test_respace_refuses_what_is_no_trajectory(timesteps, message):
    with pytest.raises(ValueError, match=message):
        respace(alpha_bar_from_betas(make_betas("linear", 10)), timesteps)


def _assert_kl(kl):
    p = Gaussian(torch.randn(500), torch.rand(500) + 1e-3)
    q = Gaussian(torch.randn(500), torch.rand(500) + 1e-3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(p.mean, p.variance.sqrt()),
        torch.distributions.Normal(q.mean, q.variance.sqrt()),
    )
    torch.testing.assert_close(kl(p, q), expected, rtol=1e-12, atol=1e-12)


def test_kl_is_that_of_torch_distributions():
    _assert_kl(gaussian_kl)
    same = Gaussian(torch.randn(3), torch.rand(3) + 0.1)
    assert float(gaussian_kl(same, same).abs().max()) == 0


def test_kl_the_other_way_round_is_noticed():
    with pytest.raises(AssertionError):
        _assert_kl(lambda p, q: gaussian_kl(q, p))


def test_a_float32_batch_does_not_round_the_numbers():
    """1 - alpha_bar loses four digits near x_0, where alpha_bar is rounded to float32."""
    torch.set_default_dtype(torch.float32)  # the fixture restores it
    x, a_t, a_s = torch.ones(3), 0.99978, 0.9999
    expected = [
        (q_t_given_s(x, a_t, a_s), 1 - a_t / a_s),
        (q_s_given_t_0(x, x, a_t, a_s), (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)),
    ]
    for gaussian, variance in expected:
        assert gaussian.mean.dtype == torch.float32
        assert abs(float(gaussian.variance) / variance - 1) < 1e-6
    # the whole bound is admissible, whichever of the two is rounded
    for a in (torch.tensor(a_s), torch.full((3,), a_s)):
        mean = q_s_given_t_0(x, x, a_t, a, sigma=math.sqrt(1 - a_s)).mean
        assert bool(mean.isfinite().all())


@pytest.mark.parametrize("outside", [-0.1, 1.5, float("nan")])
def test_a_number_that_is_no_alpha_bar_is_refused(outside):
    x = torch.zeros(1)
    for call in (
        lambda: q_sample(x, x, outside),
        lambda: q_t_given_s(x, outside, 1.0),
        lambda: q_s_given_t_0(x, x, 0.5, outside),
        lambda: q_t_given_s_0(x, x, outside, 0.9, 0.0),
    ):
        with pytest.raises(ValueError, match=r"`alpha_bar` is .*; it must lie in \[0, 1\]"):
            call()
