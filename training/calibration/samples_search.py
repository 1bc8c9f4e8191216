"""Which of many sampler settings comes nearest to the data, by a search that knows its scatter.

Every setting is measured with the same noise, block by block (common random numbers). A distance is
that of all blocks together; the scatter of a difference between two settings is the jackknife's,
which leaves out one block at a time. `race` measures many settings on few blocks and fewer on more
(successive halving). What it finds is compared with the setting that is there now on blocks of
other noise (`compare`), and on twice and four times as many where the gain is not clear yet; only a
gain beyond the scatter counts.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ddim_schedulers.training.calibration.samples_space import (
    MOST_NEIGHBOURS,
    Setting,
    Space,
    neighbours,
)
from ddim_schedulers.training.common.scatter import student
from ddim_schedulers.training.metrics.distances import Gaussian, frechet_of_gaussians, root_of

BLOCKS = 8
# Blocks that are measured before the slower half of a race is left out.
RUNGS = (2, 4, BLOCKS)
KEPT = 3  # settings that a race returns, at most
# Blocks of held-out noise on which a gain that is not clear yet is looked at again.
LOOKS = (BLOCKS, 2 * BLOCKS, 4 * BLOCKS)

Tensors = dict[str, torch.Tensor]


class Estimate(NamedTuple):
    """A number with its standard error."""

    value: float
    std_error: float

    def is_beyond_scatter(self, blocks: int) -> bool:
        """Tell whether it is more than the jackknife's error of so many blocks explains."""
        return self.value > student(blocks - 1) * self.std_error

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.std_error:.2g}"


class Samples:
    """What was measured of the samples of each setting, block by block.

    Args:
        real: the data in each feature space.
        measure: measures settings without `end_scale` on blocks first .. last - 1 and returns, for
            each, tensors whose first dimension is the block and whose second is the place in
            `end_scales`: `SPACE.count`, `SPACE.total` and `SPACE.outer`, sums of the features and
            of their products, and, where `guards` are asked for, the values of `FLOORS`.
        end_scales: what finished samples were multiplied by.
        acting: what a setting does: one of several that act alike is measured.
    """

    def __init__(
        self,
        real: Mapping[str, Gaussian],
        measure: Callable[[Sequence[Setting], int, int], list[Tensors]],
        end_scales: Sequence[float],
        acting: Callable[[Setting], Hashable] = lambda setting: setting,
    ) -> None:
        self.real, self.end_scales, self._measure = real, list(end_scales), measure
        self._acting = acting
        self._roots = {name: root_of(each.covariance) for name, each in real.items()}
        self._parts: dict[Setting, Tensors] = {}
        self._known: dict[tuple[Setting, str, int, int | None], float] = {}

    def distinct(self, settings: Sequence[Setting]) -> list[Setting]:
        """Return the first of those settings that act alike, in their order."""
        found: dict[Hashable, Setting] = {}
        for setting in settings:
            found.setdefault(self._acting(setting), setting)
        return [*found.values()]

    def blocks(self, base: Setting) -> int:
        """Return how many blocks of a setting were measured."""
        part = self._parts.get(base)
        return 0 if part is None else len(next(iter(part.values())))

    def extend(self, bases: Sequence[Setting], blocks: int) -> None:
        """Measure each of the settings on as many blocks, from the first on."""
        for there in sorted({self.blocks(base) for base in bases}):
            todo = [b for b in dict.fromkeys(bases) if self.blocks(b) == there < blocks]
            if not todo:
                continue
            for base, found in zip(todo, self._measure(todo, there, blocks), strict=True):
                before = self._parts.get(base)
                self._parts[base] = (
                    found
                    if before is None
                    else {key: torch.cat([before[key], value]) for key, value in found.items()}
                )

    def distance(
        self, setting: Setting, space: str, blocks: int = BLOCKS, without: int | None = None
    ) -> float:
        """Return the Frechet distance to the data of the first blocks, all but one of them."""
        key = (setting, space, blocks, without)
        if key not in self._known:
            part, end = self._parts[setting.base], self.end_scales.index(setting.end_scale)
            rows = [i for i in range(blocks) if i != without]
            count, total, outer = (
                part[f"{space}.{name}"][rows, end].sum(0) for name in ("count", "total", "outer")
            )
            fake = Gaussian.of_sums(count, total, outer)
            self._known[key] = frechet_of_gaussians(self.real[space], fake, self._roots[space])
        return self._known[key]

    def guards(self, setting: Setting, blocks: int) -> torch.Tensor:
        """Return the values of `FLOORS` in each of the first blocks, (blocks, guards)."""
        end = self.end_scales.index(setting.end_scale)
        return self._parts[setting.base]["guards"][:blocks, end]

    def difference(self, a: Setting, b: Setting, space: str, blocks: int = BLOCKS) -> Estimate:
        """Return how much further a is from the data than b, with the jackknife's error."""

        def of(without: int | None) -> float:
            return self.distance(a, space, blocks, without) - self.distance(
                b, space, blocks, without
            )

        return Estimate(of(None), jackknife([of(i) for i in range(blocks)]))

    def best_end(self, base: Setting, space: str, blocks: int) -> Setting:
        """Return the setting with the `end_scale` that comes nearest to the data."""
        each = [replace(base, end_scale=scale) for scale in self.end_scales]
        return min(each, key=lambda setting: self.distance(setting, space, blocks))


