r"""The training losses of DDPM, DDIM and Improved DDPM, as weights of one squared error.

With m the prediction and m_hat the network's output, the loss at timestep t is

    w_t * mean over pixels of (m_hat - m)^2                      (all but `vlb`)

The choices of w_t, each written for the error in which its source defines it and brought to the
error of the prediction m by the linear maps of `ddim_schedulers.parameterization` (eps_hat - eps =
k (m_hat - m)):

- `simple`: w_t = 1 for every m (DDPM, arXiv:2006.11239, Eq. 14).
- `gamma`: sum_t gamma_t E||eps_hat - eps||^2 for any vector gamma (DDIM, arXiv:2010.02502, Eq. 5).
- `min_snr`: min(SNR_t, snr_gamma) on the error of x_0 (arXiv:2303.09556, Eq. 8), SNR = a / b.
- `vlb`: the variational bound itself in bits per dimension, DDPM Eq. 5: KL terms for t > 0, the
  likelihood of the pixel's bin (Eq. 13) for t = 0; T times the term at t, so that its mean is the
  sum.

**J_sigma = L_gamma + C (DDIM, Theorem 1).** Let p_theta(x_s | x_t) = q_sigma(x_s | x_t,
x0_hat(x_t)) with x0_hat from eps_hat. Both Gaussians have variance sigma^2 and their means differ
by sqrt(a_s) (x0_hat - x0) + sqrt(b_s - sigma^2) (eps_hat - eps), where x0_hat - x0 =
-sqrt(b_t / a_t) (eps_hat - eps), a cumulative, b = 1 - a. Hence KL = gamma_t ||eps_hat - eps||^2
with

    gamma_t = (sqrt(b_t a_s / a_t) - sqrt(b_s - sigma^2))^2 / (2 sigma^2)

and for the last step, p_theta(x_0 | x_t) = N(x0_hat, sigma^2 I), the same with a_s = 1, b_s -
sigma^2 := 0. The paper prints gamma_t = 1 / (2 d sigma_t^2 a_t) (App. B): it drops the factor that
the two means share x_t, that is the b_t and the second root above (and counts the mean over d
pixels). `gamma_of_family` is the exact one; `tests/test_train_objectives.py` compares it with
the KL of the two Gaussians.

**Learned variance** (`learned_range`, Improved DDPM, arXiv:2102.09672, Eq. 15-16): the network has
2C outputs; the second half v in [-1, 1] interpolates log sigma^2 between log beta_tilde_t and log
beta_t. The loss is L + hybrid_lambda L_vlb, where the mean in L_vlb carries no gradient. As in the
authors' code L_vlb is in bits per dimension and L_simple a plain mean.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch

from ddim_schedulers.betas import (
    alpha_bar_before,
    alpha_bar_from_betas,
    make_betas,
    rescale_zero_terminal_snr,
)
from ddim_schedulers.likelihood import first_posterior_variance
from ddim_schedulers.parameterization import (
    eps_coefficients,
    posterior_mean_coefficients,
    target,
    x0_coefficients,
)
from ddim_schedulers.process import Gaussian, gaussian_kl
from ddim_schedulers.reading import read_json, read_npy, read_text
from ddim_schedulers.reverse_noise import (
    LearnedNoise,
    Steps,
    fixed_noise,
    log_between,
    noise_named,
    variance_range,
)
from ddim_schedulers.sigmas import sigma_eta
from ddim_schedulers.training.config import TrainingConfig


class Objective:
    """The loss of each sample, from tables computed once in float64.

    Args:
        alpha_bar: (T,) float64.
        prediction_type: what the network predicts.
        weights: (T,) float64 weights of the squared error of that prediction; ignored by `vlb`.
        variance_type: `fixed_small`, `fixed_large` or `learned_range`.
        vlb: take the bound as the loss instead of the weighted error.
        hybrid_lambda: weight of the bound with `learned_range`.
        levels: number of values a pixel can take, for L_0; None takes the density instead.

    Raises:
        ValueError: weights of the wrong shape, negative or not finite, or a bound that is infinite.
    """

    def __init__(
        self,
        alpha_bar: torch.Tensor,
        prediction_type: str,
        weights: torch.Tensor,
        *,
        variance_type: str = "fixed_large",
        vlb: bool = False,
        hybrid_lambda: float = 0.001,
        levels: int | None = 256,
    ) -> None:
        self.steps = len(alpha_bar)
        if weights.shape != alpha_bar.shape:
            raise ValueError(
                f"`weights` has shape {tuple(weights.shape)}; it must be (T,) = ({self.steps},)"
            )
        if not (torch.isfinite(weights).all() and (weights >= 0).all()):
            at = int((~(torch.isfinite(weights) & (weights >= 0))).nonzero()[0])
            raise ValueError(f"`weights` is {weights[at]} at t = {at}; it must be finite and >= 0")
        self.vlb, self.hybrid_lambda, self.levels = vlb, hybrid_lambda, levels
        self.learned = isinstance(noise_named("variance", variance_type), LearnedNoise)
        self.needs_bound = self.learned or vlb
        rows = _error_rows(alpha_bar, prediction_type, weights)
        if self.needs_bound:
            rows += _bound_rows(alpha_bar, prediction_type, variance_type)
        self.rows = torch.stack(rows, dim=1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Objective":
        """Move the tables; call once before training."""
        self.rows = self.rows.to(device=device, dtype=dtype)
        return self

    def noisy(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return x_t, in the shape of `x0` (DDPM, Eq. 4); t is (B,) int64 in 0 .. T - 1."""
        row = self.rows[t]
        return _per_image(row[:, 0]) * x0 + _per_image(row[:, 1]) * noise

    def __call__(
        self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each sample and its unweighted squared error, both (B,).

        Args:
            output: of the network, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            x0: images in [-1, 1].
            noise: eps.
            t: (B,) int64.
        """
        row = self.rows[t]
        output = output.to(self.rows.dtype)
        mean, fraction = output.chunk(2, dim=1) if self.learned else (output, None)
        goal = _per_image(row[:, 2]) * x0 + _per_image(row[:, 3]) * noise
        error = (mean - goal).square().flatten(1).mean(1)
        if self.vlb:
            return self.steps * self.bound(mean, fraction, x0, noise, t), error.detach()
        loss = row[:, 4] * error
        if fraction is not None and self.hybrid_lambda:
            term = self.bound(mean.detach(), fraction, x0, noise, t)
            loss = loss + self.hybrid_lambda * self.steps * term
        return loss, error.detach()

    def bound(
        self,
        mean: torch.Tensor,
        fraction: torch.Tensor | None,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """Return L_t of DDPM's Eq. 5 in bits per dimension, (B,); their sum is the bound less L_T.

        Args:
            mean: the network's prediction.
            fraction: the network's v for `learned_range`, None for a fixed variance.
            x0: images.
            noise: eps.
            t: (B,) int64.
        """
        row = self.rows[t]
        x_t = self.noisy(x0, noise, t)
        k_x, k_m, k_x0, k_xt, log_true, log_low, log_high = (
            _per_image(row[:, i]) for i in range(5, 12)
        )
        log_variance = log_low if fraction is None else log_between(fraction, log_low, log_high)
        model = Gaussian(k_x * x_t + k_m * mean, log_variance.exp())
        truth = Gaussian(k_x0 * x0 + k_xt * x_t, log_true.exp())
        kl = gaussian_kl(truth, model).flatten(1).mean(1)
        nll = (
            -bin_log_likelihood(x0, model.mean, 0.5 * log_variance, self.levels).flatten(1).mean(1)
        )
        return torch.where(t == 0, nll, kl) / math.log(2)


def make_objective(config: TrainingConfig, levels: int | None) -> Objective:
    """Return the objective of a run.

    Raises:
        ValueError: a gamma file with the wrong number of weights, weights that are not finite (for
            instance epsilon prediction where alpha_bar is 0), unknown names.
    """
    betas = make_betas(
        config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end
    )
    if config.rescale_betas_zero_snr:
        if config.prediction_type == "epsilon":
            raise ValueError(
                "`rescale_betas_zero_snr` is true, and prediction_type 'epsilon' leaves nothing to "
                "learn at the last timestep; use v_prediction, sample or posterior_mean"
            )
        betas = rescale_zero_terminal_snr(betas)
    alpha_bar = alpha_bar_from_betas(betas)
    return Objective(
        alpha_bar,
        config.prediction_type,
        loss_weights(config, alpha_bar),
        variance_type=bound_variance(config.variance_type),
        vlb=config.loss == "vlb",
        hybrid_lambda=config.hybrid_lambda,
        levels=levels,
    )


def bound_variance(variance_type: str) -> str:
    """Return the variance of the bound of a setting `variance_type`."""
    return "fixed_large" if variance_type == "auto" else variance_type


def loss_weights(config: TrainingConfig, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return the weights of the squared error, (T,) float64; see the top of this file."""
    before = alpha_bar_before(alpha_bar)
    if config.loss == "gamma":
        if config.gamma == "ddim":
            gamma = gamma_of_family(alpha_bar, config.gamma_eta)
        else:
            gamma = read_vector(str(config.gamma))
            if gamma.shape != alpha_bar.shape:
                raise ValueError(
                    f"`gamma` is {config.gamma!r}, which holds {gamma.numel()} weights; it must "
                    f"hold {len(alpha_bar)}, one for each timestep"
                )
        return gamma * eps_coefficients(config.prediction_type, alpha_bar, before)[1].square()
    if config.loss == "min_snr":
        snr = alpha_bar / (1 - alpha_bar)
        k_m = x0_coefficients(config.prediction_type, alpha_bar, before)[1]
        return snr.clamp(max=config.snr_gamma) * k_m.square()
    return torch.ones_like(alpha_bar)


def gamma_of_family(
    alpha_bar: torch.Tensor, eta: float = 1.0, timesteps: list[int] | None = None
) -> torch.Tensor:
    """Return the weights with which L_gamma + C is J_sigma, in nats per image.

    Args:
        alpha_bar: (T,) float64.
        eta: member of the family, above 0 (J_sigma is infinite at 0).
        timesteps: a decreasing sub-sequence; None takes all T.

    Returns:
        gamma (T,) float64, zero at timesteps that are not planned. Where the last step lands on
        alpha_bar = 1, sigma(eta) is 0 and the paper's sigma_1 is a free choice: it is taken as
        sqrt(1 - alpha_bar_t), the noise of that step.

    Raises:
        ValueError: eta is not above 0.
    """
    if not eta > 0:
        raise ValueError(f"`gamma_eta` is {eta}; it must be above 0, the bound is infinite at 0")
    planned = torch.tensor(
        timesteps if timesteps is not None else range(len(alpha_bar) - 1, -1, -1)
    )
    a_t = alpha_bar[planned]
    a_s = torch.cat([a_t[1:], a_t.new_ones(1)])
    sigma = sigma_eta(a_t, a_s, eta)
    sigma[-1] = (1 - a_t[-1]).sqrt()
    gamma = torch.zeros_like(alpha_bar)
    gamma[planned] = gamma_exact(a_t, a_s, sigma)
    return gamma


def gamma_exact(
    alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Return gamma_t of J_sigma = L_gamma + C for steps from t to s with sigma > 0, elementwise."""
    b_t, b_s = 1 - alpha_bar_t, 1 - alpha_bar_s
    direct = (b_t * alpha_bar_s / alpha_bar_t).sqrt()
    return (direct - (b_s - sigma**2).clamp(min=0).sqrt()).square() / (2 * sigma**2)


def bin_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, levels: int | None
) -> torch.Tensor:
    """Return log p of the pixel's bin under N(mean, std^2), elementwise, in nats (DDPM, Eq. 13).

    Bins have half-width 1 / (levels - 1) in [-1, 1]; the first and last are open; a floor of 1e-12
    keeps the logarithm finite. With `levels` None it is the log-density, for data that are
    continuous.
    """
    centred, inverse = x - mean, (-log_std).exp()
    if levels is None:
        return -0.5 * (centred * inverse).square() - log_std - 0.5 * math.log(2 * math.pi)
    half = 1 / (levels - 1)
    first, last = x < -1 + half, x > 1 - half
    # By symmetry each bin is computed from the side where its mass is no difference of two ones.
    distance = torch.where(first, -centred, torch.where(last, centred, centred.abs()))
    # erfc, because torch's ndtr is 1 + erf below and loses all digits in the tail.
    scale = inverse * math.sqrt(0.5)
    outer = 0.5 * torch.special.erfc((distance + half) * scale)
    mass = 0.5 * torch.special.erfc((distance - half) * scale)
    mass = mass - torch.where(first | last, torch.zeros_like(outer), outer)
    return mass.clamp(min=1e-12).log()


def read_vector(path: str) -> torch.Tensor:
    """Return a 1-d float64 tensor from a .npy, .json or text file.

    Raises:
        ValueError: not there, or not a vector of numbers.
    """
    file = Path(path)
    try:
        if file.suffix == ".npy":
            values = read_npy(file)
        elif file.suffix == ".json":
            values = np.array(read_json(file, list), dtype=np.float64)
        else:
            values = np.loadtxt(io.StringIO(read_text(file)))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`gamma` is {path!r}; it must be a file that holds a vector of numbers: {error}"
        ) from error
    return torch.from_numpy(np.atleast_1d(values).astype(np.float64))


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _error_rows(
    alpha_bar: torch.Tensor, prediction_type: str, weights: torch.Tensor
) -> list[torch.Tensor]:
    """Return columns 0-4: x_t and the target as combinations of (x_0, eps), and the weight."""
    before, one, zero = (
        alpha_bar_before(alpha_bar),
        torch.ones_like(alpha_bar),
        torch.zeros_like(alpha_bar),
    )
    return [
        alpha_bar.sqrt(),
        (1 - alpha_bar).sqrt(),
        target(prediction_type, one, zero, alpha_bar, before),
        target(prediction_type, zero, one, alpha_bar, before),
        weights,
    ]


def _bound_rows(
    alpha_bar: torch.Tensor, prediction_type: str, variance_type: str
) -> list[torch.Tensor]:
    """Return columns 5-11: both posterior means, and log-variances true, low, high."""
    before = alpha_bar_before(alpha_bar)
    k_x0, k_xt = posterior_mean_coefficients(alpha_bar, before)
    if prediction_type == "posterior_mean":
        k_x, k_m = torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)
    else:
        x0_x, x0_m = x0_coefficients(prediction_type, alpha_bar, before)
        k_x, k_m = k_x0 * x0_x + k_xt, k_x0 * x0_m
    # The posterior of the first step has no variance; DDPM's code takes its neighbour's.
    first = first_posterior_variance(alpha_bar)
    small, large = variance_range(alpha_bar, before, first)
    if isinstance(noise_named("variance", variance_type), LearnedNoise):
        low, high = small, large
    else:
        steps = Steps(alpha_bar[1:], before[1:], small[1:].sqrt())
        low = high = torch.cat([first[None], fixed_noise(variance_type).variance(steps)])
    return [k_x, k_m, k_x0, k_xt, small.log(), low.log(), high.log()]
