"""A network that predicts a variance in a second set of channels, under every scheduler class."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_unet

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    to_portable,
)
from ddim_schedulers.training.cli import main

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
        _both(ours, index=0)
    for index in (1, 2, 3):
        assert _same(*_both(ours, index, generator=True))
    ours.set_timesteps(4)
    assert _same(*_both(ours, index=0))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_step_that_lands_on_data_asks_for_no_noise(eta):
    """At std 0 there is nothing to say, whatever the member: the only step, or the last one."""
    ours = GeneralizedDDIMScheduler.from_config(_config("learned_range"))
    x, _, doubled = _batch()
    for steps in (1, 4):
        ours.set_timesteps(steps)
        assert _same(*_both(ours, index=-1, eta=eta, generator=True))
        for t in (0, torch.tensor(0), torch.tensor([0, 0])):
            ours.step(doubled, t, x, eta)
    for t in (250, torch.tensor(250), torch.tensor([0, 250])):
        with pytest.raises(ValueError, match="`reverse_variance` is not set"):
            ours.step(doubled, t, x, eta)
    with pytest.raises(ValueError, match="`timestep` is 'x'"):
        ours.step(doubled, "x", x, eta)
    # traced code cannot read the timestep: a plan that adds no noise passes, another does not
    for steps in (1, 4):
        ours.set_timesteps(steps)
        module = _Step(ours, eta)
        if steps == 1:
            program = torch.export.export(module, (doubled, torch.tensor(0), x), strict=False)
            assert torch.equal(program.module()(doubled, torch.tensor(0), x), module(doubled, 0, x))
            continue
        with pytest.raises(ValueError, match="`reverse_variance` is not set"):
            torch.export.export(module, (doubled, torch.tensor(0), x), strict=False)
    ours = GeneralizedDDIMScheduler.from_config(ours.config, set_alpha_to_one=False)
    ours.set_timesteps(1)
    with pytest.raises(ValueError, match="`reverse_variance` is not set"):
        _both(ours, index=0, eta=eta)


class _Step(torch.nn.Module):
    def __init__(self, scheduler, eta):
        super().__init__()
        self.scheduler, self.eta = scheduler, eta

    def forward(self, m, t, x):
        noise = torch.zeros_like(x)
        return self.scheduler.step(m, t, x, self.eta, variance_noise=noise).prev_sample


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
        with pytest.raises(ValueError, match=r"twice the channels because `\w+` is .learned_range"):
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


@pytest.mark.parametrize("saved", [False, True])
def test_another_noise_does_not_make_the_network_forget_its_variance(saved, tmp_path):
    """`reverse_variance` alone told of it; a swap that replaces it keeps that."""
    first = GeneralizedDDIMScheduler(eta=1.0, reverse_variance="learned_range")
    first.save_pretrained(tmp_path)
    config = first.load_config(tmp_path) if saved else first.config
    with pytest.raises(ValueError, match="`reverse_variance` is 'learned_range', which needs `eta"):
        GeneralizedDDIMScheduler.from_config(config, eta=0.0)
    for eta in (0.0, 0.5):
        ours = GeneralizedDDIMScheduler.from_config(config, eta=eta, reverse_variance="sigma")
        ours.set_timesteps(4)
        assert _same(*_both(ours, generator=True))
    ddpm = MarkovianDDPMScheduler.from_config(config)
    assert ddpm.config.variance_type == "learned_range"
    fixed = MarkovianDDPMScheduler.from_config(config, variance_type="fixed_small")
    assert _same(*_both(fixed, generator=True))


def test_ddpm_asks_which_where_nobody_said_it():
    ours = MarkovianDDPMScheduler()
    ours.register_to_config(reverse_variance="learned_range")
    with pytest.raises(ValueError, match="`variance_type` is not set"):
        _both(ours)
    assert _same(*_both(ours, index=-1, generator=True))


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


# -- the command line


def _save_both(folder, scheduler):
    """The same network with and without a second half of its channels."""
    narrow, wide = tiny_unet(), tiny_unet(out_channels=2)
    weights = wide.state_dict()
    for name, value in narrow.state_dict().items():
        weights[name][: len(value)] = value
    wide.load_state_dict(weights)
    for name, unet in (("narrow", narrow), ("wide", wide)):
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    trained = diffusers.DDPMScheduler(variance_type="learned_range", num_train_timesteps=20)
    _save_both(folder, trained)
    return folder


def _images(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png"))}


DDIM = ["--scheduler", "ddim", "--num_inference_steps", "3", "--device", "cpu"]
OWN = ["--reverse_variance", "sigma"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--num_images", "2", *DDIM, "--eta", "0"],
        ["sample", "--num_images", "2", *DDIM, "--eta", "0.5", *OWN],
        ["sample", "--num_images", "2", *DDIM, "--eta", "1", "--reverse_variance", "sigma_hat"],
        ["interpolate", "--seeds", "0", "1", *DDIM],
        ["reconstruct", *DDIM],
    ],
    ids=lambda arguments: f"{arguments[0]}-{arguments[-1]}",
)
def test_verbs_make_the_same_images_whether_or_not_a_variance_is_told(
    arguments, pipelines, tmp_path
):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "data/0.png")
    if arguments[0] == "reconstruct":
        arguments = [*arguments, "--images", str(tmp_path / "data")]
    found = []
    for name in ("narrow", "wide"):
        output = tmp_path / name
        words = ["--pipeline", str(pipelines / name), "--output", str(output)]
        assert main([*arguments, *words]) == 0
        found.append(_images(output))
    assert found[0] and found[0].keys() == found[1].keys()
    # two networks round apart
    assert all(abs(found[0][name] - found[1][name]).max() <= 1 for name in found[0])


@pytest.mark.parametrize("arguments", [["--eta", "0.5"], ["--eta", "1"]])
def test_a_verb_with_noise_asks_which(arguments, pipelines, tmp_path, capsys):
    words = ["--pipeline", str(pipelines / "wide"), "--output", str(tmp_path / "out")]
    assert main(["sample", "--num_images", "2", *DDIM, *arguments, *words]) == 2
    assert "`reverse_variance` is not set" in capsys.readouterr().err
    assert main(["sample", "--num_images", "2", "--num_inference_steps", "3", *words]) == 0


def test_evaluate_compares_members_of_a_network_that_tells_a_variance(pipelines, tmp_path):
    for name in ("narrow", "wide"):
        settings = {
            "pipeline": str(pipelines / name),
            "output_dir": str(tmp_path / name),
            "data": {"data": "digits"},
            "features": ["pixels"],
            "batch_size": 4,
            "tables": [{"name": "First", "n": 8, "grid": [{"steps": [2], "members": [0, 0.5]}]}],
        }
        (tmp_path / "e.json").write_text(json.dumps(settings))
        assert main(["evaluate", "--config", str(tmp_path / "e.json"), "--cpu"]) == 0
    first, second = (
        [
            cell["metrics"]["pixels"]["frechet"]["mean"]
            for cell in json.loads((tmp_path / name / "metrics.json").read_text())["tables"][0][
                "cells"
            ]
        ]
        for name in ("narrow", "wide")
    )
    assert len(first) == 2 and first == pytest.approx(second, rel=1e-3)


def test_calibrate_and_likelihood_measure_the_prediction_alone(pipelines, tmp_path):
    found = []
    for name in ("narrow", "wide"):
        shutil.copytree(pipelines / name, tmp_path / name)
        words = ["--pipeline", str(tmp_path / name), "--data", "digits", "--num_images", "2"]
        assert main(["calibrate", *words, "--cpu"]) == 0
        scheduler = json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text())
        output = tmp_path / "likelihood" / name
        likelihood = ["likelihood", *words, "--cpu", "--steps", "3", "--output_dir", str(output)]
        assert main([*likelihood, "--variances", "fixed_large"]) == 0
        gamma = MarkovianDDPMScheduler.from_config(scheduler).config.calibration["gamma"]
        found.append(gamma)
    assert len(found[0]) == 20 and found[0] == pytest.approx(found[1], rel=1e-4)
