"""The network compiled for training, and the check that its gradients are the network's own.

On the CPU, the inductor of torch below 2.14 gives the right output and loses gradients behind the
backward pass of nearest upsampling (https://github.com/pytorch/pytorch/issues/185509). Nothing else
would show it: the loss is right, and whole layers stay as they were drawn.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

# A compiled gradient may be off by this share of its norm, and by so many times as much as mixed
# precision alone is off. What was lost is off by its whole norm.
TOLERANCE, TIMES = 1e-3, 4.0
# Shares of the largest norm, in float32 and in bfloat16. A smaller gradient is rounding alone, as
# that of the bias of attention's keys, which is 0.
NEGLIGIBLE, NEGLIGIBLE_IN_HALF = 1e-6, 1e-4


def loses_gradients(device: torch.device) -> bool:
    """Return whether compiled upsampling may lose gradients: on the CPU, with torch < 2.14."""
    return device.type == "cpu" and torch.__version__ < "2.14"  # compares as a version, not as text


def compile_for_training(unet: UNet2DModel, mode: str | None, backend: str) -> Any:
    """Compile `unet`; where `loses_gradients`, it upsamples by copying, another backward pass.

    Args:
        unet: the network; where `loses_gradients`, its upsampling layers are changed.
        mode: of `torch.compile`.
        backend: of `torch.compile`.
    """
    if loses_gradients(unet.device):
        for module in unet.modules():
            if isinstance(module, Upsample2D) and not module.use_conv_transpose:
                if module.interpolate:
                    module.interpolate = False
                    module.register_forward_pre_hook(_repeat_pixels)
    return torch.compile(unet, mode=mode, backend=backend)


def _repeat_pixels(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Do what `interpolate(scale_factor=2, mode="nearest")` does."""
    x: Tensor = inputs[0]
    b, c, h, w = x.shape
    repeated = x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2)
    return (repeated.reshape(b, c, 2 * h, 2 * w), *inputs[1:])


def check_gradients(
    network: Any,
    unet: UNet2DModel,
    x: Tensor,
    t: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    labels: Tensor | None = None,
) -> None:
    """Compare the gradients of a compiled network with those of the network it was made of.

    Args:
        network: `unet`, compiled, maybe within DDP; then every process passes the same batch.
        unet: the network, without dropout, whose masks compiled code draws in another order. Its
            gradients are gone afterwards.
        x: a batch as the network will see it, (B, C, H, W).
        t: its timesteps, (B,).
        autocast: mixed precision of the run, or None.
        labels: its classes, (B,), for a network that has classes.

    Raises:
        ValueError: a gradient differs by more than rounding, and by how much the worst; or they
            are not finite without compilation either.
    """
    with _no_weights_of_zero(unet):
        exact = eager = _gradients(unet, unet, x, t, labels, nullcontext)
        if autocast is not None:
            eager = _gradients(unet, unet, x, t, labels, autocast)
        found = _gradients(network, unet, x, t, labels, autocast or nullcontext)
    if not all(bool(gradient.isfinite().all()) for gradient in exact.values()):
        raise ValueError(
            "`compile` is true, but the gradients of this network are not finite without "
            "compilation; they must be"
        )
    negligible = NEGLIGIBLE if autocast is None else NEGLIGIBLE_IN_HALF
    floor = negligible * max(float(gradient.norm()) for gradient in exact.values())
    wrong = {}
    for name, gradient in exact.items():
        norm = float(gradient.norm())
        rounding = float((eager[name] - gradient).norm())
        off = float((found[name] - gradient).norm())
        if not off <= TOLERANCE * norm + TIMES * rounding + floor:  # NaN, too
            wrong[name] = off / max(norm, floor)
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise ValueError(
            f"`compile` is true, but torch {torch.__version__} loses gradients of this network: "
            f"{len(wrong)} of {len(exact)} differ from those without compilation, that of {worst} "
            f"by {wrong[worst]:.2g} of its norm; train without `compile` (sampling may be compiled)"
        )


def _gradients(
    network: Any,
    unet: UNet2DModel,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Tensor]:
    """Return the gradients of the mean squared output by name; zeros where there is none."""
    classes = {} if labels is None else {"class_labels": labels}
    unet.zero_grad()
    with autocast():
        output = network(x, t, **classes, return_dict=False)[0]
    output.to(x.dtype).square().mean().backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in unet.named_parameters()
    }
    unet.zero_grad()
    return found


@contextmanager
def _no_weights_of_zero(unet: UNet2DModel) -> Iterator[None]:
    """Fill weights that begin at zero, through which no gradient would come, for a while."""
    zeros = [p for p in unet.parameters() if p.ndim > 1 and not bool(p.any())]
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            p.copy_(0.02 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
