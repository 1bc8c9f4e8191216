"""The bounded reader of archives of arrays and tensors that others wrote; see `reading`."""

import io
import math
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn

import numpy as np
import torch

from .plain_files import JSON_BYTES, DamagedFileError, Place, opened, parse_json, read_bytes

ENTRIES = 10_000  # arrays in an archive
# The largest ratio of sizes. Deflate packs zeros 1000 to 1, real images far less. A small array is
# free of the limit.
EXPANSION, FREE_BYTES = 200, 64 << 20
# What pickles of tensors name; dtypes are lower case. Not `bytearray`, `torch Tensor` and the like,
# which torch makes as large as they are asked to be.
_TENSORS = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_\w+|torch ([A-Z]\w+Storage|[a-z]\w+)"
    r"|torch Size|torch\.serialization _get_layout|torch\.nn\.parameter Parameter"
)
NPY_HEADER = 10_000  # numpy's own bound


# -- arrays ---------------------------------------------------------------------------------------


def npz_names(path: Place) -> list[str]:
    """Return the names of the arrays in an `.npz` file.

    Raises:
        DamagedFileError: it is no such file.
    """
    with opened(path) as file:
        return list(_entries(path, file)[1])


def read_npz(
    path: Place, names: Iterable[str] | None = None, limit: int | None = None
) -> dict[str, np.ndarray]:
    """Return arrays of an `.npz` file, by name; their check sums are compared.

    Args:
        path: the file.
        names: which are read; None for all.
        limit: bytes of all that are read; None for `EXPANSION` times the size of the file.

    Raises:
        DamagedFileError: it cannot be read, lacks a name, is cut short or changed, holds objects,
            or declares more than `limit`, which is found before anything is unpacked.
    """
    with opened(path) as file, _faults(path):
        archive, entries = _entries(path, file)
        wanted = list(entries) if names is None else list(names)
        if missing := [name for name in wanted if name not in entries]:
            raise DamagedFileError(path, f"it holds {list(entries)}, but not {missing[0]!r}")
        declared = sum(entries[name].file_size for name in wanted)
        most = limit
        if most is None:
            most = max(FREE_BYTES, EXPANSION * os.fstat(file.fileno()).st_size)
        else:
            most += NPY_HEADER * len(wanted)
        if declared > most:
            raise DamagedFileError(
                path, f"it declares {declared} bytes of arrays; at most {most} are read"
            )
        found = {}
        for name in wanted:
            with archive.open(entries[name]) as stream:
                _header(path, stream, entries[name].file_size, name)
            with archive.open(entries[name]) as stream:
                found[name] = np.lib.format.read_array(stream, allow_pickle=False)
        return found


def read_npy(path: Place, *, mapped: bool = False) -> np.ndarray:
    """Return the array of an `.npy` file, or a view of it on the disk.

    Raises:
        DamagedFileError: it cannot be read, holds objects, or is not as long as it declares.
    """
    with opened(path) as file, _faults(path):
        _header(path, file, os.fstat(file.fileno()).st_size, None)
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


@contextmanager
def _faults(path: Place) -> Iterator[None]:
    """Turn what zipfile, zlib and numpy raise on damaged archives into `DamagedFileError`."""
    try:
        yield
    except DamagedFileError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,  # an encrypted entry, or a header that is nested too deep
        NotImplementedError,
        ValueError,
        TypeError,
        SyntaxError,
        OverflowError,
    ) as error:
        raise DamagedFileError(path, str(error) or type(error).__name__) from error


def _entries(path: Place, file: IO[bytes]) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Return the archive and its arrays' entries; nothing is unpacked."""
    with _faults(path):
        archive = zipfile.ZipFile(file)
        listed = archive.infolist()
    if len(listed) > ENTRIES:
        raise DamagedFileError(path, f"it has {len(listed)} entries; at most {ENTRIES} are read")
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        name = entry.filename.removesuffix(".npy")
        if name == entry.filename or name in entries:
            raise DamagedFileError(
                path, f"its entry {entry.filename[:80]!r} is no array of its own"
            )
        # other methods are unpacked in blocks, whatever size the entry declares
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedFileError(path, f"{name[:80]!r} is compressed in a way numpy never does")
        entries[name] = entry
    return archive, entries


