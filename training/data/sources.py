"""Where images come from: arrays, a folder of files, Parquet, or the `datasets` library.

A source hands out single images as arrays (C, H, W) in the dtype they are stored in. What image
files become is in `image_files.py`; what is taken from a folder is in `folders.py`.
"""

import io
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ddim_schedulers.pipelines.image_files import (
    Fit,
    Header,
    Reading,
    decode,
    header_of,
)
from ddim_schedulers.reading import DamagedFileError, npz_names, read_npy, read_npz
from ddim_schedulers.training.common.repositories import divided, may_be_repository, tell_of_hub
from ddim_schedulers.training.config import DataConfig
from ddim_schedulers.training.data.folders import IMAGE_SUFFIXES, find_images

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
# What `save_to_disk` of `datasets` leaves in a folder, of one split and of several.
_SAVED = ("dataset_info.json", "dataset_dict.json")
_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar", ".7z"})


class ImageSource(Protocol):
    """Random access to images.

    Attributes:
        uniform: whether all have the shape and dtype of the first.
        left_out: what lies in the same place and is not used: how many, by the reason.
        understood: what the place was taken for, where that had to be found out.
    """

    uniform: bool
    left_out: Counter[str]
    understood: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call image `index` in a message."""
        ...

    def header(self, index: int) -> Header:
        """Return shape and dtype. Raises `BadImageError`."""
        ...

    def read(
        self, index: int, fit: Fit | None = None, crop: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the pixels (C, H, W); a large image may be resized or cut by `fit` and `crop`.

        Raises `BadImageError`.
        """
        ...

    def raw(self, index: int) -> tuple[str, Any]:
        """Return the name in the source, and the contents: bytes, an array, or a file's path."""
        ...

    def stored_bytes(self) -> int:
        """Return about how many bytes `raw` gives for all images together."""
        ...

    def listing(self) -> Iterable[str]:
        """Return what is known of every image without reading it."""
        ...


class ArraySource:
    """An array (N, H, W) or (N, H, W, C), in memory or mapped from a file."""

    uniform = True
    understood = ""

    def __init__(self, array: np.ndarray, label: str) -> None:
        if array.ndim not in (3, 4):
            raise ValueError(
                f"`data` is {label}, an array of shape {array.shape}; it must be (N, H, W) "
                "or (N, H, W, C)"
            )
        if array.ndim == 4 and array.shape[3] > 16 >= array.shape[1]:
            raise ValueError(
                f"`data` is {label}, an array of shape {array.shape}, which looks like channels "
                "first; it must be (N, H, W, C)"
            )
        if array.dtype.kind not in "uif":
            raise ValueError(f"`data` is {label}, an array of {array.dtype}; it must hold numbers")
        self.array = array if array.ndim == 4 else array[..., None]
        self.label, self.left_out = label, Counter[str]()

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        """Label and row."""
        return f"{self.label}[{index}]"

    def header(self, index: int) -> Header:
        """Return shape and dtype of the whole array."""
        _, height, width, channels = self.array.shape
        return Header(channels, (height, width), self.array.dtype.name, self.array.dtype.name)

    def read(
        self, index: int, fit: Fit | None = None, crop: np.ndarray | None = None
    ) -> np.ndarray:
        """Return one row as (C, H, W)."""
        return self.many(np.array([index]))[0]

    def raw(self, index: int) -> tuple[str, Any]:
        """Return the row as it is stored; rows have no names."""
        return "", self.array[index]

    def stored_bytes(self) -> int:
        """Return the bytes of the whole array."""
        return int(self.array.nbytes)

    def listing(self) -> Iterable[str]:
        """Return nothing: the shape and dtype of the array tell everything."""
        return [f"{self.array.shape} {self.array.dtype.str}"]

    def many(self, ids: np.ndarray) -> np.ndarray:
        """Return rows as (B, C, H, W), in a dtype that torch has."""
        rows = np.ascontiguousarray(self.array[ids].transpose(0, 3, 1, 2))
        rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
        return rows.astype(np.int64) if rows.dtype in (np.uint32, np.uint64) else rows


