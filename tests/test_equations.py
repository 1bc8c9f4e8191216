"""docs/equations.md: every function and every test that the page names exists."""

import ast
import functools
import importlib
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "equations.md"


@functools.cache
def functions_in(file):
    path = TESTS / file
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def found(name):
    """Return whether `ddim_schedulers.<name>` is a module, or what one holds, at any depth."""
    parts = ["ddim_schedulers", *name.split(".")]
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def problems(page):
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([^|]+)` \| `([^|]+)` \|$", page, re.M)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    heads = [line for line in lines if line.startswith(("| equation |", "|---"))]
    missing = [] if len(rows) + len(heads) == len(lines) else ["a row of another form"]
    for _, _, function, test in rows:
        file, _, name = test.partition("::")
        missing += [] if found(function) else [function]
        missing += [] if name.startswith("test_") and name in functions_in(file) else [test]
    return missing


def test_every_link_of_the_page_leads_somewhere():
    page = PAGE.read_text(encoding="utf-8")
    assert len(re.findall("arXiv:", page)) > 20  # it is the page that is meant
    assert problems(page) == []


def test_a_wrong_link_is_noticed():
    page = PAGE.read_text(encoding="utf-8")
    for right, wrong in (
        ("`sigmas.sigma_eta`", "`sigmas.sigma_etta`"),
        ("`process.q_sample`", "`processes.q_sample`"),
        ("test_sigmas.py::test_sigma_eta_is_equation_16", "test_sigmas.py::test_sigma_eta"),
        ("test_process.py::test_forward_steps_compose", "test_none.py::test_forward_steps_compose"),
        ("| Eq. 14 | the ODE,", "| Eq. 14 | more | the ODE,"),
        ("`multistep.step_moments` |", "multistep.step_moments |"),
    ):
        assert right in page and problems(page.replace(right, wrong)) != []
