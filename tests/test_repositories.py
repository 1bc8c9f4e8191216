"""Pipelines of a Hub: one state by name, checked before it is built, safetensors alone."""

import json
import re
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load
from tiny_models import latent_pipeline

from ddim_schedulers.training.cli import main
from ddim_schedulers.training.commands._loading import read_saved
from ddim_schedulers.training.common import repositories
from ddim_schedulers.training.common.repositories import divided, pinned
from ddim_schedulers.training.config import DataConfig, TrainingConfig
from ddim_schedulers.training.data import sources
from ddim_schedulers.training.likelihood.measured_model import load_measured_model
from ddim_schedulers.training.networks import places
from ddim_schedulers.training.networks.models import load_unet
from ddim_schedulers.training.train import train

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SAMPLE = ("--num_images", "1", "--num_inference_steps", "2", "--device", "cpu")


def files_of(pipeline, folder):
    pipeline.save_pretrained(folder)
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def states(tiny_ddpm, tmp_path_factory):
    """The files of a repository before and after somebody trained its network on."""
    pipeline = tiny_ddpm(DDPMScheduler(num_train_timesteps=12, beta_end=0.5))
    before = files_of(pipeline, tmp_path_factory.mktemp("before"))
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(3.0)
    return before, files_of(pipeline, tmp_path_factory.mktemp("after"))


@pytest.fixture
def hub(loopback_hub, monkeypatch, tmp_path):
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", loopback_hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return loopback_hub


@pytest.fixture
def two_states(hub, states):
    """`me/model`, and its commits: the first, the second, and that of its branch."""
    repo = hub.add_repo("me/model", states[0])
    first = repo.branches["main"]
    repo.branches["next"] = first
    return first, repo.commit("main", states[1], "trained on")


def bias(unet):
    return unet.conv_out.bias.detach()


def test_names_and_revisions():
    assert divided("me/model") == ("me/model", None)
    assert divided("me/model@v1.0") == ("me/model", "v1.0")
    assert divided("model@refs/pr/1") == ("model", "refs/pr/1")
    for address in ("hf://datasets/me/set@v1/a.parquet", "me/model@", "me/model@-x", "a b@c"):
        assert divided(address) == (address, None)
    assert pinned("me/model", None) == "me/model"
    assert pinned("me/model", "v1") == "me/model@v1"


