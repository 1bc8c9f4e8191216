"""Every noise that a reverse step can add, by name and once.

A step adds std z. The std is sigma, the member's own, or another one that takes its place in the
noise alone: the direction keeps sigma (`transition`). A noise is one of two kinds:

- `FixedNoise`: one std for each step, known before the network is asked.
- `LearnedNoise`: the network tells it for each pixel, in a second set of channels.

To add a noise, write a class here and list it in `NOISES`: the schedulers, the bound, the exports
and the command line take its names from there.
"""

from typing import ClassVar, NamedTuple

import torch

from .sigmas import sigma_eta, sigma_hat

# The smallest standard deviation whose logarithm is taken, as in diffusers and OpenAI's code.
MIN_STD = 1e-10


class Steps(NamedTuple):
    """The steps t -> s for which a noise is asked; tensors of one shape, e.g. (T,).

    alpha_bar_t is in [0, 1), alpha_bar_s in (0, 1], sigma the member. x0_variance is Var(x_0 | x_t)
    of a calibration, for the noises that need one. largest is a limit of the std, for samples that
    are looked at; a bound has none.
    """

    alpha_bar_t: torch.Tensor
    alpha_bar_s: torch.Tensor
    sigma: torch.Tensor
    x0_variance: torch.Tensor | None = None
    largest: torch.Tensor | None = None


class Noise:
    """One noise under all its names.

    Attributes:
        reverse_variance: its name in `GeneralizedDDIMScheduler`; None where that class lacks it.
        variance_types: its names in `MarkovianDDPMScheduler`; the first one is its name in a bound.
        any_member: whether it goes with every sigma; the others take the place of that of eta = 1.
        follows_sigma: whether it is 0 where sigma is 0, whatever the network says.
        needs_calibration: whether it needs statistics of the network.
        has_bound: whether a likelihood bound exists for it.
    """

    reverse_variance: ClassVar[str | None] = None
    variance_types: ClassVar[tuple[str, ...]] = ()
    any_member: ClassVar[bool] = False
    follows_sigma: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    has_bound: ClassVar[bool] = True


class FixedNoise(Noise):
    """A noise with one std for each step."""

    def std(self, steps: Steps) -> torch.Tensor:
        """Return the std of each step, in the shape of `steps.sigma`."""
        raise NotImplementedError

    def variance(self, steps: Steps) -> torch.Tensor:
        """Return its square, exactly where the variance is what is known."""
        return self.std(steps) ** 2


class LearnedNoise(Noise):
    """A noise that the network tells in the second half of its channels."""

    def bounds(self, steps: Steps) -> list[torch.Tensor]:
        """Return what `std` needs of each step, each in the shape of `steps.sigma`."""
        raise NotImplementedError

    def std(self, raw: torch.Tensor, *bounds: torch.Tensor) -> torch.Tensor:
        """Return the std of each pixel, in the shape of `raw`.

        Args:
            raw: the second half of the network's channels.
            *bounds: those of the step, broadcasting against it.
        """
        raise NotImplementedError

    def as_stock_has_it(self, raw: torch.Tensor, steps: Steps) -> torch.Tensor:
        """Return what stock DDPM calls the variance of this noise, in the shape of `raw`."""
        raise NotImplementedError


class OwnNoise(FixedNoise):
    """The member's own sigma; for eta = 1 the posterior's std (DDPM, Sec. 3.2)."""

    reverse_variance = "sigma"
    variance_types = ("fixed_small", "fixed_small_log")
    any_member = True
    follows_sigma = True

    def std(self, steps: Steps) -> torch.Tensor:
        """Return sigma."""
        return steps.sigma


class LargeNoise(FixedNoise):
    """sigma-hat, DDPM's larger choice (DDPM, Sec. 3.2; DDIM, Sec. 5)."""

    reverse_variance = "sigma_hat"
    variance_types = ("fixed_large", "fixed_large_log")

    def std(self, steps: Steps) -> torch.Tensor:
        """Return sqrt(1 - alpha_bar_t / alpha_bar_s)."""
        return sigma_hat(steps.alpha_bar_t, steps.alpha_bar_s)


