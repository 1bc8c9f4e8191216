"""Which networks and schedulers the pipelines accept, decided once and in one place.

A pipeline never converts what it is given. A scheduler fits if its samples live on the
variance-preserving grid x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps with integer
timesteps and unscaled network inputs; that is a property of the scheduler's class and, for a few
classes, of its config. Everything else (flow matching, EDM, the sigma-space Euler and Heun family,
inverse schedulers) raises.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.class_labels import labels_in
from ddim_schedulers.pipelines.interfaces import Network, Scheduler
from ddim_schedulers.solver_tables import stores_noise

# One network call a step, no memory between steps: may start anywhere on tau.
SINGLE_STEP: tuple[type, ...] = (
    MarkovianDDPMScheduler,
    GeneralizedDDIMScheduler,
    DDPMScheduler,
    DDIMScheduler,
)
# Remember earlier network outputs: generation from the start of tau only.
MULTISTEP: tuple[type, ...] = (
    DPMSolverMultistepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
)


def check_scheduler(scheduler: Scheduler, accepted: tuple[type, ...], pipeline: str) -> None:
    """Check that `scheduler` is of an accepted class and keeps to the variance-preserving grid.

    Raises:
        ValueError: naming the scheduler and the accepted classes.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, accepted):
        allowed = ", ".join(dict.fromkeys(c.__name__ for c in accepted))
        raise ValueError(
            f"`scheduler` is a {name}, which does not fit {pipeline}; it must be one of: "
            f"{allowed}. Nothing is converted silently: build the one you want with "
            "`from_config(scheduler.config)`."
        )
    if scheduler.config.get("use_flow_sigmas") or "flow" in scheduler.config.prediction_type:
        raise ValueError(
            f"`scheduler` is a {name} set to flow matching (`use_flow_sigmas` or a flow "
            f"`prediction_type`); {pipeline} needs the variance-preserving grid of DDPM."
        )


def check_network(unet: Network, name: str = "unet") -> None:
    """Check that a network takes (sample, timestep), and class numbers at most, as `UNet2DModel`.

    Args:
        unet: the network.
        name: of the argument, for the message.

    Raises:
        ValueError: for another condition than the number of a class, or a network whose config
            does not tell its image size.
    """
    if not isinstance(unet, torch.nn.Module) or not hasattr(unet, "config"):
        raise ValueError(f"`{name}` is {type(unet).__name__}; it must be a UNet2DModel.")
    config = unet.config
    try:
        classes = labels_in(config)
    except ValueError as error:
        raise ValueError(f"`{name}` does not fit: {error}.") from error
    known = () if classes is None else ("class_labels",)
    extra = [name for name in _required_arguments(unet)[2:] if name not in known]
    if extra:
        raise ValueError(
            f"`{name}` is a {type(unet).__name__} whose forward needs {extra}; a UNet2DModel takes "
            "(sample, timestep), and class_labels where it is conditional."
        )
    if config.get("sample_size") is None:
        raise ValueError(
            f"`{name}.config.sample_size` is None; it must be the height and width of the images."
        )
    channels = config.in_channels
    if config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"`{name}` maps {channels} channels to {config.out_channels}; it must return "
            f"{channels}, or {2 * channels} with a learned variance."
        )


def forget_history(scheduler: Scheduler) -> None:
    """Let the next step of a scheduler have order 1, as the first one."""
    if isinstance(scheduler, GeneralizedDDIMScheduler):
        scheduler.forget_history()
    elif isinstance(scheduler, MULTISTEP):
        stock: Any = scheduler
        stock.lower_order_nums = 0
        if isinstance(scheduler, UniPCMultistepScheduler):
            stock.last_sample = None  # the corrector's


def has_argument(method: Callable, name: str) -> bool:
    """Tell whether `method` takes an argument called `name` (the schedulers' `step`s differ)."""
    return name in inspect.signature(method).parameters


def is_deterministic(scheduler: Scheduler) -> bool:
    """Tell whether no noise follows x_T, given `eta=0` where the scheduler takes an eta."""
    config = scheduler.config
    if isinstance(scheduler, (MarkovianDDPMScheduler, DDPMScheduler)):
        return False
    if isinstance(scheduler, GeneralizedDDIMScheduler):
        silent = config.sigma is None or not any(config.sigma)
        if config.solver_calibrated and config.eta is None:
            silent = silent and not stores_noise(config.calibration)
        return not config.eta and silent and config.reverse_variance == "sigma"
    return not str(config.get("algorithm_type", "")).startswith("sde")


def _required_arguments(module: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
