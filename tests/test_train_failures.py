"""A run that fails, however often it is started again, keeps what it had."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import PLAIN_UNET, quick_config

from ddim_schedulers.pipelines.ownership import OwnershipLostError
from ddim_schedulers.training import train
from ddim_schedulers.training.data.images import ImageData
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.trainer.result import NonFiniteError
from ddim_schedulers.training.trainer.trainer import Trainer


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps(PLAIN_UNET))

    def make(**changes):
        values = {
            "batch_size": 4,
            "max_train_steps": 40,
            "log_every": 2,
            "checkpoint_every": 2,
            "resume": "latest",
        }
        return quick_config(tmp_path, "run", **values | changes)

    return make


@pytest.fixture
def broken_from(monkeypatch):
    """Makes the loss of every step from one on not finite."""
    real = Trainer._loss

    def break_from(step, before=10**9):
        def loss(self, *args):
            bad = step <= self.step < before
            return real(self, *args) * (torch.nan if bad else 1.0)

        monkeypatch.setattr(Trainer, "_loss", loss)

    return break_from


def good(config):
    root = Path(config.output_dir) / "checkpoints"
    found = checkpoints.listed(root)
    assert all(checkpoints.verify(folder) is None for folder in found)
    return [checkpoints.step_of(folder) for folder in found]


def test_a_job_that_is_started_again_and_again_keeps_its_good_checkpoints(settings, broken_from):
    broken_from(8)
    for _ in range(2):  # a third would be as the second
        with pytest.raises(NonFiniteError, match="step 8 was not finite .*step-00000010"):
            train.train(settings())
        assert good(settings()) == [8, 6]
    root = Path(settings().output_dir) / "checkpoints"
    (failed,) = checkpoints.failed_in(root)
    assert checkpoints.verify(failed) is None
    assert "step 8 was not finite" in json.loads((failed / "failed.json").read_text())["why"]
    # asked for by name, it is where the run goes on
    broken_from(8, before=9)
    result = train.train(settings(resume=str(failed), max_train_steps=12))
    assert (result.steps, result.skipped_steps) == (12, 0)
    assert good(settings())[0] == 12


def test_what_is_passed_over_is_said(settings, broken_from, caplog):
    broken_from(3)
    with pytest.raises(NonFiniteError):
        train.train(settings())
    caplog.clear()
    root = Path(settings().output_dir) / "checkpoints"
    checkpoints.chosen("latest", root)
    (failed,) = checkpoints.failed_in(root)
    assert f"its state at step 4 is passed over. To continue from there: --resume {failed}" in (
        caplog.text
    )
    with pytest.raises(ValueError, match="holds checkpoints"):
        checkpoints.chosen("never", root)
    assert checkpoints.newest_whole(root) == checkpoints.folder_of(root, 2) != failed


def test_counting_ends_after_so_many_in_a_row(settings, broken_from):
    broken_from(8)
    config = settings(on_nonfinite="count", nonfinite_limit=7)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="8 steps in a row .*nonfinite_limit is 7"):
            train.train(config)
        kept = good(config)
        # the rows of skipped steps pushed nothing out: 6 is there beside the newest
        assert len(kept) == 2 and kept[1] == 6
        assert kept[0] in range(8, 40)


def test_a_row_that_is_short_enough_is_counted(settings, broken_from):
    broken_from(4, before=9)
    config = settings(on_nonfinite="count", nonfinite_limit=6, max_train_steps=12)
    assert train.train(config).skipped_steps == 5


def test_a_model_that_learnt_nothing_is_not_exported(settings, broken_from):
    broken_from(0)
    config = settings(on_nonfinite="count", max_train_steps=6)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="no step of 6 was finite"):
            train.train(config)
        assert not (Path(config.output_dir) / "pipeline").exists()


def test_an_error_in_the_data_saves_what_was_done(settings, monkeypatch):
    real = ImageData.read
    calls = []

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise OSError("the disk went away")
        return real(self, *args)

    monkeypatch.setattr(ImageData, "read", fails)
    config = settings(checkpoint_every=0)
    with pytest.raises(OSError, match="the disk went away"):
        train.train(config)
    assert good(config) == [5]
    monkeypatch.setattr(ImageData, "read", real)
    resumed = train.train(settings(max_train_steps=8))
    assert len(resumed.losses) == 3
    whole = train.train(settings(output_dir=config.output_dir + "-2", max_train_steps=8))
    assert resumed.losses == whole.losses[5:]


def test_an_old_run_that_was_replaced_neither_writes_nor_deletes(settings, monkeypatch):
    real = Trainer.one_step
    config = settings()

    def step(self, *args):
        real(self, *args)
        if self.step == 6:  # while this run slept, another one took the folder over
            self.owner.record.write_text(json.dumps({"verb": "train", "host": "b", "token": "b"}))
            checkpoints.write(Path(config.output_dir) / "checkpoints", 30, {"state.json": b"{}"})

    monkeypatch.setattr(Trainer, "one_step", step)
    with pytest.raises(OwnershipLostError, match="belongs to `train` on host b"):
        train.train(config)
    steps = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000006", "step-00000030"]


def test_prune_leaves_what_the_run_does_not_know(tmp_path):
    for step in (1, 2, 3, 9):
        checkpoints.write(tmp_path, step, {"state.json": b"{}"})
    (tmp_path / ".writing-5-others").mkdir()
    checkpoints.prune(tmp_path, 3, 1, None, {"step-00000001", "step-00000003"})
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".writing-5-others", "step-00000002", "step-00000003", "step-00000009"]


def test_two_training_runs_on_one_folder(settings, tmp_path):
    """The second process is refused with one sentence; the first ends as if alone."""
    flags = ["--output_dir", tmp_path / "run", "--model", tmp_path / "unet.json", "--cpu", "true"]
    flags += ["--batch_size", "4", "--max_train_steps", "100000", "--progress_bar", "false"]
    words = [sys.executable, "-m", "ddim_schedulers.training.train", *map(str, flags)]
    first = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while not (tmp_path / "run" / ".owner-0.json").exists():
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"in use by `train` on host .*process {first.pid}"):
            train.train(settings())
    finally:
        first.kill()
        first.communicate()
    assert os.path.exists(tmp_path / "run" / ".owner-0.json")
    assert train.train(settings(max_train_steps=2)).steps == 2  # at once: its owner is dead
