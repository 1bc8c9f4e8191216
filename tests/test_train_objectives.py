"""The training losses against the papers, in float64."""

import json
import math

import numpy as np
import pytest
import torch

from ddim_schedulers.betas import alpha_bar_before, alpha_bar_from_betas, make_betas
from ddim_schedulers.likelihood import decoder_nll
from ddim_schedulers.parameterization import PREDICTION_TYPES, eps_from, target, x0_from
from ddim_schedulers.process import Gaussian, gaussian_kl, q_s_given_t_0, q_sample
from ddim_schedulers.sigmas import sigma_eta
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.objectives.losses import (
    Objective,
    bin_log_likelihood,
    gamma_exact,
    gamma_of_family,
    loss_weights,
    make_objective,
    read_vector,
)

T = 40
ALPHA_BAR = alpha_bar_from_betas(make_betas("linear", T, 1e-3, 0.2))
SHAPE = (3, 2, 4, 4)


def batch(count=T):
    """One image at each t: x0 on the grid of 17 levels, noise, and t."""
    random = torch.Generator().manual_seed(1)
    shape = (count, *SHAPE[1:])
    x0 = torch.randint(0, 17, shape, generator=random).double() / 8 - 1
    noise = torch.randn(shape, generator=random, dtype=torch.float64)
    return x0, noise, torch.arange(count)


def at(values, t):
    return values[t][:, None, None, None]


def objective_of(**settings):
    config = TrainingConfig(num_train_timesteps=T, beta_start=1e-3, beta_end=0.2, **settings)
    return make_objective(config, levels=17).to("cpu", torch.float64)


def worse(truth, seed=2, scale=0.1):
    random = torch.Generator().manual_seed(seed)
    return truth + scale * torch.randn(truth.shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_j_sigma_is_l_gamma_plus_a_constant(kind, eta):
    """KL(q_sigma(x_s | x_t, x0) || q_sigma(x_s | x_t, x0_hat)) = gamma_t ||eps_hat - eps||^2.

    The constant is 0 here: the two Gaussians have the same variance.
    """
    x0, noise, t = batch()
    a_t, a_s = at(ALPHA_BAR, t), at(alpha_bar_before(ALPHA_BAR), t)
    x_t = q_sample(x0, noise, a_t)
    output = worse(target(kind, x0, noise, a_t, a_s))
    x0_hat, eps_hat = (f(kind, output, x_t, a_t, a_s) for f in (x0_from, eps_from))
    sigma = sigma_eta(a_t, a_s, eta)
    sigma[0] = (1 - a_t[0]).sqrt()  # the step to x_0: any sigma_1 > 0, mean x0_hat
    truth, model = (
        Gaussian(
            torch.cat(
                [
                    mean[:1],
                    q_s_given_t_0(x_t, mean, a_t, a_s, sigma * (t > 0)[:, None, None, None]).mean[
                        1:
                    ],
                ]
            ),
            sigma**2,
        )
        for mean in (x0, x0_hat)
    )
    kl = gaussian_kl(truth, model).flatten(1).sum(1)
    gamma = gamma_of_family(ALPHA_BAR, eta)
    error = (eps_hat - noise).square().flatten(1).sum(1)
    torch.testing.assert_close(kl, gamma * error, rtol=1e-9, atol=1e-12)

    # The loss with these weights is the same number for every prediction, per pixel.
    loss = objective_of(loss="gamma", gamma="ddim", gamma_eta=eta, prediction_type=kind)
    got, _ = loss(output, x0, noise, t)
    torch.testing.assert_close(got * x0[0].numel(), kl, rtol=1e-8, atol=1e-11)

    # The constant that the paper prints (App. B) is another number.
    printed = 1 / (2 * sigma.flatten() ** 2 * ALPHA_BAR)
    assert ((printed * error - kl).abs() / kl).min() > 0.2


def test_gamma_exact_is_the_formula_of_the_issue():
    a_t, a_s, sigma = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.7, 0.2))
    b_t, b_s = 1 - a_t, 1 - a_s
    expected = (math.sqrt(b_t * a_s / a_t) - math.sqrt(b_s - sigma**2)) ** 2 / (2 * sigma**2)
    assert float(gamma_exact(a_t, a_s, sigma)) == pytest.approx(float(expected), rel=1e-14)


