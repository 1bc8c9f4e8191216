"""Where images come from: arrays, a folder of files, Parquet, or the `datasets` library.

A source hands out single images as arrays (C, H, W) in the dtype they are stored in. Nothing is
converted here except what the user asked for (`image_mode`) and palettes, which have no other
meaning.
"""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ddim_schedulers.training.config import DataConfig

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
_CHANNELS = {"L": 1, "1": 1, "RGB": 3, "RGBA": 4, "LA": 2, "F": 1, "I": 1, "I;16": 1, "I;16B": 1}


class BadImageError(ValueError):
    """An image that cannot be decoded; `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"data: cannot read image {name}: {reason}")

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # else its message is made twice in a worker


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are decoded."""

    channels: int
    size: tuple[int, int]
    dtype: str


class ImageSource(Protocol):
    """Random access to images; `uniform` says that all have the shape and dtype of the first."""

    uniform: bool

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""
        ...

    def header(self, index: int) -> Header:
        """Shape and dtype. Raises `BadImageError`."""
        ...

    def read(self, index: int) -> np.ndarray:
        """The pixels (C, H, W). Raises `BadImageError`."""
        ...


class ArraySource:
    """An array (N, H, W) or (N, H, W, C), in memory or mapped from a file."""

    uniform = True

    def __init__(self, array: np.ndarray, label: str) -> None:
        if array.ndim not in (3, 4):
            raise ValueError(
                f"data: the array of {label} has shape {array.shape}; it must be (N, H, W) or "
                "(N, H, W, C)"
            )
        if array.ndim == 4 and array.shape[3] > 16 >= array.shape[1]:
            raise ValueError(
                f"data: the array of {label} has shape {array.shape}, which looks like channels "
                "first; it must be (N, H, W, C)"
            )
        if array.dtype.kind not in "uif":
            raise ValueError(f"data: the array of {label} holds {array.dtype}, not numbers")
        self.array = array if array.ndim == 4 else array[..., None]
        self.label = label

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        """Label and row."""
        return f"{self.label}[{index}]"

    def header(self, index: int) -> Header:
        """Shape and dtype of the whole array."""
        _, height, width, channels = self.array.shape
        return Header(channels, (height, width), self.array.dtype.name)

    def read(self, index: int) -> np.ndarray:
        """One row as (C, H, W)."""
        return self.many(np.array([index]))[0]

    def many(self, ids: np.ndarray) -> np.ndarray:
        """Rows as (B, C, H, W), in a dtype that torch has."""
        rows = np.ascontiguousarray(self.array[ids].transpose(0, 3, 1, 2))
        rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
        return rows.astype(np.int64) if rows.dtype in (np.uint32, np.uint64) else rows


class FolderSource:
    """Image files in a folder and its sub-folders, in sorted order."""

    uniform = False

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        self.paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def header(self, index: int) -> Header:
        """From the first bytes of the file."""
        return header_of(self.paths[index], self.name(index), self.mode)

    def read(self, index: int) -> np.ndarray:
        """The decoded file."""
        return decode(self.paths[index], self.name(index), self.mode)


class TableSource:
    """The image column of a `datasets` data set (by name, or from Parquet files)."""

    uniform = False

    def __init__(self, table: Any, column: str, label: str, mode: str) -> None:
        from datasets import Image

        # Undecoded rows: headers are read without the pixels, and a broken image keeps its name.
        self.table = table.select_columns([column]).cast_column(column, Image(decode=False))
        self.column, self.label, self.mode = column, label, mode

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        """Row number, with the file name where the data set has one."""
        return f"{self.label}[{index}]{path_note(self.table[index][self.column])}"

    def header(self, index: int) -> Header:
        """From the first bytes of the file."""
        return header_of(raw_file(self.table[index][self.column]), self.name(index), self.mode)

    def read(self, index: int) -> np.ndarray:
        """The decoded file."""
        return decode(raw_file(self.table[index][self.column]), self.name(index), self.mode)


def open_source(config: DataConfig) -> ImageSource:
    """The source that `config.data` names.

    Raises:
        ValueError: nothing there, no image column or several, no array or several.
    """
    path = Path(config.data)
    if path.suffix in ARRAY_SUFFIXES:
        return ArraySource(_load_array(path, config.array_key), path.name)
    if path.is_dir() and not (path / "dataset_info.json").exists():
        found = FolderSource(path, config.image_mode)
        if len(found) or not any(path.rglob("*.parquet")):
            return found
    table = load_table(config, streaming=False)
    column = find_image_column(table.features, config)
    return TableSource(table, column, config.data, config.image_mode)


