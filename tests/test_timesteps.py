"""Trajectories: against stock for every n, the authors' quadratic grid, and where steps land."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddim_schedulers.timesteps import (
    TIMESTEP_SPACINGS,
    check_num_inference_steps,
    check_timesteps,
    landing,
    make_timesteps,
    pairs,
)

TRAINING_STEPS = (1, 2, 7, 50, 101, 1000)


def _authors_quadratic(n, steps):
    """The grid of the DDIM authors' code: `skip_type="quad"`, increasing."""
    return [int(s) for s in list(np.linspace(0, np.sqrt(steps * 0.8), n) ** 2)]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing_is_stocks_for_every_n(spacing):
    """Except where stock's `trailing` has more than n timesteps, by rounding in `arange`."""
    for steps in TRAINING_STEPS:
        stock = DDIMScheduler(num_train_timesteps=steps, timestep_spacing=spacing)
        for n in range(1, steps + 1):
            stock.set_timesteps(n)
            expected = stock.timesteps.tolist()
            got = make_timesteps(spacing, n, steps)
            if len(expected) != n:
                assert spacing == "trailing" and expected[n:] == [-1]
                expected = expected[:n]
            assert got == expected, (steps, n)


def test_leading_offset_is_stocks():
    for offset in (1, 3):
        stock = DDIMScheduler(steps_offset=offset)
        for n in (1, 7, 50, 300):
            stock.set_timesteps(n)
            assert make_timesteps("leading", n, 1000, offset) == stock.timesteps.tolist()
    # only `leading` is moved, as in stock
    for spacing in ("trailing", "linspace", "quadratic"):
        assert make_timesteps(spacing, 9, 100, 1) == make_timesteps(spacing, 9, 100)


def _assert_authors_grid(make):
    compared = 0
    for steps in (*TRAINING_STEPS, 10_000):
        for n in range(2, min(steps, 120) + 1):  # from about sqrt(0.8 T) on an index repeats
            expected = _authors_quadratic(n, steps)
            if len(set(expected)) == n:
                assert make("quadratic", n, steps) == expected[::-1], (steps, n)
                compared += 1
    assert compared > 100


def test_quadratic_is_the_authors_grid_where_nothing_repeats():
    _assert_authors_grid(make_timesteps)


def test_a_quadratic_grid_that_reaches_the_end_is_noticed():
    with pytest.raises(AssertionError):
        _assert_authors_grid(lambda *args: make_timesteps(*args, quadratic_end=1.0))


def test_quadratic_moves_a_repeated_index_to_the_next_free_timestep():
    for steps in TRAINING_STEPS:
        for n in range(2, steps + 1):
            expected: list[int] = []
            for wanted in _authors_quadratic(n, steps):
                expected.append(max(wanted, expected[-1] + 1) if expected else wanted)
            assert make_timesteps("quadratic", n, steps) == expected[::-1], (steps, n)


def test_quadratic_of_one_step_is_the_end_of_the_grid():
    """numpy's grid of one point is its start, t = 0, from where nothing can be sampled."""
    assert make_timesteps("quadratic", 1, 1000) == [800]
    assert make_timesteps("quadratic", 1, 1000, quadratic_end=1.0) == [999]


def test_quadratic_end():
    assert make_timesteps("quadratic", 10, 1000)[0] == 800
    for steps in TRAINING_STEPS:
        for n in {1, 2, min(10, steps), steps}:
            if n <= steps:
                assert make_timesteps("quadratic", n, steps, quadratic_end=1.0)[0] == steps - 1
    for end in (0.0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"`quadratic_end` is .*\(0, 1\]"):
            make_timesteps("quadratic", 10, 1000, quadratic_end=end)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_n_asked_is_n_given_strictly_decreasing_and_in_range(spacing):
    for steps in TRAINING_STEPS:
        for n in range(1, steps + 1):
            for end in (0.01, 1.0) if spacing == "quadratic" else (0.8,):
                got = make_timesteps(spacing, n, steps, quadratic_end=end)
                assert len(got) == n and all(type(t) is int for t in got)
                assert check_timesteps(got, steps) == got