def test_gamma_of_a_subsequence_is_zero_elsewhere():
    gamma = gamma_of_family(ALPHA_BAR, 0.5, timesteps=[39, 20, 3])
    assert sorted(gamma.nonzero().flatten().tolist()) == [3, 20, 39]
    with pytest.raises(ValueError, match="`gamma_eta` is 0"):
        gamma_of_family(ALPHA_BAR, 0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_l_simple_is_the_plain_mean_of_the_prediction_error(kind):
    x0, noise, t = batch()
    goal = target(kind, x0, noise, at(ALPHA_BAR, t), at(alpha_bar_before(ALPHA_BAR), t))
    output = worse(goal)
    loss, error = objective_of(prediction_type=kind)(output, x0, noise, t)
    expected = (output - goal).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(error, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        objective_of(prediction_type=kind).noisy(x0, noise, t),
        q_sample(x0, noise, at(ALPHA_BAR, t)),
    )


def test_min_snr_weights_are_those_of_the_paper():
    """arXiv:2303.09556, Sec. 3.4: min(SNR, 5) on x0, / SNR for epsilon, / (SNR + 1) for v."""
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    expected = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    for kind, divisor in expected.items():
        config = TrainingConfig(loss="min_snr", prediction_type=kind)
        got = loss_weights(config, ALPHA_BAR)
        torch.testing.assert_close(got, snr.clamp(max=5) / divisor, rtol=1e-12, atol=0)
    assert not torch.allclose(got, snr.clamp(max=4))  # another limit would be seen


def test_any_vector_is_taken_from_a_file(tmp_path):
    gamma = np.linspace(0, 2, T)
    np.save(tmp_path / "g.npy", gamma)
    np.savetxt(tmp_path / "g.txt", gamma)
    (tmp_path / "g.json").write_text(json.dumps(gamma.tolist()))
    x0, noise, t = batch()
    output = worse(noise)
    expected = torch.from_numpy(gamma) * (output - noise).square().flatten(1).mean(1)
    for name in ("g.npy", "g.txt", "g.json"):
        loss, _ = objective_of(loss="gamma", gamma=str(tmp_path / name))(output, x0, noise, t)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
    np.save(tmp_path / "short.npy", gamma[:-1])
    with pytest.raises(ValueError, match="holds 39 weights; it must hold 40"):
        objective_of(loss="gamma", gamma=str(tmp_path / "short.npy"))
    np.save(tmp_path / "bad.npy", np.where(gamma > 1, -1, gamma))
    with pytest.raises(ValueError, match="`weights` is -1.0 at t = 20"):
        objective_of(loss="gamma", gamma=str(tmp_path / "bad.npy"))
    with pytest.raises(ValueError, match="must be a file that holds a vector"):
        read_vector(str(tmp_path / "absent.npy"))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_bound_is_the_gaussian_kl_and_at_zero_the_likelihood_of_the_bin(variance):
    x0, noise, t = batch()
    output = worse(noise)
    objective = objective_of(loss="vlb", variance_type=variance)
    bits = objective(output, x0, noise, t)[0] / T
    a_t, a_s = at(ALPHA_BAR, t), at(alpha_bar_before(ALPHA_BAR), t)
    x_t = q_sample(x0, noise, a_t)
    x0_hat = x0_from("epsilon", output, x_t, a_t)
    truth, model = (q_s_given_t_0(x_t, mean, a_t, a_s) for mean in (x0, x0_hat))
    wide = 1 - a_t / a_s if variance == "fixed_large" else model.variance
    kl = gaussian_kl(
        Gaussian(truth.mean[1:], truth.variance[1:]), Gaussian(model.mean[1:], wide[1:])
    )
    torch.testing.assert_close(bits[1:] * math.log(2), kl.flatten(1).mean(1), rtol=1e-9, atol=1e-12)
    # At t = 0 both take the posterior variance of t = 1 (DDPM's code).
    nll = decoder_nll(x0[:1], x0_hat[:1], truth.variance[1:2], num_bins=17, floor=1e-12)
    assert float(bits[0]) == pytest.approx(float(nll) / x0[0].numel() / math.log(2), rel=1e-7)


def test_bin_likelihood_is_that_of_the_likelihood_module_and_sums_to_one():
    grid = torch.linspace(-1, 1, 17, dtype=torch.float64)
    mean, log_std = torch.tensor(0.21, dtype=torch.float64), torch.tensor(-1.7, dtype=torch.float64)
    total = bin_log_likelihood(grid, mean, log_std, 17).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-12)
    for value in grid:
        nll = decoder_nll(
            value.reshape(1, 1), mean.reshape(1, 1), (2 * log_std).exp().reshape(1, 1), 17
        )
        got = -bin_log_likelihood(value, mean, log_std, 17)
        assert float(got) == pytest.approx(float(nll), rel=1e-9)
    density = bin_log_likelihood(grid, mean, log_std, None)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(grid)
    torch.testing.assert_close(density, expected)


