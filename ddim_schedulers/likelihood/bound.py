"""The bound of a network: its terms at all steps, at drawn ones, or from errors measured before."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..optimal import step_kl
from ..parameterization import x0_from
from ..process import Gaussian, gaussian_kl
from ..reverse_noise import log_between
from .chain import Chain
from .terms import decoder_nll, grid_levels, prior_kl

ESTIMATORS = ("all", "uniform", "stratified", "importance")

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Terms:
    """The bound of a batch of B images, in nats per image.

    Attributes:
        prior: L_T, (B,).
        index: which step (position in `Chain.timesteps`) each of n draws is, int64 (B, n).
        value: its KL, (B, n).
        weight: what it counts in the estimate of the sum over all S - 1 steps, (B, n).
        decoder: L_0, (B,).
        x0_error: ||x_0 - x0_hat||^2 / d of each draw, then of L_0, (B, n + 1).
        dimensions: d, numbers in an image.
    """

    prior: torch.Tensor
    index: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor
    decoder: torch.Tensor
    x0_error: torch.Tensor
    dimensions: int

    @property
    def steps(self) -> torch.Tensor:
        """Return the sum of L_{t-1} over the steps, or its unbiased estimate, (B,)."""
        return (self.value * self.weight).sum(1)

    @property
    def total(self) -> torch.Tensor:
        """Return the bound, (B,)."""
        return self.prior + self.steps + self.decoder


def predict_x0(
    predict: Predict,
    x0: torch.Tensor,
    t: torch.Tensor,
    alpha_bar_t: torch.Tensor,
    before: torch.Tensor,
    noise: torch.Tensor,
    prediction_type: str,
    clip: float | None,
    dtype: torch.dtype,
    channels: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return x0_hat, eps_hat (both float64, eps_hat unclipped) and the variance channels, if any.

    Args:
        predict: the network.
        x0: (B, ...), float64.
        t: int64 (B,).
        alpha_bar_t: at t, float64 (B,).
        before: alpha_bar_{t-1} of the training chain, (B,).
        noise: like `x0`, float64.
        prediction_type: see `parameterization`.
        clip: largest |x0_hat|, or None.
        dtype: of the network; x_t is rounded to it before it is used.
        channels: where the prediction ends and the variance begins, or None.
    """
    shape = (-1,) + (1,) * (x0.ndim - 1)
    a, b = alpha_bar_t.view(shape), before.view(shape)
    x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(dtype)
    output = predict(x_t, t).to(torch.float64)
    expected = list(x0.shape)
    expected[1] *= 1 if channels is None else 2
    if list(output.shape) != expected:
        raise ValueError(
            f"`predict` returned shape {tuple(output.shape)}; it must be {tuple(expected)}."
        )
    raw = None
    if channels is not None:
        output, raw = output.split(channels, dim=1)
    x = x_t.to(torch.float64)
    x0_hat = x0_from(prediction_type, output, x, a, b)
    eps_hat = (x - a.sqrt() * x0_hat) / (1 - a).sqrt() if prediction_type != "epsilon" else output
    if clip is not None:
        x0_hat = x0_hat.clamp(-clip, clip)
    return x0_hat, eps_hat, raw


