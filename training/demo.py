"""The main job on the digits that scikit-learn embeds: train, sample, look, measure, save.

One small DDPM is trained, and every member of the family samples from it with the same seeds. The
result is a folder of pictures, a table and a pipeline that anyone loads with
`DiffusionPipeline.from_pretrained`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, UNet2DModel

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.pipelines import (
    GenerationPipeline,
    InterpolationPipeline,
    InversionPipeline,
    SamplingPath,
)
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.ownership import Owner, own
from ddim_schedulers.training.common.figures import panels_figure, rows_figure, save_figure, tiles
from ddim_schedulers.training.common.versions import versions
from ddim_schedulers.training.evaluation.tables import pivot

GREY_LEVELS = 17
SURE = 0.9
RECONSTRUCTION_STEPS = (10, 50, 100)


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
    """

    output: Path
    seed: int = 0
    num_images: int = 256
    train_steps: int = 1250
    batch_size: int = 64
    steps: tuple[int, ...] = (10, 20, 50, 100)
    long_steps: int = 1000


@dataclass(frozen=True)
class Member:
    """One row of the table: a member of the family and the noise it adds."""

    name: str
    eta: float
    reverse_variance: str = "sigma"

    def scheduler(self, config: dict[str, Any], clip: bool = True) -> GeneralizedDDIMScheduler:
        """Return the member on the trailing trajectory, with the process of `config`."""
        return GeneralizedDDIMScheduler.from_config(
            config,
            timestep_spacing="trailing",
            eta=self.eta,
            reverse_variance=self.reverse_variance,
            clip_sample=clip,
        )


MEMBERS = (
    Member("eta 0 (DDIM)", 0.0),
    Member("eta 0.2", 0.2),
    Member("eta 0.5", 0.5),
    Member("eta 1", 1.0),
    Member("sigma-hat", 1.0, "sigma_hat"),
)
LONG_MEMBERS = (MEMBERS[0], MEMBERS[-1])


def quick(output: Path, seed: int) -> DemoSettings:
    """Return settings that show every part of the demo in well under a minute, not its quality."""
    return DemoSettings(output, seed, 64, 300, 64, (10, 20), 50)


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Train, sample, draw and measure; see `DemoSettings`.

    Returns:
        What is written to `results.json`.

    Raises:
        ValueError: for settings out of range, before anything is trained.
        FolderInUseError: another process writes to `settings.output`.
    """
    _check(settings)
    with own(settings.output, "demo") as owner:
        return _run(settings, owner)


def _run(settings: DemoSettings, owner: Owner) -> dict[str, Any]:
    started = time.perf_counter()
    data = _Digits()
    unet, process, training = _train(settings)
    owner.check()
    pipe = DDPMPipeline(unet=unet, scheduler=process)
    notes = save_pipeline(pipe, settings.output / "pipeline", form="portable")
    judge = _Judge(data)
    cells, images = _fill_table(settings, unet, process, judge)
    owner.check()
    pictures = _draw(settings, unet, process, images, data)
    results = {
        "data": "scikit-learn load_digits, 8x8, 17 grey levels, "
        f"{len(data.train)} for training and {len(data.held_out)} held out",
        "training": training,
        "table": cells,
        "real": judge.real,
        "pictures": pictures,
        "reconstruction": _reconstruct(settings, unet, process, data),
        "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(
            "ddim-schedulers", "diffusers", "torch", "accelerate", "scikit-learn", "python"
        ),
    }
    text = json.dumps(results, indent=2) + "\n"
    owner.check()
    write_bytes(settings.output / "results.json", text.encode())
    write_bytes(settings.output / "results.md", render(results).encode())
    return results


def _check(settings: DemoSettings) -> None:
    if settings.num_images < 2:
        raise ValueError(
            f"`num_images` is {settings.num_images}; a covariance needs at least 2 images."
        )
    longest = max(*settings.steps, settings.long_steps)
    if not 1 <= min(settings.steps) or longest > 1000:
        raise ValueError(f"`steps` is {settings.steps}; each S must lie in 1 .. 1000.")


class _Digits:
    """Both parts of the digits as images (N, 1, 8, 8) in [-1, 1] and labels (N,)."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        from ddim_schedulers.training.data.images import digits

        labels = load_digits().target
        train, held_out = digits("train"), digits("held_out")
        self.train, self.train_labels = train.all(), labels[train.ids]
        self.held_out, self.held_out_labels = held_out.all(), labels[held_out.ids]


