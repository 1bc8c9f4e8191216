"""What the three scheduler classes share: one step, and what it asks of the config.

The plan is in `family_plan`, the noise for training in `forward`.

A step is a row of a table (`tables`). With m the model output and z ~ N(0, I),

    x0_hat = x0_x x_t + x0_m m                          clipped or thresholded, if asked
    x_s    = out_x0 x0_hat + out_x x_t + out_m m + std z    if x0_hat is clipped
    x_s    = out_x x_t + out_m m + std z                    if not: x0_hat is folded in

The rows of all T timesteps are computed in float64 on the CPU once per (trajectory, eta) and kept
on the device of the sample; `step` looks up its row and reads nothing back.
"""

from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, KarrasDiffusionSchedulers
from diffusers.utils import logging

from .betas import terminal_signal
from .config_types import check_types
from .family_config import unsaid_noise, written
from .forward import FamilyForwardMixin
from .history import FamilyHistoryMixin, Past
from .modes import outside_modes
from .optimal import x0_variance
from .parameterization import dynamic_threshold
from .planning import check_calibration, largest_x0, measured_statistics
from .reverse_noise import OWN, LearnedNoise, Noise, Steps, noise_named
from .scales import Scales, scales_of
from .step_inputs import (
    cast_to,
    check_tensors,
    compute_dtype,
    has_half,
    holds_numbers,
    noise_like,
    pick_rows,
    read_if_free,
    split_output,
    unsaid_variance,
)
from .tables import Table, late_noise_limit, reverse_table

logger = logging.get_logger(__name__)

# A sweep over eta without a new plan makes a table for each value; more than these are not kept.
MAX_TABLES = 64

# The columns of a longer plan are not kept: 3.4 kB a row.
MAX_COLUMNS = 1000


class StepSettings(NamedTuple):
    """What every step asks of the config, read once for each state of it."""

    clips: bool
    thresholds: bool
    clip_range: float
    eta: float | None
    solver_order: int
    noise: Noise
    learned: LearnedNoise | None  # the same object, if the network predicts the variance
    noise_is_unsaid: bool  # no setting names a noise, and the network predicts one


class FamilySchedulerMixin(FamilyHistoryMixin, FamilyForwardMixin):
    """The common part of the scheduler classes, in front of `SchedulerMixin` and `ConfigMixin`."""

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    config_name: Any = SCHEDULER_CONFIG_NAME
    # the setting that names the noise; the deterministic member needs none
    _noise_key: str | None = None
    _settings: StepSettings

    @outside_modes
    def _make_tables(self) -> None:
        """Compute the betas and what depends on them; called once, at the end of `__init__`."""
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
        check_calibration(self.config, self._alpha_bar, self._settings.noise)

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
                thread=None,
                predictions=tuple(e.detach() for e in past.predictions),
                start=None if past.start is None else past.start.detach(),
            )
        anew: dict[str, Any] = {
            "_tables": {},
            "_newest": None,
            "_forward": {},
            "_marks": {},
            "_runs": {},
        }
        return {**self.__dict__, **anew, "_public": {**self._public}, "_past": past}

    def _read_settings(self) -> StepSettings:
        config, key = self.config, self._noise_key
        noise = OWN if key is None else noise_named(key, config[key])
        stored = self._stored
        limit = config.get("clip_sample_range", 1.0)
        if stored is not None and stored.clip is not None:
            limit = stored.clip
        return StepSettings(
            clips=self._clips(),
            thresholds=bool(config.get("thresholding", False)),
            clip_range=limit,
            eta=config.get("eta") if stored is None else stored.eta,
            solver_order=config.get("solver_order", 1),
            noise=noise,
            learned=noise if isinstance(noise, LearnedNoise) else None,
            noise_is_unsaid=key in unsaid_noise(config),
        )

    def _forget_tables(self) -> None:
        self._tables.clear()
        self._newest = None

    def _steps(self, noise: Noise, sigma: torch.Tensor) -> Steps:
        """Return what the noise may use of each step of the member sigma, (T,)."""
        config, a_t, a_s = self.config, self._alpha_bar, self._alpha_bar_s
        own, largest = None, None
        if noise.needs_calibration:
            gamma = measured_statistics(config, a_t).gamma
            own = x0_variance(gamma, a_t, largest_x0(config) ** 2)
            if config.late_noise_cap is not None or self._clips():
                largest = late_noise_limit(
                    config.late_noise_cap, a_t, a_s, self._landing, sigma, self._plan
                )
        return Steps(a_t, a_s, sigma, own, largest)

    def _table(self, sigma: torch.Tensor, rederive: bool, dtype: torch.dtype) -> Table:
        """Return the table of the reverse transitions of the member sigma, (T,)."""
        self._check_plan_snr()
        noise, prediction = self._settings.noise, self.config.prediction_type
        steps = self._steps(noise, sigma)
        return reverse_table(
            steps, noise, prediction, self._clips(), rederive, dtype, self._scales()
        )

    def _scales(self) -> Scales:
        return scales_of(self._acting("eps_scale"), self._acting("end_scale"), self._landing)

    def _warn_of_terminal_signal(self) -> None:
        """Warn once if sampling starts from another distribution than training ends with."""
        if self._warned_of_terminal or torch.compiler.is_compiling():
            return
        self._warned_of_terminal = True
        wrong = terminal_signal(self._alpha_bar)
        if wrong is not None:
            logger.warning(wrong)

    def _keep(self, key: tuple, table: Table, device: Any) -> Table:
        """Store a table on `device` for the steps to come, and return it."""
        if table.rows.device != device:  # `to` would be part of a traced program
            table = table.each(lambda part: part.to(device))
        if torch.jit.is_tracing() or not holds_numbers(table.rows):
            return table
        if len(self._tables) >= MAX_TABLES:
            self._forget_tables()
        if not torch.compiler.is_compiling():
            with torch.inference_mode(False):  # a later step may be differentiated
                table = table.each(torch.clone) if table.rows.is_inference() else table
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
        if self._stored is not None:
            return self._stored.clip is not None
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
        """Clip x0_hat in place: the step has just made it and holds the only reference."""
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
        picked = pick_rows(table.rows, timestep, "timestep")
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
        prediction, raw_variance = split_output(
            model_output, sample, learned, self._internal_dict, self._noise_key
        )
        number: Any = timestep
        if isinstance(timestep, torch.Tensor):
            number = read_if_free(timestep) if timestep.ndim == 0 else None
        columns = self._look_up(table, timestep, number, sample)
        x0_x, x0_m, out_x0, out_x, out_m, std, *bounds = columns
        dtype = table.rows.dtype
        x, m = cast_to(sample, dtype), cast_to(prediction, dtype)
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
            noise = cast_to(noise_like(prediction, generator, variance_noise), dtype)
            if learned is not None and raw_variance is not None:
                # where no noise is added the network may say anything, and a NaN of the root or of
                # its gradient would survive a product with 0
                raw = torch.where(std > 0, raw_variance.to(dtype), 1.0)
                std = std * learned.std(raw, *bounds)
            out.addcmul_(noise, std)
        return cast_to(out, sample.dtype), cast_to(x0, sample.dtype)

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
        if has_half(model_output, sample):
            raise ValueError(unsaid_variance(config, key))

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the sample as it is: a variance-preserving process needs no scaling."""
        check_tensors(sample=sample)
        return sample
