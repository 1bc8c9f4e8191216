"""Registration with diffusers, and the portable form of a scheduler."""

import importlib
import json
import os
import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    plugin,
    to_portable,
)

CLASSES = (
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    GeneralizedDDIMInverseScheduler,
)


def _plain(config):
    return {k: v for k, v in config.items() if not k.startswith("_")}


@pytest.fixture(scope="module")
def pipeline(tiny_ddpm):
    return tiny_ddpm(MarkovianDDPMScheduler())


def _sample(pipeline, steps=3):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=steps, generator=generator, output_type="np").images


def test_importing_registers_the_classes():
    for cls in CLASSES:
        methods = ["save_pretrained", "from_pretrained"]
        assert pipeline_loading_utils.LOADABLE_CLASSES["ddim_schedulers"][cls.__name__] == methods
        assert pipeline_loading_utils.ALL_IMPORTABLE_CLASSES[cls.__name__] == methods


def test_a_diffusers_without_the_table_is_said_so(monkeypatch):
    monkeypatch.delattr(pipeline_loading_utils, "LOADABLE_CLASSES")
    with pytest.raises(ImportError, match=r"diffusers .* has no LOADABLE_CLASSES"):
        plugin.register()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_pipeline_is_saved_under_our_name_and_loads(cls, pipeline, rounding, tmp_path):
    pipeline.register_modules(scheduler=cls(beta_schedule="squaredcos_cap_v2"))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["ddim_schedulers", cls.__name__]
    for loader in (DiffusionPipeline, DDPMPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is cls
        assert _plain(loaded.scheduler.config) == _plain(pipeline.scheduler.config)
    if cls is not GeneralizedDDIMInverseScheduler:
        assert abs(_sample(loaded) - _sample(pipeline)).max() < rounding
        loaded.scheduler = cls(beta_schedule="linear")  # the bound tells another setting
        assert abs(_sample(loaded) - _sample(pipeline)).max() > 100 * rounding


def test_the_index_passes_the_check_of_a_download(pipeline, tmp_path):
    """`_get_custom_components_and_folders` raises for a module it does not know."""
    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    def check(module, name):
        index = {"_class_name": "DDPMPipeline", "scheduler": [module, name]}
        names = [f"scheduler/{module}.py"] if module == "other" else []
        return _get_custom_components_and_folders("repo", index, "main", names)

    check("ddim_schedulers", "GeneralizedDDIMScheduler")
    with pytest.raises(ValueError, match="is not a module in"):
        check("ddim_schedulers.scheduling_ddim", "GeneralizedDDIMScheduler")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_misspelt_argument_of_from_config_is_refused(cls, pipeline, tmp_path):
    """Stock drops it in silence. What diffusers itself passes, and a config's keys, stay free."""
    config = diffusers.DDIMScheduler().config
    typo = {"timesteps_spacing": "quadratic"}
    assert diffusers.DDIMScheduler.from_config(config, **typo).config.timestep_spacing == "leading"
    said = rf"`timesteps_spacing` is no argument of {cls.__name__} .* is `timestep_spacing`\."
    with pytest.raises(ValueError, match=said):
        cls.from_config(config, **typo)
    with pytest.raises(ValueError, match=r"`x` is no argument"):
        cls.from_config(config, _private=1, eta=0.0, use_karras_sigmas=True, x=1)
    others = {"use_karras_sigmas": True, "solver_type": "heun", "eta": 0.0, "_private": 1}
    assert type(cls.from_config(config, **others)) is cls
    assert type(cls.from_config({**config, **typo})) is cls
    made, unused = cls.from_config(config, return_unused_kwargs=True, **typo)
    assert type(made) is cls and unused.items() >= typo.items()

    cls().save_pretrained(tmp_path / "scheduler")
    hub = {"token": None, "revision": None, "local_files_only": True, "force_download": False}
    loading = {"torch_dtype": torch.float16, "variant": "fp16", "use_safetensors": True}
    options = {"subfolder": "scheduler", **hub, **loading}
    assert type(cls.from_pretrained(tmp_path, **options)) is cls
    made, unused = cls.from_pretrained(tmp_path, return_unused_kwargs=True, **options, **typo)
    assert type(made) is cls and unused.items() >= typo.items()
    with pytest.raises(ValueError, match=said):
        cls.from_pretrained(tmp_path, **options, **typo)
    pipeline.register_modules(scheduler=cls())
    pipeline.save_pretrained(tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p", variant=None)
    assert type(loaded.scheduler) is cls


# -- portable


UNUSUAL = {
    GeneralizedDDIMScheduler: [
        {"eta": 1.0, "reverse_variance": "sigma_hat", "timestep_spacing": "quadratic"},
        {"timesteps": [900, 500, 3], "sigma": [0.1, 0.01, 0.0], "clip_sample": False},
        {"beta_schedule": "laplace", "rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"thresholding": True, "quadratic_end": 1.0, "set_alpha_to_one": False},
        {},
    ],
    MarkovianDDPMScheduler: [
        {"variance_type": "learned_range", "timestep_spacing": "quadratic"},
        {"variance_type": "fixed_large_log", "timesteps": [900, 500, 3]},
        {"beta_schedule": "sigmoid", "prediction_type": "v_prediction"},
        {},
    ],
    GeneralizedDDIMInverseScheduler: [
        {"timestep_spacing": "linspace", "clip_sample": False},
        {"beta_schedule": "sigmoid", "timesteps": [900, 500, 3]},
        {},
    ],
}
CASES = [(cls, settings) for cls, cases in UNUSUAL.items() for settings in cases]


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_from_config_restores_ours_in_full(cls, settings, tmp_path):
    """After saving, loading as stock, and a trip through another stock class."""
    scheduler = cls(**settings)
    stock, notes = to_portable(scheduler)
    assert type(stock).__module__.startswith("diffusers.")
    assert type(stock).__name__ == plugin.STOCK_CLASSES[cls.__name__]
    assert all(isinstance(note, str) and note.endswith(".") for note in notes)
    assert bool(notes) == any(
        key in settings for key in ("eta", "timesteps", "timestep_spacing", "sigma")
    )
    torch.testing.assert_close(stock.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-5)
    stock.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path)
    configs = [stock.config, loaded.config, type(stock).from_config(loaded.config).config]
    if settings.get("beta_schedule") != "sigmoid":  # which stock DDIM does not know
        other = diffusers.DDIMScheduler.from_config(loaded.config)
        configs += [other.config, type(stock).from_config(other.config).config]
    for config in configs:
        restored = cls.from_config(config)
        expected = _plain(scheduler.config)
        assert {k: restored.config[k] for k in expected} == expected
        assert torch.equal(restored.alpha_bar, scheduler.alpha_bar)
        assert "_ddim_schedulers" not in restored.config


def test_a_setting_that_was_changed_since_is_not_put_back():
    stock, _ = to_portable(GeneralizedDDIMScheduler(timestep_spacing="quadratic", eta=0.5))
    changed = diffusers.DDIMScheduler.from_config(stock.config, timestep_spacing="trailing")
    restored = GeneralizedDDIMScheduler.from_config(changed.config)
    assert restored.config.timestep_spacing == "trailing" and restored.config.eta == 0.5


def test_what_has_no_portable_form():
    with pytest.raises(ValueError, match="`prediction_type` is 'posterior_mean'"):
        to_portable(GeneralizedDDIMScheduler(prediction_type="posterior_mean"))
    with pytest.raises(ValueError, match=r"`scheduler` is a DDIMScheduler; .*Generalized"):
        to_portable(diffusers.DDIMScheduler())


@pytest.mark.parametrize("private", ["text", {"settings": 3}, {}])
def test_a_foreign_private_key_is_an_error(private):
    config = {**diffusers.DDIMScheduler().config, "_ddim_schedulers": private}
    with pytest.raises(ValueError, match="`_ddim_schedulers` in the config is .*it must hold"):
        GeneralizedDDIMScheduler.from_config(config)


def test_a_portable_pipeline_loads_without_this_package_and_without_a_warning(pipeline, tmp_path):
    """In a fresh process where importing our package fails; warnings and log lines are errors."""
    scheduler = GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="quadratic", quadratic_end=0.9)
    stock, _ = to_portable(scheduler)
    pipeline.register_modules(scheduler=stock)
    pipeline.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    script = textwrap.dedent(
        """
        import sys, warnings
        sys.modules["ddim_schedulers"] = None  # an import of it raises
        from diffusers import DiffusionPipeline
        warnings.simplefilter("error")
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
        assert type(pipe.scheduler).__name__ == "DDIMScheduler", pipe.scheduler
        assert pipe.scheduler.config["_ddim_schedulers"]["class"] == "GeneralizedDDIMScheduler"
        pipe.set_progress_bar_config(disable=True)
        assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
        print("loaded")
        """
    )
    environment = {
        **os.environ,
        "DIFFUSERS_VERBOSITY": "warning",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pipe")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded"
    assert "ddim" not in done.stderr.lower(), done.stderr
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    restored = GeneralizedDDIMScheduler.from_config(loaded.scheduler.config)
    assert _plain(restored.config) == _plain(scheduler.config)


def test_the_package_names_what_it_exports():
    package = importlib.import_module("ddim_schedulers")
    assert package.__all__ == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
