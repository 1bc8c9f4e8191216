r"""The variational bound on the negative log-likelihood, term by term.

For a trajectory tau with timesteps t_1 = 0 < ... < t_S and any member of the family with sigma > 0
(DDPM, arXiv:2006.11239, Eq. 5; DDIM, arXiv:2010.02502, Eq. 10-11):

    -log p(x_0) <= KL(q(x_{t_S} | x_0) || N(0, I))                              L_T, `prior_kl`
                 + sum_i KL(q_sigma(x_{t_{i-1}} | x_{t_i}, x_0) || p(.. | x_{t_i}))    `steps`
                 - log p(x_0 | x_{t_1})                                         L_0, `decoder_nll`

All terms are per image and in nats; `bits_per_dim` converts. x0_hat is limited to the range of the
data only where `clip` says so, and eps_hat follows it (the DDPM mean). Nothing is floored.

The network is a callable `predict(x_t, t) -> model_output` with x_t (B, ...) and t int64 (B,).
x_t follows q(x_t | x_0) for every member, hence one pass over t serves all members, variances and
trajectories: `squared_errors` and `bound_from_errors`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .betas import alpha_bar_before
from .optimal import reverse_variance, step_kl, x0_variance, x0_weight
from .parameterization import x0_from
from .process import Gaussian, gaussian_kl
from .sigmas import check_sigma, sigma_eta, sigma_hat
from .timesteps import check_timesteps

VARIANCES = ("fixed_small", "fixed_large", "learned_range", "optimal")
ESTIMATORS = ("all", "uniform", "stratified", "importance")
# Pixels are float32 at best; a bin of 16-bit data is 256 times this wide.
GRID_TOLERANCE = 2e-7

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """A reverse chain: what each of its S steps does, in the order of sampling.

    Attributes:
        timesteps: strictly decreasing, the last one 0.
        alpha_bar: at each timestep, float64 (S,).
        alpha_bar_before: alpha_bar_{t-1} of the training chain, (S,), for `posterior_mean`.
        posterior_variance: sigma^2 of the member, (S,); 0 in the last step, which is L_0.
        weight: of x_0 in the posterior's mean, (S,).
        variance: of the reverse step, (S,); the last one is L_0's. For `learned_range` it is the
            lower of the two bounds.
        log_variance_range: logarithms of the bounds of `learned_range`, (S, 2), else None.
    """

    timesteps: list[int]
    alpha_bar: torch.Tensor
    alpha_bar_before: torch.Tensor
    posterior_variance: torch.Tensor
    weight: torch.Tensor
    variance: torch.Tensor
    log_variance_range: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Terms:
    """The bound of a batch of B images, in nats per image.

    Attributes:
        prior: L_T, (B,).
        index: which step (position in `Plan.timesteps`) each of n draws is, int64 (B, n).
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
        """The sum of L_{t-1} over the steps, or its unbiased estimate, (B,)."""
        return (self.value * self.weight).sum(1)

    @property
    def total(self) -> torch.Tensor:
        """The bound, (B,)."""
        return self.prior + self.steps + self.decoder


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error (NaN for one image)."""

    mean: float
    std_error: float
    count: int


def first_posterior_variance(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return the posterior variance of timestep 1 of the training chain, 0-d.

    L_0 takes it for the fixed variances (the authors' code of DDPM and of Analytic-DPM): the
    posterior variance of timestep 0 is 0. With T = 1 it is beta_0.
    """
    if alpha_bar.shape[0] == 1:
        return 1 - alpha_bar[0]
    return sigma_eta(alpha_bar[1], alpha_bar[0], 1.0) ** 2