def draw_steps(
    estimator: str,
    count: int,
    num_steps: int,
    batch: int,
    proposal: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which steps each image is evaluated at and what each counts, (B, n) each.

    sum_k weight_k f(index_k) has the expectation sum_i f(i) over all `num_steps` steps, for every
    estimator. `all` takes each step once. `uniform` draws n independent steps; `stratified` takes
    one from each of n equal parts of the trajectory; `importance` does the same after stretching
    the trajectory by `proposal`, i.e. inverts its cumulative sum at (k + u_k) / n.

    Args:
        estimator: one of `ESTIMATORS`.
        count: n; ignored by `all`.
        num_steps: how many steps there are.
        batch: B.
        proposal: (num_steps,), > 0, for `importance`; best proportional to the terms themselves.
        generator: of the draws.

    Raises:
        ValueError: for an unknown estimator, n < 1 or a proposal that is not > 0 everywhere.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` is {estimator!r}; it must be one of {ESTIMATORS}.")
    if estimator == "all" or num_steps == 0:
        index = torch.arange(num_steps).expand(batch, num_steps)
        return index, torch.ones(batch, num_steps, dtype=torch.float64)
    if count < 1:
        raise ValueError(f"`count` is {count!r}; at least one step must be drawn.")
    share = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
    if estimator == "importance":
        if proposal is None or proposal.shape != share.shape or not bool((proposal > 0).all()):
            raise ValueError(f"`proposal` must hold {num_steps} numbers > 0.")
        share = proposal.to(torch.float64) / proposal.sum()
    u = torch.rand(batch, count, generator=generator, dtype=torch.float64)
    if estimator != "uniform":
        u = (torch.arange(count) + u) / count
    edges = share.cumsum(0)
    index = torch.searchsorted(edges / edges[-1], u, right=True).clamp(max=num_steps - 1)
    return index, 1 / (count * share[index])


def default_proposal(chain: Chain, x0_error: torch.Tensor | None = None) -> torch.Tensor:
    """Return a proposal for `importance`, (S - 1,), sums to 1: the expected terms.

    Args:
        chain: what each step does.
        x0_error: E||x_0 - x0_hat||^2 / d for each of its S timesteps (a calibration); without it,
            that of Gaussian data of variance 1/4.

    A tenth is spread evenly, so that a step whose cost was underestimated keeps a bounded weight.
    """
    if x0_error is None:
        a = chain.alpha_bar
        x0_error = 0.25 * (1 - a) / (0.25 * a + (1 - a))
    expected = step_kl(
        chain.posterior_variance[:-1], chain.variance[:-1], chain.weight[:-1], x0_error[:-1]
    ).clamp(min=0)
    even = torch.full_like(expected, 1 / max(len(expected), 1))
    if float(expected.sum()) <= 0:
        return even
    return 0.9 * expected / expected.sum() + 0.1 * even


def variational_bound(
    predict: Predict,
    x0: torch.Tensor,
    chain: Chain,
    *,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    num_bins: int | None = 256,
    estimator: str = "all",
    num_calls: int | None = None,
    proposal: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Terms:
    """Return the bound of a batch, with one noise draw for each term (DDPM, Sec. 3.2 and 4.3).

    Args:
        predict: the network; called once for each term, in `dtype`.
        x0: images (B, ...), any floating dtype; on the grid of `num_bins`.
        chain: what each step does, from `make_chain`.
        prediction_type: what the network predicts.
        clip: limit of |x0_hat| (1.0 in the protocol of the DDPM paper), or None for none.
        num_bins: bins of L_0, or None for a Gaussian density.
        estimator: which steps are evaluated, see `draw_steps`. L_T is exact and L_0 always
            evaluated.
        num_calls: network calls for each image, >= 2, with an estimator other than `all`; one of
            them is L_0's.
        proposal: for `importance`, see `draw_steps`; None takes `default_proposal`.
        generator: on the CPU; of t and of the noise.
        noise: the noise itself, like `x0`, used in every term; instead of drawing it.
        dtype: of the network.

    Raises:
        ValueError: for data off the grid, an unknown estimator or too few calls.
    """
    if num_bins is not None:
        grid_levels(x0, num_bins)  # before any work is lost
    if estimator != "all" and (num_calls is None or num_calls < 2):
        raise ValueError(
            f"`num_calls` is {num_calls!r}; with estimator={estimator!r} it must be at least 2, "
            "one of them for L_0."
        )
    steps, x = len(chain) - 1, x0.to(torch.float64)
    if estimator == "importance" and proposal is None:
        proposal = default_proposal(chain)
    index, weight = draw_steps(estimator, (num_calls or 2) - 1, steps, len(x), proposal, generator)
    last = torch.full((len(x), 1), steps)
    values, errors = [], []
    for column in torch.cat([index, last], dim=1).unbind(1):
        eps = noise if noise is not None else torch.randn(x.shape, generator=generator)
        x0_hat, variance = _reverse(
            predict, x, chain, column, eps.to(x), prediction_type, clip, dtype
        )
        errors.append(((x - x0_hat) ** 2).flatten(1).mean(1))
        values.append((x0_hat, variance))
    value = [
        _step_nats(chain, column, x, x0_hat, variance)
        for column, (x0_hat, variance) in zip(index.unbind(1), values[:-1], strict=True)
    ]
    decoder = decoder_nll(x0, *values[-1], num_bins)
    return Terms(
        prior_kl(x, chain.alpha_bar[0]),
        index,
        torch.stack(value, 1) if value else x.new_zeros(len(x), 0),
        weight,
        decoder,
        torch.stack(errors, 1),
        x[0].numel(),
    )


def _reverse(
    predict: Predict,
    x0: torch.Tensor,
    chain: Chain,
    column: torch.Tensor,
    noise: torch.Tensor,
    prediction_type: str,
    clip: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x0_hat and the reverse variance of one draw for each image."""
    shape = (-1,) + (1,) * (x0.ndim - 1)
    t = torch.tensor(chain.timesteps)[column]
    channels = x0.shape[1] if chain.log_variance_range is not None else None
    x0_hat, _, raw = predict_x0(
        predict,
        x0,
        t,
        chain.alpha_bar[column],
        chain.alpha_bar_before[column],
        noise,
        prediction_type,
        clip,
        dtype,
        channels,
    )
    if chain.log_variance_range is None or raw is None:
        return x0_hat, chain.variance[column].view(shape)
    low, high = chain.log_variance_range[column].unbind(1)
    return x0_hat, log_between(raw, low.view(shape), high.view(shape)).exp()


def _step_nats(
    chain: Chain,
    column: torch.Tensor,
    x0: torch.Tensor,
    x0_hat: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    shape = (-1,) + (1,) * (x0.ndim - 1)
    posterior = chain.posterior_variance[column].view(shape)
    weight = chain.weight[column].view(shape)
    # the part of x_t is the same in both means, so that only their parts of x_0 differ
    kl = gaussian_kl(Gaussian(weight * x0, posterior), Gaussian(weight * x0_hat, variance))
    return kl.flatten(1).sum(1)


def bound_from_errors(
    chain: Chain, x0: torch.Tensor, x0_error: torch.Tensor, decoder: torch.Tensor
) -> Terms:
    """Return the bound of any chain from one pass over its timesteps.

    The KL of a step depends on the network through ||x_0 - x0_hat||^2 alone, unless it predicts
    variances too; x_t has the same distribution for every member and trajectory (Watson et al.,
    arXiv:2106.03802, Sec. 3.2).

    Args:
        chain: what each step does; not `learned_range`.
        x0: images (B, ...).
        x0_error: ||x_0 - x0_hat||^2 / d at each of the chain's timesteps, float64 (B, S).
        decoder: L_0 for the chain's last variance, (B,).

    Raises:
        ValueError: for `learned_range`, whose variance is not in `x0_error`.
    """
    if chain.log_variance_range is not None:
        raise ValueError("`chain` has a learned variance; use `variational_bound`.")
    d, steps = x0[0].numel(), len(chain) - 1
    value = d * step_kl(
        chain.posterior_variance[:-1], chain.variance[:-1], chain.weight[:-1], x0_error[:, :-1]
    )
    index, weight = draw_steps("all", 0, steps, len(x0))
    return Terms(prior_kl(x0, chain.alpha_bar[0]), index, value, weight, decoder, x0_error, d)


def expected_bound(
    chain: Chain, x0_error: torch.Tensor, x0_square: torch.Tensor | float
) -> torch.Tensor:
    """Return the expectation of the bound in nats per dimension, L_0 as a Gaussian density; 0-d.

    Args:
        chain: what each step does; not `learned_range`. Differentiable in what it was made of.
        x0_error: E||x_0 - x0_hat||^2 / d at each of its timesteps, (S,).
        x0_square: E||x_0||^2 / d.
    """
    a = chain.alpha_bar[0]
    prior = 0.5 * (a * x0_square - a - torch.log1p(-a))
    steps = step_kl(
        chain.posterior_variance[:-1], chain.variance[:-1], chain.weight[:-1], x0_error[:-1]
    )
    last = chain.variance[-1]
    decoder = 0.5 * (torch.log(2 * math.pi * last) + x0_error[-1] / last)
    return prior + steps.sum() + decoder
