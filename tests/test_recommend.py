"""`evaluate`: the end-point error, and the best row under a limit with its uncertainty."""

import copy
import json
import re

import pytest
import torch
import yaml
from diffusers import DDPMScheduler

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.images import to_uint8
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.commands import _recommend
from ddim_schedulers.training.common.scatter import student
from ddim_schedulers.training.evaluation.cells import fine_scheduler
from ddim_schedulers.training.evaluation.config import load_evaluation
from ddim_schedulers.training.evaluation.recommend import recommend
from ddim_schedulers.training.evaluation.references import from_uint8
from ddim_schedulers.training.metrics.distances import endpoint_errors


def test_students_quantile():
    """The table of Student's t, 97.5 percent."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042}
    for freedom, value in table.items():
        assert student(freedom) == pytest.approx(value, abs=0.01)


def _cell(row, steps, mean, std, repeats=3, seconds=1.0, metric="frechet"):
    return {
        "row": row,
        "steps": steps,
        "network_calls": steps,
        "seconds": seconds,
        "repeats": repeats,
        "n": 50,
        "metrics": {"pixels": {metric: {"mean": mean, "std": std}}},
    }


def _results(*cells, **changes):
    table = {"name": "T", "n": 50, "cells": list(cells), "missing": []}
    return {"features": ["pixels"], "tables": [table], **changes}


def test_the_best_row_under_a_limit_and_those_within_its_scatter():
    results = _results(
        _cell("a", 5, 3.0, 0.1),
        _cell("b", 10, 2.0, 0.1, seconds=2.0),
        _cell("c", 10, 2.1, 0.1, seconds=0.5),
        _cell("d", 20, 1.0, 0.1, seconds=4.0),
    )
    found = recommend(results, calls=10)
    assert (found.best.row, [r.row for r in found.rivals]) == ("b", ["c"])
    assert found.best.std_error == pytest.approx(0.1 / 3**0.5)
    assert "10 calls" in found.lines()[0] and "c, S = 10" in found.lines()[1]
    found = recommend(results, calls=20)
    assert found.best.row == "d" and not found.rivals and "Every other row" in found.lines()[1]
    assert recommend(results, seconds=1.0).best.row == "c"
    assert recommend(results, calls=5, seconds=9.0).best.row == "a"
    # the step between scatter and difference: t(4) sqrt(2) 0.1 / sqrt(3) = 0.2267
    for apart, rivals in ((0.22, 1), (0.235, 0)):
        two = _results(_cell("a", 5, 1.0, 0.1), _cell("b", 5, 1.0 + apart, 0.1))
        assert len(recommend(two, calls=5).rivals) == rivals
    single = recommend(_results(_cell("a", 5, 1.0, None, 1), _cell("b", 5, 9.0, 0.1)), calls=5)
    assert single.rivals and "not known" in single.lines()[1]


def test_more_is_better_where_the_metric_is_no_distance():
    cells = [_cell(row, 5, mean, 0.01, metric="recall") for row, mean in (("a", 0.1), ("b", 0.9))]
    assert recommend(_results(*cells), calls=5, metric="recall").best.row == "b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of them must be a limit"),
        ({"calls": 4}, "`tables` hold no row under 4 calls"),
        ({"seconds": 0.5}, "`tables` hold no row under 0.5 seconds"),
        ({"calls": 5, "metric": "fid"}, "`metric` is 'fid'"),
        ({"calls": 5, "features": "inception"}, "`features` is 'inception'"),
        ({"calls": 5, "metric": "endpoint"}, "no row under 5 calls with endpoint"),
    ],
)
def test_what_cannot_be_recommended(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(_results(_cell("a", 5, 1.0, 0.1)), **arguments)


def test_tables_of_two_sizes_are_not_compared():
    results = _results(_cell("a", 5, 1.0, 0.1))
    results["tables"].append({**copy.deepcopy(results["tables"][0]), "n": 60})
    with pytest.raises(ValueError, match="`n` is"):
        recommend(results, calls=5)


# -- measured and written

STEPS, N, SEED = 12, 8, 3


@pytest.fixture(scope="module")
def evaluated(tiny_ddpm, tmp_path_factory):
    """An evaluation of a tiny pipeline with the end-point error; its settings and results."""
    root = tmp_path_factory.mktemp("evaluated")
    # an untrained network without clipping: its ODE is smooth, and more steps come nearer to it
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.2, clip_sample=False)
    tiny_ddpm(scheduler).save_pretrained(root / "pipeline")
    settings = {
        "pipeline": str(root / "pipeline"),
        "output_dir": str(root / "output"),
        "data": {"data": "digits"},
        "batch_size": 4,
        "seed": SEED,
        "endpoint": True,
        "keep_images": True,
        "tables": [
            {
                "name": "T",
                "n": N,
                "grid": [
                    {"steps": [2, 6], "members": [0, 1], "repeats": 3},
                    {"steps": [2], "schedulers": [{"class": "DDIMScheduler"}]},
                ],
            }
        ],
    }
    (root / "e.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", "--config", str(root / "e.yaml"), "--cpu"]) == 0
    return root, json.loads((root / "output" / "metrics.json").read_text())


def test_the_endpoint_error_is_that_of_the_same_noises(evaluated):
    root, results = evaluated
    cells = {(c["row"], c["steps"]): c for c in results["tables"][0]["cells"]}
    for (row, _), cell in cells.items():
        assert ("endpoint" in cell["metrics"]["pixels"]) == (row != "eta 1, trailing")
    errors = [cells["eta 0, trailing", s]["metrics"]["pixels"]["endpoint"]["mean"] for s in (2, 6)]
    assert errors[1] < errors[0]
    pipe = GenerationPipeline.from_pretrained(root / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    ends = []
    for scheduler, steps in (
        (fine_scheduler(pipe.scheduler), STEPS),
        (GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, eta=0.0), 2),
    ):
        scheduler.config.timestep_spacing = "trailing"
        run = pipe.sibling(GenerationPipeline, scheduler=scheduler)
        seeds = range(SEED, SEED + N)
        x = run(seeds=seeds, batch_size=4, num_inference_steps=steps, output_type="latent").images
        ends.append(from_uint8(to_uint8(x)))
    folder = root / "output" / "cells"
    (file,) = [p for p in folder.glob("*.json") if "eta-0-trailing" in p.name and _is(p, 2, 0)]
    measured = json.loads(file.read_text())["metrics"]["pixels"]["endpoint"]
    assert measured == pytest.approx(float(endpoint_errors(*ends).mean()), rel=1e-4)
    assert not (root / "output" / "fine").exists()
    assert "end-point error x 1000" in (root / "output" / "report.md").read_text()


def _is(path, steps, repeat):
    content = json.loads(path.read_text())
    return (content["steps"], content["repeat"], content["row"]) == (
        steps,
        repeat,
        "eta 0, trailing",
    )


def test_endpoint_errors_are_means_of_squares():
    a, b = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    b[1] *= 3
    assert endpoint_errors(a, b).tolist() == [1.0, 9.0]


def test_the_best_row_is_printed_and_written_with_evidence_alone(evaluated, capsys):
    root, results = evaluated
    config = ["evaluate", "--config", str(root / "e.yaml"), "--cpu", "--report"]
    file = root / "pipeline" / "scheduler" / "scheduler_config.json"
    before = file.read_text()

    def said(*words, code=0):
        capsys.readouterr()
        assert main([*config, *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    assert "Best under" not in said()
    best = recommend(results, calls=6, metric="endpoint")
    out = said("--best_under_calls", "6", "--best_by", "endpoint")
    first = f"n = 8: {best.best.row}, S = {best.best.steps}"
    assert f"Best under 6 calls by end-point error in pixels, {first}" in out
    for option, value in (("--write_best", "clear"), ("--best_by", "kernel")):
        assert "goes with --best_under_calls" in said(option, value, code=2)
    two = ["--best_under_calls", "2", "--best_by", "endpoint", "--write_best", "lowest"]
    assert "row 'DDIM', S = 2, has one repetition" in said(*two, code=2)
    assert file.read_text() == before
    tables = results["tables"][0]
    only = {**results, "tables": [{**tables, "missing": ["a cell"]}]}
    with pytest.raises(ValueError, match="needs 3 repetitions of a row, 'DDIM' has 1"):
        _recommend.check_evidence(recommend(results, calls=2), results, "lowest")
    near = recommend(_results(_cell("a", 5, 1.0, 0.1), _cell("b", 5, 1.1, 0.1)), calls=5)
    _recommend.check_evidence(near, _results(), "lowest")
    with pytest.raises(ValueError, match="`write_best` is 'clear'; .*'b', S = 5, is within"):
        _recommend.check_evidence(near, _results(), "clear")
    with pytest.raises(ValueError, match="`write_best` is 'lowest'; .* all cells, 1 are not"):
        _recommend.check_evidence(best, only, "lowest")
    cells = [c for c in tables["cells"] if c["repeats"] == 3]
    enough = recommend({**results, "tables": [{**tables, "cells": cells}]}, calls=6)
    _recommend.check_evidence(enough, results, "lowest")
    target = _recommend.write(enough, load_evaluation(root / "e.yaml"))
    assert target == file and file.with_name(f"{file.name}.1.bak").read_text() == before
    written = GeneralizedDDIMScheduler.from_config(json.loads(file.read_text()))
    expected = 0.0 if enough.best.row.startswith("eta 0") else 1.0
    assert written.config.eta == expected and written.config.timestep_spacing == "trailing"
    assert main(["calibrate", "--pipeline", str(root / "pipeline"), "--undo", "--cpu"]) == 0
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        ("--best_under_calls 6 --best_by fid", {}, "`best_by` is 'fid'"),
        ("--best_under_calls 6 --best_by endpoint", {"endpoint": False}, "`best_by` is 'endpoint'"),
        ("--best_under_calls 1", {}, "`best_under_calls` is 1; it must be at least 2"),
        ("--best_under_seconds 0", {}, "`best_under_seconds` is 0.0"),
        ("--best_under_seconds nan", {}, "`best_under_seconds` is nan"),
        ("--best_under_calls 6 --write_best clear", {}, "row 'DDIM', S = 2, has one repetition"),
        ("--best_under_calls 6", {"tables": 2}, "`n` is .*8, 9"),
    ],
)
def test_what_cannot_be_recommended_is_told_before_anything_is_sampled(
    evaluated, tmp_path, capsys, words, change, message
):
    root, _ = evaluated
    settings = yaml.safe_load((root / "e.yaml").read_text())
    settings |= {"output_dir": str(tmp_path / "new"), **change}
    if change.get("tables"):
        (table,) = yaml.safe_load((root / "e.yaml").read_text())["tables"]
        settings["tables"] = [table, {**table, "name": "U", "n": 9}]
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", "--config", str(tmp_path / "e.yaml"), "--cpu", *words.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
