"""Which sampler for 5, 7, 10, 15, 20 and 50 network calls: ours beside those of diffusers.

    python tests/proofs/solver_presets.py --pipeline PIPELINE --data IMAGES.npz --output FOLDER

`IMAGES.npz` holds uint8 `images` (N, H, W), which are padded with black to the size of the network,
and `labels` (N,). Two measurements, of `n` samples for each seed:

- the end-point error of deterministic rows: mean squared error of the clamped x_0 against the fine
  ODE (100 steps of order 3 with corrector, no clipping) from the same noises;
- the Frechet distance to all of `IMAGES.npz`, in 8x8 pixels, in the features of a classifier
  (`--classifier`: a file of `ddim-schedulers evaluate`; it is trained and written if missing) and
  in `--features`, any other feature spaces of `evaluate`.

Beside them stand what tells contrast and narrowing from better pictures: the share of pixels that
were clamped, and the mean and the deviation of the pixels. `--row NAME=FILE.json` adds a
scheduler's config, such as one with a calibrated table; a row that has no plan for a number of
calls is left out. Every cell is kept in `presets.json`; a second call goes on. Several processes
can share the seeds (`--first_seed`) in folders of their own, whose cells `--cells FILE.json ...`
reads. `presets.md` has the tables, with standard errors over the seeds.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMPipeline

import ddim_schedulers
from ddim_schedulers import FEW_STEPS, GeneralizedDDIMScheduler
from ddim_schedulers.training.evaluation.references import as_uint8_sees
from ddim_schedulers.training.metrics import features as spaces
from ddim_schedulers.training.metrics.distances import frechet_metric

CALLS = (5, 7, 10, 15, 20, 50)
FINE_STEPS = 100
# Where two sigmas lie at one timestep, a scheduler of diffusers loses count of its steps.
STOCK_FAILS = (IndexError, AssertionError)
OURS = "GeneralizedDDIMScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SA, DEIS = "SASolverScheduler", "DEISMultistepScheduler"
LINSPACE = {"timestep_spacing": "linspace"}
SDE = {**LINSPACE, "algorithm_type": "sde-dpmsolver++"}
LOG_RHO = {**FEW_STEPS, "solver_variable": "log_rho"}
IPNDM = {"timestep_spacing": "trailing", "solver_form": "epsilon", "solver_variable": "step"}
MIDDLE = {"eta_interval": [0.2, 0.8]}

# Name: (class, settings, whether it adds noise). Settings whose name begins with "_" are the row's.
ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "stock DPM-Solver++(2M)": (DPM, LINSPACE, False),
    "stock DPM-Solver++(2M), trailing": (DPM, {"timestep_spacing": "trailing"}, False),
    "stock DPM-Solver++(2M), Karras": (DPM, {**LINSPACE, "use_karras_sigmas": True}, False),
    "stock DPM-Solver++(2M), exponential": (
        DPM,
        {**LINSPACE, "use_exponential_sigmas": True},
        False,
    ),
    "stock DPM-Solver++(2M), beta": (DPM, {**LINSPACE, "use_beta_sigmas": True}, False),
    "stock DPM-Solver++(2M), Lu": (DPM, {**LINSPACE, "use_lu_lambdas": True}, False),
    "stock DPM-Solver++(3M)": (DPM, {**LINSPACE, "solver_order": 3}, False),
    "stock DPM-Solver++(3M), Karras": (
        DPM,
        {**LINSPACE, "solver_order": 3, "use_karras_sigmas": True},
        False,
    ),
    "stock UniPC-2": (UNIPC, LINSPACE, False),
    "stock UniPC-3": (UNIPC, {**LINSPACE, "solver_order": 3}, False),
    "stock UniPC-2, Karras": (UNIPC, {**LINSPACE, "use_karras_sigmas": True}, False),
    "stock DEIS-2": (DEIS, LINSPACE, False),
    "stock DEIS-3": (DEIS, {**LINSPACE, "solver_order": 3}, False),
    "stock SA-Solver, tau 0": (SA, {**LINSPACE, "_tau": 0}, False),
    "stock SA-Solver": (SA, LINSPACE, True),
    "stock SDE-DPM-Solver++(2M)": (DPM, SDE, True),
    "stock SDE-DPM-Solver++(2M), Karras": (DPM, {**SDE, "use_karras_sigmas": True}, True),
    "stock Heun": ("HeunDiscreteScheduler", {**LINSPACE, "_calls": "2 n - 1"}, False),
    "stock PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "_calls": "n + 1"}, False),
    "stock DDIM": ("DDIMScheduler", {"timestep_spacing": "trailing"}, False),
    "order 1": (OURS, {"timestep_spacing": "trailing"}, False),
    "FEW_STEPS": (OURS, FEW_STEPS, False),
    "order 3": (OURS, {**FEW_STEPS, "solver_order": 3}, False),
    "order 4": (OURS, {**FEW_STEPS, "solver_order": 4}, False),
    "order 2, no corrector": (OURS, {**FEW_STEPS, "solver_corrector": False}, False),
    "order 2, corrector of 2": (OURS, {**FEW_STEPS, "solver_corrector_order": 2}, False),
    "log rho": (OURS, LOG_RHO, False),
    "log rho, bh1": (OURS, {**LOG_RHO, "solver_weights": "bh1"}, False),
    "log rho, bh1, corrector of 2": (
        OURS,
        {**LOG_RHO, "solver_weights": "bh1", "solver_corrector_order": 2},
        False,
    ),
    "log rho, bh2": (OURS, {**LOG_RHO, "solver_weights": "bh2"}, False),
    "log rho, order 3": (OURS, {**LOG_RHO, "solver_order": 3}, False),
    "epsilon, log rho, order 3": (
        OURS,
        {**LOG_RHO, "solver_order": 3, "solver_form": "epsilon", "solver_corrector": False},
        False,
    ),
    "iPNDM, order 3": (OURS, {**IPNDM, "solver_order": 3}, False),
    "iPNDM, order 4": (OURS, {**IPNDM, "solver_order": 4}, False),
    "FEW_STEPS, eps / 1.005": (OURS, {**FEW_STEPS, "eps_scale": 1.005}, False),
    "FEW_STEPS, eps / 1.01": (OURS, {**FEW_STEPS, "eps_scale": 1.01}, False),
    "FEW_STEPS, x_0 1.02": (OURS, {**FEW_STEPS, "end_scale": 1.02}, False),
    "order 1, eta 1": (OURS, {"timestep_spacing": "trailing", "eta": 1.0}, True),
    "FEW_STEPS, eta 1": (OURS, {**FEW_STEPS, "eta": 1.0}, True),
    "FEW_STEPS, eta 1 in the middle": (OURS, {**FEW_STEPS, "eta": 1.0, **MIDDLE}, True),
    "FEW_STEPS, eta 0.6": (OURS, {**FEW_STEPS, "eta": 0.6}, True),
    "FEW_STEPS, eta 0.6 in the middle": (OURS, {**FEW_STEPS, "eta": 0.6, **MIDDLE}, True),
    "log rho, bh1, corrector of 2, eta 1 in the middle": (
        OURS,
        {**LOG_RHO, "solver_weights": "bh1", "solver_corrector_order": 2, "eta": 1.0, **MIDDLE},
        True,
    ),
}


class Given(torch.nn.Module):
    """What takes features for features, with their number."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features."""
        return features


