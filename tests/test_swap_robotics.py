"""Our schedulers in the loops of diffusion policies: actions of shape (batch, horizon, dimension).

The loops do with a scheduler what those of huggingface/lerobot and real-stanford/diffusion_policy
do, at their settings.
"""

import diffusers
import pytest
import torch

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

SHAPE = (4, 16, 7)  # a batch of plans: 16 actions of 7 numbers, e.g. six joints and a gripper
PAIRS = {
    "DDPMScheduler": (MarkovianDDPMScheduler, {"variance_type": "fixed_small"}),
    "DDIMScheduler": (GeneralizedDDIMScheduler, {"set_alpha_to_one": True, "steps_offset": 0}),
}


@pytest.fixture(params=["epsilon", "sample"])
def prediction(request):
    return request.param


@pytest.fixture(params=list(PAIRS))
def pair(request, prediction):
    """A stock scheduler as a policy builds it, and ours in its place."""
    cls, own = PAIRS[request.param]
    settings = {
        "num_train_timesteps": 100,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": prediction,
    }
    stock = getattr(diffusers, request.param)(**settings, **own)
    built = cls(**settings, **own)
    assert built.alpha_bar.equal(cls.from_config(stock.config).alpha_bar)
    return stock, built


class Network(torch.nn.Module):
    """A small network over the horizon that hears of the time and of an observation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Conv1d(SHAPE[2], 32, 5, padding=2)
        self.last = torch.nn.Conv1d(32, SHAPE[2], 5, padding=2)
        self.seen = torch.nn.Linear(10, 32)

    def forward(self, x, t, global_cond):
        t = torch.as_tensor(t).expand(len(x)).float() / 100
        hidden = self.first(x.mT) + self.seen(global_cond)[..., None] + t[:, None, None]
        return self.last(torch.tanh(hidden)).mT


@torch.no_grad()
def plan(scheduler, steps, inpaint=False, **step_arguments):
    """Sample as a policy acts; `inpaint` writes the observed part into the sample in place."""
    network, generator = Network(), torch.Generator().manual_seed(0)
    observed = torch.linspace(-1, 1, 40).reshape(4, 10)
    known = torch.zeros(SHAPE, dtype=torch.bool)
    known[:, :2, 4:] = inpaint
    x = torch.randn(SHAPE, generator=generator)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x[known] = 0.25
        times = t if inpaint else torch.full(x.shape[:1], t, dtype=torch.long)
        output = network(x, times, global_cond=observed)
        x = scheduler.step(output, t, x, generator=generator, **step_arguments).prev_sample
    x[known] = 0.25
    return x


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("steps", [100, 16, 10, 8])
def test_a_policy_plans_the_same(pair, steps, inpaint):
    stock, ours = pair
    expected = plan(stock, steps, inpaint)
    got = plan(ours, steps, inpaint)
    assert got.shape == SHAPE and got.dtype == torch.float32
    assert ours.timesteps.tolist() == stock.timesteps.tolist() and len(ours.timesteps) >= steps
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (plan(ours, 2, inpaint) - expected).abs().max() > 1e-2  # the comparison can fail
    assert torch.equal(plan(ours, steps, inpaint), got)  # at every call of the policy


def test_eta_reaches_the_step(pair):
    stock, ours = pair
    if isinstance(stock, diffusers.DDPMScheduler):
        assert ours.config.variance_type == "fixed_small"  # eta is 1 by name: there is none to pass
        return
    for eta in (0.0, 1.0):
        expected = plan(stock, 10, eta=eta)
        torch.testing.assert_close(plan(ours, 10, eta=eta), expected, rtol=0, atol=2e-5)
    assert (expected - plan(ours, 10)).abs().max() > 1e-2


def test_a_policy_trains_on_the_same(pair, prediction):
    """`add_noise` with a timestep for each plan; the config says what the target is."""
    actions = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    losses = []
    for scheduler in pair:
        assert scheduler.config.num_train_timesteps == 100
        t = torch.randint(100, SHAPE[:1], generator=torch.Generator().manual_seed(4)).long()
        noisy = scheduler.add_noise(actions, noise, t)
        assert noisy.shape == SHAPE
        target = {"epsilon": noise, "sample": actions}[scheduler.config.prediction_type]
        output = Network()(noisy, t, global_cond=torch.zeros(4, 10))
        losses.append(torch.nn.functional.mse_loss(output, target))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
