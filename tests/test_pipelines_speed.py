"""What makes a pipeline faster on request: compilation, memory format, dtype."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline, InversionPipeline
from ddim_schedulers.pipelines.sampling import predict
from ddim_schedulers.pipelines.sampling_job import SamplingJob, sample_to_directory

# diffusers' own, said by torch's compiler about the upsampling block
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def pipeline(cls=GenerationPipeline, **settings):
    pipe = cls(tiny_unet(), GeneralizedDDIMScheduler(**{"clip_sample": False, **settings}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def shapes():
    """A backend that counts its graphs, and the batch sizes that it was asked to compile."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4])
        return graph.forward

    seen_by = (seen, {"backend": backend, "dynamic": False})
    yield seen_by
    torch._dynamo.reset()


def test_a_smaller_last_batch_does_not_compile_again(shapes):
    seen, options = shapes
    pipe = pipeline()
    settings = dict(num_inference_steps=3, batch_size=2, output_type="latent")
    expected = pipe(seeds=range(5), **settings).images
    got = pipe.speed_up(compile=options).__call__(seeds=range(5), **settings).images
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    compiled = len(seen)
    assert compiled >= 1
    # another member and another trajectory are numbers, not code
    pipe.scheduler = GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="trailing")
    pipe(seeds=range(3), **{**settings, "num_inference_steps": 5})
    assert len(seen) == compiled
    # the check itself: without the filling up there is a second shape
    predict(pipe.unet, torch.zeros(1, 1, 8, 8), 5)
    assert len(seen) > compiled


def test_inversion_with_a_compiled_network_compiles_once(shapes):
    seen, options = shapes
    pipe = pipeline(InversionPipeline)
    images = torch.rand(3, 1, 8, 8)
    settings = dict(num_inference_steps=3, batch_size=2, refinements=2)
    expected = pipe(images, **settings).latents
    got = pipe.speed_up(compile=options)(images, **settings).latents
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    first = seen[0]
    assert all(shape[0] == first[0] for shape in seen if shape)


def test_files_of_a_compiled_network_are_those_of_the_eager_one(shapes, tmp_path):
    seen, options = shapes
    job = SamplingJob(num_images=3, batch_size=2, num_inference_steps=2, file_format="png")
    sample_to_directory(pipeline(), tmp_path / "eager", job)
    sample_to_directory(pipeline().speed_up(compile=options), tmp_path / "compiled", job)
    names = sorted(p.name for p in (tmp_path / "eager" / "images").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "compiled" / "images").iterdir())
    assert len(names) == 3
    for name in names:
        eager, compiled = (
            np.asarray(Image.open(tmp_path / k / "images" / name)).astype(int)
            for k in ("eager", "compiled")
        )
        # the last batch is filled up, so its sums come out otherwise, and may round to a neighbour
        assert eager.shape == (8, 8) and abs(eager - compiled).max() <= 1
    said = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/sample.json"))]
    assert [s["compiled"] for s in said] == [True, False]


def test_network_and_step_are_one_graph(shapes):
    seen, options = shapes
    pipe = pipeline(clip_sample=True)
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(4)

    def whole(x, t):
        return scheduler.step(unet(x, t).sample, t, x, return_dict=False)[0]

    step = torch.compile(whole, fullgraph=True, **options)
    x = expected = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        whole(x, scheduler.timesteps[0])  # the first step makes the table
        for t in scheduler.timesteps:
            x, expected = step(x, t), whole(expected, t)
    torch.testing.assert_close(x, expected)
    assert len(seen) == 1


def test_options_compose_and_the_sample_keeps_float32(log):
    pipe = pipeline()
    settings = dict(seeds=[0, 1], num_inference_steps=3, output_type="latent", return_path=True)
    expected = pipe(**settings)
    got = pipe.speed_up(channels_last=True, dtype=torch.bfloat16)(**settings)
    weight = pipe.unet.conv_out.weight
    assert pipe.unet.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert got.path.x_t[1].dtype == got.images.dtype == torch.float32
    torch.testing.assert_close(got.images, expected.images, rtol=0.05, atol=0.05)
    assert not torch.equal(got.images, expected.images)
    assert not log.records


def test_modules_that_belong_in_float32_are_told_of(log, monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(type(pipe.unet), "_keep_in_fp32_modules", ["time_embedding"])
    pipe.speed_up(dtype=torch.bfloat16)
    assert "should be kept in float32: ['time_embedding']" in log.text


def test_a_network_compiled_by_the_user_is_taken(shapes):
    _, options = shapes
    pipe = pipeline()
    settings = dict(seeds=range(3), batch_size=2, num_inference_steps=2, output_type="latent")
    expected = pipe(**settings).images
    pipe.unet = torch.compile(pipe.unet, **options)
    torch.testing.assert_close(pipe(**settings).images, expected, rtol=0, atol=1e-5)
