r"""A sampler of S steps as a table that was fitted to a network: what a config stores of it.

In a deterministic step of the family x_{i+1} is a sum of x_T and all predictions so far,

    x_{i+1} = c_i . [x_T, x0_0, ..., x0_i]

a non-stationary linear multistep solver (BNS, arXiv:2403.01329; S4S, arXiv:2502.17423). The
formulas of `multistep` give one choice of the rows c_i. `calibration["solver"]["S"]` holds another
choice, as the differences d_i from the analytic step that is taken from where the sample is,

    x_{i+1} = (a_i x_i + sum_j b_ij x0_j + std_i z) + d_i . [x_T, x0_0, ..., x0_i]

so that d = 0 is the analytic sampler, and the noise of a member sigma > 0 keeps its place. The
analytic step is the one of `SOLVER_BASE`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from .config_types import check_numbers
from .scales import check_scales
from .timesteps import check_interval, check_timesteps

VERSION = 1
# The solver that the differences are from.
SOLVER_BASE: dict[str, Any] = {
    "solver_order": 2,
    "solver_form": "sample",
    "solver_corrector": True,
    "lower_order_final": False,
    "solver_variable": None,
    "solver_weights": "exact",
    "solver_corrector_order": None,
}
NEEDED = ("alpha_bar", "clip", "eta", "timesteps", "version", "weights")
# The last four say how the entry was made; they change nothing.
FURTHER = (
    "clips",
    "end_scale",
    "eps_scale",
    "eta_interval",
    "guidance_interval",
    "guidance_scale",
    "shape",
    "analytic",
    "held_out",
    "n",
    "samples",
)
# How far 1 / alpha_bar - 1 of a stored process may be from that of the scheduler, relatively.
PROCESS_RTOL = 1e-3
# Decimals of a stored weight; alpha_bar has nine digits.
DECIMALS = 6
# A stored table is a list of S (S + 3) / 2 numbers.
MAX_CALLS = 256
# The weights of a fit are a few units. Far larger ones overflow in half and single precision.
MAX_WEIGHT = 1e4


class SolverTable(NamedTuple):
    """A stored sampler of S steps.

    Attributes:
        timesteps: S of them, strictly decreasing.
        weights: the differences, S rows; row i has i + 2 numbers, of x_T and of x0_0 .. x0_i.
        eta: the member.
        clip: limit of |x0_hat| in every step, None for none.
        clips: limit that the scheduler's own config had when the table was made, None for none.
        alpha_bar: at the timesteps and where the last step lands, S + 1 numbers.
        shape: of one sample, (C, ...); None fits every shape.
        eta_interval: where eta acts, in shares of t / T; None for everywhere.
        eps_scale: as the setting of that name.
        end_scale: as the setting of that name.
        guidance_scale: w of the classifier-free guidance that it was made at; None for none.
        guidance_interval: where guidance acts, in shares of t / T; None for everywhere.
    """

    timesteps: list[int]
    weights: list[list[float]]
    eta: float
    clip: float | None
    clips: float | None
    alpha_bar: list[float]
    shape: list[int] | None = None
    eta_interval: list[float] | None = None
    eps_scale: float | list[float] = 1.0
    end_scale: float = 1.0
    guidance_scale: float | None = None
    guidance_interval: list[float] | None = None

    @property
    def guidance(self) -> "Guidance | None":
        """Return the guidance that it was made at, to be compared."""
        return guidance_of(self.guidance_scale, self.guidance_interval)


# The scale w, and the interval where it acts; None for everywhere.
Guidance = tuple[float, tuple[float, float] | None]


def guidance_of(scale: float | None, interval: Sequence[float] | None) -> Guidance | None:
    """Return classifier-free guidance in one form; None for none, which w = 1 is."""
    if scale is None or scale == 1:
        return None
    ends = None if interval is None else (float(interval[0]), float(interval[1]))
    return float(scale), None if ends == (0, 1) else ends


def pack_solver_table(table: SolverTable, **how: Any) -> dict[str, Any]:
    """Return what `solver_table_of` reads, as JSON can hold it: rounded to what matters.

    Args:
        table: of a sampler.
        **how: any of `FURTHER` that say how the table was made: `n` samples, mean squared errors
            `held_out` of it and `analytic` of the formulas at the end points of other samples;
            `samples`, what eta and the scales gained.

    Raises:
        ValueError: for a table that could not be read back, naming what is out of range.
    """
    packed = {
        "version": VERSION,
        "timesteps": list(table.timesteps),
        "weights": [[round(value, DECIMALS) for value in row] for row in table.weights],
        "eta": table.eta,
        "eta_interval": table.eta_interval,
        "eps_scale": table.eps_scale,
        "end_scale": table.end_scale,
        "clip": table.clip,
        "clips": table.clips,
        "alpha_bar": [float(f"{value:.9g}") for value in table.alpha_bar],
        "shape": table.shape,
        **how,
    }
    if table.guidance is not None:  # an earlier version reads tables without guidance alone
        packed["guidance_scale"] = table.guidance_scale
        packed["guidance_interval"] = table.guidance_interval
    big_t = max(table.timesteps, default=0) + 1  # at least
    _read(packed, str(len(table.timesteps)), big_t)
    return packed


def stored_calls(calibration: Any) -> list[int]:
    """Return the numbers of calls for which a scheduler's `calibration` has a table, increasing."""
    found = calibration.get("solver") if isinstance(calibration, Mapping) else None
    if not isinstance(found, Mapping):
        return []
    return sorted(int(key) for key in found if _is_calls(key))


