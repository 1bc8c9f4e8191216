"""The code of a self-contained repository: one file out of our modules."""

import ast
import hashlib
import re
from pathlib import Path
from typing import Any

from .plugin import STOCK_CLASSES

BUNDLE_PREFIX = "ddim_schedulers_"
CLASS_PIPELINE, LATENT_PIPELINE = "ClassConditionalPipeline", "LatentPipeline"
_PIPELINES = {CLASS_PIPELINE: "class_pipeline.py", LATENT_PIPELINE: "latent_pipeline.py"}
BUNDLE_IMPORTS = ("import os", "import shutil")

BUNDLE_HEAD = '''\
"""{name} of ddim-schedulers {version}, in one file.

Made from the package's own modules, in the order of their imports, so that a repository can carry
it: `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`. It needs torch,
numpy and diffusers, and nothing else. Licensed under the Apache License, Version 2.0.
"""
'''

# Diffusers records a component under its module; the module of a downloaded class is a path in
# this machine's cache. Saved under the name of this file, and with it, a pipeline stays loadable.
BUNDLE_TAIL = """\
# -- saving again: the file travels with the config


def _save_with_source(
    self: Any, save_directory: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    SchedulerMixin.save_pretrained(self, save_directory, push_to_hub=False)
    target = os.path.join(save_directory, _MODULE + ".py")
    if os.path.abspath(target) != os.path.abspath(__file__):
        shutil.copyfile(__file__, target)
    if push_to_hub:
        raise ValueError("`push_to_hub` of a lone scheduler is not supported; push its pipeline.")


_MODULE = os.path.splitext(os.path.basename(__file__))[0]
{name}.save_pretrained = _save_with_source  # type: ignore[method-assign]
{name}.__module__ = _MODULE
"""


def bundle(class_name: str) -> tuple[str, str]:
    """Return module name and source of one file that holds a scheduler class of this package.

    Modules are joined in the order of their relative imports, which are dropped; a name that two
    modules define would be lost, so it is refused.

    Args:
        class_name: one of our three classes.

    Raises:
        ValueError: for another class, or modules that cannot be joined.
    """
    import sys

    import ddim_schedulers

    if class_name not in STOCK_CLASSES:
        raise ValueError(
            f"`class_name` is {class_name!r}; it must be one of {sorted(STOCK_CLASSES)}."
        )
    main = sys.modules[getattr(ddim_schedulers, class_name).__module__].__file__
    assert main is not None
    return _in_one_file(class_name, Path(main), [BUNDLE_TAIL.format(name=class_name)])


def bundle_pipeline(class_name: str) -> tuple[str, str]:
    """Return module name and source of one file that holds a pipeline class of `_PIPELINES`."""
    return _in_one_file(class_name, Path(__file__).with_name(_PIPELINES[class_name]), [])


def is_bundled_pipeline(class_name: Any) -> bool:
    """Tell whether `_class_name` of a `model_index.json` is a pipeline that we bundle."""
    return (
        isinstance(class_name, list)
        and len(class_name) == 2
        and str(class_name[0]).startswith(BUNDLE_PREFIX)
        and class_name[1] in _PIPELINES
    )


def _in_one_file(class_name: str, main: Path, tail: list[str]) -> tuple[str, str]:
    import ddim_schedulers

    joined = _Joined()
    joined.add(main)
    head = BUNDLE_HEAD.format(name=class_name, version=ddim_schedulers.__version__)
    imports = [*BUNDLE_IMPORTS, *sorted(joined.imports - set(BUNDLE_IMPORTS))]
    parts = [f"# -- {name}.py\n\n{body}" for name, body in joined.bodies.items()]
    source = "\n\n".join([head + "\n" + "\n".join(imports) + "\n", *parts, *tail])
    digest = hashlib.sha256(source.encode()).hexdigest()[:10]
    # a name of its own for each content: diffusers keeps the code of all local repos in one folder
    return f"{BUNDLE_PREFIX}{class_name.lower()}_{digest}", source


class _Joined:
    """Modules on their way into one file."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.bodies: dict[str, str] = {}
        self.owner: dict[str, str] = {}  # of every top-level name

    def add(self, path: Path) -> None:
        """Add a module after those that it imports relatively."""
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            if isinstance(node, ast.ImportFrom) and node.level:
                self._follow(path, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for line, name in _single_imports(node):
                    self.imports.add(line)
                    self._own(name, line)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                for name in _defined_by(node):
                    self._own(name, path.name)
                continue
            lines[first:last] = [""] * (last - first)
        self.bodies[path.stem] = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"

    def _follow(self, path: Path, node: ast.ImportFrom) -> None:
        if node.level != 1 or node.module is None or any(alias.asname for alias in node.names):
            raise ValueError(
                f"{path} has {ast.unparse(node)!r}; it must be `from .module import name`."
            )
        if node.module not in self.bodies:
            self.add(path.with_name(node.module + ".py"))

    def _own(self, name: str, owner: str) -> None:
        if self.owner.setdefault(name, owner) != owner:
            raise ValueError(
                f"`{name}` is defined twice, by {self.owner[name]} and by {owner}; rename one, so "
                "that the modules can be joined."
            )


def _single_imports(node: ast.Import | ast.ImportFrom) -> list[tuple[str, str]]:
    """Return one line for each imported name, and the name that it binds."""
    start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
    return [(start + ast.unparse(a), (a.asname or a.name).split(".")[0]) for a in node.names]


def _defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name) and t.id != "__all__"]
