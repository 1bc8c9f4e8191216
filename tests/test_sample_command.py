"""Sampling to a folder, and the verbs `sample`, `reconstruct` and `interpolate`."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_unet

from ddim_schedulers import (
    CALIBRATED,
    FEW_STEPS,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    to_portable,
)
from ddim_schedulers.pipelines import (
    GenerationPipeline,
    files,
    observers,
    sampling_files,
    sampling_job,
)
from ddim_schedulers.pipelines.observers import ClipCounter
from ddim_schedulers.pipelines.sampling_job import SamplingJob, process_of, sample_to_directory
from ddim_schedulers.training import cli

SIZE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved stock pipeline of float32 weights."""
    folder = tmp_path_factory.mktemp("model")
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def pipeline(channels=1):
    pipe = GenerationPipeline(unet=tiny_unet(channels), scheduler=GeneralizedDDIMScheduler(eta=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def content(folder):
    """Every file under a folder with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def assert_same_samples(one, other):
    """Of two processes: each loaded the network anew, so a pixel may round to its neighbour."""
    one, other = content(one), content(other)
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(io.BytesIO(c[name]))).astype(int) for c in (one, other))
            assert abs(a - b).max() <= 1, name
        else:
            assert one[name] == other[name], name


def job(**kwargs):
    return SamplingJob(**{"num_images": 10, "batch_size": 4, "num_inference_steps": 3, **kwargs})


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_files_are_the_same_for_any_number_of_processes(tmp_path, file_format):
    pipe, wanted = pipeline(), job(file_format=file_format, seed=5)
    alone = sample_to_directory(pipe, tmp_path / "alone", wanted)
    assert alone.complete and alone.present == 0
    reports = [
        sample_to_directory(pipe, tmp_path / "two", wanted, rank=r, world_size=2) for r in (0, 1)
    ]
    assert [r.complete for r in reports] == [False, True]
    assert all(r.written for r in reports) and sum(r.written for r in reports) == alone.written
    assert content(tmp_path / "alone") == content(tmp_path / "two")
    expected = pipe(seeds=range(5, 9), num_inference_steps=3, output_type="np").images
    expected = (expected * 255).round().astype(np.uint8)
    if file_format == "png":
        with Image.open(tmp_path / "alone/images/000002.png") as image:
            assert np.array_equal(np.asarray(image), expected[2, ..., 0])
    else:
        with np.load(tmp_path / "alone/shards/000000-000003.npz") as shard:
            assert np.array_equal(shard["images"], expected)
            assert shard["seeds"].tolist() == [5, 6, 7, 8]
        assert (tmp_path / "alone/shards/000008-000009.npz").exists()


def test_a_stopped_run_is_continued(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    sample_to_directory(pipeline(), whole, job())
    written = []

    def fails_at_the_sixth(path, image, owner=0):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        files.write_png(path, image, owner)

    monkeypatch.setattr(sampling_files, "write_png", fails_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        sample_to_directory(pipeline(), stopped, job())
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in written}
    (stopped / "images" / ".000005.png.0.tmp").write_bytes(b"half")
    (stopped / "images" / ".000006.png.3.tmp").write_bytes(b"of a process that is no more")
    report = sample_to_directory(pipeline(), stopped, job())
    assert (report.written, report.present, report.complete) == (5, 5, True)
    assert content(stopped) == content(whole)
    assert {p: p.stat().st_mtime_ns for p in written} == before
    again = sample_to_directory(pipeline(), stopped, job())
    assert (again.written, again.present) == (0, 10)


def test_finished_chunks_are_not_sampled_again(tmp_path, monkeypatch):
    sample_to_directory(pipeline(), tmp_path, job())
    (tmp_path / "images" / "000009.png").unlink()
    pipe, sampled = pipeline(), []
    right = sampling_job._sample
    monkeypatch.setattr(sampling_job, "_sample", lambda *a: sampled.append(a[2:4]) or right(*a))
    sample_to_directory(pipe, tmp_path, job())
    assert sampled == [(8, 10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 4}, r"job.num_inference_steps: 3 there, 4 now"),
        ({"seed": 1}, "job.seed"),
        ({"num_images": 9}, "job.num_images: 10 there, 9 now"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    sample_to_directory(pipeline(), tmp_path, job())
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        sample_to_directory(pipeline(), tmp_path, job(**change))
    pipe = pipeline()
    with torch.no_grad():
        next(iter(pipe.unet.parameters())).add_(1.0)
    with pytest.raises(ValueError, match="network"):
        sample_to_directory(pipe, tmp_path, job())
    assert content(tmp_path) == before


def test_another_network_config_or_memory_format_is_refused(tmp_path):
    sample_to_directory(pipeline(), tmp_path, job())
    pipe = pipeline()
    pipe.unet.register_to_config(norm_eps=0.1)
    with pytest.raises(ValueError, match="network_config.norm_eps: 1e-05 there, 0.1 now"):
        sample_to_directory(pipe, tmp_path, job())
    with pytest.raises(ValueError, match=r"[(]channels_last: False there, True now[)]"):
        sample_to_directory(pipeline().speed_up(channels_last=True), tmp_path, job())


@pytest.mark.parametrize("file_format", ["png", "npz"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_is_extended(tmp_path, file_format, world_size):
    def sample(folder, count):
        wanted = job(num_images=count, file_format=file_format)
        for rank in range(world_size):
            report = sample_to_directory(
                pipeline(), folder, wanted, rank=rank, world_size=world_size
            )
        assert report.complete

    sample(tmp_path / "grown", 6)
    first = content(tmp_path / "grown")
    sample(tmp_path / "grown", 6)
    assert content(tmp_path / "grown") == first
    sample(tmp_path / "grown", 11)
    sample(tmp_path / "whole", 11)
    grown, whole = content(tmp_path / "grown"), content(tmp_path / "whole")
    assert grown.keys() == whole.keys() and grown["sample.json"] == whole["sample.json"]
    if file_format == "npz":
        assert grown == whole
    else:  # what was there stays; a smaller batch rounds otherwise
        kept = [name for name in first if name.startswith("images")]
        assert len(kept) == 6 and all(grown[name] == first[name] for name in kept)
    with Image.open(tmp_path / "grown/grid.png") as a, Image.open(tmp_path / "whole/grid.png") as b:
        assert a.size == b.size == (4 * (64 + 2) + 2, 3 * (64 + 2) + 2)


def test_a_folder_of_other_images_is_refused(tmp_path):
    for place in ("photo.JPG", "images/photo.png", "images/000000.png"):
        folder = tmp_path / place.replace("/", "-")
        (folder / "images").mkdir(parents=True)
        Image.new("L", (SIZE, SIZE)).save(folder / place)
        before = content(folder)
        with pytest.raises(ValueError, match=f"holds images .*{place}.* but no sample.json"):
            sample_to_directory(pipeline(), folder, job())
        assert content(folder) == before
    sample_to_directory(pipeline(), tmp_path / "mixed", job())
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "mixed" / "images" / "cat.jpg")
    with pytest.raises(ValueError, match="not of its samples .1, e.g. images/cat.jpg"):
        sample_to_directory(pipeline(), tmp_path / "mixed", job())


def test_images_without_settings_are_refused(tmp_path):
    sample_to_directory(pipeline(), tmp_path, job())
    (tmp_path / "sample.json").unlink()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="images/0000.*but no sample.json"):
        sample_to_directory(pipeline(), tmp_path, job())
    assert content(tmp_path) == before


def damage(data):
    """Edits of a file's bytes: every one must be noticed."""
    yield "empty", b""
    yield "cut short", data[: len(data) // 2]
    yield "without its end", data[:-6]
    yield "random", bytes(range(256))
    for place in (len(data) // 4, len(data) // 3, len(data) // 2):  # of the pixels
        yield "a flipped bit", data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def as_png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def as_npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def other_files(file_format):
    """Whole files that are not the job's."""
    if file_format == "png":
        yield "another size", as_png(np.zeros((9, 8), np.uint8))
        yield "another mode", as_png(np.zeros((8, 8, 3), np.uint8))
        jpeg = io.BytesIO()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(jpeg, "JPEG")
        yield "another format", jpeg.getvalue()
        yield "a bomb", as_png(np.zeros((6000, 6000), np.uint8))
        return
    images, seeds = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, 8) + job().seed
    yield "other seeds", as_npz(images=images, seeds=seeds + 1)
    yield "no seeds", as_npz(images=images)
    yield "another shape", as_npz(images=images[:3], seeds=seeds)
    yield "another dtype", as_npz(images=images.astype(np.int8), seeds=seeds)
    yield "a bomb", as_npz(images=np.zeros((4, 5000, 5000, 1), np.uint8), seeds=seeds)
    yield "objects", as_npz(images=np.array([None]), seeds=seeds)


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_a_damaged_file_is_made_anew(tmp_path, file_format):
    wanted = job(file_format=file_format)
    sample_to_directory(pipeline(), tmp_path, wanted)
    whole = content(tmp_path)
    name = {"png": "images/000001.png", "npz": "shards/000004-000007.npz"}[file_format]
    for kind, data in [*damage(whole[name]), *other_files(file_format)]:
        (tmp_path / name).write_bytes(data)
        report = sample_to_directory(pipeline(), tmp_path, wanted)
        assert report.complete and report.written == 1, kind
        assert content(tmp_path) == whole, kind
    (tmp_path / "grid.png").write_bytes(b"")
    assert sample_to_directory(pipeline(), tmp_path, wanted).written == 0
    assert content(tmp_path) == whole


def test_damage_is_told_once(tmp_path, caplog):
    sample_to_directory(pipeline(), tmp_path, job())
    for i in (1, 2, 5):
        (tmp_path / f"images/{i:06d}.png").write_bytes(b"")
    caplog.clear()
    sample_to_directory(pipeline(), tmp_path, job())
    said = caplog.text
    assert said.count("made again") == 1 and "000001.png' cannot be read" in said
    assert "So are 2 more." in said


def test_damaged_settings_are_refused(tmp_path):
    sample_to_directory(pipeline(), tmp_path, job())
    for text in ("", "[]", "{", "[" * 10**5, '{"job": 1, "job": 1}', "\xff"):
        (tmp_path / "sample.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="sample.json' is damaged"):
            sample_to_directory(pipeline(), tmp_path, job())


def test_bad_jobs_raise(tmp_path):
    for bad in ({"num_images": 0}, {"batch_size": 0}, {"seed": -1}, {"file_format": "jpg"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            job(**bad)
    with pytest.raises(ValueError, match="2 channels"):
        sample_to_directory(pipeline(2), tmp_path, job())
    assert sample_to_directory(pipeline(2), tmp_path, job(file_format="npz")).complete
    assert process_of({}) == (0, 1) and process_of({"RANK": "1", "WORLD_SIZE": "3"}) == (1, 3)
    with pytest.raises(ValueError, match="RANK"):
        process_of({"RANK": "1"})
    with pytest.raises(ValueError, match="`RANK` is 'x' in the environment and `WORLD_SIZE` '2'"):
        process_of({"RANK": "x", "WORLD_SIZE": "2"})


def test_samples_that_are_not_finite_are_not_written(tmp_path):
    pipe = pipeline()
    weight = pipe.unet.conv_out.weight
    right = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="4 of 4 samples are not finite: seeds 5, 6, 7, 8[.]"):
            sample_to_directory(pipe, tmp_path, job(seed=5))
        assert content(tmp_path) == {}  # also no settings, which a corrected call would contradict
        weight.copy_(right)
    assert sample_to_directory(pipe, tmp_path, job(seed=5)).complete


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def fails(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_atomically(path, fails)
    assert json.loads(path.read_text()) == {"a": 1}
    files.remove_leftovers(tmp_path, 0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def command(model, output, *extra):
    options = ["--pipeline", model, "--output", str(output), "--scheduler", "ddim", "--eta", "1"]
    return ["sample", *options, "--batch_size", "3", "--device", "cpu", *extra]


def test_a_killed_run_on_two_processes_ends_like_an_undisturbed_one(model, tmp_path, processes):
    extra = ["--num_images", "30", "--num_inference_steps", "20"]
    assert cli.main(command(model, tmp_path / "alone", *extra)) == 0
    target = tmp_path / "killed"
    module = ["-m", "ddim_schedulers.training.cli", *command(model, target, *extra)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # not at the repo's root, where the folder ddim_schedulers/ shadows an installed wheel
    process = subprocess.Popen([sys.executable, *module], env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(target.glob("images/*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in target.glob("images/*.png")}
    assert 4 <= len(finished) < 30
    out, _ = processes(module, 2, tmp_path)
    lines = sorted(x for x in out.splitlines() if x.startswith("process "))
    assert [x[:14] for x in lines] == ["process 1 of 2", "process 2 of 2"]
    assert all(int(x.split()[4]) > 0 for x in lines), lines  # both wrote files
    assert_same_samples(target, tmp_path / "alone")
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


def test_sample_options(model, tmp_path, capsys):
    common = ["--pipeline", model, "--num_images", "2", "--num_inference_steps", "2"]
    common += ["--device", "cpu"]
    for name, extra in {
        "saved": [],
        "hat": ["--scheduler", "ddim", "--eta", "1", "--reverse_variance", "sigma_hat"],
        "ddpm": ["--scheduler", "ddpm", "--variance_type", "fixed_large"],
        "half": ["--dtype", "bfloat16", "--format", "npz"],
    }.items():
        assert cli.main(["sample", *common, *extra, "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "grid.png").exists()
    capsys.readouterr()
    for extra, message in (
        (["--timestep_spacing", "trailing"], "--scheduler"),
        (["--eta", "0.5"], "eta"),
        (["--num_inference_steps", "0"], "num_inference_steps"),
        (["--device", "nowhere"], "--device"),
        (["--scheduler", "ddpm", "--reverse_variance", "sigma"], "--reverse_variance"),
    ):
        assert cli.main(["sample", *common, *extra, "--output", str(tmp_path / "bad")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()  # no settings that a corrected call would contradict


def test_the_preset_and_the_solver_are_flags(model, tmp_path, capsys):
    saved = DDPMPipeline.from_pretrained(model)
    noisy = GeneralizedDDIMScheduler(eta=1.0, reverse_variance="sigma_hat", timesteps=[700, 30])
    saved.register_modules(scheduler=noisy)
    saved.save_pretrained(tmp_path / "noisy")
    common = ["--num_images", "1", "--device", "cpu", "--output"]

    def config_of(*extra, pipeline=model):
        output = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        assert cli.main(["sample", "--pipeline", str(pipeline), *common, output, *extra]) == 0
        settings = json.loads((tmp_path / output / "sample.json").read_text())
        return settings["scheduler_config"], settings["job"]

    for pipeline in (model, tmp_path / "noisy"):
        config, given = config_of("--preset", "few", pipeline=pipeline)
        assert {key: config[key] for key in FEW_STEPS} == FEW_STEPS and config["eta"] == 0
        assert given["num_inference_steps"] == 10 and config["timesteps"] is None
    config, given = config_of("--preset", "calibrated", pipeline=tmp_path / "noisy")
    assert {key: config[key] for key in CALIBRATED} == CALIBRATED and config["eta"] is None
    config, given = config_of("--preset", "few", "--timesteps", "500", "3", "--solver_order", "3")
    assert config["solver_order"] == 3 and given["timesteps"] == [500, 3]
    config, _ = config_of("--preset", "few", "--solver_order", "1", "--num_inference_steps", "2")
    assert config["solver_order"] == 1 and not config["solver_corrector"]
    log_rho = ["--solver_variable", "log_rho", "--solver_weights", "bh1"]
    log_rho += ["--solver_corrector_order", "2"]
    config, _ = config_of("--preset", "few", *log_rho)
    assert (config["solver_variable"], config["solver_weights"]) == ("log_rho", "bh1")
    assert config["solver_corrector_order"] == 2
    words = ["--solver_order", "2", "--solver_form", "epsilon", "--lower_order_final"]
    words += ["--timestep_spacing", "quadratic", "--quadratic_end", "0.9", "--solver_corrector"]
    few = ["--num_inference_steps", "3", "--scheduler", "ddim"]
    config, _ = config_of(*few, *words, "--clip_sample_range", "0.5")
    expected = {"solver_order": 2, "solver_form": "epsilon", "lower_order_final": True}
    expected |= {"solver_corrector": True, "timestep_spacing": "quadratic", "quadratic_end": 0.9}
    assert expected.items() <= config.items() and config["clip_sample_range"] == 0.5
    words = ["--eta", "0.6", "--eta_interval", "0.2", "0.8", "--end_scale", "1.02"]
    config, _ = config_of(*few, *words, "--eps_scale", "1.01")
    expected = {"eta": 0.6, "eta_interval": [0.2, 0.8], "eps_scale": 1.01, "end_scale": 1.02}
    assert expected.items() <= config.items()
    config, _ = config_of(*few[:2], "--scheduler", "ddpm", "--eps_scale", "1.0", "1.02")
    assert config["eps_scale"] == [1.0, 1.02]
    capsys.readouterr()
    photo = str(tmp_path / "photo.png")
    Image.new("L", (SIZE, SIZE), 80).save(photo)
    output = ["--pipeline", model, "--device", "cpu", "--output", str(tmp_path / "bad")]
    for verb, extra, message in (
        ("sample", ["--num_images", "1", "--solver_order", "2"], "it needs --scheduler ddim"),
        (
            "sample",
            ["--num_images", "1", "--scheduler", "ddpm", "--preset", "few"],
            "`--preset` is 'few'",
        ),
        (
            "sample",
            ["--num_images", "1", "--scheduler", "ddpm", "--solver_order", "2"],
            "`--solver_order` is 2; it must be left out with --scheduler ddpm",
        ),
        (
            "reconstruct",
            ["--images", photo, "--preset", "few"],
            "`--preset` is 'few'; it must be left out here",
        ),
        (
            "reconstruct",
            ["--images", photo, "--end_scale", "1.1"],
            "`--end_scale` is 1.1; it must be left out here",
        ),
        (
            "sample",
            ["--num_images", "1", "--scheduler", "ddim", "--eps_scale", "1", "1", "1"],
            "`eps_scale` is [1.0, 1.0, 1.0]",
        ),
        ("interpolate", ["--images", photo, photo, "--solver_order", "2"], "must be left out here"),
    ):
        assert cli.main([verb, *output, *extra]) == 2
        assert message in capsys.readouterr().err
    words = ["interpolate", *output[:-1], str(tmp_path / "chain"), "--seeds", "1", "2"]
    assert cli.main([*words, "--preset", "few", "--num_points", "2"]) == 0


def test_reconstruct_and_interpolate_commands(model, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        array = rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
        Image.fromarray(array).save(source / f"{i}.png")
    common = ["--pipeline", model, "--device", "cpu", "--num_inference_steps", "3"]
    out = tmp_path / "reconstruct"
    arguments = [*common, "--images", str(source), "--output", str(out), "--refinements", "1"]
    assert cli.main(["reconstruct", *arguments]) == 0
    report = json.loads((out / "errors.json").read_text())
    assert list(report["error"]) == ["000000-0.png", "000001-1.png"] and report["steps"] == 3
    assert report["residual_max"] > 0 and isinstance(report["converged"], bool)
    assert load_file(out / "latents.safetensors")["latents"].shape == (2, 1, SIZE, SIZE)
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (4 * (64 + 2) + 2, 64 + 4)

    ddim = [*common, "--scheduler", "ddim", "--num_points", "3"]
    for name, extra, count in (
        ("chain", ["--seeds", "1", "2", "3"], 5),
        ("grid", ["--mode", "grid", "--seeds", "1", "2", "3", "4"], 9),
        ("images", ["--images", str(source)], 3),
        ("diffuse", ["--mode", "diffuse", "--images", str(source), "--timestep", "333"], 3),
    ):
        out = tmp_path / name
        assert cli.main(["interpolate", *ddim, *extra, "--output", str(out)]) == 0
        assert len(list((out / "images").glob("*.png"))) == count and (out / "grid.png").exists()
    capsys.readouterr()
    bad = [*ddim, "--mode", "diffuse", "--seeds", "1", "2", "--output", str(tmp_path / "bad")]
    assert cli.main(["interpolate", *bad]) == 2
    assert cli.main(["reconstruct", *common, "--images", "none", "--output", "x"]) == 2
    assert "does not exist" in capsys.readouterr().err
    cut = tmp_path / "cut.png"
    cut.write_bytes((source / "0.png").read_bytes()[:60])
    assert cli.main(["reconstruct", *common, "--images", str(cut), "--output", "x"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_images_of_another_run_are_not_mixed_with_those_of_this_one(model, tmp_path, capsys):
    common = ["--pipeline", model, "--device", "cpu", "--num_inference_steps", "2"]
    photos = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for photo in photos:
        Image.new("L", (SIZE, SIZE), 80).save(photo)
    chain = ["interpolate", "--scheduler", "ddim", "--num_points", "3", "--seeds", "1", "2"]
    for first, other in (
        (["reconstruct", "--images", *photos], ["reconstruct", "--images", photos[0]]),
        ([*chain, "3"], chain),
    ):
        out = tmp_path / first[0]
        where = [*common, "--output", str(out)]
        assert cli.main([*first, *where]) == 0
        before = content(out)
        assert cli.main([*other, *where]) == 2
        assert "holds images of another run" in capsys.readouterr().err
        assert content(out) == before
        assert cli.main([*first, *where]) == 0  # the same run again is no other


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    pipe = GenerationPipeline(tiny_unet(), GeneralizedDDIMScheduler())
    with pytest.raises(ValueError, match="`output` is .*taken' is a file"):
        sample_to_directory(pipe, tmp_path / "taken", SamplingJob(1, num_inference_steps=2))
    assert (tmp_path / "taken").read_text() == "mine"


class _NeverLoaded:
    def __call__(self, *args, **kwargs):
        raise AssertionError("the model was loaded")


@pytest.mark.parametrize("verb", ["sample", "reconstruct", "interpolate"])
def test_a_bad_output_is_found_before_the_model_is_loaded(
    verb, model, tmp_path, monkeypatch, capsys
):
    photo = tmp_path / "photo.png"
    Image.new("L", (SIZE, SIZE), 80).save(photo)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "images").write_text("in the way")
    (tmp_path / "sealed").mkdir()
    given = {
        "sample": ["--num_images", "1"],
        "reconstruct": ["--images", str(photo)],
        "interpolate": ["--images", str(photo), str(photo)],
    }[verb]
    from ddim_schedulers.training.commands import _loading

    monkeypatch.setattr(_loading, "load", _NeverLoaded())
    writable = os.access
    monkeypatch.setattr(  # root may write everywhere
        os, "access", lambda p, mode: "sealed" not in str(p) and writable(p, mode)
    )
    for output, message in (
        (photo, "photo.png' is a file; it must be a folder"),
        (photo / "below" / "it", "photo.png' is a file; it must be a folder"),
        (tmp_path / "half", "images' is a file; it must be a folder"),
        (tmp_path / "sealed" / "new", "nothing can be written to"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        assert cli.main([verb, "--pipeline", model, *given, "--output", str(output)]) == 2
        err = capsys.readouterr().err
        assert message in err and "`--output` is" in err and err.count("\n") == 1
    assert not (tmp_path / "sealed" / "new").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_the_output_is_tried_before_the_work(model, tmp_path, monkeypatch, capsys, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    photo = str(tmp_path / "photo.png")
    Image.new("L", (SIZE, SIZE), 80).save(photo)
    place, data = ["--pipeline", model], ["--data", "digits", "--cpu"]
    for verb, option, extra in (
        ("sample", "--output", [*place, "--num_images", "1"]),
        ("reconstruct", "--output", [*place, "--images", photo]),
        ("interpolate", "--output", [*place, "--seeds", "1", "2"]),
        ("likelihood", "--output_dir", [*place, *data]),
        ("calibrate", "--output", [*place, *data]),
        ("export", "--output", place),
        ("convert", "--output", ["--checkpoint", photo]),
        ("train", "--output_dir", ["--cpu", "--progress_bar", "false"]),
        ("demo", "--output", ["--quick"]),
    ):
        assert cli.main([verb, *extra, option, str(tmp_path / "out")]) == 2, verb
        err = capsys.readouterr().err.splitlines()[-1]
        assert f"{option.lstrip('-')}` is" in err and os.strerror(number) in err, (verb, err)
        assert not (tmp_path / "out").exists()


def test_another_scheduler_rescues_a_repository_whose_own_does_not_fit(tmp_path, capsys):
    pipe = DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler())
    pipe.register_modules(scheduler=EulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "euler")
    common = ["sample", "--pipeline", str(tmp_path / "euler"), "--device", "cpu"]
    common += ["--num_images", "1", "--num_inference_steps", "2"]
    for name in ("ddim", "ddpm"):
        output = str(tmp_path / name)
        assert cli.main([*common, "--scheduler", name, "--output", output]) == 0
    capsys.readouterr()
    assert cli.main([*common, "--output", str(tmp_path / "saved")]) == 2
    err = capsys.readouterr().err
    assert "EulerDiscreteScheduler" in err and "use --scheduler ddim or ddpm" in err
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "flow")
    common[2] = str(tmp_path / "flow")
    assert cli.main([*common, "--scheduler", "ddim", "--output", str(tmp_path / "flow-out")]) == 2


def test_settings_that_a_portable_export_leaves_out_are_said(tmp_path, capsys):
    ours = GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="quadratic")
    plain = GeneralizedDDIMScheduler()
    for name, scheduler in (("set", ours), ("plain", plain)):
        stock, _ = to_portable(scheduler)
        DDIMPipeline(unet=tiny_unet(), scheduler=stock).save_pretrained(tmp_path / name)

    def said(name, *extra):
        common = ["sample", "--pipeline", str(tmp_path / name), "--num_images", "1"]
        common += ["--num_inference_steps", "2", "--device", "cpu", *extra]
        assert cli.main([*common, "--output", str(tmp_path / f"out{len(extra)}-{name}")]) == 0
        return [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]

    (line,) = said("set")
    assert "DDIMScheduler stands in for GeneralizedDDIMScheduler" in line
    assert "eta=1.0, timestep_spacing='quadratic'; --scheduler ddim does" in line
    assert "eta" not in said("set", "--eta", "1")[0]
    assert said("set", "--scheduler", "ddim", "--no-clip_sample") == said("plain") == []


@pytest.mark.parametrize("found", [False, True])
def test_the_bar_counts_steps(tmp_path, capsys, found):
    pipe = pipeline()
    if found:  # the first of three chunks is there
        sample_to_directory(pipe, tmp_path, job(num_images=4))
    pipe.set_progress_bar_config(disable=False)
    sample_to_directory(pipe, tmp_path, job())
    err = capsys.readouterr().err
    assert "10 images, steps: 100%" in err and "9/9 " in err


def test_clipping_of_a_network_that_was_trained_little_is_not_reported(tmp_path, monkeypatch):
    """A grey one clips a tenth of its values; in colour the same share may be that of latents."""
    monkeypatch.setattr(ClipCounter, "share", lambda self: 0.1)
    said = []
    monkeypatch.setattr(observers.logger, "warning", said.append)
    sample_to_directory(pipeline(1), tmp_path / "grey", job())
    pipeline(1)(seeds=[0], num_inference_steps=1)
    assert said == []
    sample_to_directory(pipeline(3), tmp_path / "colour", job())
    assert len(said) == 1


def test_clipping_is_reported_once_for_all_chunks(tmp_path, monkeypatch):
    pipe, shares = pipeline(3), iter([0.0, 0.03, 0.3])
    monkeypatch.setattr(ClipCounter, "share", lambda self: next(shares))
    said = []
    monkeypatch.setattr(observers.logger, "warning", said.append)
    sample_to_directory(pipe, tmp_path, job())  # 4 + 4 + 2 images
    assert len(said) == 1 and "Clipping cut 7.2%" in said[0]
    shares = iter([0.3])
    pipe(seeds=[0], num_inference_steps=1)  # a call of its own says it itself
    assert len(said) == 2


def test_a_bad_pipeline_is_one_sentence(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    shutil.copytree(model, tmp_path / "headless")
    shutil.rmtree(tmp_path / "headless" / "unet")
    for place, message in (
        ("./my-modle", "'./my-modle', which does not exist"),
        ("runs/digits/pipelin", "does not exist"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path / "file"), "a file; it must be"),
        (str(tmp_path / "empty"), "no model_index.json"),
        (str(tmp_path / "broken"), "cannot be read"),
        (str(tmp_path / "headless"), "has no unet"),
        (str(tmp_path.relative_to(tmp_path.anchor)), "does not exist"),
        ("runs/nothing", "'runs/nothing', which does not exist"),
        ("nobody/nothing", "which is no folder here; as a name on the Hub"),
    ):
        arguments = ["--pipeline", place, "--num_images", "1", "--output", str(tmp_path / "out")]
        assert cli.main(["sample", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        said = [line for line in err.splitlines() if "looked for on the Hub" not in line]
        # the Hub is asked for what cannot be a folder's name here, and not before that is said
        assert len(said) == 1 and (len(err.splitlines()) == 2) == (place == "nobody/nothing")


def test_options_without_effect_are_refused_and_hints_name_options(model, tmp_path, capsys):
    photo = str(tmp_path / "photo.png")
    Image.new("L", (SIZE, SIZE), 80).save(photo)
    seeds, images = ["--seeds", "1", "2"], ["--images", photo, photo]
    ddim = ["--scheduler", "ddim"]
    diffuse = ["--mode", "diffuse", "--timestep", "333", *images]
    pipe = DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler())
    pipe.register_modules(scheduler=DPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path / "dpm")
    for verb, extra, message in (
        (
            "interpolate",
            [*ddim, *seeds, "--refinements", "4"],
            "`--refinements` is 4; it must be left out",
        ),
        (
            "interpolate",
            [*diffuse, "--refinements", "4"],
            "`--refinements` is 4; it must be left out",
        ),
        (
            "interpolate",
            [*ddim, *seeds, "--noise", "same"],
            "`--noise` is 'same'; it must be left out",
        ),
        ("interpolate", [*images, "--seed", "0"], "`--seed` is 0; it must be left out"),
        ("reconstruct", ["--images", photo, "--tolerance", "1e-3"], "without --refinements"),
        ("interpolate", seeds, "use --scheduler ddim"),
        ("interpolate", ["--pipeline", str(tmp_path / "dpm"), *images], "use --scheduler ddim"),
        ("sample", ["--num_images", "1", "--eta", "0.5"], "use --scheduler ddim"),
        ("sample", ["--num_images", "1", "--scheduler", "ddpm", "--eta", "1"], "--scheduler ddim"),
    ):
        common = ["--pipeline", model, "--device", "cpu", "--output", str(tmp_path / "out")]
        assert cli.main([verb, *common, *extra]) == 2
        err = capsys.readouterr().err
        assert message in err and "from_config" not in err, (verb, extra, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "defaults"),
    [
        ("sample", {"seed": "0", "format": "png"}),
        ("reconstruct", {"refinements": "0", "tolerance": "0.0001"}),
        ("interpolate", {"num_points": "8", "noise": "separate", "seed": "0"}),
    ],
)
def test_help_shows_defaults_and_choices(verb, defaults, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    shared = {"batch_size": "64", "dtype": "float32", "scheduler": "saved"}
    for option, default in {**shared, **defaults}.items():
        text = re.search(rf"\n  --{option} (.*?)(?=\n  --|\Z)", out, re.DOTALL)[1]
        assert f"({default})" in text, option
    choices = re.search(r"\n  --timestep_spacing {(.*?)}", out)[1]
    with pytest.raises(ValueError, match="must be one of") as refused:
        GeneralizedDDIMScheduler(timestep_spacing="none")
    assert set(choices.split(",")) == set(re.findall(r"'(\w+)'", str(refused.value))) - {"none"}


@pytest.mark.parametrize(
    "cls", [GeneralizedDDIMScheduler, MarkovianDDPMScheduler, DDPMScheduler, DDIMScheduler]
)
def test_a_setting_that_an_earlier_version_did_not_know_counts_as_its_default(cls, tmp_path):
    """Of job, scheduler and network: a new one needs no list, and refuses no earlier folder."""
    pipe, job = GenerationPipeline(tiny_unet(), cls()), SamplingJob(4, 4, num_inference_steps=2)
    files = sampling_files.SamplingFiles(tmp_path, job, 0, pipe.image_shape)
    now, defaults = sampling_job.settings_of(pipe, job), sampling_job.defaults_of_settings(pipe)
    checked = 0
    for group in ("job", "scheduler_config", "network_config"):
        for name, value in now[group].items():
            then = {**now, group: {k: v for k, v in now[group].items() if k != name}}
            (tmp_path / "sample.json").write_text(json.dumps(then))
            default = defaults.get(f"{group}.{name}")
            if value == default:
                files.compare(now, defaults)
                checked += 1
            else:
                lacks = re.escape(f"{group}.{name}: {default!r} there, {value!r} now")
                with pytest.raises(ValueError, match=f"other settings .{lacks}"):
                    files.compare(now, defaults)
    assert checked > 20
