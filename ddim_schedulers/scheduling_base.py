"""What the three scheduler classes share: tables, trajectory, one step.

A step is a row of a table. With m the model output,

    x0_hat = x0_x x_t + x0_m m                          clipped or thresholded, if asked
    x_s    = out_x0 x0_hat + out_x x_t + out_m m + std z    if x0_hat is clipped
    x_s    = out_x x_t + out_m m + std z                    if not: x0_hat is folded in

The rows of all T timesteps are computed in float64 on the CPU once per (trajectory, eta) and kept
on the device of the sample; `step` looks its row up and reads nothing back.
"""

import math
import numbers
import operator
import reprlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .attributes import FamilyAttributesMixin, checked_plan, is_part, mark_of
from .betas import (
    alpha_bar_before,
    check_num_train_timesteps,
    explicit_betas,
    has_linear_betas,
    make_betas,
    rescale_zero_terminal_snr,
    shift_snr,
    terminal_signal,
)
from .config_types import check_types
from .family_config import (
    BETA_KEYS,
    UNSAID,
    FamilyConfigMixin,
    check_names,
    check_planned,
    predicts_variance,
    unsaid_noise,
    written,
)
from .modes import outside_modes
from .optimal import (
    Statistics,
    late_noise_cap,
    optimal_timesteps,
    statistics_of,
    x0_variance,
)
from .parameterization import (
    Coefficients,
    dynamic_threshold,
    eps_coefficients,
    x0_coefficients,
)
from .reverse_noise import OWN, FixedNoise, LearnedNoise, Noise, Steps, cost_name, noise_named
from .sigmas import sigma_eta
from .timesteps import (
    check_num_inference_steps,
    check_timesteps,
    landing,
    make_timesteps,
    pairs,
)
from .trajectory import calibrated_timesteps, trajectory_of
from .transition import Transition, transition

logger = logging.get_logger(__name__)

# A sweep over eta without a new plan makes a table for each value; more than these are not kept.
MAX_TABLES = 64

# The columns of a longer plan are not kept: 3.4 kB a row.
MAX_COLUMNS = 1000

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Multistep(NamedTuple):
    """What a step of higher order adds: sum_j w_j (e_j - e_0), see `multistep`.

    weights has shape (m + 1, T, m), m predictions remembered, first index how many are known.
    before is the planned timestep before each, (T,), -2 where there is none. estimate holds the
    columns e_x0, e_x, e_m of e_0 = eps_hat, (T, 3); without it e_0 is x0_hat.
    """

    weights: torch.Tensor
    before: torch.Tensor
    estimate: torch.Tensor | None


class Table(NamedTuple):
    """Rows of one (trajectory, eta), float32 or float64, and what is known of all of them.

    The columns are x0_x, x0_m, out_x0, out_x, out_m, std and, where the network tells the noise,
    its bounds log_std_min and log_std_max.
    """

    rows: torch.Tensor
    uses_sample: bool  # is out_x needed with a clipped x0_hat?
    uses_output: bool  # is out_m needed with a clipped x0_hat?
    multistep: Multistep | None = None


class StepSettings(NamedTuple):
    """What every step asks of the config, read once for each state of it."""

    clips: bool
    thresholds: bool
    clip_range: float
    eta: float | None
    solver_order: int
    noise: Noise
    learned: LearnedNoise | None  # the same where the network tells it
    noise_is_unsaid: bool  # though the network tells a variance


class Past(NamedTuple):
    """The predictions of the latest steps, the newest first, and how many of them belong together.

    All of it stays on the device: whether a step goes on from the one before is decided there, so
    that nothing is read back and no step compiles again.
    """

    predictions: tuple[torch.Tensor, ...]
    known: torch.Tensor  # (1,)
    timestep: torch.Tensor  # (1,), of the newest
    thread: int | None = None  # that made it; None where it may go on anywhere


