"""The grids of an evaluation's tables: from blocks of a file to samplers and cells."""

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddim_schedulers.pipelines.sampling_job import SamplingJob
from ddim_schedulers.training.common.flags import nearest, renamed
from ddim_schedulers.training.common.storage import slug

FAMILY = "GeneralizedDDIMScheduler"
# A larger number is a typing error, and its plans would fill the memory.
MOST_REPEATS, MOST_SAMPLES = 10_000, 10**8
# Names of the members that have one; the others are given by a number, eta, or by their settings.
MEMBERS: dict[str, dict[str, Any]] = {
    "sigma-hat": {"eta": 1.0, "reverse_variance": "sigma_hat"},
    "optimal": {"eta": 1.0, "reverse_variance": "optimal"},
}
# Further keys that decide how a member is sampled. A row does not take them from the pipeline's
# scheduler, so that its name tells them all.
SAMPLING_KEYS = (
    "end_scale",
    "eps_scale",
    "eta_interval",
    "lower_order_final",
    "quadratic_end",
    "set_alpha_to_one",
    "sigma",
    "solver_calibrated",
    "solver_corrector",
    "solver_corrector_order",
    "solver_form",
    "solver_order",
    "solver_variable",
    "solver_weights",
    "steps_offset",
    "timesteps",
)


@dataclass(frozen=True)
class Sampler:
    """A scheduler with its settings.

    Attributes:
        name: what the tables call it.
        scheduler: class name, of this package or of diffusers.
        settings: config keys that replace those of the pipeline's own scheduler.
        use_clipped_model_output: passed to `step`; None leaves the scheduler's default.
        said: the settings that the name says.
        conditions: arguments of generation that guide it, by their names; `guide` and `classifier`
            are places of networks.
        base: the name without the guidance settings.
    """

    name: str
    scheduler: str
    settings: dict[str, Any]
    use_clipped_model_output: bool | None = None
    said: tuple[str, ...] = ()
    conditions: dict[str, Any] = field(default_factory=dict)
    base: str = ""


@dataclass(frozen=True)
class Cell:
    """A row at one number of steps; repetition r has the seeds seed + r n .. seed + (r + 1) n - 1.

    Attributes:
        sampler: the scheduler with its settings.
        steps: S.
        n: number of samples.
        repeat: r.
    """

    sampler: Sampler
    steps: int
    n: int
    repeat: int

    @property
    def label(self) -> str:
        """Return a name for its files."""
        return f"{slug(self.sampler.name)}-S{self.steps}-n{self.n}-r{self.repeat}"


@dataclass(frozen=True)
class Table:
    """Cells of one n.

    Attributes:
        name: heading.
        n: samples in every cell.
        cells: in the order in which they are computed.
    """

    name: str
    n: int
    cells: list[Cell]


def parse_table(values: Mapping[str, Any], where: str) -> Table:
    """Return a table of the file.

    Raises:
        ValueError: naming what is missing, unknown or out of range.
    """
    check_known(values, ("name", "n", "grid"), f"{where}: tables")
    name, n = str(values.get("name", "")), values.get("n")
    if not name or type(n) is not int or not 2 <= n <= MOST_SAMPLES:
        raise ValueError(
            f"{where}: `tables` has {name!r} with n = {n!r}; each must have a name and an n from 2 "
            f"to {MOST_SAMPLES}"
        )
    blocks = [mapping_of(b, "grid") for b in list_of(values.get("grid"), f"table {name!r}: grid")]
    cells = (cell for block in blocks for cell in _cells(block, n, f"{where}: table {name!r}"))
    return Table(name, n, unique(cells))


_BLOCK = (
    "steps",
    "members",
    "spacing",
    "schedulers",
    "settings",
    "use_clipped_model_output",
    "repeats",
    "guidance",
)
# What an entry of `guidance` may say, and the argument of generation that it is.
_GUIDANCE = {
    "scale": "guidance_scale",
    "interval": "guidance_interval",
    "rescale": "guidance_rescale",
    "negative_label": "negative_label",
    "labels": "class_labels",
    "guide": "guide",
    "classifier": "classifier",
}
RENAMED = {argument: key for key, argument in _GUIDANCE.items()}  # in messages
GUIDES = ("guide", "classifier")


