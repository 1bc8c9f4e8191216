"""`calibrate --guidance_scale`: a sampler that is fitted to a guided network, for it alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from tiny_models import tiny_unet

from ddim_schedulers import CALIBRATED, GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.class_pipeline import ClassConditionalPipeline
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.settings import SETTINGS_KEY
from ddim_schedulers.solver_tables import SolverTable, guidance_of, pack_solver_table
from ddim_schedulers.training.calibration.predictor import Guiding, Predictor
from ddim_schedulers.training.calibration.samples_job import SamplesJob, entry_of, stored_entry
from ddim_schedulers.training.calibration.samples_run import calibrate_samples
from ddim_schedulers.training.calibration.samples_space import Setting, Space
from ddim_schedulers.training.calibration.solver_fit import Constants
from ddim_schedulers.training.calibration.solver_job import Outcome, SolverJob, lost
from ddim_schedulers.training.calibration.solver_run import calibrate_solver
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.likelihood.measured_model import measured_model_of
from ddim_schedulers.training.metrics.features import make_feature_space

MEANS = (-0.4, 0.4, 0.0)  # of the two classes, and of no class
DEVIATIONS = (0.2, 0.3, 0.5)


class Classes(torch.nn.Module):
    """The exact eps of pixels ~ N(mean, deviation^2) of each class; it notes its batches."""

    dtype = torch.float64

    def __init__(self, null=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        note = {"null_class": null} if null is not None else {}
        self.config = FrozenDict(
            in_channels=1, out_channels=1, sample_size=2, num_class_embeds=3, **{SETTINGS_KEY: note}
        )
        self.alpha_bar = GeneralizedDDIMScheduler().alpha_bar
        self.batches = []

    def forward(self, x, t, class_labels):
        self.batches.append(class_labels.tolist())
        a = self.alpha_bar[int(t)]
        mean = torch.tensor(MEANS, dtype=x.dtype)[class_labels].view(-1, 1, 1, 1)
        variance = torch.tensor(DEVIATIONS, dtype=x.dtype)[class_labels].square().view(-1, 1, 1, 1)
        x0 = mean + variance * a.sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)
        return SimpleNamespace(sample=(x - a.sqrt() * x0) / (1 - a).sqrt())


def _model(null=2):
    model = measured_model_of(Classes(null), dict(DDPMScheduler(clip_sample=False).config))
    return model.labelled(torch.tensor([0, 1] * 8))


def _entry(scale=2.0, interval=None):
    """A table of three steps for the toy, whose weights move every step."""
    config = dict(GeneralizedDDIMScheduler(clip_sample=False).config)
    entry = entry_of(config, 3, Setting(), Guiding(scale, interval))
    return {**entry, "weights": [[0.0, 0.1], [0.0, -0.1, 0.2], [0.0, 0.1, 0.0, -0.1]]}


def _pipeline(unet, entry):
    settings = {**CALIBRATED, "calibration": {"solver": {"3": entry}}}
    pipe = GenerationPipeline(unet, GeneralizedDDIMScheduler(clip_sample=False, **settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(classes=3):
    unet = tiny_unet(num_class_embeds=classes)
    if classes is not None:
        note_class_labels(unet, 2, ["cat", "dog"])
        torch.nn.init.normal_(unet.class_embedding.weight)
    return unet


def _words(caplog):
    told = [m for m in caplog.messages if "stored tables do not fit" in m]
    caplog.clear()
    return [m.split("do not fit: ")[1].split(".")[0] for m in told]


@pytest.mark.parametrize("interval", [None, (0.2, 0.8)])
def test_a_table_is_used_at_its_own_guidance_alone(interval, caplog):
    unet, ends = _unet(), {"guidance_interval": interval}
    caplog.set_level("WARNING")

    def sample(**conditions):
        pipe = _pipeline(unet, _entry(2.0, interval))
        asked = {"class_labels": [0, 1], "seeds": [0, 1], "output_type": "latent", **conditions}
        images = pipe(num_inference_steps=3, **asked).images
        # without the table: its timesteps, and the formulas
        plain = GenerationPipeline(
            unet, GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, calibration=None)
        )
        plain.set_progress_bar_config(disable=True)
        steps = plain(timesteps=pipe.scheduler.timesteps.tolist(), **asked).images
        caplog.handler.records[:] = [
            r for r in caplog.handler.records if "explicit" not in r.getMessage()
        ]
        told = _words(caplog)
        return torch.equal(images, steps), [w for w in told if not w.startswith("timesteps")]

    assert sample(guidance_scale=2.0, **ends) == (False, [])
    others = [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, **ends},
        {},
        {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9)},
        {"guidance_scale": 2.0, "guidance_rescale": 0.5, **ends},
        {"guidance_scale": 2.0, "negative_label": 0, **ends},
    ]
    for conditions in others:
        assert sample(**conditions) == (True, ["guidance"]), conditions


def test_a_table_without_guidance_is_not_used_with_it(caplog):
    caplog.set_level("WARNING")
    for scale, said in ((1.0, []), (2.0, ["guidance"])):
        pipe = _pipeline(_unet(), _entry(None))
        pipe(class_labels=0, seeds=[0], guidance_scale=scale, num_inference_steps=3)
        assert _words(caplog) == said


@pytest.mark.parametrize(("scale", "said"), [(2.0, []), (1.0, ["guidance"]), (3.0, ["guidance"])])
def test_the_pipeline_of_a_self_contained_repository_knows_it_too(scale, said, caplog):
    caplog.set_level("WARNING")
    pipe = ClassConditionalPipeline(_unet(), _pipeline(_unet(), _entry()).scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe("cat", guidance_scale=scale, num_inference_steps=3)
    assert _words(caplog) == said


def test_a_loop_that_says_nothing_of_guidance_counts_as_unguided(caplog):
    caplog.set_level("WARNING")
    scheduler = _pipeline(_unet(), _entry()).scheduler
    for note, said in ((False, ["guidance"]), (True, [])):
        scheduler = GeneralizedDDIMScheduler.from_config(scheduler.config)
        scheduler.set_timesteps(3)
        if note:
            scheduler.note_guidance(2)
        x = torch.randn(1, 1, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x).prev_sample
        assert _words(caplog) == said and scheduler.follows_table == note


@pytest.mark.parametrize(
    ("scale", "batches"),
    [(2.0, [[2, 2, 0, 1]]), (0.0, [[2, 2]]), (1.0, [[0, 1]]), (None, [[0, 1]])],
)
def test_guidance_is_one_call_of_a_doubled_batch_and_none_at_0_and_1(scale, batches):
    model = _model()
    predictor = Predictor(model, Guiding(scale))
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    output = predictor.output(x, 500)
    assert model.unet.batches == batches and predictor.evaluations == sum(map(len, batches))
    w = 1.0 if scale is None else scale
    by_class, null = model.unet(x, 500, torch.tensor([0, 1])), model.unet(x, 500, torch.tensor([2]))
    torch.testing.assert_close(output, null.sample + w * (by_class.sample - null.sample))


def test_a_table_is_fitted_to_the_guided_network(tmp_path):
    """What is measured is what the pipeline makes: nearer to the guided flow than the formulas."""
    model, guiding = _model(), Guiding(2.0, (0.2, 0.8))
    job = SolverJob((3,), 16, 8, 40, batch_size=8, constants=Constants(iterations=1))
    job = SolverJob(**{**vars(job), "guiding": guiding})
    (found,), _ = calibrate_solver(model, job, work_dir=tmp_path / "w")
    assert found.is_better and found.held_out < 0.5 * found.analytic
    assert found.entry["guidance_scale"] == 2.0 and found.entry["guidance_interval"] == [0.2, 0.8]
    assert json.loads(json.dumps(found.entry)) == found.entry
    (free,), _ = calibrate_solver(
        model, SolverJob(**{**vars(job), "guiding": Guiding()}), work_dir=tmp_path / "v"
    )
    assert "guidance_scale" not in free.entry and free.entry["weights"] != found.entry["weights"]
    with pytest.raises(ValueError, match="guidance_scale: None there, 2.0 now"):
        calibrate_solver(model, job, work_dir=tmp_path / "v")


class _Data:
    shape = (1, 2, 2)

    def __len__(self):
        return 64

    def batch(self, rows):
        draw = torch.randn((64, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        return (0.3 * draw).clamp(-1, 1)[torch.as_tensor(np.asarray(rows))], 0


def test_pictures_are_measured_with_guidance(tmp_path):
    spaces = {name: make_feature_space(name, _Data.shape) for name in ("pixels", "details")}
    small = Space(((0.0, None),), (1.0, 1.1), (1.0,), rounds=0)
    model = _model()
    for scale in (None, 2.0):
        job = SamplesJob((3,), 48, batch_size=20, space=small, guiding=Guiding(scale))
        model.unet.batches.clear()
        (found,), _ = calibrate_samples(model, _Data(), spaces, job, work_dir=tmp_path / str(scale))
        rows = [row for batch in model.unet.batches for row in batch]
        assert rows.count(0) == rows.count(1) > 0 and found.evaluations == len(rows)
        assert rows.count(2) == (0 if scale is None else len(rows) / 2)


def test_what_is_there_at_another_scale_does_not_count_and_is_told_when_it_goes():
    config = dict(GeneralizedDDIMScheduler(clip_sample=False).config)
    entry = {**_entry(), "eps_scale": 1.01, "samples": {}}
    config["calibration"] = {"solver": {"3": entry}}
    assert stored_entry(config, 3, Guiding(2.0)) == entry
    for other in (Guiding(), Guiding(3.0), Guiding(2.0, (0.2, 0.8))):
        assert stored_entry(config, 3, other)["eps_scale"] == 1.0
    told = lost({"3": entry}, {"3": _entry(None)})
    assert len(told) == 1 and "made at guidance scale 2, is gone" in told[0]
    assert "that --objective samples chose" in lost({"3": entry}, {"3": _entry()})[0]
    assert lost({"3": entry}, {"4": _entry(None)}) == []


def test_guidance_has_one_form():
    assert guidance_of(None, None) is guidance_of(1, [0.2, 0.8]) is None
    assert guidance_of(2, [0, 1]) == guidance_of(2.0, None) == (2.0, None)
    assert guidance_of(2, [0.2, 0.8]) == (2.0, (0.2, 0.8))


def test_tables_that_could_not_be_read_back_are_not_packed():
    levels = [*GeneralizedDDIMScheduler().alpha_bar[[999]].tolist(), 1.0]

    def pack(weight=0.0, **more):
        return pack_solver_table(
            SolverTable([999], [[0.0, weight]], 0.0, None, None, levels), **more
        )

    assert "guidance_scale" not in pack(1e4)  # readers before there was guidance take it
    for bad, message in (
        ({"weight": 1.1e4}, r"\['weights'\]\[0\]` is .* from -10000 to 10000"),
        ({"weight": float("nan")}, "finite"),
        ({"held_out": -1.0}, r"\['held_out'\]` is -1.0"),
        ({"unknown": 1}, "has the key 'unknown'"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(**bad)
    for change, message in (
        ({"guidance_scale": "2"}, r"\['guidance_scale'\]` is '2'"),
        ({"guidance_interval": [0.8, 0.2]}, "`guidance_interval` is"),
        ({"guidance_scale": None, "guidance_interval": [0.2, 0.8]}, "None where there is no"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration = {"solver": {"3": {**_entry(), **change}}}
            GeneralizedDDIMScheduler(clip_sample=False, calibration=calibration)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, classes in (("classes", 3), ("plain", None)):
        DDPMPipeline(_unet(classes), DDPMScheduler()).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("plain", "--guidance_scale 2", "`guidance_scale` is 2, but the network has no classes"),
        ("plain", "--labels cat", "`--labels` is ['cat']; it must be left out"),
        ("classes", "--guidance_interval 0.2 0.8", "`guidance_interval` would do nothing"),
        ("classes", "--guidance_scale nan", "`guidance_scale` is nan; it must be a finite number"),
        ("classes", "--guidance_scale 2 --labels null", "every sample has the null class"),
        ("classes", "--labels bird", "`--labels` is 'bird'; it must be the number of a class"),
    ],
)
@pytest.mark.parametrize("objective", ["solver", "samples --data digits"])
def test_what_cannot_be_guided_is_refused(saved, name, words, message, objective, capsys):
    words = ["--objective", *objective.split(), *words.split()]
    assert main(["calibrate", "--pipeline", str(saved / name), "--cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_guidance_needs_a_null_class():
    with pytest.raises(ValueError, match="without a null class; it must be 1"):
        Guiding(2.0).check(_model(null=None))
    Guiding(1.0).check(_model(null=None))


def test_guidance_does_nothing_with_statistics(saved, capsys):
    words = ["calibrate", "--pipeline", str(saved / "classes"), "--cpu", "--guidance_scale", "2"]
    assert main([*words, "--data", "digits"]) == 2
    assert "does nothing with --objective likelihood" in capsys.readouterr().err
    assert main([*words[:4], "--data", "digits", "--labels", "cat"]) == 2
    assert "it must be data or null with --objective likelihood" in capsys.readouterr().err


def test_the_command_stores_the_scale(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Outcome, "is_better", True)  # of a network that was never trained
    words = ["calibrate", "--objective", "solver", "--pipeline", str(saved / "classes"), "--cpu"]
    words += "--calls 2 --num_images 4 --held_out 2 --trajectory_steps 8 --batch_size 4".split()
    file = tmp_path / "one.json"
    assert main([*words, "--guidance_scale", "2", "--output", str(file)]) == 0
    tables = json.loads(file.read_text())["_ddim_schedulers"]["settings"]["calibration"]["solver"]
    assert tables["2"]["guidance_scale"] == 2.0
    capsys.readouterr()
    assert main([*words, "--labels", "dog", "cat", "--output", str(file)]) == 0
    assert "made at guidance scale 2, is gone" in capsys.readouterr().out
