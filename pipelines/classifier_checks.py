"""Whether a classifier of noisy images fits the network that it is to guide."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ddim_schedulers.class_labels import ClassLabels
from ddim_schedulers.pipelines.interfaces import Network, Scheduler
from ddim_schedulers.pipelines.sampling import alpha_bar_table


def check_classifier(
    classifier: torch.nn.Module,
    network: Network,
    scheduler: Scheduler,
    classes: ClassLabels | None,
) -> None:
    """Check how a classifier is called, and what its config tells, as that of `train-classifier`.

    Args:
        classifier: any module; one without a config tells nothing of its images and classes.
        network: the one that it guides.
        scheduler: of the process.
        classes: of the network; None if it has none.

    Raises:
        ValueError: naming what differs.
    """
    if not isinstance(classifier, torch.nn.Module):
        raise ValueError(
            f"`classifier` is {type(classifier).__name__}; it must be a torch.nn.Module that takes "
            "(x_t, t)."
        )
    try:
        inspect.signature(classifier.forward).bind("x_t", "t")
    except TypeError as error:
        raise ValueError(
            f"`classifier` is {type(classifier).__name__}, whose forward does not take (x_t, t); "
            "it must be a classifier of noisy images."
        ) from error
    config = getattr(classifier, "config", None)
    if not isinstance(config, Mapping):
        return
    own = {
        "in_channels": network.config.in_channels,
        "sample_size": _pair(network.config.sample_size),
        "num_train_timesteps": scheduler.config.num_train_timesteps,
    }
    for key, value in own.items():
        found = config.get(key, value)
        if (_pair(found) if key == "sample_size" else found) != value:
            raise ValueError(
                f"`classifier` has {key}={found!r}; it must be {value!r}, as that of the pipeline."
            )
    _check_levels(config.get("process"), scheduler)
    if classes is not None and config.get("num_classes") is not None:
        _check_classes(config, classes)


def _check_levels(process: Any, scheduler: Scheduler) -> None:  # noqa: ANN401
    """Check the noise levels at some timesteps, where the config tells them."""
    told = process.get("alpha_bar") if isinstance(process, Mapping) else None
    if not isinstance(told, Mapping):
        return
    own = alpha_bar_table(scheduler)
    for t, value in told.items():
        # stock schedulers keep float32
        if abs(float(own[int(t)]) - float(value)) > 1e-5:
            raise ValueError(
                f"`classifier` was trained with alpha_bar {value:.5f} at t = {t}; it must be "
                f"{float(own[int(t)]):.5f}, as that of the pipeline."
            )


def _check_classes(config: Mapping[str, Any], classes: ClassLabels) -> None:
    """Check that class k of the network is class k of the classifier."""
    count, names = config["num_classes"], config.get("class_names")
    if classes.ids != tuple(range(count)):
        raise ValueError(
            f"`classifier` has the classes 0 to {count - 1}; it must have those of `unet`, "
            f"{classes.ids[0]} to {classes.ids[-1]}."
        )
    for number, name in classes.names.items():
        if names and names[number] != name:
            raise ValueError(
                f"`classifier` calls class {number} {names[number]!r}; it must be {name!r}, as in "
                "`unet`."
            )


def _pair(size: Any) -> tuple[int, int]:  # noqa: ANN401
    return (size, size) if isinstance(size, int) else tuple(size)
