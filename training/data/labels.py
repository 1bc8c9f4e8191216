"""Which class an image is of: numbers and names from folders, columns and arrays, checked at once.

The data tell a class by a number (0 .. K - 1) or by text, which is its name. Texts are numbered in
their order, or as `class_names` lists them; texts that are all numbers are in the order of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ddim_schedulers.class_labels import MOST_CLASSES, NAME_LENGTH, ClassLabels, is_name
from ddim_schedulers.reading import DamagedFileError, npz_names, read_npz
from ddim_schedulers.training.config import DataConfig
from ddim_schedulers.training.data.sources import (
    ArraySource,
    FolderSource,
    ImageSource,
    TableSource,
    label_array,
)

_SHOWN = 12  # classes that a message names


@dataclass(frozen=True)
class Classes:
    """The classes of a set of images.

    Attributes:
        count: K.
        names: of all classes, in the order of their numbers; empty where the data have numbers.
        own: names of the numbers that the data have, where the order may be another one.
        rows: the class of the network for each class; None for the same number.
        numbers: (n,) int64, the class of every image of the source; None for a stream.
    """

    count: int
    names: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    rows: tuple[int, ...] | None = None
    numbers: np.ndarray | None = field(default=None, compare=False)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def called(self, number: int) -> str:
        """Return what to call a class."""
        return self.names[number] if self.names else str(number)

    def number(self, label: Any, place: Callable[[], str]) -> int:
        """Return the class that a label of the data means.

        Args:
            label: as the data hold it.
            place: what to call its image.

        Raises:
            ValueError: it is no class.
        """
        found = label
        if isinstance(label, int) and self.own:
            found = self.own[label] if 0 <= label < len(self.own) else None
        if isinstance(found, str):
            found = self._by_name.get(found)
        if type(found) is int and 0 <= found < self.count:
            return found
        missing = label is None or label == "" or label != label
        said = "is missing" if missing else f"is {label!r:.80}"
        allowed = f"an integer, 0 to {(len(self.own) or self.count) - 1}"
        if self.names:
            allowed += f", or one of {_some(self.names)}"
        raise ValueError(f"`data`: the label of {place()} {said}; it must be {allowed}")

    def row(self, label: Any, place: Callable[[], str]) -> int:
        """Return the class of the network that a label of the data means; see `number`."""
        number = self.number(label, place)
        return number if self.rows is None else self.rows[number]

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the classes of the network for images of the source, int64."""
        assert self.numbers is not None
        numbers = self.numbers[ids]
        return numbers if self.rows is None else np.array(self.rows, dtype=np.int64)[numbers]

    def counted(self, ids: np.ndarray) -> dict[str, int]:
        """Return how many of these images of the source each class has, by its name."""
        assert self.numbers is not None
        counts = np.bincount(self.numbers[ids], minlength=self.count)
        return {self.called(i): int(n) for i, n in enumerate(counts)}

    def for_network(self, labels: ClassLabels) -> "Classes":
        """Return the same classes with the numbers that a trained network has for them.

        They are found by name where both have names, and are in the same order otherwise.

        Raises:
            ValueError: the network lacks a class, or nothing tells which of its classes are meant.
        """
        if self.names and labels.names:
            rows = tuple(labels.number(name, "data") for name in self.names)
        elif self.count == len(labels.ids) or (not self.names and self.count < len(labels.ids)):
            rows = labels.ids[: self.count]
        else:
            raise ValueError(
                f"`data`: there are {self.count} classes, but the network has {len(labels.ids)} "
                "without names; list its classes, in its order, with class_names"
            )
        return replace(self, rows=rows)


def classes_of(source: ImageSource, config: DataConfig, ids: np.ndarray) -> Classes:
    """Return the classes of the images of a source.

    Args:
        source: of images.
        config: where the labels are.
        ids: (n,) the images that are used; labels of others are not looked at.

    Raises:
        ValueError: no labels, a missing one, one that is no class, or fewer than two classes.
    """
    labels, own = _labels(source, config)
    if len(labels) != len(source):
        raise ValueError(
            f"`data`: {config.data} has {len(labels)} labels and {len(source)} images; there must "
            "be as many"
        )
    used = [labels[i] for i in ids.tolist()]
    places = [partial(source.name, i) for i in ids.tolist()]
    names = _agreed(own, config) or _texts(used)
    classes = _named(names, own) if names else _numbered(used, places)
    numbers = np.full(len(source), -1, dtype=np.int64)
    numbers[ids] = [classes.number(*pair) for pair in zip(used, places, strict=True)]
    classes = replace(classes, numbers=numbers)
    check_several(classes.counted(ids), config)
    return classes


def check_several(counted: Mapping[str, int], config: DataConfig) -> None:
    """Check that there is more than one class.

    Args:
        counted: how many images each class has.
        config: for the message.

    Raises:
        ValueError: all images are of one class.
    """
    present = [name for name, count in counted.items() if count]
    if len(present) < 2:
        raise ValueError(
            f"`data`: all images of {config.data} are of one class, {present[0]!r}; there "
            "must be at least 2 classes, or leave out class_conditional"
        )


def classes_of_stream(features: Any, column: str, config: DataConfig) -> Classes:
    """Return the classes of a stream, which its type or `class_names` tells.

    Raises:
        ValueError: nothing tells which classes there are, or there is only one.
    """
    own = _names_of(features, column, config.data)
    names = _agreed(own, config)
    if names:
        check_several(dict.fromkeys(names, 1), config)
    if not names:
        raise ValueError(
            f"`data`: the column {column!r} of the stream {config.data} does not tell which "
            "classes there are; list them with class_names"
        )
    return _named(names, own)


