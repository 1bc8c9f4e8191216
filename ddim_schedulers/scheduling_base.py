"""What the three scheduler classes share: the plan, one step, and noise for training.

A step is a row of a table (`tables`). With m the model output and z ~ N(0, I),

    x0_hat = x0_x x_t + x0_m m                          clipped or thresholded, if asked
    x_s    = out_x0 x0_hat + out_x x_t + out_m m + std z    if x0_hat is clipped
    x_s    = out_x x_t + out_m m + std z                    if not: x0_hat is folded in

The rows of all T timesteps are computed in float64 on the CPU once per (trajectory, eta) and kept
on the device of the sample; `step` looks up its row and reads nothing back.
"""

import numbers
import operator
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, KarrasDiffusionSchedulers
from diffusers.utils import logging

from .attributes import FamilyAttributesMixin, checked_plan, is_part, mark_of
from .betas import (
    check_num_train_timesteps,
    explicit_betas,
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
    unsaid_noise,
    written,
)
from .history import FamilyHistoryMixin, Past
from .modes import outside_modes
from .optimal import (
    x0_variance,
)
from .parameterization import (
    dynamic_threshold,
)
from .planning import (
    bound_member,
    check_calibration,
    largest_x0,
    measured_statistics,
    planned_timesteps,
)
from .reverse_noise import OWN, LearnedNoise, Noise, Steps, noise_named
from .step_inputs import (
    cast_to,
    check_pair,
    check_tensors,
    compute_dtype,
    has_half,
    holds_numbers,
    noise_like,
    pick_rows,
    read_if_free,
    split_output,
)
from .tables import Table, late_noise_limit, reverse_table
from .timesteps import (
    check_num_inference_steps,
    landing,
    make_timesteps,
    pairs,
)

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
    learned: LearnedNoise | None  # the same where the network tells it
    noise_is_unsaid: bool  # though the network tells a variance


class FamilySchedulerMixin(FamilyHistoryMixin, FamilyAttributesMixin, FamilyConfigMixin):
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
        check_calibration(self.config, self._alpha_bar, self._settings.noise)

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

    def _bound_member(self) -> tuple[str, float]:
        return bound_member(self.config)

    def _resolve_timesteps(
        self, num_inference_steps: int | None, timesteps: Iterable[int] | None
    ) -> list[int]:
        """Return the trajectory that the arguments and the config ask for."""
        process = self._alpha_bar, self.alpha_bar_end
        member, kept = self._bound_member(), self._optimal_plans
        return planned_timesteps(
            self.config, *process, member, kept, num_inference_steps, timesteps
        )

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
        return reverse_table(steps, noise, prediction, self._clips(), rederive, dtype)

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
            picked = pick_rows(values.to(timestep.device), timestep, "timestep")
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
        picked = pick_rows(roots, timesteps, "timesteps")
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
        check_pair(original_samples=original_samples, noise=noise)
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
        check_pair(sample=sample, noise=noise)
        root, rest = self._forward_coefficients(sample, timesteps)
        return (root * noise - rest * sample).to(torch.promote_types(sample.dtype, noise.dtype))

    def __len__(self) -> int:
        """Return T, the number of training timesteps."""
        return self.config.num_train_timesteps


def _beta_settings(config: Any) -> str:
    return repr([config.get(name) for name in BETA_KEYS])
