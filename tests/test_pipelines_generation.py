"""`GenerationPipeline`: who decides what an image looks like, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from tiny_models import tiny_unet

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)
from ddim_schedulers.pipelines import GenerationPipeline, make_grid
from ddim_schedulers.pipelines.pictures import path_grid

SIZE = 8
MEMBERS = {
    "eta 0": lambda: GeneralizedDDIMScheduler(eta=0.0),
    "eta 1": lambda: GeneralizedDDIMScheduler(eta=1.0),
    "sigma-hat": lambda: GeneralizedDDIMScheduler(eta=1.0, reverse_variance="sigma_hat"),
    "ddpm": lambda: MarkovianDDPMScheduler(),
    "stock ddpm": lambda: DDPMScheduler(),
}


class Oracle(ModelMixin, ConfigMixin):
    """The best eps for x_0 ~ N(mean, std^2 I): sqrt(1 - a) (x - sqrt(a) mean) / var(x_t)."""

    @register_to_config
    def __init__(
        self, mean=0.0, std=1.0, scale=1.0, sample_size=SIZE, in_channels=1, out_channels=1
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.alpha_bar = GeneralizedDDIMScheduler().alpha_bar

    def forward(self, sample, timestep):
        a = float(self.alpha_bar[int(timestep)])
        c = self.config
        eps = (1 - a) ** 0.5 * (sample - a**0.5 * c.mean) / (a * c.std**2 + 1 - a)
        return UNet2DOutput(sample=c.scale * eps)


def pipeline(scheduler=None, unet=None, cls=GenerationPipeline):
    pipe = cls(unet=unet or tiny_unet(), scheduler=scheduler or GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, **kwargs):
    return pipe(num_inference_steps=4, output_type="latent", **kwargs).images


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_an_image_depends_on_its_seed_alone(member, dtype, bound):
    pipe = pipeline(MEMBERS[member](), tiny_unet().to(dtype))
    seeds = [7, 3, 2**63 - 1, 0, *range(100, 112)]
    whole = latents_of(pipe, seeds=seeds, batch_size=16)
    assert whole.dtype == dtype and len(whole) == 16
    for batch_size in (1, 3):
        assert (latents_of(pipe, seeds=seeds, batch_size=batch_size) - whole).abs().max() < bound
    backwards = latents_of(pipe, seeds=seeds[::-1], batch_size=5)
    assert (backwards.flip(0) - whole).abs().max() < bound
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("member", MEMBERS)
def test_the_noise_is_equal_to_the_bit(member):
    # with eps = 0 the sample is a sum of its noises alone, and no sum runs over the batch
    pipe = pipeline(MEMBERS[member](), Oracle(scale=0.0))
    pipe.scheduler.register_to_config(clip_sample=False)
    whole = latents_of(pipe, seeds=range(16), batch_size=16)
    for batch_size in (1, 3):
        assert torch.equal(latents_of(pipe, seeds=range(16), batch_size=batch_size), whole)


def test_one_shared_generator_is_caught_by_the_same_check():
    pipe = pipeline(GeneralizedDDIMScheduler(eta=1.0, clip_sample=False), Oracle(scale=0.0))
    runs = [
        latents_of(pipe, num_images=6, generator=torch.Generator().manual_seed(0), batch_size=b)
        for b in (6, 3)
    ]
    assert not torch.equal(*runs)


def test_generators_draw_as_in_the_stock_pipelines():
    unet = tiny_unet()
    for stock, scheduler in ((DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())):
        theirs = stock(unet=unet, scheduler=scheduler)
        theirs.set_progress_bar_config(disable=True)
        eta = {"eta": 1.0} if stock is DDIMPipeline else {}
        for make in (
            lambda: torch.Generator().manual_seed(5),
            lambda: [torch.Generator().manual_seed(s) for s in range(3)],
        ):
            ours = GenerationPipeline.from_pipe(theirs)
            ours.set_progress_bar_config(disable=True)
            kwargs = {"num_inference_steps": 4, "output_type": "np", **eta}
            expected = theirs(batch_size=3, generator=make(), **kwargs).images
            assert np.array_equal(ours(num_images=3, generator=make(), **kwargs).images, expected)
        seeded = ours(seeds=range(3), **kwargs).images
        assert np.array_equal(seeded, expected)


def test_without_seeds_they_are_drawn_and_returned():
    pipe = pipeline()
    torch.manual_seed(3)
    first = pipe(num_images=2, num_inference_steps=3, output_type="np")
    torch.manual_seed(3)
    again = pipe(num_images=2, num_inference_steps=3, output_type="np")
    remade = pipe(seeds=first.seeds, num_inference_steps=3, output_type="np")
    assert first.seeds == again.seeds and len(set(first.seeds)) == 2
    assert np.array_equal(first.images, again.images) and np.array_equal(
        first.images, remade.images
    )


@pytest.mark.parametrize("stock", [DDPMPipeline, DDIMPipeline])
def test_loads_a_stock_repository(stock, rounding, tmp_path):
    scheduler = DDPMScheduler() if stock is DDPMPipeline else DDIMScheduler()
    stock(unet=tiny_unet(), scheduler=scheduler).save_pretrained(tmp_path)
    pipe = GenerationPipeline.from_pretrained(str(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is type(scheduler)
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, eta=1.0)
    pipe.save_pretrained(tmp_path / "ours")
    again = GenerationPipeline.from_pretrained(str(tmp_path / "ours"))
    again.set_progress_bar_config(disable=True)
    one, other = latents_of(again, seeds=[1]), latents_of(pipe, seeds=[1])
    assert (one - other).abs().max() < 2 * rounding  # latents go from -1 to 1


def test_from_pipe_shares_the_network_and_leaves_the_source_alone():
    source = DDPMPipeline(unet=tiny_unet().double(), scheduler=DDPMScheduler())
    before = (dict(source.scheduler.config), source.scheduler.timesteps.clone(), source.dtype)
    pipe = GenerationPipeline.from_pipe(source)
    pipe.set_progress_bar_config(disable=True)
    latents_of(pipe, seeds=[0])
    assert pipe.unet is source.unet and pipe.dtype == source.dtype == torch.float64
    assert pipe.scheduler is not source.scheduler
    after = (dict(source.scheduler.config), source.scheduler.timesteps, source.dtype)
    assert after[0] == before[0] and torch.equal(after[1], before[1]) and after[2] == before[2]
    swapped = GenerationPipeline.from_pipe(source, scheduler=MarkovianDDPMScheduler())
    assert isinstance(swapped.scheduler, MarkovianDDPMScheduler)
    assert GenerationPipeline(**pipe.components).scheduler is pipe.scheduler


def test_schedulers_that_do_not_fit_raise():
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(),
        EulerDiscreteScheduler(),
        EDMEulerScheduler(),
        DDIMInverseScheduler(),
        GeneralizedDDIMInverseScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ):
        with pytest.raises(ValueError, match=type(scheduler).__name__):
            GenerationPipeline(unet=tiny_unet(), scheduler=scheduler)
    pipe = pipeline()
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        pipe()


def test_other_conditions_than_a_class_raise():
    for kind in ("timestep", "identity"):
        with pytest.raises(ValueError, match=f"`unet` does not fit: `class_embed_type` is '{kind}"):
            pipeline(unet=tiny_unet(class_embed_type=kind))
    conditioned = UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(4, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        pipeline(unet=conditioned)


# diffusers itself converts a tensor in a way that numpy 2 deprecates (`__array__`,
# `__array_wrap__`)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize(
    "cls", [DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler]
)
def test_multistep_schedulers_start_each_chunk_afresh(cls):
    pipe = pipeline(cls())
    whole = latents_of(pipe, seeds=range(4), batch_size=4)
    apart = latents_of(pipe, seeds=range(4), batch_size=1)
    assert ((apart - whole).abs().max() / whole.abs().max()) < 1e-4


def test_the_path_leads_from_noise_to_the_image():
    pipe = pipeline()
    output = pipe(
        seeds=[4, 5, 6],
        timesteps=[900, 500, 20],
        return_path=True,
        batch_size=2,
        output_type="latent",
    )
    path = output.path
    assert path.timesteps == [900, 500, 20]
    assert path.x_t.shape == (4, 3, 1, SIZE, SIZE) and path.x0.shape == (3, 3, 1, SIZE, SIZE)
    assert torch.equal(path.x_t[-1], output.images) and torch.equal(path.x0[-1], output.images)
    noise = torch.randn((1, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(5))
    assert torch.equal(path.x_t[0, 1:2], noise)
    halfway = latents_of_from(pipe, path.x_t[1], 500)
    assert (halfway - output.images).abs().max() < 1e-5
    assert path_grid(path, 3).size == (3 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)


def latents_of_from(pipe, x_t, t):
    return pipe(
        latents=x_t,
        start_timestep=t,
        timesteps=[900, 500, 20],
        output_type="latent",
        seeds=[0] * len(x_t),
    ).images


def test_variations_share_x_t():
    pipe = pipeline(MarkovianDDPMScheduler())
    tau = [900, 500, 20]
    output = pipe.variations(1, [900, 20], [5, 6], timesteps=tau, output_type="np")
    assert [len(images) for images in output.images] == [2, 2]
    # the step from the last timestep adds no noise, so that everything is shared there
    assert np.allclose(output.images[1], output.original, atol=1e-6)
    assert np.abs(output.images[0][0] - output.images[0][1]).max() > 0.01
    # a level between planned ones is the nearest of them; of two, the larger
    close = pipe.variations(1, [700, 19], [5, 6], timesteps=tau, output_type="np")
    assert close.timesteps == [900, 20]
    assert all(np.array_equal(a, b) for a, b in zip(close.images, output.images, strict=True))
    for level in (1000, -1, 1.5, True):
        with pytest.raises(ValueError, match="`share_at` has .*; each must be an integer in 0"):
            pipe.variations(1, [level], [5], timesteps=tau)
    with pytest.raises(ValueError, match="`variation_seeds` is {5, 6}; it must be"):
        pipe.variations(1, [900], {5, 6}, timesteps=tau)
    with pytest.raises(ValueError, match="eta"):
        pipeline(GeneralizedDDIMScheduler()).variations(1, [900], [5], timesteps=tau)


def test_clipping_is_reported_where_it_destroys(caplog):
    # x_0 ~ N(0, 2^2): clipping to [-1, 1] ruins it, as it ruins latents; N(0, 0.2^2) is not touched
    shares = {}
    for std in (2.0, 0.2):
        pipe = pipeline(GeneralizedDDIMScheduler(clip_sample=True), Oracle(std=std))
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            shares[std] = pipe(
                seeds=range(8), num_inference_steps=10, output_type="pt"
            ).clipped_share
        warned = "clip_sample=False" in caplog.text
        assert warned == (std == 2.0)
        caplog.clear()
    assert shares[2.0] > 0.05 and shares[0.2] == 0.0
    pipe = pipeline(GeneralizedDDIMScheduler(clip_sample=False), Oracle(std=2.0))
    assert pipe(seeds=[0], num_inference_steps=5).clipped_share is None


def test_callback_sees_and_replaces():
    seen = []

    def callback(pipe, index, t, tensors):
        seen.append((index, int(t), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    pipe = pipeline()
    output = pipe(
        seeds=[0, 1],
        timesteps=[800, 10],
        batch_size=1,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        output_type="latent",
    )
    names = ["latents", "pred_original_sample"]
    assert seen == [(0, 800, names), (1, 10, names)] * 2
    assert not output.images.any()
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipe(callback_on_step_end_tensor_inputs=["x"])


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types_agree(channels):
    pipe = pipeline(unet=tiny_unet(channels))
    got = {
        kind: pipe(seeds=range(3), num_inference_steps=3, output_type=kind, batch_size=2).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert got["np"].shape == (3, SIZE, SIZE, channels) and got["np"].dtype == np.float32
    assert np.array_equal(got["np"], got["pt"].movedim(1, -1).numpy())
    assert torch.equal(got["pt"], (got["latent"] / 2 + 0.5).clamp(0, 1))
    for image, array in zip(got["pil"], got["np"], strict=True):
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        assert np.array_equal(np.asarray(image).reshape(array.shape), (array * 255).round())
    assert pipe(seeds=[0], num_inference_steps=2, return_dict=False)[0][0].size == (SIZE, SIZE)
    assert isinstance(make_grid(got["np"], 2), Image.Image)


def test_a_single_seed_is_one_image():
    pipe = pipeline()
    for seed in (5, np.int64(5)):
        assert torch.equal(latents_of(pipe, seeds=seed), latents_of(pipe, seeds=[5]))
    with pytest.raises(ValueError, match="contradict"):
        pipe(2, seeds=5)


def test_a_half_precision_network_keeps_the_sample_in_float32():
    pipe = pipeline(GeneralizedDDIMScheduler(eta=1.0), tiny_unet().to(torch.bfloat16))
    assert latents_of(pipe, seeds=[0, 1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 2, "seeds": [1]}, "contradict"),
        ({"num_images": 0}, "num_images"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [1.5]}, "seeds"),
        ({"seeds": [1], "generator": torch.Generator()}, "generator"),
        ({"batch_size": 0}, "batch_size"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_inference_steps": 3, "timesteps": [3, 1]}, "timesteps"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, "latents"),
        ({"latents": torch.full((1, 1, SIZE, SIZE), torch.nan)}, "finite"),
        ({"start_timestep": 3, "timesteps": [3, 1]}, "start_timestep"),
        ({"seeds": 5.0}, "`seeds` is 5.0; it must be an integer, or"),
        (
            {"seeds": {3: "a", 1: "b"}},
            "`seeds` is {3: 'a', 1: 'b'}; it must be an integer, or a list",
        ),
        ({"seeds": {3, 1}}, "`seeds` is {1, 3}; it must be an integer, or"),
        ({"generator": 5}, "generator"),
        ({"generator": [5]}, "generator"),
        ({"timesteps": 5}, "timesteps"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` is 3; it must be None or a function"),
        ({"callback_on_step_end": lambda *_: {"latent": 0}}, "latent"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 1, 4, 4)}}, "shape"),
    ],
)
def test_bad_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**kwargs)


def test_arguments_that_the_scheduler_would_ignore_raise():
    with pytest.raises(ValueError, match="eta"):
        pipeline(MarkovianDDPMScheduler())(eta=0.5, num_inference_steps=2)
    with pytest.raises(ValueError, match="timesteps"):
        pipeline(DDIMScheduler())(timesteps=[500, 1])
    x = torch.zeros(1, 1, SIZE, SIZE)
    with pytest.raises(ValueError, match="DEISMultistepScheduler"):
        pipeline(DEISMultistepScheduler())(latents=x, start_timestep=1, num_inference_steps=3)


def test_an_eta_that_the_config_overrules_raises():
    for config, eta in (({"eta": 1.0}, 0.5), ({"eta": 1.0}, 0.0), ({"sigma": [0.0, 0.0]}, 1.0)):
        pipe = pipeline(GeneralizedDDIMScheduler(**config))
        with pytest.raises(ValueError, match="config says"):
            pipe(eta=eta, num_inference_steps=2)
    frozen = pipeline(GeneralizedDDIMScheduler(eta=0.0))
    with pytest.raises(ValueError, match="config says"):
        frozen.variations(1, [500], [5, 6], eta=1.0, num_inference_steps=2)
    same = pipeline(GeneralizedDDIMScheduler(eta=1.0))(seeds=[0], eta=1.0, num_inference_steps=2)
    assert len(same.images) == 1


@pytest.mark.parametrize("eta", [-1, float("nan"), float("inf"), 1000, "x", True])
@pytest.mark.parametrize("cls", [DDIMScheduler, GeneralizedDDIMScheduler])
def test_an_eta_out_of_range_raises_with_every_scheduler(cls, eta):
    with pytest.raises(ValueError, match="`?eta`?.* must"):
        pipeline(cls())(seeds=[0], eta=eta, num_inference_steps=2)
    assert len(pipeline(cls())(seeds=[0], eta=1, num_inference_steps=2).images) == 1


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_samples_that_are_not_finite_raise(output_type):
    pipe = pipeline()
    right = pipe.unet.forward

    def overflows(sample, timestep):
        output = right(sample, timestep)
        output.sample[-1, ..., 0, 0] = torch.inf  # of the last image of each chunk
        return output

    pipe.unet.forward = overflows
    kwargs = {"num_inference_steps": 2, "output_type": output_type}
    with pytest.raises(ValueError, match="1 of 2 samples are not finite: seeds 8[.].*float16"):
        pipe(seeds=[7, 8, 9], batch_size=2, **kwargs)
    latents = torch.zeros(3, 1, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"not finite: images 2 \(counted from 0\)"):
        pipe(latents=latents, seeds=[0] * 3, batch_size=3, **kwargs)


def test_finiteness_is_read_once_for_each_chunk(monkeypatch):
    from ddim_schedulers.pipelines import images

    right, reads = images.check_finite, []
    monkeypatch.setattr(images, "check_finite", lambda *a: reads.append(len(a[0])) or right(*a))
    pipeline()(seeds=range(5), batch_size=2, num_inference_steps=3)
    assert reads == [2, 2, 1]


def test_an_explicit_sigma_says_how_many_steps_there_are():
    pipe = pipeline(GeneralizedDDIMScheduler(sigma=[0.3, 0.0, 0.0]))
    assert len(pipe(seeds=[0], return_path=True).path.timesteps) == 3


@pytest.mark.parametrize(
    "solver",
    [
        {"solver_order": 2},
        {"solver_order": 3, "solver_corrector": True},
        {"solver_order": 2, "eta": 1.0},
    ],
)
def test_higher_orders_carry_no_history_from_chunk_to_chunk(solver):
    pipe = pipeline(GeneralizedDDIMScheduler(**solver), tiny_unet().double())
    kwargs = {"num_inference_steps": 6, "output_type": "latent"}
    together = pipe(seeds=range(5), **kwargs).images
    for size in (1, 3):
        apart = pipe(seeds=range(5), batch_size=size, **kwargs).images
        assert (apart - together).abs().max() < 1e-10


def test_a_sampler_without_noise_takes_a_network_with_a_learned_variance():
    unet = tiny_unet()
    wide = UNet2DModel.from_config({**unet.config, "out_channels": 2}).eval()
    weights = wide.state_dict()
    for name, value in unet.state_dict().items():
        weights[name][: len(value)] = value
    wide.load_state_dict(weights)
    kwargs = {"seeds": [0, 1]}
    for scheduler in (GeneralizedDDIMScheduler, DDIMScheduler):
        expected = latents_of(pipeline(scheduler(), unet), **kwargs)
        assert torch.allclose(latents_of(pipeline(scheduler(), wide), **kwargs), expected)
    with pytest.raises(ValueError, match="model_output"):
        latents_of(pipeline(GeneralizedDDIMScheduler(), wide), eta=1.0, **kwargs)


def test_unet_with_odd_channels_needs_arrays():
    pipe = pipeline(unet=tiny_unet(2))
    with pytest.raises(ValueError, match="2 channels"):
        pipe(seeds=[0])
    assert pipe(seeds=[0], num_inference_steps=2, output_type="np").images.shape[-1] == 2


def test_samples_of_the_exact_network_have_its_moments():
    pipe = pipeline(MarkovianDDPMScheduler(clip_sample=False), Oracle(mean=0.3, std=0.5))
    x = pipe(seeds=range(64), num_inference_steps=100, output_type="latent").images
    assert abs(float(x.mean()) - 0.3) < 0.03 and abs(float(x.std()) - 0.5) < 0.03


def test_seeds_may_come_from_numpy():
    pipe = GenerationPipeline(tiny_unet(), GeneralizedDDIMScheduler())
    settings = dict(num_inference_steps=2, output_type="latent")
    got = pipe(seeds=np.arange(2), **settings)
    assert torch.equal(got.images, pipe(seeds=[0, 1], **settings).images)
    assert [type(seed) for seed in got.seeds] == [int, int]
