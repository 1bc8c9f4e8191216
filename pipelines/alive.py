"""Which process wrote a record, and whether it has ended: by its number, start time and system."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Return what tells this process from every other."""
    return {
        "host": socket.gethostname(),
        "system": system(),
        "pid": os.getpid(),
        "started": started_at(os.getpid()),
    }


def system() -> str | None:
    """Return a name that is equal for processes that see each other's numbers; None if unknown."""
    if sys.platform != "linux":
        # these systems have no containers that share a host's name and folders
        return f"{sys.platform} {socket.gethostname()}" if os.name == "posix" else None
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc of another namespace
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def started_at(pid: int) -> str | None:
    """Return when a process began, in ticks since the boot; "" for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in ("Z", "X") else fields[19]


def is_gone(path: Path, record: Mapping[str, Any]) -> bool:
    """Return whether the owner is known to have ended: it ran on this system and runs no more."""
    pid, started = record.get("pid"), record.get("started")
    if record.get("system") is None or record["system"] != system() or type(pid) is not int:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # the process exists, but another user owns it
        pass
    now = started_at(pid)
    return now is not None and now != started