def make_plan(
    alpha_bar: torch.Tensor,
    timesteps: Sequence[int],
    variance: str = "fixed_small",
    *,
    eta: float = 1.0,
    sigma: Sequence[float] | torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    x0_limit: float = 1.0,
) -> Plan:
    """Return the reverse chain whose bound is asked for.

    Args:
        alpha_bar: of the training chain, float64 (T,).
        timesteps: trajectory, strictly decreasing within 0 .. T - 1; the last one must be 0.
        variance: `fixed_small` (sigma^2), `fixed_large` (1 - a_t / a_s, for eta = 1),
            `learned_range` (between the two, eta = 1) or `optimal`.
        eta: the member, sigma = eta sigma(1); > 0.
        sigma: the member as one std for each step, > 0 except the last, which lands on x_0;
            excludes `eta`.
        gamma: E||eps_theta||^2 / d, (T,), for `optimal`.
        x0_limit: largest |x_0|; its square bounds Var(x_0 | x_t) in `optimal`.

    Returns:
        A plan that is differentiable in `alpha_bar`.

    Raises:
        ValueError: for a trajectory without timestep 0, a member with sigma = 0 (its bound is
            infinite), a variance that does not go with the member, or missing statistics.
    """
    tau = check_timesteps(timesteps, alpha_bar.shape[0])
    if tau[-1] != 0:
        raise ValueError(
            f"`timesteps` ends at {tau[-1]}; a likelihood needs a trajectory that contains "
            "timestep 0 (for an even one, timestep_spacing='linspace')."
        )
    if variance not in VARIANCES:
        raise ValueError(f"`variance` is {variance!r}; it must be one of {VARIANCES}.")
    member = sigma is None and eta == 1
    if variance in ("fixed_large", "learned_range") and not member:
        said = "an explicit `sigma`" if sigma is not None else f"eta={eta!r}"
        raise ValueError(f"`variance` is {variance!r}, which needs eta=1; got {said}.")
    a_t = alpha_bar[tau]
    a_s = torch.cat([a_t[1:], torch.ones_like(a_t[:1])])
    std = _member(a_t, a_s, eta, sigma)
    own = _x0_variance(variance, gamma, alpha_bar, tau, x0_limit)
    first, bounds = first_posterior_variance(alpha_bar), None
    # without the last step, whose sigma is 0, every square root has a gradient
    inner_t, inner_s, inner_std = a_t[:-1], a_s[:-1], std[:-1]
    if variance == "learned_range":
        small, large = reverse_pair(a_t, a_s, first)
        bounds, reverse = torch.stack([small.log(), large.log()], dim=1), small
    else:
        inner_own = None if own is None else own[:-1]
        inner = reverse_variance(variance, inner_t, inner_s, inner_std, inner_own)
        reverse = torch.cat([inner, first[None] if own is None else own[-1:]])
    if gamma is not None and own is not None and float(own[-1].detach()) <= 0:
        raise ValueError(
            f"`gamma[0]` is {float(gamma[0])}; L_0 with the optimal variance needs gamma[0] < 1 "
            "(calibrate with more images, or take a fixed variance)."
        )
    one = torch.ones_like(a_t[:1])
    return Plan(
        tau,
        a_t,
        alpha_bar_before(alpha_bar)[tau],
        std**2,
        torch.cat([x0_weight(inner_t, inner_s, inner_std), one]),
        reverse,
        bounds,
    )


