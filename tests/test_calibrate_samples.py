"""`calibrate --objective samples`: the search, its scatter and its guards, where answers are known.

The toy network is exact for Gaussian data but for a factor on its eps, so that a deterministic run
is linear in x_T and its mean and variance, and so the distance of every setting, follow exactly.
"""

import json
import math
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from tiny_models import tiny_unet

from ddim_schedulers import CALIBRATED, FEW_STEPS, GeneralizedDDIMScheduler
from ddim_schedulers.training.calibration import samples_job, samples_run, samples_space, solver_job
from ddim_schedulers.training.calibration.samples_job import (
    Outcome,
    SamplesJob,
    entry_of,
    sampler_of,
    stored_entry,
)
from ddim_schedulers.training.calibration.samples_run import calibrate_samples, discard
from ddim_schedulers.training.calibration.samples_search import (
    BLOCKS,
    FLOORS,
    LOOKS,
    Estimate,
    Guard,
    Samples,
    Setting,
    Space,
    Verdict,
    choose,
    compare,
    jackknife,
    neighbours,
    search,
)
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.likelihood.calibration import add_to_calibration
from ddim_schedulers.training.likelihood.measured_model import (
    load_measured_model,
    measured_model_of,
)
from ddim_schedulers.training.metrics.distances import (
    Gaussian,
    frechet_distance,
    frechet_of_gaussians,
)
from ddim_schedulers.training.metrics.features import make_feature_space

MEAN, DEVIATION, SHAPE = 0.1, 0.3, (1, 2, 2)
CONFIG = {"num_train_timesteps": 100, "beta_end": 0.2, "clip_sample": False}


# -- the statistics


def test_a_gaussian_of_sums_has_the_distance_of_the_features():
    torch.manual_seed(0)
    real, fake = torch.randn(50, 4).double(), 1.3 * torch.randn(40, 4).double() + 0.2

    def fitted(rows):
        parts = [(torch.tensor(float(len(r))), r.sum(0), r.T @ r) for r in rows.split(13)]
        return Gaussian.of_sums(*(torch.stack(each).sum(0) for each in zip(*parts, strict=True)))

    got = frechet_of_gaussians(fitted(real), fitted(fake))
    assert got == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert frechet_of_gaussians(fitted(real), fitted(real)) == pytest.approx(0, abs=1e-9)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [3.0, 4.0, 8.0, 1.0]
    left_out = [(sum(values) - v) / 3 for v in values]
    assert jackknife(left_out) == pytest.approx(np.std(values, ddof=1) / 2)


def _sums(rows):
    sums = {"count": torch.tensor(float(len(rows))), "total": rows.sum(0), "outer": rows.T @ rows}
    return {f"{space}.{name}": value for space in REAL for name, value in sums.items()}


# what is nearer in the first space is further away in the second
REAL = {
    "first": Gaussian(torch.zeros(2).double(), torch.eye(2).double()),
    "second": Gaussian(torch.full((2,), 5.0).double(), torch.eye(2).double()),
}


def _synthetic(place, guards=lambda setting: 0.0, common=True, seed=0, n=100):
    """Samples whose features are Gaussian around `place(setting)`, as is their deviation."""

    def measure(bases, start, stop):
        found = []
        for number, base in enumerate(bases):
            blocks = []
            for block in range(start, stop):
                key = (seed, block) if common else (seed, block, number, len(bases), start)
                noise = torch.from_numpy(np.random.default_rng(key).normal(size=(n, 2)))
                row = []
                for end in Space().end_scales:
                    setting = replace(base, end_scale=end)
                    value = torch.full((len(FLOORS),), guards(setting)).double()
                    row.append({**_sums(noise + place(setting)), "guards": value})
                blocks.append(row)
            keys = blocks[0][0]
            found.append(
                {k: torch.stack([torch.stack([m[k] for m in row]) for row in blocks]) for k in keys}
            )
        return found

    return Samples(REAL, measure, Space().end_scales)


