"""What belongs to a release: one version, workflows that GitHub would take."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def project():
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]
    assert {r["identifiers"][0]["value"] for r in citation["references"]} == {
        "arXiv:2006.11239",
        "arXiv:2010.02502",
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_says_that_it_was_not_run_and_asks_for_the_least(path):
    text = path.read_text()
    assert text.startswith("# Not run yet")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
        assert set(needs) <= set(workflow["jobs"])


def test_the_tests_run_on_every_python_that_is_declared():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    ours = [c.rsplit(" ", 1)[1] for c in project()["classifiers"] if "Python :: 3." in c]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python-version"] == ours


def test_the_address_of_the_repository_is_one():
    address = project()["urls"]["Repository"]
    assert f"repo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text()
    readme = (ROOT / "README.md").read_text()
    raw = address.replace("https://github.com", "https://raw.githubusercontent.com")
    ours = (f"{address}/blob/main/", f"{raw}/main/")
    links = [link for link in re.findall(r"\]\((\S+?)\)", readme) if "/ddim-schedulers/" in link]
    assert links
    for link in links:
        (start,) = [start for start in ours if link.startswith(start)]
        assert (ROOT / link.removeprefix(start).partition("#")[0]).exists(), link
    assert not re.search(r"\]\((?!https://)", readme)  # PyPI shows the page without the repository


def test_the_sdist_holds_what_its_tests_need():
    manifest = (ROOT / "MANIFEST.in").read_text().split("\n")
    for folder in ("tests", "docs", ".ci", ".github"):
        assert f"graft {folder}" in manifest
