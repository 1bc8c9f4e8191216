"""Trajectories tau: which timesteps are visited, and where each step lands.

A trajectory is a list of n timesteps, strictly decreasing within 0 .. T - 1, in the order of
sampling. Each step goes from t to the next planned timestep s; the last one goes to the end,
written s = -1.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .config_types import listed

END = -1
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "quadratic")


def check_interval(name: str, interval: Sequence[float]) -> None:
    """Check an interval of t / T.

    Args:
        name: of the setting.
        interval: [low, high], a list of numbers.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"`{name}` is {interval!r}; it must be two numbers [low, high] with "
            "0 <= low < high <= 1, shares of t / T."
        )


def in_interval(interval: Sequence[float], big_t: int) -> torch.Tensor:
    """Tell for every timestep whether low <= t / T <= high, bool (T,)."""
    share = torch.arange(big_t, dtype=torch.float64, device="cpu") / big_t
    return (share >= interval[0]) & (share <= interval[1])


def make_timesteps(
    spacing: str,
    num_inference_steps: int,
    num_train_timesteps: int,
    steps_offset: int = 0,
    quadratic_end: float = 0.8,
    original_inference_steps: int | None = None,
) -> list[int]:
    """Return the n timesteps of a named spacing, strictly decreasing.

    Args:
        spacing: `leading`: i (T // n) + steps_offset; `trailing`: round(T - i T / n) - 1;
            `linspace`: rounded, both ends (the names of arXiv:2305.08891, Table 2);
            `quadratic`: the DDIM authors' grid, floor of the squares of n equal steps up to
            sqrt(quadratic_end T) (DDIM, App. D.2), where a repeated index moves to the next free
            timestep.
        num_inference_steps: n, from 1 to T.
        num_train_timesteps: T.
        steps_offset: added to `leading` timesteps only, as in diffusers.
        quadratic_end: where `quadratic` ends as a share of T, in (0, 1]; the authors' code has 0.8,
            and 1.0 reaches T - 1.
        original_inference_steps: m, for `trailing` alone: pick the timesteps from the m equally
            spaced ones i (T // m) - 1 that a distilled network (LCM, arXiv:2310.04378) knows.

    Raises:
        ValueError: for an unknown name, n out of range or an offset that leaves the range.
    """
    if original_inference_steps is not None:
        check_original_steps(original_inference_steps, spacing, num_train_timesteps)
        return _distilled(num_inference_steps, original_inference_steps, num_train_timesteps)
    big_t = num_train_timesteps
    n = check_num_inference_steps(num_inference_steps, big_t)
    if spacing == "leading":
        ratio = big_t // n
        if _as_int(steps_offset) is None:
            raise ValueError(f"`steps_offset` is {steps_offset!r}; it must be an integer >= 0.")
        last = (n - 1) * ratio + steps_offset
        if steps_offset < 0 or last >= big_t:
            raise ValueError(
                f"`steps_offset` is {steps_offset}; with {n} steps of {ratio} the largest timestep "
                f"would be {last}, but it must lie in 0 .. {big_t - 1}, so at most "
                f"{big_t - 1 - (n - 1) * ratio} is allowed."
            )
        ascending = [i * ratio + steps_offset for i in range(n)]
    elif spacing == "trailing":
        # the arithmetic of `numpy.arange`, as in stock: its rounding decides where T - i T / n is
        # halfway between two integers
        gap = (big_t - big_t / n) - big_t
        ascending = [round(big_t + i * gap) - 1 for i in reversed(range(n))]
    elif spacing == "linspace":
        # numpy's convention for a single point is the start, and stock diffusers follows it
        gap = (big_t - 1) / (n - 1) if n > 1 else 0.0
        ascending = [round(i * gap) for i in range(n)]
    elif spacing == "quadratic":
        ascending = _quadratic(n, big_t, quadratic_end)
    else:
        raise ValueError(
            f"`timestep_spacing` is {spacing!r}; it must be one of {TIMESTEP_SPACINGS}."
        )
    return ascending[::-1]