def _away(setting):
    """How far a setting is from the best one: eps_scale 1.012, end_scale 1.02, eta 0.6."""
    low, high = samples_space._line(setting.eps_scale)
    off = [low - 1.012, high - 1.012, setting.end_scale - 1.02]
    return 20 * math.hypot(*off) + 0.5 * abs(setting.eta - 0.6)


def test_the_search_finds_a_known_optimum():
    found = search(_synthetic(_away), Space(), "first", Setting())[0]
    assert _away(found) < 0.07 < _away(Setting(0.7, (0.2, 0.8), 1.01, 1.02)) + 0.05
    verdict = compare(found, Setting(), _synthetic(_away, seed=1), ["first"])
    assert verdict.wins and verdict.gain.value == pytest.approx(2 * _away(Setting()) ** 2, rel=0.3)


def test_where_all_settings_are_equal_nothing_wins():
    """Independent samples of one distribution: 2.5 percent of verdicts may err, and few do."""
    wins = 0
    for seed in range(12):
        samples = _synthetic(lambda s: 0.2, common=False, seed=seed)
        found = search(samples, Space(rounds=1), "first", Setting())[0]
        held_out = _synthetic(lambda s: 0.2, common=False, seed=1000 + seed)
        wins += compare(found, Setting(), held_out, ["first"]).is_beyond_scatter
    assert wins <= 2


def test_a_search_that_trusts_its_own_noise_is_noticed():
    """The mutation: the verdict on the noise of the search finds gains where there are none."""
    wins = 0
    for seed in range(12):
        samples = _synthetic(lambda s: 0.2, common=False, seed=seed)
        found = search(samples, Space(rounds=1), "first", Setting())[0]
        wins += compare(found, Setting(), samples, ["first"]).is_beyond_scatter
    assert wins > 2


def test_a_gain_that_is_not_clear_yet_is_looked_at_again():
    """Two independent draws, 0.3 and 0.2 from the data: 480 samples do not always separate them."""
    blocks = []
    for seed in range(6):
        samples = _synthetic(lambda s: 0.2 if s.eta else 0.3, common=False, seed=seed, n=60)
        measured = samples._measure
        seen = []

        def measure(bases, start, stop, measured=measured, seen=seen):
            seen.append((start, stop))
            return measured(bases, start, stop)

        samples._measure = measure
        verdict = compare(Setting(eta=0.5), Setting(), samples, ["first"])
        assert seen == [(0, 8), (8, 16), (16, 32)][: len(seen)]
        assert verdict.blocks == seen[-1][1]
        assert not verdict.is_open or verdict.blocks == LOOKS[-1]
        blocks.append(verdict.blocks)
    assert len(set(blocks)) > 1


@pytest.mark.parametrize("place", range(len(FLOORS)))
def test_each_guard_vetoes_what_wins_by_a_trick(place):
    """The distance falls with end_scale, and so does a guard: contrast does not win."""

    def guards(setting):
        return 0.1 + 3 * (setting.end_scale - 1)

    def away(setting):
        return 1.04 - setting.end_scale

    held_out = _synthetic(lambda s: 20 * away(s), guards)
    trick, current = Setting(end_scale=1.04), Setting()
    verdict = compare(trick, current, held_out, ["first"])
    assert verdict.is_beyond_scatter and not verdict.wins
    assert verdict.guards[place].vetoes and list(FLOORS)[place] in verdict.why_not
    within = Guard("a", 0.02, 0.115, 0.1, Estimate(0.015, 0.001), BLOCKS)
    scattered = Guard("a", 0.02, 0.2, 0.1, Estimate(0.1, 0.06), BLOCKS)
    worse = Guard("a", 0.02, 0.2, 0.1, Estimate(0.1, 0.03), BLOCKS)
    assert [g.vetoes for g in (within, scattered, worse)] == [False, False, True]
    chosen, tried = choose(compare(s, current, held_out, ["first"]) for s in (trick, current))
    assert chosen is None and len(tried) == 2


