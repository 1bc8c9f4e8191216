"""Step noise: the formulas, their bounds, and the messages about what is out of them."""

import math
import re

import pytest
import torch

from ddim_schedulers.betas import alpha_bar_from_betas, make_betas
from ddim_schedulers.sigmas import check_eta, check_sigma, sigma_eta, sigma_hat
from ddim_schedulers.timesteps import make_timesteps

pytestmark = pytest.mark.usefixtures("float64")


def _levels(schedule="linear", n=50):
    """alpha_bar_t and alpha_bar_s of a trajectory, the last s being the end."""
    alpha_bar = alpha_bar_from_betas(make_betas(schedule))
    a_t = alpha_bar[make_timesteps("leading", n, 1000)]
    return a_t, torch.cat([a_t[1:], torch.ones(1)])


def _assert_sigma(function, closed_form):
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        a_t, a_s = _levels(schedule)
        for eta in (0.0, 0.2, 0.5, 1.0):
            pairs = zip(a_t.tolist(), a_s.tolist(), strict=True)
            expected = [closed_form.sigma(t, s, eta) for t, s in pairs]
            torch.testing.assert_close(
                function(a_t, a_s, eta), torch.tensor(expected), rtol=1e-12, atol=1e-15
            )


def test_sigma_eta_is_equation_16(closed_form):
    _assert_sigma(sigma_eta, closed_form)


def test_a_variance_for_a_standard_deviation_is_noticed(closed_form):
    with pytest.raises(AssertionError):
        _assert_sigma(lambda *args: sigma_eta(*args) ** 2, closed_form)


def test_sigma_one_is_the_ddpm_posterior_standard_deviation(closed_form):
    a_t, a_s = _levels(n=1000)
    for t, s, sigma in zip(a_t.tolist(), a_s.tolist(), sigma_eta(a_t, a_s).tolist(), strict=True):
        assert abs(sigma**2 - closed_form.posterior(t, s)[2]) < 1e-12


def test_sigma_hat_exceeds_the_family_near_x0():
    """Why sigma-hat replaces the noise only, and the direction keeps sigma(1)."""
    a_t, a_s = _levels()
    hat = sigma_hat(a_t, a_s)
    torch.testing.assert_close(hat, (1 - a_t / a_s).sqrt())
    assert bool((hat >= sigma_eta(a_t, a_s)).all())
    assert bool((hat**2 > 1 - a_s)[-3:].all()) and not bool((hat**2 > 1 - a_s)[0])


def test_sigma_hat_of_a_chain_that_underflows_is_one():
    zero = torch.zeros(2)
    assert sigma_hat(zero, zero).tolist() == [1, 1]
    assert float(sigma_hat(torch.tensor(0.0), torch.tensor(0.5))) == 1


def test_the_bound_is_sharp():
    a_s = torch.tensor([0.3, 0.8, 1.0])
    bound = (1 - a_s).sqrt()
    assert check_sigma(bound, a_s) is bound
    check_sigma(torch.zeros(3), a_s)
    for step in range(3):
        for wrong in (float(bound[step]) + 1e-5, -1e-5, math.nan):
            sigma = bound.clone()
            sigma[step] = wrong
            with pytest.raises(ValueError, match=rf"`sigma` is .* in step {step} .*between 0 and"):
                check_sigma(sigma, a_s)


def test_the_message_has_name_value_and_bound():
    with pytest.raises(ValueError, match=r"`sigma` is 0\.9 in step 1 .* = 0\.6 there\.$"):
        check_sigma(torch.tensor([0.1, 0.9]), torch.tensor([0.3, 0.64]))


def test_the_message_for_an_eta_says_which_eta_is_allowed():
    a_t, a_s = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.4, 1.0]).double()
    sigma = sigma_eta(a_t, a_s, 50)
    said = r"`eta` is 50, which gives sigma = 35\.3553 in step 0 .*; `eta` may be at most (.*)\.$"
    with pytest.raises(ValueError, match=said) as caught:
        check_sigma(sigma, a_s, 50)
    largest = float(re.search(said, str(caught.value))[1])
    check_sigma(sigma_eta(a_t, a_s, largest), a_s, largest)
    with pytest.raises(ValueError, match="`eta` is"):
        check_sigma(sigma_eta(a_t, a_s, largest + 1e-3), a_s, largest + 1e-3)


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf, True, "1", None])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=r"`eta` is .*; it must be a finite number >= 0"):
        check_eta(eta)
    with pytest.raises(ValueError, match="`eta`"):
        sigma_eta(torch.tensor(0.5), torch.tensor(0.6), eta)
