"""The sampling loop that every pipeline shares, and what it needs to know of a scheduler.

The sample x_t is kept in float64 for a float64 network and in float32 otherwise, so that a
half-precision network does not round the state at every step; only the network's input is cast.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from diffusers.utils import logging

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    parameterization,
)
from ddim_schedulers.pipelines.compatibility import (
    forget_history,
    has_argument,
    is_deterministic,
)
from ddim_schedulers.pipelines.guidance import BoundNetwork, ClassifierFreeNetwork
from ddim_schedulers.pipelines.interfaces import Network, Scheduler
from ddim_schedulers.pipelines.noise import Generators
from ddim_schedulers.scheduling_base import FamilySchedulerMixin
from ddim_schedulers.sigmas import check_eta

logger = logging.get_logger(__name__)

DEFAULT_STEPS = 50


@dataclass
class Step:
    """One step of the loop, from t to the next planned timestep s (or to the end).

    Attributes:
        index: position in the plan, from 0.
        timestep: t, a 0-d integer tensor.
        x_t: the sample before the step, (B, C, H, W).
        model_output: what the network said about x_t, in the sample's dtype.
        x0: x0_hat as the scheduler used it (after clipping), None if it does not say.
        x_s: the sample after the step. A callback may replace it.
    """

    index: int
    timestep: torch.Tensor
    x_t: torch.Tensor
    model_output: torch.Tensor
    x0: torch.Tensor | None
    x_s: torch.Tensor


AfterStep = Callable[[Step], None]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which samples are kept: float64 for a float64 network, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_compiled(network: Network) -> bool:
    """Tell whether `network.compile()` or `torch.compile(network)` was used."""
    if isinstance(network, BoundNetwork):
        return any(map(is_compiled, network.networks))
    # by attribute: importing torch's compiler to ask for its class takes as long as torch itself
    marks = ("_compiled_call_impl", "_orig_mod")
    return any(getattr(network, mark, None) is not None for mark in marks)


def speed_up(
    network: Any,  # noqa: ANN401
    *,
    compile: bool | dict[str, Any] = False,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Make a network faster, in place; the arguments are those of the pipelines' `speed_up`."""
    if dtype is not None and dtype != network.dtype:
        # `ModelMixin.to` warns of modules to be kept in float32 also where there are none
        names = ("_keep_in_fp32_modules", "is_quantized")
        special = any(getattr(network, name, None) for name in names)
        network.to(dtype) if special else torch.nn.Module.to(network, dtype)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if compile is True or isinstance(compile, dict):
        network.compile(**({} if compile is True else compile))


def predict(
    network: Network, x: torch.Tensor, t: torch.Tensor | int, batch_size: int = 0
) -> torch.Tensor:
    """Return the network's output for x (B, C, H, W) at timestep t, in the dtype of x.

    A compiled network gets the last, smaller batch filled up to `batch_size` with repeats of its
    first sample: a new shape would compile again, which takes longer than the wasted rows. Its t is
    always a tensor, for each new integer would compile again, too.
    """
    given = x
    if is_compiled(network):
        t = torch.as_tensor(t, device=x.device)
        if len(x) < batch_size:
            given = torch.cat([x, x[:1].expand(batch_size - len(x), -1, -1, -1)])
    return network(given.to(network.dtype), t).sample[: len(x)].to(x.dtype)


