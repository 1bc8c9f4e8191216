"""Do the tests pass wherever in memory the weights of a loaded network lie?

    python tests/proofs/any_layout.py tests/test_plugin.py tests/test_export.py [-k ...]

safetensors gives tensors that begin anywhere, and CPU kernels choose the order of their sums by
that, each processor in its own way. A test that compares a loaded network with another one to the
bit passes on some machines alone. Here every load, in every process that the tests start, shifts
each tensor by a random number of elements; what follows the files is pytest's. Exit code: pytest's.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Python runs a module of this name at its start. It waits for the import of safetensors.torch.
SITECUSTOMIZE = """
import importlib.util, os, random, sys

def shifted(load):
    import torch
    draw = random.Random(os.urandom(8))

    def shift(tensor):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor
        begin = draw.randrange(1, 16)
        room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
        return room[begin : begin + tensor.numel()].view(tensor.shape).copy_(tensor)

    return lambda *args, **kwargs: {k: shift(t) for k, t in load(*args, **kwargs).items()}

class Finder:
    finding = False

    def find_spec(self, name, path=None, target=None):
        if name != "safetensors.torch" or self.finding:
            return None
        self.finding = True
        spec = importlib.util.find_spec(name)
        self.finding = False
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.load, module.load_file = shifted(module.load), shifted(module.load_file)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
CHECK = """
import sys, torch
from safetensors.torch import load_file, save_file
save_file({"x": torch.arange(5.0)}, sys.argv[1])
places = {load_file(sys.argv[1])["x"].data_ptr() % 64 for _ in range(50)}
assert len(places) > 5 and load_file(sys.argv[1])["x"].equal(torch.arange(5.0)), places
"""


def main() -> int:
    """Run pytest on the files given."""
    if not sys.argv[1:]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(SITECUSTOMIZE)
        environment = {**os.environ, "PYTHONPATH": folder}
        check = [sys.executable, "-c", CHECK, str(Path(folder, "x.safetensors"))]
        subprocess.run(check, env=environment, cwd=folder, check=True)
        pytest = [Path(sys.executable).with_name("pytest"), "-q", *sys.argv[1:]]
        return subprocess.run(pytest, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
