"""A learned schedule: its construction, its optimum on Gaussian data, and how it is saved."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from scipy.optimize import minimize
from tiny_models import gaussian_eps

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler, to_portable
from ddim_schedulers.betas import alpha_bar_from_betas, make_betas
from ddim_schedulers.likelihood import expected_bound, make_chain
from ddim_schedulers.training.likelihood import learned_betas
from ddim_schedulers.training.likelihood.learned_betas import LearnedBetas, learn_betas, save_betas

pytestmark = pytest.mark.usefixtures("float64")

# Two kinds of dimensions, coarse and fine: a chain that leaves all to its decoder, which has one
# variance, is no good here, as it would be for isotropic data.
T, MEAN = 10, 0.2
C = torch.tensor([0.5, 0.005], dtype=torch.float64)
LINEAR = alpha_bar_from_betas(make_betas("linear", T, 1e-3, 0.7))
TAU = list(range(T - 1, -1, -1))
BOUNDS = (7.0, -7.0)


def _bound(alpha_bar, variance):
    """The exact expectation, nats per dimension, with the perfect network; differentiable."""
    chain = make_chain(alpha_bar, TAU, variance)
    a = chain.alpha_bar[:, None]
    error = (C * (1 - a) / (C * a + 1 - a)).mean(1)
    return expected_bound(chain, error, C.mean() + MEAN**2)


def _optimum(variance):
    """The smallest exact bound: a quasi-Newton solver on the gaps of the log-SNR, three starts."""
    high, low = BOUNDS

    def value(log_gaps):
        x = torch.tensor(log_gaps, requires_grad=True)
        gaps = x.exp() / x.exp().sum()
        bound = _bound(torch.sigmoid(high - (high - low) * gaps.cumsum(0)[:-1]), variance)
        bound.backward()
        return float(bound.detach()), x.grad.numpy()

    found = []
    for start in (torch.zeros(T + 1), torch.linspace(1, -1, T + 1), torch.linspace(-1, 1, T + 1)):
        result = minimize(
            value,
            start.numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-12, 12)] * (T + 1),
            options={"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-9},
        )
        found.append(result.fun)
    return min(found)


def _perfect(schedule, x_t, t):
    variances = C.repeat(x_t.shape[1] // 2)
    slope, shift = gaussian_eps(schedule.alpha_bar()[t][:, None], MEAN, variances)
    return slope * x_t + shift


def _data(batch, dims, generator):
    return MEAN + C.repeat(dims // 2).sqrt() * torch.randn(batch, dims, generator=generator)


def _learn(variance, steps=300, dims=16, batch=64):
    schedule = LearnedBetas(LINEAR, *BOUNDS)
    generator = torch.Generator().manual_seed(0)

    def perfect(x_t, t):
        return _perfect(schedule, x_t, t)

    def batches():
        for _ in range(steps):
            yield _data(batch, dims, generator)

    history = learn_betas(
        schedule,
        perfect,
        batches(),
        lr=0.3,
        variance=variance,
        num_bins=None,
        num_calls=None,
        total_steps=steps,
        generator=generator,
        dtype=torch.float64,
    )
    return schedule, history


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_learned_schedule_reaches_the_optimum(variance):
    schedule, history = _learn(variance)
    learned = float(_bound(schedule.alpha_bar().detach(), variance))
    best, linear = _optimum(variance), float(_bound(LINEAR, variance))
    print(f"\n{variance}: learned {learned:.5f}, optimum {best:.5f}, linear {linear:.5f} nats/dim")
    assert best - 1e-6 < learned < best + 1e-3
    assert learned < linear - 0.01
    assert len(history) == 300 and history[-1] < history[0]


def test_monotone_and_bounded_for_any_parameters():
    schedule = LearnedBetas(LINEAR, *BOUNDS)
    torch.testing.assert_close(schedule.alpha_bar().detach(), LINEAR)
    torch.testing.assert_close(schedule.betas().detach(), make_betas("linear", T, 1e-3, 0.7))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        schedule.logits.data = 3 * torch.randn(T + 1, generator=generator)
        log_snr, betas = schedule.log_snr().detach(), schedule.betas().detach()
        assert bool((torch.diff(log_snr) < 0).all())
        assert float(log_snr[0]) < BOUNDS[0] and float(log_snr[-1]) > BOUNDS[1]
        assert bool(((betas > 0) & (betas < 1)).all())


def _check_gradient(plan_of):
    schedule = LearnedBetas(LINEAR, *BOUNDS)
    bound = _bound(schedule.alpha_bar(), "fixed_small")
    (exact,) = torch.autograd.grad(bound, schedule.logits)
    gradients = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x0 = _data(64, 32, generator)

        def perfect(x_t, t):
            return _perfect(schedule, x_t, t)

        terms = learned_betas.variational_bound(
            perfect,
            x0,
            plan_of(schedule.alpha_bar(), TAU),
            num_bins=None,
            estimator="stratified",
            num_calls=6,
            generator=generator,
            dtype=torch.float64,
        )
        (gradient,) = torch.autograd.grad(terms.total.mean() / 32, schedule.logits)
        gradients.append(gradient)
    stack = torch.stack(gradients)
    error = stack.std(0) / 40**0.5
    assert bool(((stack.mean(0) - exact).abs() < 4 * error).all())


def test_gradient_of_the_estimate_is_that_of_the_expectation():
    _check_gradient(make_chain)
    with pytest.raises(AssertionError):  # as if only x_t moved with the schedule
        _check_gradient(lambda alpha_bar, tau: make_chain(alpha_bar.detach(), tau))


def test_network_and_schedule_learn_together_on_pixels(tiny_ddpm):
    unet = tiny_ddpm(DDPMScheduler()).unet.float()
    schedule = LearnedBetas(LINEAR, *BOUNDS)
    before, weights = schedule.alpha_bar().detach(), [p.clone() for p in unet.parameters()]
    images = (torch.randint(0, 17, (4, 1, 8, 8)) / 8 - 1).float()
    history = learn_betas(
        schedule,
        lambda x, t: unet(x, t).sample,
        [images] * 8,
        network=unet.parameters(),
        lr=0.05,
        network_lr=1e-3,
        num_bins=17,
        clip=1.0,
    )
    assert history[-1] < history[0]
    assert not torch.equal(schedule.alpha_bar().detach(), before)
    assert any(not torch.equal(a, b) for a, b in zip(weights, unet.parameters(), strict=True))


def test_saved_as_trained_betas(tmp_path):
    schedule = LearnedBetas(LINEAR, *BOUNDS)
    schedule.logits.data += torch.randn(T + 1)
    calibration = {"gamma": [0.9] * T}
    ours = GeneralizedDDIMScheduler(
        num_train_timesteps=T, calibration=calibration, rescale_betas_zero_snr=True
    )
    file = tmp_path / "scheduler_config.json"
    stock = DDPMScheduler(num_train_timesteps=T, rescale_betas_zero_snr=True)
    for scheduler in (stock, ours, to_portable(ours)[0]):
        scheduler.save_pretrained(tmp_path)
        save_betas(schedule, file)
        again = type(scheduler).from_pretrained(tmp_path)
        torch.testing.assert_close(again.alphas_cumprod.double(), schedule.alpha_bar().detach())
        mine = MarkovianDDPMScheduler.from_config(again.config)
        torch.testing.assert_close(mine.alpha_bar, schedule.alpha_bar().detach())
        assert mine.config.calibration is None
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_train_timesteps": T + 1}))
    with pytest.raises(ValueError, match="trained_betas"):
        save_betas(schedule, file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="config"):
        save_betas(schedule, file)


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match="log_snr_min"):
        LearnedBetas(LINEAR, -1.0, 1.0)
    with pytest.raises(ValueError, match="bounds"):
        LearnedBetas(LINEAR, 2.0, -2.0)
    with pytest.raises(ValueError, match="fixed_small"):
        learn_betas(LearnedBetas(LINEAR), lambda x, t: x, [], variance="optimal")
