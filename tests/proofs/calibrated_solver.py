"""Fitted tables beside the formulas and diffusers' solvers: nearness to the fine ODE, on new noise.

    python tests/proofs/calibrated_solver.py --pipeline PIPELINE --output FOLDER

Tables are fitted as `ddim-schedulers calibrate --objective solver` does, for each of `--sizes`
samples (the largest for all of `--calls`, the others for `--swept`). Then the mean squared error of
clamped end points against the fine ODE (100 steps of order 3 with corrector, no clipping) is
measured from other noises, `--n` for each of `--seeds`: of the tables, of FEW_STEPS, of stock rows
of `solver_presets.py`, of a table with clipping turned round, and of tables with fewer decimals.

Everything is kept in FOLDER, so that a second call goes on, with more `--calls` or `--sizes` too.
`--fit_only` ends after the fits, so that several processes can make them in folders of their own;
`--tables FILE.json ...` reads the tables of such folders' `solver.json`. `solver.json` has the
numbers, `solver.md` the tables, `calibrated.json` the scheduler's config with the tables (a row of
`solver_presets.py`: `--row calibrated=FOLDER/calibrated.json`).
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from solver_presets import ROWS, STOCK_FAILS, Model, build, plan, say, values_of

from ddim_schedulers import CALIBRATED, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.sampling import speed_up
from ddim_schedulers.training.calibration.solver_fit import Constants
from ddim_schedulers.training.calibration.solver_job import SolverJob
from ddim_schedulers.training.calibration.solver_run import calibrate_solver
from ddim_schedulers.training.likelihood.measured_model import load_measured_model

STOCK = [name for name, (_, _, noisy) in ROWS.items() if name.startswith("stock") and not noisy]
DECIMALS = (2, 3, 4, 5)


def fit(arguments: argparse.Namespace, results: dict[str, Any], size: int) -> None:
    """Fit tables to so many samples, those that are not there yet."""
    key, largest = str(size), size == max(arguments.sizes)
    tables = results["tables"].setdefault(key, {})
    wanted = arguments.calls if largest else arguments.swept
    if not (missing := tuple(calls for calls in wanted if str(calls) not in tables)):
        return
    model = load_measured_model(arguments.pipeline, arguments.device)
    dtype = torch.bfloat16 if arguments.bf16 else None
    speed_up(model.unet, compile=arguments.compile, channels_last=True, dtype=dtype)
    job = SolverJob(
        calls=missing,
        num_samples=size,
        held_out=arguments.held_out,
        batch_size=arguments.batch_size,
        constants=Constants(
            iterations=arguments.iterations,
            least_gain=arguments.least_gain,
            power=arguments.power,
        ),
    )
    start = time.perf_counter()
    outcomes, cost = calibrate_solver(
        model,
        job,
        work_dir=arguments.output / f"work-{size}",
        progress=lambda line: say(f"{time.perf_counter() - start:7.1f} s  {line}"),
    )
    for each in outcomes:
        say(f"n = {size}, {each.calls} calls: {each.analytic:.5f} -> {each.held_out:.5f}")
        tables[str(each.calls)] = each.entry
    results["cost"][f"{key}: {' '.join(map(str, missing))}"] = cost


def rows_of(results: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Return the tables of each row of ours, as `calibration["solver"]` has them."""
    best = results["tables"][str(max(sizes))]
    rows = {f"table, n = {size}": results["tables"][str(size)] for size in sorted(sizes)}
    turned = copy.deepcopy(best)
    for entry in turned.values():
        entry["clip"] = entry["clips"] if entry["clip"] is None else None
    rows["table, clipping turned round"] = turned
    for decimals in DECIMALS:
        short = copy.deepcopy(best)
        for entry in short.values():
            entry["weights"] = [[round(w, decimals) for w in row] for row in entry["weights"]]
        rows[f"table, {decimals} decimals"] = short
    return rows


