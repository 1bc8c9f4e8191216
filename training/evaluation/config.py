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
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddim_schedulers.training.common.flags import nearest
from ddim_schedulers.training.common.storage import slug
from ddim_schedulers.training.config import DTYPES, DataConfig, TrainingConfig
from ddim_schedulers.training.evaluation.card import check_card
from ddim_schedulers.training.evaluation.grid import (
    Cell,
    Table,
    check_known,
    list_of,
    mapping_of,
    parse_table,
    unique,
)
from ddim_schedulers.training.metrics.distances import METRICS
from ddim_schedulers.training.parsing import check_no_code, load_config, read_file

CLASSIFIER = "classifier"
_EXPECTED = ("row", "steps", "features", "metric", "value", "tolerance", "source")
_DATA_KEYS = frozenset(f.name for f in dataclasses.fields(DataConfig)) | {"validation_fraction"}


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
        endpoint: measure the end-point error of deterministic rows, too: against fine solutions of
            the ODE from the same noises, 100 network calls for each image of a seed.
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
    endpoint: bool = False
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
        for name in ("compile", "channels_last", "keep_images", "endpoint"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be true or false")
        names = list_of(self.features, "features")
        if not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
            raise ValueError(f"`features` is {names!r}; it must be a list of names, each once")
        self._check_rows()

    def _check_rows(self) -> None:
        """Check that the rows that are pictured and expected are there."""
        names = {cell.sampler.name for cell in self.cells}
        expected = [mapping_of(e, "expected") for e in list_of(self.expected, "expected")]
        for e in expected:
            check_known(e, _EXPECTED, "expected")
            if missing := [key for key in _EXPECTED if key not in e]:
                raise ValueError(
                    f"`expected` has {dict(e)!r}; it must say {', '.join(missing)}, too"
                )
        named = [("pictured", name) for name in list_of(self.pictured or [], "pictured")]
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
        return unique(cell for table in self.tables for cell in table.cells)


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
        values["data"] = {**mapping_of(values.get("data"), "data"), "data": given.pop("data")}
    if not trust_code and "features" not in given and isinstance(values.get("features"), list):
        check_no_code([str(name) for name in values["features"]], str(path))
    return parse_evaluation({**values, **given}, str(path))


def parse_evaluation(values: Mapping[str, Any], where: str = "the settings") -> EvaluationConfig:
    """Return the `EvaluationConfig` of a mapping; see `load_evaluation`."""
    fields = {f.name: f for f in dataclasses.fields(EvaluationConfig)}
    check_known(values, fields, where)
    values = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in values.items()}
    for name in ("pipeline", "output_dir", "data", "tables"):
        if name not in values:
            raise ValueError(f"{where}: `{name}` is missing; it must be set")
    data = mapping_of(values["data"], "data")
    check_known(data, _DATA_KEYS, f"{where}: data")
    common = {"seed": values.get("seed", 0)}
    settings = load_config(**{**common, **data})
    held_out = None
    if values.get("held_out") is not None:
        other = mapping_of(values["held_out"], "held_out")
        check_known(other, _DATA_KEYS, f"{where}: held_out")
        held_out = load_config(**{**common, **data, **other, "validation_fraction": 0.0})
    asked = [mapping_of(table, "tables") for table in list_of(values["tables"], "tables")]
    tables = [parse_table(table, where) for table in asked]
    names = [table.name for table in tables]
    if len({slug(name) for name in names}) < len(names) or not tables:
        raise ValueError(
            f"{where}: `tables` has the names {names}; each must have a name of its own"
        )
    if values.get("card") is not None:
        check_card(dict(mapping_of(values["card"], "card")))
    config = EvaluationConfig(
        **{**values, "data": settings, "held_out": held_out, "tables": tables}
    )
    return config
