"""A pipeline that cannot be downloaded: what its user sees, and that nothing half-written is left.

The real `DiffusionPipeline.from_pretrained` with an empty cache against the loopback Hub. The words
are those of huggingface_hub and diffusers; what is tested is that they name the cause.
"""

import logging
import time

import pytest
from diffusers import DiffusionPipeline

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.export import save_pipeline

# from diffusers' own `load_config`, for stock schedulers too
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")

REPO = "me/tiny"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAULTS = {
    "429": (dict(path=".", status=429, headers={"Retry-After": "1"}), "429"),
    "403": (dict(path=".", status=403), "403"),
    "500": (dict(path=".", status=500), "500"),
    "slow": (dict(path=".", delay=0.4), "timed out"),
    "429 at the files": (dict(path="/resolve/", status=429), "429"),
    "403 at the weights": (dict(path="/cdn/", status=403), "403"),
    "500 at the weights": (dict(path="/cdn/", status=500), "500"),
    "slow at the weights": (dict(path="/cdn/", delay=0.4), "timed out"),
    "cut in the weights": (dict(path="/cdn/", method="GET", cut="midway"), "closed connection"),
}


@pytest.fixture
def online(loopback_hub, monkeypatch):
    """This process's client, without pauses, before the loopback Hub."""
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", loopback_hub.url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return loopback_hub


@pytest.fixture(scope="module")
def files(tiny_ddpm, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    save_pipeline(tiny_ddpm(GeneralizedDDIMScheduler(eta=0.5)), root)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def chain(error):
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=list(FAULTS))
def test_a_download_that_fails_says_why_and_leaves_whole_files(
    fault, said, online, files, tmp_path, caplog
):
    from huggingface_hub import constants

    caplog.set_level(logging.WARNING)
    online.add_repo(REPO, files)
    cache = tmp_path / "cache"
    online.faults.append(online.Fault(**fault, times=999))
    patience = 0.2 if "delay" in fault else 10.0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as caught:
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", patience)
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience)
        DiffusionPipeline.from_pretrained(REPO, cache_dir=cache)
    assert said in "\n".join([*chain(caught.value), caplog.text])
    snapshots = [p for p in cache.rglob("*") if p.is_file() and "snapshots" in p.parts]
    for path in snapshots:
        name = path.as_posix().partition("/snapshots/")[2].partition("/")[2]
        assert path.read_bytes() == files[name], name
        assert name != WEIGHTS

    online.faults.clear()
    pipeline = DiffusionPipeline.from_pretrained(REPO, cache_dir=cache)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert GeneralizedDDIMScheduler.from_config(pipeline.scheduler.config).config.eta == 0.5
    [weights] = [p for p in cache.rglob(WEIGHTS) if p.is_file()]
    assert weights.read_bytes() == files[WEIGHTS]
