"""The moving average of the weights, as a second network that is always ready to be used."""

import copy
from collections.abc import Iterable

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from ddim_schedulers.training.config import EMAConfig


class AveragedUNet:
    """diffusers' `EMAModel` whose shadow tensors are the parameters of a network of their own.

    Evaluation and export use `unet`; nothing is ever swapped into the network in training, so there
    is nothing to restore. The average lives on the device of the weights it is made from. Every
    process keeps the same average, because every process has the same weights after a step.

    Args:
        source: the network in training, already on its device and in its memory format.
        config: decay and warm-up; with `use_ema` off, `unet` is `source` itself.
    """

    def __init__(self, source: UNet2DModel, config: EMAConfig) -> None:
        self.source = source
        self.ema: EMAModel | None = None
        self.unet = source
        if not config.use_ema:
            return
        self.unet = copy.deepcopy(source).requires_grad_(False).eval()
        self.ema = EMAModel(
            self.unet.parameters(),
            decay=config.ema_decay,
            update_after_step=config.ema_update_after_step,
            use_ema_warmup=config.ema_warmup,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            foreach=True,
        )
        # EMAModel updates its shadow in place, so sharing the storage keeps `unet` up to date.
        self.ema.shadow_params = [parameter.data for parameter in self.unet.parameters()]
        self.weights: list[torch.Tensor] = list(source.parameters())

    @property
    def name(self) -> str:
        """Return which weights `unet` has, 'ema' or 'raw', as every report says."""
        return "raw" if self.ema is None else "ema"

    def step(self) -> None:
        """Move the average towards the weights of the network in training."""
        if self.ema is None:
            return
        ema = self.ema
        ema.optimization_step += 1
        move(ema.shadow_params, self.weights, 1 - ema.get_decay(ema.optimization_step))

    def state_dict(self) -> dict[str, int]:
        """Return the clock of the warm-up; the weights are saved as a UNet."""
        return {} if self.ema is None else {"optimization_step": self.ema.optimization_step}

    def load(self, weights: dict[str, torch.Tensor], state: dict[str, int]) -> None:
        """Restore weights and clock in place."""
        if self.ema is not None:
            copy_into(self.unet.named_parameters(), weights)
            self.ema.optimization_step = state["optimization_step"]


@torch.no_grad()
def move(average: list[torch.Tensor], weights: list[torch.Tensor], share: float) -> None:
    """Move `average` in place by `share` of the way to `weights`.

    `EMAModel.step` reads and writes every number twice for it. From a half on `lerp` comes from the
    other end, which rounds otherwise.
    """
    if share < 0.5:
        torch._foreach_lerp_(average, weights, share)
    else:
        torch._foreach_sub_(average, torch._foreach_sub(average, weights), alpha=share)


@torch.no_grad()
def copy_into(
    parameters: Iterable[tuple[str, torch.Tensor]], weights: dict[str, torch.Tensor]
) -> None:
    """Copy named `weights` into `parameters` in place, keeping device and memory format.

    Raises:
        ValueError: a name or shape that does not match.
    """
    own = dict(parameters)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())[:3]
        raise ValueError(
            f"`weights` has other parameters than this network, for instance {odd}; both "
            "must have the same"
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"`weights` has {name} of shape {tuple(weights[name].shape)}; it must be "
                f"{tuple(parameter.shape)}, as in this network"
            )
        parameter.copy_(weights[name])
