"""The main job on the digits that scikit-learn embeds: train, evaluate, look, save.

One small DDPM is trained and evaluated: every member of the family samples from it with the same
seeds. The result is a folder of pictures, a table and a pipeline that anyone loads with
`DiffusionPipeline.from_pretrained`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDPMPipeline

from ddim_schedulers import FEW_STEPS, GeneralizedDDIMScheduler
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.pipelines import GenerationPipeline, InterpolationPipeline, InversionPipeline
from ddim_schedulers.pipelines.files import write_bytes, write_json
from ddim_schedulers.pipelines.ownership import Owner, own
from ddim_schedulers.pipelines.pictures import tiled
from ddim_schedulers.training.common.figures import panels_figure, rows_figure, save_figure
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.evaluation.cells import Evaluation
from ddim_schedulers.training.evaluation.config import EvaluationConfig, parse_evaluation
from ddim_schedulers.training.evaluation.grid import Cell
from ddim_schedulers.training.evaluation.references import from_uint8
from ddim_schedulers.training.evaluation.report import evaluate, short
from ddim_schedulers.training.evaluation.tables import pivot
from ddim_schedulers.training.train import train

SURE = 0.9
MEMBERS = (0.0, 0.2, 0.5, 1.0, "sigma-hat")
LONG_MEMBERS = (0.0, "sigma-hat")
# Few steps: schedulers of diffusers on their own spacing, and ours.
FEW: dict[str, dict[str, Any]] = {
    "DDIMScheduler of diffusers": {"class": "DDIMScheduler", "timestep_spacing": "leading"},
    "DPM-Solver++": {"class": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace"},
    "UniPC": {"class": "UniPCMultistepScheduler", "timestep_spacing": "linspace"},
    "few steps preset": {"class": "GeneralizedDDIMScheduler", **FEW_STEPS},
}
RECONSTRUCTION_STEPS = (10, 50, 100)
SHOWN, SAMPLES_SHOWN, FEW_SHOWN = 12, 64, 25


@dataclass(frozen=True)
class DemoSettings:
    """What `ddim-schedulers demo` asks for.

    Attributes:
        output: folder for everything that is written.
        seed: of training; sample i has seed i.
        num_images: samples in every cell of the table, >= 2.
        train_steps: optimiser steps of `batch_size` images.
        batch_size: images a step.
        steps: S of the columns of the table.
        long_steps: S of the column that has sigma-hat and eta = 0 alone, at most 1000.
        few_steps: S of the table that has the schedulers of `FEW`.
    """

    output: Path
    seed: int = 0
    num_images: int = 256
    train_steps: int = 1250
    batch_size: int = 64
    steps: tuple[int, ...] = (10, 20, 50, 100)
    long_steps: int = 1000
    few_steps: tuple[int, ...] = (5, 10)


def quick(output: Path, seed: int) -> DemoSettings:
    """Return settings that show every part of the demo in well under a minute, not its quality."""
    return DemoSettings(output, seed, 64, 300, 64, (10, 20), 50)


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Train, evaluate and draw; see `DemoSettings`.

    Returns:
        What is written to `results.json`, and under `short` the tables of the evaluation.

    Raises:
        ValueError: for settings out of range, before anything is trained.
        FolderInUseError: another process writes to `settings.output`.
    """
    _check(settings)
    wanted = parse_evaluation(_evaluation(settings))
    with own(settings.output, "demo") as owner:
        return _run(settings, wanted, owner)


def _run(settings: DemoSettings, wanted: EvaluationConfig, owner: Owner) -> dict[str, Any]:
    started = time.perf_counter()
    trained = train(_training(settings))
    if trained.stopped_by is not None:
        raise KeyboardInterrupt(trained.stopped_by)
    owner.check()
    pipe = DDPMPipeline(unet=trained.unet, scheduler=trained.scheduler)
    notes = save_pipeline(pipe, settings.output / "pipeline", form="portable")
    evaluation, measured, _ = evaluate(wanted, device=trained.unet.device, warns=False)
    owner.check()
    samples = {
        (cell.sampler.name, cell.steps): from_uint8(evaluation.samples(cell))
        for cell in wanted.cells
    }
    _draw_samples(settings, samples)
    _draw_few(settings, samples)
    results = {
        "training": {
            "parameters": measured["network"]["parameters"],
            "steps": trained.steps,
            "batch_size": settings.batch_size,
            "weights": trained.weights,
            "seconds_of_this_session": round(trained.seconds, 1),
            "seed": settings.seed,
        },
        "table": [_cell(evaluation, cell, samples) for cell in wanted.cells],
        "reconstruction": _draw_ways(settings, evaluation),
        "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": measured["versions"],
    }
    write_json(settings.output / "results.json", results)
    write_bytes(settings.output / "results.md", render(results, measured).encode())
    return {**results, "short": short(measured)}


