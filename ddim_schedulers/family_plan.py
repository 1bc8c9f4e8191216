"""The process and the plan of a scheduler: made from the config, and made again where it changes.

`planning` chooses the timesteps; here they become the trajectory that a scheduler steps along.
"""

import numbers
import operator
import threading
from collections.abc import Iterable
from typing import Any

import torch

from .attributes import FamilyAttributesMixin, checked_plan, is_part, mark_of
from .betas import (
    check_num_train_timesteps,
    explicit_betas,
    make_betas,
    rescale_zero_terminal_snr,
    shift_snr,
)
from .config_types import check_types
from .family_config import BETA_KEYS, FamilyConfigMixin, check_names, check_planned
from .modes import outside_modes
from .planning import bound_member, planned_timesteps
from .scales import is_one
from .solver_tables import SolverTable
from .step_inputs import pick_rows
from .timesteps import check_num_inference_steps, landing, make_timesteps, pairs


class FamilyPlanMixin(FamilyAttributesMixin, FamilyConfigMixin):
    """The process and the plan of a scheduler, which follow its config and its attributes."""

    _settings: Any  # what steps ask of the config
    _forward: dict[tuple, torch.Tensor]
    _optimal_plans: dict[tuple, list[int]]
    _past: Any  # the history of the latest steps; a new plan has none
    _planned_times: int
    _runs: dict[int, int]
    _stored: SolverTable | None = None  # the stored sampler that the plan follows

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
        stored = self._stored
        self._set_plan(plan, stride)
        self._restore(stored)

    @outside_modes
    def _set_plan(
        self, timesteps: list[int], stride: int | None = None, stored: SolverTable | None = None
    ) -> None:
        """Fix the trajectory: where a step from each t lands, for planned and other timesteps.

        The tables stay if neither the trajectory nor the config has changed.

        Args:
            timesteps: the trajectory, strictly decreasing.
            stride: where every step goes this far down instead, from any timestep.
            stored: the sampler whose trajectory it is.
        """
        self._past = None
        if not torch.compiler.is_dynamo_compiling():
            self._planned_times += 1
            self._runs[threading.get_ident()] = self._planned_times
        config = self.config
        same = config is self._planned_config and config.changes == self._planned_changes
        if timesteps == self._plan and stride == self._stride and stored == self._stored and same:
            return
        self._plan, self._stride, self._stored = timesteps, stride, stored
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
        config = self._internal_dict  # quicker than the property `config`, and every step runs this
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
        stored = self._stored
        self._set_plan(self._plan, self._stride)
        self._restore(stored)

    def _acting(self, key: str) -> Any:
        """Return a setting that a stored sampler brings along, else that of the config."""
        return self.config[key] if self._stored is None else getattr(self._stored, key)

    def _restore(self, stored: SolverTable | None) -> None:
        """Keep a stored sampler after a change if it still fits, and warn if it does not."""

    def _take_trajectory(self, listed: list[Any]) -> None:
        """Plan assigned timesteps; a part of the plan, where each step has its neighbour, stays."""
        if is_part(listed, self._plan):
            return
        planned = checked_plan(self._in_order_of_sampling(listed), len(self))
        before = self._plan, self._stride, self._stored
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
        scale = self._acting("eps_scale")
        if self._plan_has_zero_snr and not is_one(scale):
            raise ValueError(
                f"`eps_scale` is {scale!r} and the trajectory holds a timestep with alpha_bar = 0, "
                "where x_t is eps itself; it must be 1 there, or the timesteps avoid it (e.g. "
                "timestep_spacing='leading')."
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

    def __len__(self) -> int:
        """Return T, the number of training timesteps."""
        return self.config.num_train_timesteps

    def _read_settings(self) -> Any:
        """Return what every step asks of the config."""
        raise NotImplementedError

    def _forget_tables(self) -> None:
        """Drop the tables of the plan before."""
        raise NotImplementedError


def _beta_settings(config: Any) -> str:
    return repr([config.get(name) for name in BETA_KEYS])
