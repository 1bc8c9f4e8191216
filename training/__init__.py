"""Accelerate trainer, evaluation and the `ddim-schedulers` command line.

    from ddim_schedulers.training import TrainingConfig, train

    train(TrainingConfig(data="digits", lr=1e-3))

Both are imported at their first use, so that `--help` stays quick. `train` is the module of that
name, and calling it calls its function: the name means the same whatever was imported before.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddim_schedulers.training.config import TrainingConfig
    from ddim_schedulers.training.train import train

__all__ = ["TrainingConfig", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "train":
        return import_module("ddim_schedulers.training.train")
    if name == "TrainingConfig":
        return import_module("ddim_schedulers.training.config").TrainingConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
