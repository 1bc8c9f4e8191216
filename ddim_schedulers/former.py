"""Names that changed: the former one works for one release, and says what it is now."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def former(
    module: str, home: str, names: tuple[str, ...] | Mapping[str, str]
) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose `names` have moved or changed.

    Args:
        module: the former place.
        home: the module that has them now.
        names: what the former place gives with a `DeprecationWarning`; a mapping has the present
            name of each.
    """
    present = names if isinstance(names, Mapping) else {name: name for name in names}

    def get(name: str) -> Any:
        if name not in present:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {home}.{present[name]}; the former name goes with the next "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), present[name])

    return get
