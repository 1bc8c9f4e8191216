"""The evaluation: what is asked for, that it is measured on the right images, and by whom."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from importlib.resources import files
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.ownership import FolderInUseError
from ddim_schedulers.reading import safetensors_header
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common import storage
from ddim_schedulers.training.evaluation import cells
from ddim_schedulers.training.evaluation.cells import Evaluation
from ddim_schedulers.training.evaluation.config import load_evaluation, parse_evaluation
from ddim_schedulers.training.evaluation.references import RealImages, to_uint8
from ddim_schedulers.training.evaluation.report import markdown, short
from ddim_schedulers.training.evaluation.results import run
from ddim_schedulers.training.evaluation.tables import pivot, unsaid_lines
from ddim_schedulers.training.metrics import features as spaces
from ddim_schedulers.training.metrics.distances import frechet_distance

STEPS = 12
EXPECTED = {
    "row": "eta 0, trailing",
    "steps": 2,
    "features": "pixels",
    "metric": "frechet",
    "value": 1.0,
    "tolerance": 0.1,
    "source": "someone",
}
GRID = [
    {"steps": [2, 3], "members": [0, "sigma-hat"], "repeats": 2},
    {"steps": [2], "schedulers": [{"class": "DDIMScheduler"}]},
]
ONE_CELL = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}]


@pytest.fixture(scope="module")
def pipeline(tiny_ddpm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.5)
    tiny_ddpm(scheduler).save_pretrained(folder)
    return folder


def _settings(pipeline, output, **changes):
    return {
        "pipeline": str(pipeline),
        "output_dir": str(output),
        "data": {"data": "digits"},
        "features": ["pixels"],
        "batch_size": 4,
        "tables": [{"name": "First", "n": 10, "grid": GRID}],
        **changes,
    }


def _config(*arguments, **changes):
    return parse_evaluation(_settings(*arguments, **changes))


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """A finished evaluation with two feature spaces, its results and its folder."""
    output = tmp_path_factory.mktemp("evaluation")
    settings = _settings(
        pipeline, output, features=["pixels", "classifier"], classifier_epochs=1, keep_images=True
    )
    (output / "e.yaml").write_text(yaml.safe_dump(settings))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(["evaluate", "--config", str(output / "e.yaml"), "--cpu"]) == 0
    (output / "said.txt").write_text(said.getvalue())
    return output, json.loads((output / "metrics.json").read_text())


def test_every_cell_is_there_with_its_n_and_its_cost(whole):
    output, results = whole
    (table,) = results["tables"]
    assert table["n"] == 10 and not table["missing"]
    cells = {(c["row"], c["steps"]): c for c in table["cells"]}
    rows = {"eta 0, trailing", "sigma-hat, trailing"}
    assert set(cells) == {(row, s) for row in rows for s in (2, 3)} | {("DDIM", 2)}
    for (row, steps), cell in cells.items():
        assert cell["n"] == 10 and cell["network_calls"] == steps and cell["seconds"] > 0
        assert cell["repeats"] == (1 if row == "DDIM" else 2)
        for name in ("pixels", "classifier"):
            measured = cell["metrics"][name]
            assert (measured["frechet"]["std"] is None) == (cell["repeats"] == 1)
            assert ("inception_score" in measured) == (name == "classifier")
    assert results["classifier"]["classes"] == 10


def test_the_name_of_a_row_is_true_whatever_the_pipeline_samples_with(tiny_ddpm, tmp_path):
    plain = {"num_train_timesteps": STEPS, "beta_end": 0.5}
    solver = {"solver_order": 2, "solver_corrector": True, "solver_form": "epsilon"}
    own = {**solver, "lower_order_final": True, "steps_offset": 1, "clip_sample": False}
    grid = [
        {"steps": [3], "members": [0], "settings": {"clip_sample": False}},
        {"steps": [3], "members": [0], "settings": {"solver_order": 3}},
        {
            "steps": [3],
            "schedulers": [
                {"class": "GeneralizedDDIMScheduler", "timestep_spacing": "trailing"},
                {"name": "mine", "class": "GeneralizedDDIMScheduler", "eta": 1.0},
            ],
        },
    ]
    tables, found = [{"name": "First", "n": 10, "grid": grid}], []
    for name, settings in (("plain", {}), ("own", own)):
        tiny_ddpm(GeneralizedDDIMScheduler(**plain, **settings)).save_pretrained(tmp_path / name)
        config = _config(tmp_path / name, tmp_path / f"{name}-out", tables=tables)
        evaluation = Evaluation(config)
        found.append([evaluation._pipe_of(cell).scheduler.config for cell in config.cells])
        unsaid = {cell.sampler.name: evaluation.unsaid(cell) for cell in config.cells}
    member, chosen, auto, mine = (cell.sampler.name for cell in config.cells)
    assert (member, chosen) == ("eta 0, trailing", "eta 0, trailing, solver_order 3")
    keys = [*solver, "lower_order_final", "steps_offset", "eta", "timestep_spacing", "sigma"]
    assert all(found[0][0][key] == found[1][0][key] for key in keys)
    assert unsaid == {
        member: {"clip_sample": False},
        chosen: {"clip_sample": False},
        auto: own,
        mine: {**own, "eta": 1.0},
    }
    said = unsaid_lines({"unsaid": unsaid})[0]
    assert "`solver_order=2`" in said and f"`clip_sample=False` in {member}; {chosen}" in said
    assert unsaid_lines({"unsaid": {member: {}}}) == unsaid_lines({}) == []


def test_the_terminal_shows_the_steps_of_a_cell_and_a_short_table(whole):
    output, results = whole
    said = (output / "said.txt").read_text()
    assert "10 images, steps:" in said and "/9" in said  # 3 chunks of S = 3
    assert short(results) in said and "precision" not in said
    assert "| eta 0, trailing |" in short(results) and short(results).count("\n") < 40


def test_every_cell_says_with_what_it_was_sampled(whole):
    output, results = whole
    (note,) = results["made_with"]
    assert note["cells"] == 9 and note["commit"] == results["commit"]
    cell = json.loads((output / "cells" / "ddim-S2-n10-r0.json").read_text())
    assert {**cell["made_with"], "cells": 9} == note
    at = f"commit {note['commit']}" if note["commit"] else "no commit"
    assert f"9 cells: {at}, cpu, {note['threads']} threads" in (output / "report.md").read_text()


def test_a_classifier_that_was_trained_in_another_way_is_not_taken_for_the_one_asked_for(whole):
    output, _ = whole
    settings = yaml.safe_load((output / "e.yaml").read_text())
    for changes, said in (
        (
            {"classifier_epochs": 2},
            "a classifier made with other .* .epochs: 1 there, 2 now.",
        ),
        ({"seed": 5}, ".seed: 0 there, 5 now."),
    ):
        with pytest.raises(ValueError, match=said):
            Evaluation(parse_evaluation({**settings, **changes}))
    named = {"classifier": str(output / "classifier.safetensors"), "classifier_epochs": 2}
    real = Evaluation(parse_evaluation({**settings, **named})).real
    assert real.features["classifier"].fingerprint


def test_a_measurement_is_that_of_the_stored_images_and_the_training_images(whole):
    output, results = whole
    folder = output / "cells" / "eta-0-trailing-S2-n10-r1"
    shards = sorted((folder / "shards").iterdir())
    images = np.concatenate([np.load(shard)["images"] for shard in shards])
    seeds = np.concatenate([np.load(shard)["seeds"] for shard in shards])
    assert images.dtype == np.uint8 and seeds.tolist() == list(range(10, 20))
    from ddim_schedulers.training.data.images import digits

    space = spaces.make_feature_space("pixels", (1, 8, 8))
    # 17 grey levels through uint8, on both sides
    real = ((digits("train").all() + 1) * 127.5).round() / 127.5 - 1
    fake = torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1
    want = frechet_distance(space(real), space(fake))
    cell = json.loads(folder.with_suffix(".json").read_text())
    assert cell["metrics"]["pixels"]["frechet"] == pytest.approx(want, rel=1e-6)
    (table,) = results["tables"]
    row = next(c for c in table["cells"] if (c["row"], c["steps"]) == ("eta 0, trailing", 2))
    other = json.loads((output / "cells" / "eta-0-trailing-S2-n10-r0.json").read_text())
    pair = [want, other["metrics"]["pixels"]["frechet"]]
    assert row["metrics"]["pixels"]["frechet"]["mean"] == pytest.approx(np.mean(pair), rel=1e-6)
    assert row["metrics"]["pixels"]["frechet"]["std"] == pytest.approx(np.std(pair, ddof=1))


def test_real_images_come_out_better_than_samples_of_an_untrained_network(whole):
    _, results = whole
    (table,) = results["tables"]
    for name in results["features"]:
        worst = min(c["metrics"][name]["frechet"]["mean"] for c in table["cells"])
        assert table["real"][name]["n"] == 10 and table["real"][name]["frechet"] < worst


def test_the_report_shows_the_measurements_and_the_pictures_are_not_blank(whole):
    output, results = whole
    page = (output / "report.md").read_text()
    assert page == markdown(results)
    for cell in results["tables"][0]["cells"]:
        for name in results["features"]:
            assert format(cell["metrics"][name]["frechet"]["mean"], ".3f") in page
    assert "n = 10" in page and "+-" in page and "held-out real images get" in page
    for picture in ("first.png", "first-samples.png", "first-nearest.png"):
        assert f"({picture})" in page
        assert np.asarray(Image.open(output / picture).convert("L")).std() > 10


def test_what_is_there_is_not_computed_again_and_another_space_needs_no_sampling(
    whole, monkeypatch
):
    output, results = whole
    config = load_evaluation(output / "e.yaml")

    def never(*_, **__):
        raise AssertionError("sampled again")

    monkeypatch.setattr(cells.Evaluation, "_sample", never)
    again = run(Evaluation(config))
    assert again["tables"] == results["tables"]
    monkeypatch.undo()
    monkeypatch.setattr("ddim_schedulers.pipelines.sampling_job._sample", never)
    added = load_evaluation(output / "e.yaml", features=["pixels", f"{__name__}:Mean"])
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _module())
    found = run(Evaluation(added))
    kept = found["tables"][0]["cells"][0]["metrics"]
    assert kept["pixels"] == results["tables"][0]["cells"][0]["metrics"]["pixels"]
    assert found["tables"][0]["cells"][0]["seconds"] == results["tables"][0]["cells"][0]["seconds"]
    assert f"{__name__}:Mean" in kept


class Mean(torch.nn.Module):
    """A feature space of two numbers."""

    def forward(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)


def _module():
    import types

    module = types.ModuleType(__name__)
    module.Mean = Mean
    return module


def test_an_interrupted_cell_goes_on_and_gives_the_same(
    pipeline, tmp_path, monkeypatch, assert_close
):
    grid = [{"steps": [3], "members": [1]}]
    tables = [{"name": "T", "n": 10, "grid": grid}]
    alone = run(Evaluation(_config(pipeline, tmp_path / "a", tables=tables)))
    real, calls = cells.sample_to_directory, []

    def stopped(pipe, output, job, **place):
        real(pipe, output, job, rank=1, world_size=2)  # half of the shards
        raise KeyboardInterrupt

    config = _config(pipeline, tmp_path / "b", tables=tables)
    monkeypatch.setattr(cells, "sample_to_directory", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(Evaluation(config))
    assert not (tmp_path / "b" / "metrics.json").exists()
    monkeypatch.setattr(
        cells,
        "sample_to_directory",
        lambda *a, **k: calls.append(real(*a, **k)) or calls[-1],
    )
    resumed = run(Evaluation(config))
    assert (calls[0].written, calls[0].present) == (2, 1)
    kept = json.loads((tmp_path / "b" / "cells" / f"{config.cells[0].label}.json").read_text())
    assert kept["sampled"] == 6  # 0 .. 3 and the short last shard, 8 and 9
    measured = [r["tables"][0]["cells"][0]["metrics"] for r in (alone, resumed)]
    assert_close(*measured, 1e-3)  # two loads; a pixel that rounds to its neighbour is 1e-3 here
    assert not (tmp_path / "b" / "cells" / config.cells[0].label).exists()  # keep_images is off


def test_a_report_samples_nothing_and_leaves_out_what_is_not_measured(
    pipeline, tmp_path, monkeypatch
):
    grid = [{"steps": [2], "members": [0]}]
    tables = [{"name": "T", "n": 10, "grid": grid}]
    run(Evaluation(_config(pipeline, tmp_path, tables=tables)))

    def never(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr(cells, "sample_to_directory", never)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _module())
    config = _config(pipeline, tmp_path, tables=tables, features=["pixels", f"{__name__}:Mean"])
    table = run(Evaluation(config), sample=False)["tables"][0]
    assert table["cells"] == [] and table["missing"] == [config.cells[0].label]
    with pytest.raises(AssertionError, match="sampled"):
        run(Evaluation(config))


def test_a_folder_in_use_is_refused_to_the_library_too(pipeline, tmp_path):
    """Before anything is written: its own cache and a cell alone, too."""
    config = _config(pipeline, tmp_path / "out", tables=ONE_CELL)
    evaluation = Evaluation(config)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    other = {"verb": "evaluate", "host": "b", "pid": 7, "system": "b", "parts": None}
    (tmp_path / "out" / ".owner-0.json").write_text(json.dumps(other))
    for call in (
        lambda: run(evaluation),
        lambda: evaluation.measure(config.cells[0]),
        lambda: Evaluation(config),
    ):
        with pytest.raises(FolderInUseError, match="in use by `evaluate` on host b, process 7"):
            call()
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {".owner-0.json", ".owner.lock"}


def test_another_number_of_neighbours_is_measured_anew(pipeline, tmp_path, monkeypatch):
    tables = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}]
    own = {"tables": tables, "keep_images": True}
    run(Evaluation(_config(pipeline, tmp_path, **own)))
    monkeypatch.setattr(
        "ddim_schedulers.pipelines.sampling_job._sample", None
    )  # the images are there
    config = _config(pipeline, tmp_path, **own, neighbours=2)
    run(Evaluation(config))
    cell = json.loads((tmp_path / "cells" / f"{config.cells[0].label}.json").read_text())
    assert cell["metrics"]["pixels"]["k"] == 2


def test_a_changed_file_is_made_anew_with_a_sentence(pipeline, tmp_path):
    tables = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}]
    config = _config(
        pipeline,
        tmp_path,
        tables=tables,
        keep_images=True,
        features=["classifier"],
        classifier_epochs=1,
    )
    measured = run(Evaluation(config))["tables"][0]["cells"][0]["metrics"]
    said = []

    def again():
        said.clear()
        results = run(Evaluation(config, progress=said.append))
        assert results["tables"][0]["cells"][0]["metrics"] == measured
        return " ".join(said)

    label = config.cells[0].label
    own, preview = (tmp_path / "cells" / f"{label}{suffix}" for suffix in (".json", ".npz"))
    whole = json.loads(own.read_text())
    old = {key: value for key, value in whole.items() if key not in ("sha256", "preview")}

    def edited(cell, **changes):
        cell = json.loads(json.dumps(cell))
        cell["metrics"]["classifier"] |= changes
        return json.dumps(cell).encode()

    (reference,) = tmp_path.glob("reference-*")
    kept = load_tensors(reference.read_bytes())
    lost = {**kept, "train": kept["train"] * float("nan")}
    classifier = tmp_path / "classifier.safetensors"
    weights = load_tensors(classifier.read_bytes())
    header = safetensors_header(classifier.read_bytes(), classifier)["__metadata__"]
    cell_changes = [
        edited(whole, frechet=-1.0),
        edited(whole, frechet=measured["classifier"]["frechet"]["mean"] + 1),
    ]
    cell_changes += [json.dumps({**whole, "network_calls": 3}).encode()]
    cell_changes += [
        edited(old, **change)
        for change in (
            {"frechet": -1.0},
            {"frechet": None},
            {"precision": 1.5},
            {"k": -1},
            {"coverage": "1"},
            {"kernel": True},
            {"inception_score": 0.0},
            {"reference": []},
        )
    ]
    cell_changes += [
        json.dumps({**old, **change}).encode()
        for change in (
            {"row": "eta 1"},
            {"n": 9},
            {"steps": 2.0},
            {"metrics": []},
            {"settings": 5},
            {"images_per_second": -3.0},
            {"processes": 0},
            {"made_with": "x"},
        )
    ]
    cell_changes += [b"", b"[]", b"{", b"[" * 10**5, b"\xff"]
    cell_changes += [edited(whole).replace(b'"coverage": ', b'"coverage": NaN, "x": ')]
    flipped = bytearray(preview.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    black = io.BytesIO()
    np.savez_compressed(black, images=np.zeros((8, 8, 8, 1), np.uint8))
    changes = {
        own: cell_changes,
        preview: [b"", bytes(flipped), black.getvalue()],
        reference: [b"", reference.read_bytes()[:-1], storage.pack(lost), storage.pack({})],
        classifier: [
            b"",
            save_tensors(weights, {**header, "record": header["record"].replace("0.", "0.9")}),
            save_tensors({**weights, "output.bias": weights["output.bias"] + 1}, header),
        ],
    }
    for path, edits in changes.items():
        for data in edits:
            path.write_bytes(data)
            lines = again()
            assert path.name in lines and " again." in lines, (path.name, data[:300])
        assert " again." not in again(), path.name
    # what an earlier version wrote is used as it is
    own.write_bytes(json.dumps(old).encode())
    reference.write_bytes(storage.pack(kept))
    before = own.read_bytes(), reference.read_bytes()
    assert " again." not in again()
    assert (own.read_bytes(), reference.read_bytes()) == before
    shard = tmp_path / "cells" / label / "shards" / "000000-000003.npz"
    shard.write_bytes(shard.read_bytes()[:40])
    own.unlink()
    again()
    assert json.loads(own.read_text())["sampled"] == 4


@pytest.mark.parametrize(
    "change, differs",
    [
        ({"dtype": "float64"}, "network_dtype: 'torch.float32' there, 'torch.float64' now"),
        ({"seed": 5}, "job.seed: 0 there, 5 now"),
        ({"batch_size": 8}, "job.batch_size: 4 there, 8 now"),
    ],
)
def test_a_cell_made_with_other_settings_is_refused_by_name(pipeline, tmp_path, change, differs):
    run(Evaluation(_config(pipeline, tmp_path, tables=ONE_CELL)))
    with pytest.raises(ValueError, match="`output_dir` is .* holds the cell .* other settings"):
        run(Evaluation(_config(pipeline, tmp_path, tables=ONE_CELL, **change)))
    with pytest.raises(ValueError, match=f"[(; ]{re.escape(differs)}"):
        run(Evaluation(_config(pipeline, tmp_path, tables=ONE_CELL, **change)))


# The scheduler's settings that the first versions told: their cells hold a digest of them alone.
FIRST_KEYS = """beta_end beta_schedule beta_start calibration clip_sample clip_sample_range
    dynamic_thresholding_ratio eta lower_order_final num_train_timesteps prediction_type
    quadratic_end rescale_betas_zero_snr reverse_variance sample_max_value set_alpha_to_one sigma
    solver_corrector solver_form solver_order steps_offset thresholding timestep_spacing timesteps
    trained_betas variance_type""".split()
LATER = ("late_noise_cap", "original_inference_steps", "snr_shift_scale")


@pytest.mark.parametrize("keys", [FIRST_KEYS, [*FIRST_KEYS, LATER[0]], [*FIRST_KEYS, *LATER]])
def test_an_evaluation_of_an_earlier_version_goes_on(pipeline, tmp_path, keys):
    config = _config(pipeline, tmp_path, tables=ONE_CELL, keep_images=True)
    run(Evaluation(config))
    (file,) = (tmp_path / "cells").rglob("sample.json")
    (own,) = (tmp_path / "cells").glob("*.json")
    told, cell = json.loads(file.read_text()), json.loads(own.read_text())
    assert cell["settings"] == told
    then = told | {"scheduler_config": {k: told["scheduler_config"][k] for k in keys}}
    digest = hashlib.sha256(json.dumps(then, sort_keys=True).encode()).hexdigest()
    earlier = {k: v for k, v in cell.items() if k != "sha256"} | {"settings": digest}
    for path, content in ((file, then), (own, earlier)):
        path.write_text(json.dumps(content))
    before = own.read_bytes()
    run(Evaluation(config))
    assert own.read_bytes() == before
    own.unlink()
    run(Evaluation(config))  # from the samples that are there
    assert json.loads(own.read_text())["sampled"] == 0
    # another one is refused: by what its samples say, or for what nothing says
    file.write_text(json.dumps(then | {"scheduler_config": told["scheduler_config"] | {"eta": 1}}))
    own.write_text(json.dumps(earlier | {"settings": "0" * 64}))
    with pytest.raises(ValueError, match="scheduler_config.eta: 1 there, 0.0 now"):
        run(Evaluation(config))
    shutil.rmtree(file.parent)
    with pytest.raises(ValueError, match="other settings .an earlier version wrote it"):
        run(Evaluation(config))


def test_features_of_real_images_are_kept_under_what_they_depend_on(
    pipeline, tmp_path, monkeypatch
):
    tables = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}]
    first = Evaluation(_config(pipeline, tmp_path, tables=tables))

    def never(*_):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(RealImages, "_shared", never)
        again = Evaluation(_config(pipeline, tmp_path, tables=tables))
        assert torch.equal(again.real.features["pixels"].train, first.real.features["pixels"].train)
        with pytest.raises(AssertionError, match="computed again"):  # other images
            Evaluation(_config(pipeline, tmp_path, tables=tables, reference_images=50))
    fewer = Evaluation(_config(pipeline, tmp_path, tables=tables, reference_images=50))
    assert fewer.real.features["pixels"].train.shape == (50, 64)
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 2


def test_copies_of_training_images_are_noticed(pipeline, tmp_path, monkeypatch):
    tables = [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}]
    evaluation = Evaluation(_config(pipeline, tmp_path, tables=tables))
    copied = to_uint8(evaluation.real.train.batch([7, 100, 5, 1200])[0])
    monkeypatch.setattr(evaluation.first_images, "read", lambda cell: copied)
    found = evaluation.memorisation(evaluation.config.cells[0])
    assert found["nearest"] == [7, 100, 5, 1200]
    assert found["samples_median"] < 0.01 < found["held_out_min"]
    own = evaluation.real.held_out.batch([0])[0]
    gap = (evaluation.real.train.all() - own).square().mean((1, 2, 3)).sqrt().min() / 2
    distance = evaluation.real.nearest(own)[0] / 2 / 8
    assert float(distance) == pytest.approx(float(gap), rel=1e-5)


def test_two_processes_share_the_work_and_get_the_same(
    pipeline, whole, tmp_path, assert_close, processes
):
    _, alone = whole
    settings = _settings(
        pipeline, tmp_path / "out", features=["pixels", "classifier"], classifier_epochs=1
    )
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(settings))
    words = ["-m", "ddim_schedulers.training.cli", "evaluate", "--cpu", "--config", "e.yaml"]
    _, said = processes(words, 2, tmp_path)
    assert "process 0: cell 9 of 9" in said and "process 1: cell 9 of 9" in said
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["processes"] == 2 and alone["processes"] == 1
    for a, b in zip(alone["tables"][0]["cells"], results["tables"][0]["cells"], strict=True):
        assert b["processes"] == 2
        # each process loaded the network anew, as above
        assert_close(a["metrics"], b["metrics"], 1e-3)
    assert_close(results["tables"][0]["real"], alone["tables"][0]["real"])


def test_a_table_puts_the_smallest_of_a_column_in_bold():
    cells = [
        {"row": r, "steps": s, "v": v} for r, s, v in (("a", 5, 2.0), ("b", 5, 1.0), ("a", 10, 3.0))
    ]
    lines = pivot(cells, lambda c: str(c["v"]), lambda c: c["v"])
    assert lines[0] == "| | S = 5 | S = 10 |"
    assert lines[2:] == ["| a | 2.0 | **3.0** |", "| b | **1.0** |  |"]


def test_expected_measurements_stand_beside_ours(whole):
    _, results = whole
    found = results["tables"][0]["cells"][0]["metrics"]["pixels"]["frechet"]["mean"]
    expected = {
        "row": "eta 0, trailing",
        "steps": 2,
        "features": "pixels",
        "metric": "frechet",
        "value": round(found, 2) + 1,
        "tolerance": 2,
        "source": "someone",
    }
    page = markdown({**results, "expected": [expected], "not_run": "Not run here."})
    assert f"| someone | {found:.2f} | true |" in page and "**Not run here.**" in page
    page = markdown({**results, "expected": [{**expected, "tolerance": 0.1}]})
    assert f"| someone | {found:.2f} | false |" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tabels": []}, "`tabels` is an unknown key; did you mean tables"),
        ({"tables": []}, "tables"),
        ({"data": {"date": "x"}}, "did you mean data"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"pictured": ["eta 1"]}, "no row of a table"),
        ({"pictured": "eta 1"}, "`pictured` is 'eta 1'; it must be a list"),
        ({"features": "pixels"}, "`features` is 'pixels'; it must be a list"),
        ({"features": ["pixels", "pixels"]}, "each once"),
        ({"compile": "false"}, "`compile` is 'false'; it must be true or false"),
        ({"keep_images": "no"}, "`keep_images` is 'no'"),
        ({"expected": {"row": "eta 0, trailing"}}, "must be a list"),
        ({"expected": [{**EXPECTED, "tolerence": 1}]}, "did you mean tolerance"),
        ({"expected": [{k: EXPECTED[k] for k in EXPECTED if k != "source"}]}, "it must say source"),
        ({"expected": [{**EXPECTED, "metric": "fid"}]}, "metric = 'fid'"),
        ({"expected": [{**EXPECTED, "features": "inception"}]}, "one that is measured: pixels"),
        ({"expected": [{**EXPECTED, "steps": 9}]}, "steps = 9"),
        ({"tables": [{"name": "T", "n": 8, "grid": [{"steps": [], "members": [0]}]}]}, "empty"),
        (
            {
                "tables": [
                    {
                        "name": "T",
                        "n": 8,
                        "grid": [
                            {
                                "steps": [2],
                                "spacing": ["trailing"],
                                "schedulers": [{"class": "DDIMScheduler"}],
                            }
                        ],
                    }
                ]
            },
            "`spacing` is set in a block without members",
        ),
        ({"tables": [{"name": "T", "n": 1, "grid": GRID}]}, "a name and an n from 2 to"),
        (
            {"tables": [{"name": "T", "n": 4, "grid": [{"steps": [2]}]}]},
            "without members and schedulers",
        ),
        ({"tables": [{"name": "T", "n": 4, "grid": [{"steps": [0], "members": [0]}]}]}, ">= 1"),
        (
            {"tables": [{"name": "T", "n": 4, "grid": [{"steps": [2], "members": ["ddim"]}]}]},
            "sigma-hat, optimal",
        ),
        (
            {
                "tables": [
                    {
                        "name": "T",
                        "n": 4,
                        "grid": [{"steps": [2], "schedulers": [{"class": "Foo"}]}],
                    }
                ]
            },
            "`class` is 'Foo'; it must be a scheduler",
        ),
        (
            {
                "tables": [
                    {
                        "name": "T",
                        "n": 4,
                        "grid": [
                            {"steps": [2], "schedulers": [{"class": "DDIMScheduler", "etta": 1}]}
                        ],
                    }
                ]
            },
            "`etta` is no setting of DDIMScheduler",
        ),
        (
            {
                "tables": [
                    {
                        "name": "T",
                        "n": 4,
                        "grid": [
                            {"steps": [2], "members": [0]},
                            {"steps": [2], "members": [0], "settings": {"clip_sample": False}},
                        ],
                    }
                ]
            },
            "`tables` has two rows named",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(ValueError) as caught:
        parse_evaluation({**_settings("p", "o"), **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline": "no/such"}, "cannot be loaded"),
        ({"held_out": {"data": "digits", "image_size": 9, "fit": "pad"}}, "`held_out` is 1797"),
        ({"tables": [{"name": "T", "n": 4, "grid": [{"steps": [13], "members": [0]}]}]}, "13"),
        (
            {"tables": [{"name": "T", "n": 4, "grid": [{"steps": [2], "members": ["optimal"]}]}]},
            "'optimal, trailing', S = 2: .*calibrat",
        ),
        (
            {
                "tables": [
                    {
                        "name": "T",
                        "n": 8,
                        "grid": [
                            {
                                "steps": [2],
                                "schedulers": [
                                    {
                                        "class": "DDPMScheduler",
                                        "use_clipped_model_output": True,
                                    }
                                ],
                            }
                        ],
                    }
                ]
            },
            "has no use_clipped_model_output",
        ),
        ({"neighbours": 10}, "`neighbours` is 10; it must be below"),
        ({"reference_images": 5}, "`neighbours` is 5; it must be below"),
        ({"output_dir": __file__}, "is a file; it must be a folder"),
        ({"features": ["nowhere:X"]}, "feature_space"),
        ({"features": ["spaces_of_a_user:maps"]}, "must give a tensor"),
        ({"features": ["spaces_of_a_user:pair"]}, "must give a tensor"),
        ({"features": ["spaces_of_a_user:nan"]}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(
    pipeline, tmp_path, monkeypatch, change, message
):
    user = ModuleType("spaces_of_a_user")
    user.maps = torch.nn.Identity
    user.pair, user.nan = _Pair, _Nan
    monkeypatch.setitem(sys.modules, user.__name__, user)
    with pytest.raises(ValueError, match=message):
        Evaluation(parse_evaluation({**_settings(pipeline, tmp_path), **change}))
    assert not (tmp_path / "cells").exists()


class _Pair(torch.nn.Module):
    def forward(self, images):
        return (images.flatten(1),)


class _Nan(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1) / 0 * 0


def test_too_few_labels_are_refused(pipeline, tmp_path):
    path = tmp_path / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(path, images=images, labels=np.arange(20) % 2)
    data = {"data": str(path), "array_key": "images", "validation_fraction": 0.2}
    config = _config(pipeline, tmp_path, data=data, features=["classifier"], labels="labels")
    with pytest.raises(ValueError, match="`labels` is 'labels': .* has 20 labels and 40 images"):
        Evaluation(config)


def test_the_files_that_ship_are_valid():
    folder = files("ddim_schedulers.training") / "configs"
    names = [p.name for p in folder.iterdir() if p.name.endswith("-evaluate.yaml")]
    assert {"digits-8-evaluate.yaml", "fashion-mnist-32-evaluate.yaml"} <= set(names)
    for name in names:
        config = load_evaluation(str(folder / name))
        assert config.output_dir == f"runs/{name.removesuffix('-evaluate.yaml')}/evaluation"
        recipe = not name.startswith(("digits-8-", "fashion-mnist-32-"))
        assert bool(config.not_run) == recipe == bool(config.expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictured": [5]}, "must be the name of a row"),
        ({"pictured": [[]]}, "must be the name of a row"),
        ({"expected": [{**EXPECTED, "row": {}}]}, "must be the name of a row"),
        ({"grid": {"members": [[]]}}, "member"),
        ({"grid": {"members": [{}]}}, "member"),
        ({"grid": {"spacing": [5]}}, "`spacing` is 5; it must be a name"),
        ({"grid": {"repeats": 10**18}}, "`repeats` is 1000000000000000000"),
        ({"grid": {"repeats": True}}, "`repeats` is True"),
        ({"n": 10**18}, "an n from 2 to 100000000"),
    ],
)
def test_values_of_a_wrong_kind_are_named(pipeline, tmp_path, change, message):
    change = dict(change)
    block = {"steps": [2], "members": [0], **change.pop("grid", {})}
    tables = [{"name": "T", "n": change.pop("n", 8), "grid": [block]}]
    with pytest.raises(ValueError, match=message):
        _config(pipeline, tmp_path, tables=tables, **change)
