"""Reconstruction error against S on a trained model, beside stock diffusers on the same tau (DDIM,
Table 2).

    python tests/proofs/reconstruction.py --model PIPELINE --images IMAGES.npy --output FOLDER

`IMAGES.npy` holds uint8 images (N, H, W, C). Writes `reconstruction.json`, `.md` and `.png`. Takes
long on a CPU (about 15,000 network calls of the whole batch), so it is not collected by pytest.
Results are kept after every row; a second call continues.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DModel

from ddim_schedulers.pipelines import InversionPipeline
from ddim_schedulers.pipelines.images import to_model_space
from ddim_schedulers.pipelines.inversion import unit_error

STEPS = (10, 20, 50, 100, 200, 1000)
REFINEMENTS = {
    10: (1, 2, 3, 5, 10, 20),
    20: (1, 2, 3, 5, 10, 20),
    50: (1, 2, 5, 10),
    100: (2, 10),
    200: (2,),
    1000: (2,),
}
SAME_CALLS = {10: 20, 20: 40, 50: 100, 100: 200, 200: 400}
PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 1000: 0.0001}


@torch.no_grad()
def stock_error(unet: UNet2DModel, config: dict, x0: torch.Tensor, steps: int) -> float:
    """Encode with DDIMInverseScheduler and decode with DDIMScheduler, clipping off."""
    inverse = DDIMInverseScheduler.from_config(config, clip_sample=False)
    forward = DDIMScheduler.from_config(config, clip_sample=False)
    x = x0
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return float(unit_error(x, x0).mean())


def our_error(pipe: InversionPipeline, images: np.ndarray, steps: int, refinements: int) -> dict:
    """Reconstruct and return the mean error with what was said about convergence."""
    start = time.perf_counter()
    output = pipe.reconstruct(
        images, num_inference_steps=steps, refinements=refinements, output_type="latent"
    )
    residual = output.inversion.residual
    return {
        "error": float(output.error.mean()),
        "worst_image": float(output.error.max()),
        "residual": None if residual is None else float(residual.max()),
        "converged": output.inversion.converged,
        "calls": output.inversion.network_calls + steps,
        "seconds": time.perf_counter() - start,
    }


def measure(pipe: InversionPipeline, images: np.ndarray, target: Path) -> dict:
    """Fill the table, cheapest rows first, keeping it after every entry."""
    results = json.loads(target.read_text()) if target.exists() else {}
    x0 = to_model_space(images, pipe.image_shape, pipe.state_dtype)
    work = [(f"plain {s}", s, 0) for s in (*STEPS, 40, 400)]
    work += [(f"stock {s}", s, None) for s in STEPS]
    work += [(f"refined {s} x{k}", s, k) for s, ks in REFINEMENTS.items() for k in ks]
    for name, steps, refinements in sorted(work, key=lambda w: w[1] * (2 + (w[2] or 0))):
        if name in results:
            continue
        if refinements is None:
            results[name] = {"error": stock_error(pipe.unet, pipe.scheduler.config, x0, steps)}
        else:
            results[name] = our_error(pipe, images, steps, refinements)
        print(name, results[name], flush=True)
        target.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict) -> str:
    """Return the Markdown table."""
    lines = [
        "| S | paper (CIFAR-10) | stock | ours | ours / stock | 2 refinements | plain, same calls "
        "| 10 refinements |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in STEPS:

        def error(key: str) -> float:
            return results.get(key, {}).get("error", float("nan"))

        ours, stock = error(f"plain {s}"), error(f"stock {s}")
        cells = [f"{s}", f"{PAPER[s]}", f"{stock:.3e}", f"{ours:.3e}", f"{ours / stock:.5f}"]
        cells += [f"{error(f'refined {s} x2'):.2e}", f"{error(f'plain {SAME_CALLS.get(s)}'):.2e}"]
        cells += [f"{error(f'refined {s} x10'):.2e}"]
        lines.append("| " + " | ".join(cells).replace("nan", "") + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict, target: Path) -> None:
    """Draw error against S, and error against refinements for each S."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    series = {
        "stock": ("stock {}", "o-"),
        "ours": ("plain {}", "x--"),
        "2 refinements": ("refined {} x2", "s-"),
    }
    for label, (key, style) in series.items():
        known = [s for s in STEPS if key.format(s) in results]
        left.loglog(known, [results[key.format(s)]["error"] for s in known], style, label=label)
    left.loglog(list(PAPER), list(PAPER.values()), ":", color="grey", label="paper, CIFAR-10")
    left.set(xlabel="steps S each way", ylabel="error per dimension on [0, 1]")
    left.legend(fontsize=7)
    for s, ks in REFINEMENTS.items():
        points = [(0, f"plain {s}")] + [(k, f"refined {s} x{k}") for k in ks]
        known = [(k, results[key]["error"]) for k, key in points if key in results]
        right.semilogy(*zip(*known, strict=True), "o-", markersize=3, label=f"S = {s}")
    right.set(xlabel="refinements of each step", ylabel="error per dimension on [0, 1]")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=80)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = InversionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(pipe, np.load(args.images), folder / "reconstruction.json")
    (folder / "reconstruction.md").write_text(table(results))
    plot(results, folder / "reconstruction.png")
    print(table(results))


if __name__ == "__main__":
    main()
