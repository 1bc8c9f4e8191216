"""The pages as a site: the reference names every public name, links out of docs/ lead somewhere."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = (ROOT / "mkdocs.yml").read_text()
PACKAGES = (
    "ddim_schedulers",
    "ddim_schedulers.pipelines",
    "ddim_schedulers.pipelines.restoration.methods",
    "ddim_schedulers.pipelines.restoration.operators",
    "ddim_schedulers.training",
)
DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose !ENV is mkdocs' own tag."""


Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])


def settings():
    return yaml.load(CONFIG, Loader)


def pages(entries):
    for entry in entries:
        for place in entry.values():
            yield from pages(place) if isinstance(place, list) else [place]


def directives():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    return {name for page in pages for name in DIRECTIVE.findall(page.read_text())}


def found(name):
    """The object of a dotted name: a module, or an attribute of one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    shown = {name.rpartition(".")[2] for name in directives()}
    modules = [page for page in map(found, directives()) if inspect.ismodule(page)]
    public = [n for n in importlib.import_module(package).__all__ if not n.startswith("__")]
    assert [n for n in public if n not in shown and not any(hasattr(m, n) for m in modules)] == []


def test_every_page_of_docs_is_in_the_navigation():
    named = set(pages(settings()["nav"]))
    there = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert there <= named
