"""`calibrate --objective solver`: tables that are fitted to a network, exact on Gaussian data."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from tiny_models import tiny_unet

from ddim_schedulers import CALIBRATED, FEW_STEPS, GeneralizedDDIMScheduler
from ddim_schedulers.export import export_folder
from ddim_schedulers.solver_tables import stored_calls
from ddim_schedulers.training.calibration import solver_fit, solver_run
from ddim_schedulers.training.calibration.solver_fit import Constants
from ddim_schedulers.training.calibration.solver_job import SolverJob
from ddim_schedulers.training.calibration.solver_run import calibrate_solver
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.common.sealed_parts import SealedParts
from ddim_schedulers.training.likelihood.calibration import add_to_calibration
from ddim_schedulers.training.likelihood.measured_model import measured_model_of

EXACT = Constants(ridge=1e-12, least_share=1e-12)


class Gaussian(torch.nn.Module):
    """A perfect network for pixels ~ N(0, v), in float64, with as many v as asked for."""

    def __init__(self, variances, prediction="epsilon", zero_snr=False):
        super().__init__()
        process = DDPMScheduler(rescale_betas_zero_snr=zero_snr, prediction_type=prediction)
        self.scheduler = dict(process.config) | {"clip_sample": False}
        self.alpha_bar = GeneralizedDDIMScheduler.from_config(self.scheduler).alpha_bar
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.prediction = prediction
        levels = torch.logspace(-2.5, 0.3, variances, dtype=torch.float64)
        self.variance = levels[torch.arange(64) % variances].view(8, 8)
        self.config = FrozenDict(in_channels=1, out_channels=1, sample_size=8)

    def forward(self, x, t):
        a, v = self.alpha_bar[int(t)], self.variance
        x0 = v * a.sqrt() * x / (a * v + 1 - a)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        told = {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}
        return SimpleNamespace(sample=told[self.prediction])


def _calibrate(network, folder, calls, **settings):
    settings = {"num_samples": 48, "held_out": 16, "batch_size": 24, **settings}
    model = measured_model_of(network, network.scheduler)
    return calibrate_solver(model, SolverJob(calls=calls, **settings), work_dir=folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_with_as_many_variances_as_regressors_the_end_is_reached(prediction, tmp_path):
    network = Gaussian(3, prediction)
    (found,), _ = _calibrate(network, tmp_path / "w", (4,), constants=EXACT)
    assert found.held_out < 1e-10 < 1e-4 < found.analytic


def _exact_fit(variances, tau, constants, stray=0.0):
    """A fit whose goal is the flow itself: sqrt(abar v + 1 - abar) grows as x.

    The first sample's goal is off by `stray`.
    """
    network = Gaussian(variances)
    a, v = network.alpha_bar, network.variance
    x_T = torch.randn(24, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    def state(t):
        level = a[t] if t >= 0 else torch.ones((), dtype=torch.float64)
        return x_T * ((level * v + 1 - level) / (a[-1] * v + 1 - a[-1])).sqrt()

    states = {t: state(t) for t in [*tau, -1]}
    states[-1][0] += stray
    chunk = solver_fit.Chunk(x_T, states)
    return solver_fit.Fit(
        "g",
        lambda x, t, c: v * a[t].sqrt() * x / (a[t] * v + 1 - a[t]),
        a,
        1.0,
        None,
        None,
        lambda c: chunk,
        lambda name, make: [make(0)],
        constants,
    )


def test_the_fit_reaches_an_exact_flow_to_1e_5():
    tau = [999, 700, 400, 150]
    fit = _exact_fit(3, tau, EXACT)
    table = fit.improve(fit.greedy(tau), 3)
    chunk = fit.chunk(0)
    rollout = solver_fit.Rollout(fit.predict, None, chunk.x_T)
    rollout.follow(table.timesteps, table.rows)
    assert float((rollout.states[-1] - chunk.states[-1]).abs().max()) < 1e-5
    # the mutation: a ridge that pulls to DDIM's row
    assert _exact_fit(3, tau, Constants(ridge=1e-2)).greedy(tau).loss > 1e-6


def test_a_sample_that_strays_does_not_draw_the_table():
    tau = [999, 700, 400, 150]

    def typical(power):
        fit = _exact_fit(3, tau, replace(EXACT, power=power), stray=1.0)
        table = fit.improve(fit.greedy(tau), 5)
        rollout = solver_fit.Rollout(fit.predict, None, fit.chunk(0).x_T)
        rollout.follow(table.timesteps, table.rows)
        errors = (rollout.states[-1] - fit.chunk(0).states[-1]).square().mean((1, 2))
        assert table.loss == pytest.approx(float(errors.pow(power).mean() ** (1 / power)))
        return float(errors[1:].mean())

    assert typical(0.5) < 0.1 * typical(1.0)


def test_the_gradient_is_that_of_the_loss():
    tau = [999, 600, 200]
    fit = _exact_fit(8, tau, Constants(nudge=1e-5))
    table = fit.greedy(tau)
    moves = [move for move in fit._moves(table) if not isinstance(move[1], int)]
    _, gradient = fit._normal_equations(table, moves)
    slopes = []
    for i, direction in moves:
        ends = []
        for sign in (-1, 1):
            rows = [row.clone() for row in table.rows]
            rows[i] += sign * 1e-5 * direction
            ends.append(fit.loss(tau, rows) ** 0.5)
        slopes.append((ends[0] - ends[1]) / 2e-5)
    slopes = torch.tensor(slopes, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(gradient, slopes, dim=0)
    assert float(cosine) > 1 - 1e-6
    # the mutation: the gradient of the mean of squares points elsewhere
    fit.constants = replace(fit.constants, power=1.0)
    other = fit._normal_equations(table, moves)[1]
    assert float(torch.nn.functional.cosine_similarity(other, slopes, dim=0)) < 1 - 1e-6


@pytest.mark.parametrize("zero_snr", [False, True])
def test_with_many_variances_it_is_nearer_than_the_formulas(zero_snr, tmp_path):
    network = Gaussian(64, "v_prediction", zero_snr)
    outcomes, cost = _calibrate(network, tmp_path / "w", (3, 5), num_samples=24, batch_size=24)
    for found in outcomes:
        assert found.is_better and found.held_out < 0.5 * found.analytic
        assert len(found.entry["timesteps"]) == found.calls
    assert cost["processes"] == 1 and cost["evaluations"] > 24 * 100


def test_levenberg_marquardt_lowers_the_loss_by_weights_and_by_timesteps():
    tau = [999, 600, 300]
    start = _exact_fit(64, tau, Constants()).greedy(tau)
    both = _exact_fit(64, tau, Constants()).improve(start, 2)
    weights = _exact_fit(64, tau, Constants(most_shift=0)).improve(start, 2)
    assert both.loss < 0.95 * start.loss and weights.loss < start.loss
    assert weights.timesteps == start.timesteps != both.timesteps
    assert both.timesteps[0] == 999


# -- the run


class _Stop(Exception):
    pass


def _unet(out=1, seed=0):
    return tiny_unet(blocks=(8, 8), seed=seed, out_channels=out)


SMALL = {"calls": (2, 3), "num_samples": 5, "held_out": 3, "steps": 12, "batch_size": 2}
WORDS = "--calls 2 3 --num_images 5 --held_out 3 --trajectory_steps 12 --batch_size 2 --cpu"


def test_any_interruption_gives_the_same(tmp_path):
    """Every sum is kept: after each stop a little less is left to do."""
    model = measured_model_of(_unet(), dict(DDPMScheduler().config))
    job = SolverJob(**{**SMALL, "calls": (3,)}, constants=Constants(iterations=1))
    alone, cost = calibrate_solver(model, job, work_dir=tmp_path / "one")
    stops, seen = [2, 9, 25], 0

    shared, spent = SealedParts.shared, []

    def stopping(self, items, make):
        nonlocal seen
        seen += 1
        if stops and seen > stops[0]:
            stops.pop(0)
            raise _Stop
        return shared(self, items, make)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SealedParts, "shared", stopping)
        while stops:
            seen = 0
            with pytest.raises(_Stop):
                calibrate_solver(model, job, work_dir=tmp_path / "two")
            spent.append(len(list((tmp_path / "two").iterdir())))
        seen = 0
        again, left = calibrate_solver(model, job, work_dir=tmp_path / "two")
    assert [each.entry for each in again] == [each.entry for each in alone]
    assert spent == sorted(set(spent)) and left["evaluations"] < 0.8 * cost["evaluations"]
    part = sorted((tmp_path / "two").glob("part-*-row-*"))[0]
    part.write_bytes(part.read_bytes()[:-8] + b"\0" * 8)  # a damaged one is computed again
    repaired, _ = calibrate_solver(model, job, work_dir=tmp_path / "two")
    assert [each.entry for each in repaired] == [each.entry for each in alone]
    other = SolverJob(**{**SMALL, "calls": (3,), "seed": 1}, constants=Constants(iterations=1))
    with pytest.raises(ValueError, match="`work_dir` is .* unfinished calibration .*seed: 0"):
        calibrate_solver(model, other, work_dir=tmp_path / "two")
    solver_run.discard(tmp_path / "two")
    assert not (tmp_path / "two").exists()


class _Thread(Team):
    """One of two processes that are threads here, and so use the very same network."""

    def __init__(self, index, barrier, shared):
        self.index, self.count, self.barrier, self.shared = index, 2, barrier, shared

    def wait(self):
        self.barrier.wait(60)

    def gather(self, values):
        self.shared[self.index] = values
        self.wait()
        every = [*self.shared[0], *self.shared[1]]
        self.wait()
        return every


def test_two_that_share_the_work_get_the_same_to_the_bit(tmp_path):
    model = measured_model_of(_unet(), dict(DDPMScheduler().config))
    job = SolverJob(**{**SMALL, "calls": (3,)}, constants=Constants(iterations=1))
    alone, cost = calibrate_solver(model, job, work_dir=tmp_path / "one")
    barrier, shared, found = threading.Barrier(2), {}, {}

    def go(index):
        team = _Thread(index, barrier, shared)
        found[index] = calibrate_solver(model, job, work_dir=tmp_path / "two", team=team)

    threads = [threading.Thread(target=go, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        outcomes, shared_cost = found[index]
        assert [each.entry for each in outcomes] == [each.entry for each in alone]
        assert shared_cost["evaluations"] == cost["evaluations"]


def test_the_command_stores_tables_that_every_form_of_export_keeps(tmp_path, capsys):
    DDPMPipeline(_unet(), DDPMScheduler()).save_pretrained(tmp_path / "p")
    words = ["calibrate", "--objective", "solver", "--pipeline", str(tmp_path / "p")]
    assert main([*words, *WORDS.split()]) == 0
    said = capsys.readouterr().out
    file = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    tables = config["_ddim_schedulers"]["settings"]["calibration"]["solver"]
    assert sorted(tables) == ["2", "3"] and "written to" in said
    for entry in tables.values():
        assert entry["held_out"] < entry["analytic"] and entry["n"] == 5
        assert entry["clips"] == 1.0 and entry["shape"] == [1, 8, 8]
    ours = GeneralizedDDIMScheduler.from_config(config, **CALIBRATED)
    pipe = DDPMPipeline(_unet(), ours)
    pipe.save_pretrained(tmp_path / "ours")
    for form in ("plug-in", "portable", "self-contained"):
        export_folder(tmp_path / "ours", form)
        found = json.loads((tmp_path / "ours" / "scheduler" / "scheduler_config.json").read_text())
        again = GeneralizedDDIMScheduler.from_config(found)
        assert stored_calls(again.config.calibration) == [2, 3] and again.config.solver_calibrated
        again.set_timesteps(3)
        assert again.timesteps.tolist() == tables["3"]["timesteps"]
    # further tables are added, and the command that samples takes one
    assert main([*words, *WORDS.replace("2 3", "4", 1).split()]) == 0
    config = json.loads(file.read_text())
    assert sorted(config["_ddim_schedulers"]["settings"]["calibration"]["solver"]) == list("234")
    # what was chosen by pictures on top of a table goes with it, and this is said
    of_pictures = {**tables["3"], "eta": 0.5, "samples": {"features": "pixels"}}
    add_to_calibration({"solver": {"3": of_pictures}}, file)
    capsys.readouterr()
    assert main([*words, *WORDS.split()]) == 0
    said = capsys.readouterr().out
    assert said.count("are gone") == 1 and "3 calls: eta and the scales" in said
    assert main(["calibrate", "--pipeline", str(tmp_path / "p"), "--undo"]) == 0
    undone = json.loads(file.read_text())["_ddim_schedulers"]["settings"]["calibration"]
    assert undone["solver"]["3"] == of_pictures
    sample = ["sample", "--pipeline", str(tmp_path / "p"), "--preset", "calibrated"]
    sample += ["--num_images", "2", "--device", "cpu", "--num_inference_steps"]
    told = "complete; sampled with the stored table of 3 calls"
    for folder, calls, table in (("a", 3, True), ("a", 3, False), ("b", 5, False)):
        capsys.readouterr()
        assert main([*sample, str(calls), "--output", str(tmp_path / folder)]) == 0
        assert (told in capsys.readouterr().out) is table


def test_a_table_that_is_no_better_is_not_stored(tmp_path, capsys, monkeypatch):
    DDPMPipeline(_unet(), DDPMScheduler()).save_pretrained(tmp_path / "p")
    file = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    before = file.read_bytes()
    monkeypatch.setattr(
        solver_run.Fit,
        "improve",
        lambda self, table, n: table._replace(rows=[0 * r for r in table.rows]),
    )
    words = ["calibrate", "--objective", "solver", "--pipeline", str(tmp_path / "p")]
    assert main([*words, *WORDS.split()]) == 0
    assert capsys.readouterr().out.count("no better than the analytic one: not stored") == 2
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("config", "clip"), [({}, (None, 1.0)), ({"clip_sample": False}, (None,))], ids=str
)
@pytest.mark.parametrize("out", [1, 2])
def test_networks_with_and_without_clipping_and_a_learned_variance(out, config, clip, tmp_path):
    settings = {"variance_type": "learned_range"} if out == 2 else {}
    stock = DDPMScheduler(prediction_type="v_prediction", **settings, **config)
    model = measured_model_of(_unet(out), dict(stock.config))
    job = SolverJob(**{**SMALL, "calls": (2,)}, constants=Constants(iterations=1))
    (found,), _ = calibrate_solver(model, job, work_dir=tmp_path / "w")
    assert found.entry["clip"] in clip and found.entry["clips"] == clip[-1]
    # what is stored is what was measured: the same error by the scheduler itself
    few = GeneralizedDDIMScheduler.from_config(stock.config, **FEW_STEPS)
    few.set_timesteps(2)
    assert found.held_out < found.analytic and few.timesteps.tolist() == [999, 499]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": ()}, "`calls` is "),
        ({"calls": (3, 3)}, "`calls` is .*different"),
        ({"calls": (0,)}, "`calls` is 0; it must be 1 to 6"),
        ({"calls": (7,)}, "`calls` is 7; it must be 1 to 6"),
        ({"steps": 1}, "`trajectory_steps` is 1"),
        ({"num_samples": 0}, "`num_images` is 0"),
        ({"held_out": 0}, "`held_out` is 0"),
        ({"batch_size": 0}, "`batch_size`"),
    ],
    ids=str,
)
def test_bad_numbers_are_named(change, message, tmp_path):
    model = measured_model_of(_unet(), dict(DDPMScheduler().config))
    with pytest.raises(ValueError, match=message):
        calibrate_solver(model, SolverJob(**{**SMALL, **change}), work_dir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_what_cannot_be_followed_is_refused(tmp_path):
    class Wild(Gaussian):
        def forward(self, x, t):
            return SimpleNamespace(sample=x * 1e200)

    with pytest.raises(ValueError, match="are not finite"):
        _calibrate(Wild(1), tmp_path / "w", (2,))
    model = measured_model_of(_unet(), dict(DDPMScheduler(thresholding=True).config))
    with pytest.raises(ValueError, match="`thresholding` is True"):
        calibrate_solver(model, SolverJob(), work_dir=tmp_path / "w")
    assert Team().count == 1


def test_a_config_that_keeps_the_preset_from_its_tables_is_told_of(tmp_path, capsys):
    own = {"eta": 0.5, "eps_scale": 1.01}
    saved = GeneralizedDDIMScheduler(**own)
    DDPMPipeline(_unet(), saved).save_pretrained(tmp_path / "p")
    words = ["calibrate", "--objective", "solver", "--pipeline", str(tmp_path / "p")]
    assert main([*words, *WORDS.split()]) == 0
    told = "says eps_scale=1.01, eta=0.5: CALIBRATED uses the tables with eps_scale=1.0, eta=None"
    assert told in capsys.readouterr().out
    config = json.loads((tmp_path / "p" / "scheduler" / "scheduler_config.json").read_text())
    for more, follows in (({}, False), ({"eps_scale": 1.0, "eta": None}, True)):
        scheduler = GeneralizedDDIMScheduler.from_config(config, **{**CALIBRATED, **more})
        scheduler.set_timesteps(3)
        assert scheduler.follows_table is follows
    DDPMPipeline(_unet(), DDPMScheduler()).save_pretrained(tmp_path / "q")
    assert main([*words[:-1], str(tmp_path / "q"), *WORDS.split()]) == 0
    assert "CALIBRATED uses" not in capsys.readouterr().out
