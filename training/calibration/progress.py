"""What a calibration says on its way: where it is, and how long it lasts at most."""

import time
from collections.abc import Callable, Mapping

from ddim_schedulers.training.common.durations import duration

EVERY = 10.0  # seconds between lines that tell of small things


class Progress:
    """Lines of text with the time that is left at most, at the speed so far.

    Args:
        say: called with a line of text, or None.
        costs: network evaluations of each number of calls at most, in the order of the work.
        spent: returns the evaluations of this process so far.
        processes: that share the evaluations.
    """

    def __init__(
        self,
        say: Callable[[str], object] | None,
        costs: Mapping[int, int],
        spent: Callable[[], int],
        processes: int,
    ) -> None:
        self._say, self._spent, self._processes = say or (lambda line: None), spent, processes
        self._ahead, self._now, self._before = dict(costs), 0, 0
        self._began = self._said = time.perf_counter()

    def begin(self, calls: int) -> None:
        """Go on with a number of calls."""
        self._now, self._before = self._ahead.pop(calls), self._spent()

    def __call__(self, line: str) -> None:
        """Say a line."""
        self._said = time.perf_counter()
        self._say(line + self._left())

    def tick(self, line: str) -> None:
        """Say a line of which there are many, now and then."""
        if time.perf_counter() - self._said >= EVERY:
            self(line)

    def _left(self) -> str:
        spent = self._spent()
        if not spent:
            return ""
        now = max(0, self._now - self._processes * (spent - self._before))
        left = (now + sum(self._ahead.values())) / self._processes
        seconds = left * (time.perf_counter() - self._began) / spent
        return f"; at most {duration(seconds)} left"


def cost_line(costs: Mapping[int, int]) -> str:
    """Return what a calibration costs at most, in words."""
    each = ", ".join(f"{cost:,} for {calls} calls" for calls, cost in costs.items())
    said = f"at most {sum(costs.values()):,} network evaluations of one sample"
    return said if len(costs) == 1 else f"{said}: {each}"
