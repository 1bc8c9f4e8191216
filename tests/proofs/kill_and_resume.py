"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares the end.

    python tests/proofs/kill_and_resume.py --kills 20 --steps 120

The end must equal that of a run that nobody disturbed, to the bit: weights, average, moments of the
optimiser, and every loss that was written down. With `--processes 2` the runs are torchrun's.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import ddim_schedulers.training.trainer.trainer  # noqa: F401  # forked runs have it ready
from ddim_schedulers.training import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_runs import UNET

torch.set_num_threads(1)


def settings(folder: Path, name: str, steps: int) -> list[str]:
    flags = {
        "output_dir": folder / name,
        "model": folder / "unet.json",
        "max_train_steps": steps,
        "batch_size": 16,
        "checkpoint_every": 2,
        "log_every": 1,
        "lr_schedule": "cosine",
        "timestep_sampling": "loss_aware",
        "num_train_timesteps": 20,
        "sampling_history": 3,
        "random_flip": "true",
        "cpu": "true",
        "progress_bar": "false",
        "resume": "latest",
    }
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


class Run:
    """A training run in processes of its own, with its output in a file.

    One process is forked from this one, whose imports it has: starting Python anew takes longer
    than the training. Two processes are torchrun's.
    """

    def __init__(self, argv: list[str], processes: int, log: Path) -> None:
        self.code: int | None = None
        if processes > 1:
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            words += [f"--nproc_per_node={processes}", "-m", "ddim_schedulers.training.train"]
            with open(log, "a") as file:
                self.pid = subprocess.Popen(
                    words + argv, stdout=file, stderr=file, start_new_session=True
                ).pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            self._train(argv, log)

    def _train(self, argv: list[str], log: Path) -> None:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 1
        try:
            code = train.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> int | None:
        while not self.ended():
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def lines(folder: Path, name: str) -> list[str]:
    path = folder / name / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def killed_once(folder: Path, run: Run, rng: random.Random) -> str:
    """Kills the run some steps after its start, at any point of a step or of a checkpoint."""
    before, wait = len(lines(folder, "killed")), rng.randrange(1, 6)
    began = time.monotonic()
    while True:
        now = len(lines(folder, "killed"))
        before = min(before, now)  # a resumed run drops the lines after its checkpoint
        if now >= before + wait or run.ended() or time.monotonic() - began > 300:
            break
        time.sleep(0.002)
    time.sleep(rng.random() * 0.08)
    if run.ended() or now < before + wait:
        raise SystemExit(f"nothing to kill: {(folder / 'killed.log').read_text()[-3000:]}")
    run.kill()
    root = folder / "killed" / "checkpoints"
    left = sorted(p.name for p in root.iterdir()) if root.exists() else []
    return f"after {len(lines(folder, 'killed'))} steps, leaving {', '.join(left) or 'nothing'}"


def compare(folder: Path, steps: int) -> list[str]:
    """What differs between the two runs at their end."""
    different = []
    one, two = (folder / n / "checkpoints" / f"step-{steps:08d}" for n in ("whole", "killed"))
    for path in sorted(one.rglob("*.safetensors")):
        if path.read_bytes() != (two / path.relative_to(one)).read_bytes():
            different.append(str(path.relative_to(one)))
    losses = [
        [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines(folder, name)]
        for name in ("whole", "killed")
    ]
    return different + (["losses"] if losses[0] != losses[1] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    (folder / "unet.json").write_text(json.dumps({**UNET, "dropout": 0.1}))
    rng = random.Random(args.seed)

    def start(name: str) -> Run:
        argv = settings(folder, name, args.steps)
        return Run(argv, args.processes, folder / f"{name}.log")

    def finish(name: str) -> None:
        if start(name).wait() != 0:
            raise SystemExit(f"a run failed: {(folder / f'{name}.log').read_text()[-3000:]}")

    finish("whole")
    for number in range(args.kills):
        print(f"kill {number + 1}: {killed_once(folder, start('killed'), rng)}", flush=True)
    finish("killed")
    different = compare(folder, args.steps)
    if different:
        print(f"NOT EQUAL: {', '.join(different)} differ; see {folder}")
        return 1
    what = f"weights, average, moments, history and {args.steps} losses"
    print(f"EQUAL after {args.kills} kills: {what}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
