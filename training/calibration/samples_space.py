"""The settings of a sampler that decide its pictures, and those that a search tries."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

MOST_NEIGHBOURS = 10


@dataclass(frozen=True)
class Setting:
    """What is chosen for one number of calls: keys of `GeneralizedDDIMScheduler`'s config.

    Attributes:
        eta: as the key of this name.
        eta_interval: as the key of this name.
        eps_scale: as the key of this name.
        end_scale: as the key of this name.
        formulas: the steps are those of the formulas, although there is a fitted table.
    """

    eta: float = 0.0
    eta_interval: tuple[float, float] | None = None
    eps_scale: float | tuple[float, float] = 1.0
    end_scale: float = 1.0
    formulas: bool = False

    def config(self) -> dict[str, Any]:
        """Return the keys with their values, as JSON has them."""
        found = {k: v for k, v in asdict(self).items() if k != "formulas"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Setting":
        """Return the setting that a config, or an entry of a calibration, holds."""
        given = {key: config[key] for key in cls().config() if key in config}
        found: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return cls(**found)

    @property
    def base(self) -> "Setting":
        """Return the setting without what is done to finished samples."""
        return replace(self, end_scale=1.0)

    def acting(self, shares: Sequence[float], lands_on_data: bool) -> Hashable:
        """Return what it does in the steps of a sampler; settings of one value act alike.

        Args:
            shares: t / T of each step.
            lands_on_data: the last step lands on alpha_bar = 1 and adds no noise.
        """
        low, high = self.eta_interval or (0.0, 1.0)
        noisy = shares[:-1] if lands_on_data else shares
        etas = [self.eta if low <= share <= high else 0.0 for share in noisy]
        at_0, at_1 = _line(self.eps_scale)
        scales = [at_0 + (at_1 - at_0) * share for share in shares]
        return (self.formulas, *etas, *scales, self.end_scale)

    def __str__(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self.config().items())
        return f"formulas, {said}" if self.formulas else said


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        noises: pairs of eta and its interval of t / T.
        eps_scales: of the first race.
        end_scales: of every setting; finished samples are multiplied, which takes no network call.
        rounds: how often the neighbours of the best setting are tried, each time half as far away.
        scales_eps: whether `eps_scale` is searched; it must be 1 where alpha_bar is 0 on the way.
        formulas: whether there is a fitted table, so that the formulas are tried beside it.
    """

    noises: tuple[tuple[float, tuple[float, float] | None], ...] = (
        (0.0, None),
        (0.4, (0.2, 0.8)),
        (0.7, (0.2, 0.8)),
        (1.0, (0.2, 0.8)),
        (1.0, (0.4, 0.9)),
        (0.5, None),
    )
    eps_scales: tuple[float, ...] = (1.0, 1.005, 1.01, 1.02)
    end_scales: tuple[float, ...] = (1.0, 1.01, 1.02, 1.04)
    rounds: int = 2
    scales_eps: bool = True
    formulas: bool = False

    @property
    def bases(self) -> list[Setting]:
        """Return the settings of the first race."""
        return [
            Setting(eta, interval, scale, formulas=formulas)
            for formulas in (False, True)[: 1 + self.formulas]
            for eta, interval in self.noises
            for scale in (self.eps_scales if self.scales_eps else (1.0,))
        ]


def neighbours(setting: Setting, step: float, scales_eps: bool = True) -> list[Setting]:
    """Return settings beside one, for `race`.

    Args:
        setting: with `end_scale` 1.
        step: 1 for the first round, half of it for the next.
        scales_eps: as in `Space`.
    """
    found = []
    low, high = _line(setting.eps_scale)
    for a, b in ((-1, -1), (1, 1), (-1, 1), (1, -1)) if scales_eps else ():
        ends = (round(low + 0.004 * step * a, 5), round(high + 0.004 * step * b, 5))
        if min(ends) > 0:
            found.append(replace(setting, eps_scale=ends[0] if ends[0] == ends[1] else ends))
    etas = [setting.eta - 0.2 * step, setting.eta + 0.2 * step] if setting.eta else [0.2 * step]
    found += [replace(setting, eta=round(eta, 4)) for eta in etas if 0 < eta <= 1]
    if setting.eta:
        lower, upper = setting.eta_interval or (0.0, 1.0)
        for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            ends = (round(lower + 0.1 * step * a, 4), round(upper + 0.1 * step * b, 4))
            if 0 <= ends[0] < ends[1] <= 1:
                found.append(replace(setting, eta_interval=None if ends == (0, 1) else ends))
    return found


def _line(scale: float | tuple[float, float]) -> tuple[float, float]:
    return scale if isinstance(scale, tuple) else (scale, scale)
