"""Uses the wheel as someone does who installed no extra. Run from a folder outside the repo."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import ddim_schedulers
import ddim_schedulers.model_cards
import ddim_schedulers.pipelines
import ddim_schedulers.training
from ddim_schedulers.training import cli

assert "site-packages" in Path(ddim_schedulers.__file__).parts, ddim_schedulers.__file__

bare = [n for n in ("pipelines", "training", "model_cards", "tests") if importlib.util.find_spec(n)]
assert not bare, f"{bare} landed in site-packages"

brought = {name for names in cli.EXTRAS.values() for name in names}
core = {"PIL", "tqdm", "yaml"}  # diffusers and huggingface_hub bring these
found = {name for name in brought - core if importlib.util.find_spec(name)}
assert not found, f"{found} came without the extra: the checks below would prove nothing"

for module in (ddim_schedulers, ddim_schedulers.pipelines, ddim_schedulers.training):
    for name in getattr(module, "__all__", ()):
        getattr(module, name)

for verb in cli.VERBS:
    done = subprocess.run(
        [sys.executable, "-m", "ddim_schedulers.training.cli", verb, "--help"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    helped = done.returncode == 0 and f"ddim-schedulers {verb}" in done.stdout
    told = done.returncode == 2 and done.stderr.startswith(f"`ddim-schedulers {verb}` needs the")
    assert helped or told, f"{verb} --help: {done.returncode}\n{done.stdout}{done.stderr}"

print("the wheel works without extras")
