"""Pushing to a Hub: the real client against the loopback Hub, and every fault on demand.

Run here: regular files and Git LFS. Xet, which the public Hub prefers for large files, is switched
off by HF_HUB_DISABLE_XET and not run.
"""

import hashlib
import json
import logging
import re
import shutil
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.training import cli
from ddim_schedulers.training.sharing import hub
from ddim_schedulers.training.sharing.cards import render

# huggingface_hub hands the open file to its HTTP library by an old name (huggingface_hub 2.4,
# `_upload_single_part`)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_RecogniseMe0123456789abcdefghijklm"
REPO = "me/tiny"
PIPELINE = {
    "model_index.json",
    "README.md",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def waits(monkeypatch):
    """The waits that were asked for; none is waited."""
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.fixture(scope="module")
def saved(tiny_ddpm, tmp_path_factory):
    """A saved pipeline in a training run's folder, with things beside it that nobody may see."""
    root = tmp_path_factory.mktemp("run") / "pipeline"
    scheduler = GeneralizedDDIMScheduler(eta=0.5, timestep_spacing="quadratic")
    save_pipeline(tiny_ddpm(scheduler), root, "plug-in")
    (root / "checkpoint-10").mkdir()
    (root / "checkpoint-10" / "optimizer.bin").write_bytes(b"state")
    (root / "optimizer.pt").write_bytes(b"state")
    (root / "unet" / "random_states_0.pkl").write_bytes(b"state")
    (root / ".env").write_text("SECRET=1")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def server(loopback_hub):
    loopback_hub.tokens[TOKEN] = ("me", True)
    return loopback_hub


def fingerprint(root):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def commits(server, repo=REPO):
    return len(server.repos[repo].messages) - 1  # without the one that created it


def test_one_commit_with_the_pipeline_and_nothing_else(server, folder, capsys):
    before = fingerprint(folder)
    url = hub.push_pipeline(folder, REPO, private=True)
    assert "optimizer.bin" in capsys.readouterr().err  # what is left out is said
    repo = server.repos[REPO]
    assert url == f"{server.url}/{REPO}/commit/{repo.branches['main']}"
    assert repo.private
    assert set(repo.files()) == PIPELINE | {".gitattributes"}
    assert commits(server) == 1
    assert fingerprint(folder) == before
    index = json.loads(repo.files()["model_index.json"])
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["_class_name"] == "DDIMPipeline"
    card = repo.files()["README.md"].decode()
    assert "library_name: diffusers" in card
    assert "without ddim_schedulers eta=0.5 has no effect" in card
    assert "timestep_spacing='quadratic'" in card


def test_pushing_again_changes_nothing_and_another_form_leaves_no_code_behind(server, folder):
    hub.push_pipeline(folder, REPO, form="self-contained")
    files = server.repos[REPO].files()
    [code] = [path for path in files if path.endswith(".py")]
    assert code.startswith("scheduler/ddim_schedulers_")
    assert f"`{code}`" in files["README.md"].decode()

    again = hub.push_pipeline(folder, REPO, form="self-contained")
    assert commits(server) == 1
    assert again.endswith(server.repos[REPO].branches["main"])

    # what others added stays, but not inside the folders of the pipeline
    files = {**files, "notes.md": b"mine", "unet/old.bin": b"old"}
    server.repos[REPO].commit("main", files, "by hand")
    hub.push_pipeline(folder, REPO, form="portable")
    assert set(server.repos[REPO].files()) == PIPELINE | {".gitattributes", "notes.md"}
    assert commits(server) == 3


def test_revision_is_created_and_main_stays(server, folder):
    hub.push_pipeline(folder, REPO, revision="v1")
    hub.push_pipeline(folder, REPO, revision="v1")
    assert set(server.repos[REPO].files("v1")) == PIPELINE | {".gitattributes"}
    assert set(server.repos[REPO].files("main")) == {".gitattributes"}
    assert commits(server) == 1


def test_a_card_of_ones_own_keeps_its_text_and_gets_the_section_once(server, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    hub.push_pipeline(folder, REPO)
    first = server.repos[REPO].files()["README.md"].decode()
    assert first.startswith("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    (folder / "README.md").write_text(first)
    hub.push_pipeline(folder, REPO, form="plug-in")
    second = server.repos[REPO].files()["README.md"].decode()
    assert second.count("## How to load it") == 1
    assert "import ddim_schedulers" in second
    assert "What is different" not in second
    (folder / "README.md").write_text("no metadata\n")
    hub.push_pipeline(folder, REPO)
    assert server.repos[REPO].files()["README.md"].startswith(b"---\nlibrary_name: diffusers")


@pytest.mark.parametrize(("steps", "said"), [(100, 1), (1000, 0)])
def test_a_card_says_what_of_the_data_is_left_at_the_last_timestep(steps, said):
    export = SimpleNamespace(
        files={"model_index.json": b'{"_class_name": "DDPMPipeline"}'},
        schedulers={"scheduler": MarkovianDDPMScheduler(num_train_timesteps=steps)},
        notes=[],
    )
    for form in ("portable", "plug-in", "self-contained"):
        text = render(export, "someone/model", form)
        assert text.count("alpha_bar at the last of 100 timesteps is 0.364") == said
        assert text.count("Mind:") == said


PASSING = {
    "500 at create": dict(path="/create", status=500, times=2),
    "503 at preupload": dict(path="/preupload", status=503, times=2),
    "500 at the card check": dict(path="/validate-yaml", status=500),
    "502 at LFS batch": dict(path="/batch", status=502),
    "500 at LFS upload": dict(path="/lfs/", status=500),
    "500 at commit": dict(path="/commit/", status=500, times=3),
    "429 at commit": dict(path="/commit/", status=429, headers={"Retry-After": "7"}),
    "429 at listing": dict(path="/tree/", status=429, headers={"Retry-After": "7"}),
    "429 for a window": dict(path="/commit/", status=429, headers={"Retry-After": "290"}),
    "429 as the public Hub says it": dict(
        path="/commit/", status=429, headers={"RateLimit": '"api";r=0;t=123'}
    ),
    "412 at commit": dict(path="/commit/", status=412, times=2),
    "409 at commit": dict(path="/commit/", status=409),
    "cut before commit": dict(path="/commit/", cut="before"),
    "cut after commit": dict(path="/commit/", cut="after"),
    "cut after create": dict(path="/create", cut="after"),
    "cut in LFS upload": dict(path="/lfs/", cut="after"),
    "slow at commit": dict(path="/commit/", delay=0.6),
    "slow at preupload": dict(path="/preupload", delay=0.6),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=list(PASSING))
def test_a_passing_fault_is_waited_out(fault, server, folder, waits, monkeypatch, capsys):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    server.faults.append(server.Fault(**fault))
    hub.push_pipeline(folder, REPO)
    assert not server.faults
    assert set(server.repos[REPO].files()) == PIPELINE | {".gitattributes"}
    assert commits(server) == 1  # even where the answer to the first one was lost
    if fault.get("status") == 429:
        asked = re.search(r"\d+$", *fault["headers"].values())
        assert max(waits) in (float(asked[0]), float(asked[0]) + 1)  # the client's own adds one
    elif "delay" not in fault:
        assert 0 < sum(waits) < 30
    assert TOKEN not in "".join(capsys.readouterr())


LASTING = {
    "500": (dict(path=".", status=500, times=99), "answers 500"),
    "429": (dict(path=".", status=429, times=99), "limits the rate of requests (429); try again l"),
    "429 for an hour": (
        dict(path="/create", status=429, headers={"Retry-After": "3600"}),
        "limits the rate of requests (429); try again in 3600 s",
    ),
    "409": (dict(path="/commit/", status=409, times=99), "being changed by somebody else (409)"),
    "412": (dict(path="/commit/", status=412, times=99), "being changed by somebody else (412)"),
    "cut": (dict(path="/commit/", cut="before", times=99), "cannot be reached"),
    "slow": (dict(path="/create", delay=0.5, times=99), "cannot be reached (ReadTimeout"),
    "401": (dict(path="/create", status=401), "does not accept the token (401)"),
    "401 later": (dict(path="/commit/", status=401), "does not accept the token (401)"),
    "403": (dict(path="/create", status=403), "no permission to write to me/tiny (403)"),
    "403 later": (dict(path="/preupload", status=403), "no permission to write to me/tiny (403)"),
}


@pytest.mark.parametrize(("fault", "sentence"), LASTING.values(), ids=list(LASTING))
def test_a_lasting_fault_is_one_sentence_and_loses_nothing(
    fault, sentence, server, folder, waits, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    before = fingerprint(folder)
    server.faults.append(server.Fault(**fault))
    url = hub.push_after_training(folder, REPO, private=True, form="plug-in")
    assert url is None
    told = capsys.readouterr().err
    assert sentence in told
    assert sum(waits) < 1000
    assert "Traceback" not in told
    last = told.splitlines()[-1].strip()
    assert last == (
        f"ddim-schedulers push --pipeline {folder} --repo_id me/tiny --form plug-in --private"
    )
    assert TOKEN not in told
    assert fingerprint(folder) == before
    assert REPO not in server.repos or commits(server) == 0

    server.faults.clear()
    assert cli.main(last.split()[1:]) == 0  # the printed command does what it says
    assert commits(server) == 1
    assert server.repos[REPO].private


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("cut", ["midway", "before"])
def test_a_download_that_breaks_off_goes_on_where_it_was(
    cut, server, folder, tmp_path, waits, monkeypatch
):
    """The real client against ETag, ranges and redirect of the loopback Hub."""
    import huggingface_hub
    from huggingface_hub import HfApi, constants
    from packaging.version import Version

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # it keeps whole chunks
    hub.push_pipeline(folder, REPO)
    api = HfApi(token=TOKEN)
    server.requests.clear()
    server.faults.append(server.Fault("/cdn/", method="GET", cut=cut))
    options = {"cache_dir": tmp_path / "cache"}
    try:
        path = api.hf_hub_download(REPO, WEIGHTS, **options)
    except Exception:  # huggingface_hub 1.23 gives up where the first request is cut, 1.6 anywhere
        assert cut == "before" or Version(huggingface_hub.__version__) < Version("1.23")
        path = api.hf_hub_download(REPO, WEIGHTS, **options)
    assert Path(path).read_bytes() == (folder / WEIGHTS).read_bytes()
    gets = [status for method, _, _, status in server.requests if method == "GET"]
    assert gets == ([200, 206] if cut == "midway" else [0, 200])

    server.requests.clear()  # the ETag is that of the cached file: nothing is fetched again
    assert api.hf_hub_download(REPO, WEIGHTS, **options) == path
    assert [method for method, *_ in server.requests] == ["HEAD"]
    server.faults.append(server.Fault(".", status=500, times=99))
    assert api.hf_hub_download(REPO, WEIGHTS, **options) == path  # the Hub is down: the cache


def test_a_private_repository_and_a_wrong_token(server, folder, tmp_path, waits):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    hub.push_pipeline(folder, REPO, private=True)
    options = {"cache_dir": tmp_path / "cache"}
    for wrong in (False, "hf_nobodyknowsthisone0000"):
        with pytest.raises((RepositoryNotFoundError, HfHubHTTPError)) as caught:
            HfApi(token=wrong).hf_hub_download(REPO, "model_index.json", **options)
        assert "401" in str(caught.value)
    assert HfApi(token=TOKEN).hf_hub_download(REPO, "model_index.json", **options)


def test_refusals_are_one_sentence(server, folder, monkeypatch, waits):
    def refused(repo=REPO, **options):
        with pytest.raises((hub.PushError, ValueError)) as caught:
            hub.push_pipeline(folder, repo, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    server.add_repo("me/words", {"data.csv": b"1"})
    assert "something else than a pipeline (data.csv" in refused("me/words")
    server.add_repo("me/public")
    assert "exists and is public" in refused("me/public", private=True)
    server.add_repo("you/theirs")
    assert "no permission to write to you/theirs (403)" in refused("you/theirs")
    assert "no permission to write to you/new (403)" in refused("you/new")
    assert "`repo_id` is 'tiny'" in refused("tiny")
    assert "`form` is 'zip'" in refused(form="zip")
    assert "does not accept the token (401)" in refused(token="hf_nobodyknowsthisone0000")
    server.tokens["hf_ReadOnly"] = ("me", False)
    assert "no permission" in refused(token="hf_ReadOnly")
    assert "cannot be reached" in refused(endpoint="http://127.0.0.1:9", attempts=1)
    assert "it must be USER/NAME" in refused("me/a--b")
    with_password = server.url.replace("//", "//user:secret@")
    assert "holds a name and a password" in refused(endpoint=with_password)
    assert "secret" not in refused(endpoint=with_password)
    assert all(len(r.messages) <= 2 for r in server.repos.values())

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no Hugging Face token" in refused()


def test_the_token_is_nowhere(server, folder, waits, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    (folder / "unet" / "config.json").touch()
    server.faults.append(server.Fault("/commit/", status=500))
    hub.push_pipeline(folder, REPO, token=f" {TOKEN}\n")
    server.faults.append(server.Fault(".", status=500, times=99))
    with pytest.raises(hub.PushError) as caught:
        hub.push_pipeline(folder, "me/other", attempts=2)
    with pytest.raises(hub.PushError) as odd:
        hub.push_pipeline(folder, REPO, token=f"{TOKEN}\nX: y")
    texts = ["".join(traceback.format_exception(e.value)) for e in (caught, odd)]
    texts += [caplog.text, *capsys.readouterr()]
    texts += [c.decode("latin1") for c in server.repos[REPO].files().values()]
    assert not any(TOKEN in text for text in texts)
    # it went where it belongs, and nowhere else
    sent = {authorization for _, _, authorization, _ in server.requests}
    assert sent <= {f"Bearer {TOKEN}", None}
    assert all(a is None for _, path, a, _ in server.requests if path.startswith("/lfs/"))


def test_who_sees_a_new_repository_is_left_to_the_account(server, folder):
    """An organisation may make repositories private by default; only `private=True` is sent."""
    server.private_by_default = True
    hub.push_pipeline(folder, REPO)
    assert server.repos[REPO].private
    assert set(server.repos[REPO].files()) == PIPELINE | {".gitattributes"}


BROKEN = {
    "half an object": b'{"a":',
    "a list": b"[1]",
    "too deep": b"[" * 100_000,
    "another encoding": b"\xff\xfe{}",
    "nothing": b"",
}
FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_in_one_sentence(name, content, server, folder, capsys):
    (folder / name).write_bytes(content)
    assert cli.main(["push", "--pipeline", str(folder), "--repo_id", REPO]) == 2
    told = capsys.readouterr().err
    assert f"{name}' cannot be read: " in told
    assert any(word in told for word in ("JSON", "UTF-8", "nested deeper"))
    assert len(told.splitlines()) == 1
    assert not server.repos


def test_a_card_in_another_encoding(server, folder):
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    hub.push_pipeline(folder, REPO)
    card = server.repos[REPO].files()["README.md"]
    assert card.startswith(b"---\nlicense: mit\n---\n# Mine\n")
    assert card.count(b"---\n") == 2
    (folder / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    with pytest.raises(ValueError, match="README.md` of the pipeline is not UTF-8"):
        hub.push_pipeline(folder, REPO)


@pytest.mark.parametrize("place", ["README.md", "unet/config.json"])
def test_a_token_in_the_files_is_not_uploaded(place, server, folder):
    other = "hf_" + "Z9" * 17
    text = f"---\nx: y\n---\n{other}" if place == "README.md" else json.dumps({"a": other})
    (folder / place).write_text(text)
    with pytest.raises(ValueError, match=f"{place} holds a Hugging Face token") as caught:
        hub.push_pipeline(folder, REPO)
    assert other not in str(caught.value)
    assert not server.repos


def test_the_verb(server, folder, capsys):
    assert cli.main(["push", "--pipeline", str(folder), "--repo_id", REPO]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{server.url}/{REPO}/commit/")
    assert cli.main(["push", "--pipeline", str(folder), "--repo_id", "you/x"]) == 1
    told = capsys.readouterr().err.splitlines()[1:]  # the first says what is left out
    assert told[0].startswith("ddim-schedulers push: the token has no permission")
    assert told[2].strip().startswith("ddim-schedulers push --pipeline")
    assert cli.main(["push", "--pipeline", str(folder.parent), "--repo_id", REPO]) == 2
    assert "is not a saved pipeline" in capsys.readouterr().err
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"vqvae": ["diffusers", "VQModel"], "_class_name": "LDMPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert cli.main(["push", "--pipeline", str(folder), "--repo_id", REPO]) == 2
    assert re.search("`--pipeline` is .*, whose vqvae has no config.json", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        cli.main(["push", "--pipeline", str(folder), "--repo_id", REPO, "--form", "zip"])


def test_a_dry_run_shows_what_a_push_would_send_and_sends_nothing(
    server, folder, monkeypatch, capsys
):
    monkeypatch.delenv("HF_TOKEN")
    verb = ["push", "--pipeline", str(folder), "--repo_id", REPO]
    assert cli.main([*verb, "--dry_run"]) == 0
    told = capsys.readouterr().out
    listed = re.findall(r"^ *[\d,]+ bytes  (.+)$", told, re.M)
    assert set(listed) == PIPELINE and told.endswith("Nothing was sent.\n")
    assert server.requests == [] and server.repos == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(verb) == 0
    sent = server.repos[REPO].files("main")
    assert set(sent) - {".gitattributes"} == PIPELINE
    assert sent["README.md"].decode() in told
    (folder / "README.md").write_text(f"mine: {TOKEN}")
    assert cli.main([*verb, "--dry_run"]) == 2
    assert cli.main([*verb[:-1], "no-name", "--dry_run"]) == 2