def test_hybrid_loss_trains_the_variance_alone():
    """Improved DDPM, Eq. 16: the bound moves v and never the mean."""
    x0, noise, t = batch()
    objective = objective_of(variance_type="learned_range")
    output = torch.cat([worse(noise), torch.full_like(noise, 0.3)], dim=1).requires_grad_()
    loss, error = objective(output, x0, noise, t)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    of_mean, of_v = gradient.chunk(2, dim=1)
    plain = 2 * (output.detach()[:, :2] - noise) / noise[0].numel()
    torch.testing.assert_close(of_mean, plain, rtol=1e-10, atol=1e-14)
    assert (of_v.flatten(1).abs().amax(1) > 0).all()

    # The loss: L_simple + 0.001 T L_t, sigma^2 between beta_tilde and beta in the logarithm.
    a_t, a_s = at(ALPHA_BAR, t), at(alpha_bar_before(ALPHA_BAR), t)
    x_t = q_sample(x0, noise, a_t)
    truth = q_s_given_t_0(x_t, x0, a_t, a_s)
    beta = 1 - a_t / a_s
    variance = beta**0.65 * truth.variance**0.35
    x0_hat = x0_from("epsilon", output.detach()[:, :2], x_t, a_t)
    model = Gaussian(q_s_given_t_0(x_t, x0_hat, a_t, a_s).mean[1:], variance[1:])
    kl = gaussian_kl(Gaussian(truth.mean[1:], truth.variance[1:]), model).flatten(1).mean(1)
    expected = error[1:] + 0.001 * T * kl / math.log(2)
    torch.testing.assert_close(loss.detach()[1:], expected, rtol=1e-9, atol=1e-12)

    # The check bites: without the stop-gradient the mean's gradient is another.
    mean = output.detach()[:, :2].clone().requires_grad_()
    leaking = (mean - noise).square().flatten(1).mean(1)
    leaking = leaking + 0.001 * T * objective.bound(mean, torch.full_like(noise, 0.3), x0, noise, t)
    (wrong,) = torch.autograd.grad(leaking.sum(), mean)
    assert not torch.allclose(wrong, plain, rtol=1e-4)


def test_lambda_zero_leaves_the_simple_loss():
    x0, noise, t = batch()
    output = torch.cat([worse(noise), noise], dim=1)
    loss, error = objective_of(variance_type="learned_range", hybrid_lambda=0.0)(
        output, x0, noise, t
    )
    assert torch.equal(loss, error)


def test_zero_terminal_snr():
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        objective_of(rescale_betas_zero_snr=True)
    x0, noise, t = batch()
    for kind in ("v_prediction", "sample", "posterior_mean"):
        loss = objective_of(rescale_betas_zero_snr=True, prediction_type=kind)
        assert torch.isfinite(loss(worse(noise), x0, noise, t)[0]).all()


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="it must be .T,. = .40,."):
        Objective(ALPHA_BAR, "epsilon", torch.ones(3, dtype=torch.float64))
