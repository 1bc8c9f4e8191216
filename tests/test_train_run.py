"""A run on one process: exact resume, steps that are not finite, read-backs, averaging, options."""

import copy
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.models.upsampling import Upsample2D
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import UNET, checkpoint, quick_config, same_files
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.training import train
from ddim_schedulers.training.config import EMAConfig, OptimisationConfig
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.networks.checkpoints import CheckpointError
from ddim_schedulers.training.trainer import saving, signals, trainer
from ddim_schedulers.training.trainer.compiling import (
    check_gradients,
    compile_for_training,
    loses_gradients,
)
from ddim_schedulers.training.trainer.ema import AveragedUNet
from ddim_schedulers.training.trainer.engine import LearningRate
from ddim_schedulers.training.trainer.result import NonFiniteError
from ddim_schedulers.training.trainer.signals import StopSignals
from ddim_schedulers.training.trainer.trainer import Trainer
from ddim_schedulers.training.trainer.training_log import TrainingLog, Window

# of a cached question of diffusers for torch's version
dynamo_warns_of_diffusers = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools"
)


@pytest.fixture
def settings(tmp_path):
    """Settings of a quick run, as a function of what differs."""
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    (tmp_path / "dropout.json").write_text(json.dumps(UNET | {"dropout": 0.1}))

    def make(name, **changes):
        return quick_config(tmp_path, name, **{"max_train_steps": 10, **changes})

    return make


def run(config):
    return train.train(config)


def weights(config, step, part="unet"):
    return load_file(checkpoint(config, step) / part / "diffusion_pytorch_model.safetensors")


def config_root(config):
    return Path(config.output_dir) / "checkpoints"


