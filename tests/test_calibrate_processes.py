"""A killed calibration goes on, on two processes; objectives share a folder and a config."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_models import tiny_unet

from ddim_schedulers.training.calibration import samples_run, solver_run
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.commands import _calibrate_samples
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.likelihood import error_sweep
from ddim_schedulers.training.metrics import features

SCRIPT = """
import os, signal, sys
from functools import partial

from ddim_schedulers.training.calibration import (
    samples_job,
    samples_search,
    samples_space,
    solver_job,
)
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common.sealed_parts import SealedParts

small = samples_space.Space(((0.0, None), (1.0, (0.2, 0.8))), (1.0, 1.1), (1.0,), rounds=0)
samples_job.SamplesJob = partial(samples_job.SamplesJob, space=small)
# an untrained network: whatever comes first is stored
samples_search.Verdict.wins = solver_job.Outcome.is_better = True
before_the_kill, *words = sys.argv[1:]
save, saved = SealedParts.save, []

def killed(self, item, value):
    saved.append(item)
    if len(saved) == int(before_the_kill):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, item, value)

SealedParts.save = killed
sys.exit(main(words))
"""


def _save(folder, **settings):
    scheduler = DDPMScheduler(**{"num_train_timesteps": 50, "beta_end": 0.3, **settings})
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(folder)


@pytest.mark.parametrize(
    ("objective", "more", "kill"),
    [
        ("solver", "--num_images 5 --held_out 3 --trajectory_steps 8 --batch_size 2", 9),
        ("samples", "--data digits --num_images 48 --features pixels details", 5),
    ],
)
def test_a_killed_run_goes_on_on_two_processes_and_gives_the_same(
    objective, more, kill, tmp_path, processes
):
    _save(tmp_path / "p")
    script, work = tmp_path / "go.py", tmp_path / "work"
    script.write_text(SCRIPT)
    words = ["calibrate", "--objective", objective, "--pipeline", str(tmp_path / "p")]
    words += ["--calls", "3", "--cpu", *more.split(), "--work_dir", str(work), "--output"]

    def go(count, name, kill=0):
        return processes([script, kill, *words, tmp_path / name], count, tmp_path)

    go(1, "alone.json")
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        go(1, "together.json", kill)
    assert len(list(work.glob("part-*"))) == kill - 1 and not (tmp_path / "together.json").exists()
    out, err = go(2, "together.json")
    assert "2 processes; written to" in out and "process 1: " in err and not work.exists()
    alone, together = (
        json.loads((tmp_path / name).read_text())["_ddim_schedulers"]["settings"]["calibration"][
            "solver"
        ]["3"]
        for name in ("alone.json", "together.json")
    )
    assert alone.keys() == together.keys()
    # weights of regressors that are nearly parallel move with the rounding of a process
    for key in ("timesteps", "clip", "eta", "eta_interval", "eps_scale", "end_scale"):
        assert together[key] == alone[key]
    if objective == "samples":
        together, alone = together["samples"], alone["samples"]
    for key in ("held_out", "analytic") if objective == "solver" else ("distance", "gain"):
        assert together[key] == pytest.approx(alone[key], rel=1e-3)


class _Owner:
    def check(self):
        pass


def _parts(folder):
    """Parts of all three computations, each with its claim."""
    team, owner, one = Team(), _Owner(), {"x": torch.zeros(1)}
    sweep = error_sweep.SweepFiles(
        folder, dict.fromkeys(error_sweep.NETWORK_PARTS), (1, 1, 8, 8), [[0]], 1, team, owner
    )
    solver = solver_run.SolverFiles(folder, {"seed": 0}, team, owner)
    samples = samples_run.MeasurementFiles(folder, {"seed": 0}, team, owner)
    for files, items in (
        (sweep, [(0, 0)]),
        (solver, [("fine", 0), ("fine-held-out", 1), ("3-free-0-001-row", 0), ("5-held-out", 0)]),
        (samples, ["data-00000000", "data-rows", "search-3-ab-0-2", "held-out-3-ab-0-8"]),
    ):
        files.claim()
        for item in items:
            files.save(item, one)
    return samples


@pytest.mark.parametrize("kind", [error_sweep, solver_run, samples_run])
def test_parts_of_another_objective_stay(kind, tmp_path):
    _parts(tmp_path / "work")
    before = len(list((tmp_path / "work").iterdir()))
    kind.discard(tmp_path / "work")
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert before == 12 and len(left) == {error_sweep: 10, solver_run: 7, samples_run: 7}[kind]
    for other in (error_sweep, solver_run, samples_run):
        assert (other.CLAIM in left) == (other is not kind)
        other.discard(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_other_settings_are_refused_where_there_are_parts_alone(tmp_path):
    first = _parts(tmp_path)
    other = type(first)(tmp_path, {"seed": 1}, Team(), _Owner())
    with pytest.raises(ValueError, match="unfinished calibration .*seed: 0 there, 1 now"):
        other.claim()
    for item in ("data-00000000", "data-rows", "search-3-ab-0-2", "held-out-3-ab-0-8"):
        first.path_of(item).unlink()
    other.claim()  # nothing would be lost
    assert other.kept_settings() == {"seed": 1}


def test_a_classifier_of_other_data_is_not_used_again(tmp_path, monkeypatch):
    made = []
    facts = {"accuracy": 1.0, "held_out_n": 1}
    monkeypatch.setattr(features, "train_classifier", lambda *a, **k: (None, facts))
    monkeypatch.setattr(features, "save_classifier", lambda *a: made.append(a[-1].touch()))

    class Data:
        shape = (1, 2, 2)

        def __init__(self, value):
            self.images = torch.full((4, 1, 2, 2), value)

        def __len__(self):
            return 4

        def labels(self, rows):
            return torch.tensor([0, 1, 0, 1])[list(rows)]

        def batch(self, rows):
            return self.images[list(rows)], 0

    def classifier(value, seed):
        words = Team(), tmp_path, seed, lambda line: None
        return _calibrate_samples._classifier(Data(value), *words)

    names = [classifier(*each) for each in ((0.0, 0), (0.0, 0), (0.5, 0), (0.0, 1))]
    assert len(made) == 3 and names[0] == names[1] and len(set(names)) == 3
    samples_run.discard(tmp_path)
    assert not tmp_path.exists()


def test_an_output_that_is_not_of_this_process_is_refused_before_work_is_done(tmp_path, capsys):
    _save(tmp_path / "p")
    _save(tmp_path / "betas", beta_end=0.1)
    _save(tmp_path / "v", prediction_type="v_prediction")
    words = ["calibrate", "--objective", "solver", "--pipeline", str(tmp_path / "p"), "--cpu"]
    for target, message in (
        (tmp_path / "betas", "the config of another process or prediction type"),
        (tmp_path / "v" / "scheduler", "the config of another process or prediction type"),
        (tmp_path / "p" / "model_index.json", "not the config of a scheduler"),
        (tmp_path / "p" / "model_index.json" / "x", "is a file; it must be a folder"),
    ):
        before = [path.read_bytes() for path in sorted(tmp_path.rglob("*.json"))]
        assert main([*words, "--output", str(target)]) == 2
        told = capsys.readouterr().err
        assert message in told and "fine trajectories" not in told
        assert [path.read_bytes() for path in sorted(tmp_path.rglob("*.json"))] == before
    file = tmp_path / "p" / "model_index.json"
    assert main([*words, "--work_dir", str(file)]) == 2
    assert f"`--work_dir` is '{file}'" in capsys.readouterr().err