def jackknife(left_out: Sequence[float]) -> float:
    """Return the standard error of an estimate from those that leave out one block each."""
    n, mean = len(left_out), sum(left_out) / len(left_out)
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))


def race(
    samples: Samples,
    bases: Sequence[Setting],
    space: str,
    keep: int = KEPT,
    progress: Callable[[str], object] = lambda line: None,
) -> list[Setting]:
    """Return the settings that come nearest to the data, the nearest first, each with its end.

    Of n settings the nearer half goes on from rung to rung, `keep` at least; a setting that is
    further away than the nearest by more than its scatter does not go on.

    Args:
        samples: where they are measured.
        bases: settings with `end_scale` 1.
        space: whose distance counts.
        keep: how many are returned, at most.
        progress: called with a line of text after each rung.
    """
    alive = samples.distinct(bases)
    ranked: list[Setting] = []
    for blocks in RUNGS:
        samples.extend(alive, blocks)
        each = [samples.best_end(base, space, blocks) for base in alive]
        ranked = sorted(each, key=lambda s: samples.distance(s, space, blocks))
        best = ranked[0]
        progress(
            f"{len(alive)} settings, {blocks} of {BLOCKS} blocks: {best}, "
            f"{samples.distance(best, space, blocks):.4g}"
        )
        most = max(keep, math.ceil(len(alive) / 2)) if blocks < BLOCKS else keep
        near = [s for s in ranked[:most] if not _is_worse(samples, s, best, space, blocks)]
        alive = [s.base for s in near]
        ranked = near
    return ranked


def _is_worse(samples: Samples, a: Setting, best: Setting, space: str, blocks: int) -> bool:
    if blocks <= RUNGS[0] or a == best:  # two blocks tell nothing of the scatter
        return False
    return samples.difference(a, best, space, blocks).is_beyond_scatter(blocks)


def most_blocks(space: Space) -> int:
    """Return how many blocks a search and the verdicts after it measure, at most."""
    # of the races after the first the best of the one before and the present one are known
    fields = [len(space.bases) + 1, *[KEPT + 1 + MOST_NEIGHBOURS] * space.rounds]
    total = (KEPT + 1) * LOOKS[-1]
    for alive in fields:
        for before, blocks in zip((0, *RUNGS), RUNGS, strict=False):
            total += alive * (blocks - before)
            alive = max(KEPT, math.ceil(alive / 2))
    return total


def search(
    samples: Samples,
    space: Space,
    feature_space: str,
    current: Setting,
    progress: Callable[[str], object] = lambda line: None,
) -> list[Setting]:
    """Return the best settings of the whole search, the nearest to the data first.

    Args:
        samples: where they are measured.
        space: what is searched.
        feature_space: whose distance counts.
        current: the setting that is there now; it takes part in every race.
        progress: called with a line of text now and then.
    """
    found = race(samples, [current.base, *space.bases], feature_space, progress=progress)
    for number in range(space.rounds):
        beside = neighbours(found[0].base, 0.5**number, space.scales_eps)
        bases = [*(s.base for s in found), *beside, current.base]
        better = race(samples, bases, feature_space, progress=progress)
        if better[0].base == found[0].base and number:
            return better
        found = better
    return found


class Guard(NamedTuple):
    """What a setting must not make worse.

    Attributes:
        name: in a report.
        floor: by how much it may be worse whatever its scatter is.
        value: of the new setting; less is better.
        before: of the setting that is there now.
        more: their difference.
        blocks: that it was measured on.
    """

    name: str
    floor: float
    value: float
    before: float
    more: Estimate
    blocks: int

    @property
    def vetoes(self) -> bool:
        """Tell whether the new setting is worse by more than the scatter and the floor."""
        return self.more.value > self.floor and self.more.is_beyond_scatter(self.blocks)

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "value": _short(self.value),
            "before": _short(self.before),
            "std_error": _short(self.more.std_error),
            "vetoes": self.vetoes,
        }


