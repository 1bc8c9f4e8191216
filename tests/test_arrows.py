"""Imports point one way: from the commands down to the mathematics, and never in a circle.

Read from the syntax trees of the package as it is installed, imports inside functions included.
Those under `TYPE_CHECKING` are apart: nothing runs because of them.
"""

import ast
import importlib.util
from pathlib import Path

PACKAGE = "ddim_schedulers"

# Circles that are known and not yet broken, by the names of their modules.
KNOWN_CIRCLES = [
    {
        "training.config",
        "training.data.batches",
        "training.data.images",
        "training.data.sources",
        "training.evaluation.cells",
        "training.evaluation.config",
        "training.evaluation.report",
        "training.likelihood.error_sweep",
        "training.metrics.features",
        "training.parsing",
        "training.sharing.cards",
        "training.sharing.hub",
    }
]


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


def test_no_circle_but_the_known_ones():
    assert sorted(circles(arrows()), key=sorted) == sorted(KNOWN_CIRCLES, key=sorted)


def test_a_lazy_import_that_closes_a_circle_is_noticed(tmp_path):
    below, above, typed = tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c.py"
    below.write_text("def f():\n    from ddim_schedulers.b import g\n")
    above.write_text("from . import a\nfrom .c import h\n")
    typed.write_text("if TYPE_CHECKING:\n    import ddim_schedulers.b\n")
    modules = {"a": below, "b": above, "c": typed}
    graph = {name: imports_of(name, file, modules) for name, file in modules.items()}
    assert graph == {"a": {"b"}, "b": {"a", "c"}, "c": set()}
    assert circles(graph) == [{"a", "b"}]
