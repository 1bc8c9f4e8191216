"""Noise schedules: the betas of the training chain and their cumulative products.

All tables are float64 on the CPU and have shape `(T,)`, index `t = 0 .. T - 1` as in diffusers (the
papers count from 1). `alpha_bar[t] = prod_{i <= t} (1 - beta_i)` (DDPM, arXiv:2006.11239, Eq. 4);
before the first step it is 1.
"""

import math
from collections.abc import Callable, Sequence

import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
# Schedules that `beta_start` and `beta_end` do not change.
SCHEDULES_WITHOUT_ENDS = ("squaredcos_cap_v2", "laplace")
MAX_TRAIN_TIMESTEPS = 100_000
# A larger alpha_bar_T gets a warning, see `terminal_signal`.
MAX_TERMINAL = 0.01


def check_num_train_timesteps(num_train_timesteps: int) -> int:
    """Return `num_train_timesteps` if it is an integer in `1 .. 100_000`.

    Raises:
        ValueError: for anything else.
    """
    is_integer = isinstance(num_train_timesteps, int) and not isinstance(num_train_timesteps, bool)
    if not is_integer or not 1 <= num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` is {num_train_timesteps!r}; it must be an integer from 1 to "
            f"{MAX_TRAIN_TIMESTEPS}."
        )
    return num_train_timesteps


def make_betas(
    schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> torch.Tensor:
    """Return the betas of a named schedule.

    Args:
        schedule: one of `BETA_SCHEDULES`. `linear` is DDPM's (Sec. 4), `scaled_linear` is linear in
            sqrt(beta) (latent diffusion), `squaredcos_cap_v2` the cosine schedule of Improved DDPM
            (arXiv:2102.09672, Eq. 17), `sigmoid` GeoDiff's, `laplace` that of arXiv:2407.03297.
        num_train_timesteps: T, from 1 to 100,000.
        beta_start: beta of the first step, in (0, 1); not used by the cosine and Laplace schedules.
        beta_end: beta of the last step, in (0, 1); not used by the cosine and Laplace schedules.

    Returns:
        The betas, float64 of shape (T,), each in (0, 1].

    Raises:
        ValueError: for an unknown name, a T out of range or a beta out of (0, 1).
    """
    steps = check_num_train_timesteps(num_train_timesteps)
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"`{name}` is {value!r}; it must lie strictly between 0 and 1.")
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
    if schedule == "scaled_linear":
        roots = beta_start**0.5, beta_end**0.5
        return torch.linspace(*roots, steps, dtype=torch.float64, device="cpu") ** 2
    if schedule == "squaredcos_cap_v2":
        return _betas_from_alpha_bar(_cosine_alpha_bar, steps)
    if schedule == "sigmoid":
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu")
        return torch.sigmoid(ramp) * (beta_end - beta_start) + beta_start
    if schedule == "laplace":
        return _betas_from_alpha_bar(_laplace_alpha_bar, steps)
    raise ValueError(f"`beta_schedule` is {schedule!r}; it must be one of {BETA_SCHEDULES}.")


def explicit_betas(betas: Sequence[float], num_train_timesteps: int) -> torch.Tensor:
    """Return explicit betas as float64 after checking them.

    Args:
        betas: T numbers (a list, an array or a tensor of shape (T,)), finite, in (0, 1); the last
            one may be 1, which is zero terminal SNR.
        num_train_timesteps: T.

    Raises:
        ValueError: for a wrong length, a number that is not finite or one out of (0, 1), naming the
            first.
    """
    steps = check_num_train_timesteps(num_train_timesteps)
    table = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
    if table.shape != (steps,):
        raise ValueError(
            f"`trained_betas` has shape {tuple(table.shape)}; it must have one value for each of "
            f"the `num_train_timesteps`={steps} timesteps."
        )
    inside = (table > 0.0) & (table < 1.0)
    inside[-1] |= table[-1] == 1.0
    if not bool(inside.all()):
        t = int((~inside).nonzero()[0])
        raise ValueError(
            f"`trained_betas[{t}]` is {float(table[t])}; betas must be finite and lie in (0, 1) "
            "(the last one may be 1)."
        )
    return table


def alpha_bar_from_betas(betas: torch.Tensor) -> torch.Tensor:
    """Return alpha_bar_t = prod_{i <= t} (1 - beta_i), shape (T,) (DDPM, Eq. 4)."""
    return torch.cumprod(1.0 - betas, dim=0)


def betas_from_alpha_bar(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return the betas of a chain with the given cumulative products, shape (T,).

    beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, with alpha_bar = 1 before the first step.

    Raises:
        ValueError: if `alpha_bar` does not decrease strictly within [0, 1).
    """
    before = alpha_bar_before(alpha_bar)
    if not bool(((alpha_bar >= 0) & (alpha_bar < before)).all()):
        raise ValueError("`alpha_bar` must decrease strictly and lie in [0, 1).")
    return 1.0 - alpha_bar / before


def alpha_bar_before(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return alpha_bar_{t-1} of the training chain for every t, shape (T,): 1 at t = 0."""
    return torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last value is exactly 0 and the first is kept.

    Args:
        betas: shape (T,), T >= 2.

    Returns:
        The new betas, shape (T,); the last one is 1 (arXiv:2305.08891, Algorithm 1).

    Raises:
        ValueError: for T < 2, where first and last value are the same.
    """
    if betas.shape[0] < 2:
        raise ValueError(
            f"`num_train_timesteps` is {betas.shape[0]}; with `rescale_betas_zero_snr` it must be "
            "at least 2."
        )
    root = alpha_bar_from_betas(betas).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return betas_from_alpha_bar(root**2)


def shift_snr(betas: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide the signal-to-noise ratio alpha_bar / (1 - alpha_bar) by `scale` at every timestep.

    CogVideoX (arXiv:2408.06072) trains so on videos, whose frames repeat the signal.

    Args:
        betas: shape (T,).
        scale: > 0; 1 changes nothing.

    Returns:
        The new betas, shape (T,), of alpha_bar / (scale + (1 - scale) alpha_bar).

    Raises:
        ValueError: for a scale that is not a finite number > 0, or one so far from 1 that alpha_bar
            no longer decreases.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"`snr_shift_scale` is {scale!r}; it must be a finite number > 0.")
    if scale == 1:
        return betas
    alpha_bar = alpha_bar_from_betas(betas)
    shifted = alpha_bar / (scale + (1 - scale) * alpha_bar)
    try:
        return betas_from_alpha_bar(shifted)
    except ValueError as error:
        raise ValueError(
            f"`snr_shift_scale` is {scale!r}; with these betas alpha_bar no longer decreases in "
            "float64, it must be nearer to 1."
        ) from error


def terminal_signal(alpha_bar: torch.Tensor) -> str | None:
    """Return what is wrong with sampling from N(0, I) where alpha_bar_T is far from 0.

    x_T has the mean sqrt(alpha_bar_T) x_0, N(0, I) has 0. Above `MAX_TERMINAL` that is a tenth of
    the data's size; below are all processes that are in use (Stable Diffusion: 0.0047).

    Args:
        alpha_bar: (T,).

    Returns:
        One sentence with the number, or `None` where all is well.
    """
    last = float(alpha_bar[-1])
    if last <= MAX_TERMINAL:
        return None
    return (
        f"alpha_bar at the last of {alpha_bar.shape[0]} timesteps is {last:.3g}: x_T still holds "
        f"{math.sqrt(last):.2g} times the data, but sampling starts from N(0, I), so samples miss "
        "that part of the data's mean. Train with more timesteps, a larger `beta_end`, "
        "`beta_schedule='squaredcos_cap_v2'` or `rescale_betas_zero_snr=True`."
    )


def has_linear_betas(alpha_bar: torch.Tensor) -> bool:
    """Tell whether the betas of a process are equally spaced, as in DDPM, Sec. 4.

    Args:
        alpha_bar: (T,), within 1e-7, the rounding of stock's float32 tables.
    """
    betas = 1.0 - alpha_bar / alpha_bar_before(alpha_bar)
    line = torch.linspace(float(betas[0]), float(betas[-1]), len(betas), dtype=torch.float64)
    return bool((betas - line).abs().max() <= 1e-4 * betas.max())


def _betas_from_alpha_bar(alpha_bar: Callable[[float], float], steps: int) -> torch.Tensor:
    # 0.999 is the cap of Improved DDPM, Sec. 3.2: it keeps the last step invertible.
    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    betas = [min(1.0 - ratio, 0.999) for ratio in ratios]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def _cosine_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    # stock diffusers takes the square root of the signal share here; kept, since checkpoints are
    # trained with it
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))
