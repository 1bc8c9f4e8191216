"""Training on two processes: the same batch gives the same run, and a resumed run the same bits.

All that needs two runs in one `torchrun` (its start costs more than the training) and is looked at
by several tests. Both sides of each comparison run with one thread.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_vae
from tiny_runs import UNET

CHILD = '''
"""Trains each of the given configs and writes what came out. Run by the test through torchrun."""

import json
import sys
import warnings

import torch
from accelerate import Accelerator

torch.set_num_threads(1)
jobs = json.load(open(sys.argv[1]))
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == jobs["processes"], accelerator.num_processes

from ddim_schedulers.training.common.processes import settle
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.latents import LatentCache
from ddim_schedulers.training.trainer.result import NonFiniteError
from ddim_schedulers.training.trainer.trainer import Trainer

encoded = []  # chunks of images, by this process
save_chunk = LatentCache.save


def counted(self, item, value):
    encoded.append(item)
    save_chunk(self, item, value)


LatentCache.save = counted

if jobs["processes"] == 2:
    # FSDP and DeepSpeed aside, DDP over CPU processes must be what really runs.
    assert str(accelerator.distributed_type).endswith("MULTI_CPU")

for name, settings, poison in jobs["runs"]:
    encoded.clear()
    trainer = Trainer(TrainingConfig(**settings))
    if poison is not None and accelerator.process_index == poison:
        objective = type(trainer.objective).__call__

        def poisoned(self, output, x0, noise, t, trainer=trainer, objective=objective):
            loss, error = objective(self, output, x0, noise, t)
            return (loss * float("inf"), error) if trainer.step == 3 else (loss, error)

        type(trainer.objective).__call__ = poisoned
    try:
        result = trainer.run()
        out = {"losses": result.losses, "skipped": result.skipped_steps, "error": None}
        out["evaluations"] = result.evaluations
    except NonFiniteError as error:
        out = {"error": str(error), "step": trainer.step}
    finally:
        if poison is not None and accelerator.process_index == poison:
            type(trainer.objective).__call__ = objective
    weights = [p.detach().double().sum() for p in trainer.parameters]
    everyone = accelerator.gather(torch.stack(weights)[None])
    out["same_on_all"] = bool((everyone == everyone[0]).all())
    out["encoded"] = accelerator.gather(torch.tensor([len(encoded)])).tolist()
    if accelerator.is_main_process:
        json.dump(out, open(f"{settings['output_dir']}/{name}.json", "w"))
    accelerator.wait_for_everyone()
settle()
accelerator.end_training()
'''


def write_jobs(folder: Path, processes: int, runs: list) -> list[str]:
    """Returns the words for a process that does `runs`."""
    (folder / "child.py").write_text(CHILD)
    jobs = folder / f"jobs-{processes}.json"
    jobs.write_text(json.dumps({"processes": processes, "runs": runs}))
    return [str(folder / "child.py"), str(jobs)]


def torchrun(folder: Path, words: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += words
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processes):
    """A folder in which all runs have happened, on one and on two processes."""
    root = tmp_path_factory.mktemp("distributed")
    (root / "unet.json").write_text(json.dumps(UNET))
    (root / "noisy_unet.json").write_text(json.dumps(UNET | {"dropout": 0.1}))

    def settings(name, **changes):
        return {
            "output_dir": str(root / name),
            "model": str(root / "unet.json"),
            "cpu": torch.accelerator.is_available(),  # nobody needs to say so without one
            "batch_size": 8,
            "max_train_steps": 20,
            "lr": 1e-3,
            "lr_schedule": "cosine",
            "lr_warmup_steps": 4,
            "ema_decay": 0.9,
            "random_flip": True,
            "progress_bar": False,
            "log_every": 6,
            "checkpoint_every": 0,
        } | changes

    aware = {
        "timestep_sampling": "loss_aware",
        "num_train_timesteps": 10,
        "sampling_history": 1,
        "variance_type": "learned_range",
        "class_conditional": True,
        "label_dropout": 0.3,
    }
    look = {
        "validate_every": 20,
        "validation_images": 33,
        "sample_every": 20,
        "sample_images": 5,
        "sample_steps": 3,
        "frechet_images": 67,
    }
    double = {"weights_dtype": "float64"}
    one, two = [], []
    for label, changes in (("f32", {}), ("f64", double), ("aware", aware | double | look)):
        for key, extra, runs in (
            ("1x8", {}, one),
            ("1x4x2", {"gradient_accumulation_steps": 2}, one),
            ("2x4", {}, two),
            ("2x2x2", {"gradient_accumulation_steps": 2}, two),
        ):
            if label != "aware" and key == "2x2x2":
                continue
            runs.append([f"{label}-{key}", settings(f"{label}-{key}", **changes, **extra), None])
    # Dropout is on: its masks too must come back. 30 images in batches of 8: stops mid-epoch.
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(root / "images.npz", images=images, labels=np.arange(30) % 3)
    whole = {
        "model": str(root / "noisy_unet.json"),
        "data": str(root / "images.npz"),
        "validation_fraction": 0.0,
        "max_train_steps": 7,
        **{k: v for k, v in aware.items() if k != "sampling_history"},
        "gradient_accumulation_steps": 2,
    }
    two.append(["whole", settings("whole", **whole), None])
    two.append(["parts", settings("parts", **whole | {"stop_after": 4}), None])
    two.append(["parts-2", settings("parts", **whole, resume="latest"), None])
    tiny_vae().save_pretrained(root / "kl")
    latents = {"vae": str(root / "kl"), **double}
    one.append(["latents-1x8", settings("latents-1x8", **latents), None])
    two.append(["latents-2x4", settings("latents-2x4", **latents | {"stop_after": 12}), None])
    again = latents | {"resume": "latest"}
    two.append(["latents-2x4-2", settings("latents-2x4", **again), None])
    # A loss that is not finite on the second process alone.
    two.append(["count", settings("count", on_nonfinite="count", max_train_steps=6), 1])
    two.append(["stop", settings("stop", max_train_steps=6), 1])
    processes(write_jobs(root, 1, one), 1, root)
    torchrun(root, write_jobs(root, 2, two))
    return root


def outcome(folder, name, run=None):
    return json.loads((folder / (run or name) / f"{name}.json").read_text())


def tensors(folder, run, step, part):
    base = folder / run / "checkpoints" / f"step-{step:08d}" / part
    return load_file(base / "diffusion_pytorch_model.safetensors" if base.is_dir() else base)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("split", ["1x4x2", "2x4"])
def test_losses_in_float32_do_not_depend_on_the_split(folder, split):
    expected = torch.tensor(outcome(folder, "f32-1x8")["losses"])
    got = torch.tensor(outcome(folder, f"f32-{split}")["losses"])
    assert len(got) == 20
    assert ((got - expected).abs() / expected).max() < 1e-6
    # The check can fail: a step later is another loss.
    assert ((got.roll(1) - expected).abs() / expected).max() > 1e-3


@pytest.mark.parametrize("run", ["f64-1x4x2", "f64-2x4", "aware-1x4x2", "aware-2x4", "aware-2x2x2"])
def test_weights_in_float64_do_not_depend_on_the_split(folder, run):
    reference = f"{run.split('-')[0]}-1x8"
    for part in ("unet", "unet_ema"):
        expected = tensors(folder, reference, 20, part)
        assert largest_difference(tensors(folder, run, 20, part), expected) < 1e-10
    raw, averaged = (tensors(folder, run, 20, part) for part in ("unet", "unet_ema"))
    assert largest_difference(raw, averaged) > 1e-4


def test_latents_are_encoded_once_and_train_the_same_on_two_processes(folder):
    first, later = outcome(folder, "latents-2x4"), outcome(folder, "latents-2x4-2", "latents-2x4")
    # 1,437 digits are two chunks: each process encodes one, and the resumed run finds both
    assert outcome(folder, "latents-1x8")["encoded"] == [2]
    assert first["encoded"] == [1, 1] and later["encoded"] == [0, 0]
    for item in range(2):
        one, two = (
            load_file(folder / f"latents-{split}" / "latents" / f"{item:06d}.safetensors")
            for split in ("1x8", "2x4")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert later["same_on_all"]
    losses = torch.tensor(first["losses"] + later["losses"])
    expected = torch.tensor(outcome(folder, "latents-1x8")["losses"])
    assert len(losses) == 20 and ((losses - expected).abs() / expected).max() < 1e-6
    for part in ("unet", "unet_ema"):
        expected = tensors(folder, "latents-1x8", 20, part)
        assert largest_difference(tensors(folder, "latents-2x4", 20, part), expected) < 1e-10


@pytest.mark.parametrize("split", ["1x4x2", "2x4", "2x2x2"])
def test_history_of_losses_is_gathered_in_the_order_of_the_batch(folder, split):
    expected = tensors(folder, "aware-1x8", 20, "sampler.safetensors")
    got = tensors(folder, f"aware-{split}", 20, "sampler.safetensors")
    assert torch.equal(got["seen"], expected["seen"])
    assert int(got["seen"].sum()) == 160
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split", ["2x4", "2x2x2"])
def test_evaluation_does_not_depend_on_the_split(folder, split):
    expected = outcome(folder, "aware-1x8")["evaluations"][-1]
    got = outcome(folder, f"aware-{split}")["evaluations"][-1]
    assert got["frechet_n"] == 67 and got["weights"] == "ema"
    for name in ("validation_loss", "frechet"):
        assert got[name] == pytest.approx(expected[name], rel=1e-8)
    assert got["channel_mean_drift"] == pytest.approx(expected["channel_mean_drift"], abs=1e-9)


def test_resume_in_the_middle_of_an_epoch_is_exact_on_two_processes(folder):
    whole = outcome(folder, "whole")["losses"]
    parts = outcome(folder, "parts")["losses"] + outcome(folder, "parts-2", "parts")["losses"]
    assert parts == whole and len(whole) == 7
    for part in ("unet", "unet_ema", "optimizer.safetensors", "sampler.safetensors"):
        a, b = tensors(folder, "whole", 7, part), tensors(folder, "parts", 7, part)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_step_that_is_not_finite_on_one_process_is_applied_on_none(folder):
    counted = outcome(folder, "count")
    assert counted["same_on_all"] and counted["skipped"] == 1
    assert all(torch.isfinite(v).all() for v in tensors(folder, "count", 6, "unet").values())
    stopped = outcome(folder, "stop")
    assert stopped["same_on_all"]
    assert "step 3 was not finite" in stopped["error"]
    assert "positions with a loss that is not finite: 4, 5, 6, 7" in stopped["error"]
    assert "digits[" in stopped["error"]
