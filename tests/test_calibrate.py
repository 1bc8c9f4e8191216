"""Calibration and the likelihood of a saved pipeline: same numbers whoever computes them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.export import export_folder
from ddim_schedulers.likelihood import make_chain, variational_bound
from ddim_schedulers.pipelines.files import write_atomically
from ddim_schedulers.reading import safetensors_header
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common import storage
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.likelihood import calibration, error_sweep, table
from ddim_schedulers.training.likelihood.calibration import calibrate, save_calibration
from ddim_schedulers.training.likelihood.error_sweep import run_error_sweep
from ddim_schedulers.training.likelihood.measured_model import (
    load_measured_model,
    measured_model_of,
)
from ddim_schedulers.training.likelihood.table import LikelihoodSettings, evaluate

STEPS = 12


def _unet(channels=1, out=1, **settings):
    return tiny_unet(channels, blocks=(8, 8), out_channels=out, **settings)


def _stock(**settings):
    return DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.5, **settings)


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline"
    DDPMPipeline(_unet(), _stock()).save_pretrained(folder)
    return folder


def _images(count=6):
    levels = torch.randint(0, 17, (count, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    return levels.float() / 8 - 1


class _Part(Team):
    def __init__(self, index, count):
        self.index, self.count = index, count


def test_the_fingerprint_does_not_depend_on_the_memory_format():
    plain = measured_model_of(_unet(), dict(_stock().config))
    last = measured_model_of(_unet().to(memory_format=torch.channels_last), dict(_stock().config))
    assert last.fingerprint() == plain.fingerprint()
    with torch.no_grad():
        last.unet.conv_in.weight[0, 0, 0, 0] += 1
    assert last.fingerprint() != plain.fingerprint()


def test_statistics_are_what_they_say(tmp_path):
    model = measured_model_of(_unet(), dict(_stock().config))
    got, cost = calibrate(model, _images(), clip=1.0, batch_size=6, work_dir=tmp_path / "w")
    assert cost["network_calls"] == STEPS and got.num_images == 6
    t, x0 = 7, _images().double()
    noise = torch.randn(x0.shape, generator=error_sweep.generator(0, "pass", 0, t)).double()
    a = model.alpha_bar[t]
    x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).float()
    with torch.no_grad():
        eps = model.unet(x_t, torch.tensor([t])).sample.double()
    x0_hat = ((x_t.double() - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
    for name, square in (
        ("gamma", eps**2),
        ("eps_error", (noise - eps) ** 2),
        ("x0_error", (x0 - x0_hat) ** 2),
    ):
        per_image = square.flatten(1).mean(1)
        assert getattr(got, name)[t] == pytest.approx(float(per_image.mean()), rel=1e-6)
        error = float(per_image.std()) / math.sqrt(6)
        assert getattr(got, f"{name}_std_error")[t] == pytest.approx(error, rel=1e-6)


def test_any_number_of_processes_and_any_interruption_give_the_same(tmp_path, monkeypatch):
    model, images = measured_model_of(_unet(), dict(_stock().config)), _images(5)
    monkeypatch.setattr(error_sweep, "TIMESTEPS_PER_PART", 5)

    def go(folder, team=None, timesteps=range(STEPS), seed=0):
        return run_error_sweep(
            model,
            images,
            timesteps,
            clip=1.0,
            seed=seed,
            batch_size=2,
            work_dir=tmp_path / folder,
            team=team,
        )

    alone = go("one")
    assert alone.statistics.shape == (3, 5, STEPS) and alone.x0_hat.shape == images.shape
    assert alone.calls == 3 * STEPS
    # two processes share the parts; the second one here comes after the first has done its own
    parts = []
    real = error_sweep.measure
    monkeypatch.setattr(error_sweep, "measure", lambda *a: parts.append(a[-1]) or real(*a))
    with pytest.raises(ValueError, match="all processes see"):  # the other's parts are not there
        go("two", _Part(0, 2))
    first = len(parts)
    again = go("two", _Part(0, 1))
    assert 0 < first < len(parts) == 9
    assert torch.equal(again.statistics, alone.statistics)
    # interrupted: a part is missing and is computed again, nothing else
    victim = sorted((tmp_path / "one").glob("part-*"))[4]
    victim.unlink()
    parts.clear()
    resumed = go("one")
    assert len(parts) == 1 and resumed.calls == 5
    assert torch.equal(resumed.statistics, alone.statistics)
    # another seed or other timesteps must not mix with it
    for change, name in (({"seed": 1}, "seed"), ({"timesteps": [0, 3]}, "timesteps")):
        with pytest.raises(ValueError, match=name):
            go("one", **change)


def test_nobody_may_delete_the_parts_before_all_have_read_them(tmp_path, monkeypatch):
    events, real = [], error_sweep.read_sealed
    monkeypatch.setattr(
        error_sweep, "read_sealed", lambda *a, **k: events.append("read") or real(*a, **k)
    )
    team = Team()
    monkeypatch.setattr(team, "wait", lambda: events.append("wait"))
    run_error_sweep(
        measured_model_of(_unet(), dict(_stock().config)),
        _images(2),
        [0, 3],
        clip=1.0,
        seed=0,
        batch_size=1,
        work_dir=tmp_path,
        team=team,
    )
    assert events[-3:] == ["read", "read", "wait"]


def test_a_part_that_was_changed_is_measured_anew(tmp_path, monkeypatch, caplog):
    model, images = measured_model_of(_unet(), dict(_stock().config)), _images(4)

    def go(work="work"):
        return run_error_sweep(
            model,
            images,
            range(STEPS),
            clip=1.0,
            seed=0,
            batch_size=2,
            work_dir=tmp_path / work,
        )

    def values(change):
        """The part with other numbers in it, and the check sum that it had."""
        header = safetensors_header(whole, part)
        changed = {name: change(t.clone()) for name, t in load_tensors(whole).items()}
        return save_tensors(changed, header["__metadata__"])

    before = go()
    part, other = sorted((tmp_path / "work").glob("part-*"))
    whole = part.read_bytes()
    edits = {
        "empty": b"",
        "cut short": whole[:-1],
        "longer": whole + b"\0",
        "of another chunk": other.read_bytes(),
        "scaled": values(lambda t: t * 1.0000001),
        "NaN": values(lambda t: t * float("nan")),
        "negative": values(lambda t: -t),
        "without a check sum": storage.pack(load_tensors(whole)),
        "random": bytes(range(256)) * 8,
    }
    for place in range(8, len(whole), 97):
        edits[f"flipped at {place}"] = (
            whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        )
    for kind, data in edits.items():
        part.write_bytes(data)
        caplog.clear()
        again = go()
        assert again.calls == STEPS, kind
        assert "It is measured again." in caplog.text and part.name in caplog.text
        assert torch.equal(again.statistics, before.statistics), kind
        assert part.read_bytes() == whole
    assert go().calls == 0
    # what says of which pass the parts are
    claim = tmp_path / "work" / "pass.json"
    good = claim.read_bytes()
    for text in (b"", b"{", b"[]", b"[" * 10**5, good.replace(b"256", b"NaN"), b"\xff"):
        if text != good:
            claim.write_bytes(text)
            caplog.clear()
            assert go().calls == 0 and "made again" in caplog.text
            assert claim.read_bytes() == good
    # parts of an earlier version have no check sums: they are taken if they fit
    claim.write_bytes(storage.to_json({k: v for k, v in json.loads(good).items() if k != "sealed"}))
    for path in (part, other):
        path.write_bytes(storage.pack(load_tensors(path.read_bytes())))
    old = go()
    assert old.calls == 0 and torch.equal(old.statistics, before.statistics)
    part.write_bytes(storage.pack({"statistics": torch.full((3, 2, STEPS), float("nan"))}))
    again = go()
    assert again.calls == STEPS and torch.equal(again.statistics, before.statistics)


@pytest.mark.parametrize(
    "scheduler",
    [
        _stock(),
        DDIMScheduler(num_train_timesteps=STEPS, beta_end=0.5),
        MarkovianDDPMScheduler(num_train_timesteps=STEPS, beta_end=0.5),
        GeneralizedDDIMScheduler(num_train_timesteps=STEPS, beta_end=0.5, eta=0.3),
    ],
    ids=lambda s: type(s).__name__,
)
def test_statistics_reach_our_schedulers_from_any_config(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    model = measured_model_of(_unet(), dict(scheduler.config))
    got, _ = calibrate(model, _images(3), clip=1.0, work_dir=tmp_path / "work")
    file = tmp_path / "scheduler_config.json"
    save_calibration(got, file)
    save_calibration(got, file)
    again = type(scheduler).from_pretrained(tmp_path)
    for make in (GeneralizedDDIMScheduler, MarkovianDDPMScheduler):
        name = "reverse_variance" if make is GeneralizedDDIMScheduler else "variance_type"
        ours = make.from_config(again.config, timestep_spacing="optimal", **{name: "optimal"})
        assert ours.config.calibration["gamma"] == got.gamma
        ours.set_timesteps(4)
        assert ours.timesteps[0] == STEPS - 1 and ours.timesteps[-1] == 0
    if isinstance(scheduler, GeneralizedDDIMScheduler):
        assert again.config.eta == 0.3
    before = file.read_bytes()
    file.write_text("{}")
    with pytest.raises(ValueError, match="_class_name"):
        save_calibration(got, file)
    file.write_bytes(before)


def test_commands_from_end_to_end(pipeline, tmp_path, capsys):
    arguments = ["--pipeline", str(pipeline), "--data", "digits", "--cpu", "--num_images", "4"]
    assert main(["likelihood", *arguments, "--output_dir", str(tmp_path), "--variances", "optimal"])
    assert "calibrate" in capsys.readouterr().err
    assert main(["calibrate", *arguments, "--batch_size", "3"]) == 0
    out = capsys.readouterr().out
    assert f"{2 * STEPS} network calls" in out and "gamma" in out
    config = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    kept = config["_ddim_schedulers"]["settings"]["calibration"]
    assert config["_class_name"] == "DDPMScheduler" and kept["num_images"] == 4
    assert not (pipeline / "scheduler" / "calibration-parts").exists()
    DDPMPipeline.from_pretrained(pipeline)
    code = main(
        [
            "likelihood",
            *arguments,
            *("--part", "held_out", "--output", str(tmp_path / "out"), "--steps", "3", "12"),
            *("--trajectories", "even", "optimal", "--work_dir", str(tmp_path / "elsewhere")),
        ]
    )
    assert code == 0
    report = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    table = (tmp_path / "out" / "likelihood.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 2 + 6
    assert (tmp_path / "out" / "likelihood.png").read_bytes().startswith(b"\x89PNG")
    rows = {(r["trajectory"], r["variance"], r["steps"]): r for r in report["rows"]}
    assert len(rows) == 12 and report["settings"]["num_bins"] == 17
    for row in rows.values():
        parts = row["prior"]["mean"] + row["rate"]["mean"] + row["decoder"]["mean"]
        assert row["total"]["mean"] == pytest.approx(parts)
        assert row["total"]["std_error"] > 0 and row["timesteps"][-1] == 0
        assert len(row["curve"]) == row["steps"]
    for variance in ("fixed_small", "fixed_large", "optimal"):
        whole = rows["even", variance, 12]["total"]["mean"]
        assert rows["optimal", variance, 12]["total"]["mean"] == whole
        few = [rows[tau, variance, 3]["total"]["mean"] for tau in ("optimal", "even")]
        assert few[0] <= few[1] + 1e-9 or variance == "optimal"


def test_the_table_is_the_bound_of_each_chain(tmp_path, monkeypatch):
    model, images = measured_model_of(_unet(), dict(_stock().config)), _images(4)
    settings = LikelihoodSettings(
        steps=(4,), variances=("fixed_small", "fixed_large"), num_bins=17, batch_size=4
    )
    report = evaluate(model, images, settings, tmp_path / "a")
    tau = report["rows"][0]["timesteps"]

    seen = []
    real = torch.randn

    class _Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def randn(shape, generator=None):
            value = real(shape, generator=error_sweep.generator(0, "pass", 0, tau[len(seen)]))
            seen.append(1)
            return value

    monkeypatch.setattr("ddim_schedulers.likelihood.bound.torch", _Torch())
    chain = make_chain(model.alpha_bar, tau, "fixed_large")
    terms = variational_bound(model.predict_mean, images, chain, clip=1.0, num_bins=17)
    want = float(terms.total.mean()) / 64 / math.log(2)
    assert report["rows"][1]["total"]["mean"] == pytest.approx(want, rel=1e-9)


def test_learned_variance_and_subsets_of_t(tmp_path):
    model = measured_model_of(_unet(out=2), dict(_stock(variance_type="learned_range").config))
    assert model.learned
    settings = LikelihoodSettings(
        steps=(STEPS,), variances=("learned_range", "fixed_large"), num_bins=17, batch_size=2
    )
    images = _images(3)
    full = evaluate(model, images, settings, tmp_path)
    assert [row["calls_per_image"] for row in full["rows"]] == [STEPS, STEPS]
    assert full["cost"]["network_calls"] == 2 * 2 * STEPS
    for estimator in ("stratified", "importance"):
        part = dataclasses.replace(settings, estimator=estimator, num_calls=5)
        report = evaluate(model, images, part, tmp_path)
        for row, whole in zip(report["rows"], full["rows"], strict=True):
            assert row["calls_per_image"] == 5 and "curve" not in row
            assert row["decoder"]["mean"] == pytest.approx(whole["decoder"]["mean"], abs=1e-3)
            assert row["total"]["mean"] == pytest.approx(whole["total"]["mean"], rel=1.0)
        with pytest.raises(ValueError, match="estimator 'all'"):
            table.plot(report, tmp_path / "no.png")


def test_two_processes_really_share_the_work(pipeline, tmp_path, processes, assert_close):
    arguments = ["--pipeline", str(pipeline), "--data", "digits", "--num_images", "4"]
    arguments += ["--batch_size", "2"]
    # nobody needs to say so where there is nothing but a CPU
    arguments += ["--cpu"] if torch.accelerator.is_available() else []
    assert main(["calibrate", *arguments]) == 0
    file = pipeline / "scheduler" / "scheduler_config.json"
    alone = json.loads(file.read_text())
    command = ["-m", "ddim_schedulers.training.cli", "calibrate", *arguments]
    out, err = processes(command, 2, tmp_path)
    assert "2 processes" in out
    assert "process 0: part" in err and "process 1: part" in err
    together = json.loads(file.read_text())
    assert_close(together, alone)
    together["_ddim_schedulers"]["settings"]["calibration"]["gamma"][1] *= 1.001
    with pytest.raises(AssertionError, match="gamma"):
        assert_close(together, alone)


def _die(file):
    raise RuntimeError


def test_a_finished_pass_deletes_its_own_files_alone(pipeline, tmp_path):
    work, own = tmp_path / "results", tmp_path / "parts"
    work.mkdir()
    (work / "mine.txt").write_text("kept")
    with pytest.raises(RuntimeError):  # a run that died while it was writing
        write_atomically(work / "part-00007-00000.safetensors", _die)
    arguments = ["calibrate", "--pipeline", str(pipeline), "--data", "digits", "--num_images", "2"]
    for folder in (work, own):
        assert main([*arguments, "--cpu", "--work_dir", str(folder)]) == 0
    assert [path.name for path in work.iterdir()] == ["mine.txt"]
    assert not own.exists()


@pytest.mark.parametrize(
    "member",
    [
        {"eta": 1.0, "reverse_variance": "sigma_hat"},
        {"solver_order": 3, "solver_form": "epsilon", "solver_corrector": True, "eta": 0.5},
    ],
)
def test_the_fine_trajectory_is_the_ode_whatever_the_config_samples_with(member):
    settings = {"num_train_timesteps": STEPS, "beta_end": 0.5}
    plain, other = (
        calibration.measure_trajectory(
            measured_model_of(_unet(), dict(GeneralizedDDIMScheduler(**settings, **own).config)),
            num_samples=2,
            steps=6,
        )[0]
        for own in ({}, member)
    )
    assert other == plain


def test_a_calibration_is_undone_and_written_elsewhere(pipeline, tmp_path, capsys):
    file = pipeline / "scheduler" / "scheduler_config.json"
    words = ["calibrate", "--pipeline", str(pipeline), "--cpu", "--num_images", "2"]
    likelihood, fine = (
        ["--data", "digits"],
        ["--objective", "trajectory", "--trajectory-steps", "6"],
    )
    history = [file.read_bytes()]
    assert main([*words[:3], "--undo"]) == 2
    assert "no earlier config is kept" in capsys.readouterr().err
    assert main([*words, *fine, "--output", str(tmp_path / "else" / "where")]) == 0
    assert main([*words, *fine, "--output", str(tmp_path / "one.json")]) == 0
    assert file.read_bytes() == history[0] and len(list(file.parent.iterdir())) == 1
    for written in (tmp_path / "else" / "where" / file.name, tmp_path / "one.json"):
        config = json.loads(written.read_text())
        kept = GeneralizedDDIMScheduler.from_config(config).config
        assert "trajectory" in kept.calibration and kept.num_train_timesteps == STEPS
    for measured in (likelihood, fine, fine):
        assert main([*words, *measured]) == 0
        history.append(file.read_bytes())
    assert history[3] == history[2]  # the same again replaces nothing
    kept = sorted(path.name for path in file.parent.iterdir())
    assert kept == [file.name, f"{file.name}.1.bak", f"{file.name}.2.bak"]
    assert not [name for name in export_folder(pipeline).files if name.endswith(".bak")]
    for before in (history[1], history[0]):
        assert main([*words[:3], "--undo"]) == 0
        assert file.read_bytes() == before
    assert main([*words[:3], "--undo"]) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_trajectory_alone_leaves_the_likelihood_as_it_was(pipeline, tmp_path, capsys):
    words = ["--pipeline", str(pipeline), "--cpu", "--num_images", "2"]
    measure = ["likelihood", *words, "--data", "digits", "--steps", "3", "--output_dir"]
    tables = [tmp_path / name / "likelihood.md" for name in ("before", "after")]
    assert main([*measure, str(tables[0].parent)]) == 0
    fine = ["--objective", "trajectory", "--trajectory_steps", "6"]
    assert main(["calibrate", *words, *fine]) == 0
    assert main([*measure, str(tables[1].parent)]) == 0
    assert tables[0].read_text() == tables[1].read_text()
    estimator = ["--estimator", "importance", "--num_calls", "2"]
    assert main([*measure, str(tmp_path / "chosen"), *estimator]) == 0
    capsys.readouterr()
    assert main([*measure, str(tmp_path / "optimal"), "--variances", "optimal"]) == 2
    assert "no statistics of its timesteps (`gamma`" in capsys.readouterr().err
    sample = ["sample", *words, "--num_inference_steps", "3", "--output", str(tmp_path / "s")]
    del sample[3]  # --cpu is --device cpu here
    for option in (
        ["--scheduler", "ddim", "--reverse_variance", "optimal"],
        ["--scheduler", "ddim", "--timestep_spacing", "optimal"],
        ["--scheduler", "ddpm", "--variance_type", "optimal"],
    ):
        assert main([*sample, "--device", "cpu", *option]) == 2
        assert "holds a trajectory alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: measured_model_of(_unet(class_embed_type="identity"), dict(_stock().config)),
            "`class_embed_type` is 'identity'; it must be null",
        ),
        (lambda: measured_model_of(_unet(out=3), dict(_stock().config)), "channels"),
        (lambda: load_measured_model("no/such/folder"), "pipeline"),
        (lambda: calibration.choose_images(5, 6, 0), "num_images"),
        (lambda: calibration.choose_images(5, 1, 0), "num_images"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "command, message",
    [
        (["calibrate", "--num_images", "9999"], "num_images"),
        (["calibrate", "--undo"], "`--data` is 'digits'; it does nothing with --undo"),
        (["calibrate", "--objective", "trajectory"], "nothing with --objective trajectory"),
        (["calibrate", "--trajectory_steps", "6"], "`--trajectory_steps` is 6; it does nothing"),
        (["likelihood", "--output_dir", "o", "--eta", "0"], "infinite"),
        (["likelihood", "--output_dir", "o", "--bins", "256"], "equally spaced"),
        (["likelihood", "--output_dir", "o", "--trajectories", "optimal"], "calibrat"),
        (["likelihood", "--output_dir", "o", "--variances", "learned_range"], "learned_range"),
        (["likelihood", "--output_dir", "o", "--steps", "13"], "num_inference_steps"),
        (["likelihood", "--output_dir", "o", "--batch_size", "0"], "batch_size"),
        (["likelihood", "--output_dir", "o", "--bins", "0"], "num_bins"),
        (["likelihood", "--output_dir", "o", "--num_calls", "4"], "num_calls"),
        (["calibrate", "--num_images", "2", "--batch_size", "-1"], "batch_size"),
    ],
)
def test_bad_flags_are_told_in_one_line(pipeline, tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    verb, *rest = command
    arguments = ["--pipeline", str(pipeline), "--data", "digits", "--cpu"]
    steps = [] if "--steps" in rest or verb == "calibrate" else ["--steps", "4"]
    assert main([verb, *arguments, *rest, *steps]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "idle",
    ["--clip on", "--work_dir w", "--fit pad", "--value_range 0 1", "--part all"],
)
@pytest.mark.parametrize("kind", ["--undo", "--objective trajectory"])
def test_a_flag_that_would_do_nothing_is_refused(pipeline, capsys, kind, idle):
    words = [*kind.split(), *idle.split()]
    assert main(["calibrate", "--pipeline", str(pipeline), *words]) == 2
    assert f"does nothing with {kind}, leave it out" in capsys.readouterr().err


def test_images_of_another_kind_are_refused(pipeline, tmp_path, capsys):
    np.save(tmp_path / "colour.npy", np.zeros((4, 8, 8, 3), np.uint8))
    np.save(tmp_path / "small.npy", np.zeros((4, 6, 6), np.uint8))
    np.save(tmp_path / "real.npy", np.zeros((4, 8, 8), np.float32))
    arguments = ["likelihood", "--pipeline", str(pipeline), "--cpu", "--num_images", "2"]
    arguments += ["--steps", "3", "--output_dir", str(tmp_path / "o")]
    for name, extra, message in (
        ("colour", [], "channels"),
        ("small", [], "fit"),
        ("real", ["--value_range", "0", "1"], "continuous"),
    ):
        assert main([*arguments, "--data", str(tmp_path / f"{name}.npy"), *extra]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, "--data", str(tmp_path / "small.npy"), "--fit", "pad"]) == 0