def test_resume_is_exact_in_the_middle_of_an_epoch_with_everything_on(settings, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    everything = {
        "data": str(tmp_path / "images.npy"),
        "validation_fraction": 0.0,
        "model": settings("x").model.replace("unet.json", "dropout.json"),
        "batch_size": 8,  # not quite four steps an epoch: both stops are in the middle of one
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "lr_schedule": "cosine",
        "variance_type": "learned_range",
        "timestep_sampling": "loss_aware",
        "num_train_timesteps": 10,
        "sampling_history": 3,
        "max_train_steps": 8,
    }
    whole = settings("whole", **everything)
    expected = run(whole)
    first = run(settings("parts", **everything, stop_after=4))
    assert first.stopped_by == "stop_after" and first.pipeline_dir is None
    second = run(settings("parts", **everything, resume="latest", stop_after=1))
    torch.manual_seed(123)  # what the global generator was at must not matter
    third = run(settings("parts", **everything, resume="latest"))
    assert first.losses + second.losses + third.losses == expected.losses
    assert same_files(whole, settings("parts", **everything), 8)
    lines = (third.output_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    # The comparison can fail: another seed gives other bytes.
    other = settings("other", **everything | {"seed": 1, "max_train_steps": 8})
    assert run(other).losses != expected.losses and not same_files(whole, other, 8)


def test_a_run_is_not_resumed_with_other_settings(settings):
    run(settings("a", max_train_steps=2))
    with pytest.raises(ValueError, match=r"lr was 0.001 and is 0.1; start a new run"):
        run(settings("a", max_train_steps=2, resume="latest", lr=0.1))
    with pytest.raises(ValueError, match="`resume` is 'never'"):
        run(settings("a", max_train_steps=2))
    assert run(settings("a", max_train_steps=3, resume="latest")).steps == 3  # longer is fine
    assert run(settings("a", max_train_steps=3, resume="latest")).losses == []  # and done is done


def test_a_run_is_not_resumed_on_other_data(settings, tmp_path):
    def save(count):
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        np.save(tmp_path / "images.npy", images)

    save(40)
    options = {"data": str(tmp_path / "images.npy"), "max_train_steps": 4}
    run(settings("a", **options, stop_after=2))
    for changes in ({"validation_fraction": 0.5}, {"weights_dtype": "float64"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} was .* start a new run"):
            run(settings("a", **options, **changes, resume="latest"))
    save(50)
    with pytest.raises(ValueError, match="run on other data: they were .*38.* and are .*48"):
        run(settings("a", **options, resume="latest"))
    save(40)
    assert run(settings("a", **options, resume="latest")).steps == 4


def test_what_a_dead_session_wrote_is_not_there_twice(settings, monkeypatch):
    expected = run(settings("whole", log_every=1))
    real = Trainer.one_step

    def die(self, *args):
        if self.step == 5:
            raise RuntimeError("killed")
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", die)
        with pytest.raises(RuntimeError, match="killed"):  # before the first checkpoint
            run(settings("a", log_every=1))
    path = run(settings("a", log_every=1, resume="latest")).output_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == expected.losses
    # The log is whole at any moment: a rewind that fails changes nothing.
    before, log = path.read_bytes(), TrainingLog(path.parent, is_main=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            log.rewind(3)
    assert path.read_bytes() == before
    log.rewind(3)
    assert len(path.read_text().splitlines()) == 3


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(settings):
    config = settings("a", checkpoint_every=4)
    expected = run(config)
    broken = checkpoint(config, 10) / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000010 is damaged"):
        again = run(settings("a", checkpoint_every=4, resume="latest"))
    assert again.losses == expected.losses[8:]
    kept = checkpoints.listed(config_root(config))
    assert [checkpoints.step_of(p) for p in kept] == [10, 8]
    assert all(checkpoints.verify(p) is None for p in kept)


def test_a_signal_saves_and_ends_the_run(settings, monkeypatch):
    expected = run(settings("whole"))
    for number in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(number).name
        real = Trainer.one_step

        def stop_in_step(self, *args, number=number, real=real):
            real(self, *args)
            if self.step == 4:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "one_step", stop_in_step)
            first = run(settings(name))
        assert (first.stopped_by, first.steps) == (name, 5)
        assert f"stopped by {name}; continue with --resume latest" in first.summary()
        second = run(settings(name, resume="latest"))
        assert first.losses + second.losses == expected.losses
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_to_the_whole_group_reaches_the_workers_too(settings, monkeypatch):
    expected = run(settings("whole"))
    real = Trainer.one_step

    def stop_in_step(self, *args):
        real(self, *args)
        if self.step == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            pids = [str(pid) for pid in [w.pid for w in workers] + [os.getpid()]]
            subprocess.run(["kill", "-TERM", *pids], check=True)
            time.sleep(0.2)  # long enough for a worker to die of it

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", stop_in_step)
        first = run(settings("a", num_workers=2))
    assert first.stopped_by == "SIGTERM" and first.steps == 3
    assert not multiprocessing.active_children()  # they have ended all the same
    second = run(settings("a", num_workers=2, resume="latest"))
    assert first.losses + second.losses == expected.losses


def test_workers_end_with_a_run_that_fails(settings, monkeypatch):
    def fail(self, batch, window):
        raise RuntimeError("no")

    monkeypatch.setattr(Trainer, "_loss", fail)
    with pytest.raises(RuntimeError, match="no") as caught:  # its frames keep the loader alive
        run(settings("a", num_workers=1))
    assert caught.tb is not None and not multiprocessing.active_children()


def test_a_second_signal_acts_at_once_unless_it_is_the_first_again(monkeypatch):
    # neither of the two limits is near, however slow the machine is
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 1e9)
    with pytest.raises(KeyboardInterrupt), StopSignals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as when torchrun hands it on
        assert asked.name == "SIGINT"
        monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGINT)
    found = []

    def elsewhere():
        with StopSignals() as asked:
            found.append(asked.name)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [None]


def poison(monkeypatch, step, what):
    """Makes the loss of one step not finite: `inf` overflows it, `grad` only its gradient."""

    def bad(self, loss):
        if self.step != step:
            return loss
        return loss * float("inf") if what == "inf" else loss + (loss - loss.detach()).sqrt()

    real = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, *args: bad(self, real(self, *args)))