def stores_noise(calibration: Any) -> bool:
    """Tell whether a table of a scheduler's `calibration` adds noise."""
    found = calibration.get("solver") if isinstance(calibration, Mapping) else None
    return isinstance(found, Mapping) and any(entry["eta"] > 0 for entry in found.values())


def solver_table_of(calibration: Any, calls: int, num_train_timesteps: int) -> SolverTable | None:
    """Return the checked table for that number of calls; None where `calibration` has none.

    Raises:
        ValueError: naming the entry, its value and what is allowed.
    """
    found = calibration.get("solver") if isinstance(calibration, Mapping) else None
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(
            f"`calibration['solver']` is {_shown(found)}; it must be a dictionary of tables by "
            "their number of calls."
        )
    entry = found.get(str(calls))
    return None if entry is None else _read(entry, str(calls), num_train_timesteps)


def check_solver_tables(calibration: Any, num_train_timesteps: int) -> None:
    """Check every table of a scheduler's `calibration`.

    Raises:
        ValueError: naming the entry, its value and what is allowed.
    """
    solver_table_of(calibration, 0, num_train_timesteps)
    for key, entry in (calibration.get("solver") or {}).items():
        _read(entry, key, num_train_timesteps)


def _is_calls(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key)) == key != "0"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_real(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _read(entry: Any, key: Any, big_t: int) -> SolverTable:
    name = f"calibration['solver'][{key!r}]"
    if not _is_calls(key) or int(key) > min(big_t, MAX_CALLS):
        raise ValueError(
            f"`calibration['solver']` has the key {_shown(key)}; it must be the number of calls "
            f"as text, '1' to '{min(big_t, MAX_CALLS)}'."
        )
    if not isinstance(entry, Mapping):
        raise ValueError(f"`{name}` is {_shown(entry)}; it must be a dictionary.")
    if type(entry.get("version")) is not int or entry["version"] != VERSION:
        raise ValueError(
            f"`{name}['version']` is {_shown(entry.get('version'))}; this package reads version "
            f"{VERSION}."
        )
    if missing := [part for part in NEEDED if part not in entry]:
        raise ValueError(f"`{name}` has no {missing[0]!r}; it must have {list(NEEDED)}.")
    if unknown := sorted(str(part) for part in entry if part not in (*NEEDED, *FURTHER)):
        raise ValueError(
            f"`{name}` has the key {unknown[0]!r}, which version {VERSION} does not know; it may "
            f"have {sorted((*NEEDED, *FURTHER))}."
        )
    return _checked(entry, name, int(key), big_t)


def _checked(entry: Mapping[str, Any], name: str, calls: int, big_t: int) -> SolverTable:
    def say(part: str, allowed: str) -> ValueError:
        return ValueError(f"`{name}[{part!r}]` is {_shown(entry.get(part))}; it must be {allowed}.")

    def number(part: str, test: Callable[[float], bool], allowed: str) -> Any:
        value = entry.get(part)
        if value is None:
            return None
        if not _is_real(value) or not test(float(value)):
            raise say(part, allowed)
        return float(value)

    intervals = {name: entry.get(name) for name in ("eta_interval", "guidance_interval")}
    for part in ("eps_scale", "end_scale"):
        given = entry.get(part, 1.0)
        is_line = part == "eps_scale" and isinstance(given, list | tuple)
        if not all(map(_is_real, given if is_line else [given])):
            raise say(part, "a finite number > 0")
    try:
        timesteps = check_timesteps(entry["timesteps"], big_t)
        check_scales(entry.get("eps_scale", 1.0), entry.get("end_scale", 1.0))
        for part, interval in intervals.items():
            check_numbers(part, interval)
            if interval is not None:
                check_interval(part, interval)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    if len(timesteps) != calls:
        raise say("timesteps", f"{calls} timesteps")
    if entry["eta"] is None:
        raise say("eta", "a finite number >= 0")
    eta = number("eta", lambda value: value >= 0, "a finite number >= 0")
    clip = number("clip", lambda value: value > 0, "None or a finite number > 0")
    clips = number("clips", lambda value: value > 0, "None or a finite number > 0")
    guidance = number("guidance_scale", lambda value: True, "None or a finite number")
    if guidance is None and intervals["guidance_interval"] is not None:
        raise say("guidance_interval", "None where there is no 'guidance_scale'")
    ends = {k: None if v is None else [float(share) for share in v] for k, v in intervals.items()}
    for part in ("held_out", "analytic"):
        number(part, lambda value: value >= 0, "None or a finite number >= 0")
    number("n", lambda value: value >= 1, "None or a number >= 1")
    return SolverTable(
        timesteps,
        _rows(entry["weights"], name, calls),
        eta,
        clip,
        clips if "clips" in entry else clip,
        _levels(entry["alpha_bar"], name, calls),
        _shape(entry.get("shape"), name),
        ends["eta_interval"],
        entry.get("eps_scale", 1.0),
        float(entry.get("end_scale", 1.0)),
        guidance,
        ends["guidance_interval"],
    )


def _rows(weights: Any, name: str, calls: int) -> list[list[float]]:
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != calls:
        raise ValueError(
            f"`{name}['weights']` is {_shown(weights)}; it must be a list of {calls} lists."
        )
    rows = []
    for i, row in enumerate(weights):
        fits = isinstance(row, Sequence) and not isinstance(row, str) and len(row) == i + 2
        if not fits or not all(_is_real(value) and abs(value) <= MAX_WEIGHT for value in row):
            raise ValueError(
                f"`{name}['weights'][{i}]` is {_shown(row)}; it must be a list of {i + 2} finite "
                f"numbers, of x_T and of the predictions 0 to {i}, each from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}."
            )
        rows.append([float(value) for value in row])
    return rows


def _levels(values: Any, name: str, calls: int) -> list[float]:
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == calls + 1
    numbers = [float(v) for v in values] if fits and all(map(_is_real, values)) else []
    low, high = [0.0, *numbers], [*numbers, 1.0]
    if not numbers or any(a > b for a, b in zip(low, high, strict=True)):
        raise ValueError(
            f"`{name}['alpha_bar']` is {_shown(values)}; it must be {calls + 1} increasing numbers "
            "in 0 .. 1, at the timesteps and at the end."
        )
    return numbers


def _shape(values: Any, name: str) -> list[int] | None:
    if values is None:
        return None
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) >= 1
    if not fits or not all(_is_size(value) for value in values):
        raise ValueError(
            f"`{name}['shape']` is {_shown(values)}; it must be None or the size of one sample, "
            "e.g. [3, 32, 32]."
        )
    return [int(value) for value in values]


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _agrees(config: Any, table: SolverTable, key: str, neutral: Any) -> bool:
    """Tell whether the config leaves a setting to the table, or says the same."""
    own = config.get(key, neutral)
    own = list(own) if isinstance(own, list | tuple) else own
    return own in (neutral, getattr(table, key))