class Distance:
    """The Frechet distance to the real images in one feature space."""

    def __init__(self, network: torch.nn.Module, real: torch.Tensor, device: str) -> None:
        self.network = network.to(device)
        found = spaces.extract(self.network, real, 2000)
        self.centre = found.double().mean(0)
        self.metric = frechet_metric(Given(found.shape[1])).set_dtype(torch.float64)
        self.metric.update(found.double() - self.centre, real=True)

    def to(self, images: torch.Tensor) -> float:
        """Return the distance of images (n, C, H, W), as uint8 sees them."""
        self.metric.reset()
        found = spaces.extract(self.network, images, 2000).double() - self.centre
        self.metric.update(found, real=False)
        return float(self.metric.compute())


class Model:
    """The network, as the samplers call it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        pipeline = DDPMPipeline.from_pretrained(arguments.pipeline)
        self.config, self.device = pipeline.scheduler.config, arguments.device
        unet = pipeline.unet.eval().to(arguments.device, memory_format=torch.channels_last)
        self.unet = torch.compile(unet) if arguments.compile else unet
        self.bf16, self.batch = arguments.bf16, arguments.batch_size
        size, channels = unet.config.sample_size, unet.config.in_channels
        self.shape = (channels, *((size, size) if isinstance(size, int) else size))
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        self.calls += 1
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            parts = [self.unet(part, t).sample.float() for part in x.split(self.batch)]
        return torch.cat(parts)

    def noises(self, seed: int, n: int) -> torch.Tensor:
        """Return x_T on the device, drawn on the CPU."""
        drawn = torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, memory_format=torch.channels_last)

    def fine(self, x: torch.Tensor) -> torch.Tensor:
        """Return the end points of the fine ODE, clamped."""
        settings = {"clip_sample": False, "solver_order": 3, "solver_corrector": True}
        scheduler = GeneralizedDDIMScheduler.from_config(self.config, **settings)
        big_t = len(scheduler)
        grid = [round(big_t - 1 - i * big_t / FINE_STEPS) for i in range(FINE_STEPS)]
        scheduler.set_timesteps(timesteps=grid, device=self.device)
        return self.run(scheduler, x, None)[0].clamp(-1, 1)

    def run(
        self, scheduler: Any, x: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, int]:
        """Return x_0 and the number of network calls."""
        x, before = x * scheduler.init_noise_sigma, self.calls
        keywords = {} if generator is None else {"generator": generator}
        for t in scheduler.timesteps:
            x = scheduler.step(
                self(scheduler.scale_model_input(x, t), t), t, x, **keywords
            ).prev_sample
        return x, self.calls - before


def plan(scheduler: Any, settings: dict[str, Any], calls: int, device: str) -> bool:
    """Plan for a number of network calls; False where the scheduler has no such plan."""
    rule = settings.get("_calls")
    if rule == "2 n - 1" and calls % 2 == 0:
        return False
    steps = {"2 n - 1": (calls + 1) // 2, "n + 1": calls - 1, None: calls}[rule]
    fixed = scheduler.config.get("timesteps")
    if fixed is not None and len(fixed) != calls:
        return False
    tables = (scheduler.config.get("calibration") or {}).get("solver")
    if scheduler.config.get("solver_calibrated") and str(calls) not in (tables or {}):
        return False
    scheduler.set_timesteps(steps, device=device)
    return True


def build(model: Model, name: str, extra: dict[str, Path]) -> tuple[Any, dict[str, Any], bool]:
    """Return the scheduler of a row, its settings and whether it adds noise."""
    if name in extra:
        config = json.loads(extra[name].read_text(encoding="utf-8"))
        scheduler = getattr(ddim_schedulers, config.get("_class_name", OURS)).from_config(config)
        tables = (scheduler.config.get("calibration") or {}).get("solver") or {}
        etas = [scheduler.config.get("eta"), *(table["eta"] for table in tables.values())]
        return scheduler, {}, any(etas) or bool(scheduler.config.get("sigma"))
    kind, settings, noisy = ROWS[name]
    given = {k: v for k, v in settings.items() if not k.startswith("_")}
    if "_tau" in settings:
        given["tau_func"] = lambda t: settings["_tau"]
    source = ddim_schedulers if kind == OURS else diffusers
    return getattr(source, kind).from_config(model.config, **given), settings, noisy


def real_images(path: Path, shape: tuple[int, int, int]) -> tuple[torch.Tensor, np.ndarray]:
    """Return the images (N, 1, H, W) in [-1, 1] and their labels."""
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["images"]), file["labels"].astype(np.int64)
    high, wide = (side - given for side, given in zip(shape[1:], images.shape[1:3], strict=True))
    padding = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    padded = torch.nn.functional.pad(images, padding)
    return padded[:, None].float() / 127.5 - 1, labels


def classifier(path: Path, images: torch.Tensor, labels: np.ndarray) -> torch.nn.Module:
    """Return the classifier in a file, trained first if there is none."""
    if not path.is_file():
        shape = (images.shape[1], images.shape[2], images.shape[3])
        with torch.inference_mode(False), torch.enable_grad():
            network, facts = spaces.train_classifier(
                lambda rows: images[torch.from_numpy(rows)].clone(), labels, shape, progress=say
            )
        say(f"classifier: {facts['accuracy']:.3f} right of {facts['held_out_n']}")
        spaces.save_classifier(network, facts, path)
    return spaces.load_classifier(path)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def measure(
    model: Model, arguments: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Fill in the cells that are missing, the rows of one number of calls after the other."""
    images, labels = real_images(arguments.data, model.shape)
    distances = {
        "pixels": Distance(spaces.make_feature_space("pixels", model.shape), images, model.device),
        "classifier": Distance(
            classifier(arguments.classifier, images, labels), images, model.device
        ),
    }
    for name in arguments.features:
        distances[name] = Distance(
            spaces.make_feature_space(name, model.shape), images, model.device
        )
    held = real_images(arguments.held_out, model.shape)[0] if arguments.held_out else None
    if held is not None:
        part = held[: arguments.n]
        results["held_out"] = {name: space.to(part) for name, space in distances.items()}
    extra = dict(arguments.row)
    names = arguments.rows or [*ROWS, *extra]
    start, cells = time.perf_counter(), results["cells"]
    fine: dict[int, torch.Tensor] = {}
    for calls in arguments.calls:
        for name in names:
            seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
            keys = {seed: f"{name}|{calls}|{seed}" for seed in seeds}
            if all(key in cells for key in keys.values()):
                continue
            if time.perf_counter() - start > arguments.seconds:
                return say("out of time; the same command goes on")
            scheduler, settings, noisy = build(model, name, extra)
            for seed, key in keys.items():
                if key in cells:
                    continue
                if not plan(scheduler, settings, calls, model.device):
                    break
                begun = time.perf_counter()
                x = model.noises(seed, arguments.n)
                drawn = torch.Generator(model.device).manual_seed(10_000 + seed)
                try:
                    x_0, made = model.run(scheduler, x, drawn if noisy else None)
                except STOCK_FAILS as error:
                    say(f"{calls:>3} {name}: left out, {error!r}")
                    break
                clamped = x_0.clamp(-1, 1)
                cell = {
                    "calls": made,
                    "noisy": noisy,
                    "clamped": float((x_0.abs() > 1).float().mean()),
                    "mean": float(clamped.mean()),
                    "deviation": float(clamped.std()),
                }
                if not noisy:
                    if seed not in fine:
                        fine[seed] = model.fine(x)
                    cell["mse"] = float((clamped - fine[seed]).square().mean())
                finite = bool(torch.isfinite(x_0).all())
                shown = as_uint8_sees(clamped.nan_to_num(0).cpu())
                for space, distance in distances.items():
                    cell[space] = distance.to(shown) if finite else math.nan
                cell["seconds"] = round(time.perf_counter() - begun, 2)
                cells[key] = cell
            keep()
            if keys[seeds[0]] in cells:
                say(f"{calls:>3} {name}: {summary(cells, name, calls, 'classifier')}")