class ToldNoise(LearnedNoise):
    """The second half of the channels is the variance itself, as in stock diffusers."""

    variance_types = ("learned",)
    has_bound = False

    def bounds(self, steps: Steps) -> list[torch.Tensor]:
        """Return none: the network is free."""
        return []

    def std(self, raw: torch.Tensor, *bounds: torch.Tensor) -> torch.Tensor:
        """Return the root."""
        return raw.sqrt()

    def as_stock_has_it(self, raw: torch.Tensor, steps: Steps) -> torch.Tensor:
        """Return the variance itself."""
        return raw


class RangeNoise(LearnedNoise):
    """Between sigma(1) and sigma-hat, as the channels say (arXiv:2102.09672, Eq. 15)."""

    reverse_variance = "learned_range"
    variance_types = ("learned_range",)

    def bounds(self, steps: Steps) -> list[torch.Tensor]:
        """Return log sigma(1) and log sigma-hat."""
        pair = variance_range(steps.alpha_bar_t, steps.alpha_bar_s, MIN_STD**2)
        return [variance.sqrt().clamp(min=MIN_STD).log() for variance in pair]

    def std(self, raw: torch.Tensor, *bounds: torch.Tensor) -> torch.Tensor:
        """Interpolate the logarithms."""
        return log_between(raw, *bounds).exp()

    def as_stock_has_it(self, raw: torch.Tensor, steps: Steps) -> torch.Tensor:
        """Return the logarithm of the variance."""
        floor = MIN_STD**2
        low, high = variance_range(steps.alpha_bar_t, steps.alpha_bar_s, floor)
        return log_between(raw, low.clamp(min=floor).log().float(), high.log().float())


class OptimalNoise(FixedNoise):
    """The noise that minimises the likelihood bound (Analytic-DPM, arXiv:2201.06503, Theorem 1)."""

    reverse_variance = "optimal"
    variance_types = ("optimal",)
    any_member = True
    needs_calibration = True

    def std(self, steps: Steps) -> torch.Tensor:
        """Return the root of the variance, at most `steps.largest`."""
        std = self.variance(steps).sqrt()
        return std if steps.largest is None else torch.minimum(std, steps.largest)

    def variance(self, steps: Steps) -> torch.Tensor:
        """Return sigma^2 + weight^2 Var(x_0 | x_t).

        Raises:
            ValueError: without the statistics.
        """
        if steps.x0_variance is None:
            raise ValueError(
                "`variance` is 'optimal'; the statistics of a calibration must be given with it."
            )
        return optimal_variance(
            steps.alpha_bar_t, steps.alpha_bar_s, steps.sigma, steps.x0_variance
        )


OWN, OPTIMAL = OwnNoise(), OptimalNoise()
NOISES: tuple[Noise, ...] = (OWN, LargeNoise(), ToldNoise(), RangeNoise(), OPTIMAL)

# The names of the setting of each class, and of a bound.
REVERSE_VARIANCES = tuple(n.reverse_variance for n in NOISES if n.reverse_variance is not None)
VARIANCE_TYPES = tuple(name for n in NOISES for name in n.variance_types)
BOUND_VARIANCES = tuple(n.variance_types[0] for n in NOISES if n.has_bound)
# The variances whose bound has a closed form in statistics of the network.
COST_VARIANCES = tuple(
    n.variance_types[0] for n in NOISES if n.has_bound and isinstance(n, FixedNoise)
)
# The noises that go with any member.
ANY_MEMBER = tuple(n.reverse_variance for n in NOISES if n.any_member)
# The names that say that the network predicts a variance. A tuple, not a set: a hostile config may
# hold a list, which has no hash.
LEARNED = tuple(
    name
    for n in NOISES
    if isinstance(n, LearnedNoise)
    for name in (n.reverse_variance, *n.variance_types)
    if name is not None
)