@pytest.mark.parametrize("what", ["inf", "grad"])
def test_a_step_that_is_not_finite_is_not_applied(settings, monkeypatch, what):
    before = settings("before", max_train_steps=5, lr_schedule="constant")
    run(before)
    poison(monkeypatch, 5, what)
    config = settings("bad", max_train_steps=6, on_nonfinite="count", lr_schedule="constant")
    result = run(config)
    assert result.skipped_steps == 1 and "1 steps were not finite" in result.summary()
    a, b = weights(before, 5), weights(config, 6)
    assert all(torch.equal(a[k], b[k]) for k in a)
    moments = [
        load_file(checkpoint(c, n) / "optimizer.safetensors") for c, n in ((before, 5), (config, 6))
    ]
    assert all(torch.equal(moments[0][k], moments[1][k]) for k in moments[0])
    assert all(torch.isfinite(v).all() for v in weights(config, 6, "unet_ema").values())


def test_the_run_stops_with_a_report(settings, monkeypatch):
    real = Trainer._loss

    def bad(self, batch, window):
        if self.step == 2:
            batch["images"][3] = torch.nan
        return real(self, batch, window)

    monkeypatch.setattr(Trainer, "_loss", bad)
    config = settings("a")
    with pytest.raises(NonFiniteError) as caught:
        run(config)
    text = str(caught.value)
    assert "step 2 was not finite and was not applied" in text
    assert "positions with a loss that is not finite: 3." in text
    assert text.count("digits[") == 8 and text.count(" t=") == 8 and "loss=nan" in text
    saved = weights(config, 4)  # the flag is read every log_every = 4 steps
    assert all(torch.isfinite(v).all() for v in saved.values())