def _train(
    settings: DemoSettings,
) -> tuple[UNet2DModel, MarkovianDDPMScheduler, dict[str, Any]]:
    from ddim_schedulers.training.config import TrainingConfig
    from ddim_schedulers.training.train import train

    config = TrainingConfig(
        data="digits",
        model="mini",
        batch_size=settings.batch_size,
        max_train_steps=settings.train_steps,
        lr=3e-3,
        lr_schedule="cosine",
        lr_warmup_steps=min(100, settings.train_steps // 4),
        ema_decay=0.995,
        timestep_sampling="stratified",
        checkpoint_every=500,
        resume="latest",  # a second call goes on where the first one was stopped
        seed=settings.seed,
        output_dir=str(settings.output / "training"),
    )
    result = train(config)
    if result.stopped_by is not None:
        raise KeyboardInterrupt(result.stopped_by)
    parameters = sum(p.numel() for p in result.unet.parameters())
    return (
        result.unet,
        result.scheduler,
        {
            "parameters": parameters,
            "steps": result.steps,
            "batch_size": settings.batch_size,
            "weights": result.weights,
            "seconds_of_this_session": round(result.seconds, 1),
            "seed": settings.seed,
        },
    )


class _Judge:
    """Measures samples: Frechet distance to the held-out digits in pixels, and a classifier."""

    def __init__(self, data: _Digits) -> None:
        from sklearn.linear_model import LogisticRegression
        from torchmetrics.image.fid import FrechetInceptionDistance

        from ddim_schedulers.training.metrics.features import make_feature_space

        # despite its name it takes any features, and accumulates their moments in float64
        self._distance = FrechetInceptionDistance(
            feature=make_feature_space("pixels", (1, 8, 8)), reset_real_features=False
        )
        self._distance.update(to_grey_levels(data.held_out), real=True)
        self._classifier = LogisticRegression(max_iter=2000)
        self._classifier.fit(_flat(data.train), data.train_labels)
        accuracy = self._classifier.score(_flat(data.held_out), data.held_out_labels)
        self.real = {
            "held_out_accuracy": round(float(accuracy), 4),
            "n_held_out": len(data.held_out),
            **self(data.held_out),
            "frechet": None,
        }
        self._train = data.train

    def __call__(self, images: torch.Tensor) -> dict[str, Any]:
        """Measure images (N, 1, 8, 8) in [-1, 1], rounded to the grey levels of the data."""
        rounded = to_grey_levels(images)
        self._distance.update(rounded, real=False)
        frechet = float(self._distance.compute())
        self._distance.reset()
        probability = self._classifier.predict_proba(_flat(rounded))
        return {
            "frechet": round(frechet, 3),
            "n": len(images),
            "sure_share": round(float((probability.max(axis=1) >= SURE).mean()), 4),
            "classes": len(np.unique(probability.argmax(axis=1))),
        }

    def training_images(self, n: int, seed: int) -> dict[str, Any]:
        """Measure n training images instead of samples: what a perfect sampler would get."""
        picked = np.random.default_rng(seed).permutation(len(self._train))[:n]
        return self(self._train[torch.from_numpy(picked)])


def to_grey_levels(images: torch.Tensor) -> torch.Tensor:
    """Round images in [-1, 1] to the 17 grey levels of the digits, so that both sides have them."""
    return (((images.clamp(-1, 1) + 1) * 8).round() / 8 - 1).float()


def _flat(images: torch.Tensor) -> np.ndarray:
    return images.flatten(1).double().numpy()


def _fill_table(
    settings: DemoSettings, unet: UNet2DModel, process: MarkovianDDPMScheduler, judge: _Judge
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], torch.Tensor]]:
    """Sample every cell from the same seeds; return the cells and the images (N, 1, 8, 8)."""
    from tqdm import tqdm

    wanted = [(member, s) for s in settings.steps for member in MEMBERS]
    wanted += [(member, settings.long_steps) for member in LONG_MEMBERS]
    cells, images = [], {}
    with tqdm(total=sum(s for _, s in wanted), desc="sample", unit="step") as bar:
        for member, s in wanted:
            bar.set_postfix_str(f"{member.name}, S = {s}")
            pipe = _quiet(GenerationPipeline(unet, member.scheduler(process.config)))
            began = time.perf_counter()
            latents = pipe(
                seeds=range(settings.num_images),
                num_inference_steps=s,
                # eps_hat re-derived from the clipped x0_hat: eta = 1 is then DDPM's posterior
                use_clipped_model_output=True,
                batch_size=settings.num_images,
                callback_on_step_end=lambda *_: (bar.update(), {})[1],
                output_type="latent",
            ).images
            seconds = time.perf_counter() - began
            images[member.name, s] = latents
            cells.append(
                {
                    "member": member.name,
                    "steps": s,
                    "network_calls": s,
                    "seconds": round(seconds, 2),
                    **judge(latents),
                }
            )
    judge.real["training_images"] = judge.training_images(settings.num_images, settings.seed)
    return cells, images


def _quiet(pipe: Any) -> Any:
    # so small a network is clipped now and then; the tables say how good its samples are
    pipe._warns_of_clipping = False
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(
    settings: DemoSettings,
    unet: UNet2DModel,
    process: MarkovianDDPMScheduler,
    images: dict[tuple[str, int], torch.Tensor],
    data: _Digits,
) -> list[str]:
    """Write the pictures; return their names."""
    ddim = MEMBERS[0].scheduler(process.config)
    last = max(settings.steps)
    path = _quiet(GenerationPipeline(unet, ddim))(
        seeds=range(5), num_inference_steps=last, return_path=True, output_type="latent"
    ).path
    chain = _quiet(InterpolationPipeline(unet, ddim))(
        seeds=[0, 1, 2, 3], num_points=6, num_inference_steps=last, output_type="latent"
    ).images
    pictures = {
        "samples.png": _samples_figure(settings, images),
        "path.png": _path_figure(path),
        "interpolation.png": rows_figure([("slerp on x_T through seeds 0, 1, 2, 3", chain)]),
        "nearest.png": _nearest_figure(images[MEMBERS[0].name, last], data.train),
    }
    for name, figure in pictures.items():
        save_figure(figure, settings.output / name)
    return list(pictures)


