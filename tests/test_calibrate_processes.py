"""A calibration that is killed goes on, on two processes, and ends as one that ran alone."""

import json

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

SCRIPT = """
import os, signal, sys
from functools import partial

from ddim_schedulers.training.calibration import samples_job, samples_search, solver_job
from ddim_schedulers.training.cli import main
from ddim_schedulers.training.common.sealed_parts import SealedParts

small = samples_search.Space(((0.0, None), (1.0, (0.2, 0.8))), (1.0, 1.1), (1.0,), rounds=0)
samples_job.SamplesJob = partial(samples_job.SamplesJob, space=small)
# an untrained network: whatever comes first is stored
samples_search.Verdict.wins = solver_job.Outcome.is_better = True
before_the_kill, *words = sys.argv[1:]
save, saved = SealedParts.save, []

def killed(self, item, value):
    saved.append(item)
    if len(saved) == int(before_the_kill):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, item, value)

SealedParts.save = killed
sys.exit(main(words))
"""


@pytest.mark.parametrize(
    ("objective", "more", "kill"),
    [
        ("solver", "--num_images 5 --held_out 3 --trajectory_steps 8 --batch_size 2", 9),
        ("samples", "--data digits --num_images 48 --features pixels details", 5),
    ],
)
def test_a_killed_run_goes_on_on_two_processes_and_gives_the_same(
    objective, more, kill, tmp_path, processes
):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    scheduler = DDPMScheduler(50, beta_end=0.3)
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "p")
    script, work = tmp_path / "go.py", tmp_path / "work"
    script.write_text(SCRIPT)
    words = ["calibrate", "--objective", objective, "--pipeline", str(tmp_path / "p")]
    words += ["--calls", "3", "--cpu", *more.split(), "--work_dir", str(work), "--output"]

    def go(count, name, kill=0):
        return processes([script, kill, *words, tmp_path / name], count, tmp_path)

    go(1, "alone.json")
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        go(1, "together.json", kill)
    assert len(list(work.glob("part-*"))) == kill - 1 and not (tmp_path / "together.json").exists()
    out, err = go(2, "together.json")
    assert "2 processes; written to" in out and "process 1: " in err and not work.exists()
    alone, together = (
        json.loads((tmp_path / name).read_text())["_ddim_schedulers"]["settings"]["calibration"][
            "solver"
        ]["3"]
        for name in ("alone.json", "together.json")
    )
    assert alone.keys() == together.keys()
    # weights of regressors that are nearly parallel move with the rounding of a process
    for key in ("timesteps", "clip", "eta", "eta_interval", "eps_scale", "end_scale"):
        assert together[key] == alone[key]
    if objective == "samples":
        together, alone = together["samples"], alone["samples"]
    for key in ("held_out", "analytic") if objective == "solver" else ("distance", "gain"):
        assert together[key] == pytest.approx(alone[key], rel=1e-3)
