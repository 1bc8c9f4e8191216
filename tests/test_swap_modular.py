"""Our schedulers as components of diffusers' modular pipelines."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.modular_pipelines import ComponentSpec, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

PAIRS = [
    (DDIMScheduler, GeneralizedDDIMScheduler, {"eta": 0.5, "timestep_spacing": "quadratic"}),
    (DDPMScheduler, MarkovianDDPMScheduler, {"timestep_spacing": "quadratic"}),
]


def block(stock):
    """A block that denoises, made as its author makes it: for a stock scheduler."""

    class Denoise(ModularPipelineBlocks):
        expected_components = [  # noqa: RUF012 - a property in diffusers
            ComponentSpec("unet", UNet2DModel),
            ComponentSpec("scheduler", stock),
        ]
        inputs = [InputParam("latents", required=True)]  # noqa: RUF012
        intermediate_outputs = [OutputParam("latents")]  # noqa: RUF012

        @torch.no_grad()
        def __call__(self, components, state):
            here = self.get_block_state(state)
            generator = torch.Generator().manual_seed(0)
            components.scheduler.set_timesteps(4)
            for t in components.scheduler.timesteps:
                output = components.unet(here.latents, t).sample
                step = components.scheduler.step(output, t, here.latents, generator=generator)
                here.latents = step.prev_sample
            self.set_block_state(state, here)
            return components, state

    return Denoise()


def plain(scheduler):
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


@pytest.mark.parametrize(("stock", "cls", "settings"), PAIRS)
def test_a_swapped_component_is_ours_and_gives_the_same(stock, cls, settings, tiny_ddpm):
    x = torch.randn(1, 1, 8, 8)
    pipe = block(stock).init_pipeline()
    pipe.update_components(unet=tiny_ddpm(stock()).unet, scheduler=stock())
    expected = pipe(latents=x, output="latents")
    pipe.update_components(scheduler=cls.from_config(pipe.scheduler.config))
    assert type(pipe.scheduler) is cls
    assert pipe.get_component_spec("scheduler").type_hint is cls
    torch.testing.assert_close(pipe(latents=x, output="latents"), expected, rtol=0, atol=1e-5)
    pipe.update_components(scheduler=cls.from_config(pipe.scheduler.config, **settings))
    assert (pipe(latents=x, output="latents") - expected).abs().max() > 1e-3
    spec = {"config": pipe.scheduler.config, "default_creation_method": "from_config"}
    made = ComponentSpec("scheduler", cls, **spec).create()
    assert type(made) is cls and plain(made) == plain(pipe.scheduler)


@pytest.mark.parametrize(("stock", "cls", "settings"), PAIRS)
def test_our_class_is_loaded_saved_and_loaded_again(stock, cls, settings, tiny_ddpm, tmp_path):
    wanted = cls(**settings)
    tiny_ddpm(wanted).save_pretrained(tmp_path / "a")
    spec = {"pretrained_model_name_or_path": str(tmp_path / "a"), "subfolder": "scheduler"}
    alone = ComponentSpec("scheduler", cls, **spec).load()
    assert type(alone) is cls and plain(alone) == plain(wanted)
    for before, after in (("a", "b"), ("b", "c")):
        pipe = block(stock).init_pipeline(str(tmp_path / before))
        pipe.load_components(["unet", "scheduler"])
        assert type(pipe.scheduler) is cls and plain(pipe.scheduler) == plain(wanted)
        pipe.save_pretrained(str(tmp_path / after), overwrite_modular_index=True)
        index = json.loads((tmp_path / after / "modular_model_index.json").read_text())
        assert index["scheduler"][2]["type_hint"] == ["ddim_schedulers", cls.__name__]
