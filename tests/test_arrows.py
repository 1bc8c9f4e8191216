"""Imports point one way: from the commands down to the mathematics, and never in a circle.

Read from the syntax trees of the package as it is installed, imports inside functions included.
Those under `TYPE_CHECKING` are apart: nothing runs because of them.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "ddim_schedulers"

# The floors of the house, the highest first. A module is on the floor of the longest name here that
# is its own or that of a package around it, and may import from its own floor and from those below.
FLOORS = [
    {"training.cli", "training.features", "training.learned_betas"},  # two former names
    {"training.app", "training.commands"},
    {"training.demo"},
    {"training", "training.train"},
    {"training.calibration"},
    {"training.trainer", "training.evaluation", "training.likelihood"},
    {"training.data", "training.objectives", "training.metrics"},
    {"training.networks"},
    {"training.config", "training.config_checks", "training.parsing"},
    {"training.common", "training.sharing"},
    {"pipelines"},
    {"", "model_cards"},  # the schedulers, and what is beside them
    {
        "betas",
        "config_types",  # what a value may be; torch only
        "former",  # names that changed
        "likelihood",
        "member",
        "multistep",
        "optimal",
        "parameterization",
        "planning",
        "process",
        "reverse_noise",
        "scales",
        "sigmas",
        "solver_rows",
        "solver_tables",
        "tables",
        "timesteps",
        "trajectory",
        "transition",
    },
]
# Rooms of one floor that do not need each other. What two of them need is further down.
APART = [FLOORS[5], FLOORS[6]]


def installed_modules():
    """Returns the file of every module, by its name without the package's; "" is the package."""
    found = {}
    for room in ("", ".pipelines", ".training", ".model_cards"):
        (place,) = importlib.util.find_spec(PACKAGE + room).submodule_search_locations[:1]
        for file in Path(place).rglob("*.py"):
            parts = list(file.relative_to(place).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found.setdefault(".".join([room[1:], *parts]).strip("."), file)
    return found


def imports_of(name, file, modules):
    """Returns the modules of the package that one of them imports, anywhere in its code."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    typing_only = [b for b in blocks if "TYPE_CHECKING" in ast.dump(b.test)]
    apart = {id(n) for block in typing_only for part in block.body for n in ast.walk(part)}
    package = f"{PACKAGE}.{name}".strip(".")
    if file.name != "__init__.py":
        package = package.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if id(node) in apart:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = package.split(".")
                base = ".".join([*home[: len(home) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole.removeprefix(f"{PACKAGE}.") in modules else base)
    ours = {
        n.removeprefix(PACKAGE).strip(".") for n in found if (n + ".").startswith(PACKAGE + ".")
    }
    return ours - {name}


@cache
def arrows():
    modules = installed_modules()
    return {name: imports_of(name, file, modules) for name, file in modules.items()}


def circles(graph):
    """Returns the sets of modules that reach each other (Tarjan's algorithm)."""
    index, low, stack, found = {}, {}, [], []

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in graph[v]:
            if w not in index:
                visit(w)
            if w in stack:
                low[v] = min(low[v], low[w])
        if low[v] == index[v]:
            at = stack.index(v)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for v in graph:
        if v not in index:
            visit(v)
    return found


def test_every_import_is_of_a_module_that_exists():
    graph = arrows()
    assert len(graph) > 80
    missing = {(name, to) for name, found in graph.items() for to in found if to not in graph}
    assert not missing


def room_of(name):
    """Returns the longest name in `FLOORS` that is the module's or that of a package around it."""
    rooms = {room for floor in FLOORS for room in floor}
    return max((r for r in rooms if not r or f"{name}.".startswith(f"{r}.")), key=len)


def refused(graph):
    """Returns the imports (module, what it imports) that point upward or to a room beside."""
    height = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    found = set()
    for name, imported in graph.items():
        for to in imported:
            here, there = room_of(name), room_of(to)
            beside = here != there and any({here, there} <= rooms for rooms in APART)
            if height[there] < height[here] or beside:
                found.add((name, to))
    return found


def test_no_circle():
    assert circles(arrows()) == []


def test_no_arrow_points_upward():
    assert refused(arrows()) == set()


def test_every_floor_has_modules():
    found = {room_of(name) for name in arrows()}
    assert found == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize(
    "name, imported",
    [
        ("betas", "scheduling_base"),
        ("scheduling_ddim", "pipelines.base"),
        ("pipelines.files", "training.common.storage"),
        ("training.common.figures", "training.config"),
        ("training.sharing.cards", "training.evaluation.report"),
        ("training.parsing", "training.networks.models"),
        ("training.networks.places", "training.data"),
        ("training.metrics.features", "training.data.batches"),
        ("training.objectives.losses", "training.trainer"),
        ("training.trainer.trainer", "training.likelihood.error_sweep"),
        ("training.evaluation", "training.likelihood"),
        ("training.likelihood.table", "training.train"),
        ("training.trainer.saving", "training"),
        ("training.train", "training.demo"),
        ("training.demo", "training.commands.sample"),
        ("training.commands.sample", "training.cli"),
    ],
)
def test_an_upward_arrow_is_noticed(name, imported):
    graph = arrows()
    assert refused({**graph, name: {*graph[name], imported}}) == {(name, imported)}


def test_a_lazy_import_that_closes_a_circle_is_noticed(tmp_path):
    below, above, typed = tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c.py"
    below.write_text("def f():\n    from ddim_schedulers.b import g\n")
    above.write_text("from . import a\nfrom .c import h\n")
    typed.write_text("if TYPE_CHECKING:\n    import ddim_schedulers.b\n")
    modules = {"a": below, "b": above, "c": typed}
    graph = {name: imports_of(name, file, modules) for name, file in modules.items()}
    assert graph == {"a": {"b"}, "b": {"a", "c"}, "c": set()}
    assert circles(graph) == [{"a", "b"}]
