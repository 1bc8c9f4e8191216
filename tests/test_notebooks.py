"""The notebooks of docs/notebooks as they are stored; `.ci/run` runs them."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
HOME = "ddim-schedulers/ddim-schedulers/blob/main/docs/notebooks"


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_was_run_from_its_first_cell_to_its_last(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    told = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert all(text.startswith("data: ") and text.count("\n") == 1 for text in told)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_opens_in_colab_and_names_no_folder_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    first = "".join(json.loads(text)["cells"][0]["source"])
    assert f"(https://colab.research.google.com/github/{HOME}/{path.name})" in first
    assert re.findall(r"/(?:home|root|tmp|work)/", text) == []


def test_each_is_in_the_navigation_of_the_site():
    settings = (FOLDER.parent.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p.name for p in NOTEBOOKS if f"notebooks/{p.stem}.md" not in settings] == []
