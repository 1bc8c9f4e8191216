"""The bound and the statistics of a network with classes: of each image's class, or of none."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_models import tiny_unet

from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.likelihood.calibration import calibrate, measure_trajectory
from ddim_schedulers.training.likelihood.measured_model import measured_model_of
from ddim_schedulers.training.likelihood.table import LikelihoodSettings, evaluate

NULL = 10
STEPS = 6


def network(count=11, out=1):
    unet = tiny_unet(blocks=(8, 8), out_channels=out, num_class_embeds=count)
    if count == 11:
        note_class_labels(unet, NULL)
    return unet


class Bound(torch.nn.Module):
    """The network with one label, as one without classes."""

    def __init__(self, unet, label):
        super().__init__()
        self.network, self.label = unet, label
        own = {key: value for key, value in unet.config.items() if key != "_ddim_schedulers"}
        self.config = type(unet.config)({**own, "num_class_embeds": None})

    def forward(self, x, t):
        return self.network(x, t, class_labels=torch.full((len(x),), self.label))


def scheduler(**settings):
    return DDPMScheduler(num_train_timesteps=STEPS, beta_start=0.05, beta_end=0.6, **settings)


def model(unet, labels=None, **settings):
    return measured_model_of(unet, dict(scheduler(**settings).config)).labelled(labels)


IMAGES = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 8 - 1.0


@pytest.mark.parametrize("estimator", ["all", "uniform"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_bound_of_each_image_is_that_of_its_class(
    tmp_path, assert_close, estimator, batch_size
):
    """Against the same network bound to one label, image after image of the same draws."""
    labels = torch.tensor([3, 0, NULL, 3, 7])
    calls = None if estimator == "all" else 3
    settings = LikelihoodSettings(
        (STEPS,), ("fixed_small",), clip=None, num_bins=17, estimator=estimator, num_calls=calls
    )
    settings = LikelihoodSettings(**{**vars(settings), "batch_size": batch_size})
    unet = network()

    def totals(model, folder):
        from ddim_schedulers.training.likelihood import table

        kept = []
        report = table._report

        def keep(named, terms, settings):
            kept.append(terms.total)
            return report(named, terms, settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table, "_report", keep)
            evaluate(model, IMAGES, settings, tmp_path / folder)
        return kept[0]

    mine = totals(model(unet, labels), "mine")
    for label in (0, 3, 7, NULL):
        theirs = totals(model(Bound(unet, label)), f"of {label}")
        rows = labels == label
        assert_close(mine[rows].tolist(), theirs[rows].tolist())
        other = totals(model(Bound(unet, (label + 1) % 11)), f"beside {label}")
        assert float((mine[rows] - other[rows]).abs().min()) > 1e-4


def test_statistics_are_of_the_labels(tmp_path, assert_close):
    unet, labels = network(), torch.full((5,), 4)
    got = calibrate(model(unet, labels), IMAGES, clip=None, work_dir=tmp_path / "a")[0]
    want = calibrate(model(Bound(unet, 4)), IMAGES, clip=None, work_dir=tmp_path / "b")[0]
    assert_close(got.gamma, want.gamma)
    kept = {"num_samples": 5, "steps": 4, "batch_size": 2}
    mine = measure_trajectory(model(unet, labels), **kept)[0]["trajectory"]
    theirs = measure_trajectory(model(Bound(unet, 4)), **kept)[0]["trajectory"]
    other = measure_trajectory(model(Bound(unet, 5)), **kept)[0]["trajectory"]
    assert_close(mine, theirs)
    assert json.dumps(mine) != json.dumps(other)


def test_parts_of_other_labels_are_not_taken(tmp_path, monkeypatch):
    from ddim_schedulers.training.likelihood import error_sweep

    saved = error_sweep.SweepFiles.save

    def die(self, item, value):
        saved(self, item, value)
        raise KeyboardInterrupt

    kept = {"clip": None, "work_dir": tmp_path / "w"}
    monkeypatch.setattr(error_sweep.SweepFiles, "save", die)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model(network(), torch.zeros(5, dtype=torch.int64)), IMAGES, **kept)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="labels"):
        calibrate(model(network(), torch.ones(5, dtype=torch.int64)), IMAGES, **kept)


@pytest.mark.parametrize("labels", [None, torch.zeros(4, dtype=torch.int64)])
def test_labels_must_fit_the_batch(labels):
    with pytest.raises(ValueError, match=r"`labels` is .*; it must be a tensor \(5,\)"):
        model(network(), labels).predict(IMAGES, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`labels` is \(5,\); it must be None"):
        unconditional = model(Bound(network(), 0), torch.zeros(5, dtype=torch.int64))
        unconditional.predict(IMAGES, torch.zeros(5, dtype=torch.int64))


@pytest.fixture
def folder(tmp_path):
    def save(unet, name="p"):
        DDPMPipeline(unet, scheduler()).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_commands_measure_classes_or_none(folder, tmp_path, capsys):
    place = folder(network())
    common = ["--pipeline", place, "--data", "digits", "--num_images", "4", "--cpu"]
    reports = {}
    for kind in ("data", "null"):
        words = ["likelihood", *common, "--output_dir", str(tmp_path / kind), "--steps", str(STEPS)]
        assert main([*words, "--variances", "fixed_small", "--labels", kind]) == 0
        reports[kind] = json.loads((tmp_path / kind / "likelihood.json").read_text())
        assert reports[kind]["labels"] == kind
    totals = [report["rows"][0]["total"]["mean"] for report in reports.values()]
    assert totals[0] != totals[1]
    assert main(["calibrate", *common, "--labels", "null"]) == 0
    trajectory = ["calibrate", "--pipeline", place, "--objective", "trajectory", "--cpu"]
    assert main([*trajectory, "--trajectory_steps", "4", "--num_images", "3"]) == 0
    capsys.readouterr()


def test_flags_about_classes_that_do_nothing_are_refused(folder, tmp_path, capsys, tiny_ddpm):
    places = {"null": folder(network()), "none": folder(network(10), "q")}
    pipeline = tiny_ddpm(scheduler())
    pipeline.save_pretrained(tmp_path / "r")
    places["unconditional"] = str(tmp_path / "r")
    for place, words, said in (
        ("none", ["--labels", "null"], "it must be data: the network has no null class"),
        ("null", ["--labels", "null", "--label_column", "x"], "left out with --labels null"),
        ("unconditional", ["--labels", "data"], "left out, as the network has no classes"),
        ("unconditional", ["--class_names", "a", "b"], "left out, as the network has no classes"),
    ):
        common = ["--pipeline", places[place], "--data", "digits", "--num_images", "4", "--cpu"]
        assert main(["likelihood", *common, "--output_dir", str(tmp_path / "o"), *words]) == 2
        assert said in capsys.readouterr().err
