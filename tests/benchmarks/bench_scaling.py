"""Throughput of two processes against one: sampling, evaluation, training; a thread for each.

python tests/benchmarks/bench_scaling.py --json scaling.json

Run it on an installed package. The time of a short run is taken off that of a long one, so that
starting up does not count. Sampling and evaluation halve the work; training keeps the batch of each
process, so that two of them see twice the images. Wall-clock time: the machine must be idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_sampling import network
from diffusers import DDIMPipeline, DDIMScheduler
from pairing import write_json

BATCH = 16


def launch(processes, module, arguments, folder):
    """Returns the seconds that a run takes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", module, *map(str, arguments)]
    begun = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
    return time.perf_counter() - begun


def sample(processes, images, folder):
    """Samples into a new folder."""
    output = tempfile.mkdtemp(dir=folder)
    arguments = ["sample", "--pipeline", folder / "model", "--scheduler", "ddim", "--device", "cpu"]
    arguments += ["--num_inference_steps", 5, "--batch_size", BATCH, "--num_images", images]
    arguments += ["--output", output, "--format", "npz"]
    return launch(processes, "ddim_schedulers.training.cli", arguments, folder)


def evaluate(processes, images, folder):
    """Samples one cell of a table and measures it."""
    output = Path(tempfile.mkdtemp(dir=folder))
    config = {
        "pipeline": str(folder / "model"),
        "output_dir": str(output / "out"),
        "data": {"data": str(folder / "images.npy"), "validation_fraction": 0.5},
        "features": ["pixels"],
        "batch_size": BATCH,
        "tables": [{"name": "One", "n": images, "grid": [{"steps": [5], "members": [0]}]}],
    }
    (output / "evaluation.json").write_text(json.dumps(config))
    arguments = ["evaluate", "--config", output / "evaluation.json", "--cpu"]
    return launch(processes, "ddim_schedulers.training.cli", arguments, folder)


def train(processes, steps, folder):
    """Trains the same network from the start."""
    output = tempfile.mkdtemp(dir=folder)
    arguments = ["--data", folder / "images.npy", "--model", "small", "--batch_size", BATCH]
    arguments += ["--max_train_steps", steps, "--validation_fraction", 0, "--output_dir", output]
    arguments += ["--cpu", "true", "--log_every", 10, "--sample_every", 0]
    return launch(processes, "ddim_schedulers.training.train", arguments, folder)


# verb, amounts of a short and a long run, images in one unit of them for each process
CASES = {
    "sampling": (sample, (64, 256), lambda processes: 1),
    "evaluation": (evaluate, (64, 256), lambda processes: 1),
    "training": (train, (5, 25), lambda processes: BATCH * processes),
}


def main():
    """Runs every case with one and two processes."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, help="write the figures here as well")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        DDIMPipeline(network(None), DDIMScheduler()).save_pretrained(folder / "model")
        images = np.random.default_rng(0).integers(0, 256, (512, 32, 32), dtype=np.uint8)
        np.save(folder / "images.npy", images)
        for case, (run, (short, long), images_of) in CASES.items():
            speed = {1: [], 2: []}
            for _ in range(args.repeats):
                for processes in speed:
                    seconds = run(processes, long, folder) - run(processes, short, folder)
                    speed[processes].append((long - short) * images_of(processes) / seconds)
            ratios = sorted(b / a for a, b in zip(speed[1], speed[2], strict=True))
            rows.append({"case": case, "images_per_second": speed, "speed_up": ratios})
            print(f"{case}: {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
