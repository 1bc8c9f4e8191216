"""Starts every verb twice at the same time on one folder, and kills and stops what runs there.

    python tests/proofs/one_owner.py --rounds 3

In every pair one process does its work, as if alone, or both do it one after the other; a refused
one says whose folder it is, and nothing is left of the lock. Then an owner is killed, which must
free the folder at once, and stopped, which must not.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import DDPMPipeline

import ddim_schedulers.training.trainer.trainer  # noqa: F401  # forked processes have it ready
from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.training.cli import main as cli
from ddim_schedulers.training.evaluation import cells as evaluation  # noqa: F401
from ddim_schedulers.training.likelihood import calibration  # noqa: F401
from ddim_schedulers.training.networks import checkpoints  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_unet

torch.set_num_threads(1)
REFUSED = re.compile(r"is in use by `[\w ]+` on host \S+, process \d+, last sign of life \d{4}-")


def start(words: list[str], log: Path) -> int:
    """Forks a process that runs the command line; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = cli(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def verbs(root: Path) -> dict[str, tuple[list[str], Path]]:
    """Each verb's command line, and the folder that it writes."""
    pipe, images = str(root / "pipe"), str(root / "images")
    model, device = ["--pipeline", pipe, "--cpu"], ["--pipeline", pipe, "--device", "cpu"]
    config = root / "evaluation.yaml"
    config.write_text(
        f"pipeline: {pipe}\ndata: {{data: digits}}\noutput_dir: {root / 'evaluate'}\n"
        "features: [pixels]\nneighbours: 2\n"
        "tables:\n  - name: one\n    n: 64\n"
        "    grid: [{steps: [2, 3], members: [0], spacing: [trailing]}]\n"
    )
    out = {name: root / name for name in ("train", "sample", "likelihood", "interpolate")}
    out["reconstruct"] = root / "reconstruct"
    train = "--cpu true --batch_size 8 --max_train_steps 30 --checkpoint_every 3 --keep_last 2"
    train += f" --resume latest --progress_bar false --log_every 3 --output_dir {out['train']}"
    return {
        "train": (["train", "--model", "tiny", *train.split()], out["train"]),
        "sample": (
            ["sample", *device, "--num_images", "64", "--batch_size", "8"]
            + ["--num_inference_steps", "5", "--output", str(out["sample"])],
            out["sample"],
        ),
        "calibrate": (
            ["calibrate", *model, "--data", "digits", "--num_images", "4", "--batch_size", "2"],
            root / "pipe",
        ),
        "likelihood": (
            ["likelihood", *model, "--data", "digits", "--num_images", "4", "--batch_size", "2"]
            + ["--steps", "5", "--output_dir", str(out["likelihood"])],
            out["likelihood"],
        ),
        "evaluate": (["evaluate", "--config", str(config), "--cpu"], root / "evaluate"),
        "interpolate": (
            [
                "interpolate",
                *device,
                "--scheduler",
                "ddim",
                "--seeds",
                "0",
                "1",
                "--num_inference_steps",
                "20",
            ]
            + ["--output", str(out["interpolate"])],
            out["interpolate"],
        ),
        "reconstruct": (
            ["reconstruct", *device, "--images", images, "--num_inference_steps", "20"]
            + ["--output", str(out["reconstruct"])],
            out["reconstruct"],
        ),
    }


def prepare(root: Path) -> None:
    from PIL import Image

    unet = tiny_unet(blocks=(8, 8))
    scheduler = MarkovianDDPMScheduler(num_train_timesteps=60)
    save_pipeline(DDPMPipeline(unet, scheduler), root / "pipe", "portable")
    (root / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")


def is_clean(folder: Path, verb: str) -> bool:
    left = list(folder.rglob(".owner*")) + list(folder.rglob("*.tmp"))
    left += list(folder.rglob(".writing-*")) + list(folder.rglob(".discarded-*"))
    if verb == "train":
        found = checkpoints.listed(folder / "checkpoints")
        whole = [checkpoints.verify(p) for p in found] == [None, None]
        return not left and whole and (folder / "pipeline" / "model_index.json").exists()
    if verb == "sample":
        return not left and len(list((folder / "images").glob("*.png"))) == 64
    return not left


def pair(verb: str, words: list[str], folder: Path, logs: Path, delay: float) -> str:
    """Two at once: what went wrong, or empty; and how it ended."""
    if verb != "calibrate":
        shutil.rmtree(folder, ignore_errors=True)
    pids = [start(words, logs / "a")]
    time.sleep(delay)
    pids.append(start(words, logs / "b"))
    codes = [ended(pid) for pid in pids]
    texts = [(logs / name).read_text() for name in ("a", "b")]
    refused = [bool(REFUSED.search(text)) for text in texts]
    fine = all((code == 0) != no for code, no in zip(codes, refused, strict=True)) and 0 in codes
    traced = any("Traceback" in text for text in texts)
    if fine and not traced and is_clean(folder, verb):
        return "refused" if any(refused) else "in turn"
    return f"FAILED {codes}\n{texts[0][-1500:]}\n---\n{texts[1][-1500:]}"


def kill_and_stop(verb: str, words: list[str], folder: Path, logs: Path) -> str:
    """A stopped owner is refused to others; a killed one is replaced at once, and all is done."""
    if verb != "calibrate":
        shutil.rmtree(folder, ignore_errors=True)
    first = start(words, logs / "a")
    while not (folder / ".owner-0.json").exists():
        if os.waitpid(first, os.WNOHANG)[0]:
            return f"FAILED: it ended without a lock\n{(logs / 'a').read_text()[-1500:]}"
        time.sleep(0.0005)
    os.kill(first, signal.SIGSTOP)
    time.sleep(0.1)
    if not (folder / ".owner-0.json").exists():
        os.kill(first, signal.SIGKILL)
        ended(first)
        return "too quick to be stopped"
    second = ended(start(words, logs / "b"))
    if second == 0 or not REFUSED.search((logs / "b").read_text()):
        return f"FAILED: a stopped owner was replaced\n{(logs / 'b').read_text()[-1500:]}"
    os.kill(first, signal.SIGKILL)  # and not waited for: a zombie is dead too
    third = ended(start(words, logs / "c"))
    ended(first)
    if third != 0 or not is_clean(folder, verb):
        return f"FAILED after a kill: {third}\n{(logs / 'c').read_text()[-1500:]}"
    return "replaced"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verbs", nargs="+")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="one-owner-"))
    logs = root / "logs"
    logs.mkdir()
    prepare(root)
    tried = failed = 0
    for verb, (words, folder) in verbs(root).items():
        if args.verbs and verb not in args.verbs:
            continue
        ends: list[str] = []
        for number in range(args.rounds):
            ends.append(pair(verb, words, folder, logs, delay=0.05 * number))
        ends.append(kill_and_stop(verb, words, folder, logs))
        tried += len(ends)
        failed += sum(end.startswith("FAILED") for end in ends)
        print(f"{verb}: {', '.join(ends)}", flush=True)
    print(f"{tried} tried, {tried - failed} survived")
    if not failed:
        shutil.rmtree(root)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