def test_the_other_feature_spaces_guard():
    new = Setting(0.6, (0.2, 0.8), 1.012)
    verdict = compare(new, Setting(), _synthetic(_away), ["first", "second"])
    assert verdict.is_beyond_scatter and "Frechet in second" in verdict.why_not


def test_neighbours_stay_in_their_ranges():
    for setting in (
        Setting(),
        Setting(1.0, (0.0, 1.0)),
        Setting(0.1, (0.9, 1.0), 0.003),
        Setting(0.5, None, (1.0, 1.01)),
    ):
        beside = neighbours(setting, 1.0)
        assert beside and setting not in beside
        for each in beside:
            GeneralizedDDIMScheduler(**each.config())
            assert each.eta <= 1


# -- the toy network


class ToyNetwork(torch.nn.Module):
    """The exact eps of N(MEAN, DEVIATION^2) data, times a factor."""

    dtype = torch.float32

    def __init__(self, factor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([factor]), requires_grad=False)
        self.config = FrozenDict(in_channels=1, out_channels=1, sample_size=SHAPE[1])
        self.alpha_bar = GeneralizedDDIMScheduler(**CONFIG).alpha_bar

    def forward(self, x, t):
        a = float(self.alpha_bar[int(t)])
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * DEVIATION**2 + 1 - a)
        return SimpleNamespace(sample=float(self.weight) * eps)


class ToyData:
    """Gaussian images."""

    shape = SHAPE

    def __init__(self):
        drawn = torch.randn((2000, *SHAPE), generator=torch.Generator().manual_seed(1))
        self.images = (MEAN + DEVIATION * drawn).clamp(-1, 1)

    def __len__(self):
        return len(self.images)

    def batch(self, rows):
        return self.images[torch.as_tensor(np.asarray(rows))], 0


def _model(factor):
    return measured_model_of(ToyNetwork(factor), dict(GeneralizedDDIMScheduler(**CONFIG).config))


def _calibrate(folder, factor=1.03, calls=(10,), rounds=1, **settings):
    space = Space(((0.0, None),), (1.0, 1.01, 1.03, 1.05), (1.0, 1.1), rounds)
    job = SamplesJob(calls, 400, batch_size=100, space=space)
    spaces = {name: make_feature_space(name, SHAPE) for name in ("pixels", "details")}
    work_dir = folder / "work"
    return calibrate_samples(_model(factor), ToyData(), spaces, job, work_dir=work_dir, **settings)


