"""Resident memory: its growth over many steps, and the peaks of sampling, likelihood and training.

python tests/benchmarks/bench_memory.py --json memory.json [--steps 10000]

Each case runs in a fresh process and says in MiB what it had after a warm-up, what it has at the
end, and its peak.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from pairing import write_json

CASES = (
    "steps",
    "orders",
    "sweep",
    "sampling",
    "stock sampling",
    "calibration",
    "likelihood",
    "training",
    "stock training",
)


def resident():
    """Returns the present resident memory in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(case, steps):
    """Runs one case in this process and returns its figures."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if case in ("steps", "orders", "sweep"):
        from ddim_schedulers import GeneralizedDDIMScheduler

        order, eta = 3 if case == "orders" else 1, None if case == "sweep" else 1.0
        scheduler = GeneralizedDDIMScheduler(eta=eta, solver_order=order)
        x, m = torch.randn(2, 16, 3, 32, 32)

        def work(count):
            for i in range(count):
                if i % 50 == 0:
                    scheduler.set_timesteps(50)
                given = {"eta": i % 97 / 97} if case == "sweep" else {}
                scheduler.step(m, scheduler.timesteps[i % 50], x, **given)

        warm, count = 500, steps
    elif case.endswith("sampling"):
        from bench_sampling import network, quiet

        from ddim_schedulers import GeneralizedDDIMScheduler
        from ddim_schedulers.pipelines import GenerationPipeline

        unet = network(None)
        if case == "sampling":
            pipe = quiet(GenerationPipeline(unet, GeneralizedDDIMScheduler()))
            work = lambda n: pipe(16, batch_size=16, num_inference_steps=n, output_type="np")  # noqa: E731
        else:
            pipe = quiet(DDIMPipeline(unet, DDIMScheduler()))
            work = lambda n: pipe(16, num_inference_steps=n, output_type="np")  # noqa: E731
        warm, count = 2, 20
    elif case in ("calibration", "likelihood"):
        from bench_likelihood import runs

        run = runs()[case]
        work, warm, count = lambda n: [run() for _ in range(n)], 1, 3
    else:
        import tempfile

        import numpy as np
        from bench_training import ours, stock

        images = np.zeros((256, 32, 32), np.uint8)
        folder = Path(tempfile.mkdtemp())
        work = (
            ours(images, folder, "small", 16) if case == "training" else stock(images, "small", 16)
        )
        warm, count = 2, 10
    work(warm)
    before = resident()
    work(count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"case": case, "steps": count, "warm": before, "end": resident(), "peak": peak}


def main():
    """Runs every case, each in a process of its own."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, help="write the figures here as well")
    options.add_argument("--steps", type=int, default=10_000, help="of the cases without a network")
    options.add_argument("--case", choices=CASES, help="only this one, in this process")
    args = options.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.steps)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--steps", str(args.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{case:>15}: {row['steps']} steps, {row['end'] - row['warm']:+.1f} MiB "
            f"(from {row['warm']:.0f}), peak {row['peak']:.0f} MiB",
            flush=True,
        )
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
