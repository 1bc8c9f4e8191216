"""The console script `ddim-schedulers`: reads the command line before torch is imported.

Importing any module of `ddim_schedulers` imports the package first, which registers with diffusers:
that takes seconds, and whoever imports it relies on it. `--help`, `--version` and a mistyped verb
need none of it. So the script is a module of its own, which runs the file of
`ddim_schedulers.training.cli` alone; what a verb needs is imported when the verb is chosen.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run the command line on `sys.argv`; return its exit code."""
    spec = find_spec("ddim_schedulers")  # finds the package, does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'ddim_schedulers'", name="ddim_schedulers")
    folder = Path(spec.submodule_search_locations[0])
    places = (folder / "training", folder.parent / "training")  # installed; in a clone
    path = next(place / "cli.py" for place in places if (place / "cli.py").is_file())
    return int(runpy.run_path(str(path))["main"]())


if __name__ == "__main__":
    sys.exit(main())
