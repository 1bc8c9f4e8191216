"""The one bounded reader of files that others wrote, or that a disk or a hand may have harmed.

Whatever is wrong with a file is one `DamagedFileError` with the file's name: not there, not a
file, too large, not text, nested too deep, cut short, or declared larger than it is. Sizes are
compared before anything of that size is allocated, and nothing that is read can run code.
"""

import io
import json
import math
import os
import pickletools
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch

JSON_BYTES = 4 << 20  # the config of a scheduler with everything measured for T = 1000 has 0.2 MB
YAML_BYTES = 128 << 10  # settings that a person wrote; PyYAML reads about 0.1 MB a second
DEPTH = 64  # of lists and mappings in each other
YAML_NODES = 100_000  # with every alias written out
NUMBER_LENGTH = 400  # the float with the most digits has 309 before its point
ENTRIES = 10_000  # arrays in an archive
# Deflate reaches 1000 to 1 on zeros. Real images stay far below this, small files may have it all.
EXPANSION, FREE_BYTES = 200, 64 << 20
# What pickles of tensors name; dtypes are lower case. Not `bytearray`, `torch Tensor` and the like,
# which torch makes as large as they are asked to be.
_TENSORS = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_\w+|torch ([A-Z]\w+Storage|[a-z]\w+)"
    r"|torch Size|torch\.serialization _get_layout|torch\.nn\.parameter Parameter"
)
NPY_HEADER = 10_000  # numpy's own bound
INTEGERS = range(-(2**63), 2**64)  # what numpy and torch can hold

Place = str | os.PathLike[str]


class DamagedFileError(ValueError):
    """A file that cannot be used: `path` says which, `reason` why, as the end of a sentence."""

    def __init__(self, path: Place, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"{str(path)!r} cannot be read: {reason}.")

    def __reduce__(self) -> tuple[type["DamagedFileError"], tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # else its message is made twice in a worker


@contextmanager
def opened(path: Place) -> Iterator[IO[bytes]]:
    """Open a regular file; a pipe or a device, which may block or never end, is not opened.

    Raises:
        DamagedFileError: there is none, it is something else, or the system refuses.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a folder" if os.path.isdir(path) else "no regular file"
            raise DamagedFileError(path, f"it is {kind}")
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise DamagedFileError(path, "there is no such file") from None
    except DamagedFileError:
        raise
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        raise DamagedFileError(path, str(getattr(error, "strerror", None) or error)) from error
    with file:
        yield file


def read_bytes(path: Place, limit: int | None = None) -> bytes:
    """Return the contents of a regular file of at most `limit` bytes.

    Raises:
        DamagedFileError: it cannot be read, or is larger.
    """
    with opened(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if limit is None:
                return file.read()
            data = b"" if size > limit else file.read(limit + 1)
        except OSError as error:
            raise DamagedFileError(path, str(error.strerror or error)) from error
    if max(size, len(data)) > limit:
        raise DamagedFileError(
            path, f"it has {max(size, len(data))} bytes; at most {limit} are read"
        )
    return data


def read_text(path: Place, limit: int = JSON_BYTES) -> str:
    """Return the UTF-8 text of a file, without a byte order mark.

    Raises:
        DamagedFileError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"it is not UTF-8 text ({error.reason})") from None


# -- JSON and YAML --------------------------------------------------------------------------------


def read_json(
    path: Place, kind: type | None = dict, *, finite: bool = False, limit: int = JSON_BYTES
) -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file.
        kind: type of the whole; None for any.
        finite: refuse NaN and infinities, which diffusers writes into some configs.
        limit: bytes of the file.

    Raises:
        DamagedFileError: it cannot be read, is not JSON, holds a key twice, a number that no
            machine number can hold, or another type.
    """
    return parse_json(read_text(path, limit), path, kind, finite=finite)


def parse_json(text: str, path: Place, kind: type | None = dict, *, finite: bool = False) -> Any:
    """Return what JSON text holds, as `read_json`; `path` is for the message."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise DamagedFileError(path, f"it is nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise DamagedFileError(path, f"it is not valid JSON: {error}") from None
    if (reason := _unusable(value, finite)) is not None:
        raise DamagedFileError(path, reason)
    if kind is not None and not isinstance(value, kind):
        names: dict[type, str] = {dict: "a JSON object", list: "a JSON list"}
        name = names.get(kind, kind.__name__)
        raise DamagedFileError(path, f"it must hold {name}, not {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} appears twice")
        found[name] = value
    return found