def reverse_pair(
    alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two variances between which `learned_range` lies, (S,) each.

    Improved DDPM (arXiv:2102.09672), Eq. 15; the lower one of the last step, which would be 0, is
    `first` as in the authors' code.
    """
    small = sigma_eta(alpha_bar_t[:-1], alpha_bar_s[:-1], 1.0) ** 2
    return torch.cat([small, first[None]]), sigma_hat(alpha_bar_t, alpha_bar_s) ** 2


def _member(
    a_t: torch.Tensor,
    a_s: torch.Tensor,
    eta: float,
    sigma: Sequence[float] | torch.Tensor | None,
) -> torch.Tensor:
    if sigma is None:
        inner = sigma_eta(a_t[:-1], a_s[:-1], eta)
        std, said = torch.cat([inner, torch.zeros_like(a_t[:1])]), f"`eta` is {eta!r}"
        check_sigma(std.detach(), a_s.detach(), eta)
    else:
        std = torch.as_tensor(sigma, dtype=a_t.dtype)
        if std.shape != a_t.shape:
            raise ValueError(
                f"`sigma` has shape {tuple(std.shape)}; it must have one value for each of the "
                f"{len(a_t)} steps."
            )
        check_sigma(std, a_s.detach())
        said = "`sigma` is 0 in a step before the last"
    if len(std) > 1 and not bool((std[:-1] > 0).all()):
        raise ValueError(
            f"{said}: q(x_s | x_t, x_0) is then a point, its divergence from any Gaussian is "
            "infinite, and so is the bound; choose sigma > 0."
        )
    return std


def _x0_variance(
    variance: str,
    gamma: torch.Tensor | None,
    alpha_bar: torch.Tensor,
    tau: list[int],
    x0_limit: float,
) -> torch.Tensor | None:
    if variance != "optimal":
        return None
    if gamma is None:
        raise ValueError("`variance` is 'optimal', which needs `gamma` of a calibration.")
    return x0_variance(gamma.to(alpha_bar), alpha_bar, x0_limit**2)[tau]


# -- the terms ------------------------------------------------------------------------------------


def prior_kl(x0: torch.Tensor, alpha_bar_last: torch.Tensor) -> torch.Tensor:
    """Return L_T = KL(N(sqrt(a) x_0, (1 - a) I) || N(0, I)) in nats per image, (B,).

    Args:
        x0: (B, ...).
        alpha_bar_last: alpha_bar at the trajectory's largest timestep, 0-d, in [0, 1).
    """
    a = alpha_bar_last.to(torch.float64)
    square = x0.to(torch.float64).flatten(1) ** 2
    return 0.5 * (a * square - a - torch.log1p(-a)).sum(1)


def grid_levels(x0: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Return the index 0 .. num_bins - 1 of each value on the grid of [-1, 1], int64 like `x0`.

    Raises:
        ValueError: if num_bins < 2 or a value is not on the grid (up to float32 rounding).
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 2:
        raise ValueError(f"`num_bins` is {num_bins!r}; it must be an integer >= 2.")
    position = (x0.to(torch.float64) + 1) * ((num_bins - 1) / 2)
    level = position.round()
    off = (position - level).abs() > GRID_TOLERANCE * num_bins
    if bool((off | (level < 0) | (level >= num_bins) | ~torch.isfinite(position)).any()):
        bad = (off | (level < 0) | (level >= num_bins) | ~torch.isfinite(position)).flatten()
        value = float(x0.flatten()[int(bad.nonzero()[0])])
        raise ValueError(
            f"`x0` holds {value!r}, which is not one of the {num_bins} equally spaced values of "
            "[-1, 1]: the likelihood of discrete data needs data on the grid (no resizing, noise "
            "or augmentation), or another `num_bins`."
        )
    return level.long()


def log_normal_interval(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return log(Phi(high) - Phi(low)) elementwise for finite low < high; float64.

    Accurate in both tails, to rounding: the interval is mirrored to the left one, where log Phi(x)
    = log erfcx(-x / sqrt 2) - x^2 / 2 + const, and the difference of the squares is taken exactly.
    A narrow interval is its midpoint's density times its width.
    """
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    width, middle = high - low, 0.5 * (high + low)
    log_high = torch.special.log_ndtr(high)
    # log(1 - exp(gap)), gap = log Phi(low) - log Phi(high) < 0
    ratio = torch.special.erfcx(-low / math.sqrt(2)) / torch.special.erfcx(
        (-high / math.sqrt(2)).clamp(min=0)
    )
    left = width * middle + ratio.log()
    gap = torch.where(high <= 0, left, torch.special.log_ndtr(low) - log_high)
    wide = log_high + torch.log(-torch.expm1(gap.clamp(max=-1e-300)))
    # the relative error is width^2 (middle^2 - 1) / 24, below 1e-11 where this is used
    is_narrow = width * (1 + middle.abs()) < 1e-5
    safe_width = torch.where(is_narrow, width, 1.0)
    safe_middle = torch.where(is_narrow, middle, 0.0)
    narrow = -0.5 * safe_middle**2 - 0.5 * math.log(2 * math.pi) + safe_width.log()
    return torch.where(is_narrow, narrow, wide)


def decoder_nll(
    x0: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    num_bins: int | None = 256,
    floor: float | None = None,
) -> torch.Tensor:
    """Return L_0 = -log p(x_0 | x_1) in nats per image, (B,) (DDPM, Eq. 13).

    Each value gets the probability of its bin under N(mean, variance); the bins of -1 and 1 are
    open towards infinity.

    Args:
        x0: (B, ...), on the grid of `num_bins` values of [-1, 1].
        mean: x0_hat, like `x0`.
        variance: > 0, broadcasts against `x0`.
        num_bins: 256 for 8-bit data; `None` takes the Gaussian density instead, for continuous
            data.
        floor: smallest probability of a bin. `None` is the exact bound; DDPM's code has 1e-12,
            with which it is no longer a bound.

    Raises:
        ValueError: for data off the grid or a variance that is not > 0.
    """
    x, mean, variance = (v.to(torch.float64) for v in (x0, mean, variance))
    if not bool((variance.detach() > 0).all()):
        raise ValueError("`variance` must be > 0 everywhere.")
    if num_bins is None:
        nll = 0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance))
        return (nll + torch.zeros_like(x)).flatten(1).sum(1)
    level = grid_levels(x0, num_bins)
    half = 1 / (num_bins - 1)
    centre = level.to(torch.float64) * (2 * half) - 1
    std = variance.sqrt()
    low, high = (centre - half - mean) / std, (centre + half - mean) / std
    # an open tail: everything beyond this far holds less than the smallest float64
    beyond = 1e8 * (1 + torch.maximum(low.abs(), high.abs()))
    low, high = (
        torch.where(level == 0, low - beyond, low),
        torch.where(level == num_bins - 1, high + beyond, high),
    )
    log_p = log_normal_interval(low, high)
    if floor is not None:
        log_p = log_p.clamp(min=math.log(floor))
    return -log_p.flatten(1).sum(1)


