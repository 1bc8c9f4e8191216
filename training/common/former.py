"""Names that moved: the former place still gives them for one release, and says where they are."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def former(module: str, home: str, names: tuple[str, ...]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose `names` are now in another one.

    Args:
        module: the former place.
        home: the module that has them now.
        names: what the former place gives with a `DeprecationWarning`.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {home}.{name}; the former name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), name)

    return get