def read_yaml(path: Place, limit: int = YAML_BYTES) -> Any:
    """Return what a YAML file holds: plain values, no objects.

    Raises:
        DamagedFileError: it cannot be read, is not YAML of plain values, holds a key twice, or is
            too much once its aliases are written out.
    """
    import yaml

    text = read_text(path, limit)
    try:
        loader = _loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, 0, {})
        value = loader.construct_document(node)
    except RecursionError:
        raise DamagedFileError(path, f"it is nested deeper than {DEPTH} levels") from None
    except _TooMuch as error:
        raise DamagedFileError(path, str(error)) from None
    except yaml.YAMLError as error:
        raise DamagedFileError(
            path, f"it is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    # PyYAML's constructors of dates, numbers and flags fail in their own ways
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DamagedFileError(path, f"it holds a value that is none: {error}") from None
    if (reason := _unusable(value, finite=False)) is not None:
        raise DamagedFileError(path, reason)
    return value


def _loader(text: str) -> Any:
    """Return a loader of plain values that stops at `DEPTH`, before Python's own limit."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > DEPTH:
                raise _TooMuch(f"it is nested deeper than {DEPTH} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader(text)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _TooMuch(Exception):
    pass


def _measure(node: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return (nodes, levels) of a YAML tree with its aliases written out, each alias counted once.

    Raises:
        _TooMuch: there are too many, or a key appears twice.
    """
    if id(node) in known:
        return known[id(node)]
    if depth > DEPTH:  # where a node holds itself, too
        raise _TooMuch(f"it is nested deeper than {DEPTH} levels")
    if isinstance(node.value, str) and node.tag in _NUMBERS and len(node.value) > NUMBER_LENGTH:
        raise _TooMuch(f"it holds a number of {len(node.value)} characters")
    children = node.value if isinstance(node.value, list) else []
    if children and isinstance(children[0], tuple):
        keys = [(key.tag, key.value) for key, _ in children if isinstance(key.value, str)]
        seen: set[tuple[str, str]] = set()
        for key in keys:
            if key in seen:
                raise _TooMuch(f"the key {key[1][:80]!r} appears twice")
            seen.add(key)
        children = [part for pair in children for part in pair]
    parts = [_measure(child, depth + 1, known) for child in children]
    size, levels = 1 + sum(n for n, _ in parts), 1 + max((h for _, h in parts), default=0)
    if levels > DEPTH:
        raise _TooMuch(f"it is nested deeper than {DEPTH} levels")
    if size > YAML_NODES:
        raise _TooMuch(f"it has more than {YAML_NODES} values once its aliases are written out")
    known[id(node)] = (size, levels)
    return size, levels


def _unusable(value: Any, finite: bool) -> str | None:
    """Say what in plain values cannot be worked with, or None."""
    stack = [(value, 1)]
    while stack:
        part, depth = stack.pop()
        if depth > DEPTH:
            return f"it is nested deeper than {DEPTH} levels"
        if isinstance(part, dict):
            stack += [(item, depth + 1) for pair in part.items() for item in pair]
        elif isinstance(part, list | tuple | set):
            stack += [(item, depth + 1) for item in part]
        elif isinstance(part, str):
            if not part.isascii() and re.search("[\ud800-\udfff]", part):
                return "it holds text that is no Unicode (half of a surrogate pair)"
        elif isinstance(part, int):
            if part not in INTEGERS:
                return f"it holds an integer of {part.bit_length()} bits; at most 64 are read"
        elif isinstance(part, float) and finite and not math.isfinite(part):
            return f"it holds {part}, which is not finite"
    return None


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
        RuntimeError,  # an encrypted entry; too deep a header is a RecursionError, which is one
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
        # others are unpacked by the block, for every declared size
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedFileError(path, f"{name[:80]!r} is compressed in a way numpy never does")
        entries[name] = entry
    return archive, entries


def _header(path: Place, stream: IO[bytes], size: int, name: str | None) -> None:
    """Compare what an array of `size` bytes says of itself with its size."""
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
    """Check that a file of `torch.save` unpacks to no more than it is, and holds tensors alone.

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
    except Exception as error:  # the library's own kind, and what its types do not know
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
