"""The versions, commit and device that measurements, checkpoints and reports are stamped with."""

import platform
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import torch

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


def commit() -> str | None:
    """Return the commit of this package's source, None where it is not in a git repository."""
    folder = Path(__file__).parent
    done = (
        subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD", "--show-toplevel"],
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    if done is None or done.returncode:
        return None
    found, top = done.stdout.split("\n")[:2]
    # an installed package may lie inside somebody else's repository
    return found if Path(top, "training", "common", Path(__file__).name).exists() else None


def device_name(device: torch.device) -> str:
    """Name a GPU by its model, another device by its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
