"""What the tests cannot show without an accelerator: run it once on each kind to be trusted.

    python tests/proofs/accelerator.py [--device cuda] [--json accelerator.json]

It checks, and exits with 1 when a check fails:

1. a step makes no wait for the device (torch.cuda.set_sync_debug_mode("error") raises at one);
2. a step on the device equals the step on the CPU, the noise being the same;
3. a pipeline draws the same pictures on the device as on the CPU, in one batch or in several;
4. twenty training steps give a finite loss in float32, bfloat16 and float16.

It measures, in one run, against stock diffusers: the time of one step, images a second of a
pipeline (eager, channels_last and bfloat16, CUDA graphs), and peak memory for N images.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.training import TrainingConfig, train
from ddim_schedulers.training.networks.models import make_unet

STEP_TOLERANCE = 1e-5  # float32: largest difference of a whole trajectory, states are of size 1
PICTURE_TOLERANCE = 2e-3  # of [0, 1]: convolutions round differently, and TF32 is off

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM eta 0": GeneralizedDDIMScheduler,
    "DDIM eta 1": lambda: GeneralizedDDIMScheduler(eta=1.0),
    "DDIM sigma-hat": lambda: GeneralizedDDIMScheduler(eta=1.0, reverse_variance="sigma_hat"),
    "DDIM order 3": lambda: GeneralizedDDIMScheduler(solver_order=3, clip_sample=False),
    "DDIM dynamic threshold": lambda: GeneralizedDDIMScheduler(
        thresholding=True, clip_sample=False
    ),
    "DDPM": MarkovianDDPMScheduler,
    "inverse": GeneralizedDDIMInverseScheduler,
}


def walk(make: Callable[[], Any], device: str, outputs: torch.Tensor, x: torch.Tensor) -> Any:
    """One trajectory of a scheduler on a device, the network's outputs given."""
    scheduler = make()
    scheduler.set_timesteps(len(outputs), device=device)
    x, outputs = x.to(device), outputs.to(device)
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(x.shape, generator=generator).to(device) for _ in outputs]
    takes = not isinstance(scheduler, GeneralizedDDIMInverseScheduler)

    def run() -> torch.Tensor:
        state = x
        for output, t, noise in zip(outputs, scheduler.timesteps, noises, strict=True):
            named = {"variance_noise": noise} if takes else {}
            state = scheduler.step(output, t, state, **named).prev_sample
        return state

    return run


def check_steps(device: str) -> list[dict[str, Any]]:
    rows = []
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(20, 4, 3, 32, 32, generator=generator)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    for name, make in SCHEDULERS.items():
        row: dict[str, Any] = {"check": "step", "scheduler": name, "ok": True}
        run = walk(make, device, outputs, x)
        here = run()
        difference = float((here.cpu() - walk(make, "cpu", outputs, x)()).abs().max())
        row["difference"] = difference
        row["ok"] = difference <= STEP_TOLERANCE * max(1.0, float(here.abs().max()))
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
                row["waits"] = False
            except RuntimeError as error:
                row.update(ok=False, waits=str(error).splitlines()[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        rows.append(row)
    return rows


def network(sample_size: int = 32) -> UNet2DModel:
    torch.manual_seed(0)
    return make_unet("small", channels=1, size=(sample_size, sample_size)).eval()


def check_pictures(device: str) -> list[dict[str, Any]]:
    unet, scheduler = network(), GeneralizedDDIMScheduler(eta=0.5)
    arguments: dict[str, Any] = {"num_inference_steps": 10, "output_type": "pt"}
    pipe = GenerationPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    on_cpu = pipe(seeds=range(8), **arguments).images
    pipe.to(device)
    one = pipe(seeds=range(8), **arguments).images
    several = pipe(seeds=range(8), batch_size=3, **arguments).images
    pairs = {"CPU": on_cpu, "batches of 3": several}
    return [
        {
            "check": f"pictures, one batch against {name}",
            "difference": (d := float((one - other).abs().max())),
            "ok": d <= PICTURE_TOLERANCE,
        }
        for name, other in pairs.items()
    ]


def check_training(device: str) -> list[dict[str, Any]]:
    rows = []
    images = np.random.default_rng(0).integers(0, 255, (256, 28, 28), dtype=np.uint8)
    precisions = ("no", "bf16", "fp16") if device == "cuda" else ("no", "bf16")
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "noise.npz"), images=images)
        for precision in precisions:
            config = TrainingConfig(
                data=str(Path(folder, "noise.npz")),
                image_size=32,
                fit="pad",
                model="small",
                batch_size=32,
                max_train_steps=20,
                mixed_precision=precision,
                log_every=10,
                tracker="none",
                progress_bar=False,
                output_dir=str(Path(folder, precision)),
                cpu=device == "cpu",
            )
            train(config)
            lines = Path(folder, precision, "metrics.jsonl").read_text().splitlines()
            losses = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
            ok = bool(losses) and bool(np.isfinite(losses).all())
            rows.append({"check": f"training {precision}", "losses": losses, "ok": ok})
    return rows