def test_the_hub_is_named_once_and_by_the_main_process_alone(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    places.find("me/told")
    assert capsys.readouterr().err == ""
    repositories.tell_of_hub.cache_clear()
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        places.find("me/told")
    said = "pipeline 'me/told' is no folder here; it is looked for on the Hub\n"
    assert capsys.readouterr().err == said


def test_a_revision_of_what_has_none_is_refused(tmp_path):
    for place, revision in ((str(tmp_path), "v1"), ("me/model@v1", "v2"), ("me/model", "-x; y")):
        with pytest.raises(ValueError, match="`--revision` is '"):
            pinned(place, revision)


def test_an_install_without_accelerate_is_not_told_of_it(tiny_ddpm, monkeypatch, tmp_path):
    import diffusers.models.modeling_utils
    import diffusers.pipelines.pipeline_utils

    tiny_ddpm(DDPMScheduler()).save_pretrained(tmp_path)
    parts = (diffusers.utils, diffusers.models.modeling_utils, diffusers.pipelines.pipeline_utils)
    said = []
    for part in parts:
        monkeypatch.setattr(part, "is_accelerate_available", lambda: False)
    for part in parts[1:]:
        monkeypatch.setattr(part.logger, "warning", said.append)
    assert read_saved(str(tmp_path)).unet is not None and said == []


def test_each_state_is_read_by_its_name(two_states, states, capsys):
    first, second = two_states
    for name, commit, files in (
        ("me/model", second, states[1]),
        ("me/model@main", second, states[1]),
        (f"me/model@{first}", first, states[0]),
        ("me/model@next", first, states[0]),
    ):
        wanted = load(files[WEIGHTS])["conv_out.bias"]
        saved, measured_model = read_saved(name), load_measured_model(name)
        unet = load_unet(name, channels=1, size=(8, 8), learned_variance=False)
        for network in (saved.unet, measured_model.unet, unet):
            assert torch.equal(bias(network), wanted)
            assert network.config._name_or_path == f"me/model@{commit}"
        assert measured_model.commit == f"me/model@{commit}"
        assert commit in capsys.readouterr().err


def test_a_revision_that_is_not_there_is_said(two_states):
    for load_it in (read_saved, load_measured_model):
        with pytest.raises(ValueError, match="'me/model@gone', .*cannot be loaded: .*gone"):
            load_it("me/model@gone")


def test_the_files_say_which_state_was_used(two_states, tmp_path, capsys):
    first, second = two_states
    at = f"me/model@{first}"
    words = ["sample", "--pipeline", "me/model", *SAMPLE]
    assert main([*words, "--revision", first, "--output", "o"]) == 0
    settings = json.loads((tmp_path / "o" / "sample.json").read_text())
    assert settings["pipeline"] == at
    # the weights decide whether a folder goes on, not the name
    del settings["pipeline"]
    (tmp_path / "o" / "sample.json").write_text(json.dumps(settings))
    assert main([*words[:2], at, *SAMPLE, "--output", "o"]) == 0
    assert main([*words, "--output", "o"]) == 2  # the newest state has other weights
    assert main(["export", "--pipeline", at, "--output", "made"]) == 0
    config = json.loads((tmp_path / "made" / "unet" / "config.json").read_text())
    assert config["_name_or_path"] == at
    words = ["--data", "d.npy", "--num_images", "2", "--steps", "2", "--cpu", "--output_dir", "l"]
    np.save("d.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1)).astype(np.uint8))
    assert main(["likelihood", "--pipeline", "me/model", "--revision", first, *words]) == 0
    assert json.loads((tmp_path / "l" / "likelihood.json").read_text())["pipeline"] == at
    words = ["calibrate", "--pipeline", "me/model", "--output", "c", "--objective", "trajectory"]
    words += ["--trajectory_steps", "4", "--num_images", "2", "--cpu"]
    assert main([*words, "--revision", first]) == 0
    assert at in capsys.readouterr().err
    assert main([*words, "--revision", "gone"]) == 2


def test_an_evaluation_and_a_training_run_say_which_state(two_states, tmp_path):
    first, second = two_states
    np.save("d.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    grid = [{"steps": [2], "members": [0]}]
    settings = {"pipeline": "me/model", "output_dir": "e", "neighbours": 1}
    settings["data"] = {"data": "d.npy", "validation_fraction": 0.5}
    settings["tables"] = [{"name": "a", "n": 2, "grid": grid}]
    (tmp_path / "e.json").write_text(json.dumps(settings))
    assert main(["evaluate", "--config", "e.json", "--revision", first, "--cpu"]) == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["pipeline"] == f"me/model@{first}"
    config = TrainingConfig(
        data="d.npy",
        from_pretrained=f"me/model@{first}",
        output_dir="run",
        cpu=True,
        batch_size=2,
        max_train_steps=1,
        num_train_timesteps=12,
        progress_bar=False,
    )
    result = train(config)
    saved = json.loads((result.pipeline_dir / "unet" / "config.json").read_text())
    assert saved["_name_or_path"] == f"me/model@{first}"


HOSTILE = {
    "network": ("unet/config.json", {"layers_per_block": 10**6}, "`layers_per_block` is '1000000'"),
    "nested": ("unet/config.json", "[" * 10**5 + "]" * 10**5, "config.json' cannot be read"),
    "index": ("model_index.json", {"unet": ["os", "system"]}, "`unet` is"),
    "scheduler": ("model_index.json", {"scheduler": ["antigravity", "XScheduler"]}, "`scheduler`"),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=list(HOSTILE))
def test_configs_are_checked_before_the_weights_are_fetched(case, hub, states, tmp_path):
    path, change, message = case
    text = json.dumps(json.loads(states[0][path]) | change) if isinstance(change, dict) else change
    hub.add_repo("evil/model", {**states[0], path: text.encode()})
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for load_it in (
        read_saved,
        load_measured_model,
        lambda name: load_unet(name, channels=1, size=(8, 8), learned_variance=False),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_it("evil/model")
        assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    assert time.process_time() - begun < 10
    assert not [asked for asked in hub.requests if "safetensors" in asked[1]]


def test_what_no_verb_needs_is_not_fetched(hub, states):
    more = {"evil.py": b"raise SystemExit", "unet/evil.py": b"", "vae/config.json": b"{}"}
    hub.add_repo("me/model", {**states[0], **more, "unet/diffusion_pytorch_model.bin": b"x"})
    read_saved("me/model")
    asked = Counter(path.rpartition("/")[2] for _, path, _, _ in hub.requests)
    assert asked["model_index.json"] and not {"evil.py", "diffusion_pytorch_model.bin"} & set(asked)
    assert not [path for _, path, _, _ in hub.requests if "vae" in path]


@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_an_autoencoder_is_fetched_by_either_name(name, hub, tmp_path):
    pipe = latent_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index[name] = index.pop("vqvae")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vqvae").rename(tmp_path / name)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    hub.add_repo("me/latents", {str(f.relative_to(tmp_path)): f.read_bytes() for f in files})
    loaded = read_saved("me/latents").vae
    for key, value in pipe.vae.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


@pytest.fixture
def pickled(hub, states, tmp_path):
    """A repository, and a folder, whose weights are a pickle alone."""
    files = {name: content for name, content in states[0].items() if name != WEIGHTS}
    torch.save(load(states[0][WEIGHTS]), tmp_path / "weights")
    files["unet/diffusion_pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    hub.add_repo("me/old", files)
    for name, content in files.items():
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_bytes(content)
    return "me/old", "old"


def test_a_pickle_is_read_only_where_that_is_asked_for(pickled, states, tmp_path, capsys):
    wanted = load(states[0][WEIGHTS])["conv_out.bias"]
    for number, place in enumerate(pickled):
        words = ["--pipeline", place, "--output"]
        assert main(["sample", *words, "o", *SAMPLE]) == 2
        assert "export --allow_pickle --pipeline" in capsys.readouterr().err
        with pytest.raises(ValueError, match="no weights as safetensors.*--allow_pickle"):
            load_unet(place, channels=1, size=(8, 8), learned_variance=False)
        with pytest.raises(ValueError, match="no weights as safetensors"):
            load_measured_model(place)
        assert torch.equal(bias(load_measured_model(place, allow_pickle=True).unet), wanted)
        assert main(["export", *words, f"made{number}", "--allow_pickle"]) == 0
        assert not list((tmp_path / f"made{number}" / "unet").glob("*.bin"))
        assert torch.equal(bias(read_saved(f"made{number}").unet), wanted)


def test_a_pickle_that_is_asked_for_runs_nothing(pickled, hub, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, ("ran", "w"))

    path = tmp_path / "old" / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Harm()}, path)
    hub.repos["me/old"].commit(
        "main",
        {**hub.repos["me/old"].files(), "unet/diffusion_pytorch_model.bin": path.read_bytes()},
        "harm",
    )
    for place in pickled:
        with pytest.raises(ValueError, match="no PyTorch file of tensors alone: it names"):
            read_saved(place, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_data_of_a_revision(monkeypatch, tmp_path):
    """The call, for the loopback Hub serves no data sets; and what the cache says of the commit."""
    import datasets

    image, commit = tmp_path / "a.png", "0123456789" * 4
    Image.new("RGB", (8, 8)).save(image)
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, **options)
        table = datasets.Dataset.from_dict({"image": [str(image)]})
        table.info.download_checksums = {f"hf://datasets/me/set@{commit}/a.parquet": {}}
        return table.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = sources.open_source(DataConfig(data="me/set@v1.0"))
    assert (asked["name"], asked["revision"]) == ("me/set", "v1.0")
    assert source.understood == f"commit {commit}"
    sources.open_source(DataConfig(data="me/set"))
    assert (asked["name"], asked["revision"]) == ("me/set", None)


def test_dinov2_of_a_revision(monkeypatch):
    from transformers import Dinov2Model

    from ddim_schedulers.training.metrics.features import make_feature_space

    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        raise OSError("no connection")

    monkeypatch.setattr(Dinov2Model, "from_pretrained", from_pretrained)
    for space in ("dinov2:me/dino@v1", "dinov2:me/dino", "dinov2"):
        with pytest.raises(ValueError, match="cannot be had"):
            make_feature_space(space, (3, 8, 8))
    assert [(name, o["revision"]) for name, o in asked] == [
        ("me/dino", "v1"),
        ("me/dino", "main"),
        ("facebook/dinov2-base", "main"),
    ]
    assert all(options["use_safetensors"] for _, options in asked)


def test_every_load_of_ours_says_safetensors():
    """Read from the source: no call of `from_pretrained` is left to the default of a library."""

    calls = []
    for path in Path(repositories.__file__).parents[1].rglob("*.py"):
        for call in re.findall(r"\.from_pretrained\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            calls.append((path.name, call))
    loads = [c for c in calls if c[0] not in ("demo.py",)]  # its line is printed for the reader
    assert len(loads) >= 3
    assert all("use_safetensors" in call for _, call in loads), loads
    assert not [c for c in calls if "trust_remote_code" in c[1]]