class FolderSource:
    """Image files in a folder and its sub-folders, in sorted order; see `find_images`."""

    uniform = False

    def __init__(self, folder: Path, reading: Reading, split: str) -> None:
        self.folder, self.reading = folder, reading
        found = find_images(folder, split)
        self.paths, self.left_out = found.paths, found.left_out
        self.understood, self.suffixes = found.understood, found.suffixes
        self.sizes, self.classes = found.sizes, found.classes

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])

    def header(self, index: int) -> Header:
        """Read the header from the first bytes of the file."""
        return header_of(self.paths[index], self.name(index), self.reading)

    def read(
        self, index: int, fit: Fit | None = None, crop: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the decoded file."""
        return decode(self.paths[index], self.name(index), self.reading, fit, crop)

    def raw(self, index: int) -> tuple[str, Any]:
        """Return the path in the folder, and the whole one."""
        path = self.paths[index]
        return path.relative_to(self.folder).as_posix(), path

    def stored_bytes(self) -> int:
        """Return the bytes of the files."""
        return sum(self.sizes)

    def listing(self) -> Iterator[str]:
        """Return the paths in the folder, with the sizes of the files."""
        for index, size in enumerate(self.sizes):
            yield f"{self.raw(index)[0]} {size}"


class TableSource:
    """The image column of a `datasets` data set (by name, or from Parquet files)."""

    uniform = False

    def __init__(self, table: Any, column: str, label: str, reading: Reading) -> None:
        from datasets import Image

        commit = commit_of(table)
        self.understood = f"commit {commit}" if commit else ""

        self.whole = table
        # Undecoded rows: headers are read without the pixels, and a broken image keeps its name.
        self.table = table.select_columns([column]).cast_column(column, Image(decode=False))
        self.column, self.label, self.reading = column, label, reading
        self.left_out = Counter[str]()

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        """Return the row number, with the file name where the data set has one."""
        return f"{self.label}[{index}]{path_note(self.table[index][self.column])}"

    def header(self, index: int) -> Header:
        """Read the header from the first bytes of the file."""
        return header_of(raw_file(self.table[index][self.column]), self.name(index), self.reading)

    def read(
        self, index: int, fit: Fit | None = None, crop: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the decoded file."""
        file = raw_file(self.table[index][self.column])
        return decode(file, self.name(index), self.reading, fit, crop)

    def raw(self, index: int) -> tuple[str, Any]:
        """Return file name and bytes, or path, as the row holds them."""
        return raw_row(self.table[index][self.column])

    def stored_bytes(self) -> int:
        """Return the bytes of the image column."""
        return int(self.table.data.nbytes)

    def listing(self) -> Iterable[str]:
        """Return nothing: nothing is known of a row before it is read."""
        return ()


def reading_of(config: DataConfig) -> Reading:
    """Return how the settings say that image files are read."""
    return Reading(config.image_mode, config.background, config.max_image_pixels)


def open_source(config: DataConfig) -> ImageSource:
    """Return the source that `config.data` names.

    Raises:
        ValueError: nothing there, no image column or several, no array or several.
    """
    path = Path(config.data)
    check_place(path)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        if config.split not in ("train", "all"):
            raise ValueError(
                f"`split` is {config.split!r}, but {path} is an array, without splits; it "
                "must be train or all"
            )
        return ArraySource(_load_array(path, config), path.name)
    if path.is_dir() and not any((path / name).exists() for name in _SAVED):
        found = FolderSource(path, reading_of(config), config.split)
        if len(found) or ".parquet" not in found.suffixes:
            return found
    table = load_table(config, streaming=False)
    column = find_image_column(table.features, config)
    return TableSource(table, column, config.data, reading_of(config))


def check_place(path: Path) -> None:
    """Refuse a path that cannot be data: a pipe, an archive, a single image, another file.

    Raises:
        ValueError: saying what it is and what to give instead.
    """
    if not path.exists() or path.is_dir():
        return
    if not path.is_file():
        raise ValueError(
            f"`data` is {str(path)!r}, a pipe, socket or device; it must be a file or a folder"
        )
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES | {".parquet"}:
        return
    if suffix in _ARCHIVES or zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
        raise ValueError(f"`data` is {str(path)!r}, an archive; it must be a folder: unpack it")
    if suffix in IMAGE_SUFFIXES:
        raise ValueError(
            f"`data` is {str(path)!r}, a single image; it must be the folder of the "
            "images to train on"
        )
    raise ValueError(
        f"`data` is {str(path)!r}, a file that holds no images as they are read here; it must be a "
        "folder of image files, or a .npy, .npz or .parquet file"
    )


def load_table(config: DataConfig, *, streaming: bool) -> Any:
    """Return what `config.data` names: a `datasets` data set, a Parquet file or a folder of them.

    In a folder the file names say which split they are of, as on the Hub (all are `train` where
    they say nothing).

    Raises:
        ValueError: it cannot be loaded, or there is no such split.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(config.data)
    check_place(path)
    if not path.exists():
        if path.suffix.lower() == ".parquet" or not may_be_repository(config.data):
            raise ValueError(
                f"`data` is {config.data!r}, which does not exist; it must be a folder or a file, "
                "or the name of a data set on the Hub such as ylecun/mnist."
            )
        tell_of_hub("data", config.data)
    try:
        if path.suffix.lower() == ".parquet":
            return load_dataset(
                "parquet", data_files=str(path), split=config.split, streaming=streaming
            )
        if any((path / name).exists() for name in _SAVED):
            return _of_split(load_from_disk(str(path)), config)
        name, revision = (config.data, None) if path.exists() else divided(config.data)
        return load_dataset(
            name,
            config.data_config,
            split=config.split,
            streaming=streaming,
            revision=revision,
        )
    except (FileNotFoundError, ConnectionError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"`data` is {config.data!r}; it must be a data set that can be loaded: {error}"
        ) from error


def commit_of(table: Any) -> str:
    """Return the commit of a data set of the Hub, where its cache tells it; else ''."""
    told = list(getattr(table.info, "download_checksums", None) or ())
    told += [str(file.get("filename", "")) for file in getattr(table, "cache_files", ())]
    found = (re.search(r"[@/\\]([0-9a-f]{40})[/\\]", text) for text in told)
    return next((match[1] for match in found if match), "")


def _of_split(saved: Any, config: DataConfig) -> Any:
    """Return the wanted split of what `save_to_disk` wrote: one table, or one for each split."""
    if isinstance(saved, dict):
        if config.split not in saved:
            raise ValueError(f"`split` is {config.split!r}; the splits are {', '.join(saved)}")
        return saved[config.split]
    own = None if saved.split is None else str(saved.split)
    if config.split not in {"train", "all", own}:
        raise ValueError(
            f"`split` is {config.split!r}; the saved table is {own or 'without splits'}"
        )
    return saved


def find_image_column(features: Any, config: DataConfig) -> str:
    """Return the column named in the config, or the only one that holds images.

    Raises:
        ValueError: it is not there, or there are none or several.
    """
    from datasets import Image

    columns = [name for name, kind in (features or {}).items() if isinstance(kind, Image)]
    if config.image_column is not None:
        if features is not None and config.image_column not in features:
            raise ValueError(
                f"`image_column` is {config.image_column!r}; the columns are {', '.join(features)}"
            )
        return config.image_column
    if len(columns) != 1:
        raise ValueError(
            f"`image_column` is not set, and {config.data} has {len(columns)} image columns among "
            f"{list(features or {})}; it must name one of them"
        )
    return columns[0]


def raw_file(value: dict[str, Any] | None) -> io.BytesIO | Path | None:
    """Return what PIL can open of an undecoded `datasets` image; None if there is no image."""
    if value is None:
        return None
    if value["bytes"] is not None:
        return io.BytesIO(value["bytes"])
    return None if value["path"] is None else Path(value["path"])


def path_note(value: dict[str, Any] | None) -> str:
    """Return the file name of an undecoded `datasets` image in brackets, or nothing."""
    return f" ({value['path']})" if value and value["path"] else ""


def raw_row(value: dict[str, Any] | None) -> tuple[str, Any]:
    """Return name and contents of an undecoded `datasets` image, as `ImageSource.raw` does."""
    if value is None:
        return "", None
    name = Path(value["path"]).name if value["path"] else ""
    file = raw_file(value)
    return name, file.getbuffer() if isinstance(file, io.BytesIO) else file


def label_array(config: DataConfig) -> str:
    """Return the name of the array of labels in an `.npz` file."""
    return "labels" if config.label_column is None else config.label_column


def _load_array(path: Path, config: DataConfig) -> np.ndarray:
    key = config.array_key
    try:
        if path.suffix.lower() == ".npy":
            return read_npy(path, mapped=True)
        names = npz_names(path)
        if key is None and config.class_conditional:
            names = [name for name in names if name != label_array(config)]
        if key not in ({None, *names} if len(names) == 1 else names):
            raise ValueError(
                f"`array_key` is {key!r}; it must be one of {names}, which {path} holds"
            )
        return read_npz(path, [key or names[0]])[key or names[0]]
    except DamagedFileError as error:
        raise ValueError(
            f"`data` is {str(path)!r}, which cannot be read; its file must be whole: {error.reason}"
        ) from error
