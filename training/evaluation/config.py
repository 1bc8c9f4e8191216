"""What `ddim-schedulers evaluate` is asked for: one YAML file, checked before any work.

    pipeline: runs/digits-8/pipeline
    output_dir: runs/digits-8/evaluation
    data: {data: digits}
    features: [pixels, classifier]
    tables:
      - name: Few steps
        n: 360
        grid:
          - steps: [10, 20]
            members: [0, 1, sigma-hat]
            spacing: [trailing]
          - steps: [10, 20]
            members: [0]
            guidance: [0, 1, 2, {scale: 4, interval: [0.2, 0.8]}]   # of a network with classes
          - steps: [10, 20]
            schedulers: [{class: DPMSolverMultistepScheduler, use_karras_sigmas: true}]

A *row* of a table is a sampler: a scheduler with its settings. A *cell* is a row at one number of
steps and one repetition. Every cell of a table has the table's n.
"""

import dataclasses
import inspect
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddim_schedulers.pipelines.sampling_job import SamplingJob
from ddim_schedulers.training.common.flags import nearest
from ddim_schedulers.training.common.storage import slug
from ddim_schedulers.training.config import DTYPES, DataConfig, TrainingConfig
from ddim_schedulers.training.evaluation.card import check_card
from ddim_schedulers.training.metrics.distances import METRICS
from ddim_schedulers.training.parsing import check_no_code, load_config, read_file

CLASSIFIER = "classifier"
FAMILY = "GeneralizedDDIMScheduler"
# A number above these is a slip of the hand, and would fill the memory with plans.
MOST_REPEATS, MOST_SAMPLES = 10_000, 10**8
# Names of the members that have one; the others are given by a number, eta, or by their settings.
MEMBERS: dict[str, dict[str, Any]] = {
    "sigma-hat": {"eta": 1.0, "reverse_variance": "sigma_hat"},
    "optimal": {"eta": 1.0, "reverse_variance": "optimal"},
}
# What else decides how a member is sampled. A row does not inherit it from the pipeline's
# scheduler, so that its name says what it is.
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
_EXPECTED = ("row", "steps", "features", "metric", "value", "tolerance", "source")
_DATA_KEYS = frozenset(f.name for f in dataclasses.fields(DataConfig)) | {"validation_fraction"}


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
        base: the name without what is said of guidance.
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


