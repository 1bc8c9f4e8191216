"""Folders that a later call goes on with: what their files depend on, and which are missing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from ddim_schedulers.reading import DamagedFileError, read_json

Item = TypeVar("Item")
Value = TypeVar("Value")

SHOWN = 120  # characters of a value in a message


class Workdir(Generic[Item, Value]):
    """The files of one kind in a folder that a later call goes on with.

    A sub-class is a format: it says where the file of an item is, and reads and saves it. This
    class says which items are missing, and refuses files that were made with other settings.

    Attributes:
        argument: what a caller names the folder by.
        holds: what the files hold.
        remedy: what to do about files that were made with other settings.
        settings_name: the file with the settings of all files; empty where each file has its own.
    """

    argument: str = "output"
    holds: str = "files"
    remedy: str = "choose another folder"
    settings_name: str = ""

    def __init__(self, folder: Path) -> None:
        """Keep the folder; nothing is read or made yet."""
        self.folder = folder

    def path_of(self, item: Item) -> Path:
        """Return where the file of an item is, or will be."""
        raise NotImplementedError

    def read(self, item: Item) -> Value:
        """Return what the file of an item holds.

        Raises:
            DamagedFileError: it is not whole, or not of this item.
        """
        raise NotImplementedError

    def save(self, item: Item, value: Value) -> None:
        """Write the file of an item, whole or not at all."""
        raise NotImplementedError

    def tell(self, error: DamagedFileError) -> None:
        """Tell of a damaged file, which is made again."""
        raise NotImplementedError

    def load(self, item: Item) -> Value | None:
        """Return what the file of an item holds; None if there is none, or none that is whole."""
        if not self.path_of(item).exists():
            return None
        try:
            return self.read(item)
        except DamagedFileError as error:
            self.tell(error)
            return None

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Return the items without a whole file."""
        return [item for item in items if self.load(item) is None]

    def kept_settings(self) -> dict[str, Any] | None:
        """Return the settings of the files in the folder; None if it has no such file.

        Raises:
            DamagedFileError: the file is not whole.
        """
        path = self.folder / self.settings_name
        return read_json(path) if path.exists() else None

    def require_same(
        self,
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        holds: str = "",
    ) -> None:
        """Compare the settings that files were made with to those of this call.

        Args:
            before: of the files.
            now: of this call.
            defaults: as in `differences`.
            holds: what the files hold, where it is not the same for all.

        Raises:
            ValueError: naming each setting that differs, with its old and its new value.
        """
        if differing := differences(before, now, defaults):
            self.refuse("; ".join(differing), holds)

    def refuse(self, why: str, holds: str = "") -> None:
        """Refuse files that were made with other settings.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"`{self.argument}` is {str(self.folder)!r}; it holds {holds or self.holds} made with "
            f"other settings ({why}); {self.remedy}."
        )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Name the settings that differ, each with both values.

    Args:
        before: the settings of an earlier call.
        now: those of this one.
        defaults: by name with its groups (`group.name`), what a setting counts as that either side
            lacks, as earlier versions did; None for all others.
    """
    defaults = {} if defaults is None else defaults
    then, here = flat(before), flat(now)
    found = []
    for name in sorted(then.keys() | here.keys()):
        default = defaults.get(name)
        old, new = then.get(name, default), here.get(name, default)
        if old != new:
            found.append(_difference(name, old, new))
    return found


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the groups in them taken apart: `group.name`, groups in groups too."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found.update({f"{key}.{name}": inner for name, inner in flat(value).items()})
        else:
            found[key] = value
    return found


def _difference(name: str, old: Any, new: Any) -> str:
    """Return what differs; of long lists the first entry that does."""
    if max(len(repr(old)), len(repr(new))) > SHOWN and isinstance(old, list):
        if isinstance(new, list) and len(old) == len(new):
            places = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            first = places[0]
            return _difference(f"{name}[{first}]", old[first], new[first]) + more
    return f"{name}: {_shown(old)} there, {_shown(new)} now"


def _shown(value: Any) -> str:
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    count = f"{len(value)} values, " if isinstance(value, list) else ""
    return f"{count}{text[:SHOWN]}..."