# -- the bound of a network -----------------------------------------------------------------------


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


def default_proposal(plan: Plan, x0_error: torch.Tensor | None = None) -> torch.Tensor:
    """Return a proposal for `importance`, (S - 1,), sums to 1: the expected terms.

    Args:
        plan: the chain.
        x0_error: E||x_0 - x0_hat||^2 / d for each of its S timesteps (a calibration); without it,
            that of Gaussian data of variance 1/4.

    A tenth is spread evenly, so that a step whose cost was underestimated keeps a bounded weight.
    """
    if x0_error is None:
        a = plan.alpha_bar
        x0_error = 0.25 * (1 - a) / (0.25 * a + (1 - a))
    expected = step_kl(
        plan.posterior_variance[:-1], plan.variance[:-1], plan.weight[:-1], x0_error[:-1]
    ).clamp(min=0)
    even = torch.full_like(expected, 1 / max(len(expected), 1))
    if float(expected.sum()) <= 0:
        return even
    return 0.9 * expected / expected.sum() + 0.1 * even


def variational_bound(
    predict: Predict,
    x0: torch.Tensor,
    plan: Plan,
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
        plan: the chain, from `make_plan`.
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
            f"`num_calls` is {num_calls!r}; estimator={estimator!r} needs at least 2, one of them "
            "for L_0."
        )
    steps, x = len(plan) - 1, x0.to(torch.float64)
    if estimator == "importance" and proposal is None:
        proposal = default_proposal(plan)
    index, weight = draw_steps(estimator, (num_calls or 2) - 1, steps, len(x), proposal, generator)
    last = torch.full((len(x), 1), steps)
    values, errors = [], []
    for column in torch.cat([index, last], dim=1).unbind(1):
        eps = noise if noise is not None else torch.randn(x.shape, generator=generator)
        x0_hat, variance = _reverse(
            predict, x, plan, column, eps.to(x), prediction_type, clip, dtype
        )
        errors.append(((x - x0_hat) ** 2).flatten(1).mean(1))
        values.append((x0_hat, variance))
    value = [
        _step_nats(plan, column, x, x0_hat, variance)
        for column, (x0_hat, variance) in zip(index.unbind(1), values[:-1], strict=True)
    ]
    decoder = decoder_nll(x0, *values[-1], num_bins)
    return Terms(
        prior_kl(x, plan.alpha_bar[0]),
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
    plan: Plan,
    column: torch.Tensor,
    noise: torch.Tensor,
    prediction_type: str,
    clip: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x0_hat and the reverse variance of one draw for each image."""
    shape = (-1,) + (1,) * (x0.ndim - 1)
    t = torch.tensor(plan.timesteps)[column]
    channels = x0.shape[1] if plan.log_variance_range is not None else None
    x0_hat, _, raw = predict_x0(
        predict,
        x0,
        t,
        plan.alpha_bar[column],
        plan.alpha_bar_before[column],
        noise,
        prediction_type,
        clip,
        dtype,
        channels,
    )
    if plan.log_variance_range is None or raw is None:
        return x0_hat, plan.variance[column].view(shape)
    low, high = plan.log_variance_range[column].unbind(1)
    share = (raw + 1) / 2
    return x0_hat, torch.exp(share * high.view(shape) + (1 - share) * low.view(shape))


def _step_nats(
    plan: Plan, column: torch.Tensor, x0: torch.Tensor, x0_hat: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    shape = (-1,) + (1,) * (x0.ndim - 1)
    posterior = plan.posterior_variance[column].view(shape)
    weight = plan.weight[column].view(shape)
    # the part of x_t is the same in both means, so that only their parts of x_0 differ
    kl = gaussian_kl(Gaussian(weight * x0, posterior), Gaussian(weight * x0_hat, variance))
    return kl.flatten(1).sum(1)


def bound_from_errors(
    plan: Plan, x0: torch.Tensor, x0_error: torch.Tensor, decoder: torch.Tensor
) -> Terms:
    """Return the bound of any chain from one pass over its timesteps.

    The KL of a step depends on the network through ||x_0 - x0_hat||^2 alone, unless it predicts
    variances too; x_t has the same distribution for every member and trajectory (Watson et al.,
    arXiv:2106.03802, Sec. 3.2).

    Args:
        plan: the chain; not `learned_range`.
        x0: images (B, ...).
        x0_error: ||x_0 - x0_hat||^2 / d at each of the plan's timesteps, float64 (B, S).
        decoder: L_0 for the plan's last variance, (B,).

    Raises:
        ValueError: for `learned_range`, whose variance is not in `x0_error`.
    """
    if plan.log_variance_range is not None:
        raise ValueError("`plan` has a learned variance; use `variational_bound`.")
    d, steps = x0[0].numel(), len(plan) - 1
    value = d * step_kl(
        plan.posterior_variance[:-1], plan.variance[:-1], plan.weight[:-1], x0_error[:, :-1]
    )
    index, weight = draw_steps("all", 0, steps, len(x0))
    return Terms(prior_kl(x0, plan.alpha_bar[0]), index, value, weight, decoder, x0_error, d)


def expected_bound(
    plan: Plan, x0_error: torch.Tensor, x0_square: torch.Tensor | float
) -> torch.Tensor:
    """Return the expectation of the bound in nats per dimension, L_0 as a Gaussian density; 0-d.

    Args:
        plan: the chain; not `learned_range`. Differentiable in what it was made of.
        x0_error: E||x_0 - x0_hat||^2 / d at each of its timesteps, (S,).
        x0_square: E||x_0||^2 / d.
    """
    a = plan.alpha_bar[0]
    prior = 0.5 * (a * x0_square - a - torch.log1p(-a))
    steps = step_kl(
        plan.posterior_variance[:-1], plan.variance[:-1], plan.weight[:-1], x0_error[:-1]
    )
    last = plan.variance[-1]
    decoder = 0.5 * (torch.log(2 * math.pi * last) + x0_error[-1] / last)
    return prior + steps.sum() + decoder


# -- what is reported -----------------------------------------------------------------------------


def bits_per_dim(nats: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Return nats per image as bits per dimension."""
    return nats / (dimensions * math.log(2))


def estimate(values: torch.Tensor) -> Estimate:
    """Return mean and standard error of independent values, (N,).

    The spread over images holds every source of chance: the image, its noise, and its draws of t.
    """
    n = len(values)
    error = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), error, n)


