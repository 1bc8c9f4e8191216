"""The predictions that a step of higher order remembers, and to which run they belong."""

import threading
from typing import Any, NamedTuple

import torch

from .step_inputs import holds_numbers, read_if_free
from .tables import Multistep


class Past(NamedTuple):
    """The predictions of the latest steps, the newest first, and how many of them belong together.

    All of it stays on the device: whether a step goes on from the one before is decided there, so
    that nothing is read back and no step compiles again.
    """

    predictions: tuple[torch.Tensor, ...]
    known: torch.Tensor  # (1,)
    timestep: torch.Tensor  # (1,), of the newest
    thread: int | None = None  # the thread of the run; None: any thread may go on
    start: torch.Tensor | None = None  # x_T of the run, for a stored table


class FamilyHistoryMixin:
    """The history of a scheduler: what its latest steps predicted."""

    config: Any
    _plan: list[int]
    _past: Past | None
    _planned_times: int  # how often a plan was made
    _runs: dict[int, int]  # which plan each thread last saw: a history belongs to one

    def forget_history(self) -> None:
        """Forget the predictions of earlier steps: the next step has order 1, as the first one.

        For a caller whose predictions change their meaning in the middle of a run.
        """
        self._past = None

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
        count = multistep.memory
        past, thread = self._past, None
        if not torch.compiler.is_dynamo_compiling():
            thread = threading.get_ident()
            if number is None and isinstance(timestep, torch.Tensor) and timestep.ndim == 1:
                number = read_if_free(timestep.reshape(()))
            if number == self._plan[0]:  # a new run: the history of another one stays as it is
                none = (torch.zeros_like(e),) * (count - 1)
                self._past = Past((e, *none), torch.zeros_like(t), t, thread)
                self._runs[thread] = self._planned_times
                if multistep.differences is not None:
                    self._past = self._past._replace(start=x.clone())
                    of_start, of_e, *_ = multistep.differences.index_select(0, t).unbind(1)
                    out.addcmul_(x, of_start).addcmul_(e, of_e)
                return
            self._check_thread(past, thread)
        if past is None or not _alike(past.predictions, e, count):
            # separate tensors: torch compiles again when two inputs begin or cease to be the same
            none = tuple(torch.zeros_like(e) for _ in range(count))
            past = Past(none, torch.zeros_like(t), torch.full_like(t, -1))
        follows = multistep.before.index_select(0, t) == past.timestep
        known = torch.where(follows, (past.known + 1).clamp(max=count), 0)
        own = multistep.weights.shape[0] - 1
        weights = multistep.weights[known.clamp(max=own), t].unbind(1)
        for j, (earlier, weight) in enumerate(zip(past.predictions[:own], weights, strict=True)):
            # not a product with 0 alone: what an abandoned run left may be NaN
            out.addcmul_(torch.where(known > j, earlier - e, 0.0), weight)
        start = self._add_differences(out, multistep, past, known, t, number, x, e)
        self._past = Past((e, *past.predictions[:-1]), known, t, thread, start)
        if thread is not None:
            self._runs[thread] = self._planned_times

    def _add_differences(
        self,
        out: torch.Tensor,
        multistep: Multistep,
        past: Past,
        known: torch.Tensor,
        t: torch.Tensor,
        number: Any,
        x: torch.Tensor,
        e: torch.Tensor,
    ) -> torch.Tensor | None:
        """Add what a stored table adds, where every step of the run so far is known.

        Returns:
            x_T of the run; of any other tensor in its shape where that is not known.
        """
        if multistep.differences is None or multistep.place is None:
            return None
        place = multistep.place.index_select(0, t)
        before = x if past.start is None else past.start
        start = torch.where(place == 0, x, before)
        # a run of S steps has no more than S - 1 behind it
        whole = known == place
        of_start, of_e, *weights = multistep.differences.index_select(0, t).unbind(1)
        out.addcmul_(torch.where(whole, start, 0.0), of_start)
        out.addcmul_(torch.where(whole, e, 0.0), of_e)
        most = self._plan.index(number) if number in self._plan else len(weights)
        for j, weight in enumerate(weights[:most]):
            earlier = torch.where(whole & (known > j), past.predictions[j], 0.0)
            out.addcmul_(earlier, weight)
        return start

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


def _alike(predictions: tuple[torch.Tensor, ...], e: torch.Tensor, count: int) -> bool:
    """Tell whether a history is of this run: its length, and the shape, dtype and device of `e`."""
    newest = predictions[0]
    same = newest.shape == e.shape and newest.dtype == e.dtype and newest.device == e.device
    if same and not torch.compiler.is_dynamo_compiling():
        modes = [getattr(each, "fake_mode", None) for each in (newest, e)]
        same = modes[0] is modes[1] and holds_numbers(newest) == holds_numbers(e)
    return same and len(predictions) == count
