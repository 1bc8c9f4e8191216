"""Uses the wheel as someone does who installed no extra. Run from a folder outside the repo."""

import contextlib
import importlib.util
import io
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import ddim_schedulers
import ddim_schedulers.model_cards
import ddim_schedulers.pipelines
import ddim_schedulers.training
from ddim_schedulers.training import cli


def call(*argv: str) -> tuple[int, str, str]:
    """Runs the command line in this process; gives its exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


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
    code, out, err = call(verb, "--help")
    helped = code == 0 and f"ddim-schedulers {verb}" in out
    told = code == 2 and err.startswith(f"`ddim-schedulers {verb}` needs the extra")
    assert helped or told, f"{verb} --help: {code}\n{out}{err}"

sentence = "`ddim-schedulers demo` needs the extra 'demo': pip install \"ddim-schedulers[demo]\"\n"
assert call("demo", "--quick") == (2, "", sentence), call("demo", "--quick")

print("the wheel works without extras")
