"""The transition of the family: its marginals, its ends, and the sub-sequence as a process."""

import math

import numpy as np
import pytest
import torch

from ddim_schedulers.betas import alpha_bar_before, alpha_bar_from_betas, make_betas
from ddim_schedulers.process import respace
from ddim_schedulers.sigmas import sigma_eta, sigma_hat
from ddim_schedulers.transition import Transition, direction, transition

pytestmark = pytest.mark.usefixtures("float64")


def _random_rows(count=2000):
    random = np.random.default_rng(3)
    a_s = torch.tensor(1 / (1 + np.exp(random.uniform(-9, 9, size=count))))
    sigma = torch.tensor(random.uniform(0, 1, size=count)) * (1 - a_s).sqrt()
    return a_s, sigma


def _assert_leaves_the_marginal(row):
    """A fixed-x_0 oracle leaves mean sqrt(abar_s) x_0 and variance 1 - abar_s for every sigma."""
    a_s, sigma = _random_rows()
    got = row(a_s, sigma)
    torch.testing.assert_close(got.x0**2, a_s, rtol=1e-12, atol=0)
    # eps_hat is the standard Gaussian of x_t and z is independent of it: variances add
    torch.testing.assert_close(got.eps**2 + got.std**2, 1 - a_s, rtol=0, atol=1e-12)


def test_every_member_leaves_variance_one_minus_alpha_bar_s():
    _assert_leaves_the_marginal(transition)


def test_swapped_variance_and_standard_deviation_is_noticed():
    def wrong(a_s, sigma):
        row = transition(a_s, sigma)
        return row._replace(std=row.std**2)

    with pytest.raises(AssertionError):
        _assert_leaves_the_marginal(wrong)


def test_another_noise_keeps_the_direction_of_sigma():
    a_s, sigma = _random_rows(5)
    std = torch.full_like(sigma, 9.0)
    row = transition(a_s, sigma, std)
    assert torch.equal(row.std, std) and torch.equal(row.eps, transition(a_s, sigma).eps)


def test_the_end_is_x0_hat():
    row = transition(torch.tensor(1.0), torch.tensor(0.0))
    assert [float(k) for k in row] == [1.0, 0.0, 0.0] and isinstance(row, Transition)


def test_direction_is_nan_out_of_bounds_and_zero_within_rounding():
    assert math.isnan(float(direction(torch.tensor(0.5), torch.tensor(0.8))))
    assert float(direction(torch.tensor(0.5), torch.tensor(math.sqrt(0.5)))) < 1e-6
    # sigma-hat is no member of the family near x_0
    alpha_bar = alpha_bar_from_betas(make_betas())
    hat = sigma_hat(alpha_bar[20], alpha_bar[0])
    assert math.isnan(float(direction(alpha_bar[0], hat)))


def _assert_eta_one_is_ddpm(row, closed_form):
    """x0 * x0_hat + eps * eps_hat at eta = 1 is the posterior mean of DDPM, Eq. 7."""
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        alpha_bar = closed_form.alpha_bar(schedule)
        for stride in (1, 3, 50):
            for t in range(0, 1000, 11):
                a_t, a_s = alpha_bar[t], alpha_bar[t - stride] if t >= stride else 1.0
                a_t_tensor, a_s_tensor = torch.tensor(a_t), torch.tensor(a_s)
                got = row(a_s_tensor, sigma_eta(a_t_tensor, a_s_tensor, 1.0))
                weight = float(got.eps) / math.sqrt(1 - a_t)
                of_x0, of_x, variance = closed_form.posterior(a_t, a_s)
                # the error of the weight of x_t is that of the square root of a difference
                assert abs(float(got.x0) - weight * math.sqrt(a_t) - of_x0) < 1e-12
                assert abs(weight - of_x) < 1e-12
                assert abs(float(got.std) ** 2 - variance) < 1e-12


def test_eta_one_is_the_ddpm_posterior(closed_form):
    _assert_eta_one_is_ddpm(transition, closed_form)


def test_a_direction_that_forgets_sigma_is_noticed(closed_form):
    with pytest.raises(AssertionError):
        _assert_eta_one_is_ddpm(
            lambda a_s, sigma: transition(a_s, torch.zeros_like(sigma), sigma), closed_form
        )


def _assert_subsequence_is_a_process(spaced):
    """Steps over a sub-sequence are neighbouring steps of the chain re-derived from its abar."""
    random = np.random.default_rng(5)
    alpha_bar = alpha_bar_from_betas(make_betas())
    for _ in range(20):
        size = int(random.integers(2, 100))
        plan = sorted(random.choice(1000, size, replace=False).tolist(), reverse=True)
        short = alpha_bar_from_betas(spaced(alpha_bar, plan))
        a_t, a_s = alpha_bar[plan], torch.cat([alpha_bar[plan[1:]], torch.ones(1)])
        for eta in (0.0, 0.5, 1.0):
            long_row = transition(a_s, sigma_eta(a_t, a_s, eta))
            before = alpha_bar_before(short)
            short_row = transition(before, sigma_eta(short, before, eta))
            for one, other in zip(long_row, short_row, strict=True):
                torch.testing.assert_close(one, other.flip(0), rtol=0, atol=1e-11)


def test_a_subsequence_is_the_process_rederived_from_its_own_alpha_bar():
    _assert_subsequence_is_a_process(respace)


def test_a_chain_respaced_off_by_one_is_noticed():
    def wrong(alpha_bar, plan):
        return respace(alpha_bar.roll(-1)[:-1], [min(t, 998) for t in plan])

    with pytest.raises(AssertionError):
        _assert_subsequence_is_a_process(wrong)
