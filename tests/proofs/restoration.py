"""PSNR, SSIM and Frechet distance of every method of restoration, beside what needs no model.

    python tests/proofs/restoration.py --model PIPELINE --images IMAGES.npz --output FOLDER

`IMAGES.npz` holds uint8 images (N, H, W) or (N, H, W, C) that the model was not trained on; smaller
ones are padded with black. The first `--count` are measured and restored; the Frechet distance is
that of the pooled pixels of `--frechet` restored images from those of all later ones. Each method
has about the same number of calls, forward and backward passes together. Every row is kept in a
file; a second call continues. Writes `restoration.json` and `.md`, and a sheet for each task. Two
minutes on a GPU, hours on a CPU, so it is not collected by pytest.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import RestorationPipeline, make_grid
from ddim_schedulers.pipelines.images import to_uint8
from ddim_schedulers.pipelines.restoration.methods import Dps, Mmps, RePaint
from ddim_schedulers.pipelines.restoration.tasks import task_named
from ddim_schedulers.training.metrics.distances import frechet_distance
from ddim_schedulers.training.metrics.features import PooledPixels, extract
from ddim_schedulers.training.metrics.likeness import psnr, ssim

# name of the row: task, its options, noise_std
TASKS = {
    "half masked": ("inpaint", {"mask": "half"}, 0.0),
    "every other pixel": ("inpaint", {"mask": "random"}, 0.0),
    "4x boxes": ("superres4", {}, 0.0),
    "4x bicubic": ("superres4", {"kernel": "bicubic"}, 0.0),
    "blur": ("deblur", {"blur_std": 1.5}, 0.0),
    "colour from grey": ("colorize", {}, 0.0),
    "4x boxes, noise": ("superres4", {}, 0.1),
    "blur, noise": ("deblur", {"blur_std": 1.5}, 0.1),
}
# method: for about 20 and 100 calls its settings; eta 0.85 by the rule of DDRM and DDNM, else 1
ROWS = {
    "ddnm": {20: ("ddnm", 20), 100: ("ddnm", 100)},
    "ddrm": {20: ("ddrm", 20), 100: ("ddrm", 100)},
    "repaint": {20: (RePaint(3), 7), 100: (RePaint(5), 20)},
    "dps": {20: (Dps(2.0), 10), 100: (Dps(1.0), 50)},
    "pigdm": {20: ("pigdm", 10), 100: ("pigdm", 50)},
    "mmps": {20: (Mmps(max_iterations=4), 4), 100: (Mmps(max_iterations=4), 20)},
}
PAPERS = {"eta": 0.85, "eta_rule": "paper"}
BATCH = 500
SHOWN = 8  # images of a sheet: truth, measurement, without a model, then each method


def load_images(path: str, size: tuple[int, int]) -> torch.Tensor:
    """Return uint8 images as (N, C, H, W) in [-1, 1], padded to `size` with black."""
    arrays = np.load(path)
    array = arrays["images"] if "images" in arrays.files else arrays[arrays.files[0]]
    array = array[..., None] if array.ndim == 3 else array
    down, across = (have - want for have, want in zip(size, array.shape[1:3], strict=True))
    pad = ((0, 0), (down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    return torch.from_numpy(np.pad(array, pad)).movedim(-1, 1).float() / 127.5 - 1


def measure(task, truth: torch.Tensor, noise_std: float) -> torch.Tensor:
    """Return A x + noise, where image i has its own noise."""
    y = task.operator.A(truth)
    rows = [
        torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(10**6 + i))
        for i in range(len(y))
    ]
    return y + noise_std * torch.stack(rows)


def likeness(images: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Return the means of PSNR and SSIM of images in [-1, 1]."""
    pair = [((x.cpu() + 1) / 2).clamp(0, 1) for x in (images, truth)]
    return {"psnr": float(psnr(*pair).mean()), "ssim": float(ssim(*pair).mean())}


