"""What a calibration costs is told before it starts, and nothing of it is in vain."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.training.calibration import progress
from ddim_schedulers.training.calibration.progress import Progress
from ddim_schedulers.training.calibration.samples_job import SamplesJob
from ddim_schedulers.training.calibration.samples_run import calibrate_samples
from ddim_schedulers.training.calibration.samples_search import Samples, most_blocks, race
from ddim_schedulers.training.calibration.samples_space import (
    MOST_NEIGHBOURS,
    Setting,
    Space,
    neighbours,
)
from ddim_schedulers.training.calibration.solver_job import SolverJob
from ddim_schedulers.training.calibration.solver_run import calibrate_solver
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common.durations import duration
from ddim_schedulers.training.likelihood.measured_model import measured_model_of
from ddim_schedulers.training.metrics import features
from ddim_schedulers.training.metrics.distances import Gaussian

SHAPE = (1, 2, 2)


class ExactV(torch.nn.Module):
    """The v of N(0, 0.3^2) data, times a factor."""

    dtype = torch.float32

    def __init__(self, zero_snr, factor=1.05):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([factor]), requires_grad=False)
        self.config = FrozenDict(in_channels=1, out_channels=1, sample_size=2)
        made = GeneralizedDDIMScheduler(
            num_train_timesteps=100,
            beta_end=0.2,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=zero_snr,
        )
        self.scheduler, self.alpha_bar = dict(made.config), made.alpha_bar

    def forward(self, x, t):
        a = float(self.alpha_bar[int(t)])
        x0 = 0.09 * a**0.5 * x / (a * 0.09 + 1 - a)
        eps = (1 - a) ** 0.5 * x / (a * 0.09 + 1 - a)
        return SimpleNamespace(sample=float(self.weight) * (a**0.5 * eps - (1 - a) ** 0.5 * x0))


class Data:
    """Images of N(0, 0.3^2)."""

    shape = SHAPE
    images = 0.3 * torch.randn((400, *SHAPE), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.images)

    def batch(self, rows):
        return self.images[torch.as_tensor(list(rows))].clamp(-1, 1), 0


def _samples(folder, zero_snr=False, calls=(4, 3), **settings):
    network, lines = ExactV(zero_snr), []
    model = measured_model_of(network, network.scheduler)
    spaces = {name: features.make_feature_space(name, SHAPE) for name in ("pixels", "details")}
    job = SamplesJob(calls, 64, batch_size=64, **settings)
    outcomes, cost = calibrate_samples(
        model, Data(), spaces, job, work_dir=folder / "w", progress=lines.append
    )
    return outcomes, cost, lines


def _numbers(line):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_the_pictures_cost_no_more_than_was_told(tmp_path):
    outcomes, cost, lines = _samples(tmp_path)
    most, of_4, calls_4, of_3, calls_3 = _numbers(lines[0])
    assert lines[0].startswith("at most ") and (calls_4, calls_3) == (4, 3)
    assert most == of_4 + of_3 and of_4 == 8 * 4 * most_blocks(Space())
    assert 0.3 * most < cost["evaluations"] <= most
    for outcome, bound in zip(outcomes, (of_4, of_3), strict=True):
        assert outcome.evaluations <= bound
    assert all("left" in line for line in lines if " settings, " in line)


def test_settings_that_act_alike_are_measured_once(tmp_path):
    measured = []

    def measure(bases, start, stop):
        measured.extend((base, start) for base in bases)
        part = {
            "s.count": torch.full((stop - start, 1), 10.0).double(),
            "s.total": torch.zeros(stop - start, 1, 1).double(),
            "s.outer": torch.full((stop - start, 1, 1, 1), 10.0).double(),
        }
        return [part for _ in bases]

    shares = (0.99, 0.74, 0.49, 0.24)
    alike = [Setting(0.5, ends) for ends in ((0.2, 0.8), (0.3, 0.8), (0.0, 0.9), (0.45, 0.75))]
    noiseless = [Setting(0.5, (0.8, 0.9)), Setting(), Setting(0.0, (0.2, 0.8))]
    others = [Setting(0.5), Setting(0.4, (0.2, 0.8)), Setting(0.5, (0.2, 0.8), 1.01)]
    real = {"s": Gaussian(torch.zeros(1).double(), torch.eye(1).double())}
    for lands_on_data, kinds in ((True, 5), (False, 6)):
        # (0.45, 0.75) leaves out the last step, which adds noise only where it lands above 0
        samples = Samples(real, measure, [1.0], lambda s, d=lands_on_data: s.acting(shares, d))
        assert len(samples.distinct([*alike, *noiseless, *others])) == kinds
        measured.clear()
        race(samples, [*alike, *noiseless, *others], "s")
        assert len(measured) == len(set(measured)) and len({b for b, _ in measured}) == kinds
    for outcome in _samples(tmp_path)[0]:
        shares = [i / outcome.calls for i in range(outcome.calls, 0, -1)]
        acts = [each.setting.acting(shares, True) for each in outcome.tried]
        assert 0 < len(acts) == len(set(acts)) and outcome.current.acting(shares, True) not in acts


def test_no_setting_has_more_neighbours_than_are_reckoned_with():
    for setting in (Setting(0.5, (0.3, 0.7)), Setting(0.5), Setting(), Setting(1.0, None, 1.01)):
        assert 0 < len(neighbours(setting, 1.0)) <= MOST_NEIGHBOURS


def test_at_zero_terminal_snr_eps_is_not_scaled(tmp_path):
    outcomes, _, _ = _samples(tmp_path, zero_snr=True)
    for outcome in outcomes:
        assert {v.setting.eps_scale for v in outcome.tried} <= {1.0} and outcome.tried


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_table_costs_no_more_than_was_told(clip, tmp_path):
    network, lines = ExactV(False), []
    config = {**network.scheduler, "clip_sample": clip is not None}
    model = measured_model_of(network, config)
    job = SolverJob(calls=(3, 5), num_samples=6, held_out=3, steps=20, batch_size=6)
    _, cost = calibrate_solver(model, job, work_dir=tmp_path / "w", progress=lines.append)
    most, of_3, _, of_5, _, fine = _numbers(lines[0])
    assert most == of_3 + of_5 and fine == 9 * 20 < of_3
    assert 0.2 * most < cost["evaluations"] <= most
    assert "at most" in lines[-1] and "left" in lines[-1]
    assert any(line.startswith("5 calls, no clipping: ") for line in lines)


def test_the_time_that_is_left(monkeypatch):
    now, spent, lines = [100.0], [0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    told = Progress(lines.append, {5: 1000, 10: 3000}, lambda: spent[0], processes=2)
    told("begin")
    told.begin(5)
    now[0], spent[0] = 110.0, 100  # 10 evaluations a second in each of two processes
    told("a")
    told.tick("too soon")
    told.begin(10)  # 5 calls took less than they might have
    now[0], spent[0] = 110.0 + progress.EVERY, 200
    told.tick("b")
    assert lines == ["begin", "a; at most 3.2 minutes left", "b; at most 2.3 minutes left"]
    assert [duration(s) for s in (1, 119, 7200, 200_000)] == [
        "1 seconds",
        "119 seconds",
        "2.0 hours",
        "2.3 days",
    ]


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({"thresholding": True}, "", "`thresholding` is True"),
        ({}, "--features classifier", "`features` is ['classifier']"),
        ({"clip_sample_range": 2.0}, "", "does not fit the scheduler's config: clipping"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_a_classifier_is_trained(
    config, words, message, tmp_path, capsys, monkeypatch
):
    process = {"num_train_timesteps": 12, "beta_end": 0.5}
    scheduler = GeneralizedDDIMScheduler(**process)
    entry = {
        "version": 1,
        "timesteps": [11],
        "weights": [[0.0, 0.0]],
        "eta": 0.0,
        "clip": 1.0,
        "alpha_bar": [float(scheduler.alpha_bar[11]), 1.0],
    }
    saved = DDPMScheduler.from_config(
        GeneralizedDDIMScheduler(**process, calibration={"solver": {"1": entry}}).config, **config
    )
    DDPMPipeline(tiny_unet(blocks=(8, 8)), saved).save_pretrained(tmp_path / "p")
    monkeypatch.setattr(features, "train_classifier", None)
    said = ["calibrate", "--objective", "samples", "--pipeline", str(tmp_path / "p"), "--cpu"]
    assert main([*said, "--data", "digits", "--calls", "1", *words.split()]) == 2
    assert message in capsys.readouterr().err
