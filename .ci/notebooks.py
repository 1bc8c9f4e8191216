"""Run the notebooks of docs/notebooks as a reader would; a warning that is shown is an error.

    python .ci/notebooks.py            # run each in an empty folder; fail at the first error
    python .ci/notebooks.py --write    # and store the outputs in the notebook

It needs what `pip install "ddim-schedulers[demo]"` brings, nbclient, ipykernel and ipywidgets.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
# The first cell of a run, which is not stored.
STRICT = """import warnings
for shown in (UserWarning, RuntimeWarning, FutureWarning):
    warnings.simplefilter("error", shown)"""


def run(path: Path, write: bool) -> None:
    """Run a notebook.

    Raises:
        CellExecutionError: for a cell that fails.
        RuntimeError: for a cell that writes to stderr, as a warning of a command does.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            kernel_name="python3",
            startup_timeout=300,
            timeout=600,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    del notebook.cells[0]
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
        for output in cell.outputs:
            # a training begins with a line of what was found
            if output.get("name") == "stderr" and not output.text.startswith("data: "):
                raise RuntimeError(f"{path.name} writes to stderr:\n{output.text}")
            if "text" in output:
                output.text = output.text.replace("\r\n", "\n")  # a command has a terminal
            if "data" in output:
                output.data.pop("image/jpeg", None)  # beside each PNG
            if "execution_count" in output:
                output.execution_count = count
    if write:
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
        nbformat.write(notebook, path)


def main() -> None:
    """Run all notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the outputs")
    parser.add_argument("names", nargs="*", help="file names; all if not given")
    args = parser.parse_args()
    # `ddim-schedulers` of a cell is the one beside this Python
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for path in sorted(FOLDER.glob("*.ipynb")):
        if args.names and path.name not in args.names:
            continue
        start, before = time.perf_counter(), os.times()
        run(path, args.write)
        after = os.times()
        processors = after.children_user + after.children_system
        processors -= before.children_user + before.children_system
        seconds = time.perf_counter() - start
        print(f"{path.name}: {seconds:.0f} s, {processors:.0f} s of processors", flush=True)


if __name__ == "__main__":
    main()
