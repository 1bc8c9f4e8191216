"""The versions that figures, checkpoints and reports are stamped with."""

import platform
from importlib import import_module

# Where the name that is installed is not the one that is imported, but for dashes.
_MODULES = {"scikit-learn": "sklearn"}


def versions(*names: str) -> dict[str, str]:
    """Return the `__version__` of each package by its name, e.g. `scikit-learn` or `python`."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    # not importlib.metadata: torch's leaves out which CUDA it was built for
    if name == "python":
        return platform.python_version()
    return str(import_module(_MODULES.get(name, name.replace("-", "_"))).__version__)
