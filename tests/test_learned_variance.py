"""A network that predicts a variance in a second set of channels, under every scheduler class."""

import json

import diffusers
import pytest
import torch

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    to_portable,
)

LEARNED = ("learned", "learned_range")


def _config(variance_type):
    return diffusers.DDPMScheduler(variance_type=variance_type).config


def _batch(channels=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 4, 4, generator=generator)
    m = torch.randn(2, channels, 4, 4, generator=generator)
    return x, m, torch.cat([m, torch.randn(m.shape, generator=generator)], dim=1)


def _both(scheduler, index=1, **arguments):
    """The step with the prediction alone, and with the variance beside it."""
    x, m, doubled = _batch()
    t = scheduler.timesteps[index]
    outputs = []
    for model_output in (m, doubled):
        if arguments.get("generator"):
            arguments["generator"] = torch.Generator().manual_seed(1)
        outputs.append(scheduler.step(model_output, t, x, **arguments))
    return outputs


def _same(first, second):
    return torch.equal(first.prev_sample, second.prev_sample) and torch.equal(
        first.pred_original_sample, second.pred_original_sample
    )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("variance_type", LEARNED)
def test_ddim_without_noise_leaves_the_variance_out(variance_type, order):
    ours = GeneralizedDDIMScheduler.from_config(_config(variance_type), solver_order=order)
    ours.set_timesteps(6)
    assert _same(*_both(ours))
    assert _same(*_both(ours, eta=0.0))
    fixed = GeneralizedDDIMScheduler.from_config(ours.config, eta=0.0)
    fixed.set_timesteps(6)
    assert _same(*_both(fixed, eta=1.0 if order == 1 else 0.0))


@pytest.mark.parametrize("variance_type", LEARNED)
def test_explicit_sigma_of_zeros_leaves_the_variance_out(variance_type):
    for sigma in ([0.0] * 4, [0] * 4):
        ours = GeneralizedDDIMScheduler.from_config(_config(variance_type), sigma=sigma)
        ours.set_timesteps()
        assert _same(*_both(ours))
    ours = GeneralizedDDIMScheduler.from_config(_config(variance_type))
    ours.set_timesteps(4, sigma=[0.1, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="`reverse_variance` is not set"):
        _both(ours)
    ours.set_timesteps(4)
    assert _same(*_both(ours))


@pytest.mark.parametrize("eta_in_config", [False, True])
@pytest.mark.parametrize(
    ("variance_type", "remedy"),
    [("learned_range", "`reverse_variance='learned_range'`"), ("learned", "MarkovianDDPM")],
)
def test_ddim_with_noise_asks_which(variance_type, remedy, eta_in_config, tmp_path):
    """Fresh, saved and loaded, through a stock class, and out of the portable form."""
    given = {"eta": 0.5} if eta_in_config else {}
    ours = GeneralizedDDIMScheduler.from_config(_config(variance_type), **given)
    ours.save_pretrained(tmp_path)
    stock = diffusers.PNDMScheduler.from_config(ours.config)
    portable = json.loads(to_portable(ours)[0].to_json_string())
    again = [
        ours,
        GeneralizedDDIMScheduler.from_pretrained(tmp_path),
        GeneralizedDDIMScheduler.from_config(stock.config),
        GeneralizedDDIMScheduler.from_config(portable),
    ]
    for scheduler in again:
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="`reverse_variance` is not set") as error:
            _both(scheduler, eta=0.5)
        assert remedy in str(error.value)
        assert "`reverse_variance='sigma'` leaves it out" in str(error.value)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    "said",
    [{"eta": 0.5, "reverse_variance": "sigma"}, {"eta": 1.0, "reverse_variance": "sigma_hat"}],
)
def test_ddim_with_a_noise_of_its_own_leaves_the_variance_out(said, saved, tmp_path):
    ours = GeneralizedDDIMScheduler.from_config(_config("learned_range"), **said)
    if saved:
        ours.save_pretrained(tmp_path)
        ours = GeneralizedDDIMScheduler.from_pretrained(tmp_path)
    ours.set_timesteps(4)
    assert _same(*_both(ours, generator=True))


def test_the_networks_variance_is_the_one_of_ddpm():
    """DDIM at eta = 1 with eps re-derived is DDPM, the learned noise included."""
    config = _config("learned_range")
    ddim = GeneralizedDDIMScheduler.from_config(config, eta=1.0, reverse_variance="learned_range")
    ddpm = MarkovianDDPMScheduler.from_config(config)
    x, m, doubled = _batch()
    noise = torch.randn(x.shape)
    results = []
    for scheduler, arguments in ((ddim, {"use_clipped_model_output": True}), (ddpm, {})):
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[1]
        results.append(scheduler.step(doubled, t, x, variance_noise=noise, **arguments))
        with pytest.raises(ValueError, match="twice the channels because the variance"):
            scheduler.step(m, t, x)
    torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)


@pytest.mark.parametrize(
    "config",
    [
        _config("learned_range"),
        _config("learned"),
        GeneralizedDDIMScheduler(eta=1.0, reverse_variance="learned_range").config,
    ],
)
def test_the_inverse_leaves_the_variance_out(config):
    ours = GeneralizedDDIMInverseScheduler.from_config(config)
    ours.set_timesteps(4)
    assert _same(*_both(ours))


def test_ddpm_asks_which_where_only_a_ddim_config_told_of_the_variance():
    config = GeneralizedDDIMScheduler(eta=1.0, reverse_variance="learned_range").config
    ours = MarkovianDDPMScheduler.from_config(config)
    with pytest.raises(ValueError, match="`variance_type` is not set"):
        _both(ours)
    ours = MarkovianDDPMScheduler.from_config(config, variance_type="fixed_small")
    assert _same(*_both(ours, generator=True))


@pytest.mark.parametrize(
    "cls", [GeneralizedDDIMScheduler, MarkovianDDPMScheduler, GeneralizedDDIMInverseScheduler]
)
def test_nothing_is_dropped_that_the_config_does_not_tell_of(cls):
    ours = cls.from_config(diffusers.DDIMScheduler().config)
    ours.set_timesteps(4)
    x, _, doubled = _batch()
    with pytest.raises(ValueError, match="pass `variance_type='learned_range'` to `from_config`"):
        ours.step(doubled, ours.timesteps[1], x)
    told = cls.from_config(ours.config, variance_type="learned_range")
    told.set_timesteps(4)
    told.step(doubled, told.timesteps[1], x)
    for wrong in (doubled[:, :4], torch.cat([doubled, doubled], dim=1), doubled[..., :3]):
        with pytest.raises(ValueError, match="`model_output` has shape"):
            told.step(wrong, told.timesteps[1], x)
