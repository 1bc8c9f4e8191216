"""The inputs of a step: their checks, their dtype, and what is read without a wait."""

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .family_config import UNSAID, predicts_variance
from .reverse_noise import LearnedNoise

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor outlives the mode that it was made in.

    What `FakeTensorMode`, `torch.export`, `torch.func.vmap` and the like pass around has no
    storage to point to. `torch.compile` takes care of what its code keeps.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def check_tensors(**tensors: Any) -> None:
    """Refuse what is no tensor.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` is {reprlib.repr(value)}; it must be a tensor.")


def check_pair(**tensors: Any) -> None:
    """Refuse two tensors that cannot be added: no tensors, of no floating dtype, on two devices.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_tensors(**tensors)
    (first, data), (second, noise) = tensors.items()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` has dtype {tensor.dtype}; it must be a floating dtype.")
    if noise.device != data.device:
        raise ValueError(
            f"`{second}` is on the device {noise.device}; it must be on that of `{first}`, "
            f"{data.device}."
        )


def pick_rows(rows: torch.Tensor, timesteps: torch.Tensor, name: str) -> torch.Tensor:
    """Return the rows of a tensor of timesteps, one after the other.

    On an accelerator nothing is read back, and a timestep out of range is the device's own error.
    """
    check_tensors(**{name: timesteps})
    if timesteps.is_meta and not rows.is_meta:
        raise ValueError(
            f"`{name}` is on the device 'meta' and has no values; it must be on the device of the "
            f"sample, {rows.device}, or on the CPU."
        )
    if timesteps.dtype not in INTEGER_DTYPES:
        raise ValueError(f"`{name}` has dtype {timesteps.dtype}; it must be an integer tensor.")
    index = timesteps.to(rows.device, torch.int64).reshape(-1)
    try:
        return rows.index_select(0, index)
    except IndexError as error:
        raise ValueError(
            f"`{name}` is {timesteps}; each must be an integer in 0 .. {rows.shape[0] - 1}."
        ) from error


def read_if_free(timestep: torch.Tensor) -> int | list[int] | None:
    """Return the integer or integers of a timestep if reading them costs nothing.

    None on an accelerator, which a read-back would wait for; in traced code; and for a tensor
    without a value, as `torch.func.vmap` and `make_fx` pass it.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or not timestep.is_cpu or timestep.dtype not in INTEGER_DTYPES:
        return None
    try:  # not `tolist`, which hands `make_fx` a constant
        return int(timestep) if timestep.ndim == 0 else [int(t) for t in timestep.flatten()]
    except RuntimeError:
        return None


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return float64 if one of the tensors has it, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in a dtype; `Tensor.to` costs more where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def noise_like(
    prediction: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
    variance_noise: torch.Tensor | None,
) -> torch.Tensor:
    """Return the standard normal noise of a step, drawn or given, in the shape of the prediction.

    Raises:
        ValueError: for noise and a generator both, or noise that does not fit.
    """
    if variance_noise is None:
        # the same call as stock diffusers, so that a swap keeps the noise of a seed
        return randn_tensor(
            prediction.shape, generator=generator, device=prediction.device, dtype=prediction.dtype
        )
    if generator is not None:
        raise ValueError("`generator` and `variance_noise` are both given; pass one of them.")
    check_pair(model_output=prediction, variance_noise=variance_noise)
    if variance_noise.shape != prediction.shape:
        raise ValueError(
            f"`variance_noise` has shape {tuple(variance_noise.shape)}; it must be "
            f"{tuple(prediction.shape)}."
        )
    return variance_noise


def has_half(model_output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Tell whether the output has twice the channels of the sample, and is as large otherwise."""
    shape = sample.shape
    return len(shape) > 1 and model_output.shape == (shape[0], 2 * shape[1], *shape[2:])


def split_output(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    learned: LearnedNoise | None,
    config: Mapping[str, Any],
    key: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the prediction, and the variance that the network told if the step uses it.

    Of an output of 2 C channels the second half is the variance. It is left out only where the
    config says that the network predicts one and the step takes its noise, if any, from
    elsewhere.

    Args:
        model_output: of the network.
        sample: (B, C, ...).
        learned: how the step uses the second half, or `None` where it does not.
        config: of the scheduler.
        key: the setting in it that names the noise.

    Raises:
        ValueError: for another shape or dtype.
    """
    if not (sample.is_floating_point() and model_output.is_floating_point()):
        name = "model_output" if sample.is_floating_point() else "sample"
        dtype = model_output.dtype if sample.is_floating_point() else sample.dtype
        raise ValueError(f"`{name}` has dtype {dtype}; it must be a floating dtype.")
    if model_output.device != sample.device:
        raise ValueError(
            f"`model_output` is on the device {model_output.device}; it must be on that of "
            f"`sample`, {sample.device}."
        )
    if learned is None and model_output.shape == sample.shape:
        return model_output, None
    doubled = has_half(model_output, sample)
    if doubled and (learned is not None or predicts_variance(config)):
        prediction, variance = torch.split(model_output, sample.shape[1], dim=1)
        return prediction, None if learned is None else variance
    expected, why = tuple(sample.shape), ""
    if learned is not None and key is not None:
        expected = (expected[0], 2 * expected[1], *expected[2:])
        why = (
            f", twice the channels because `{key}` is {config.get(key)!r}; set another where "
            "the variance has been split off"
        )
    elif doubled:
        why = (
            "; if the network predicts a variance in the second half of its channels, pass "
            "`variance_type='learned_range'` to `from_config`"
        )
    raise ValueError(
        f"`model_output` has shape {tuple(model_output.shape)}; for a `sample` of shape "
        f"{tuple(sample.shape)} it must be {expected}{why}."
    )


def unsaid_variance(config: Mapping[str, Any], key: str) -> str:
    """Return what is wrong where the network tells a variance and the config names no noise.

    Args:
        config: of the scheduler.
        key: the setting in it that names the noise.
    """
    used = "`reverse_variance='learned_range'` with `eta=1.0` uses it"
    if key == "variance_type":
        used = "`variance_type='learned_range'` uses it"
    elif config.get("variance_type") == "learned":
        used = "`MarkovianDDPMScheduler` uses it"
    return (
        f"`{key}` is not set, but the step adds noise and `model_output` has twice the "
        "channels of `sample`: a variance that the network predicts. Say in `from_config` "
        f"which noise is added: {used}, `{key}={UNSAID[key]!r}` leaves it out."
    )


def check_one_timestep(timestep: int | torch.Tensor, solver_order: int) -> None:
    """Refuse a timestep for each sample, where the batch shares a history.

    Raises:
        ValueError: for a tensor of more than one value, or of none.
    """
    if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
        raise ValueError(
            f"`timestep` has shape {tuple(timestep.shape)}; with "
            f"`solver_order`={solver_order} it must be one number for the whole "
            "batch, whose steps share a history."
        )


def check_on_plan(timestep: int | torch.Tensor, plan: list[int]) -> None:
    """Refuse an off-plan timestep, for which an explicit sigma says nothing.

    A timestep on an accelerator, or in a traced call, cannot be looked at without a read-back:
    there an off-plan row is NaN.

    Raises:
        ValueError: for a timestep that is not in the plan.
    """
    asked = read_if_free(timestep) if isinstance(timestep, torch.Tensor) else timestep
    if asked is None:
        return
    for t in asked if isinstance(asked, list) else [asked]:
        if t not in plan:
            raise ValueError(
                f"`timestep` is {t}, which is not planned; with explicit `sigma` it must be "
                f"one of {plan}."
            )
