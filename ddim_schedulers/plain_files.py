"""The bounded reader of bytes, text, JSON and YAML that others wrote; see `reading`."""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

JSON_BYTES = 4 << 20  # the config of a scheduler with everything measured for T = 1000 has 0.2 MB
YAML_BYTES = 128 << 10  # settings that a person wrote; PyYAML reads about 0.1 MB a second
DEPTH = 64  # of lists and mappings in each other
YAML_NODES = 100_000  # with every alias written out
NUMBER_LENGTH = 400  # the float with the most digits has 309 before its point
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
