"""A run that shares its pipeline at the end: the last thing it does, and never what fails it."""

import json
import time

import pytest
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from tiny_runs import PLAIN_UNET

from ddim_schedulers.training import cli, train
from ddim_schedulers.training.sharing import hub

# huggingface_hub hands the open file to its HTTP library by an old name (see test_hub)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_RecogniseMe0123456789abcdefghijklm"


@pytest.fixture
def argv(tmp_path):
    """The command line of a run of two steps that ends with a push."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    (tmp_path / "unet.json").write_text(json.dumps(PLAIN_UNET))
    words = ["--model", str(tmp_path / "unet.json"), "--output_dir", str(tmp_path / "run")]
    words += ["--max_train_steps", "2", "--batch_size", "4", "--cpu", "--no_progress_bar"]
    return [*words, "--push_to_hub", "true", "--hub_repo_id", "me/digits"]


@pytest.fixture
def server(loopback_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    loopback_hub.tokens[TOKEN] = ("me", True)
    return loopback_hub


FAULTS = {
    "403": (dict(path="/create", status=403), "no permission to write to me/digits (403)"),
    "cut": (dict(path="/commit/", cut="before", times=99), "cannot be reached"),
}


@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=list(FAULTS))
def test_a_run_whose_push_fails_ends_well(fault, sentence, argv, server, tmp_path, capsys):
    server.faults.append(server.Fault(**fault))
    assert cli.main(["train", *argv]) == 0
    told = capsys.readouterr()
    assert "pipeline with the ema weights" in told.out
    assert sentence in told.err
    assert "Traceback" not in told.err
    assert TOKEN not in told.out + told.err
    assert DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").unet is not None
    [command] = [s for line in told.err.splitlines() if (s := line.strip()).startswith("ddim-sch")]

    server.faults.clear()
    assert cli.main(command.split()[1:]) == 0
    files = set(server.repos["me/digits"].files())
    assert {"model_index.json", "README.md", "unet/config.json"} <= files
    assert not [f for f in files if "checkpoint" in f or "optimizer" in f or "unet_raw" in f]


def test_an_interrupted_push_ends_the_run_well(argv, server, monkeypatch, capsys):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "push_pipeline", stopped)
    assert train.main(argv) == 0
    told = capsys.readouterr().err
    assert "was not pushed to me/digits: it was stopped (KeyboardInterrupt)" in told
    assert "ddim-schedulers push --pipeline" in told


def test_the_push_is_the_last_thing(argv, monkeypatch):
    from accelerate import Accelerator
    from accelerate.tracking import TensorBoardTracker

    order = []

    def note(owner, name):
        real = getattr(owner, name)

        def noted(*args, **options):
            order.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    note(Accelerator, "wait_for_everyone")
    note(TensorBoardTracker, "finish")
    note(Accelerator, "end_training")
    monkeypatch.setattr(hub, "push_after_training", lambda *a, **k: order.append("push"))
    assert train.main([*argv, "--tracker", "tensorboard"]) == 0
    assert order[-1] == "push" and order.count("push") == 1
    assert {"wait_for_everyone", "finish", "end_training"} <= set(order)


CHILD = """
import pathlib, sys, time
import torch
from ddim_schedulers.training import train
from ddim_schedulers.training.sharing import hub

torch.set_num_threads(1)
gone = pathlib.Path(sys.argv[1])

def push(*args, **options):
    limit = time.monotonic() + 60
    while not gone.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    print("ALONE" if gone.exists() else "SOMEBODY WAITS")

hub.push_after_training = push
code = train.main(sys.argv[2:])
if int(__import__("os").environ["RANK"]) == 1:
    gone.touch()
sys.exit(code)
"""


def test_no_process_waits_while_the_main_one_uploads(argv, tmp_path, processes):
    (tmp_path / "child.py").write_text(CHILD)
    said, _ = processes([tmp_path / "child.py", tmp_path / "gone", *argv], 2, tmp_path)
    assert said.count("ALONE") == 1
    assert "SOMEBODY WAITS" not in said