def _reconstruct(
    settings: DemoSettings,
    unet: UNet2DModel,
    process: MarkovianDDPMScheduler,
    data: _Digits,
) -> dict[str, Any]:
    """Encode and decode held-out digits at several S; draw them and return the errors."""
    pipe = _quiet(InversionPipeline(unet, MEMBERS[0].scheduler(process.config, clip=False)))
    originals = data.held_out[:16]
    rows, errors = [("held-out digits", originals)], {}
    for s in [s for s in RECONSTRUCTION_STEPS if s <= max(settings.steps)]:
        out = pipe.reconstruct((originals + 1) / 2, num_inference_steps=s, output_type="latent")
        errors[str(s)] = float(out.error.mean())
        rows.append((f"S = {s}, error {errors[str(s)]:.1e}", out.images))
    save_figure(rows_figure(rows), settings.output / "reconstruction.png")
    return {"n": len(originals), "mse_on_0_1": errors}


# -- pictures -------------------------------------------------------------------------------------


def _samples_figure(settings: DemoSettings, images: dict[tuple[str, int], torch.Tensor]) -> Any:
    """Return the same seeds under DDPM with the most steps and under DDIM with few."""
    long = (MEMBERS[-1].name, settings.long_steps)
    shown = [(f"DDPM (sigma-hat), {settings.long_steps} steps", images[long])]
    shown += [(f"DDIM (eta 0), {s} steps", images[MEMBERS[0].name, s]) for s in settings.steps[:3]]
    return panels_figure([(title, tiles(array[:64], 8)) for title, array in shown], 2, 3.2)


def _path_figure(path: SamplingPath, frames: int = 12) -> Any:
    """Plot x_t and x0_hat of a few samples, from noise to digit."""
    picked = np.linspace(0, len(path.timesteps) - 1, frames).round().astype(int)
    titles = ", ".join(str(path.timesteps[i]) for i in picked)
    panels = []
    for name, states in (("x_t", path.x_t[:-1]), ("x0_hat", path.x0)):
        chosen = states[picked].transpose(0, 1).flatten(0, 1)
        panels.append((f"{name} at t = {titles}", tiles(chosen, frames)))
    return panels_figure(panels, 1, 7.0)


def _nearest_figure(samples: torch.Tensor, training: torch.Tensor, n: int = 16) -> Any:
    distance = torch.cdist(samples[:n].flatten(1).double(), training.flatten(1).double())
    nearest = training[distance.argmin(dim=1)]
    return rows_figure([("samples", samples[:n]), ("nearest training images", nearest)])


# -- the table ------------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> str:
    """Return `results` as a Markdown page."""
    training, real = results["training"], results["real"]
    cells = results["table"]
    counts = sorted({cell["n"] for cell in cells})
    perfect = real["training_images"]
    lines = [
        "# Digits: one model, every member of the family",
        "",
        f"Data: {results['data']}. Network: {training['parameters']:,} parameters, "
        f"{training['steps']} steps of {training['batch_size']}, "
        f"{training['weights'].upper()} weights, seed {training['seed']}.",
        "",
        f"Frechet distance in pixel space against the {real['n_held_out']} held-out digits "
        f"(lower is better), n = {', '.join(map(str, counts))} samples in every cell, "
        f"the same seeds in every cell, trailing trajectory; {perfect['n']} training images get "
        f"{perfect['frechet']}.",
        "",
        *_pivot(cells, "frechet", ".2f"),
        "",
        f"Share of samples of which a logistic regression on pixels is sure (p >= {SURE}); on real "
        f"held-out digits its accuracy is {real['held_out_accuracy']:.3f} and it is sure of "
        f"{real['sure_share']:.2f}.",
        "",
        *_pivot(cells, "sure_share", ".2f"),
        "",
        "Seconds for a cell; the network calls are S.",
        "",
        *_pivot(cells, "seconds", ".1f"),
        "",
        f"Digits found among the samples: {min(cell['classes'] for cell in cells)} to "
        f"{max(cell['classes'] for cell in cells)} of 10, depending on the cell.",
        "",
        f"Reconstruction of {results['reconstruction']['n']} held-out digits (encode, decode), "
        "mean squared error on [0, 1]: "
        + ", ".join(f"S = {s}: {e:.1e}" for s, e in results["reconstruction"]["mse_on_0_1"].items())
        + ".",
        "",
        *(f"![{name}]({name})" for name in [*results["pictures"], "reconstruction.png"]),
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _pivot(cells: list[dict[str, Any]], key: str, form: str) -> list[str]:
    return pivot(cells, lambda cell: format(cell[key], form), row="member")