@dataclass(frozen=True)
class EvaluationConfig:
    """Everything that is asked for.

    Attributes:
        pipeline: folder or Hub name of the saved pipeline.
        output_dir: where everything is written; an interrupted evaluation goes on there.
        data: settings of `ddim-schedulers train` that say which images, `validation_fraction`
            included. The training part is the reference; the held-out part is measured like
            samples, which shows what a perfect sampler would get.
        held_out: settings of `data` that are different for the held-out part, e.g. `split: test`;
            None takes the part that `data` leaves out.
        tables: what is to be compared.
        features: names of feature spaces (see `features.py`), or `classifier` for the one below.
        labels: for the classifier: the array of the .npz file or the column of the data set;
            'folders' takes the names of the folders that the images lie in. Digits have their own.
        classifier: its file; trained on the labelled data and saved there if it is missing. None
            puts it into `output_dir`.
        classifier_epochs: of its training.
        reference_images: how many of the reference are used, in a fixed random order; None: all.
        neighbours: k of precision, recall, density and coverage.
        batch_size: images in a network call.
        seed: sample i of the first repetition has the seed `seed + i`.
        dtype: of the network; the sample itself stays in float32 at least.
        compile: torch.compile the network.
        channels_last: memory format of the network.
        keep_images: keep the samples of every cell, not only the first ones.
        cache_dir: where features of the reference are kept; None puts them into `output_dir`.
        pictured: names of the rows that the pictures of samples show; None: the first eight.
        expected: measurements of others to compare with: `row`, `steps`, `features`, `metric`,
            `value`, `tolerance`, `source`.
        not_run: a sentence that marks a recipe whose measurements nobody here has reproduced.
        card: texts of a model card, see `card.py`.
    """

    pipeline: str
    output_dir: str
    data: TrainingConfig
    tables: list[Table]
    held_out: TrainingConfig | None = None
    features: list[str] = field(default_factory=lambda: ["pixels"])
    labels: str | None = None
    classifier: str | None = None
    classifier_epochs: int = 3
    reference_images: int | None = None
    neighbours: int = 5
    batch_size: int = 100
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    keep_images: bool = False
    cache_dir: str | None = None
    pictured: list[str] | None = None
    expected: list[dict[str, Any]] = field(default_factory=list)
    not_run: str | None = None
    card: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the one that is out of range.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for name in ("batch_size", "neighbours", "classifier_epochs", "reference_images"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 1")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"`seed` is {self.seed!r}; it must be an integer >= 0")
        for name in ("compile", "channels_last", "keep_images"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be true or false")
        names = _list(self.features, "features")
        if not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
            raise ValueError(f"`features` is {names!r}; it must be a list of names, each once")
        self._check_rows()

    def _check_rows(self) -> None:
        """Check that the rows that are pictured and expected are there."""
        names = {cell.sampler.name for cell in self.cells}
        expected = [_mapping(e, "expected") for e in _list(self.expected, "expected")]
        for e in expected:
            _known(e, _EXPECTED, "expected")
            if missing := [key for key in _EXPECTED if key not in e]:
                raise ValueError(
                    f"`expected` has {dict(e)!r}; it must say {', '.join(missing)}, too"
                )
        named = [("pictured", name) for name in _list(self.pictured or [], "pictured")]
        for key, name in [*named, *(("expected", e["row"]) for e in expected)]:
            if not isinstance(name, str):
                raise ValueError(f"`{key}` names {name!r}; it must be the name of a row")
            if name not in names:
                raise ValueError(
                    f"`{key}` names {name!r}, which is no row of a "
                    f"table{nearest(name, sorted(names), '')}"
                )
        measured = {(cell.sampler.name, cell.steps) for cell in self.cells}
        for e in expected:
            for key, value, allowed in (
                ("steps", e["steps"], sorted(s for row, s in measured if row == e["row"])),
                ("features", e["features"], self.features),
                ("metric", e["metric"], METRICS),
            ):
                if value not in allowed:
                    raise ValueError(
                        f"`expected` has {key} = {value!r} for {e['row']!r}; it must be one that "
                        f"is measured: {', '.join(map(str, allowed))}"
                    )

    @property
    def cells(self) -> list[Cell]:
        """Return the cells of all tables in order, each once."""
        return _unique(cell for table in self.tables for cell in table.cells)


def load_evaluation(
    path: str | Path, trust_code: bool = False, **overrides: Any
) -> EvaluationConfig:
    """Read an evaluation's YAML or JSON file.

    Args:
        path: the file.
        trust_code: whether the file may name feature spaces to import; a call always may.
        **overrides: values that win over the file's; `data` replaces `data.data`. None is no value.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), a missing one, or a value out
            of range.
    """
    values = read_file(Path(path))
    given = {key: value for key, value in overrides.items() if value is not None}
    if "data" in given:
        values["data"] = {**_mapping(values.get("data"), "data"), "data": given.pop("data")}
    if not trust_code and "features" not in given and isinstance(values.get("features"), list):
        check_no_code([str(name) for name in values["features"]], str(path))
    return parse_evaluation({**values, **given}, str(path))


def parse_evaluation(values: Mapping[str, Any], where: str = "the settings") -> EvaluationConfig:
    """Return the `EvaluationConfig` of a mapping; see `load_evaluation`."""
    fields = {f.name: f for f in dataclasses.fields(EvaluationConfig)}
    _known(values, fields, where)
    values = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in values.items()}
    for name in ("pipeline", "output_dir", "data", "tables"):
        if name not in values:
            raise ValueError(f"{where}: `{name}` is missing; it must be set")
    data = _mapping(values["data"], "data")
    _known(data, _DATA_KEYS, f"{where}: data")
    common = {"seed": values.get("seed", 0)}
    settings = load_config(**{**common, **data})
    held_out = None
    if values.get("held_out") is not None:
        other = _mapping(values["held_out"], "held_out")
        _known(other, _DATA_KEYS, f"{where}: held_out")
        held_out = load_config(**{**common, **data, **other, "validation_fraction": 0.0})
    tables = [_table(_mapping(t, "tables"), where) for t in _list(values["tables"], "tables")]
    names = [table.name for table in tables]
    if len({slug(name) for name in names}) < len(names) or not tables:
        raise ValueError(
            f"{where}: `tables` has the names {names}; each must have a name of its own"
        )
    if values.get("card") is not None:
        check_card(dict(_mapping(values["card"], "card")))
    config = EvaluationConfig(
        **{**values, "data": settings, "held_out": held_out, "tables": tables}
    )
    return config


def _table(values: Mapping[str, Any], where: str) -> Table:
    _known(values, ("name", "n", "grid"), f"{where}: tables")
    name, n = str(values.get("name", "")), values.get("n")
    if not name or type(n) is not int or not 2 <= n <= MOST_SAMPLES:
        raise ValueError(
            f"{where}: `tables` has {name!r} with n = {n!r}; each must have a name and an n from 2 "
            f"to {MOST_SAMPLES}"
        )
    blocks = [_mapping(b, "grid") for b in _list(values.get("grid"), f"table {name!r}: grid")]
    cells = (cell for block in blocks for cell in _cells(block, n, f"{where}: table {name!r}"))
    return Table(name, n, _unique(cells))


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
GUIDES = ("guide", "classifier")


def _cells(block: Mapping[str, Any], n: int, where: str) -> Iterator[Cell]:
    _known(block, _BLOCK, f"{where}: grid")
    steps, repeats = _list(block.get("steps"), f"{where}: steps"), block.get("repeats", 1)
    if not all(type(s) is int and s >= 1 for s in steps):
        raise ValueError(f"{where}: `steps` is {steps}; it must be a list of integers >= 1")
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        raise ValueError(
            f"{where}: `repeats` is {repeats!r}; it must be an integer, 1 to {MOST_REPEATS}"
        )
    if not steps:
        raise ValueError(f"{where}: `steps` is empty; it must be a list of integers >= 1")
    plain = list(_samplers(block, where))
    entries = _list(block.get("guidance", [None]), f"{where}: guidance")
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
    common = _mapping(block.get("settings", {}), f"{where}: settings")
    clipped = block.get("use_clipped_model_output")
    for key in ("spacing", "settings", "use_clipped_model_output"):
        if key in block and "members" not in block:
            raise ValueError(
                f"{where}: `{key}` is set in a block without members, where it must be left out; a "
                "setting of one of the schedulers goes beside its class"
            )
    for spacing in _list(block.get("spacing", ["trailing"]), f"{where}: spacing"):
        if not isinstance(spacing, str):
            raise ValueError(f"{where}: `spacing` is {spacing!r}; it must be a name")
        for member in _list(block.get("members", []), f"{where}: members"):
            name, settings = _member(member, where)
            own = {"timestep_spacing": spacing, **common, **settings}
            chosen = [key for key in common if key in SAMPLING_KEYS]
            label = ", ".join([name, spacing, *(f"{key} {common[key]}" for key in chosen)])
            said = ("timestep_spacing", *settings, *chosen)
            plain = {key: defaults_of(FAMILY)[key] for key in SAMPLING_KEYS}
            yield _checked_sampler(Sampler(label, FAMILY, {**plain, **own}, clipped, said), where)
    for given in _list(block.get("schedulers", []), f"{where}: schedulers"):
        settings = dict(_mapping(given, f"{where}: schedulers"))
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
    values = {"scale": entry} if is_scale else dict(_mapping(entry, f"{where}: guidance"))
    _known(values, (*_GUIDANCE, "name"), f"{where}: guidance")
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
        raise ValueError(f"{where}: guidance: {error}") from error
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


def _unique(cells: Iterable[Cell]) -> list[Cell]:
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


def _known(values: Mapping[str, Any], names: Any, where: str) -> None:
    for key in values:
        if key not in names:
            raise ValueError(
                f"{where}: `{key}` is an unknown key{nearest(str(key), sorted(names), '')}"
            )


def _divided(where: str) -> tuple[str, str]:
    """Return the last name of a place in the settings, and what comes before it."""
    around, colon, name = where.rpartition(": ")
    return f"{around}{colon}", name


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        around, name = _divided(where)
        raise ValueError(f"{around}`{name}` is {value!r}; it must be a mapping of names to values")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        around, name = _divided(where)
        raise ValueError(f"{around}`{name}` is {value!r}; it must be a list")
    return value
