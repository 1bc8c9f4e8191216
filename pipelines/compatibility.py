"""Which networks and schedulers the pipelines accept, decided once and in one place.

A pipeline never converts what it is given. A scheduler fits if its samples live on the
variance-preserving grid x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps with integer
timesteps and unscaled network inputs; that is a property of the scheduler's class and, for a few
classes, of its config. Everything else (flow matching, EDM, the sigma-space Euler and Heun family,
inverse schedulers) raises.
"""

import inspect
from collections.abc import Callable

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines.interfaces import Network, Scheduler

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


def check_network(unet: Network) -> None:
    """Check that `unet` is unconditional: it takes (sample, timestep) alone, as `UNet2DModel` does.

    Raises:
        ValueError: for a class-conditional or otherwise conditioned network, or one whose config
            does not tell its image size.
    """
    if not isinstance(unet, torch.nn.Module) or not hasattr(unet, "config"):
        raise ValueError(f"`unet` is {type(unet).__name__}; it must be a UNet2DModel.")
    config = unet.config
    conditioned = [k for k in ("num_class_embeds", "class_embed_type") if config.get(k) is not None]
    if conditioned:
        raise ValueError(
            f"`unet` is class-conditional ({conditioned[0]}={config[conditioned[0]]!r}); these "
            "pipelines sample unconditional networks and would have no class to pass."
        )
    extra = _required_arguments(unet)[2:]
    if extra:
        raise ValueError(
            f"`unet` is a {type(unet).__name__} whose forward needs {extra}; an unconditional "
            "UNet2DModel takes (sample, timestep) alone."
        )
    if config.get("sample_size") is None:
        raise ValueError(
            "`unet.config.sample_size` is None; it must be the height and width of the images."
        )
    channels = config.in_channels
    if config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"`unet` maps {channels} channels to {config.out_channels}; it must return {channels}, "
            f"or {2 * channels} with a learned variance."
        )


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
        return not config.eta and silent and config.reverse_variance == "sigma"
    return not str(config.get("algorithm_type", "")).startswith("sde")


def _required_arguments(module: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
