"""Files that are either whole or absent."""

import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

# Earlier versions left temporary names without the second number.
_TEMPORARY = re.compile(r"\..+\.(\d{1,9})(?:-[0-9a-f]{12})?\.tmp")


def check_folders(folder: Path, inner: str, name: str) -> None:
    """Check that a folder and one in it are there, or can be made, and take files.

    It is tried with a file that has no name, where the folder will be. Nothing is made, so that a
    call that fails later leaves no empty folder.

    Args:
        folder: the outer folder.
        inner: name of the other one in it.
        name: what the message calls the argument.

    Raises:
        ValueError: naming the place that is a file, or that nothing can be written to.
    """
    there = folder / inner
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            problem = f"{str(there)!r} is a file; it must be a folder"
        elif not os.access(there, os.W_OK | os.X_OK):
            problem = f"nothing can be written to {str(there)!r}"
        else:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(4096))  # one block: fails on a full disk
            return
    except OSError as error:  # a name too long, no space, a disk that is read-only
        problem = f"nothing can be written to {str(there)!r} ({error.strerror})"
    except ValueError as error:  # a null byte
        problem = str(error)
    raise ValueError(f"`{name}` is {str(folder)!r}: {problem}.")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], owner: int = 0) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    The temporary name is unique, and is never one that exists: a link that somebody placed there is
    not followed.

    Args:
        path: where the file shall be.
        write: is given the open file.
        owner: number of the writing process; it is part of the temporary name, so that
            `remove_leftovers` knows whose file it is.
    """
    temporary = path.with_name(f".{path.name}.{owner}-{secrets.token_hex(6)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(temporary, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file was to be written
        raise


def remove_leftovers(folder: Path, owner: int, owners: int) -> None:
    """Remove the temporary files in a folder that a killed run left.

    Args:
        folder: is looked at without its sub-folders; may be missing. The caller owns it
            (`ownership.own`), so that no process that lives has the same number.
        owner: number of the calling process, which removes its own; process 0 also removes those of
            processes that no longer exist.
        owners: number of processes.
    """
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        number = None if found is None else int(found[1])
        if number is not None and (number == owner or (owner == 0 and number >= owners)):
            path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, owner: int = 0) -> None:
    """Write `data`, whole or not at all."""
    write_atomically(path, lambda file: file.write(data), owner)


def write_png(path: Path, image: Image.Image, owner: int = 0) -> None:
    """Write a PNG, whole or not at all."""
    # PIL wants a seekable file of its own; encoding in memory also keeps the file's life short
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    write_bytes(path, encoded.getvalue(), owner)


def write_npz(path: Path, arrays: dict[str, np.ndarray], owner: int = 0) -> None:
    """Write a compressed `.npz` of arrays, whole or not at all."""
    pack: Any = np.savez_compressed
    write_atomically(path, lambda file: pack(file, **arrays), owner)


def write_json(path: Path, content: object, owner: int = 0) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_bytes(path, text.encode(), owner)
