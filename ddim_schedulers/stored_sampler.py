"""The sampler that a calibration stores: when a scheduler follows its table, and when it does not.

`solver_tables` says what is in a table. One is followed from the first planned timestep on, in the
order of the plan, and only while the config and the network's images are those it was made for.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .history import Past
from .scheduling_base import FamilySchedulerMixin, logger
from .sigmas import check_eta
from .solver_rows import difference_columns
from .solver_tables import (
    Guidance,
    SolverTable,
    guidance_of,
    misfit,
    solver_table_of,
    stored_calls,
)
from .step_inputs import check_one_timestep, holds_numbers, read_if_free
from .tables import Multistep
from .timesteps import check_num_inference_steps


class StoredSamplerMixin(FamilySchedulerMixin):
    """A scheduler of the family that may follow a stored table."""

    _guidance: Guidance | None  # of the run; a table was made at one guidance
    _said_of_tables: set[str]
    _input_rows: int | None = None  # what a loop last asked the network for

    def _stored_for(
        self, calls: int | None, timesteps: Iterable[int] | None, member: torch.Tensor | None
    ) -> SolverTable | None:
        """Return the stored sampler that the config asks for, if there is one that fits."""
        config = self.config
        if not config.solver_calibrated or torch.compiler.is_dynamo_compiling():
            return None
        if calls is None and timesteps is None and config.timesteps is None:
            return None  # `set_timesteps` refuses it later
        if timesteps is not None or config.timesteps is not None:
            self._without_table("timesteps")
            return None
        if member is not None:
            self._without_table("sigma")
            return None
        calls = check_num_inference_steps(calls, len(self))  # type: ignore[arg-type]
        table = solver_table_of(config.calibration, calls, len(self))
        if table is None:
            there = stored_calls(config.calibration)
            self._without_table("calls", f"{calls} calls, stored: {there}")
            return None
        why = misfit(table, config, self._alpha_bar, self.alpha_bar_end)
        if why is not None:
            self._without_table(why)
            return None
        said = f"{calls} calls: the stored table, timesteps {table.timesteps}."
        if said not in self._said_of_tables:
            self._said_of_tables.add(said)
            logger.info(said)
        return table

    def _without_table(self, why: str, more: str = "") -> None:
        """Say once that a stored sampler is not used, in a word why, and what takes its place."""
        if why + more in self._said_of_tables:
            return
        self._said_of_tables.add(why + more)
        logger.warning(
            f"`solver_calibrated` is True, but the stored tables do not fit: {why}"
            f"{more and f' ({more})'}. The steps are those of `solver_order`="
            f"{self.config.solver_order} without a table."
        )

    def _restore(self, stored: SolverTable | None) -> None:
        if stored is None or self._plan != stored.timesteps:
            return
        config = self.config
        why = misfit(stored, config, self._alpha_bar, self.alpha_bar_end)
        why = why if config.solver_calibrated else "solver_calibrated"
        if why is None:
            self._set_plan(self._plan, self._stride, stored)
        else:
            self._without_table(why)

    def _take_trajectory(self, listed: list[Any]) -> None:
        before = self._stored
        super()._take_trajectory(listed)
        self._tell_of_other_plan(before)

    def _take_number(self, number: int | None) -> None:
        before = self._stored
        super()._take_number(number)
        self._tell_of_other_plan(before)

    def _tell_of_other_plan(self, before: SolverTable | None) -> None:
        if before is not None and self._stored is None:
            self._without_table("timesteps")

    def without_table(self, why: str) -> None:
        """Go on without the stored sampler of the plan, if any: it was not made for this run.

        A caller that changes what the network says, as guidance does, calls it after
        `set_timesteps`. The timesteps stay; clipping, eta and weights are those of the config.

        Args:
            why: in a word, for the log.
        """
        if self._stored is not None:
            self._without_table(why)
            self._set_plan(self._plan, self._stride)

    @property
    def follows_table(self) -> bool:
        """Tell whether the plan follows a stored sampler."""
        return self._stored is not None

    def note_guidance(self, scale: float, interval: Sequence[float] | None = None) -> None:
        """Note the classifier-free guidance of the run: a stored sampler belongs to one of it.

        A loop calls it after `set_timesteps`. Until it does, the run counts as unguided. A stored
        sampler that was made at another scale or interval is not used, as in `without_table`.

        Args:
            scale: w; 1 is no guidance.
            interval: [low, high], shares of t / T where it acts; None for everywhere.
        """
        self._guidance = guidance_of(scale, interval)
        if self._stored is not None and self._stored.guidance != self._guidance:
            self.without_table("guidance")

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the sample as it is: a variance-preserving process needs no scaling.

        A loop of diffusers that guides asks for twice the samples that it steps with: so a stored
        table knows of guidance that nobody noted.
        """
        if self._stored is not None and isinstance(sample, torch.Tensor):
            self._input_rows = len(sample)
        return super().scale_model_input(sample, timestep)

    def _check_table_fits(
        self,
        sample: torch.Tensor,
        timestep: int | torch.Tensor,
        eta: float,
        dtype: torch.dtype,
    ) -> None:
        """Do without the stored sampler where this step is not one that it was made for."""
        stored = self._stored
        assert stored is not None
        check_one_timestep(timestep, self._settings.solver_order)
        rows = self._input_rows if self._guidance is None else None
        if stored.guidance != self._guidance or (rows is not None and rows > len(sample)):
            return self.without_table("guidance")
        if stored.shape is not None and list(sample.shape[1:]) != stored.shape:
            return self.without_table("shape")
        if self.config.eta is None and check_eta(eta) not in (0, stored.eta):
            return self.without_table("eta")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        why = "start"
        if self._past is not None:
            newest = self._past.predictions[0]
            before = newest.shape, newest.dtype, newest.device
            if before == (sample.shape, dtype, sample.device):
                return None if self._goes_on(self._past, timestep) else self.without_table(why)
            why = "batch"
        # the first step of a run, or of another batch: this reads a number from the device, once
        number = timestep
        if isinstance(timestep, torch.Tensor):
            told = holds_numbers(timestep) and not timestep.is_meta
            number = int(timestep) if told else self._plan[0]
        return None if number == self._plan[0] else self.without_table(why)

    def _goes_on(self, past: Past, timestep: int | torch.Tensor) -> bool:
        """Tell whether a step starts a run or follows the one before, as far as this is free."""
        if past.thread not in (None, threading.get_ident()):
            return True  # the step refuses it later
        before = read_if_free(past.timestep.reshape(()))
        number: Any = timestep
        if isinstance(timestep, torch.Tensor):
            number = read_if_free(timestep.reshape(()))
        if before is None or number is None or number == self._plan[0]:
            return True
        return bool(self._landing[before] == number)

    def _with_stored_weights(self, made: Multistep, dtype: torch.dtype) -> Multistep:
        assert self._stored is not None
        differences, place = difference_columns(self._stored, len(self))
        end = self._scales().end
        if end is not None:
            differences = differences * end[:, None]
        return made._replace(differences=differences.to(dtype), place=place)
