"""Noise schedules against their formulas in float64 and against stock's float32 tables."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddim_schedulers.betas import (
    BETA_SCHEDULES,
    alpha_bar_before,
    alpha_bar_from_betas,
    betas_from_alpha_bar,
    explicit_betas,
    make_betas,
    rescale_zero_terminal_snr,
)

STEPS = (1, 2, 10, 100, 1000)


def _assert_schedule(make, closed_form):
    for schedule in BETA_SCHEDULES:
        for steps in STEPS:
            got = alpha_bar_from_betas(make(schedule, steps, 1e-4, 0.02))
            expected = torch.tensor(closed_form.alpha_bar(schedule, steps), dtype=torch.float64)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_every_schedule_is_its_formula(closed_form):
    _assert_schedule(make_betas, closed_form)


def test_a_schedule_off_by_one_is_noticed(closed_form):
    with pytest.raises(AssertionError):
        _assert_schedule(lambda *args: make_betas(*args).roll(1), closed_form)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_schedule_agrees_with_stock(schedule):
    stock = DDPMScheduler(beta_schedule=schedule, beta_start=2e-4, beta_end=0.03)
    betas = make_betas(schedule, 1000, 2e-4, 0.03)
    assert betas.dtype == torch.float64 and betas.shape == (1000,)
    torch.testing.assert_close(betas.float(), stock.betas, rtol=2e-4, atol=1e-7)
    assert bool(((betas > 0) & (betas <= 0.999)).all())


def test_alpha_bar_and_betas_are_inverse():
    for schedule in BETA_SCHEDULES:
        betas = make_betas(schedule, 300)
        alpha_bar = alpha_bar_from_betas(betas)
        torch.testing.assert_close(betas_from_alpha_bar(alpha_bar), betas, rtol=0, atol=1e-13)
        before = alpha_bar_before(alpha_bar)
        assert float(before[0]) == 1 and torch.equal(before[1:], alpha_bar[:-1])
    with pytest.raises(ValueError, match="strictly"):
        betas_from_alpha_bar(torch.tensor([0.5, 0.5]))


def _assert_rescaled(rescale, closed_form):
    for schedule in BETA_SCHEDULES:
        betas = make_betas(schedule, 500)
        new = rescale(betas)
        alpha_bar = alpha_bar_from_betas(new)
        expected = torch.tensor(closed_form.alpha_bar(schedule, 500, zero_snr=True))
        torch.testing.assert_close(alpha_bar, expected.double(), rtol=1e-10, atol=1e-12)
        assert float(alpha_bar[-1]) == 0.0 and float(new[-1]) == 1.0
        assert math.isclose(float(new[0]), float(betas[0]), rel_tol=1e-9)


def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first(closed_form, float64):
    _assert_rescaled(rescale_zero_terminal_snr, closed_form)


def test_rescaling_alpha_bar_instead_of_its_root_is_noticed(closed_form, float64):
    def wrong(betas):
        alpha_bar = alpha_bar_from_betas(betas)
        scale = alpha_bar[0] / (alpha_bar[0] - alpha_bar[-1])
        return betas_from_alpha_bar((alpha_bar - alpha_bar[-1]) * scale)

    with pytest.raises(AssertionError):
        _assert_rescaled(wrong, closed_form)


def test_rescale_agrees_with_stock():
    stock = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    ours = alpha_bar_from_betas(rescale_zero_terminal_snr(make_betas("scaled_linear")))
    torch.testing.assert_close(ours.float(), stock.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_rescale_needs_two_steps():
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr.*at least 2"):
        rescale_zero_terminal_snr(make_betas("linear", 1))


def test_one_hundred_thousand_steps():
    for schedule in BETA_SCHEDULES:
        betas = make_betas(schedule, 100_000, 1e-6, 2e-4)
        assert bool(torch.isfinite(alpha_bar_from_betas(betas)).all()), schedule
    with pytest.raises(ValueError, match=r"`num_train_timesteps` is 100001.*100000"):
        make_betas("linear", 100_001)


def test_explicit_betas_are_kept_in_float64():
    values = [0.1, 0.2, 0.3]
    assert explicit_betas(values, 3).tolist() == values
    assert explicit_betas(torch.tensor(values), 3).dtype == torch.float64
    assert explicit_betas([0.5, 1.0], 2).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, math.nan], r"`trained_betas\[1\]` is nan; .*\(0, 1\)"),
        ([0.1, math.inf], r"`trained_betas\[1\]` is inf"),
        ([1.0, 0.1], r"`trained_betas\[0\]` is 1.0"),
        ([0.0, 0.1], r"`trained_betas\[0\]` is 0.0"),
        ([-0.1, 0.1], r"`trained_betas\[0\]` is -0.1"),
        ([0.1], r"`trained_betas` has shape \(1,\).*`num_train_timesteps`=2"),
    ],
)
def test_bad_explicit_betas(values, message):
    with pytest.raises(ValueError, match=message):
        explicit_betas(values, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 10, 1e-4, 0.02), r"`beta_schedule` is 'cosine'; .*'squaredcos_cap_v2'"),
        (("linear", 0, 1e-4, 0.02), r"`num_train_timesteps` is 0; .* from 1 to 100000"),
        (("linear", 10.0, 1e-4, 0.02), r"`num_train_timesteps` is 10.0"),
        (("linear", True, 1e-4, 0.02), r"`num_train_timesteps` is True"),
        (("linear", 10, 0.0, 0.02), r"`beta_start` is 0.0; .*between 0 and 1"),
        (("linear", 10, 1e-4, math.nan), r"`beta_end` is nan"),
        (("linear", 10, 1e-4, 1.0), r"`beta_end` is 1.0"),
    ],
)
def test_bad_schedule_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_betas(*arguments)