class ReadBacks(TorchDispatchMode):
    """Counts what would wait for an accelerator: values taken from tensors on to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        self.count += func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", ["uniform", "loss_aware"])
def test_a_step_reads_nothing_back(settings, sampling):
    trainer = Trainer(settings("a", timestep_sampling=sampling, variance_type="learned_range"))
    with trainer.loader(3) as loader:
        batches = list(loader)
    # A number of replaced images comes from the host and stays there.
    for batch in batches:
        batch["replaced"] = 0
    loader, window = iter(batches), Window(trainer.share, 0)
    trainer.one_step(loader, window)  # the first one allocates
    with ReadBacks() as reads:
        trainer.one_step(loader, window)
        trainer.average.step()
    assert reads.count == 0
    with ReadBacks() as reads:  # the counter works
        float(torch.ones(()))
    assert reads.count == 1


def test_losses_are_read_once_in_log_every_steps(settings, monkeypatch):
    reads = []
    real = Window.read
    monkeypatch.setattr(Window, "read", lambda self, *a: reads.append(1) or real(self, *a))
    result = run(settings("a", log_every=5, max_train_steps=20))
    assert len(reads) == 4 and len(result.losses) == 20


def test_the_average_is_the_formula_and_training_never_sees_it(settings):
    config = settings("a", max_train_steps=6, checkpoint_every=1, keep_last=9, ema_power=0.75)
    result = run(config)
    shadow = None
    for step in range(1, 7):
        raw = weights(config, step)
        decay = min(0.9, 1 - step**-0.75)  # diffusers' warm-up: 0 at the first update
        shadow = (
            raw if shadow is None else {k: decay * shadow[k] + (1 - decay) * raw[k] for k in raw}
        )
        for key, value in weights(config, step, "unet_ema").items():
            torch.testing.assert_close(value, shadow[key], rtol=1e-5, atol=1e-7)
    assert result.weights == "ema"
    exported = UNet2DModel.from_pretrained(result.pipeline_dir / "unet").state_dict()
    raw = UNet2DModel.from_pretrained(result.output_dir / "unet_raw").state_dict()
    averaged = weights(config, 6, "unet_ema")
    assert all(torch.equal(exported[k], averaged[k]) for k in averaged)
    assert all(torch.equal(raw[k], weights(config, 6)[k]) for k in averaged)
    assert any(not torch.equal(raw[k], averaged[k]) for k in averaged)


@pytest.mark.parametrize("power", [2 / 3, 1.0])
def test_the_average_moves_as_that_of_diffusers_to_the_bit(power):
    torch.manual_seed(0)
    source = torch.nn.Linear(40, 30)
    settings = {"ema_power": power, "ema_decay": 0.9, "ema_warmup": True, "ema_inv_gamma": 1.0}
    ours = AveragedUNet(source, EMAConfig(**settings))
    theirs = EMAModel(
        copy.deepcopy(source).parameters(),
        decay=0.9,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=power,
        foreach=True,
    )
    for _ in range(12):  # the warm-up has shares of 1, of more and of less than a half
        with torch.no_grad():
            for weight in source.parameters():
                weight.add_(torch.randn_like(weight))
        ours.step()
        theirs.step(source.parameters())
        for one, other in zip(ours.unet.parameters(), theirs.shadow_params, strict=True):
            assert torch.equal(one, other)
    assert ours.state_dict() == {"optimization_step": theirs.optimization_step}


def test_looking_changes_nothing_and_says_which_weights(settings):
    plain = settings("plain", max_train_steps=6)
    watched = settings(
        "watched",
        max_train_steps=6,
        validate_every=2,
        validation_images=16,
        sample_every=3,
        sample_images=4,
        sample_steps=2,
        frechet_images=20,
        keep_last=1,
        tracker="tensorboard",
    )
    expected, result = run(plain), run(watched)
    assert result.losses == expected.losses and same_files(plain, watched, 6)
    assert [r["step"] for r in result.evaluations] == [2, 3, 4, 6]
    assert all(r["weights"] == "ema" for r in result.evaluations)
    last = result.evaluations[-1]
    assert (last["frechet_n"], last["frechet_reference_n"]) == (20, 1437)
    assert last["feature_space"] == "pixels" and len(last["channel_mean_drift"]) == 1
    pictures = {p.name for p in (result.output_dir / "pictures").iterdir()}
    assert {"samples-00000006.png", "loss_over_t-00000006.png", "loss.png"} <= pictures
    shown = EventAccumulator(str(result.output_dir / "logs" / "ddim-schedulers")).Reload()
    assert {"loss", "validation_loss", "frechet"} <= set(shown.Tags()["scalars"])
    assert [image.step for image in shown.Images("samples")] == [3, 6]
    assert [image.step for image in shown.Images("loss_over_t")] == [2, 4, 6]
    # The best by validation loss is kept beside the last one.
    losses = {r["step"]: r["validation_loss"] for r in result.evaluations if "validation_loss" in r}
    best = min(losses, key=losses.get)
    kept = [checkpoints.step_of(p) for p in checkpoints.listed(config_root(watched))]
    assert kept == sorted({6, best}, reverse=True)


def test_without_averaging_the_raw_weights_are_named(settings):
    config = settings("a", max_train_steps=3, use_ema=False, validate_every=3, validation_images=8)
    result = run(config)
    assert result.weights == "raw" and result.evaluations[0]["weights"] == "raw"
    assert "raw weights" in result.summary()
    assert not (checkpoint(config, 3) / "unet_ema").exists()


@pytest.mark.parametrize(
    ("variance", "saved"), [(None, "fixed_small"), ("fixed_large", "fixed_large")]
)
def test_the_saved_scheduler_is_the_clean_one_unless_another_is_asked_for(
    settings, variance, saved
):
    given = {} if variance is None else {"variance_type": variance}
    result = run(settings("a", max_train_steps=2, **given))
    config = DDPMPipeline.from_pretrained(result.pipeline_dir).scheduler.config
    assert (config.variance_type, config.timestep_spacing) == (saved, "trailing")


def test_a_finished_run_says_that_it_is_finished(settings, capsys):
    first = run(settings("a", max_train_steps=2))
    again = run(settings("a", max_train_steps=2, resume="latest"))
    assert first.summary().startswith("2 steps") and again.pipeline_dir == first.pipeline_dir
    assert "all 2 steps were done before" in again.summary() and "nan" not in again.summary()


def test_a_long_warm_up_is_said(settings, monkeypatch):
    said = []
    monkeypatch.setattr(trainer.logger, "warning", said.append)
    run(settings("a", max_train_steps=6, lr_warmup_steps=2))
    assert not said
    run(settings("b", max_train_steps=6, lr_warmup_steps=3))
    assert len(said) == 1 and "lr_warmup_steps is 3, more than a third of the 6 steps" in said[0]


def test_the_loss_of_the_bar_is_that_of_the_summary(settings, capsys):
    result = run(settings("a", max_train_steps=7, log_every=3, progress_bar=True))
    shown = re.findall(r"loss=([\d.]+)", capsys.readouterr().err)
    assert shown[-1] == f"{result.final_loss:.4f}" and f"loss {shown[-1]}" in result.summary()


def test_a_fixed_variance_matters_to_the_bound_alone(settings):
    losses = {}
    for loss in ("simple", "vlb"):
        for variance in ("auto", "fixed_large", "fixed_small"):
            changes = {"max_train_steps": 2, "loss": loss, "variance_type": variance}
            losses[loss, variance] = run(settings(f"{loss}-{variance}", **changes)).losses
    assert losses["simple", "auto"] == losses["simple", "fixed_small"]
    assert losses["vlb", "auto"] == losses["vlb", "fixed_large"] != losses["vlb", "fixed_small"]
    # a run of an earlier version goes on with the new default
    more = {"max_train_steps": 3, "resume": "latest"}
    assert run(settings("simple-fixed_large", **more)).steps == 3
    assert run(settings("vlb-fixed_large", loss="vlb", **more)).steps == 3
    with pytest.raises(ValueError, match="variance_type was 'fixed_small' and is 'auto'"):
        run(settings("vlb-fixed_small", loss="vlb", **more))


def test_the_pipeline_loads_and_samples(settings):
    result = run(settings("a", max_train_steps=2, variance_type="learned_range"))
    pipeline = DiffusionPipeline.from_pretrained(result.pipeline_dir)
    restored = MarkovianDDPMScheduler.from_config(pipeline.scheduler.config)
    assert restored.config.variance_type == "learned_range"
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()


@pytest.mark.parametrize(
    "options",
    [
        {"channels_last": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"compile": True, "compile_backend": "eager", "channels_last": True},
        {"num_workers": 1},
    ],
)
def test_options_of_speed_combine_and_change_nothing(settings, options):
    plain, fast = (
        settings("plain", max_train_steps=5),
        settings("fast", max_train_steps=5, **options),
    )
    a, b = run(plain), run(fast)
    assert b.losses == pytest.approx(a.losses, rel=1e-5)
    again = settings("again", max_train_steps=5, **options, stop_after=3)
    first = run(again)
    rest = run(settings("again", max_train_steps=5, **options, resume="latest"))
    assert first.losses + rest.losses == b.losses and same_files(fast, again, 5)


def test_bf16_keeps_noise_and_loss_in_float32(settings, monkeypatch):
    seen = []
    real = Trainer._loss

    def look(self, batch, window):
        loss = real(self, batch, window)
        seen.extend([loss.dtype, window._rows[-1][1].dtype, batch["noise"].dtype])
        return loss

    monkeypatch.setattr(Trainer, "_loss", look)
    full = run(settings("full"))
    half = run(settings("half", mixed_precision="bf16"))
    assert set(seen) == {torch.float32}
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    saved = weights(settings("half"), 10)
    assert {v.dtype for v in saved.values()} == {torch.float32}
    # The next run in this process is not in bfloat16 because this one was.
    assert run(settings("again")).losses == full.losses


def test_learning_rate_is_a_function_of_the_step():
    config = OptimisationConfig(lr=2.0, lr_warmup_steps=4, lr_schedule="cosine", max_train_steps=12)
    rates = [LearningRate(config)(step) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    cosine = [1 + np.cos(np.pi * (step - 4) / 8) for step in range(4, 12)]
    assert rates[4:] == pytest.approx(cosine) and rates[-1] > 0  # no step is wasted
    constant = LearningRate(OptimisationConfig(lr=2.0, lr_warmup_steps=0))
    assert [constant(0), constant(10**6)] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_engines_are_refused(settings, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"(?i)`distributed_type` is {name}; it must be MULTI_GPU"):
        Trainer(settings("a"))


@pytest.fixture
def before_the_repair(monkeypatch):
    """The installed torch counts as one whose compiler loses gradients on the CPU."""
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))


def test_the_compiler_is_mistrusted_on_the_cpu_below_torch_2_14(monkeypatch, settings):
    cpu, kind = torch.device("cpu"), type(torch.__version__)
    for version, wrong in (("2.9.1", True), ("2.13.0+cpu", True), ("2.14.0a0+git", True)):
        monkeypatch.setattr(torch, "__version__", kind(version))
        assert loses_gradients(cpu) is wrong and not loses_gradients(torch.device("cuda"))
    for version in ("2.14.0", "2.14.1+cu130", "2.20.0", "3.0"):
        monkeypatch.setattr(torch, "__version__", kind(version))
        assert not loses_gradients(cpu)
        unet = UNet2DModel(sample_size=8, **UNET)
        compile_for_training(unet, None, "eager")
        assert unet.up_blocks[0].upsamplers[0].interpolate
    monkeypatch.setattr(Trainer, "_check_compiled", lambda self: pytest.fail("checked"))
    Trainer(settings("a", compile=True, compile_backend="eager"))


@dynamo_warns_of_diffusers
@pytest.mark.usefixtures("before_the_repair")
def test_a_compiler_that_loses_gradients_is_refused(settings):
    """Its output is right, so nothing else would show: whole layers stay as they were drawn."""

    def loses_gradients(graph, inputs):
        def run(*values):
            lost = [isinstance(v, torch.nn.Parameter) and v.ndim == 4 for v in values]
            return graph(*(v.detach() if x else v for v, x in zip(values, lost, strict=True)))

        return run

    torch._dynamo.register_backend(loses_gradients, name="loses_gradients")
    said = "loses gradients of this network: 25 of 144 differ from those without compilation"
    for options in ({}, {"mixed_precision": "bf16"}):
        with pytest.raises(ValueError, match=said):
            Trainer(settings("a", compile=True, compile_backend="loses_gradients", **options))


@dynamo_warns_of_diffusers
@pytest.mark.usefixtures("before_the_repair")
@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"channels_last": True}])
def test_the_check_of_compiled_gradients_leaves_no_trace(settings, options):
    """Nothing but the sums of rounding tells a run that was compiled from one that was not."""
    options |= {"max_train_steps": 4}
    plain = run(settings("plain", **options))
    compiled = run(settings("compiled", compile=True, compile_backend="eager", **options))
    assert compiled.losses == pytest.approx(
        plain.losses, rel=1e-2 if "bf16" in str(options) else 1e-5
    )


@pytest.mark.parametrize("zero", ["conv_out", "conv2"])
def test_weights_that_begin_at_zero_hide_no_lost_gradient(zero):
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **UNET)
    chosen = [p for name, p in unet.named_parameters() if f"{zero}." in name]
    for parameter in chosen:
        torch.nn.init.zeros_(parameter)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])

    def lossy(x, t, return_dict):
        own = {n: p if "conv_out" in n else p.detach() for n, p in unet.named_parameters()}
        return torch.func.functional_call(unet, own, (x, t), {"return_dict": return_dict})

    check_gradients(unet, unet, x, t)
    with pytest.raises(ValueError, match="loses gradients of this network"):
        check_gradients(lossy, unet, x, t)
    assert chosen and not any(p.any() for p in chosen)  # as they were
    assert all(p.grad is None for p in unet.parameters())
    unet.conv_in.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="are not finite without compilation"):
        check_gradients(unet, unet, x, t)


@pytest.mark.usefixtures("before_the_repair")
def test_dropout_and_accelerates_own_compiler_are_refused(settings, monkeypatch):
    dropout = settings("a").model.replace("unet", "dropout")
    with pytest.raises(ValueError, match="the network has dropout, whose masks would differ"):
        Trainer(settings("a", compile=True, compile_backend="eager", model=dropout))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="`dynamo_backend` is set"):
        Trainer(settings("a"))


@pytest.mark.usefixtures("before_the_repair")
def test_a_network_that_upsamples_by_copies_gives_the_same():
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **UNET)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    expected = unet(x, t).sample
    compile_for_training(unet, None, "eager")
    assert not unet.up_blocks[0].upsamplers[0].interpolate
    torch.testing.assert_close(unet(x, t).sample, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("before_the_repair")
def test_upsampling_by_copies_gives_the_same_values():
    torch.manual_seed(0)
    layer = Upsample2D(3, use_conv=True)
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    expected = layer(x)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    unet = UNet2DModel(sample_size=8, **UNET)
    unet.up_blocks[0].upsamplers[0] = layer
    compile_for_training(unet, None, "eager")
    assert not layer.interpolate
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], slope)


def test_fp16_is_refused_where_it_would_do_nothing(settings):
    with pytest.raises(
        ValueError, match="`mixed_precision` is 'fp16', which does nothing on the CP"
    ):
        Trainer(settings("a", mixed_precision="fp16"))


def test_a_tracker_that_is_not_installed_is_named(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="`tracker` is 'wandb', which is not installed"):
            Trainer(settings("a", tracker="wandb"))


def test_a_full_disk_in_a_run_keeps_the_last_good_checkpoint(settings, monkeypatch, capsys):
    real = checkpoints.write_file

    def full(path, data):
        if any(part.startswith(f"{checkpoints.TEMPORARY}8-") for part in path.parts):
            raise OSError(28, "No space left on device")
        real(path, data)

    config = settings("a", checkpoint_every=4, max_train_steps=10)
    monkeypatch.setattr(checkpoints, "write_file", full)
    with pytest.raises(CheckpointError, match="the disk is full; the last good checkpoint is .*04"):
        run(config)
    monkeypatch.undo()
    resumed = run(settings("a", checkpoint_every=4, max_train_steps=10, resume="latest"))
    assert len(resumed.losses) == 6

    def no_room(*args):
        raise OSError(28, "No space left on device")

    def none_for_weights(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_pipeline", none_for_weights)
        with pytest.raises(CheckpointError, match="the disk is full; the last good .*10"):
            run(settings("a", checkpoint_every=4, max_train_steps=10, resume="latest"))
    monkeypatch.setattr(trainer, "write_bytes", no_room)
    config = settings("a", checkpoint_every=4, max_train_steps=12, resume="latest")
    with pytest.raises(CheckpointError, match="the disk is full; the last good checkpoint is .*10"):
        run(config)


def test_what_a_run_leaves_is_replaced_whole_or_not_at_all(settings, monkeypatch, tmp_path):
    """An export that fails keeps the one before, and links that were planted are not followed."""
    config = settings("a", max_train_steps=2)
    run(config)
    root, real = Path(config.output_dir), UNet2DModel.save_pretrained
    kept = {p: p.read_bytes() for p in (root / "unet_raw").iterdir()}

    def half(self, folder, *args, **kwargs):
        if ".unet_raw" in str(folder):
            Path(folder).mkdir()
            (Path(folder) / "config.json").write_text("{")
            raise OSError(28, "No space left on device")
        return real(self, folder, *args, **kwargs)

    (tmp_path / "precious").write_text("mine")
    (root / "config.yaml").unlink()
    (root / "config.yaml").symlink_to(tmp_path / "precious")
    further = settings("a", max_train_steps=4, resume="latest")
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DModel, "save_pretrained", half)
        with pytest.raises(CheckpointError, match="the disk is full"):
            run(further)
    assert {p: p.read_bytes() for p in (root / "unet_raw").iterdir()} == kept
    assert (tmp_path / "precious").read_text() == "mine"
    assert "max_train_steps: 4" in (root / "config.yaml").read_text()
    run(further)
    assert {p.name for p in root.iterdir() if p.name.startswith(".")} == set()
    assert any(p.read_bytes() != kept[p] for p in kept)


@pytest.mark.parametrize(("steps", "said"), [(100, 1), (1000, 0)])
def test_a_process_that_does_not_end_in_noise_is_spoken_of_once(settings, steps, said):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("ddim_schedulers.training.trainer.trainer")
    logger.addHandler(handler)
    try:
        run(settings("a", num_train_timesteps=steps, max_train_steps=1))
    finally:
        logger.removeHandler(handler)
    found = [r.getMessage() for r in records if "sampling starts from N(0, I)" in r.getMessage()]
    assert len(found) == said
    assert all("alpha_bar at the last of 100 timesteps is 0.364" in text for text in found)


def test_dry_run_reports_and_writes_nothing(settings, tmp_path, capsys):
    argv = ["--dry_run", "--output_dir", str(tmp_path / "none"), "--cpu", "--no_progress_bar"]
    assert train.main([*argv, "--model", settings("x").model, "--batch_size", "16"]) == 0
    text = capsys.readouterr().out
    for part in (
        "batch_size: 16",
        "1,437 images (1, 8, 8)",
        "parameters",
        "MiB",
        "s a step",
        "loss",
    ):
        assert part in text
    assert not (tmp_path / "none").exists()


def test_a_dry_run_of_a_run_to_be_continued_writes_nothing(settings, capsys):
    config = settings("a", max_train_steps=6)
    run(settings("a", max_train_steps=6, stop_after=3))
    (metrics := Path(config.output_dir) / "metrics.jsonl").write_text('{"step": 4, "loss": 1}\n')
    before = {p: p.stat().st_mtime_ns for p in Path(config.output_dir).rglob("*")}
    argv = [f"--{k}={v}" for k, v in config.to_dict().items() if v is not None and k != "resume"]
    assert train.main([*argv, "--resume", "latest", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "at step 3" in text and "for 3 steps" in text
    assert {p: p.stat().st_mtime_ns for p in Path(config.output_dir).rglob("*")} == before
    assert metrics.read_text() == '{"step": 4, "loss": 1}\n'


def test_the_command_line_trains_and_reports(settings, tmp_path, capsys):
    out = str(tmp_path / "cli")
    argv = ["--model", settings("x").model, "--max_train_steps", "3", "--batch_size", "8", "--cpu"]
    assert train.main([*argv, "--output_dir", out, "--no_progress_bar"]) == 0
    assert "3 steps" in capsys.readouterr().out
    resolved = (tmp_path / "cli" / "config.yaml").read_text()
    assert "max_train_steps: 3" in resolved and "# objective" in resolved


def test_a_failed_push_does_not_lose_the_run(settings, monkeypatch):
    from ddim_schedulers.training.sharing import hub

    asked = []
    monkeypatch.setattr(hub, "push_after_training", lambda *a, **k: asked.append((a, k)))
    options = {"push_to_hub": True, "hub_repo_id": "me/model", "hub_private": True}
    result = run(settings("a", max_train_steps=2, **options))
    ((place, name), how), *rest = asked
    assert (place, name, rest) == (result.pipeline_dir, "me/model", [])
    assert how == {"form": "portable", "private": True, "revision": None}


def test_without_matplotlib_training_says_so_once_and_draws_nothing(tmp_path, monkeypatch, caplog):
    from ddim_schedulers.training.common import figures
    from ddim_schedulers.training.trainer import validation

    figures.can_plot.cache_clear()
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        validation.plot_losses([1, 2], [1.0, 0.5], tmp_path / "loss.png")
    figures.can_plot.cache_clear()
    assert not (tmp_path / "loss.png").exists()
    assert caplog.text.count("ddim-schedulers[plots]") == 1
