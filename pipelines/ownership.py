"""A folder has one owner: a second process is refused before it changes anything.

    FOLDER/.owner-0.json   who writes here; its time of change is the owner's last sign of life
    FOLDER/.owner.lock     a lock of `filelock`, held only while ownership changes hands

The lock alone would not do: a forked worker inherits it and outlives its parent, and some file
systems keep it to one machine or have none. The record says which process owns the folder:

- On the same system (the same boot and the same namespace of process numbers) a process is looked
  up, and its start time tells it from a later one with its number. An owner that is gone is
  replaced at once; one that is stopped is still the owner.
- Elsewhere (another machine or container) the owner counts as gone after `SILENCE_SECONDS` without
  a sign of life. Times are those of the file system, so clocks need not agree.

An owner that was replaced, because its machine slept, finds out by `Owner.check`, which is called
before every write and every deletion. Readers take no lock.
"""

import contextlib
import errno
import json
import os
import secrets
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ddim_schedulers.pipelines.alive import identity, is_gone
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.unwinding import signals_unwind

PREFIX = ".owner"
MUTEX = f"{PREFIX}.lock"
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 120.0
MUTEX_SECONDS = 60.0
_MOST_BYTES = 65536
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class OwnershipError(ValueError):
    """A folder that belongs to another process."""


class FolderInUseError(OwnershipError):
    """A folder that another process owns; nothing was changed in it."""


class OwnershipLostError(OwnershipError):
    """A folder that another process took over, because this one gave no sign of life."""