def _header(path: Place, stream: IO[bytes], size: int, name: str | None) -> None:
    """Check that shape and dtype of an array fit its `size` in bytes."""
    what = "it" if name is None else repr(name[:80])
    version = np.lib.format.read_magic(stream)
    width = {(1, 0): 2, (2, 0): 4}.get(version)
    if width is None:
        raise DamagedFileError(path, f"{what} has the version {version} of the format")
    prefix = stream.read(width)
    length = int.from_bytes(prefix, "little")
    if length > NPY_HEADER:
        raise DamagedFileError(path, f"{what} has a header of {length} bytes")
    header = io.BytesIO(prefix + stream.read(length))
    read = (
        np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    )
    try:
        shape, _, dtype = read(header)
    except Exception as error:  # numpy parses it as Python, whose parser fails in many ways
        raise DamagedFileError(path, f"{what} has a header that cannot be read") from error
    if dtype.hasobject or not dtype.itemsize:
        raise DamagedFileError(path, f"{what} holds {dtype}, not numbers")
    start = 6 + 2 + width + length
    if any(side < 0 for side in shape) or start + math.prod(shape) * dtype.itemsize != size:
        raise DamagedFileError(
            path,
            f"{what} declares an array {shape} of {dtype}, which does not fit its {size} bytes",
        )


def check_archive(path: Place) -> None:
    """Check that a file of `torch.save` is not larger unpacked, and holds tensors alone.

    For `torch.load(weights_only=True)`, which runs no code but makes a `bytearray` or a tensor of
    any size that a pickle of 60 bytes asks for.

    Raises:
        DamagedFileError: it declares more than twice its size, is no whole archive, or its pickle
            names something else than tensors and dictionaries.
    """
    with opened(path) as file, _faults(path):
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not is_zip:  # before torch 1.6: three pickles, then that of the contents
            for _ in range(4):
                _check_pickle(path, file)
            return
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
            declared = sum(entry.file_size for entry in listed)
            most = max(FREE_BYTES, 2 * os.fstat(file.fileno()).st_size)
            if declared > most:
                raise DamagedFileError(
                    path, f"it declares {declared} bytes of contents; at most {most} are read"
                )
            for entry in listed:
                if entry.filename.endswith(".pkl"):
                    _check_pickle(path, io.BytesIO(archive.read(entry)))


def _check_pickle(path: Place, file: IO[bytes]) -> None:
    """Read one pickle without making anything of it."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            other = opcode.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
            if other or (opcode.name == "GLOBAL" and not _TENSORS.fullmatch(str(argument))):
                raise ValueError(f"it names {str(argument)[:80]!r}")
    except ValueError as error:
        raise DamagedFileError(path, f"it is no PyTorch file of tensors alone: {error}") from None


# -- tensors --------------------------------------------------------------------------------------


def read_safetensors(
    path: Place, limit: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its metadata.

    Raises:
        DamagedFileError: it cannot be read, or its header does not fit its contents.
    """
    from safetensors.torch import load

    data = read_bytes(path, limit)
    metadata = safetensors_header(data, path).get("__metadata__", {})
    try:
        return load(data), metadata
    except Exception as error:  # the library's own class, or a type that it does not know
        _not_tensors(path, error)


def safetensors_shapes(path: Place) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and shape of every tensor of a safetensors file, without its contents.

    Raises:
        DamagedFileError: it cannot be read, or its header is none.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        data = start + file.read(min(length, JSON_BYTES))
    header = safetensors_header(data, path)
    found, stop = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape = tuple(int(side) for side in entry["shape"])
            found[name] = (str(entry["dtype"]), shape)
            stop = max(stop, int(entry["data_offsets"][1]))
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise DamagedFileError(path, f"its header does not describe {name[:80]!r}") from error
    if stop + len(data) != size:
        raise DamagedFileError(path, f"its {size} bytes are no whole safetensors file")
    return found


def safetensors_header(data: bytes, path: Place) -> dict[str, Any]:
    """Return the header of the contents of a safetensors file; `path` is for the message.

    Raises:
        DamagedFileError: it has none, or a metadata that does not map text to text.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise DamagedFileError(path, f"its {len(data)} bytes are no whole safetensors file")
    if length > JSON_BYTES:
        raise DamagedFileError(
            path, f"its header has {length} bytes; at most {JSON_BYTES} are read"
        )
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"its header is not UTF-8 text ({error.reason})") from None
    header: dict[str, Any] = parse_json(text, path)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedFileError(path, "its metadata do not map names to text")
    return header


def _not_tensors(path: Place, error: Exception) -> NoReturn:
    raise DamagedFileError(
        path, f"it is no whole safetensors file: {' '.join(str(error).split())}"
    ) from error
