"""`calibrate --dtype --channels_last --compile`: a faster network, and numbers that stay wide."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines.sampling import speed_up
from ddim_schedulers.training.calibration import samples_run, solver_run
from ddim_schedulers.training.calibration.predictor import Guiding, Predictor
from ddim_schedulers.training.calibration.samples_job import SamplesJob
from ddim_schedulers.training.calibration.samples_space import Space
from ddim_schedulers.training.calibration.solver_fit import Constants
from ddim_schedulers.training.calibration.solver_job import SolverJob
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.likelihood import calibration
from ddim_schedulers.training.likelihood.measured_model import measured_model_of
from ddim_schedulers.training.metrics.features import make_feature_space

# diffusers' own, said by torch's compiler about the upsampling block
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")

JOB = SolverJob((3,), 16, 16, steps=8, batch_size=16, constants=Constants(iterations=1))
PLACES = {
    "solver": (solver_run, "calibrate_solver"),
    "samples": (samples_run, "calibrate_samples"),
    "trajectory": (calibration, "measure_trajectory"),
}


def _model(classes=None, blocks=(8, 8), **faster):
    unet = tiny_unet(blocks=blocks, num_class_embeds=classes)
    if classes is not None:
        note_class_labels(unet, classes - 1)
    speed_up(unet, **faster)
    return measured_model_of(unet, dict(DDPMScheduler().config))


@pytest.fixture
def compiled():
    """A backend of the compiler that counts what it is asked for."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield graphs, {"backend": backend}
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "p"
    DDPMPipeline(tiny_unet(blocks=(8, 8)), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", PLACES)
def test_the_options_reach_the_network(objective, saved, monkeypatch, capsys):
    seen, compiled = [], []

    def look(model, *_, **__):
        seen.append(model)
        raise ValueError("that is enough")

    monkeypatch.setattr(*PLACES[objective], look)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    words = ["calibrate", "--pipeline", str(saved), "--objective", objective, "--cpu"]
    words += ["--data", "digits", "--features", "pixels", "details"] * (objective == "samples")
    assert main(words) == main([*words, "--dtype", "bfloat16", "--channels_last", "--compile"]) == 2
    assert capsys.readouterr().err.count("that is enough") == 2
    plain, faster = seen
    assert (plain.dtype, faster.dtype) == (torch.float32, torch.bfloat16)
    assert [each is faster.unet for each in compiled] == [True]
    assert faster.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.state_dtype == faster.state_dtype == torch.float32


@pytest.mark.parametrize("idle", ["--dtype bfloat16", "--channels_last", "--compile"])
@pytest.mark.parametrize("kind", ["--undo", "--objective likelihood"])
def test_they_are_refused_where_they_do_nothing(kind, idle, saved, capsys):
    assert main(["calibrate", "--pipeline", str(saved), *kind.split(), *idle.split()]) == 2
    assert f"does nothing with {kind}, leave it out" in capsys.readouterr().err


def test_predictions_are_kept_in_the_dtype_of_the_sample():
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    models = _model(), _model(dtype=torch.bfloat16)
    plain, half = (Predictor(model).output(x, 500) for model in models)
    assert half.dtype == plain.dtype == torch.float32 and not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.05)


def test_a_table_of_a_bfloat16_network_is_close(tmp_path):
    entries = []
    for faster in ({}, {"dtype": torch.bfloat16, "channels_last": True}):
        work_dir = tmp_path / str(len(entries))
        (found,), _ = solver_run.calibrate_solver(_model(**faster), JOB, work_dir=work_dir)
        assert found.held_out < 0.5 * found.analytic
        entries.append(found.entry)
    plain, half = entries
    assert plain.keys() == half.keys() and plain["weights"] != half["weights"]
    assert half["timesteps"] == pytest.approx(plain["timesteps"], abs=15)
    for row, expected in zip(half["weights"], plain["weights"], strict=True):
        assert row == pytest.approx(expected, rel=0.1, abs=0.05)


def test_a_trajectory_of_a_bfloat16_network_is_close(monkeypatch):
    seen, step = set(), GeneralizedDDIMScheduler.step

    def watched(self, output, t, x, **settings):
        seen.add((output.dtype, x.dtype))
        return step(self, output, t, x, **settings)

    monkeypatch.setattr(GeneralizedDDIMScheduler, "step", watched)
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        measured, _ = calibration.measure_trajectory(
            _model(dtype=dtype), num_samples=6, steps=5, batch_size=4
        )
        points = torch.tensor(measured["trajectory"]["points"], dtype=torch.float64)
        curves.append(points @ points.T)
    assert seen == {(torch.float32, torch.float32)}
    assert not torch.equal(*curves)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.05, atol=0.01)


def _samples(model, folder):
    job = SamplesJob((2,), 48, space=Space(((0.0, None),), (1.0,), rounds=0))
    data, shape = _Noise(torch.rand(48, 1, 8, 8) * 2 - 1), (1, 8, 8)
    spaces = {name: make_feature_space(name, shape) for name in ("pixels", "details")}
    return samples_run.calibrate_samples(model, data, spaces, job, work_dir=folder)


class _Noise:
    """Images as the search reads them."""

    shape = (1, 8, 8)

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batch(self, rows):
        return self.images[torch.as_tensor(np.asarray(rows))], None


@pytest.mark.parametrize("objective", ["solver", "samples"])
def test_parts_belong_to_a_dtype(objective, tmp_path):
    def calibrate(**faster):
        torch.manual_seed(0)
        if objective == "samples":
            return _samples(_model(**faster), tmp_path)[1]
        return solver_run.calibrate_solver(_model(**faster), JOB, work_dir=tmp_path)[1]

    assert calibrate()["evaluations"] > 0
    with pytest.raises(ValueError, match=r"`work_dir` is .*dtype: 'torch.float32'"):
        calibrate(dtype=torch.bfloat16)
    # the memory format and the compiler are no other network
    assert calibrate(channels_last=True, compile={"backend": "eager"})["evaluations"] == 0


def test_batches_of_many_sizes_compile_a_few_times(compiled):
    graphs, options = compiled
    model = _model(3, (8,), compile=options).labelled(torch.tensor([0, 1]))
    predictor = Predictor(model, Guiding(2.0))
    for t, size in enumerate((40, 36, 33, 47, 6, 5, 7), 400):
        predictor(torch.zeros(size, 1, 8, 8), torch.tensor(t) if size % 2 else t)
    assert 1 <= len(graphs) <= 3