@dataclass
class Owner:
    """What one process holds of a folder; see `own`.

    Attributes:
        folder: the folder, resolved.
        record: the file that names the owner; None where nothing is written (a reader).
        token: the unique name of this ownership.
        parts: names in the folder that are owned; None for all of it.
        keeps: whether this process gives the signs of life, or relies on the main one for them.
    """

    folder: Path
    record: Path | None = None
    token: str | None = None
    parts: frozenset[str] | None = None
    keeps: bool = False
    pid: int = field(default_factory=os.getpid)
    _uses: int = 1
    _made: list[Path] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Make sure that the folder is still owned; call it before writing and deleting.

        Raises:
            OwnershipLostError: another process took it over, or the record was deleted.
        """
        if self.record is None or self.token is None:
            return
        found = _read(self.record)
        if found is None or found.get("token") != self.token:
            now = "its record is gone" if found is None else f"it belongs to {_describe(found)}"
            raise OwnershipLostError(
                f"{self.folder} was taken over while this process gave no sign of life: {now}; "
                "this process stops and writes nothing more"
            )

    def covers(self, place: Path) -> bool:
        """Return whether `place`, resolved, is the folder or an owned part of it."""
        return _covers(self.folder, self.parts, place)

    def _keep_alive(self) -> None:
        assert self.record is not None
        while not self._end.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file system may be away for a while
                found = _read(self.record)
                if found is None or found.get("token") != self.token:
                    return
                os.utime(self.record)

    def _release(self) -> None:
        self._end.set()
        if self.pid != os.getpid() or not self.keeps or self.record is None:
            return
        with contextlib.suppress(OSError), _mutex(self.folder):
            if (_read(self.record) or {}).get("token") == self.token:
                self.record.unlink()
        for folder in self._made:  # folders that stayed empty
            with contextlib.suppress(OSError):
                folder.rmdir()


_held: dict[Path, Owner] = {}


@contextlib.contextmanager
def own(
    folder: str | os.PathLike[str],
    verb: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    parts: frozenset[str] | None = None,
    read_only: bool = False,
    transient: bool = False,
) -> Iterator[Owner]:
    """Own a folder inside the `with`; a process enters again what it owns, and what is inside it.

    The folder is made where missing, and removed at the end if it was made here and stayed empty.
    SIGTERM and SIGHUP release the folder and then act as they would have.

    Args:
        folder: the folder.
        verb: what is done there, for the message to others.
        rank: number of this process among those that share the folder without talking to each
            other. Each owns its share.
        world_size: how many they are. Those of another launch are refused.
        parts: names in the folder that are written; a process may own any other sub-folder
            meanwhile. None is all of it.
        read_only: nothing is written to the folder, which others must leave alone meanwhile; where
            no record can be written, nobody is kept out.
        transient: remove the folder at the end if it is empty, whoever made it.

    Raises:
        FolderInUseError: naming the owner, its process and its last sign of life.
        OSError: nothing can be written to the folder.
    """
    place = Path(folder).resolve()
    with signals_unwind():
        owner = _holder_of(place)
        if owner is None:
            owner = _claim(place, verb, rank, world_size, parts, read_only)
            owner._made += [place] if transient and place not in owner._made else []
            _held[place] = owner
        else:
            made = [p for p in (place, *place.parents) if not p.exists()]
            place.mkdir(parents=True, exist_ok=True)
            owner._made = [*made, *owner._made]
            owner._uses += 1
        try:
            yield owner
        finally:
            _leave(owner)


@contextlib.contextmanager
def follow(
    folder: str | os.PathLike[str], said: tuple[str, str | None, str | None] | None
) -> Iterator[Owner]:
    """Rely on the ownership of the main process, which said (folder, token, name of the record)."""
    place = Path(folder).resolve()
    if (holder := _holder_of(place)) is not None:
        holder._uses += 1
    else:
        place, token, name = (place, None, None) if said is None else (Path(said[0]), *said[1:])
        record = None if name is None else place / name
        if record is not None and not record.exists():  # a folder of another machine
            record = None
        holder = _held[place] = Owner(place, record, token)
    try:
        yield holder
    finally:
        _leave(holder)


def _leave(owner: Owner) -> None:
    owner._uses -= 1
    if owner._uses == 0:
        if _held.get(owner.folder) is owner:
            del _held[owner.folder]
        owner._release()


def _holder_of(place: Path) -> Owner | None:
    for at in (place, *place.parents):
        owner = _held.get(at)
        # a forked child does not own what its parent owns
        if owner is not None and owner.pid == os.getpid() and owner.covers(place):
            return owner
    return None


def _claim(
    place: Path,
    verb: str,
    rank: int,
    world_size: int,
    parts: frozenset[str] | None,
    read_only: bool,
) -> Owner:
    own_record = {
        **identity(),
        "verb": verb,
        "token": secrets.token_hex(8),
        "rank": rank,
        "world_size": world_size,
        "launch": _launch() if world_size > 1 else secrets.token_hex(8),
        "parts": None if parts is None else sorted(parts),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    made = [p for p in (place, *place.parents) if not p.exists()]
    record = place / f"{PREFIX}-{rank}.json"
    owner = Owner(place, record, own_record["token"], parts, keeps=True, _made=made)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _take(place, record, own_record)
    except OSError as error:
        if not read_only or error.errno not in _READ_ONLY:
            raise
        _refuse([found for found in _others(place, own_record) if not is_gone(*found)])
        return Owner(place, parts=parts)
    threading.Thread(target=owner._keep_alive, name="folder-owner", daemon=True).start()
    return owner


def _take(place: Path, record: Path, own_record: dict[str, Any]) -> None:
    """Write the record, or refuse; silent owners elsewhere are watched before they are replaced."""
    watched: dict[Path, float] = {}
    while True:
        with _mutex(place):
            living, silent = [], {}
            for path, found in _others(place, own_record):
                if is_gone(path, found):
                    if path.parent == place:
                        path.unlink(missing_ok=True)
                elif _silence(path, place) <= SILENCE_SECONDS:
                    living.append((path, found))
                elif watched.get(path) != (changed := path.stat().st_mtime):
                    silent[path] = changed
                elif path.parent == place:
                    path.unlink(missing_ok=True)
            _refuse(living)
            if not silent:
                write_bytes(record, (json.dumps(own_record, indent=1) + "\n").encode())
                break
        # watch for a change; times of files may come from clocks that disagree
        watched = silent
        time.sleep(1.5 * HEARTBEAT_SECONDS)
    # a process that claims a folder around or inside this one holds another mutex
    around = [(p, r) for p, r in _others(place, own_record) if p.parent != place]
    around = [(p, r) for p, r in around if not is_gone(p, r) and p not in watched]
    if around:
        record.unlink(missing_ok=True)
        _refuse(around)


def _others(place: Path, mine: Mapping[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the records of others that a process with the record `mine` would disturb."""
    found = []
    for path in sorted(place.glob(f"{PREFIX}-*.json")):
        record = _read(path) or {}
        together = record.get("launch") == mine["launch"] and mine["world_size"] > 1
        same_split = record.get("world_size") == mine["world_size"]
        if not (together and same_split and record.get("rank") != mine["rank"]):
            found.append((path, record))
    name = f"{PREFIX}-0.json"
    for above in place.parents:
        around = _read(above / name)
        if around is not None and _covers(above, around.get("parts"), place):
            found.append((above / name, around))
    if mine["parts"] is None:
        below = list(place.glob(f"*/{name}"))
    else:
        below = [place / part / name for part in mine["parts"]]
    found += [(path, _read(path) or {}) for path in below if path.exists()]
    return [(path, record) for path, record in found if not _is_ours(record)]