def _cells(block: Mapping[str, Any], n: int, where: str) -> Iterator[Cell]:
    check_known(block, _BLOCK, f"{where}: grid")
    steps, repeats = list_of(block.get("steps"), f"{where}: steps"), block.get("repeats", 1)
    if not all(type(s) is int and s >= 1 for s in steps):
        raise ValueError(f"{where}: `steps` is {steps}; it must be a list of integers >= 1")
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        raise ValueError(
            f"{where}: `repeats` is {repeats!r}; it must be an integer, 1 to {MOST_REPEATS}"
        )
    if not steps:
        raise ValueError(f"{where}: `steps` is empty; it must be a list of integers >= 1")
    plain = list(_samplers(block, where))
    entries = list_of(block.get("guidance", [None]), f"{where}: guidance")
    samplers = [_guided(sampler, entry, where) for sampler in plain for entry in entries]
    if not samplers:
        raise ValueError(
            f"{where}: `grid` has a block without members and schedulers; it must have "
            "some of either"
        )
    # all samplers of one S before the next: a run that is stopped has whole columns
    for s, sampler, repeat in itertools.product(steps, samplers, range(repeats)):
        yield Cell(sampler, s, n, repeat)


def _samplers(block: Mapping[str, Any], where: str) -> Iterator[Sampler]:
    common = mapping_of(block.get("settings", {}), f"{where}: settings")
    clipped = block.get("use_clipped_model_output")
    for key in ("spacing", "settings", "use_clipped_model_output"):
        if key in block and "members" not in block:
            raise ValueError(
                f"{where}: `{key}` is set in a block without members, where it must be left out; a "
                "setting of one of the schedulers goes beside its class"
            )
    for spacing in list_of(block.get("spacing", ["trailing"]), f"{where}: spacing"):
        if not isinstance(spacing, str):
            raise ValueError(f"{where}: `spacing` is {spacing!r}; it must be a name")
        for member in list_of(block.get("members", []), f"{where}: members"):
            name, settings = _member(member, where)
            own = {"timestep_spacing": spacing, **common, **settings}
            chosen = [key for key in common if key in SAMPLING_KEYS]
            label = ", ".join([name, spacing, *(f"{key} {common[key]}" for key in chosen)])
            said = ("timestep_spacing", *settings, *chosen)
            plain = {key: defaults_of(FAMILY)[key] for key in SAMPLING_KEYS}
            yield _checked_sampler(Sampler(label, FAMILY, {**plain, **own}, clipped, said), where)
    for given in list_of(block.get("schedulers", []), f"{where}: schedulers"):
        settings = dict(mapping_of(given, f"{where}: schedulers"))
        scheduler, name = str(settings.pop("class", "")), settings.pop("name", None)
        own_clipped = settings.pop("use_clipped_model_output", None)
        parts = [scheduler.removesuffix("Scheduler"), *(f"{k} {v}" for k, v in settings.items())]
        label = ", ".join(parts) if name is None else str(name)
        said = tuple(settings) if name is None else ()
        yield _checked_sampler(Sampler(label, scheduler, settings, own_clipped, said), where)