def values_of(cells: dict[str, Any], name: str, calls: int, what: str) -> list[float]:
    """Return a measurement of each seed."""
    prefix = f"{name}|{calls}|"
    return [c[what] for key, c in cells.items() if key.startswith(prefix) and what in c]


def summary(cells: dict[str, Any], name: str, calls: int, what: str) -> str:
    """Return the mean and its standard error."""
    values = np.array(values_of(cells, name, calls, what))
    if not len(values):
        return ""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():.3g} +- {error:.2g}"


def tables(results: dict[str, Any]) -> str:
    """Return the tables, one for each number of calls, the best first."""
    cells = results["cells"]
    spaces_of = [k for k in next(iter(cells.values())) if k not in PLAIN] if cells else []
    columns = ["mse", *spaces_of, "clamped", "mean", "deviation"]
    told = {k: v for k, v in results["settings"].items() if k != "command"}
    lines = [f"Settings: {json.dumps(told)}", ""]
    if "held_out" in results:
        lines += [f"Held-out real images: {json.dumps(results['held_out'])}", ""]
    by_calls = sorted({int(key.split("|")[1]) for key in cells})
    for calls in by_calls:
        names = list(dict.fromkeys(k.split("|")[0] for k in cells if k.split("|")[1] == str(calls)))
        names.sort(key=lambda n, c=calls: float(np.mean(values_of(cells, n, c, "classifier"))))
        heading = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"## {calls} calls", "", *heading]
        for name in names:
            row = [summary(cells, name, calls, column) for column in columns]
            made = {c["calls"] for k, c in cells.items() if k.startswith(f"{name}|{calls}|")}
            label = name if made == {calls} else f"{name} ({sorted(made)} calls)"
            lines.append(f"| {label} | {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


PLAIN = ("calls", "noisy", "clamped", "mean", "deviation", "mse", "seconds")


def row(text: str) -> tuple[str, Path]:
    """Return NAME and FILE of `NAME=FILE`."""
    name, _, path = text.partition("=")
    if not name or not path or "|" in name:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be NAME=FILE.json, NAME without '|'")
    return name, Path(path)


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, help="real images that nobody trained on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, help="OUTPUT/classifier.safetensors")
    parser.add_argument("--features", nargs="*", default=[], help="more feature spaces")
    parser.add_argument("--rows", nargs="*", help="names of rows; all if not given")
    parser.add_argument("--row", type=row, nargs="*", default=[], help="NAME=FILE.json")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--cells", type=Path, nargs="*", default=[], help="presets.json of others")
    parser.add_argument("--batch_size", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; x in float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.classifier = arguments.classifier or arguments.output / "classifier.safetensors"
    unknown = set(arguments.rows or []) - {*ROWS, *dict(arguments.row)}
    if unknown:
        parser.error(f"--rows: {sorted(unknown)}; it must be of {[*ROWS]}")
    torch.backends.cudnn.benchmark = True
    target = arguments.output / "presets.json"
    settings = {"n": arguments.n, "bf16": arguments.bf16, "pipeline": Path(arguments.pipeline).name}
    results = {"settings": settings, "cells": {}}
    if target.is_file():
        results = json.loads(target.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            parser.error(f"{target} was made with {results['settings']}, not with {settings}")

    for path in arguments.cells:
        other = json.loads(path.read_text(encoding="utf-8"))
        if other["settings"] != settings:
            parser.error(f"{path} was made with {other['settings']}, not with {settings}")
        results["cells"] |= other["cells"]

    def keep() -> None:
        target.write_text(json.dumps(results, indent=1), encoding="utf-8")

    with torch.inference_mode():
        measure(Model(arguments), arguments, results, keep)
    keep()
    (arguments.output / "presets.md").write_text(tables(results), encoding="utf-8")


if __name__ == "__main__":
    main()