def test_one_hundred_thousand_training_steps():
    for spacing in TIMESTEP_SPACINGS:
        for n in (1, 10, 100_000):
            got = make_timesteps(spacing, n, 100_000)
            assert len(got) == n and check_timesteps(got, 100_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("karras", 10, 1000), r"`timestep_spacing` is 'karras'; .*'quadratic'"),
        (("leading", 0, 1000), r"`num_inference_steps` is 0; .*from 1 to .*1000"),
        (("leading", 1001, 1000), r"`num_inference_steps` is 1001"),
        (("leading", 2.0, 1000), r"`num_inference_steps` is 2.0"),
        (("leading", True, 1000), r"`num_inference_steps` is True"),
        (("leading", 1000, 1000, 1), r"`steps_offset` is 1; .*0 \.\. 999.*at most 0"),
        (("leading", 10, 1000, -1), r"`steps_offset` is -1"),
        (("leading", 10, 1000, 100), r"`steps_offset` is 100; .*at most 99"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_timesteps(*arguments)


def test_whole_numbers_of_numpy_and_torch_are_accepted():
    assert check_num_inference_steps(np.int64(5), 10) == 5
    assert check_timesteps([np.int64(5), torch.tensor(3)], 10) == [5, 3]
    assert check_timesteps(np.array([5, 3]), 10) == [5, 3]
    assert check_timesteps(torch.tensor([5, 3]), 10) == [5, 3]
    assert check_timesteps((t for t in (5, 3)), 10) == [5, 3]
    assert all(type(t) is int for t in check_timesteps([np.int64(5), torch.tensor(3)], 10))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "`timesteps` is empty"),
        ([5, 5], r"`timesteps\[1\]` is 5 after 5; .*decrease strictly"),
        ([3, 5], r"`timesteps\[1\]` is 5 after 3"),
        ([10, 5], r"`timesteps\[0\]` is 10; .*0 \.\. 9"),
        ([5, -1], r"`timesteps\[1\]` is -1"),
        ([5, 2.0], r"`timesteps\[1\]` is 2.0; .*integers"),
        ([True], r"`timesteps\[0\]` is True"),
        (["5"], r"`timesteps\[0\]` is '5'"),
        (7, "`timesteps` is 7"),
        (torch.tensor(7), "`timesteps` is"),
        (torch.tensor([[7], [5]]), r"`timesteps\[0\]` is \[7\]"),
    ],
)
def test_bad_trajectories(values, message):
    with pytest.raises(ValueError, match=message):
        check_timesteps(values, 10)


def _assert_lands(land):
    random = np.random.default_rng(0)
    for steps in (1, 2, 30, 1000):
        for _ in range(20):
            size = int(random.integers(1, steps + 1))
            plan = sorted(random.choice(steps, size, replace=False).tolist(), reverse=True)
            got = land(plan, steps)
            expected = [max((s for s in plan if s < t), default=-1) for t in range(steps)]
            assert got.tolist() == expected
            assert [(t, int(got[t])) for t in plan] == pairs(plan)


def test_every_timestep_lands_on_the_planned_one_below():
    _assert_lands(landing)


def test_stocks_guess_of_the_neighbour_is_noticed():
    def wrong(plan, steps):
        return (torch.arange(steps) - steps // len(plan)).clamp(min=-1)

    with pytest.raises(AssertionError):
        _assert_lands(wrong)


def test_pairs_end_at_minus_one():
    assert pairs([9, 4, 1]) == [(9, 4), (4, 1), (1, -1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert landing([9, 4, 1], 10).tolist() == [-1, -1, 1, 1, 1, 4, 4, 4, 4, 4]