def find_label_column(features: Any, config: DataConfig) -> str:
    """Return the column named in the config, or the only one of class labels.

    Raises:
        ValueError: it is not there, or there are none or several.
    """
    from datasets import ClassLabel

    every = list(features or {})
    if config.label_column is not None:
        if features is not None and config.label_column not in features:
            raise ValueError(
                f"`label_column` is {config.label_column!r}; the columns are {', '.join(every)}"
            )
        return config.label_column
    found = [name for name, kind in (features or {}).items() if isinstance(kind, ClassLabel)]
    if len(found) != 1:
        raise ValueError(
            f"`data`: {config.data} has {len(found)} columns of class labels among {every}; name "
            "the right one with label_column"
        )
    return found[0]


def _labels(source: ImageSource, config: DataConfig) -> tuple[list[Any], list[str] | None]:
    """Return the label of every image of a source, and the names of the numbers among them."""
    path = Path(config.data)
    if isinstance(source, TableSource):
        features = source.whole.features
        column = find_label_column(features, config)
        return list(source.whole[column]), _names_of(features, column, config.data)
    if isinstance(source, ArraySource) and path.suffix.lower() == ".npz":
        return _read_array(path, label_array(config)).tolist(), None
    if config.label_column is not None:
        raise ValueError(
            f"`label_column` is {config.label_column!r}, but {config.data} has no columns; it is "
            "for tables and .npz files"
        )
    if isinstance(source, FolderSource):
        if "" in source.classes:
            name = source.name(source.classes.index(""))
            raise ValueError(
                f"`data`: {name} is in no folder of a class; there must be one folder for each "
                "class"
            )
        return list(source.classes), None
    if config.data == "digits":
        from sklearn.datasets import load_digits

        return load_digits().target.tolist(), None
    raise ValueError(
        f"`data`: {path} holds no labels; put them beside the images in an .npz file, as its array "
        "labels"
    )


def _read_array(path: Path, key: str) -> np.ndarray:
    try:
        names = npz_names(path)
        if key not in names:
            raise ValueError(
                f"`data`: {path} holds {names}, and no labels; name their array with label_column"
            )
        labels = read_npz(path, [key])[key]
    except DamagedFileError as error:
        raise ValueError(f"`data`: {error}") from error
    if labels.ndim != 1:
        raise ValueError(f"`data`: {key} of {path} has shape {labels.shape}; it must be (N,)")
    if labels.dtype.kind not in "iuU":
        raise ValueError(
            f"`data`: {key} of {path} holds {labels.dtype}; it must hold integers or text"
        )
    return labels


def _names_of(features: Any, column: str, data: str) -> list[str] | None:
    """Return the names that the type of a column gives to its numbers; None without any."""
    kind = (features or {}).get(column)
    if names := getattr(kind, "names", None):
        return list(names)
    dtype = str(getattr(kind, "dtype", type(kind).__name__))
    if kind is not None and not dtype.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(
            f"`data`: the column {column!r} of {data} holds {dtype}; it must hold integers or text"
        )
    return None


def _agreed(names: list[str] | None, config: DataConfig) -> list[str] | None:
    """Return the names in the order of `class_names`, if that is given."""
    if config.class_names is None:
        return names
    if lacking := sorted(set(names or ()) - set(config.class_names)):
        raise ValueError(
            f"`class_names` is {_some(config.class_names)}; it must hold all classes of the data, "
            f"and lacks {_some(lacking)}"
        )
    return list(config.class_names)


def _texts(labels: Sequence[Any]) -> list[str] | None:
    """Return the different texts among labels, in their order; None if there are none."""
    texts = {label for label in labels if isinstance(label, str) and label}
    if all(text.isascii() and text.isdecimal() and len(text) < 20 for text in texts):
        return sorted(texts, key=lambda text: (int(text), text)) or None
    return sorted(texts)


def _named(names: Sequence[str], own: Sequence[str] | None) -> Classes:
    if wrong := [name for name in names if not is_name(name)]:
        raise ValueError(
            f"`data`: the name of a class is {wrong[0][:80]!r}; it must have 1 to {NAME_LENGTH} "
            "printable characters, and no blank at its ends"
        )
    if len(names) >= MOST_CLASSES:
        raise ValueError(f"`data`: {len(names)} classes; there must be below {MOST_CLASSES}")
    return Classes(len(names), tuple(names), tuple(own or ()))


def _numbered(labels: Sequence[Any], places: Sequence[Callable[[], str]]) -> Classes:
    """Return the classes of plain numbers, which must be 0 .. K - 1 without a gap."""
    every = Classes(MOST_CLASSES - 1)
    found = {every.number(*pair) for pair in zip(labels, places, strict=True)}
    if gaps := sorted(set(range(min(max(found) + 1, len(found) + _SHOWN))) - found):
        raise ValueError(
            f"`data`: the labels go up to {max(found)}, and no image is of {_some(gaps)}; number "
            "the classes 0 .. K - 1, or list all with class_names"
        )
    return Classes(len(found))


def _some(things: Sequence[Any]) -> str:
    shown = ", ".join(str(thing)[:40] for thing in things[:_SHOWN])
    return shown + (f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else "")
