"""The types of a scheduler's config, checked before anything is computed from it.

A config comes from a file that anyone may have written: the text "false" counts as true, and a list
may have a billion entries. Bounds (and NaN, which is out of all of them) and names are checked
where they are used.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from .betas import MAX_TRAIN_TIMESTEPS

MAX_NAME = 100

FLAGS = (
    "clip_sample",
    "lower_order_final",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "solver_calibrated",
    "solver_corrector",
    "thresholding",
)
NUMBERS = (
    "beta_end",
    "beta_start",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "end_scale",
    "quadratic_end",
    "sample_max_value",
    "snr_shift_scale",
    "steps_offset",
)
OPTIONAL_NUMBERS = ("eta", "late_noise_cap")
NAMES = (
    "beta_schedule",
    "prediction_type",
    "reverse_variance",
    "solver_form",
    "solver_variable",
    "solver_weights",
    "timestep_spacing",
    "variance_type",
)
NUMBER_LISTS = ("eta_interval", "sigma", "trained_betas")
NUMBERS_OR_LISTS = ("eps_scale",)
INTEGER_LISTS = ("timesteps",)
STATISTICS = ("gamma", "eps_error", "x0_error")  # lists in the dictionary `calibration`


def check_types(config: Mapping[str, Any]) -> None:
    """Check the type of every setting that `config` has.

    Args:
        config: a scheduler's config; `None` is allowed for lists and for `OPTIONAL_NUMBERS`.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    for name in FLAGS:
        _require(config, name, _is_flag, "True or False")
    for name in NUMBERS:
        _require(config, name, _is_number, "a number of at most 64 bits")
    for name in NAMES:
        _require(config, name, _is_name, "a name")
    for name in NUMBER_LISTS:
        _check_list(name, config.get(name), _is_number, "numbers")
    for name in NUMBERS_OR_LISTS:
        if isinstance(listed(name, config.get(name)), list | tuple):
            _check_list(name, config[name], _is_number, "numbers")
        else:
            _require(config, name, _is_number, "a number of at most 64 bits, or a list of two")
    for name in INTEGER_LISTS:
        _check_list(name, config.get(name), _is_integer, "integers")
    statistics = config.get("calibration")
    if isinstance(statistics, Mapping):
        for name in STATISTICS:
            _check_list(f"calibration[{name!r}]", statistics.get(name), _is_number, "numbers")
    for name in OPTIONAL_NUMBERS:
        if config.get(name) is not None:
            _require(config, name, _is_number, "None or a number of at most 64 bits")


def listed(name: str, values: Any) -> Any:
    """Return an array or a tensor as a list, and anything else as it is.

    Raises:
        ValueError: for a tensor without values.
    """
    if getattr(values, "is_meta", False):
        raise ValueError(f"`{name}` is on the device 'meta' and has no values; put it on the CPU.")
    return values.tolist() if hasattr(values, "tolist") else values


def check_numbers(name: str, values: Any) -> None:
    """Check that `values`, unless `None`, is a list of numbers.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    _check_list(name, values, _is_number, "numbers")


def _require(
    config: Mapping[str, Any], name: str, test: Callable[[Any], bool], allowed: str
) -> None:
    if name in config and not test(config[name]):
        raise ValueError(f"`{name}` is {reprlib.repr(config[name])}; it must be {allowed}.")


def _check_list(name: str, values: Any, test: Callable[[Any], bool], allowed: str) -> None:
    if values is None:
        return
    values = listed(name, values)
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"`{name}` is {reprlib.repr(values)}; it must be a list of {allowed}.")
    if not 1 <= len(values) <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"`{name}` has {len(values)} values; it must have from 1 to {MAX_TRAIN_TIMESTEPS}."
        )
    for i, value in enumerate(values):
        if not test(value):
            raise ValueError(
                f"`{name}[{i}]` is {reprlib.repr(value)}; it must be a list of {allowed}."
            )


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not _is_flag(value) and abs(int(value)) < 2**63


def _is_number(value: Any) -> bool:
    if _is_flag(value):
        return False
    # torch and numpy take no integer of more than 64 bits for a number
    return _is_integer(value) if isinstance(value, Integral) else isinstance(value, Real)


def _is_name(value: Any) -> bool:
    # `None` goes on to the check that lists the names
    return value is None or (isinstance(value, str) and len(value) <= MAX_NAME)