def measure(
    model: Model,
    arguments: argparse.Namespace,
    results: dict[str, Any],
    keep: Callable[[], object],
) -> None:
    """Fill in the cells that are missing."""
    ours = rows_of(results, arguments.sizes)
    for seed in range(arguments.seeds):
        x = model.noises(1000 + seed, arguments.n)
        goal = None
        for name in (*STOCK, "FEW_STEPS", *ours):
            for calls in arguments.calls:
                key = f"{name}|{calls}|{seed}"
                if key in results["cells"] or (name in ours and str(calls) not in ours[name]):
                    continue
                if name in ours:
                    settings: dict[str, Any] = {}
                    scheduler = GeneralizedDDIMScheduler.from_config(
                        model.config, **{**CALIBRATED, "calibration": {"solver": ours[name]}}
                    )
                else:
                    scheduler, settings, _ = build(model, name, {})
                if not plan(scheduler, settings, calls, model.device):
                    continue
                if goal is None:
                    goal = model.fine(x)
                try:
                    end = model.run(scheduler, x, None)[0].clamp(-1, 1)
                except STOCK_FAILS as error:
                    say(f"{calls:>3} {name}: left out, {error!r}")
                    continue
                results["cells"][key] = {"mse": float((end - goal).square().mean())}
        keep()
        say(f"seed {seed}")


def mean_of(cells: dict[str, Any], name: str, calls: int) -> tuple[float, float]:
    """Return the mean over the seeds, and its standard error."""
    values = torch.tensor(values_of(cells, name, calls, "mse"), dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()) if len(values) else math.nan, error


def report(results: dict[str, Any]) -> str:
    """Return the tables: mean and standard error, and the share of the best stock row."""
    cells = results["cells"]
    names = list(dict.fromkeys(key.split("|")[0] for key in cells))
    columns = sorted({int(key.split("|")[1]) for key in cells})
    lines = [f"Settings: {json.dumps(results['settings'])}", f"Cost: {json.dumps(results['cost'])}"]
    lines += ["", f"| | {' | '.join(f'{calls} calls' for calls in columns)} |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    stock = [name for name in names if name.startswith("stock")]
    best = {calls: min(mean_of(cells, name, calls)[0] for name in stock) for calls in columns}
    for name in names:
        shown = []
        for calls in columns:
            mean, error = mean_of(cells, name, calls)
            share = f"{mean:.3g} +- {error:.1g}, x {mean / best[calls]:.2f}"
            shown.append("" if math.isnan(mean) else share)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    largest = max(results["tables"], key=int)
    for calls, entry in results["tables"][largest].items():
        size = len(json.dumps(entry))
        lines.append(f"\n{calls} calls: {entry['timesteps']}, clip {entry['clip']}, {size} bytes")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 7, 10, 15, 20])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128], help="samples fitted to")
    parser.add_argument("--swept", type=int, nargs="+", default=[5, 10], help="--calls of the rest")
    parser.add_argument("--held_out", type=int, default=64, help="samples of the fit's own test")
    parser.add_argument("--iterations", type=int, default=Constants().iterations)
    parser.add_argument("--least_gain", type=float, default=Constants().least_gain)
    parser.add_argument("--power", type=float, default=Constants().power)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="the network in bfloat16; x in float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fit_only", action="store_true")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="solver.json of others")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = ("n", "bf16", "iterations", "power", "held_out")
    settings = {name: getattr(arguments, name) for name in names}
    results: dict[str, Any] = {"settings": settings, "tables": {}, "cost": {}, "cells": {}}
    target = arguments.output / "solver.json"
    if target.is_file():
        kept = json.loads(target.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            parser.error(f"{target} was made with {kept['settings']}, not with {settings}")
        results = kept

    def keep() -> None:
        target.write_text(json.dumps(results, indent=1), encoding="utf-8")

    for path in arguments.tables:
        other = json.loads(path.read_text(encoding="utf-8"))
        for size, tables in other["tables"].items():
            results["tables"].setdefault(size, {}).update(tables)
        results["cost"] |= other["cost"]
    for size in sorted(arguments.sizes, reverse=True):
        fit(arguments, results, size)
        keep()
    if arguments.fit_only:
        return
    with torch.inference_mode():
        model = Model(arguments)
        best = results["tables"][str(max(arguments.sizes))]
        GeneralizedDDIMScheduler.from_config(
            model.config, **{**CALIBRATED, "calibration": {"solver": best}}
        ).to_json_file(arguments.output / "calibrated.json")
        measure(model, arguments, results, keep)
    keep()
    text = report(results)
    (arguments.output / "solver.md").write_text(text, encoding="utf-8")
    say(text)


if __name__ == "__main__":
    main()