def _is_ours(record: Mapping[str, Any]) -> bool:
    """Return whether the process itself owns a sub-folder of what it is about to own."""
    tokens = {o.token for o in _held.values() if o.pid == os.getpid()}
    return record.get("token") in tokens


def _covers(folder: Path, parts: Any, place: Path) -> bool:
    if place == folder:
        return True
    if folder not in place.parents:
        return False
    return parts is None or place.relative_to(folder).parts[0] in parts


def _refuse(living: list[tuple[Path, dict[str, Any]]]) -> None:
    if not living:
        return
    path, record = living[0]
    try:
        seen = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        last = seen.isoformat(sep=" ", timespec="seconds")
    except OSError:
        last = "a moment ago"
    raise FolderInUseError(
        f"{path.parent} is in use by {_describe(record)}, last sign of life {last}; wait for its "
        "end, stop it, or choose another folder (if that machine is gone, try again after "
        f"{SILENCE_SECONDS:.0f} s of silence)"
    )


def _describe(record: Mapping[str, Any]) -> str:
    return (
        f"`{record.get('verb', 'an unknown verb')}` on host {record.get('host', 'unknown')}, "
        f"process {record.get('pid', 'unknown')}"
    )


def _silence(path: Path, place: Path) -> float:
    """Return the seconds since the last sign of life, by the file system's clock, in the mutex.

    A record that vanished in between counts as alive: the caller reads the records again.
    """
    try:
        os.utime(place / MUTEX)
        return (place / MUTEX).stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _launch() -> str:
    """Return what the processes of one launch have in common; empty where nothing says so."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
    return " ".join(os.environ.get(name, "") for name in names).strip()


def _read(path: Path) -> dict[str, Any] | None:
    """Return a record; None if there is none, empty if it cannot be understood."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError:
        return {}
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return {}
        try:
            value = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _mutex(place: Path) -> Iterator[None]:
    """Let one process in at a time; `filelock` falls back to a file where there is no flock."""
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    path = place / MUTEX
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fallback
        lock: BaseFileLock = FileLock(path, timeout=MUTEX_SECONDS)
        try:
            try:
                lock.acquire()
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_FLOCK:
                    raise
                lock = SoftFileLock(path, timeout=MUTEX_SECONDS)
                lock.acquire()
        except Timeout as error:
            raise FolderInUseError(
                f"{place} is being taken by another process ({path.name} is locked for "
                f"{MUTEX_SECONDS:.0f} s); try again"
            ) from error
    try:
        yield
    finally:
        # A process that waits for the lock finds that its file is deleted, and makes a new one.
        if not isinstance(lock, SoftFileLock):
            with contextlib.suppress(OSError):
                path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lock.release()