@dataclass(frozen=True)
class Verdict:
    """A setting beside the one that is there now, on noise that the search has not seen.

    Attributes:
        setting: the new one.
        distance: of the new one.
        before: of the one that is there now.
        gain: how much nearer to the data the new one is.
        guards: what it must not make worse.
        blocks: of held-out noise.
    """

    setting: Setting
    distance: float
    before: float
    gain: Estimate
    guards: tuple[Guard, ...]
    blocks: int

    @property
    def is_beyond_scatter(self) -> bool:
        """Tell whether the gain is more than the scatter explains."""
        return self.gain.is_beyond_scatter(self.blocks)

    @property
    def is_open(self) -> bool:
        """Tell whether more samples may show a gain: it is above its standard error, not beyond."""
        within = self.gain.std_error < self.gain.value and not self.is_beyond_scatter
        return within and not any(guard.vetoes for guard in self.guards)

    @property
    def wins(self) -> bool:
        """Tell whether the new setting takes the place of the old one."""
        return self.is_beyond_scatter and not any(guard.vetoes for guard in self.guards)

    @property
    def why_not(self) -> str:
        """Return in words what keeps it from winning, or ''."""
        if not self.is_beyond_scatter:
            return f"its gain, {self.gain}, is within the scatter"
        vetoes = [f"{g.name} {g.before:.4g} -> {g.value:.4g}" for g in self.guards if g.vetoes]
        return f"guards: {'; '.join(vetoes)}" if vetoes else ""

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "distance": _short(self.distance),
            "before": _short(self.before),
            "gain": _short(self.gain.value),
            "std_error": _short(self.gain.std_error),
            "guards": {guard.name: guard.record() for guard in self.guards},
        }


# Guards beside the other feature spaces, each the smaller the better, and what they let pass: less
# than a picture shows. A narrow sampler has a precision of nearly 1, which it may give for recall,
# but not the other way round. The last three are how far the samples are from the data.
FLOORS = {
    "1 - recall": 0.02,
    "1 - mean of precision and recall": 0.02,
    "share of clamped pixels": 0.01,
    "mean of pixels": 0.01,
    "deviation of pixels": 0.01,
}


def compare(
    setting: Setting,
    current: Setting,
    samples: Samples,
    spaces: Sequence[str],
) -> Verdict:
    """Return the verdict on a setting, from as many blocks as it takes of `LOOKS`.

    Args:
        setting: the new one.
        current: the one that is there now.
        samples: of held-out noise.
        spaces: the one whose distance counts, then those that guard.
    """
    for blocks in LOOKS:
        samples.extend([setting.base, current.base], blocks)
        verdict = _verdict(setting, current, samples, spaces, blocks)
        if not verdict.is_open:
            break
    return verdict


def _verdict(
    setting: Setting, current: Setting, samples: Samples, spaces: Sequence[str], blocks: int
) -> Verdict:
    first, *others = spaces
    guards = [
        Guard(
            f"Frechet in {space}",
            0.0,
            samples.distance(setting, space, blocks),
            samples.distance(current, space, blocks),
            samples.difference(setting, current, space, blocks),
            blocks,
        )
        for space in others
    ]
    new, old = samples.guards(setting, blocks), samples.guards(current, blocks)
    for place, (name, floor) in enumerate(FLOORS.items()):
        pairs = list(zip(new[:, place].tolist(), old[:, place].tolist(), strict=True))
        more = [a - b for a, b in pairs]
        mean = sum(more) / len(more)
        left_out = [(sum(more) - value) / (len(more) - 1) for value in more]
        value, before = (sum(side) / len(side) for side in zip(*pairs, strict=True))
        found = Estimate(mean, jackknife(left_out))
        guards.append(Guard(name, floor, value, before, found, blocks))
    return Verdict(
        setting,
        samples.distance(setting, first, blocks),
        samples.distance(current, first, blocks),
        samples.difference(current, setting, first, blocks),
        tuple(guards),
        blocks,
    )


def choose(verdicts: Iterator[Verdict]) -> tuple[Verdict | None, list[Verdict]]:
    """Return the first verdict that wins, or None, and those that were asked for."""
    asked: list[Verdict] = []
    for verdict in verdicts:
        asked.append(verdict)
        if verdict.wins:
            return verdict, asked
    return None, asked


def _short(value: float) -> float:
    return float(f"{value:.4g}")
