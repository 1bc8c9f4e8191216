"""The same noises under stock DDIM, DPM-Solver++, UniPC and ours, with 5 and with 10 network calls.

    python tests/proofs/few_steps_picture.py --pipeline PIPELINE --output docs/images/few_steps.png

Each sampler of diffusers has the spacing that suits it best of those in solver_presets.py. Beside a
row stands its end-point error: the mean squared error of the clamped x_0 against a fine run of 100
calls (order 3 with corrector, no clipping) from the same `n` noises, times 1,000; the picture shows
the first of them, and the fine run in the last row. `--calibrated CONFIG.json`, a scheduler's
config with tables of `calibrate --objective solver` for both numbers of calls, adds a row.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw, ImageFont

from ddim_schedulers import CALIBRATED, FEW_STEPS, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import make_grid

ROWS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DPM-Solver++(2M)": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
    "UniPC": (UniPCMultistepScheduler, {"timestep_spacing": "linspace"}),
    "ours, FEW_STEPS": (GeneralizedDDIMScheduler, FEW_STEPS),
    "ours, order 3": (GeneralizedDDIMScheduler, {**FEW_STEPS, "solver_order": 3}),
}
FINE = {
    "timestep_spacing": "trailing",
    "solver_order": 3,
    "solver_corrector": True,
    "clip_sample": False,
}
CALLS, FINE_CALLS = (5, 10), 100
NAMES, NUMBERS, TITLE, GAP = 240, 76, 44, 16  # pixels


def sample(pipeline: DDPMPipeline, scheduler: Any, noises: torch.Tensor, calls: int):
    """Return the clamped end points of a number of network calls."""
    ends = []
    for x in noises.split(64):
        scheduler.set_timesteps(calls)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            eps = pipeline.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(eps, t, x).prev_sample
        ends.append(x.clamp(-1, 1))
    return torch.cat(ends)


def panel(images: torch.Tensor) -> Image.Image:
    """Return one row of pictures, each pixel twice as wide and high."""
    return make_grid(images / 2 + 0.5, len(images), padding=2, scale=2)


def main() -> None:
    """Make the picture, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--calibrated", type=Path, help="a scheduler's config with tables")
    parser.add_argument("--n", type=int, default=256, help="noises of the end-point error")
    parser.add_argument("--shown", type=int, default=10, help="noises in the picture")
    args = parser.parse_args()
    pipeline = DDPMPipeline.from_pretrained(args.pipeline)
    config, unet = pipeline.scheduler.config, pipeline.unet.config
    rows = dict(ROWS)
    if args.calibrated:
        tables = json.loads(args.calibrated.read_text(encoding="utf-8"))["calibration"]
        fitted = {**CALIBRATED, "calibration": tables}
        rows["ours, fitted table"] = GeneralizedDDIMScheduler, fitted
    noises = torch.randn(
        args.n,
        unet.in_channels,
        unet.sample_size,
        unet.sample_size,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.inference_mode():
        fine = sample(
            pipeline, GeneralizedDDIMScheduler.from_config(config, **FINE), noises, FINE_CALLS
        )
        ends = {
            (name, calls): sample(pipeline, kind.from_config(config, **settings), noises, calls)
            for name, (kind, settings) in rows.items()
            for calls in CALLS
        }
    errors = {key: 1000 * float((x_0 - fine).square().mean()) for key, x_0 in ends.items()}
    for (name, calls), error in errors.items():
        print(f"{name}, {calls} calls: {error:.1f}e-3 (n = {args.n})", flush=True)

    wide, high = panel(fine[: args.shown]).size
    step = NUMBERS + wide + GAP
    canvas = Image.new("L", (NAMES + 2 * step - GAP, TITLE + high * (len(rows) + 1)), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(28)
    for i, calls in enumerate(CALLS):
        left = NAMES + NUMBERS + i * step
        draw.text((left, 4), f"{calls} calls", font=font, fill=0)
        for k, name in enumerate([*rows, ""]):
            top = TITLE + k * high
            shown = ends[name, calls] if name else fine
            canvas.paste(panel(shown[: args.shown]).convert("L"), (left, top))
            if name:
                draw.text(
                    (left - 10, top + high // 2),
                    f"{errors[name, calls]:.1f}",
                    font=font,
                    fill=0,
                    anchor="rm",
                )
    for k, name in enumerate([*rows, f"{FINE_CALLS} calls"]):
        draw.text((4, TITLE + k * high + high // 2), name, font=font, fill=0, anchor="lm")
    canvas.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