def kept(path: Path, compute) -> dict:
    """Return what a file holds, computed where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute(), indent=2))
        print(path.name, path.read_text().replace("\n", " "), flush=True)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast of the network")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--frechet", type=int, default=1000, help="0: none")
    parser.add_argument("--calls", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(ROWS))
    args = parser.parse_args()
    pipe = RestorationPipeline.from_pretrained(args.model)
    config = dict(pipe.scheduler.config)
    scheduler = GeneralizedDDIMScheduler.from_config(
        config, timestep_spacing="trailing", reverse_variance="sigma"
    )
    pipe = RestorationPipeline.from_pipe(pipe, scheduler=scheduler)
    pipe.unet.float()
    pipe = pipe.to(args.device)
    pipe.unet.to(memory_format=torch.channels_last)
    if args.bf16:
        kind = torch.device(args.device).type
        pipe.unet.forward = torch.autocast(kind, torch.bfloat16)(pipe.unet.forward)
    pipe.set_progress_bar_config(disable=True)
    channels, *size = pipe.image_shape
    everything = load_images(args.images, tuple(size))
    features = PooledPixels(pipe.image_shape)
    out, rows = Path(args.output), {}
    later = extract(features, everything[args.frechet :]) if args.frechet else None
    for name in args.tasks:
        kind, options, noise_std = TASKS[name]
        if kind == "colorize" and channels != 3:
            continue
        rows[name] = run_task(pipe, name, kind, options, noise_std, everything, later, out, args)
    (out / "restoration.json").write_text(json.dumps(rows, indent=2))
    (out / "restoration.md").write_text(table(rows))
    print(table(rows))


def run_task(pipe, name, kind, options, noise_std, everything, later, out, args) -> dict:
    """Return the rows of a task, and draw its sheet."""
    features = PooledPixels(pipe.image_shape)
    task = task_named(kind, pipe.image_shape, **options)
    truth, slug = everything[: args.count], name.replace(" ", "-").replace(",", "")
    y = measure(task, truth, noise_std)
    plain = task.plain(y).clamp(-1, 1)
    rows = {"no model": kept(out / "cells" / f"{slug}-plain.json", lambda: likeness(plain, truth))}
    for method in args.methods:
        for calls in args.calls:
            given, steps = ROWS[method][calls]
            if noise_std and method == "repaint":
                continue
            member = PAPERS if method in ("ddnm", "ddrm") else {"eta": 1.0}

            def restored(y, count, given=given, steps=steps, member=member, **more):
                return pipe(
                    y.to(args.device),
                    task.operator,
                    noise_std,
                    given,
                    seeds=range(count),
                    batch_size=BATCH,
                    num_inference_steps=steps,
                    output_type="latent",
                    **member,
                    **more,
                )

            path = out / "cells" / f"{slug}-{method}-{calls}.json"

            def row(calls=calls, restored=restored, path=path):
                start = time.perf_counter()
                found = restored(y, args.count)
                seconds = time.perf_counter() - start
                np.save(path.with_suffix(".npy"), to_uint8(found.images[:SHOWN]))
                result = likeness(found.images, truth)
                result["residual"] = float(found.residual.max())
                result["residual_clamped"] = float(found.residual_clamped.max())
                result["calls"] = found.network_calls + found.backward_passes
                result["seconds"] = seconds
                result["solver_residual"] = found.solver_residual
                if args.frechet and calls == 20:
                    many = measure(task, everything[: args.frechet], noise_std)
                    images = restored(many, args.frechet).images.clamp(-1, 1)
                    result["frechet"] = frechet_distance(later, extract(features, images))
                return result

            rows[f"{method}, {calls}"] = kept(path, row)
    if args.frechet:
        measured = everything[: args.frechet]
        many = task.plain(measure(task, measured, noise_std)).clamp(-1, 1)
        for row, images in (("no model", many), ("the truth", measured)):
            rows.setdefault(row, {})["frechet"] = kept(
                out / "cells" / f"{slug}-{row.replace(' ', '-')}-frechet.json",
                lambda images=images: {
                    "frechet": frechet_distance(later, extract(features, images))
                },
            )["frechet"]
    columns = [truth[:SHOWN], task.shown(y[:SHOWN]), plain[:SHOWN]]
    arrays = [to_uint8(column.cpu()) for column in columns]
    for method in args.methods:
        path = out / "cells" / f"{slug}-{method}-{max(args.calls)}.npy"
        arrays += [np.load(path)] if path.exists() else []
    pictures = np.stack(arrays, axis=1)
    make_grid(pictures.reshape(-1, *pictures.shape[2:]), len(arrays), scale=2).save(
        out / f"{slug}.png"
    )
    return rows


def table(rows: dict) -> str:
    """Return the rows as Markdown."""
    lines = []
    for task, found in rows.items():
        lines += [f"**{task}**", ""]
        lines += ["| method, calls | PSNR | SSIM | max \\|A x - y\\| | clamped | Frechet | calls |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, row in found.items():
            cells = [
                "" if row.get(key) is None else format(row[key], form)
                for key, form in (
                    ("psnr", ".2f"),
                    ("ssim", ".3f"),
                    ("residual", ".2g"),
                    ("residual_clamped", ".2g"),
                    ("frechet", ".2f"),
                    ("calls", "d"),
                )
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