def _guided(sampler: Sampler, entry: Any, where: str) -> Sampler:
    """Return a sampler with the guidance that an entry of `guidance` asks for."""
    if entry is None:
        return sampler
    is_scale = isinstance(entry, int | float) and not isinstance(entry, bool)
    values = {"scale": entry} if is_scale else dict(mapping_of(entry, f"{where}: guidance"))
    check_known(values, (*_GUIDANCE, "name"), f"{where}: guidance")
    name = values.pop("name", None)
    for key in ("interval", "labels"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    conditions = {_GUIDANCE[key]: value for key, value in values.items()}
    for key in GUIDES:
        if conditions.get(key) is not None and not isinstance(conditions[key], str):
            raise ValueError(f"{where}: `{key}` is {conditions[key]!r}; it must be a path")
    try:
        given = {key: value for key, value in conditions.items() if key not in GUIDES}
        SamplingJob(num_images=1, **given)
    except ValueError as error:
        raise ValueError(f"{where}: guidance: {renamed(str(error), RENAMED)}") from error
    said = ", ".join(_said(key, value) for key, value in values.items()) if name is None else name
    return dataclasses.replace(
        sampler, name=f"{sampler.name}, {said}", conditions=conditions, base=sampler.name
    )


def _said(key: str, value: Any) -> str:
    if key == "scale":
        return f"w {value:g}"
    if isinstance(value, tuple):
        return f"{key} {' '.join(map(str, value))}"
    return f"{key} {Path(value).name if key in GUIDES else value}"


def _member(member: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(member, int | float) and not isinstance(member, bool):
        return f"eta {member:g}", {"eta": float(member), "reverse_variance": "sigma"}
    if isinstance(member, str) and member in MEMBERS:
        return str(member), MEMBERS[member]
    raise ValueError(
        f"{where}: `members` has {member!r}; each must be a number (eta), or one of "
        f"{', '.join(MEMBERS)}; anything else goes under schedulers"
    )


def _checked_sampler(sampler: Sampler, where: str) -> Sampler:
    """Return `sampler` if its class has all its settings: diffusers would ignore an unknown one."""
    cls = scheduler_class(sampler.scheduler)
    if cls is None:
        raise ValueError(
            f"{where}: `class` is {sampler.scheduler!r}; it must be a scheduler of this package or "
            "of diffusers"
        )
    clipped = sampler.use_clipped_model_output
    if clipped not in (None, True, False):
        raise ValueError(
            f"{where}: `use_clipped_model_output` is {clipped!r}; it must be true, false or null"
        )
    known = list(inspect.signature(cls).parameters)
    for key in sampler.settings:
        if key not in known:
            raise ValueError(
                f"{where}: `{key}` is no setting of {sampler.scheduler}{nearest(key, known, '')}"
            )
    return sampler


def defaults_of(scheduler: str) -> dict[str, Any]:
    """Return the settings of a scheduler class with their defaults."""
    parameters = inspect.signature(scheduler_class(scheduler)).parameters  # type: ignore[arg-type]
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def scheduler_class(name: str) -> type | None:
    """Return the scheduler class of that name, of this package or of diffusers, or None."""
    import diffusers

    import ddim_schedulers

    for package in (ddim_schedulers, diffusers):
        found = getattr(package, name, None) if name.endswith("Scheduler") else None
        if isinstance(found, type):
            return found
    return None


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells, each once; raises `ValueError` if two schedulers have one name."""
    kept: dict[str, Cell] = {}
    for cell in cells:
        first = kept.setdefault(cell.label, cell)
        if first.sampler != cell.sampler:
            raise ValueError(
                f"`tables` has two rows named {cell.sampler.name!r}, {first.sampler} and "
                f"{cell.sampler}; each must have a name of its own"
            )
    return list(kept.values())


def check_known(values: Mapping[str, Any], names: Any, where: str) -> None:
    """Refuse a key that is not among `names`.

    Raises:
        ValueError: naming the key and the nearest name.
    """
    for key in values:
        if key not in names:
            raise ValueError(
                f"{where}: `{key}` is an unknown key{nearest(str(key), sorted(names), '')}"
            )


def _divided(where: str) -> tuple[str, str]:
    """Return the last name of a place in the settings, and what comes before it."""
    around, colon, name = where.rpartition(": ")
    return f"{around}{colon}", name


def mapping_of(value: Any, where: str) -> Mapping[str, Any]:
    """Return `value` if it is a mapping.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, Mapping):
        around, name = _divided(where)
        raise ValueError(f"{around}`{name}` is {value!r}; it must be a mapping of names to values")
    return value


def list_of(value: Any, where: str) -> list[Any]:
    """Return `value` if it is a list.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, list):
        around, name = _divided(where)
        raise ValueError(f"{around}`{name}` is {value!r}; it must be a list")
    return value
