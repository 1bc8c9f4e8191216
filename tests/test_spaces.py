"""Sharing the playground as a Space: what is written, and what reaches the loopback Hub."""

import importlib.metadata
import re
from contextlib import contextmanager

import pytest
from huggingface_hub import SpaceCard

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.ownership import own
from ddim_schedulers.training import cli
from ddim_schedulers.training.sharing import hub, spaces
from ddim_schedulers.training.sharing.spaces import push_space, space_files

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_RecogniseMe0123456789abcdefghijklm"
REPO = "me/playground"
FILES = {
    "README.md",
    "app.py",
    "requirements.txt",
    "pipeline/model_index.json",
    "pipeline/scheduler/scheduler_config.json",
    "pipeline/unet/config.json",
    "pipeline/unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def space(tiny_ddpm, tmp_path, monkeypatch, capsys):
    """A Space of a pipeline with one of our schedulers; Gradio need not be installed."""
    save_pipeline(tiny_ddpm(GeneralizedDDIMScheduler(solver_order=2)), tmp_path / "p", "portable")
    folder = tmp_path / "space"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _: "6.31.0")
        words = ["app", "--pipeline", str(tmp_path / "p"), "--export_space", str(folder)]
        assert cli.main(words) == 0
    assert f"push --space {folder}" in capsys.readouterr().err
    return folder


@pytest.fixture
def server(loopback_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loopback_hub.tokens[TOKEN] = ("me", True)
    return loopback_hub


def files(server, repo_id=REPO):
    return {p: c for p, c in server.repos[f"spaces/{repo_id}"].files().items() if p[0] != "."}


def test_a_space_is_pushed_in_one_commit(server, space, capsys):
    (space / ".env").write_text("x=1")
    (space / "__pycache__").mkdir()
    (space / "__pycache__" / "app.pyc").write_bytes(b"x")
    assert cli.main(["push", "--space", str(space), "--repo_id", REPO]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(rf"{server.url}/spaces/{REPO}/commit/\w+\n", said.out)
    assert "Not part of the Space, and not uploaded: .env, __pycache__/app.pyc" in said.err
    there = files(server)
    assert set(there) == FILES
    assert all((space / path).read_bytes() == content for path, content in there.items())
    assert not any(TOKEN.encode() in content for content in there.values())
    card = SpaceCard(there["README.md"].decode())
    assert (card.data.sdk, card.data.app_file, card.data.sdk_version) == (
        "gradio",
        "app.py",
        "6.31.0",
    )
    push_space(space, REPO)  # the same once more makes no commit
    assert server.repos[f"spaces/{REPO}"].messages == ["initial commit", "Upload Space"]


def test_a_later_version_leaves_no_old_files_of_the_pipeline(server, space):
    push_space(space, REPO)
    (space / "pipeline" / "unet" / "config.json").unlink()
    (space / "packages.txt").write_text("git\n")
    push_space(space, REPO, private=False, message="second")
    assert set(files(server)) == FILES - {"pipeline/unet/config.json"} | {"packages.txt"}


def test_the_files_are_those_that_the_owner_before_left(server, space, monkeypatch):
    @contextmanager
    def after_another(folder, *args, **options):
        (space / "packages.txt").write_text("git\n")
        (space / "pipeline" / "unet" / "config.json").unlink()
        with own(folder, *args, **options):
            yield

    monkeypatch.setattr(spaces, "own", after_another)
    push_space(space, REPO)
    assert set(files(server)) == FILES - {"pipeline/unet/config.json"} | {"packages.txt"}


@pytest.mark.parametrize("place", ["missing", "space/app.py"])
def test_what_is_no_folder_is_refused_and_not_made(server, space, place):
    with pytest.raises(ValueError, match=re.escape("has no README.md; it must be a folder")):
        push_space(space.parent / place, REPO)
    assert not (space.parent / "missing").exists() and not server.repos


def test_the_space_has_the_scheduler_as_it_was_saved(space):
    pipe = GenerationPipeline.from_pretrained(space / "pipeline")
    assert isinstance(pipe.scheduler, GeneralizedDDIMScheduler)
    assert pipe.scheduler.config.solver_order == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("README.md", None, "has no README.md; it must be a folder"),
        ("app.py", None, "has no app.py; it must be a folder"),
        ("README.md", "---\nsdk: docker\napp_file: app.py\n---\n", "`sdk` is 'docker'; it must"),
        ("README.md", "no metadata", "`sdk` is None; it must be gradio"),
        ("README.md", "---\nsdk: [\n---\n", "must begin with metadata in YAML"),
        ("README.md", "---\nsdk: gradio\napp_file: a.py\n---\n", "`app_file` is 'a.py'; it must"),
        ("app.py", "login('hf_" + "Z9" * 17 + "')", "app.py holds a Hugging Face token"),
    ],
)
def test_what_is_no_space_is_refused_before_anything_is_sent(name, content, said, server, space):
    (space / name).unlink() if content is None else (space / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        push_space(space, REPO)
    assert not server.repos


def test_a_link_is_refused(space):
    (space / "data").symlink_to(space.parent / "p")
    with pytest.raises(ValueError, match="data is a link; replace it"):
        space_files(space)


def test_the_verb_refuses(server, space, capsys):
    push = ["push", "--repo_id", REPO, "--space", str(space)]
    assert cli.main([*push, "--form", "plug-in"]) == 2
    assert "`--form` is 'plug-in'; it must be left out with --space." in capsys.readouterr().err
    assert cli.main([*push, "--repo_id", "you/x"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].split() == ["ddim-schedulers", *push[:1], *push[3:], "--repo_id", "you/x"]
    with pytest.raises(SystemExit):
        cli.main([*push, "--pipeline", str(space)])
    server.add_repo(f"spaces/{REPO}", {"index.html": b"x"})
    with pytest.raises(hub.PushError, match="holds something else than a Space"):
        push_space(space, REPO)
