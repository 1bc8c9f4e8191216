"""Restoring to a folder, and the verb `restore`."""

import io
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from tiny_models import tiny_unet

from ddim_schedulers.pipelines import RestorationPipeline
from ddim_schedulers.pipelines.restoration import job as module
from ddim_schedulers.pipelines.restoration.job import (
    Chunk,
    Records,
    RestorationFiles,
    RestorationJob,
    restore_to_directory,
)
from ddim_schedulers.pipelines.restoration.methods import METHODS, Ddrm
from ddim_schedulers.pipelines.restoration.tasks import OPTIONS, mask_named, task_named
from ddim_schedulers.training import cli
from ddim_schedulers.training.commands import restore as command
from ddim_schedulers.training.metrics.likeness import psnr, ssim

SIDE = 16
SHAPE = (3, SIDE, SIDE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    DDPMPipeline(unet=tiny_unet(3, SIDE), scheduler=DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def pixels(count, shape=SHAPE):
    numbers = np.random.default_rng(3)
    small = numbers.integers(0, 256, (count, 4, 4, shape[0]), np.uint8)
    return small.repeat(shape[1] // 4, axis=1).repeat(shape[2] // 4, axis=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(pixels(3)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return str(folder)


def pipeline():
    pipe = RestorationPipeline(tiny_unet(3, SIDE), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def content(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


TASK = task_named("superres4", SHAPE)


def measured(count=3):
    truth = torch.from_numpy(pixels(count)).movedim(-1, 1).float() / 127.5 - 1
    return TASK.operator.A(truth)


def make_job(**change):
    given = {"num_images": 6, "num_samples": 2, "batch_size": 4, "num_inference_steps": 2}
    return RestorationJob(**{**given, **change})


def go(folder, job=None, task=TASK, y=None, **where):
    given = make_job() if job is None else job
    return restore_to_directory(
        pipeline(), folder, given, task, measured() if y is None else y, **where
    )


def test_files_are_the_same_for_any_number_of_processes(tmp_path):
    alone = go(tmp_path / "alone")
    assert alone.complete and (alone.written, alone.present, alone.sampled) == (6, 0, 6)
    reports = [go(tmp_path / "two", rank=r, world_size=2) for r in (0, 1)]
    assert [r.complete for r in reports] == [False, True]
    assert [r.written for r in reports] == [4, 2]
    assert content(tmp_path / "alone") == content(tmp_path / "two")
    again = go(tmp_path / "alone")
    assert (again.written, again.present, again.sampled) == (0, 6, 0)


def test_a_stopped_run_is_continued(tmp_path, monkeypatch):
    go(tmp_path / "whole")
    calls, whole = [], module._restore

    def stop_at_the_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_restore", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "images").iterdir())) == 4
    assert go(tmp_path / "cut").sampled == 2
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x89PNG", None])
@pytest.mark.parametrize("place", ["images/000001.png", "records/000000-000003.json"])
def test_a_damaged_or_missing_file_is_made_again(place, damage, tmp_path, caplog):
    go(tmp_path)
    before = content(tmp_path)
    if damage is None:
        (tmp_path / place).unlink()
    else:
        (tmp_path / place).write_bytes(damage)
    report = go(tmp_path)
    assert report.complete and report.sampled == 4
    assert content(tmp_path) == before


CHANGES = {
    "method": ({"job": make_job(method=Ddrm())}, "job.method.name: 'ddnm' there, 'ddrm' now"),
    "eta_b": ({"job": make_job(method=Ddrm(0.5)), "first": make_job(method=Ddrm())}, "eta_b"),
    "noise": ({"job": make_job(noise_std=0.1)}, "job.noise_std: 0.0 there, 0.1 now"),
    "samples": ({"job": make_job(num_images=3, num_samples=1)}, "job.num_samples"),
    "seed": ({"job": make_job(seed=1)}, "job.seed"),
    "task": ({"task": task_named("superres4", SHAPE, kernel="bicubic")}, "task.kernel"),
    "images": ({"y": 0.5 * measured()}, "measurement"),
    "more images": ({"job": make_job(num_images=8), "y": measured(4)}, "measurement"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_settings_are_refused(what, tmp_path):
    change, message = CHANGES[what]
    change = dict(change)
    go(tmp_path, change.pop("first", None))
    before = content(tmp_path)
    with pytest.raises(ValueError, match="it holds restorations made with other") as caught:
        go(tmp_path, **change)
    assert message in str(caught.value)
    assert content(tmp_path) == before


def test_images_of_another_kind_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"but no restore\.json, which would say"):
        go(tmp_path)


def test_bad_jobs_raise(tmp_path):
    for change, message in (
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"num_samples": 4}, "`num_images` is 6; it must be a multiple of `num_samples`, 4"),
        ({"noise_std": -1.0}, "`noise_std` is -1.0"),
    ):
        with pytest.raises(ValueError) as caught:
            make_job(**change)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="`measurement` has 2 rows of 2 samples each"):
        go(tmp_path, y=measured(2))


def test_a_record_belongs_to_its_chunk(tmp_path):
    go(tmp_path)
    files = RestorationFiles(tmp_path, make_job(), 0, SHAPE)
    records = Records(tmp_path, 0, files)
    found = records.load(Chunk(0, 4))
    assert found["network_calls"] == 2 and len(found["residual"]) == 4
    records.path_of(Chunk(0, 4)).rename(records.path_of(Chunk(0, 3)))
    assert records.load(Chunk(0, 3)) is None and len(files.damaged) == 1


def run(*words):
    return cli.main(["restore", *map(str, words)])


def common(model, pictures, tmp_path):
    return (
        *("--pipeline", model, "--images", pictures, "--output", tmp_path / "out"),
        *("--num_inference_steps", 2, "--batch_size", 4, "--device", "cpu"),
    )


TASKS = {
    "inpaint": (),
    "superres4": ("--kernel", "bicubic"),
    "colorize": ("--method", "ddrm", "--eta_b", 0.9),
    "deblur": ("--noise_std", 0.1, "--blur_std", 1.0, "--method", "mmps", "--max_iterations", 2),
    "sense": ("--ratio", 0.5, "--method", "pigdm", "--num_samples", 2),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_the_command(task, model, pictures, tmp_path, capsys):
    words = (*common(model, pictures, tmp_path), "--task", task, *TASKS[task])
    assert run(*words) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    each = results["num_samples"]
    assert results["task"]["name"] == task and results["images"] == ["0.png", "1.png", "2.png"]
    names = ["samples", "no model"] if each == 1 else ["mean of the samples", "no model", "samples"]
    assert sorted(results["psnr"]) == sorted(names)
    for i in range(3 * each):
        image = np.asarray(Image.open(out / "images" / f"{i:06d}.png")).astype(float) / 255
        error = ((image - pixels(3)[i // each] / 255) ** 2).mean()
        assert results["psnr"]["samples"][i] == pytest.approx(-10 * math.log10(error), abs=1e-6)
    calls = results["calls"]
    assert calls["forward"] == 2 and calls["together"] == 2 + calls["backward"]
    assert (calls["backward"] > 0) == (task in ("deblur", "sense"))
    table = (out / "results.md").read_text()
    assert "| no model |" in table and table in capsys.readouterr().out
    width = 2 + each + (2 if each > 1 else 0)
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (width * 66 + 2, 3 * 66 + 2)
    before = content(out)
    assert run(*words) == 0 and content(out) == before
    assert run(*words, "--seed", 5) == 2
    assert "job.seed: 0 there, 5 now" in capsys.readouterr().err


def test_ddnm_keeps_the_known_half(model, pictures, tmp_path):
    assert run(*common(model, pictures, tmp_path), "--task", "inpaint") == 0
    for i in range(3):
        image = np.asarray(Image.open(tmp_path / "out" / "images" / f"{i:06d}.png"))
        assert np.array_equal(image[:, :8], pixels(3)[i][:, :8])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert max(results["residual"]) < 1e-6


def test_a_killed_run_is_continued(model, pictures, tmp_path):
    words = ["--pipeline", model, "--images", pictures, "--task", "inpaint", "--device", "cpu"]
    words += ["--num_samples", "8", "--batch_size", "2", "--num_inference_steps", "10"]
    command = [sys.executable, "-m", "ddim_schedulers.training.cli", "restore", *words]
    target = tmp_path / "killed"
    # not at the repo's root, where the folder ddim_schedulers/ shadows an installed wheel
    process = subprocess.Popen([*command, "--output", str(target)], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(target.glob("images/*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in target.glob("images/*.png")}
    assert 4 <= len(finished) < 24
    assert run(*words, "--output", target) == run(*words, "--output", tmp_path / "alone") == 0
    # each process loaded the network anew, so a pixel may round to its neighbour
    for i in range(24):
        one, other = (
            np.asarray(Image.open(tmp_path / name / "images" / f"{i:06d}.png")).astype(int)
            for name in ("killed", "alone")
        )
        assert abs(one - other).max() <= 1
    whole = dict(list(finished.items())[:-2])  # of the chunk that was cut the record may be missing
    assert {p: p.stat().st_mtime_ns for p in whole} == whole
    assert content(target).keys() == content(tmp_path / "alone").keys()


def test_what_was_measured_may_be_given(model, pictures, tmp_path):
    """A measurement in files is that of images in [0, 1]; it restores as the one that was made."""
    small = tmp_path / "small"
    small.mkdir()
    for i, image in enumerate(pixels(3)):
        Image.fromarray(image[::4, ::4]).save(small / f"{i}.png")
    words = ("--task", "superres4", "--num_inference_steps", 2, "--device", "cpu")
    for name, where in (("made", (pictures,)), ("given", (small, "--measured"))):
        out = ("--pipeline", model, "--output", tmp_path / name)
        assert run("--images", *where, *out, *words) == 0
    made, given = (content(tmp_path / name / "images") for name in ("made", "given"))
    for name in made:
        one, other = (
            np.asarray(Image.open(io.BytesIO(c[name]))).astype(int) for c in (made, given)
        )
        assert abs(one - other).max() <= 1
    results = json.loads((tmp_path / "given" / "results.json").read_text())
    assert "psnr" not in results and len(results["residual"]) == 3


def test_a_mask_from_a_file(model, pictures, tmp_path, capsys):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = (*common(model, pictures, tmp_path), "--task", "inpaint", "--mask")
    assert run(*words, tmp_path / "mask.png") == 0
    image = np.asarray(Image.open(tmp_path / "out" / "images" / "000001.png"))
    assert np.array_equal(image[3:9], pixels(3)[1][3:9])
    for name, array, message in (
        ("grey", mask // 2, "has grey pixels; each must be black or white"),
        ("colour", pixels(1)[0], "of mode RGB; it must be a grey image"),
        ("small", mask[:8], "`mask` has shape (8, 16)"),
    ):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        assert run(*words, tmp_path / f"{name}.png") == 2
        assert message in capsys.readouterr().err
    assert run(*words, tmp_path / "none.png") == 2
    assert "none.png" in capsys.readouterr().err


REFUSED = {
    "an unknown task": (("--task", "magic"), "`task` is 'magic'; it must be one of"),
    "a factor": (("--task", "superres3"), "`factor` is 3; it must divide both sides"),
    "no factor": (("--task", "superresN"), "`task` is 'superresN'"),
    "another task's option": (
        ("--task", "colorize", "--kernel", "box"),
        "`kernel` does not belong to the task 'colorize'",
    ),
    "another method's option": (
        ("--task", "colorize", "--zeta", 1),
        "`--zeta` is 1.0; it must be left out with --method ddnm, for it belongs to dps",
    ),
    "an option out of range": (
        ("--task", "colorize", "--method", "dps", "--zeta", -1),
        "`zeta` is -1.0",
    ),
    "a kernel": (("--task", "superres4", "--kernel", "sinc"), "`kernel` is 'sinc'"),
    "noise": (("--task", "colorize", "--noise_std", -1), "`noise_std` is -1.0"),
    "repaint with noise": (
        ("--task", "inpaint", "--method", "repaint", "--noise_std", 0.1),
        "'repaint' takes the measurement as exact",
    ),
    "samples": (("--task", "inpaint", "--num_samples", 0), "`--num_samples` is 0; it must"),
    "a blur": (("--task", "deblur", "--blur_std", 0), "`--blur_std` is 0.0; it must be a number"),
    "an operator's seed": (("--task", "sense", "--operator_seed", -1), "`operator_seed` is -1"),
    "measured numbers": (
        ("--task", "sense", "--measured"),
        "`--task` is 'sense', which measures no image",
    ),
    "measured size": (
        ("--task", "superres4", "--measured"),
        "`images[0]` is 16x16 (width x height); with --measured it must be 4x4, as superres4",
    ),
    "eta of ddpm": (
        ("--task", "inpaint", "--eta", 0.5),
        "`--eta` is 0.5, which does not fit DDPMScheduler",
    ),
    "order": (
        ("--task", "inpaint", "--scheduler", "ddim", "--solver_order", 2),
        "`scheduler` has solver_order=2",
    ),
    "labels": (("--task", "inpaint", "--labels", 1), "`--labels` is given, but `unet` is"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_command_refuses(what, model, pictures, tmp_path, capsys, monkeypatch):
    words, message = REFUSED[what]
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_: pytest.fail("the network was called"))
    assert run(*common(model, pictures, tmp_path), *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "restore.json").exists()


def test_the_command_names_every_method_and_option():
    assert command.METHODS == tuple(METHODS)
    options = {(option, name) for name, cls in METHODS.items() for option in cls().settings()}
    assert set(command.METHOD_OPTIONS.items()) == {(o, n) for o, n in options if o != "name"}
    assert {o for given in OPTIONS.values() for o in given} == set(command.TASK_OPTIONS)


def test_masks():
    assert torch.equal(mask_named("half", (1, 2, 4)), torch.tensor([[1, 1, 0, 0]] * 2).bool())
    centre = mask_named("centre", (1, 8, 8))
    assert int((~centre).sum()) == 16 and not centre[2:6, 2:6].any()
    random = mask_named("random", (1, 64, 64), 1)
    assert 0.45 < float(random.float().mean()) < 0.55
    assert not torch.equal(random, mask_named("random", (1, 64, 64), 2))
    with pytest.raises(ValueError, match="`mask` is 'third'; it must be one of"):
        task_named("inpaint", SHAPE, mask="third")


def test_what_one_would_do_without_a_model():
    truth = torch.from_numpy(pixels(2)).movedim(-1, 1).double() / 127.5 - 1
    for name in ("inpaint", "superres4", "colorize", "deblur", "sense"):
        task = task_named(name, SHAPE)
        y = task.operator.A(truth)
        assert task.plain(y).shape == task.shown(y).shape == truth.shape
        assert psnr((task.plain(y) + 1) / 2, (truth + 1) / 2).min() > 5
    filled = task_named("inpaint", SHAPE).plain(truth)
    torch.testing.assert_close(filled[0, 1, 0, 12], truth[0, 1, :, :8].mean())
    assert torch.equal(filled[..., :8], truth[..., :8])


def test_likeness():
    truth = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    other = (truth + torch.tensor([0.0, 0.1, 0.2]).view(-1, 1, 1, 1)).double()
    found = psnr(other, truth)
    assert found[0] == math.inf
    torch.testing.assert_close(found[1:], torch.tensor([20.0, -10 * math.log10(0.04)]).double())
    similar = ssim(other, truth)
    assert similar[0] == pytest.approx(1) and similar[0] > similar[1] > similar[2]
    assert ssim(truth[..., :8], truth[..., :8]) is None
