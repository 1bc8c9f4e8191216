"""The verbs on pipelines whose scheduler was swapped for one of ours, exported in every form."""

import itertools

import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.export import FORMS, save_pipeline
from ddim_schedulers.training import cli
from ddim_schedulers.training.commands import _loading

SOURCES = {
    "stock-ddim": DDIMScheduler(set_alpha_to_one=False),
    "stock-ddpm": DDPMScheduler(variance_type="fixed_large"),
    "ddim": GeneralizedDDIMScheduler(eta=1.0, timestep_spacing="quadratic"),
    "ddpm": MarkovianDDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing"),
}
OURS = (GeneralizedDDIMScheduler, MarkovianDDPMScheduler)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        Image.new("L", (8, 8), 80 * i + 40).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ours", OURS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("source", list(SOURCES))
def test_every_verb_runs_on_a_swapped_export(
    source, ours, form, tiny_ddpm, photos, tmp_path, monkeypatch, capsys
):
    pipe = tiny_ddpm(SOURCES[source])
    pipe.register_modules(scheduler=ours.from_config(pipe.scheduler.config))
    folder = tmp_path / "pipeline"
    save_pipeline(pipe, folder, form)
    saved = _loading.read_saved(str(folder))
    monkeypatch.setattr(_loading, "read_saved", lambda place, **asked: saved)
    diffuse = ["--mode", "diffuse", "--images", photos, "--timestep", "333"]
    verbs = {
        "sample": ["sample", "--num_images", "1"],
        "reconstruct": ["reconstruct", "--images", photos],
        "seeds": ["interpolate", "--seeds", "1", "2", "--num_points", "2"],
        "diffuse": ["interpolate", *diffuse, "--num_points", "2"],
    }
    common = ["--pipeline", str(folder), "--device", "cpu", "--num_inference_steps", "2"]
    for scheduler, (name, words) in itertools.product(("saved", "ddim", "ddpm"), verbs.items()):
        output = str(tmp_path / f"{scheduler}-{name}")
        code = cli.main([*words, *common, "--scheduler", scheduler, "--output", output])
        err = capsys.readouterr().err
        if name == "seeds" and "draws noise" in err:
            assert code == 2 and err.count("\n") <= 2
            # the member decides, not where the scheduler came from
            stands_in = form == "portable" and scheduler == "saved"
            assert scheduler == "ddpm" or not stands_in or ours is MarkovianDDPMScheduler
        else:
            assert code == 0, (scheduler, name, err)


@pytest.mark.parametrize("ours", OURS, ids=lambda cls: cls.__name__)
def test_a_swapped_export_says_the_settings_of_its_own_class_alone(
    ours, tiny_ddpm, tmp_path, capsys
):
    other = {"eta": 1.0, "variance_type": "fixed_large", "timestep_spacing": "quadratic"}
    pipe = tiny_ddpm(DDPMScheduler())
    pipe.register_modules(scheduler=ours.from_config(pipe.scheduler.config, **other))
    save_pipeline(pipe, tmp_path / "pipeline", "portable")
    words = ["sample", "--pipeline", str(tmp_path / "pipeline"), "--num_images", "1"]
    words += ["--num_inference_steps", "2", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    err = capsys.readouterr().err
    assert "timestep_spacing='quadratic'" in err and "variance_type" not in err
    assert ("eta=1.0" in err) == (ours is GeneralizedDDIMScheduler)