def misfit(
    table: SolverTable, config: Any, alpha_bar: torch.Tensor, alpha_bar_end: float
) -> str | None:
    """Return in one word what a table was not made for, or None where it fits the scheduler.

    Args:
        table: that is stored.
        config: of the scheduler.
        alpha_bar: of its process, (T,).
        alpha_bar_end: where the last step lands.
    """
    limit = float(config.clip_sample_range) if config.clip_sample else None
    if any(config[key] != value for key, value in SOLVER_BASE.items()):
        return "solver"
    if config.original_inference_steps is not None:
        return "timesteps"
    if config.thresholding or limit not in (table.clip, table.clips):
        return "clipping"
    if config.sigma is not None:
        return "sigma"
    if config.eta not in (None, table.eta) or not _agrees(config, table, "eta_interval", None):
        return "eta"
    if not all(_agrees(config, table, key, 1.0) for key in ("eps_scale", "end_scale")):
        return "scale"
    if config.reverse_variance != "sigma":
        return "noise"
    levels = torch.cat([alpha_bar[table.timesteps], alpha_bar.new_tensor([alpha_bar_end])])
    stored = torch.tensor(table.alpha_bar, dtype=torch.float64, device="cpu")
    # alpha_bar near 0 and 1 - alpha_bar near 1 are what steps compute with
    close = (levels - stored).abs() <= PROCESS_RTOL * torch.minimum(levels, 1 - levels)
    return None if bool(close.all()) else "process"