@dataclass(frozen=True)
class CodingPoint:
    """One point of the progressive-coding curve: what is known once x_t has been received.

    Attributes:
        timestep: t.
        rate: bits per dimension spent until x_t is known.
        distortion: root mean squared error of x0_hat(x_t), in grey levels (0 .. num_bins - 1).
        term: what the step from t costs, bits per dimension: L_{t-1}, or L_0 at t = 0.
    """

    timestep: int
    rate: float
    distortion: float
    term: float


def coding_curve(plan: Plan, terms: Terms, num_bins: int | None = 256) -> list[CodingPoint]:
    """Return the progressive lossy coding of DDPM (Sec. 4.3, Fig. 5 and Table 4), from T to 0.

    A receiver that has x_t has been sent L_T and the steps above t, and shows x0_hat(x_t). The last
    point's rate is the paper's rate, its `term` the paper's distortion in bits (L_0).

    Args:
        plan: the chain.
        terms: of it, with the estimator `all`.
        num_bins: scale of the distortion; None leaves it on [-1, 1].

    Raises:
        ValueError: if not every step was evaluated.
    """
    if terms.index.shape[1] != len(plan) - 1 or not bool((terms.weight == 1).all()):
        raise ValueError("`terms` must hold every step once: use estimator='all'.")
    scale = 1.0 if num_bins is None else (num_bins - 1) / 2
    nats = torch.cat([terms.value, terms.decoder[:, None]], dim=1).mean(0)
    cost = bits_per_dim(nats, terms.dimensions)
    prior = bits_per_dim(terms.prior.mean()[None], terms.dimensions)
    rate = torch.cat([prior, prior + cost[:-1].cumsum(0)])
    rmse = terms.x0_error.mean(0).sqrt() * scale
    return [
        CodingPoint(t, float(r), float(e), float(c))
        for t, r, e, c in zip(plan.timesteps, rate, rmse, cost, strict=True)
    ]
