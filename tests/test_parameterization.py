"""Conversions between the predictions, in float64 against their definitions."""

import math

import pytest
import torch

from ddim_schedulers.betas import alpha_bar_before, alpha_bar_from_betas, make_betas
from ddim_schedulers.parameterization import (
    PREDICTION_TYPES,
    check_prediction_type,
    clip,
    dynamic_threshold,
    eps_coefficients,
    eps_from,
    score_from_eps,
    target,
    x0_coefficients,
    x0_from,
)
from ddim_schedulers.process import q_sample

pytestmark = pytest.mark.usefixtures("float64")


def _tables(schedule="linear"):
    alpha_bar = alpha_bar_from_betas(make_betas(schedule))
    return alpha_bar, alpha_bar_before(alpha_bar)


def _assert_round_trip(make_target):
    """A perfect network gives x_0, eps and the score back, whatever it predicts."""
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        alpha_bar, before = _tables(schedule)
        shape = (1000, 1, 1)
        a_t, a_before = alpha_bar.view(shape), before.view(shape)
        x0, eps = torch.randn(2, 1000, 2, 3)
        x_t = q_sample(x0, eps, a_t)
        for kind in PREDICTION_TYPES:
            m = make_target(kind, x0, eps, a_t, a_before)
            # rounding grows by 1 / sqrt(abar_t) and, for mu-tilde, by 1 / k_x0
            tolerance = 1e-9 if kind != "posterior_mean" else 1e-7
            got = x0_from(kind, m, x_t, a_t, a_before)
            torch.testing.assert_close(got, x0, rtol=0, atol=tolerance)
            got = eps_from(kind, m, x_t, a_t, a_before)
            torch.testing.assert_close(got, eps, rtol=0, atol=1e-9)
            score = score_from_eps(got, a_t)
            expected = -(x_t - a_t.sqrt() * x0) / (1 - a_t)  # grad log N(x_t; mean, variance)
            torch.testing.assert_close(score, expected, rtol=1e-8, atol=1e-6)


def test_perfect_predictions_give_x0_eps_and_score():
    _assert_round_trip(target)


def test_swapped_v_is_noticed():
    def wrong(kind, x0, eps, a_t, a_before):
        if kind == "v_prediction":
            return target(kind, eps, x0, a_t, a_before)
        return target(kind, x0, eps, a_t, a_before)

    with pytest.raises(AssertionError):
        _assert_round_trip(wrong)


def test_posterior_mean_of_the_wrong_neighbour_is_noticed():
    def wrong(kind, x0, eps, a_t, a_before):
        return target(kind, x0, eps, a_t, torch.sqrt(a_before))

    with pytest.raises(AssertionError):
        _assert_round_trip(wrong)


def test_arbitrary_predictions_against_the_definitions(closed_form):
    alpha_bar, before = _tables()
    m, x = torch.randn(2, 11)
    for t in range(0, 1000, 37):
        for kind in PREDICTION_TYPES:
            x0, eps = closed_form.predictions(kind, m, x, float(alpha_bar[t]), float(before[t]))
            scale = 1 / math.sqrt(float(alpha_bar[t]))
            got = x0_from(kind, m, x, alpha_bar[t], before[t])
            torch.testing.assert_close(got, x0, rtol=1e-10, atol=1e-11 * scale)
            got = eps_from(kind, m, x, alpha_bar[t], before[t])
            torch.testing.assert_close(got, eps, rtol=1e-9, atol=1e-9)


def test_x0_and_eps_belong_together():
    """x_t = sqrt(abar_t) x0_hat + sqrt(1 - abar_t) eps_hat for any output of the network."""
    alpha_bar, before = _tables("scaled_linear")
    m, x = torch.randn(2, 1000)
    for kind in PREDICTION_TYPES:
        x0, eps = (f(kind, m, x, alpha_bar, before) for f in (x0_from, eps_from))
        torch.testing.assert_close(q_sample(x0, eps, alpha_bar), x, rtol=0, atol=1e-11)


def test_zero_terminal_snr_is_finite_except_for_epsilon():
    """At abar_t = 0 x_t is eps: v is -x_0, and only an eps prediction says nothing of x_0."""
    zero, before = torch.zeros(()), torch.tensor(0.25)
    x0, eps = torch.randn(2, 6)
    for kind in ("sample", "v_prediction", "posterior_mean"):
        m = target(kind, x0, eps, zero, before)
        torch.testing.assert_close(x0_from(kind, m, eps, zero, before), x0)
        torch.testing.assert_close(eps_from(kind, m, eps, zero, before), eps)
    assert not bool(torch.isfinite(x0_coefficients("epsilon", zero)[0]))
    assert [float(k) for k in eps_coefficients("epsilon", zero)] == [0, 1]


def test_posterior_mean_loses_digits_at_large_t():
    """The docstring's claim: an error of mu-tilde grows by 1 / k_x0, four digits at the end."""
    alpha_bar, before = _tables()
    gain = x0_coefficients("posterior_mean", alpha_bar, before)[1]
    assert float(gain[0]) == pytest.approx(1)
    assert 3e3 < float(gain[-1]) < 3e4
    assert bool((gain[10:] > 1).all())


def test_score_of_eps():
    eps = torch.randn(4)
    torch.testing.assert_close(score_from_eps(eps, torch.tensor(0.75)), -2 * eps)


@pytest.mark.parametrize("function", [x0_coefficients, eps_coefficients])
def test_unknown_prediction_type_and_missing_neighbour(function):
    with pytest.raises(ValueError, match=r"`prediction_type` is 'flow'; .*'epsilon'"):
        function("flow", torch.tensor(0.5))
    with pytest.raises(ValueError, match="`alpha_bar_before` is None.*posterior_mean"):
        function("posterior_mean", torch.tensor(0.5))


def test_unknown_prediction_type_in_target():
    with pytest.raises(ValueError, match="`prediction_type` is 'flow'"):
        target("flow", torch.zeros(1), torch.zeros(1), torch.tensor(0.5))
    assert check_prediction_type("sample") == "sample"


def test_clip():
    x0 = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    assert clip(x0, 1.5).tolist() == [-1.5, -1.0, 0.5, 1.5]
    assert x0.tolist() == [-3.0, -1.0, 0.5, 2.0]  # the argument is left alone


def _assert_threshold(function, closed_form):
    x0 = 2 * torch.randn(4, 3, 5, 5)
    x0[0] /= 100  # a sample whose quantile is below 1 is left as it is
    before = x0.clone()
    for ratio in (0.5, 0.9, 0.995, 1.0):
        for largest in (1.0, 1.5, 100.0):
            settings = {
                "thresholding": True,
                "dynamic_thresholding_ratio": ratio,
                "sample_max_value": largest,
            }
            got = function(x0, ratio, largest)
            torch.testing.assert_close(got, closed_form.limited(x0, settings))
            assert float(got.abs().max()) <= 1
            assert torch.equal(got[0], x0[0])
    assert torch.equal(x0, before)


def test_dynamic_threshold(closed_form):
    _assert_threshold(dynamic_threshold, closed_form)


def test_a_quantile_of_the_whole_batch_is_noticed(closed_form):
    def wrong(x0, ratio, largest):
        return dynamic_threshold(x0.reshape(1, -1), ratio, largest).reshape(x0.shape)

    with pytest.raises(AssertionError):
        _assert_threshold(wrong, closed_form)