def timed(call: Callable[[], Any], device: str, inner: int = 1) -> float:
    """Seconds of one call, the device waited for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    for _ in range(inner):
        call()
    wait()
    return (time.perf_counter() - begun) / inner


def compare(ours: Callable, theirs: Callable, device: str, repeats: int, inner: int) -> Any:
    ours(), theirs()
    pairs = [(timed(ours, device, inner), timed(theirs, device, inner)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "stock_seconds": statistics.median(b for _, b in pairs),
    }


def measure_steps(device: str) -> list[dict[str, Any]]:
    rows = []
    for shape in ((4, 3, 32, 32), (16, 3, 256, 256), (256, 3, 256, 256)):
        if device == "cpu" and shape[0] > 16:
            continue
        output, x = torch.randn(shape, device=device), torch.randn(shape, device=device)

        def steps(scheduler: Any, output: Any = output, x: Any = x, **named: Any) -> Callable:
            scheduler.set_timesteps(50, device=device)

            def call() -> None:
                for t in scheduler.timesteps:
                    scheduler.step(output, t, x, **named)

            return call

        cases = {
            "DDIM eta 0": (GeneralizedDDIMScheduler(), DDIMScheduler(), {"eta": 0.0}),
            "DDIM eta 1": (GeneralizedDDIMScheduler(), DDIMScheduler(), {"eta": 1.0}),
            "DDPM": (MarkovianDDPMScheduler(), DDPMScheduler(), {}),
        }
        for name, (ours, stock, named) in cases.items():
            result = compare(steps(ours, **named), steps(stock, **named), device, 7, 1)
            rows.append({"measure": "50 steps", "shape": shape, "sampler": name, **result})
    return rows


def measure_pipelines(device: str, images: int) -> list[dict[str, Any]]:
    rows = []
    stock = DDIMPipeline(network(), DDIMScheduler()).to(device)
    stock.set_progress_bar_config(disable=True)
    ways: dict[str, dict[str, Any]] = {
        "eager": {},
        "channels_last, bfloat16": {"channels_last": True, "dtype": torch.bfloat16},
    }
    if device == "cuda":
        graphs = {"compile": {"mode": "reduce-overhead"}, "dtype": torch.bfloat16}
        ways["CUDA graphs, bfloat16"] = graphs

    def theirs() -> Any:
        return stock(batch_size=images, num_inference_steps=20, output_type="np")

    for way, settings in ways.items():
        pipe = GenerationPipeline(network(), GeneralizedDDIMScheduler()).to(device)
        pipe.speed_up(**settings)
        pipe.set_progress_bar_config(disable=True)

        def ours(pipe: Any = pipe) -> Any:
            return pipe(images, batch_size=images, num_inference_steps=20, output_type="np")

        result = compare(ours, theirs, device, 5, 1)
        rows.append({"measure": f"{images} images, 20 steps", "way": way, **result})
    return rows


def measure_memory(device: str) -> list[dict[str, Any]]:
    if device != "cuda":
        return []
    pipe = GenerationPipeline(network(), GeneralizedDDIMScheduler()).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for images in (64, 2048):
        torch.cuda.reset_peak_memory_stats()
        pipe(images, batch_size=64, num_inference_steps=4, output_type="np")
        peak = torch.cuda.max_memory_allocated() / 2**20
        rows.append({"measure": "peak MiB on the device", "images": images, "MiB": peak})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--images", type=int, default=64, help="of the timed pipelines")
    parser.add_argument("--json", type=Path, help="write every row here as well")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    versions = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__}
    rows: list[dict[str, Any]] = [versions]
    for part in (check_steps, check_pictures, measure_steps, check_training, measure_memory):
        rows += part(args.device)
    rows += measure_pipelines(args.device, args.images)
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [row for row in rows if row.get("ok") is False]
    print(f"{len(failed)} of {sum('ok' in row for row in rows)} checks failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