def plan(
    scheduler: Scheduler,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Set the scheduler's trajectory tau and return its timesteps, in the order of stepping.

    Args:
        scheduler: any that fits.
        num_inference_steps: number of steps; None with `timesteps` None takes the trajectory kept
            in the scheduler's config, else 50 steps.
        timesteps: explicit trajectory, strictly decreasing.
        device: where the sample is.

    Raises:
        ValueError: if both are given, or the scheduler cannot take explicit timesteps.
    """
    steps = num_inference_steps
    if steps is not None and (not isinstance(steps, Integral) or steps < 1):  # stock divides by it
        raise ValueError(f"`num_inference_steps` is {steps!r}; it must be an integer >= 1.")
    if timesteps is None:
        if num_inference_steps is None and not _keeps_trajectory(scheduler):
            num_inference_steps = DEFAULT_STEPS
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps
    if num_inference_steps is not None:
        raise ValueError(
            "`num_inference_steps` and `timesteps` are both given; pass one of the two."
        )
    if not isinstance(timesteps, Iterable):
        raise ValueError(f"`timesteps` is {timesteps!r}; it must be a decreasing list of integers.")
    if not has_argument(scheduler.set_timesteps, "timesteps"):
        raise ValueError(
            f"`timesteps` was given, but {type(scheduler).__name__}.set_timesteps takes none; use "
            "GeneralizedDDIMScheduler.from_config(scheduler.config)."
        )
    scheduler.set_timesteps(timesteps=list(timesteps), device=device)
    return scheduler.timesteps


def nearest_planned(timestep: int, planned: Sequence[int], name: str) -> int:
    """Return the timestep of the trajectory that is nearest to `timestep`; of two, the larger.

    A timestep that is not planned is replaced with a word: what belongs to it must be made for the
    one that is returned.

    Args:
        timestep: t in 0 .. T - 1.
        planned: the trajectory.
        name: what the message calls the argument.
    """
    nearest = min(planned, key=lambda t: (abs(t - timestep), -t))
    if nearest != timestep:
        logger.warning(
            f"`{name}` is {timestep}, which is not on the trajectory of {len(planned)} steps; "
            f"{nearest}, the nearest timestep that is, takes its place."
        )
    return nearest


def _keeps_trajectory(scheduler: Scheduler) -> bool:
    """Tell whether the scheduler's config says how many steps there are."""
    if not isinstance(scheduler, FamilySchedulerMixin):
        return False
    has_sigma = isinstance(scheduler, GeneralizedDDIMScheduler) and scheduler.config.sigma
    return scheduler.config.get("timesteps") is not None or bool(has_sigma)


def step_arguments(
    scheduler: Scheduler,
    generator: Generators | None,
    eta: float | None,
    use_clipped_model_output: bool | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments that this scheduler's `step` takes.

    Raises:
        ValueError: if an argument was set that the scheduler would ignore.
    """
    _check_eta(scheduler, eta)
    arguments: dict[str, Any] = {}
    for name, value in (("eta", eta), ("use_clipped_model_output", use_clipped_model_output)):
        if value is None:
            continue
        if not has_argument(scheduler.step, name):
            raise ValueError(
                f"`{name}` is {value!r}, but {type(scheduler).__name__} has no {name}; leave it "
                "None, or use GeneralizedDDIMScheduler.from_config(scheduler.config)."
            )
        arguments[name] = value
    if has_argument(scheduler.step, "generator"):
        arguments["generator"] = generator
    return arguments


def _check_eta(scheduler: Scheduler, eta: float | None) -> None:
    if eta is None or not has_argument(scheduler.step, "eta"):
        return
    check_eta(eta)
    if not isinstance(scheduler, GeneralizedDDIMScheduler):
        # our schedulers check sigma^2 <= 1 - alpha_bar_s; stock would take the root of a negative
        if eta > 1:
            raise ValueError(
                f"`eta` is {eta!r}; it must lie in 0 .. 1 with {type(scheduler).__name__}, which "
                "does not check the noise of its steps; GeneralizedDDIMScheduler does."
            )
        return
    config = scheduler.config
    for name in ("eta", "sigma"):
        own = config[name]
        if own is not None and own != eta:
            raise ValueError(
                f"`eta` is {eta!r}, but the scheduler's config says {name}={own!r}, which counts; "
                "leave it None, or set it there."
            )


def denoise(
    network: Network,
    scheduler: Scheduler,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    arguments: dict[str, Any],
    after_step: AfterStep | None = None,
    batch_size: int = 0,
) -> torch.Tensor:
    """Run the loop: one network call and one `scheduler.step` for each timestep.

    At the edge of a guidance interval a scheduler of a higher order forgets its history. A stored
    table belongs to the guidance that it was fitted to, also across the edge; a loop with any other
    goes on without it.

    Args:
        network: the denoiser.
        scheduler: set up by `plan`.
        x_t: the sample at `timesteps[0]`, (B, C, H, W).
        timesteps: the rest of the plan.
        arguments: of `step_arguments`.
        after_step: called with each `Step`; may replace `step.x_s`.
        batch_size: of the batches before, for a compiled network; see `predict`.

    Returns:
        the sample at the end of the plan, (B, C, H, W).
    """
    inverse = isinstance(scheduler, GeneralizedDDIMInverseScheduler)
    # a sampler without noise does not use the variance that a network may predict
    mean_alone = inverse or (is_deterministic(scheduler) and not arguments.get("eta"))
    ours = scheduler if isinstance(scheduler, GeneralizedDDIMScheduler) else None
    if ours is not None and ours.follows_table:
        _note_guidance(ours, network)
    for index, t in enumerate(timesteps):
        if isinstance(network, BoundNetwork) and index > 0:
            follows_table = ours is not None and ours.follows_table
            if not follows_table and network.changes_between(timesteps[index - 1], t):
                forget_history(scheduler)  # a step across the edge would mix two fields
        model_output = predict(network, x_t, t, batch_size)
        if mean_alone:
            model_output = model_output[:, : x_t.shape[1]]
        output = scheduler.step(model_output, t, x_t, **arguments)
        x0 = output.get("pred_original_sample")
        step = Step(index, t, x_t, model_output, x0, output.prev_sample)
        if after_step is not None:
            after_step(step)
        x_t = step.x_s
    return x_t


def _note_guidance(scheduler: GeneralizedDDIMScheduler, network: Network) -> None:
    """Let the scheduler keep its stored table only where that was made for this guidance."""
    if not isinstance(network, BoundNetwork) or not network.changes_predictions:
        scheduler.note_guidance(1.0)
    elif isinstance(network, ClassifierFreeNetwork) and network.is_plain:
        ends = network.interval
        scheduler.note_guidance(network.scale, None if ends is None else (ends.low, ends.high))
    else:
        scheduler.without_table("guidance")


def alpha_bar_table(scheduler: Scheduler) -> torch.Tensor:
    """Return alpha_bar of the scheduler's training chain, float64 (T,) on the CPU.

    Stock schedulers keep it in float32; ours in float64.
    """
    if isinstance(scheduler, FamilySchedulerMixin):
        return scheduler.alpha_bar
    return scheduler.alphas_cumprod.detach().cpu().double()


class Levels:
    """Noise levels of a scheduler's training chain, and what a network output means there.

    Coefficients are computed in float64 and cast to the sample's dtype by multiplication with a
    Python float, so nothing is read back from the device.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.prediction_type: str = scheduler.config.prediction_type
        self.alpha_bar = alpha_bar_table(scheduler)

    def at(self, t: int) -> float:
        """Return alpha_bar_t, and 1 for t = -1, the end."""
        return 1.0 if t < 0 else float(self.alpha_bar[t])

    def x0(self, model_output: torch.Tensor, x_t: torch.Tensor, t: int) -> torch.Tensor:
        """Return the unclipped x0_hat of a network output at t."""
        return self._affine(parameterization.x0_coefficients, model_output, x_t, t)

    def eps(self, model_output: torch.Tensor, x_t: torch.Tensor, t: int) -> torch.Tensor:
        """Return eps_hat of a network output at t."""
        return self._affine(parameterization.eps_coefficients, model_output, x_t, t)

    def score(self, model_output: torch.Tensor, x_t: torch.Tensor, t: int) -> torch.Tensor:
        """Return grad log q(x_t) = -eps_hat / sqrt(1 - alpha_bar_t) (DDPM, Sec. 3.2)."""
        return self.eps(model_output, x_t, t) * (-1.0 / (1.0 - self.at(t)) ** 0.5)

    def output_change(self, eps_change: torch.Tensor, t: int) -> torch.Tensor:
        """Return the change of a network output that changes eps_hat by `eps_change` at t."""
        _, k_m = self._coefficients(parameterization.eps_coefficients, t)
        return eps_change * (1 / k_m)

    def _coefficients(self, coefficients: Callable[..., Any], t: int) -> tuple[float, float]:
        now = torch.tensor(self.at(t), dtype=torch.float64)
        before = torch.tensor(self.at(t - 1), dtype=torch.float64)
        k_x, k_m = coefficients(self.prediction_type, now, before)
        return float(k_x), float(k_m)

    def _affine(
        self,
        coefficients: Callable[..., Any],
        model_output: torch.Tensor,
        x_t: torch.Tensor,
        t: int,
    ) -> torch.Tensor:
        k_x, k_m = self._coefficients(coefficients, t)
        # a network with a learned variance returns it in a second half of the channels
        mean = model_output[:, : x_t.shape[1]]
        return k_x * x_t + k_m * mean
