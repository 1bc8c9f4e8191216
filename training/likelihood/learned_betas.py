"""A noise schedule trained by the variational bound (DDPM, arXiv:2006.11239, Sec. 3.1: "could").

The schedule is its log-SNR, log(alpha_bar / (1 - alpha_bar)), which falls from below
`log_snr_max` to above `log_snr_min` in T + 1 positive gaps: shares of the whole range, a softmax.
Monotonicity and bounds hold by construction, for any value of the parameters. The network is asked
at the index t, whose noise level moves while the schedule learns, so that it must learn along (or
know alpha_bar).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ddim_schedulers.betas import alpha_bar_before, explicit_betas
from ddim_schedulers.likelihood import Predict, make_chain, variational_bound
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.plugin import SETTINGS_KEY
from ddim_schedulers.reading import read_json
from ddim_schedulers.training.common.storage import to_json

# 1 - alpha_bar_0 >= 1e-5 and alpha_bar_{T-1} >= 1e-5
LOG_SNR_MAX = 11.5
LOG_SNR_MIN = -11.5


class LearnedBetas(torch.nn.Module):
    """A schedule of T betas with T + 1 parameters.

    Args:
        alpha_bar: schedule to start from, (T,), strictly within the bounds.
        log_snr_max: the first timestep's log-SNR stays below it.
        log_snr_min: the last one's stays above it.

    Raises:
        ValueError: if the bounds are in the wrong order or `alpha_bar` leaves them.
    """

    def __init__(
        self,
        alpha_bar: torch.Tensor,
        log_snr_max: float = LOG_SNR_MAX,
        log_snr_min: float = LOG_SNR_MIN,
    ) -> None:
        super().__init__()
        if not log_snr_min < log_snr_max:
            raise ValueError(
                f"`log_snr_min` is {log_snr_min}; it must be below log_snr_max={log_snr_max}"
            )
        self.log_snr_max, self.log_snr_min = log_snr_max, log_snr_min
        start = torch.logit(alpha_bar.detach().to(torch.float64))
        ends = torch.tensor([log_snr_max, log_snr_min], dtype=torch.float64)
        gaps = -torch.diff(torch.cat([ends[:1], start, ends[1:]]))
        if not bool((gaps > 0).all()):
            raise ValueError(
                f"`alpha_bar` goes from {float(alpha_bar[0]):.6g} to {float(alpha_bar[-1]):.3g}; "
                "it must fall strictly within the bounds, sigmoid(log_snr_max)="
                f"{float(torch.sigmoid(ends[0])):.6g} and sigmoid(log_snr_min)="
                f"{float(torch.sigmoid(ends[1])):.3g}"
            )
        self.logits = torch.nn.Parameter(torch.log(gaps / gaps.sum()))

    def log_snr(self) -> torch.Tensor:
        """Return log(alpha_bar / (1 - alpha_bar)), float64 (T,), strictly decreasing."""
        fallen = torch.softmax(self.logits, 0).cumsum(0)[:-1]
        return self.log_snr_max - (self.log_snr_max - self.log_snr_min) * fallen

    def alpha_bar(self) -> torch.Tensor:
        """Return alpha_bar, differentiable, float64 (T,)."""
        return torch.sigmoid(self.log_snr())

    def betas(self) -> torch.Tensor:
        """Return the betas, differentiable, float64 (T,), each in (0, 1)."""
        alpha_bar = self.alpha_bar()
        return 1 - alpha_bar / alpha_bar_before(alpha_bar)


def learn_betas(
    schedule: LearnedBetas,
    predict: Predict,
    batches: Iterable[torch.Tensor],
    *,
    network: Iterable[torch.nn.Parameter] = (),
    lr: float = 0.02,
    network_lr: float = 2e-4,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    num_bins: int | None = 256,
    num_calls: int | None = 4,
    total_steps: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Minimise the bound of the whole chain over the schedule, and over the network if given.

    Every step takes an unbiased estimate of the bound (`variational_bound`, stratified over t) and
    one Adam step; gradients reach alpha_bar through x_t, through x0_hat and through the weights of
    the bound. The learning rate falls as a half cosine to 0 if `total_steps` is given.

    Args:
        schedule: what is learned, in place.
        predict: the network, `predict(x_t, t)`; must let gradients through if it learns.
        batches: images (B, ...) in [-1, 1], one batch for each step.
        network: its parameters, where it learns along.
        lr: of the schedule.
        network_lr: of the network.
        variance: `fixed_small` or `fixed_large`.
        prediction_type: what the network predicts.
        clip: limit of |x0_hat|; None gives gradients everywhere.
        num_bins: bins of L_0, None for a Gaussian density.
        num_calls: network calls for each image and step; None takes all T.
        total_steps: length of the decay of the learning rates.
        generator: of noise and t.
        dtype: of the network.
        report: called with the step and its bound in nats per dimension.

    Returns:
        The estimated bound of each step, nats per dimension.

    Raises:
        ValueError: for another variance, or as `variational_bound`.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"`variance` is {variance!r}; it must be fixed_small or fixed_large")
    groups = [{"params": [schedule.logits], "lr": lr}]
    if parameters := list(network):
        groups.append({"params": parameters, "lr": network_lr})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    decay = None
    if total_steps is not None:
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    tau = list(range(len(schedule.logits) - 2, -1, -1))
    history = []
    for step, x0 in enumerate(batches):
        chain = make_chain(schedule.alpha_bar(), tau, variance)
        terms = variational_bound(
            predict,
            x0,
            chain,
            prediction_type=prediction_type,
            clip=clip,
            num_bins=num_bins,
            estimator="all" if num_calls is None else "stratified",
            num_calls=num_calls,
            generator=generator,
            dtype=dtype,
        )
        loss = terms.total.mean() / terms.dimensions
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if decay is not None:
            decay.step()
        history.append(float(loss.detach()))
        if report is not None:
            report(step, history[-1])
    return history


def save_betas(schedule: LearnedBetas, config_file: Path) -> None:
    """Put the schedule into a scheduler's config file as `trained_betas`, atomically.

    A calibration in it was measured under other betas and is taken out: a config that asks for
    `optimal` noise or spacing must be calibrated again before it loads. A rescaling to zero
    terminal SNR would change the learned schedule and is switched off.

    Raises:
        ValueError: if the file is not a scheduler's config, or has another number of timesteps.
    """
    betas = schedule.betas().detach()
    config = read_json(config_file)
    if "num_train_timesteps" not in config:
        raise ValueError(
            f"`config_file` is {str(config_file)!r}, which has no num_train_timesteps; it must be "
            "the config of a scheduler"
        )
    explicit_betas(betas.tolist(), config["num_train_timesteps"])
    config |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    config.pop("calibration", None)
    private = config.get(SETTINGS_KEY, {})
    for name in ("calibration", "trained_betas", "rescale_betas_zero_snr"):
        private.get("settings", {}).pop(name, None)
        private.get("stand_ins", {}).pop(name, None)
    write_bytes(config_file, to_json(config))
