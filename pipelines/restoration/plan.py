"""The steps of a restoration: levels, the member's noise, and the family's transition."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines.interfaces import Scheduler
from ddim_schedulers.pipelines.sampling import alpha_bar_table, step_arguments
from ddim_schedulers.scales import is_one
from ddim_schedulers.sigmas import as_sigma, check_eta, check_sigma, sigma_eta
from ddim_schedulers.timesteps import in_interval
from ddim_schedulers.transition import transition

ETA_RULES = ("family", "paper")


@dataclass(frozen=True)
class Step:
    """One step from t to the next planned timestep s, or to the image.

    Attributes:
        timestep: t.
        alpha_bar_t: of x_t, in [0, 1).
        alpha_bar_s: of x_s, in (0, 1]; the last step lands on 1.
        x0: weight of x0_hat in the family's transition (DDIM, Eq. 12), sqrt(alpha_bar_s).
        eps: weight of eps_hat, sqrt(1 - alpha_bar_s - sigma^2).
        sigma: standard deviation of the noise.
    """

    timestep: int
    alpha_bar_t: float
    alpha_bar_s: float
    x0: float
    eps: float
    sigma: float


def steps_of(
    scheduler: Scheduler, timesteps: list[int], eta: float | None, eta_rule: str
) -> list[Step]:
    """Return the steps of a plan, each with the noise of the member.

    The last step lands on the image, alpha_bar = 1, also with `set_alpha_to_one=False`.

    Args:
        scheduler: whose chain, and whose member where `eta` is None.
        timesteps: the trajectory, strictly decreasing.
        eta: of the member; None takes what the scheduler's config says, 0 where it says nothing,
            and 1 for a DDPM scheduler.
        eta_rule: `family`, sigma = eta sigma(1) (DDIM, Eq. 16), or `paper`, sigma = eta sqrt(1 -
            alpha_bar_s), as DDRM and DDNM say it; then eta must lie in [0, 1].

    Raises:
        ValueError: for an eta or a rule out of range, or that the scheduler contradicts, a noise
            other than the member's own, or a trajectory on which eps says nothing of x_0.
    """
    if eta_rule not in ETA_RULES:
        raise ValueError(f"`eta_rule` is {eta_rule!r}; it must be one of {ETA_RULES}.")
    _check_noise(scheduler)
    step_arguments(scheduler, None, eta)
    table = alpha_bar_table(scheduler)
    a_t = table[timesteps]
    a_s = torch.cat([a_t[1:], a_t.new_ones(1)])
    if bool((a_t == 0).any()) and scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            f"`timesteps` is {timesteps}, with alpha_bar = 0 at one of them, where a network that "
            "predicts eps says nothing about x_0; leave it out."
        )
    sigma = _sigma(scheduler, a_t, a_s, eta, eta_rule)
    interval = scheduler.config.get("eta_interval")
    if interval is not None:
        sigma = torch.where(in_interval(interval, len(table))[timesteps], sigma, 0.0)
    sigma = torch.where(a_s == 1, 0.0, sigma)
    rows = transition(a_s, sigma)
    columns = [column.tolist() for column in (a_t, a_s, rows.x0, rows.eps, rows.std)]
    return [Step(t, *row) for t, *row in zip(timesteps, *columns, strict=True)]


def _sigma(
    scheduler: Scheduler, a_t: torch.Tensor, a_s: torch.Tensor, eta: float | None, eta_rule: str
) -> torch.Tensor:
    config = scheduler.config
    is_ddpm = isinstance(scheduler, MarkovianDDPMScheduler | DDPMScheduler)
    explicit = config.get("sigma") if isinstance(scheduler, GeneralizedDDIMScheduler) else None
    if explicit is None:
        said = 1.0 if is_ddpm else config.get("eta")
        member = float(said or 0.0) if eta is None else check_eta(eta)
        if eta_rule == "family":
            return check_sigma(sigma_eta(a_t, a_s, member), a_s, member)
        if member > 1:
            raise ValueError(
                f"`eta` is {member!r}; it must lie in [0, 1] with `eta_rule` 'paper', which makes "
                "sigma = eta sqrt(1 - alpha_bar_s)."
            )
        return member * (1 - a_s).sqrt()
    if eta_rule != "family":
        raise ValueError(
            f"`eta_rule` is {eta_rule!r}, but the scheduler's config has an explicit sigma, which "
            "counts; leave it 'family', or remove sigma there."
        )
    sigma = as_sigma(explicit)
    if len(sigma) != len(a_t):
        raise ValueError(
            f"`sigma` has {len(sigma)} values in the scheduler's config; it must have one for each "
            f"of the {len(a_t)} steps."
        )
    return check_sigma(sigma, a_s)


def _check_noise(scheduler: Scheduler) -> None:
    """Refuse what a restoration would leave out: other noises, and predictions of steps before."""
    config, name = scheduler.config, type(scheduler).__name__
    order = config.get("solver_order", 1)
    if isinstance(scheduler, GeneralizedDDIMScheduler) and order > 1:
        raise ValueError(
            f"`scheduler` has solver_order={order}: what a measurement makes of a prediction "
            "changes from step to step, so those of earlier steps say nothing; use solver_order=1."
        )
    for scale in ("eps_scale", "end_scale"):
        if not is_one(config.get(scale, 1.0)):
            raise ValueError(
                f"`scheduler` has {scale}={config[scale]!r}; a restoration has no such scale, it "
                "must be 1."
            )
    if isinstance(scheduler, GeneralizedDDIMScheduler):
        key, own = "reverse_variance", ["sigma"]
    elif isinstance(scheduler, MarkovianDDPMScheduler | DDPMScheduler):
        key, own = "variance_type", ["fixed_small", "fixed_small_log"]
    else:
        return
    if config[key] not in own:
        raise ValueError(
            f"`scheduler` is a {name} with {key}={config[key]!r}; a restoration adds the member's "
            f"own noise, {key}={own[0]!r}: use "
            f"{name}.from_config(scheduler.config, {key}={own[0]!r})."
        )