def _check(settings: DemoSettings) -> None:
    if settings.num_images < 2:
        raise ValueError(
            f"`num_images` is {settings.num_images}; a covariance needs at least 2 images."
        )
    longest = max(*settings.steps, settings.long_steps)
    if not 1 <= min(settings.steps) or longest > 1000:
        raise ValueError(f"`steps` is {settings.steps}; each S must lie in 1 .. 1000.")


def _training(settings: DemoSettings) -> TrainingConfig:
    return TrainingConfig(
        data="digits",
        model="mini",
        batch_size=settings.batch_size,
        max_train_steps=settings.train_steps,
        lr=3e-3,
        lr_schedule="cosine",
        lr_warmup_steps=min(100, settings.train_steps // 4),
        ema_decay=0.995,
        timestep_sampling="stratified",
        prediction_type="v_prediction",
        beta_schedule="squaredcos_cap_v2",
        checkpoint_every=500,
        resume="latest",  # a second call goes on where the first one was stopped
        seed=settings.seed,
        output_dir=str(settings.output / "training"),
    )


def _evaluation(settings: DemoSettings) -> dict[str, Any]:
    # eps_hat re-derived from the clipped x0_hat: eta = 1 is then DDPM's posterior
    block = {"use_clipped_model_output": True}
    grid = [
        {**block, "steps": list(settings.steps), "members": list(MEMBERS)},
        {**block, "steps": [settings.long_steps], "members": list(LONG_MEMBERS)},
    ]
    few = [{"name": name, **sampler} for name, sampler in FEW.items()]
    n = settings.num_images
    return {
        "pipeline": settings.output / "pipeline",
        "output_dir": settings.output / "evaluation",
        "data": {"data": "digits"},
        "features": ["pixels", "classifier"],
        "classifier_epochs": 20,
        "neighbours": min(5, n - 1),
        "batch_size": n,
        "keep_images": True,
        "tables": [
            {"name": "Digits", "n": n, "grid": grid},
            {
                "name": "Few steps",
                "n": n,
                "grid": [{"steps": list(settings.few_steps), "schedulers": few}],
            },
        ],
    }


def _cell(
    evaluation: Evaluation, cell: Cell, samples: dict[tuple[str, int], torch.Tensor]
) -> dict[str, Any]:
    """Return a line of the table: a cell's measurements, and how the classifier reads it."""
    kept = evaluation.files.read(cell)
    network: Any = evaluation.real.networks["classifier"]
    images = samples[cell.sampler.name, cell.steps].to(evaluation.device)
    with torch.no_grad():
        probability = network.head(network(images)).softmax(1)
    return {
        "member": cell.sampler.name,
        "steps": cell.steps,
        "network_calls": kept["network_calls"],
        "seconds": kept["seconds"],
        "frechet": kept["metrics"]["pixels"]["frechet"],
        "n": cell.n,
        "sure_share": float((probability.amax(1) >= SURE).double().mean()),
        "classes": len(probability.argmax(1).unique()),
    }


# -- pictures -------------------------------------------------------------------------------------


def _draw_samples(settings: DemoSettings, samples: dict[tuple[str, int], torch.Tensor]) -> None:
    """Draw the same seeds under DDPM with the most steps and under DDIM with few."""
    ddim, ddpm = "eta 0, trailing", "sigma-hat, trailing"
    shown = [(ddpm, settings.long_steps), *((ddim, s) for s in settings.steps[:3])]
    names = {ddim: "DDIM (eta 0)", ddpm: "DDPM (sigma-hat)"}
    panels = [
        (f"{names[row]}, {s} steps", tiled(samples[row, s][:SAMPLES_SHOWN], 8)) for row, s in shown
    ]
    save_figure(panels_figure(panels, 2, 3.2), settings.output / "samples.png")


def _draw_few(settings: DemoSettings, samples: dict[tuple[str, int], torch.Tensor]) -> None:
    """Draw the same seeds under the schedulers for few steps, a row for each S."""
    panels = [
        (f"{name}, {s} steps", tiled(samples[name, s][:FEW_SHOWN], 5))
        for s in settings.few_steps
        for name in FEW
    ]
    save_figure(panels_figure(panels, len(FEW), 2.4), settings.output / "few.png")


def _draw_ways(settings: DemoSettings, evaluation: Evaluation) -> dict[str, Any]:
    """Draw a sample as it forms, the way between latents, and digits encoded and decoded.

    Returns:
        The mean squared errors of the reconstruction on [0, 1], by S.
    """
    last, sibling = max(settings.steps), cast(Any, evaluation.pipe.sibling)
    saved = evaluation.pipe.scheduler.config
    common = {"timestep_spacing": "trailing", "eta": 0.0}
    ddim = GeneralizedDDIMScheduler.from_config(saved, **common)
    unclipped = GeneralizedDDIMScheduler.from_config(saved, **common, clip_sample=False)
    pipe = sibling(GenerationPipeline, scheduler=ddim)
    path = pipe(seeds=[0], num_inference_steps=last, return_path=True, output_type="latent").path
    picked = np.linspace(0, len(path.timesteps) - 1, SHOWN).round().astype(int)
    times = ", ".join(str(path.timesteps[i]) for i in picked)
    rows = [(f"x_t at t = {times}", path.x_t[picked, 0]), ("x0_hat", path.x0[picked, 0])]
    between = sibling(InterpolationPipeline, scheduler=ddim)(
        seeds=[0, 1], num_points=SHOWN, num_inference_steps=last, output_type="latent"
    ).images
    rows.append(("slerp on x_T from seed 0 to seed 1", between))
    pipe = sibling(InversionPipeline, scheduler=unclipped)
    originals = evaluation.real.held_out.batch(range(SHOWN))[0]
    rows.append(("held-out digits", originals))
    errors = {}
    for s in [s for s in RECONSTRUCTION_STEPS if s <= last]:
        out = pipe.reconstruct((originals + 1) / 2, num_inference_steps=s, output_type="latent")
        errors[str(s)] = float(out.error.mean())
        rows.append((f"encoded and decoded, S = {s}, error {errors[str(s)]:.1e}", out.images))
    save_figure(rows_figure([(title, x.cpu()) for title, x in rows]), settings.output / "ways.png")
    return {"n": SHOWN, "mse_on_0_1": errors}


# -- the page -------------------------------------------------------------------------------------


def render(results: dict[str, Any], measured: dict[str, Any]) -> str:
    """Return the results as a Markdown page.

    Args:
        results: of the demo.
        measured: of the evaluation.
    """
    training, cells = results["training"], results["table"]
    errors = results["reconstruction"]["mse_on_0_1"].items()
    lines = [
        "# Digits: one model, every member of the family",
        "",
        f"Data: scikit-learn load_digits, 8x8, 17 grey levels. Network: "
        f"{training['parameters']:,} parameters, {training['steps']} steps of "
        f"{training['batch_size']}, {training['weights'].upper()} weights, seed "
        f"{training['seed']}. The seeds are the same in every cell.",
        "",
        short(measured),
        f"Share of samples of which a classifier is sure (p >= {SURE}); it finds "
        f"{min(c['classes'] for c in cells)} to {max(c['classes'] for c in cells)} of the 10 "
        "digits, depending on the cell.",
        "",
        *_pivot(cells, "sure_share", ".2f"),
        "",
        "Seconds for a cell; the network calls are S.",
        "",
        *_pivot(cells, "seconds", ".1f"),
        "",
        f"Reconstruction of {results['reconstruction']['n']} held-out digits (encode, decode), "
        f"mean squared error on [0, 1]: {', '.join(f'S = {s}: {e:.1e}' for s, e in errors)}.",
        "",
        "![The same seeds under DDPM and DDIM](samples.png)",
        "",
        "![The same seeds in few steps, under schedulers of diffusers and ours](few.png)",
        "",
        "![A sample as it forms, a way between two, and digits encoded and decoded](ways.png)",
        "",
        "![Samples, and below each its nearest training image](evaluation/digits-nearest.png)",
        "",
        "More measurements and pictures: [evaluation/report.md](evaluation/report.md).",
    ]
    return "\n".join(lines) + "\n"


def _pivot(cells: list[dict[str, Any]], key: str, form: str) -> list[str]:
    # a cell that found all its samples has no time
    timed = [cell for cell in cells if cell[key] is not None]
    return pivot(timed, lambda cell: format(cell[key], form), row="member")