def load_table(config: DataConfig, *, streaming: bool) -> Any:
    """What `config.data` names: a `datasets` data set, a Parquet file or a folder of them.

    In a folder the file names say which split they are of, as on the Hub (all are `train` where
    they say nothing).

    Raises:
        ValueError: it cannot be loaded, or there is no such split.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(config.data)
    try:
        if path.suffix == ".parquet":
            return load_dataset(
                "parquet", data_files=str(path), split=config.split, streaming=streaming
            )
        if (path / "dataset_info.json").exists():
            return load_from_disk(str(path))
        return load_dataset(
            config.data, config.data_config, split=config.split, streaming=streaming
        )
    except (FileNotFoundError, ConnectionError, ValueError, DatasetsError) as error:
        raise ValueError(f"data: cannot load {config.data!r}: {error}") from error


def find_image_column(features: Any, config: DataConfig) -> str:
    """The column named in the config, or the only one that holds images.

    Raises:
        ValueError: it is not there, or there are none or several.
    """
    from datasets import Image

    columns = [name for name, kind in (features or {}).items() if isinstance(kind, Image)]
    if config.image_column is not None:
        if features is not None and config.image_column not in features:
            raise ValueError(
                f"image_column is {config.image_column!r}; the columns are {', '.join(features)}"
            )
        return config.image_column
    if len(columns) != 1:
        raise ValueError(
            f"data: {config.data} has {len(columns)} image columns among {list(features or {})}; "
            "name the right one with image_column"
        )
    return columns[0]


def raw_file(value: dict[str, Any] | None) -> io.BytesIO | Path | None:
    """What PIL can open, from an undecoded `datasets` image; None where the row has no image."""
    if value is None:
        return None
    if value["bytes"] is not None:
        return io.BytesIO(value["bytes"])
    return None if value["path"] is None else Path(value["path"])


def path_note(value: dict[str, Any] | None) -> str:
    """The file name of an undecoded `datasets` image in brackets, or nothing."""
    return f" ({value['path']})" if value and value["path"] else ""


def header_of(file: io.BytesIO | Path | None, name: str, mode: str) -> Header:
    """Channels, size and dtype of an image file, without decoding its pixels.

    Raises:
        BadImageError: it cannot be read.
        ValueError: it can, but has no mode that is trained on.
    """
    with _opened(file, name) as image:
        actual = _mode_of(image, name, mode)
        return Header(_CHANNELS[actual], (image.height, image.width), _dtype(actual))


def decode(file: io.BytesIO | Path | None, name: str, mode: str) -> np.ndarray:
    """The pixels of an image file, (C, H, W), uint8, uint16 or float32. Raises as `header_of`."""
    with _opened(file, name) as image:
        actual = _mode_of(image, name, mode)
        try:
            image.load()
        except _unreadable() as error:
            raise BadImageError(name, str(error)) from error
        same = image.mode == actual and actual != "1"
        pixels = np.array(image if same else image.convert("L" if actual == "1" else actual))
    pixels = pixels.astype(_dtype(actual), copy=False)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _opened(file: io.BytesIO | Path | None, name: str) -> Any:
    from PIL import Image

    if file is None:
        raise BadImageError(name, "the row holds no image")
    try:
        return Image.open(file)
    except _unreadable() as error:
        raise BadImageError(name, str(error)) from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What PIL raises for broken or absurdly large files, depending on the format."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def _mode_of(image: Any, name: str, wanted: str) -> str:
    # PIL has no mode for colours of 16 bits: it would drop the lower half.
    if not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in image.tile):
        raise ValueError(
            f"data: {name} has colours of 16 bits a channel, of which PIL reads only 8; store such "
            "images as an array of uint16 in a .npy file, or convert them to 8 bits yourself"
        )
    if wanted != "keep":
        if image.mode.startswith(("I", "F")):  # PIL would clip these to 8 bits
            raise ValueError(f"data: {name} has mode {image.mode}; image_mode must be keep for it")
        return wanted
    if image.mode in ("P", "PA"):  # a palette is a way to store colours, not a kind of pixel
        return "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"
    if image.mode not in _CHANNELS:
        raise ValueError(f"data: {name} has mode {image.mode}; convert it, or set image_mode")
    return str(image.mode)


def _dtype(mode: str) -> str:
    return {"F": "float32", "I": "int32", "I;16": "uint16", "I;16B": "uint16"}.get(mode, "uint8")


def _load_array(path: Path, key: str | None) -> np.ndarray:
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"data: cannot read {path}: {error}") from error
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if key is None and len(loaded.files) != 1:
            raise ValueError(f"data: {path} holds {loaded.files}; choose one with array_key")
        if key is not None and key not in loaded.files:
            raise ValueError(f"array_key is {key!r}; {path} holds {loaded.files}")
        array: np.ndarray = loaded[key or loaded.files[0]]
        return array