def _exact_distance(factor, calls, setting):
    """The Frechet distance in pixels: a run is linear in x_T and in the noise of every step."""
    scheduler, network = sampler_of(_model(factor).config, calls, setting), ToyNetwork(factor)
    # a row without noise, which carries the mean, then one for x_T and each step
    x = torch.zeros(calls + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    for i, t in enumerate(scheduler.timesteps):
        z = torch.zeros_like(x)
        z[i + 2] = 1
        x = scheduler.step(network(x, t).sample, t, x, variance_noise=z).prev_sample
    mean, deviation = float(x[0]), float((x[1:] - x[0]).square().sum().sqrt())
    return 4 * ((mean - MEAN) ** 2 + (deviation - DEVIATION) ** 2)


def test_the_best_scale_of_gaussian_data_is_found(tmp_path):
    ((outcome,), cost) = _calibrate(tmp_path)
    assert outcome.chosen is not None and outcome.current == Setting()
    grid = [Setting(eps_scale=k) for k in (1.0, 1.01, 1.02, 1.03, 1.04, 1.05)]
    exact = {s: _exact_distance(1.03, 10, s) for s in grid}
    best = min(exact.values())
    found, before = _exact_distance(1.03, 10, outcome.setting), exact[Setting()]
    assert found < best + 0.1 * (before - best)
    gain = outcome.chosen.gain
    assert abs(gain.value - (before - found)) < 5 * gain.std_error
    assert cost["evaluations"] == outcome.evaluations > 0
    entry = outcome.entry(_model(1.03).config, ["pixels", "details"], SamplesJob((10,), 400))
    assert entry["samples"]["gain"] > 0 and entry["samples"]["features"] == "pixels"
    assert {k: entry[k] for k in outcome.setting.config()} == outcome.setting.config()
    scheduler = GeneralizedDDIMScheduler.from_config(
        _model(1.03).config,
        calibration=json.loads(json.dumps({"solver": {"10": entry}})),
        **CALIBRATED,
    )
    scheduler.set_timesteps(10)
    expected = sampler_of(_model(1.03).config, 10, outcome.setting)
    x = torch.randn(2, *SHAPE)
    for t in scheduler.timesteps:
        z = torch.randn(x.shape)
        (x, y) = (
            s.step(0.1 * x, t, x, variance_noise=z).prev_sample for s in (scheduler, expected)
        )
        assert torch.equal(x, y)


def test_where_nothing_is_better_the_setting_stays(tmp_path):
    (outcome,), _ = _calibrate(tmp_path, factor=1.0, calls=(40,), rounds=0)
    assert outcome.chosen is None and outcome.setting == outcome.current == Setting()
    assert all(v.why_not for v in outcome.tried)
    assert "(as before)" in outcome.lines(["pixels"])[0]


def test_contrast_does_not_win_over_pixels(tmp_path, monkeypatch):
    """A feature space that sees more contrast in the data than there is: the guards veto it."""

    class Contrast(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)

    job = SamplesJob((40,), 400, space=Space(((0.0, None),), (1.0,), (1.0, 1.3), rounds=0))
    nets = {"contrast": Contrast(), "pixels": make_feature_space("pixels", SHAPE)}
    original = samples_run._Run._measure_data

    def doubled(self):
        original(self)
        real = self.real["contrast"]
        self.real["contrast"] = Gaussian(real.mean * 1.3, real.covariance * 1.3**2)

    monkeypatch.setattr(samples_run._Run, "_measure_data", doubled)
    (outcome,), _ = calibrate_samples(_model(1.0), ToyData(), nets, job, work_dir=tmp_path / "work")
    (verdict,) = outcome.tried
    assert verdict.setting.end_scale == 1.3 and verdict.is_beyond_scatter
    assert outcome.chosen is None
    assert "Frechet in pixels" in verdict.why_not and "deviation of pixels" in verdict.why_not


# -- interrupted, shared, stored


def test_an_interrupted_search_goes_on_with_its_parts(tmp_path, monkeypatch):
    (whole,), cost = _calibrate(tmp_path / "whole")
    save, saved = samples_run.MeasurementFiles.save, []

    def stopping(self, item, value):
        if len(saved) == 6:
            raise KeyboardInterrupt
        saved.append(item)
        save(self, item, value)

    with monkeypatch.context() as patch:
        patch.setattr(samples_run.MeasurementFiles, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            _calibrate(tmp_path / "again")
    damaged = next((tmp_path / "again" / "work").glob("part-search-*"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    (again,), left = _calibrate(tmp_path / "again")
    assert again.chosen == whole.chosen and again.tried == whole.tried
    assert 0 < left["evaluations"] < cost["evaluations"]
    (third,), none = _calibrate(tmp_path / "again")
    assert third.chosen == whole.chosen and none["evaluations"] == 0
    with pytest.raises(ValueError, match="`work_dir` is .*network: "):
        _calibrate(tmp_path / "again", factor=1.02)
    discard(tmp_path / "again" / "work")
    assert not (tmp_path / "again" / "work").exists()


class _Threads(Team):
    """Two threads that work as two processes."""

    count = 2

    def __init__(self, index, barrier, shelf):
        self.index, self.barrier, self.shelf = index, barrier, shelf

    def wait(self):
        self.barrier.wait(60)

    def gather(self, values):
        self.shelf[self.index] = values
        self.wait()
        found = [*self.shelf[0], *self.shelf[1]]
        self.wait()
        return found


def test_two_processes_share_the_work_and_get_one_result(tmp_path):
    (alone,), cost = _calibrate(tmp_path / "alone")
    barrier, shelf, found, lines = threading.Barrier(2), {}, {}, {0: [], 1: []}

    def work(index):
        team = _Threads(index, barrier, shelf)
        try:
            found[index] = _calibrate(tmp_path / "both", team=team, progress=lines[index].append)
        except BaseException as error:
            found[index] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        (together,), shared = found[index]
        assert together.chosen == alone.chosen and together.tried == alone.tried
        assert shared["evaluations"] == cost["evaluations"] and shared["processes"] == 2


def test_an_entry_without_a_table_is_the_preset_to_the_bit():
    config = dict(GeneralizedDDIMScheduler().config)
    settings = Setting(0.6, (0.2, 0.8), (1.0, 1.02), 1.03)
    for setting in (Setting(), settings):
        stored = sampler_of(config, 6, setting)
        plain = GeneralizedDDIMScheduler.from_config(config, **FEW_STEPS, **setting.config())
        plain.set_timesteps(6)
        assert stored.timesteps.tolist() == plain.timesteps.tolist()
        x = y = torch.randn(2, 1, 4, 4)
        for t in plain.timesteps:
            z = torch.randn(x.shape)
            x = stored.step(0.3 * x.roll(1, 0), t, x, variance_noise=z).prev_sample
            y = plain.step(0.3 * y.roll(1, 0), t, y, variance_noise=z).prev_sample
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_a_stored_table_keeps_its_weights_and_is_the_one_to_beat():
    config = dict(GeneralizedDDIMScheduler().config)
    entry = {**entry_of(config, 2, Setting()), "timesteps": [990, 400], "held_out": 0.1}
    entry |= {"alpha_bar": [*GeneralizedDDIMScheduler().alpha_bar[[990, 400]].tolist(), 1.0]}
    entry |= {"weights": [[0.0, 0.01], [0.0, -0.02, 0.02]], "eps_scale": 1.01}
    config["calibration"] = {"solver": {"2": entry}}
    assert Setting.of(stored_entry(config, 2)) == Setting(eps_scale=1.01)
    assert Setting.of(stored_entry(config, 3)) == Setting()
    new = entry_of(config, 2, Setting(0.4, None, 1.02, 1.0))
    assert new == {**entry, "eta": 0.4, "eta_interval": None, "eps_scale": 1.02, "end_scale": 1.0}
    assert sampler_of(config, 2, Setting()).timesteps.tolist() == [990, 400]
    with pytest.raises(ValueError, match="does not fit the scheduler's config: clipping"):
        sampler_of({**config, "clip_sample_range": 2.0}, 2, Setting())


def test_the_formulas_are_tried_beside_a_fitted_table(tmp_path):
    """A table that is far off: the formulas win, and the word is that the table is gone."""
    config = _model(1.0).config
    bad = {**stored_entry(config, 4), "held_out": 0.1}
    bad["weights"] = [*bad["weights"][:-1], [0.0, 0.0, 0.0, 0.0, -1.0]]
    scheduler = GeneralizedDDIMScheduler(**CONFIG, calibration={"solver": {"4": bad}})
    model = measured_model_of(ToyNetwork(1.0), dict(scheduler.config))
    space = Space(((0.0, None), (0.5, None)), (1.0,), (1.0,), rounds=1)
    spaces = {name: make_feature_space(name, SHAPE) for name in ("pixels", "details")}
    ((outcome,), _) = calibrate_samples(
        model, ToyData(), spaces, SamplesJob((4,), 96, space=space), work_dir=tmp_path / "work"
    )
    assert outcome.setting.formulas and "formulas" in outcome.lines(["pixels"])[0]
    entry = outcome.entry(model.config, ["pixels", "details"], SamplesJob((4,), 96))
    assert not solver_job.is_fitted(entry) and "held_out" not in entry
    (line,) = solver_job.lost({"4": bad}, {"4": entry})
    assert "4 calls: the fitted table is gone" in line
    # the mutation: the table alone
    assert (
        entry_of(model.config, 4, replace(outcome.setting, formulas=False))["weights"]
        == (bad["weights"])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": ()}, "`calls` is"),
        ({"calls": (5, 5)}, "`calls` is"),
        ({"calls": (0,)}, "`calls` is 0"),
        ({"calls": (101,)}, "`calls` is 101"),
        ({"num_images": 40}, "`num_images` is 40"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SamplesJob(), **change).check(100)


def test_one_feature_space_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`features` is .* name two"):
        calibrate_samples(
            _model(1.0),
            ToyData(),
            {"pixels": make_feature_space("pixels", SHAPE)},
            SamplesJob(),
            work_dir=tmp_path,
        )


# -- the command


def test_the_command_stores_what_wins_and_the_preset_uses_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pipeline"
    config = {"num_train_timesteps": 12, "beta_end": 0.5, "clip_sample": True}
    unet = tiny_unet(blocks=(8, 8))
    DDPMPipeline(unet, DDPMScheduler(**config)).save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    before = file.read_text()
    small = Space(((0.0, None), (1.0, (0.2, 0.8))), (1.0, 1.5), (1.0,), rounds=0)
    monkeypatch.setattr(samples_job, "SamplesJob", partial(SamplesJob, space=small))
    words = ["calibrate", "--pipeline", str(folder), "--objective", "samples", "--cpu"]
    words += ["--data", "digits", "--calls", "3", "--num_images", "64", "--features"]
    assert main([*words, "pixels"]) == 2 and "name two" in capsys.readouterr().err
    assert main([*words, "pixels", "details"]) == 0
    out = capsys.readouterr().out
    assert "3 calls: " in out and "Frechet in pixels" in out
    # an untrained network's pictures are noise: whether something wins is the search's to say
    if "nothing is written" in out:
        assert file.read_text() == before
        verdict = Verdict(Setting(1.0, (0.2, 0.8), 1.5), 1.0, 2.0, Estimate(1.0, 0.1), (), BLOCKS)
        outcome = Outcome(3, Setting(), verdict, (verdict,), 0)
        entry = outcome.entry(
            _scheduler_config(folder), ["pixels", "details"], SamplesJob((3,), 64)
        )
        add_to_calibration({"solver": {"3": entry}}, file)
    scheduler = GeneralizedDDIMScheduler.from_config(json.loads(file.read_text()), **CALIBRATED)
    entry = scheduler.config.calibration["solver"]["3"]
    assert {"eta", "eta_interval", "eps_scale", "end_scale", "samples"} <= entry.keys()
    assert len(json.dumps(entry["samples"])) < 1000
    scheduler.set_timesteps(3)
    assert (
        scheduler._stored is not None and not (folder / "scheduler" / "calibration-parts").exists()
    )
    assert main([*words[:-1], "--held_out", "8"]) == 2
    assert "`--held_out` is 8; it does nothing" in capsys.readouterr().err
    assert main(["calibrate", "--pipeline", str(folder), "--features", "pixels"]) == 2
    assert "does nothing with --objective likelihood" in capsys.readouterr().err


def _scheduler_config(folder):
    return load_measured_model(folder).config


def test_details_are_the_differences_of_neighbours():
    images = torch.arange(16.0).reshape(1, 1, 4, 4) / 8 - 1
    flat = make_feature_space("details", (1, 4, 4))(images)
    assert flat.shape == (1, 32) and flat.dtype == torch.float64
    torch.testing.assert_close(flat[0, :16], torch.full((16,), 1 / 8).double())
    torch.testing.assert_close(flat[0, 16:], torch.full((16,), 4 / 8).double())