def check_original_steps(steps: int, spacing: str, num_train_timesteps: int) -> None:
    """Check `original_inference_steps`, and that it goes with the spacing.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    m = _as_int(steps)
    if m is None or not 1 <= m <= num_train_timesteps:
        raise ValueError(
            f"`original_inference_steps` is {steps!r}; it must be None or an integer from 1 to "
            f"`num_train_timesteps`={num_train_timesteps}."
        )
    if spacing != "trailing":
        raise ValueError(
            f"`timestep_spacing` is {spacing!r}, but `original_inference_steps` is {steps}, the "
            "noise levels that a distilled network knows; it must be 'trailing', or pass "
            "`original_inference_steps=None`."
        )


def _distilled(n: int, m: int, big_t: int) -> list[int]:
    if _as_int(n) is None or not 1 <= n <= m:
        raise ValueError(
            f"`num_inference_steps` is {n!r}; it must be an integer from 1 to "
            f"`original_inference_steps`={m}."
        )
    # the arithmetic of `numpy.linspace`, as in stock, decides where i m / n is an integer
    return [(m - math.floor(i * (m / n))) * (big_t // m) - 1 for i in range(n)]


def _quadratic(n: int, big_t: int, end: float) -> list[int]:
    check_quadratic_end(end)
    stop = math.sqrt(end * big_t)
    # the last point is sqrt(.)^2 as the authors' code computes it, not its rounded-down neighbour
    roots = [i * (stop / (n - 1)) for i in range(n - 1)] + [stop]
    grid: list[int] = []
    for root in roots:
        wanted = min(int(root**2), big_t - 1)
        grid.append(max(wanted, grid[-1] + 1) if grid else wanted)
    return grid


def check_quadratic_end(quadratic_end: float) -> float:
    """Return `quadratic_end` if it lies in (0, 1].

    Raises:
        ValueError: otherwise.
    """
    if not 0.0 < quadratic_end <= 1.0:
        raise ValueError(f"`quadratic_end` is {quadratic_end!r}; it must lie in (0, 1].")
    return quadratic_end


def check_num_inference_steps(num_inference_steps: int, num_train_timesteps: int) -> int:
    """Return `num_inference_steps` if it is an integer in `1 .. num_train_timesteps`.

    Raises:
        ValueError: otherwise.
    """
    n = _as_int(num_inference_steps)
    if n is None or not 1 <= n <= num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps!r}; it must be an integer from 1 to "
            f"`num_train_timesteps`={num_train_timesteps}."
        )
    return n


def check_timesteps(timesteps: Iterable[int], num_train_timesteps: int) -> list[int]:
    """Return explicit timesteps as a list of ints if they are a trajectory.

    Args:
        timesteps: integers (a list, an array or a tensor), strictly decreasing, within 0 .. T - 1.
        num_train_timesteps: T.

    Raises:
        ValueError: naming the first offending value.
    """
    values = listed("timesteps", timesteps)
    if not isinstance(values, Iterable):
        raise ValueError(f"`timesteps` is {values!r}; it must be a list of integers.")
    checked: list[int] = []
    for i, value in enumerate(values):
        t = _as_int(value)
        if t is None or not 0 <= t < num_train_timesteps:
            raise ValueError(
                f"`timesteps[{i}]` is {value!r}; timesteps must be integers in 0 .. "
                f"{num_train_timesteps - 1}."
            )
        if checked and t >= checked[-1]:
            raise ValueError(
                f"`timesteps[{i}]` is {t} after {checked[-1]}; timesteps must decrease strictly."
            )
        checked.append(t)
    if not checked:
        raise ValueError("`timesteps` is empty; it must hold at least one timestep.")
    return checked


def _as_int(value: Any) -> int | None:
    """Return a whole number of any integer type (Python's, numpy's, a 0-d tensor), else None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def pairs(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """Return the planned steps [(t, s), ...] in the order of sampling; the last s is -1 (end)."""
    return list(zip(timesteps, [*timesteps[1:], END], strict=True))


def landing(timesteps: Sequence[int], num_train_timesteps: int) -> torch.Tensor:
    """Return, for every t in 0 .. T - 1, the s where a step from t lands: int64 of shape (T,).

    On the trajectory s is the next planned timestep. A t that is not planned lands on the largest
    planned timestep below it; -1 is the end.
    """
    ascending = torch.tensor(timesteps[::-1], dtype=torch.int64, device="cpu")
    every = torch.arange(num_train_timesteps, device="cpu")
    below = torch.searchsorted(ascending, every, right=False) - 1
    return torch.where(below >= 0, ascending[below.clamp(min=0)], END)