class FamilySchedulerMixin(FamilyAttributesMixin, FamilyConfigMixin):
    """The common part of the scheduler classes, in front of `SchedulerMixin` and `ConfigMixin`."""

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    config_name: Any = SCHEDULER_CONFIG_NAME
    # the setting that names the noise; the deterministic member needs none
    _noise_key: str | None = None
    _settings: StepSettings

    @outside_modes
    def _make_tables(self) -> None:
        """Compute the betas and what hangs on them; called once, at the end of `__init__`."""
        check_types(self.config)
        self.register_to_config(**written(self.config))
        self._check_config()
        self._optimal_plans: dict[tuple, list[int]] = {}
        self._tables: dict[tuple, Table] = {}
        self._forward: dict[tuple, torch.Tensor] = {}
        self._newest: tuple[Table, dict[int, tuple[torch.Tensor, ...]]] | None = None
        self.init_noise_sigma = 1.0
        self._past: Past | None = None
        # how often a plan was made, and which one each thread last saw: a history belongs to one
        self._planned_times, self._runs = 0, dict[int, int]()
        self._plan_of_config()
        self._check_calibration()

    def _check_config(self) -> None:
        big_t = check_num_train_timesteps(self.config.num_train_timesteps)
        check_names(self.config, self._get_init_keys(type(self)))  # type: ignore[attr-defined]
        check_planned(self.config, big_t)

    def _process_of_config(self) -> None:
        """Make the process that the config says."""
        config, big_t = self.config, self.config.num_train_timesteps
        if config.trained_betas is not None:
            betas = explicit_betas(config.trained_betas, big_t)
        else:
            betas = make_betas(config.beta_schedule, big_t, config.beta_start, config.beta_end)
        betas = shift_snr(betas, config.snr_shift_scale)
        if config.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self._beta_settings = _beta_settings(config)
        self._set_process(betas)
        self._warned_of_terminal = False

    def _plan_of_config(self) -> None:
        """Make the process that the config says, and plan its whole chain."""
        self._process_of_config()
        self._num_inference_steps: int | None = None
        self._planned = False  # compiled code would recompile for each `num_inference_steps`
        self._process_changed(list(range(len(self) - 1, -1, -1)))
        self._show()

    def _process_changed(self, plan: list[int] | None = None) -> None:
        """Compute again what depends on alpha_bar."""
        self._forward.clear()
        self._optimal_plans.clear()
        stride = self._stride if plan is None else None
        plan = self._plan if plan is None else plan
        self._plan = []
        self._set_plan(plan, stride)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed again; the history goes along, without gradients.

        The many views of a table are slow to pickle, and a tensor that has a history of its own
        cannot be copied.
        """
        self._follow()
        past = self._past
        if past is not None and not holds_numbers(past.predictions[0]):
            past = None
        if past is not None:
            past = past._replace(
                thread=None, predictions=tuple(e.detach() for e in past.predictions)
            )
        anew: dict[str, Any] = {
            "_tables": {},
            "_newest": None,
            "_forward": {},
            "_marks": {},
            "_runs": {},
        }
        return {**self.__dict__, **anew, "_public": {**self._public}, "_past": past}

    @outside_modes
    def _set_plan(self, timesteps: list[int], stride: int | None = None) -> None:
        """Fix the trajectory: where a step from each t lands, for planned and other timesteps.

        The tables stay if neither the trajectory nor the config has changed.

        Args:
            timesteps: the trajectory, strictly decreasing.
            stride: where every step goes this far down instead, from any timestep.
        """
        self._past = None
        if not torch.compiler.is_dynamo_compiling():
            self._planned_times += 1
            self._runs[threading.get_ident()] = self._planned_times
        config = self.config
        same = config is self._planned_config and config.changes == self._planned_changes
        if timesteps == self._plan and stride == self._stride and same:
            return
        self._plan, self._stride = timesteps, stride
        self._planned_config, self._planned_changes = config, config.changes
        self._settings = self._read_settings()
        self._landing = landing(timesteps, len(self._alpha_bar))
        if stride is not None:
            self._landing = (torch.arange(len(self._landing), device="cpu") - stride).clamp(min=-1)
        end = torch.full_like(self._alpha_bar, self.alpha_bar_end)
        self._alpha_bar_s = torch.where(
            self._landing >= 0, self._alpha_bar[self._landing.clamp(min=0)], end
        )
        self._plan_has_zero_snr = bool((self._alpha_bar[timesteps] == 0).any())
        self._landing_on_data = frozenset((self._alpha_bar_s == 1).nonzero().flatten().tolist())
        self._forget_tables()

    def _read_settings(self) -> StepSettings:
        config, key = self.config, self._noise_key
        noise = OWN if key is None else noise_named(key, config[key])
        return StepSettings(
            clips=self._clips(),
            thresholds=bool(config.get("thresholding", False)),
            clip_range=config.get("clip_sample_range", 1.0),
            eta=config.get("eta"),
            solver_order=config.get("solver_order", 1),
            noise=noise,
            learned=noise if isinstance(noise, LearnedNoise) else None,
            noise_is_unsaid=key in unsaid_noise(config),
        )

    def _forget_tables(self) -> None:
        self._tables.clear()
        self._newest = None

    def _follow(self) -> None:
        """Compute again what comes from attributes or settings that have changed since."""
        self._follow_config()
        if not self._marks or torch.compiler.is_dynamo_compiling():
            return
        for value, mark in self._marks.values():
            plain_tensor = type(value) is torch.Tensor and mark is not None
            if (value._version if plain_tensor else mark_of(value)) != mark:
                self._take_edits()
                break

    def _follow_config(self) -> None:
        config = self._internal_dict  # not by the property: every step passes here
        if config is not self._planned_config or config.changes != self._planned_changes:
            self._take_settings()

    @outside_modes
    def _take_settings(self) -> None:
        check_types(self.config)
        self._check_config()
        if len(self) != len(self._alpha_bar):
            self._plan_of_config()
        elif _beta_settings(self.config) != self._beta_settings:
            timesteps = self._public["timesteps"]
            self._process_of_config()
            self._accept("timesteps", timesteps)
            self._process_changed()
        self._set_plan(self._plan, self._stride)

    def _take_trajectory(self, listed: list[Any]) -> None:
        """Plan assigned timesteps; a part of the plan, where each step has its neighbour, stays."""
        if is_part(listed, self._plan):
            return
        planned = checked_plan(self._in_order_of_sampling(listed), len(self))
        before = self._plan, self._stride
        self._set_plan(planned)
        try:
            self._check_plan_snr()
        except ValueError:
            self._set_plan(*before)
            raise
        self._num_inference_steps, self._planned = len(planned), True

    def _in_order_of_sampling(self, listed: list[Any]) -> list[Any]:
        return listed

    @property
    def num_inference_steps(self) -> int | None:
        """Return the number of planned steps; `None` before there is a plan.

        Assigned, it plans steps of T // n from any timestep, as stock DDIM does; a number that
        agrees with `timesteps` changes nothing.
        """
        return self._num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, number: int | None) -> None:
        self._follow()
        if number is not None:
            number = check_num_inference_steps(number, len(self))
        self._take_number(number)
        self._num_inference_steps = number

    def _take_number(self, number: int | None) -> None:
        self._planned = number is not None
        if number in (None, self._num_inference_steps, len(self._shown)):
            return
        offset = self.config.steps_offset if self.config.timestep_spacing == "leading" else 0
        plan = make_timesteps("leading", number, len(self), offset)
        self._set_plan(plan, len(self) // number)

    def _plan_tensor(self) -> torch.Tensor:
        return torch.tensor(self._plan, dtype=torch.int64, device="cpu")

    def _check_plan_snr(self) -> None:
        if self._plan_has_zero_snr and self.config.prediction_type == "epsilon":
            raise ValueError(
                "`prediction_type` is 'epsilon' and the trajectory holds a timestep with alpha_bar "
                "= 0, where eps says nothing about x_0; use 'v_prediction', 'sample' or "
                "'posterior_mean', or timesteps that avoid it (e.g. timestep_spacing='leading')."
            )

    def _resolve_timesteps(
        self, num_inference_steps: int | None, timesteps: Iterable[int] | None
    ) -> list[int]:
        """Return the trajectory that the arguments and the config ask for."""
        config, big_t = self.config, self.config.num_train_timesteps
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps!r} and `timesteps` is given; "
                    f"pass one of them."
                )
            return check_timesteps(timesteps, big_t)
        if config.timesteps is not None:
            planned = check_timesteps(config.timesteps, big_t)
            _check_length("timesteps", len(planned), num_inference_steps)
            return planned
        if num_inference_steps is None:
            raise ValueError(
                "`num_inference_steps` is None and no `timesteps` are given; pass one of them."
            )
        check_num_inference_steps(num_inference_steps, big_t)
        if config.timestep_spacing == "optimal":
            return list(self._optimal_timesteps(num_inference_steps))
        if config.timestep_spacing == "calibrated":
            return list(self._calibrated_timesteps(num_inference_steps))
        return make_timesteps(
            config.timestep_spacing,
            num_inference_steps,
            big_t,
            config.steps_offset,
            config.quadratic_end,
            config.original_inference_steps,
        )

    def _needs_calibration(self) -> bool:
        spacing = self.config.timestep_spacing
        return self._settings.noise.needs_calibration or spacing == "optimal"

    def _check_calibration(self) -> None:
        """Check what `calibration` holds: statistics, a trajectory, or both."""
        calibration = self.config.get("calibration")
        has_trajectory = isinstance(calibration, Mapping) and "trajectory" in calibration
        if has_trajectory or self.config.timestep_spacing == "calibrated":
            trajectory_of(calibration, len(self))
        alone = has_trajectory and "gamma" not in calibration
        if self._needs_calibration() or (calibration is not None and not alone):
            self._statistics()

    def _statistics(self) -> Statistics:
        calibration = self.config.get("calibration")
        if calibration is None:
            raise ValueError(
                "`calibration` is None, but 'optimal' noise or spacing needs the statistics of the "
                "network; `ddim-schedulers calibrate` estimates them and puts them into the config."
            )
        return statistics_of(calibration, self._alpha_bar)

    @property
    def _x0_limit(self) -> float:
        """Return the largest |x_0|: 1 for thresholded data, else `clip_sample_range`."""
        if self.config.get("thresholding", False):
            return 1.0
        return float(self.config.get("clip_sample_range", 1.0))

    def _bound_member(self) -> tuple[str, float]:
        """Return the variance and eta whose bound `timestep_spacing='optimal'` minimises.

        Where sigma may be 0 the bound is infinite, and the Markovian member's with the optimal
        variance takes its place.
        """
        eta = self.config.get("eta")
        if not eta:
            return "optimal", 1.0
        name = self.config.get("reverse_variance", "sigma")
        return cost_name(noise_named("reverse_variance", name)), float(eta)

    def _optimal_timesteps(self, num_inference_steps: int) -> list[int]:
        statistics, member = self._statistics(), self._bound_member()
        numbers = (tuple(values.tolist()) for values in statistics)
        key = (num_inference_steps, *member, self._x0_limit, *numbers)
        if key not in self._optimal_plans:
            self._optimal_plans[key] = optimal_timesteps(
                self._alpha_bar, statistics, num_inference_steps, *member, self._x0_limit
            )
        return self._optimal_plans[key]

    def _calibrated_timesteps(self, num_inference_steps: int) -> list[int]:
        config = self.config
        trajectory = trajectory_of(config.get("calibration"), len(self))
        solver = (
            config.get("solver_order", 1),
            config.get("solver_form", "sample"),
            bool(config.get("lower_order_final", False)),
        )
        curve = tuple(trajectory.points.flatten().tolist())
        key = ("calibrated", num_inference_steps, *solver, *trajectory.timesteps, *curve)
        if key not in self._optimal_plans:
            self._optimal_plans[key] = calibrated_timesteps(
                trajectory, self._alpha_bar, self.alpha_bar_end, num_inference_steps, *solver
            )
        return self._optimal_plans[key]

    def _steps(self, noise: Noise, sigma: torch.Tensor) -> Steps:
        """Return what the noise may use of each step of the member sigma, (T,)."""
        own, largest = None, None
        if noise.needs_calibration:
            own = x0_variance(self._statistics().gamma, self._alpha_bar, self._x0_limit**2)
            largest = self._late_noise_limit(sigma)
        return Steps(self._alpha_bar, self._alpha_bar_s, sigma, own, largest)

    def _std_of(self, noise: FixedNoise, sigma: torch.Tensor) -> torch.Tensor:
        return noise.std(self._steps(noise, sigma))

    def _late_noise_limit(self, sigma: torch.Tensor) -> torch.Tensor | None:
        """Return the largest std of measured noise, (T,): a cap on that of the second-to-last step.

        The cap is `late_noise_cap` pixels; without one, for clipped data, i.e. pixels, as in
        Analytic-DPM, App. F: 2 for DDPM on its linear schedule, 1 otherwise.
        """
        pixels = self.config.late_noise_cap
        if pixels is None and not self._clips():
            return None
        if pixels is None:
            ddpm = sigma_eta(self._alpha_bar, self._alpha_bar_s, 1.0)[self._plan]
            is_ddpm = torch.allclose(sigma[self._plan], ddpm, rtol=1e-6, atol=0.0)
            pixels = 2.0 if is_ddpm and has_linear_betas(self._alpha_bar) else 1.0
        is_late = self._landing == self._plan[-1]
        return torch.full_like(sigma, math.inf).masked_fill(is_late, late_noise_cap(pixels))

    def _warn_of_terminal_signal(self) -> None:
        """Say once where sampling cannot start from what training ended with."""
        if self._warned_of_terminal or torch.compiler.is_compiling():
            return
        self._warned_of_terminal = True
        wrong = terminal_signal(self._alpha_bar)
        if wrong is not None:
            logger.warning(wrong)

    def planned_pairs(self) -> list[tuple[int, int]]:
        """Return the planned steps [(t, s), ...] in the order of sampling; s = -1 is the end."""
        self._follow()
        return pairs(self._plan)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """Return where a step from `timestep` lands: the next planned one, or -1 for the end."""
        self._follow()
        landing = self._at(self._landing, timestep)
        return landing if isinstance(timestep, torch.Tensor) else int(landing)

    def _at(self, values: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """Return the value of one timestep, or of a tensor of them in its shape and on its device.

        Args:
            values: one for each training timestep, (T,).
            timestep: in 0 .. T - 1.
        """
        if isinstance(timestep, torch.Tensor):
            picked = _pick(values.to(timestep.device), timestep, "timestep")
            return picked.reshape(timestep.shape)
        return values[self._check_timestep(timestep)]

    def _alpha_bar_or_end(self, prev_timestep: int | torch.Tensor) -> torch.Tensor:
        """Return alpha_bar where a step lands: of `prev_timestep`, or of the end below 0."""
        if isinstance(prev_timestep, torch.Tensor):
            landed = self._at(self._alpha_bar, prev_timestep.clamp(min=0))
            return torch.where(prev_timestep >= 0, landed, self.alpha_bar_end)
        if isinstance(prev_timestep, numbers.Integral) and prev_timestep < 0:
            return torch.tensor(self.alpha_bar_end, dtype=torch.float64, device="cpu")
        return self._at(self._alpha_bar, prev_timestep)

    def _check_timestep(self, timestep: Any) -> int:
        try:
            t = -1 if isinstance(timestep, bool) else operator.index(timestep)
        except TypeError:
            t = -1
        if not 0 <= t < len(self):
            raise ValueError(
                f"`timestep` is {timestep!r}; it must be an integer in 0 .. {len(self) - 1}."
            )
        return t

    def _table(self, sigma: torch.Tensor, rederive: bool, dtype: torch.dtype) -> Table:
        """Return the table of the reverse transitions of the member sigma, (T,).

        Where the network tells the noise, the column of the std is 1, and its bounds follow it.
        With `rederive`, eps_hat follows the clipped x0_hat: eps_hat = (x_t - sqrt(abar_t) x0_hat) /
        sqrt(1 - abar_t); otherwise it is the network's own, as in stock DDIM. It makes no
        difference where nothing is clipped.
        """
        a_t, prediction = self._alpha_bar, self.config.prediction_type
        self._check_plan_snr()
        before = alpha_bar_before(a_t)
        x0 = x0_coefficients(prediction, a_t, before)
        eps = eps_coefficients(prediction, a_t, before)
        noise, bounds = self._settings.noise, list[torch.Tensor]()
        if isinstance(noise, FixedNoise):
            std = self._std_of(noise, sigma)
        else:
            assert isinstance(noise, LearnedNoise)
            std, bounds = torch.ones_like(sigma), noise.bounds(self._steps(noise, sigma))
        std = torch.where(self._alpha_bar_s == 1, 0.0, std)  # the step that lands on x_0 adds none
        row = transition(self._alpha_bar_s, sigma, std)
        if self._clips() and rederive:
            weight = row.eps / (1 - a_t).sqrt()
            out = [row.x0 - weight * a_t.sqrt(), weight, torch.zeros_like(weight)]
        else:
            out = fold(x0, eps, row, self._clips())
        uses_sample = rederive or prediction != "epsilon"
        rows = torch.stack([*x0, *out, row.std, *bounds], dim=1)
        return Table(rows.to(dtype), uses_sample, not rederive)

    def _keep(self, key: tuple, table: Table, device: Any) -> Table:
        """Store a table on `device` for the steps to come, and return it."""
        if table.rows.device != device:  # `to` would be part of a traced program
            table = _each(table, lambda part: part.to(device))
        if torch.jit.is_tracing() or not holds_numbers(table.rows):
            return table
        if len(self._tables) >= MAX_TABLES:
            self._forget_tables()
        if not torch.compiler.is_compiling():
            with torch.inference_mode(False):  # a later step may be differentiated
                table = _each(table, torch.clone) if table.rows.is_inference() else table
                self._newest = (table, self._planned_columns(table.rows))
        self._tables[key] = table
        return table

    def _planned_columns(self, rows: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
        """Return the columns of each planned row as scalars, taken apart in one call."""
        if len(self._plan) > MAX_COLUMNS:
            return {}
        width = rows.shape[1]
        flat = rows[self._plan].flatten().unbind(0)
        return {t: flat[i * width : (i + 1) * width] for i, t in enumerate(self._plan)}

    def _clips(self) -> bool:
        return bool(self.config.thresholding or self.config.clip_sample)

    def _limit(self, x0: torch.Tensor) -> torch.Tensor:
        return self._threshold_sample(x0) if self._settings.thresholds else self._clip(x0)

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Return dynamic thresholding of x0_hat, under stock's private name, in its dtype.

        Args:
            sample: x0_hat, (B, ...), any floating dtype; computed in float32 or better.
        """
        config, dtype = self.config, compute_dtype(sample)
        ratio, max_value = config.dynamic_thresholding_ratio, config.sample_max_value
        return dynamic_threshold(sample.to(dtype), ratio, max_value).to(sample.dtype)

    def _clip(self, x0: torch.Tensor) -> torch.Tensor:
        """Clip x0_hat in place: a step has just made it, and nobody else holds it."""
        limit = self._settings.clip_range
        return x0.clamp_(-limit, limit)

    def _look_up(
        self, table: Table, timestep: int | torch.Tensor, number: Any, sample: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the columns of the row of `timestep`, each broadcasting against the sample.

        Args:
            table: of the step.
            timestep: as the caller gave it.
            number: the same as a number, or `None` for a tensor that is not looked at.
            sample: (B, C, ...).
        """
        if number is not None or not isinstance(timestep, torch.Tensor):
            return self._columns(table, number)
        picked = _pick(table.rows, timestep, "timestep")
        if timestep.ndim == 0:
            return picked.unbind(1)
        if timestep.ndim > 1 or timestep.shape[0] not in (1, sample.shape[0]):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)}; it must be a number or have one "
                f"value for each of the {sample.shape[0]} samples."
            )
        shape = (-1,) + (1,) * (sample.ndim - 1)
        return tuple(column.view(shape) for column in picked.unbind(1))

    def _columns(self, table: Table, number: Any) -> tuple[torch.Tensor, ...]:
        newest = None if torch.compiler.is_compiling() else self._newest
        planned = newest[1] if newest is not None and newest[0] is table else {}
        # what is planned is in range; True is no timestep, but equals one
        t = number if type(number) is int and number in planned else self._check_timestep(number)
        return planned[t] if t in planned else table.rows[t].unbind(0)

    def _step(
        self,
        table: Table,
        adds_noise: bool,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        learned: LearnedNoise | None,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x_s, x0_hat) in the dtype of the sample, computed in the dtype of the table."""
        prediction, raw_variance = self._split(model_output, sample, learned)
        number: Any = timestep
        if isinstance(timestep, torch.Tensor):
            number = read_if_free(timestep) if timestep.ndim == 0 else None
        columns = self._look_up(table, timestep, number, sample)
        x0_x, x0_m, out_x0, out_x, out_m, std, *bounds = columns
        dtype = table.rows.dtype
        x, m = _cast(sample, dtype), _cast(prediction, dtype)
        x0 = torch.mul(x, x0_x).addcmul_(m, x0_m)
        if self._settings.clips:
            x0 = self._limit(x0)
            out = torch.mul(x0, out_x0)
            if table.uses_sample:
                out.addcmul_(x, out_x)
            if table.uses_output:
                out.addcmul_(m, out_m)
        else:
            out = torch.mul(x, out_x).addcmul_(m, out_m)
        if table.multistep is not None:
            self._add_history(out, table.multistep, timestep, number, x0, x, m)
        if adds_noise:
            noise = _cast(_noise_like(prediction, generator, variance_noise), dtype)
            if learned is not None and raw_variance is not None:
                # where no noise is added the network may say anything, and a NaN of the root or of
                # its gradient would survive a product with 0
                raw = torch.where(std > 0, raw_variance.to(dtype), 1.0)
                std = std * learned.std(raw, *bounds)
            out.addcmul_(noise, std)
        return _cast(out, sample.dtype), _cast(x0, sample.dtype)

    def _split(
        self, model_output: torch.Tensor, sample: torch.Tensor, learned: LearnedNoise | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the prediction, and the variance that the network told if the step uses it.

        Of an output of 2 C channels the second half is the variance. It is left out only where the
        config says that the network predicts one and the step takes its noise, if any, from
        elsewhere.

        Args:
            model_output: of the network.
            sample: (B, C, ...).
            learned: how the step uses the second half, or `None` where it does not.

        Raises:
            ValueError: for another shape or dtype.
        """
        if not (sample.is_floating_point() and model_output.is_floating_point()):
            name = "model_output" if sample.is_floating_point() else "sample"
            dtype = model_output.dtype if sample.is_floating_point() else sample.dtype
            raise ValueError(f"`{name}` has dtype {dtype}; it must be a floating dtype.")
        if model_output.device != sample.device:
            raise ValueError(
                f"`model_output` is on the device {model_output.device}; it must be on that of "
                f"`sample`, {sample.device}."
            )
        if learned is None and model_output.shape == sample.shape:
            return model_output, None
        has_half = _has_half(model_output, sample)
        if has_half and (learned is not None or predicts_variance(self.config)):
            prediction, variance = torch.split(model_output, sample.shape[1], dim=1)
            return prediction, None if learned is None else variance
        expected, why = tuple(sample.shape), ""
        if learned is not None:
            expected = (expected[0], 2 * expected[1], *expected[2:])
            key = self._noise_key
            why = (
                f", twice the channels because `{key}` is {self.config[key]!r}; set another where "
                "the variance has been split off"
            )
        elif has_half:
            why = (
                "; if the network predicts a variance in the second half of its channels, pass "
                "`variance_type='learned_range'` to `from_config`"
            )
        raise ValueError(
            f"`model_output` has shape {tuple(model_output.shape)}; for a `sample` of shape "
            f"{tuple(sample.shape)} it must be {expected}{why}."
        )

    def _adds_none(self, t: int) -> bool:
        """Tell whether the step from `t` has a noise of std 0, in a member that adds noise."""
        return t in self._landing_on_data

    def _check_noise_is_said(
        self, model_output: torch.Tensor, sample: torch.Tensor, timestep: int | torch.Tensor
    ) -> None:
        """Refuse to leave out a variance that the network told, where `noise_is_unsaid`.

        Where the timestep cannot be read for free, every planned step is taken for it.

        Args:
            model_output: of the network.
            sample: (B, C, ...).
            timestep: of the step.
        """
        config, key = self.config, self._noise_key
        assert key is not None  # a class without it adds no noise
        if model_output.shape == sample.shape:
            return
        if isinstance(timestep, torch.Tensor):
            asked = read_if_free(timestep)
        else:
            asked = self._check_timestep(timestep)
        asked = self._plan if asked is None else asked
        if all(self._adds_none(t) for t in (asked if isinstance(asked, list) else [asked])):
            return
        if _has_half(model_output, sample):
            used = "`reverse_variance='learned_range'` with `eta=1.0` uses it"
            if key == "variance_type":
                used = "`variance_type='learned_range'` uses it"
            elif config.get("variance_type") == "learned":
                used = "`MarkovianDDPMScheduler` uses it"
            raise ValueError(
                f"`{key}` is not set, but the step adds noise and `model_output` has twice the "
                "channels of `sample`: a variance that the network predicts. Say in `from_config` "
                f"which noise is added: {used}, `{key}={UNSAID[key]!r}` leaves it out."
            )

    def _add_history(
        self,
        out: torch.Tensor,
        multistep: Multistep,
        timestep: int | torch.Tensor,
        number: Any,
        x0: torch.Tensor,
        x: torch.Tensor,
        m: torch.Tensor,
    ) -> None:
        """Add sum_j w_j (e_j - e_0) to `out`, and keep e_0 for the steps to come.

        The predictions before count only if they were made at the planned timesteps just before
        this one; otherwise the step has order 1, as at the start.
        """
        if isinstance(timestep, torch.Tensor):
            t = timestep.to(multistep.before.device, torch.int64).reshape(1)
        else:
            t = torch.full((1,), timestep, dtype=torch.int64, device=multistep.before.device)
        # a copy: the network or the caller may write into what it was made of
        if multistep.estimate is None:
            e = x0.clone()
        else:
            e_x0, e_x, e_m = multistep.estimate.index_select(0, t).unbind(1)
            e = torch.mul(x0, e_x0).addcmul_(x, e_x).addcmul_(m, e_m)
        count = multistep.weights.shape[0] - 1
        past, thread = self._past, None
        if not torch.compiler.is_dynamo_compiling():
            thread = threading.get_ident()
            if number is None and isinstance(timestep, torch.Tensor) and timestep.ndim == 1:
                number = read_if_free(timestep.reshape(()))
            if number == self._plan[0]:  # nothing of another run is touched
                none = (torch.zeros_like(e),) * (count - 1)
                self._past = Past((e, *none), torch.zeros_like(t), t, thread)
                self._runs[thread] = self._planned_times
                return
            self._check_thread(past, thread)
        if past is None or not _alike(past.predictions, e, count):
            past = Past((torch.zeros_like(e),) * count, torch.zeros_like(t), torch.full_like(t, -1))
        follows = multistep.before.index_select(0, t) == past.timestep
        known = torch.where(follows, (past.known + 1).clamp(max=count), 0)
        weights = multistep.weights[known, t].unbind(1)
        for j, (earlier, weight) in enumerate(zip(past.predictions, weights, strict=True)):
            # not a product with 0 alone: what an abandoned run left may be NaN
            out.addcmul_(torch.where(known > j, earlier - e, 0.0), weight)
        self._past = Past((e, *past.predictions[:-1]), known, t, thread)
        if thread is not None:
            self._runs[thread] = self._planned_times

    def _check_thread(self, past: Past | None, thread: int) -> None:
        """Refuse a step in the middle of a run whose history another thread has replaced."""
        owner = thread if past is None else past.thread
        if owner in (None, thread) and self._runs.get(thread, -1) in (-1, self._planned_times):
            return
        raise RuntimeError(
            f"Two threads share a scheduler of `solver_order`={self.config.solver_order}: another "
            "thread has planned or stepped in the middle of this run, and the history of "
            "predictions is not of this run. Give each thread its own, e.g. by `copy.deepcopy`."
        )

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the sample as it is: a variance-preserving process needs no scaling."""
        check_tensors(sample=sample)
        return sample

    def _forward_coefficients(
        self, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._follow()
        # as stock: training scripts index `alphas_cumprod` with timesteps of the device they train
        # on
        elsewhere = self._public["alphas_cumprod"].device != sample.device
        if elsewhere and not sample.is_meta and holds_numbers(sample):
            moved = self._public["alphas_cumprod"].to(device=sample.device)
            self._publish("alphas_cumprod", moved)
        key = (sample.device, compute_dtype(sample))
        if key not in self._forward:
            made = self._make_roots(key[1]).to(key[0])
            if torch.jit.is_tracing() or not holds_numbers(made):
                return self._picked(made, timesteps, sample.ndim)
            self._forward[key] = made
        return self._picked(self._forward[key], timesteps, sample.ndim)

    @outside_modes
    def _make_roots(self, dtype: torch.dtype) -> torch.Tensor:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), (T, 2)."""
        return torch.stack([self._alpha_bar.sqrt(), (1 - self._alpha_bar).sqrt()], dim=1).to(dtype)

    @staticmethod
    def _picked(
        roots: torch.Tensor, timesteps: torch.Tensor, ndim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        picked = _pick(roots, timesteps, "timesteps")
        shape = (-1,) + (1,) * (ndim - 1)
        return picked[:, 0].reshape(shape), picked[:, 1].reshape(shape)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, Eq. 4).

        Args:
            original_samples: x_0, (B, ...), any floating dtype; computed in float32 or better.
            noise: standard Gaussian, the same shape.
            timesteps: integers in 0 .. T - 1, shape (B,), (1,) or ().
        """
        _check_pair(original_samples=original_samples, noise=noise)
        root, rest = self._forward_coefficients(original_samples, timesteps)
        dtype = torch.promote_types(original_samples.dtype, noise.dtype)
        return (root * original_samples + rest * noise).to(dtype)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (arXiv:2202.00512, App. D).

        Args:
            sample: x_0, (B, ...), any floating dtype; computed in float32 or better.
            noise: standard Gaussian, the same shape.
            timesteps: integers in 0 .. T - 1, shape (B,), (1,) or ().
        """
        _check_pair(sample=sample, noise=noise)
        root, rest = self._forward_coefficients(sample, timesteps)
        return (root * noise - rest * sample).to(torch.promote_types(sample.dtype, noise.dtype))

    def __len__(self) -> int:
        """Return T, the number of training timesteps."""
        return self.config.num_train_timesteps


def _beta_settings(config: Any) -> str:
    return repr([config.get(name) for name in BETA_KEYS])


def _each(table: Table, change: Callable[[torch.Tensor], torch.Tensor]) -> Table:
    multistep = table.multistep
    if multistep is not None:
        changed: Any = (None if part is None else change(part) for part in multistep)
        multistep = Multistep(*changed)
    return table._replace(rows=change(table.rows), multistep=multistep)


def _alike(predictions: tuple[torch.Tensor, ...], e: torch.Tensor, count: int) -> bool:
    """Tell whether a history is of this run: its length, and the shape, dtype and device of `e`."""
    newest = predictions[0]
    same = newest.shape == e.shape and newest.dtype == e.dtype and newest.device == e.device
    if same and not torch.compiler.is_dynamo_compiling():
        modes = [getattr(each, "fake_mode", None) for each in (newest, e)]
        same = modes[0] is modes[1] and holds_numbers(newest) == holds_numbers(e)
    return same and len(predictions) == count


def fold(x0: Coefficients, eps: Coefficients, row: Transition, clipped: bool) -> list[torch.Tensor]:
    """Return the columns out_x0, out_x, out_m of a transition whose eps_hat is the network's own.

    Without clipping x0_hat = x0_x x_t + x0_m m is folded in, in float64: x0_hat itself is large and
    nearly cancels at large t, where a float32 step that goes through it loses digits.
    """
    if clipped:
        return [row.x0, row.eps * eps[0], row.eps * eps[1]]
    zero = torch.zeros_like(row.x0)
    return [zero, row.x0 * x0[0] + row.eps * eps[0], row.x0 * x0[1] + row.eps * eps[1]]


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor outlives the mode that it was made in.

    What `FakeTensorMode`, `torch.export`, `torch.func.vmap` and the like pass around has no
    storage to point to. `torch.compile` takes care of what its code keeps.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def check_tensors(**tensors: Any) -> None:
    """Refuse what is no tensor.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` is {reprlib.repr(value)}; it must be a tensor.")


def _check_pair(**tensors: Any) -> None:
    """Refuse two tensors that cannot be added: no tensors, of no floating dtype, on two devices.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_tensors(**tensors)
    (first, data), (second, noise) = tensors.items()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` has dtype {tensor.dtype}; it must be a floating dtype.")
    if noise.device != data.device:
        raise ValueError(
            f"`{second}` is on the device {noise.device}; it must be on that of `{first}`, "
            f"{data.device}."
        )


def _pick(rows: torch.Tensor, timesteps: torch.Tensor, name: str) -> torch.Tensor:
    """Return the rows of a tensor of timesteps, one after the other.

    On an accelerator nothing is read back, and a timestep out of range is the device's own error.
    """
    check_tensors(**{name: timesteps})
    if timesteps.is_meta and not rows.is_meta:
        raise ValueError(
            f"`{name}` is on the device 'meta' and has no values; it must be on the device of the "
            f"sample, {rows.device}, or on the CPU."
        )
    if timesteps.dtype not in INTEGER_DTYPES:
        raise ValueError(f"`{name}` has dtype {timesteps.dtype}; it must be an integer tensor.")
    index = timesteps.to(rows.device, torch.int64).reshape(-1)
    try:
        return rows.index_select(0, index)
    except IndexError as error:
        raise ValueError(
            f"`{name}` is {timesteps}; each must be an integer in 0 .. {rows.shape[0] - 1}."
        ) from error


def read_if_free(timestep: torch.Tensor) -> int | list[int] | None:
    """Return the integer or integers of a timestep where looking at them costs nothing.

    None on an accelerator, which a read-back would wait for; in traced code; and for a tensor
    without a value, as `torch.func.vmap` and `make_fx` pass it.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or not timestep.is_cpu or timestep.dtype not in INTEGER_DTYPES:
        return None
    try:  # not `tolist`, which hands `make_fx` a constant
        return int(timestep) if timestep.ndim == 0 else [int(t) for t in timestep.flatten()]
    except RuntimeError:
        return None


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return float64 if one of the tensors has it, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in a dtype; `Tensor.to` costs more where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _noise_like(
    prediction: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
    variance_noise: torch.Tensor | None,
) -> torch.Tensor:
    if variance_noise is None:
        # the same call as stock diffusers, so that a swap keeps the noise of a seed
        return randn_tensor(
            prediction.shape, generator=generator, device=prediction.device, dtype=prediction.dtype
        )
    if generator is not None:
        raise ValueError("`generator` and `variance_noise` are both given; pass one of them.")
    _check_pair(model_output=prediction, variance_noise=variance_noise)
    if variance_noise.shape != prediction.shape:
        raise ValueError(
            f"`variance_noise` has shape {tuple(variance_noise.shape)}; it must be "
            f"{tuple(prediction.shape)}."
        )
    return variance_noise


def _has_half(model_output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Tell whether the output has twice the channels of the sample, and is as large otherwise."""
    shape = sample.shape
    return len(shape) > 1 and model_output.shape == (shape[0], 2 * shape[1], *shape[2:])


def _check_length(name: str, length: int, num_inference_steps: int | None) -> None:
    if num_inference_steps is not None and num_inference_steps != length:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}, but `{name}` has {length} values; "
            f"pass {length} or None."
        )
