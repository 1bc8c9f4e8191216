"""What a folder that a later call goes on with needs: whole files, and settings that agree."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ddim_schedulers.reading import DamagedFileError

T = TypeVar("T")


def whole(
    path: Path, read: Callable[[], T], damaged: Callable[[DamagedFileError], object]
) -> T | None:
    """Return what `read` makes of a file; None if there is none, or none that is whole.

    Args:
        path: the file.
        read: reads it, and raises `DamagedFileError` if it is not what it must be.
        damaged: is given that error, to tell of it.
    """
    if not path.exists():
        return None
    try:
        return read()
    except DamagedFileError as error:
        damaged(error)
        return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ, each with both values; one that is missing counts as None."""
    return [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the groups in them taken apart: `group.name`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {}
        found.update({f"{key}.{name}": x for name, x in inner.items()} if inner else {key: value})
    return found
