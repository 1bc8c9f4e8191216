"""The row of an evaluation to use under a limit of calls or seconds, and how sure it is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddim_schedulers.training.common.scatter import student
from ddim_schedulers.training.metrics.distances import METRICS


@dataclass(frozen=True)
class Candidate:
    """A row with one number of steps, measured.

    Attributes:
        row: its name.
        steps: S.
        network_calls: for one image.
        seconds: for all n images; None where they are not known.
        mean: of the metric, over the repetitions.
        std: their standard deviation, None for one repetition.
        repeats: how many repetitions.
    """

    row: str
    steps: int
    network_calls: int
    seconds: float | None
    mean: float
    std: float | None
    repeats: int

    @property
    def std_error(self) -> float | None:
        """Return the standard error of the mean; None for one repetition."""
        return None if self.std is None else self.std / math.sqrt(self.repeats)

    def __str__(self) -> str:
        error = "of one repetition" if self.std_error is None else f"+- {self.std_error:.3g}"
        return f"{self.row}, S = {self.steps}: {self.mean:.4g} {error}"


@dataclass(frozen=True)
class Recommendation:
    """The best row under a limit.

    Attributes:
        best: the row.
        rivals: rows whose difference to it may be scatter, the best first.
        limit: in words.
        features: the feature space.
        metric: by its key in `METRICS`.
        n: samples of each repetition.
    """

    best: Candidate
    rivals: tuple[Candidate, ...]
    limit: str
    features: str
    metric: str
    n: int

    def lines(self) -> list[str]:
        """Return it in words."""
        name = METRICS[self.metric].name
        said = [f"Best under {self.limit} by {name} in {self.features}, n = {self.n}: {self.best}."]
        if self.best.std is None:
            said.append("How far it scatters is not known: `repeats` is 1.")
        elif self.rivals:
            said.append(f"Within its scatter: {'; '.join(map(str, self.rivals))}.")
        else:
            said.append("Every other row is further away than the scatter explains.")
        return said


def recommend(
    results: Mapping[str, Any],
    *,
    calls: int | None = None,
    seconds: float | None = None,
    features: str | None = None,
    metric: str = "frechet",
) -> Recommendation:
    """Return the best row under a limit.

    Two rows may differ by scatter alone where the difference of their means is at most Student's t
    (97.5 percent, of both rows' repetitions) times its standard error, or where one of them has
    one repetition.

    Args:
        results: the contents of metrics.json.
        calls: the most network calls for an image.
        seconds: the longest time for the n samples of a table.
        features: the feature space; None is the first one.
        metric: a key of `METRICS`.

    Raises:
        ValueError: no limit, nothing that keeps to it, tables of different n, or a metric or
            feature space that was not measured.
    """
    if calls is None and seconds is None:
        raise ValueError("`calls` and `seconds` are None; one of them must be a limit")
    features = results["features"][0] if features is None else features
    if features not in results["features"]:
        raise ValueError(f"`features` is {features!r}; it must be one of {results['features']}")
    if metric not in METRICS:
        raise ValueError(f"`metric` is {metric!r}; it must be one of {list(METRICS)}")
    sizes = {table["n"] for table in results["tables"]}
    if len(sizes) != 1:
        raise ValueError(f"`n` is {sorted(sizes)} in the tables; rows are compared at one n")
    every = {
        (cell["row"], cell["steps"]): _candidate(cell, features, metric)
        for table in results["tables"]
        for cell in table["cells"]
        if metric in cell["metrics"][features]
    }
    allowed = [
        each
        for each in every.values()
        if (calls is None or each.network_calls <= calls)
        and (seconds is None or (each.seconds is not None and each.seconds <= seconds))
    ]
    said = [] if calls is None else [f"{calls} calls"]
    limit = " and ".join([*said, *([] if seconds is None else [f"{seconds:g} seconds"])])
    if not allowed:
        raise ValueError(f"`tables` hold no row under {limit} with {metric} in {features}")
    sign = 1 if METRICS[metric].distance else -1
    allowed.sort(key=lambda each: sign * each.mean)
    best, *others = allowed
    rivals = tuple(each for each in others if not _differs(best, each))
    return Recommendation(best, rivals, limit, features, metric, sizes.pop())


def _candidate(cell: Mapping[str, Any], features: str, metric: str) -> Candidate:
    measured = cell["metrics"][features][metric]
    return Candidate(
        cell["row"],
        cell["steps"],
        cell["network_calls"],
        cell["seconds"],
        measured["mean"],
        measured["std"],
        cell["repeats"],
    )


def _differs(a: Candidate, b: Candidate) -> bool:
    if a.std_error is None or b.std_error is None:
        return False
    error = math.hypot(a.std_error, b.std_error)
    return abs(a.mean - b.mean) > student(a.repeats + b.repeats - 2) * error