_BY_NAME: dict[str, dict[str | None, Noise]] = {
    "reverse_variance": {n.reverse_variance: n for n in NOISES},
    "variance_type": {name: n for n in NOISES for name in n.variance_types},
    "variance": {n.variance_types[0]: n for n in NOISES if n.has_bound},
}
_ALLOWED = {
    "reverse_variance": REVERSE_VARIANCES,
    "variance_type": VARIANCE_TYPES,
    "variance": BOUND_VARIANCES,
}


def noise_named(setting: str, name: str) -> Noise:
    """Return the noise of that name.

    Args:
        setting: whose names count: `reverse_variance`, `variance_type`, or `variance` of a bound.
        name: of the noise.

    Raises:
        ValueError: for a name that the setting does not have.
    """
    if name not in _ALLOWED[setting]:
        raise ValueError(f"`{setting}` is {name!r}; it must be one of {_ALLOWED[setting]}.")
    return _BY_NAME[setting][name]


def fixed_noise(variance: str) -> FixedNoise:
    """Return the noise of that name in a bound with a closed form.

    Raises:
        ValueError: for another name.
    """
    noise = _BY_NAME["variance"].get(variance)
    if not isinstance(noise, FixedNoise):
        raise ValueError(f"`variance` is {variance!r}; it must be one of {COST_VARIANCES}.")
    return noise


def cost_name(noise: Noise) -> str:
    """Return the name of the noise whose bound stands for this one's where a trajectory is planned.

    A learned noise has no statistics of its own and comes near the optimal one.
    """
    fixed = noise if isinstance(noise, FixedNoise) and noise.has_bound else OPTIMAL
    return fixed.variance_types[0]


def variance_range(
    alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, floor: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the variances between which a network chooses: sigma(1)^2 and sigma-hat^2.

    Improved DDPM (arXiv:2102.09672), Eq. 15.

    Args:
        alpha_bar_t: in [0, 1).
        alpha_bar_s: in (0, 1], in the same shape.
        floor: the lower one where a step lands on x_0, which would be 0. The authors' code takes
            the posterior variance of timestep 1 (`likelihood.first_posterior_variance`).
    """
    lands = alpha_bar_s == 1
    # any other alpha_bar keeps the root differentiable where its value is not used
    inner = torch.where(lands, 0.5 * (1 + alpha_bar_t), alpha_bar_s)
    low = sigma_eta(alpha_bar_t, inner, 1.0) ** 2
    return torch.where(lands, floor, low), sigma_hat(alpha_bar_t, alpha_bar_s) ** 2


def log_between(raw: torch.Tensor, log_low: torch.Tensor, log_high: torch.Tensor) -> torch.Tensor:
    """Return v log_high + (1 - v) log_low, v = (raw + 1) / 2 (Improved DDPM, Eq. 15).

    The network's `raw` is in [-1, 1]. It holds for the logarithms of variances and of standard
    deviations.
    """
    share = (raw + 1) / 2
    return share * log_high + (1 - share) * log_low


def x0_weight(
    alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Return the weight of x_0 in the mean of q(x_s | x_t, x_0) (DDIM, arXiv:2010.02502, Eq. 7).

    Args:
        alpha_bar_t: in [0, 1).
        alpha_bar_s: in (0, 1].
        sigma: the member, 0 <= sigma^2 <= 1 - alpha_bar_s.
    """
    rest = (1 - alpha_bar_s - sigma**2).clamp(min=0)
    return alpha_bar_s.sqrt() - (rest * alpha_bar_t / (1 - alpha_bar_t)).sqrt()


def optimal_variance(
    alpha_bar_t: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    sigma: torch.Tensor,
    x0_variance_t: torch.Tensor,
) -> torch.Tensor:
    """Return the reverse variance that minimises the bound: sigma^2 + weight^2 Var(x_0 | x_t).

    Analytic-DPM (arXiv:2201.06503), Theorem 1, with x_0's variance in the place of the score's
    norm; both forms are the same, and this one takes the bound on x_0's variance.
    """
    return sigma**2 + x0_weight(alpha_bar_t, alpha_bar_s, sigma) ** 2 * x0_variance_t
