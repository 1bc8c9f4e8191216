"""Uses the wheel as someone does who installed no extra. Run from a folder outside the repo."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import ddim_schedulers
import ddim_schedulers.model_cards
import ddim_schedulers.pipelines
import ddim_schedulers.training
from ddim_schedulers.training import cli


def run_verb(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, without standard input."""
    command = [sys.executable, "-m", "ddim_schedulers.training.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


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

unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    norm_num_groups=4,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
)
pipe = DDPMPipeline(unet, DDPMScheduler())
pipe.scheduler = ddim_schedulers.GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)

for verb in cli.VERBS:
    done = run_verb(verb, "--help")
    helped = done.returncode == 0 and f"ddim-schedulers {verb}" in done.stdout
    told = done.returncode == 2 and done.stderr.startswith(f"`ddim-schedulers {verb}` needs the")
    assert helped or told, f"{verb} --help: {done.returncode}\n{done.stdout}{done.stderr}"

done = run_verb("demo", "--quick")
sentence = (
    "`ddim-schedulers demo` needs the extra 'train': pip install \"ddim-schedulers[train]\"\n"
)
assert (done.returncode, done.stderr) == (2, sentence), f"{done.returncode}\n{done.stderr}"

print("the wheel works without extras")
