"""What is packaged and what an installed package offers. A wheel itself is tried by `.ci/run`."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddim_schedulers

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ddim_schedulers", "pipelines", "training", "model_cards")
PUBLIC = ("ddim_schedulers", "ddim_schedulers.pipelines", "ddim_schedulers.training")


def settings():
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_of(folder):
    """`training/commands` -> `ddim_schedulers.training.commands`."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "ddim_schedulers" else ("ddim_schedulers", *parts))


def test_every_folder_with_code_is_a_package():
    folders = {
        path.parent
        for top in FOLDERS
        for path in (ROOT / top).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    setuptools = settings()["tool"]["setuptools"]
    assert set(setuptools["packages"]) == {package_of(folder) for folder in folders}
    assert setuptools["package-dir"] == {
        package_of(folder): folder.relative_to(ROOT).as_posix() for folder in folders
    }


def test_every_data_file_is_shipped():
    setuptools = settings()["tool"]["setuptools"]
    shipped = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / setuptools["package-dir"][package]).glob(pattern)
    }
    data = {
        path
        for top in FOLDERS
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert shipped == data


def test_typed():
    assert (Path(ddim_schedulers.__file__).parent / "py.typed").is_file()


def test_version_is_the_same_everywhere():
    version = settings()["project"]["version"]
    assert ddim_schedulers.__version__ == version
    assert importlib.metadata.version("ddim-schedulers") == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_core_needs_five_distributions():
    core = {
        re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        for line in importlib.metadata.requires("ddim-schedulers")
        if "extra ==" not in line
    }
    assert core == {"diffusers", "filelock", "huggingface-hub", "numpy", "torch"}


def test_ruff_is_pinned_to_one_version():
    pin = next(
        line for line in settings()["project"]["optional-dependencies"]["dev"] if "ruff" in line
    )
    pins = set(re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert pins == {pin}


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    # the order of RUF022: constants, classes, the rest
    key = {name: (2 - name[:1].isupper() - name.isupper(), name) for name in names}
    assert list(names) == sorted(set(names), key=key.__getitem__)
    missing = [public for public in names if public not in dir(module)]
    assert not missing


def test_bare_names_are_not_importable(tmp_path):
    code = """
import importlib.util
import ddim_schedulers, ddim_schedulers.pipelines, ddim_schedulers.training
import ddim_schedulers.training.commands, ddim_schedulers.model_cards
bare = ("pipelines", "training", "model_cards", "tests")
found = [name for name in bare if importlib.util.find_spec(name)]
assert not found, found
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("at_the_root", [True, False])
def test_modules_run_where_the_folder_hides_the_package(at_the_root, tmp_path):
    """As `python -m` and `torchrun -m` do at the root; without what an editable install adds."""
    code = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "find_spec") or
                    not f.__module__.startswith("__editable__")]
sys.path[:] = [p for p in sys.path if not p.startswith("__editable__")]
sys.argv[1:] = ["--version"]
runpy.run_module("ddim_schedulers.training.cli", run_name="__main__")
"""
    folder = tmp_path / "ddim_schedulers"
    if not at_the_root:  # the folder alone, as if somebody had copied it
        shutil.copytree(ROOT / "ddim_schedulers", folder)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT if at_the_root else tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode == 0) is at_the_root, done.stderr
    assert ddim_schedulers.__version__ in done.stdout or "No module named" in done.stderr
