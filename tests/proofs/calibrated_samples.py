"""`calibrate --objective samples` beside stock samplers: Frechet distances on held-out noise.

    python tests/proofs/calibrated_samples.py --pipeline PIPELINE --data IMAGES.npz \
        --classifier CLASSIFIER.safetensors --output FOLDER [--device cuda --bf16]

`IMAGES.npz` holds uint8 `images` (N, H, W) and `labels` (N,), as for `solver_presets.py`, whose
rows and measurement are used. The search runs for each number of calls, in features of the
classifier, guarded by pixels. Then the chosen settings, the preset without them and the rows of
stock schedulers are measured, n samples of each of five seeds that the search has not seen, against
all images. A run that is stopped goes on: FOLDER holds the parts of the search and the cells of the
measurement. `report.md` has the tables and says for each number of calls whether the distance in
features of the classifier is at most 0.7 (5 calls) or 0.9 (10, 20) of the best stock row, and that
in pixels not above that same row's.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import solver_presets as presets
import torch
from diffusers.utils import logging

from ddim_schedulers.pipelines.sampling import speed_up
from ddim_schedulers.training.calibration.samples_job import SamplesJob, sampler_of
from ddim_schedulers.training.calibration.samples_run import calibrate_samples
from ddim_schedulers.training.calibration.samples_search import Space
from ddim_schedulers.training.evaluation.references import as_uint8_sees
from ddim_schedulers.training.likelihood.measured_model import load_measured_model
from ddim_schedulers.training.metrics import features as spaces

TARGETS = {5: 0.7, 10: 0.9, 20: 0.9}
STOCK = [
    "stock UniPC-2",
    "stock UniPC-3",
    "stock DPM-Solver++(2M), Karras",
    "stock SA-Solver",
    "stock SA-Solver, tau 0",
    "stock SDE-DPM-Solver++(2M)",
    "stock SDE-DPM-Solver++(2M), Karras",
]
FIRST, SECOND = "classifier", "pixels"
SMALL = Space(((0.0, None), (1.0, (0.2, 0.8))), (1.0, 1.01), rounds=1)


class Images:
    """The images as the search reads them."""

    def __init__(self, images):
        self.images, self.shape = images, tuple(images.shape[1:])

    def __len__(self):
        return len(self.images)

    def batch(self, rows):
        return self.images[torch.as_tensor(np.asarray(rows))], None


def search(args, images, labels):
    """Returns what was found for each number of calls, and the model."""
    model = load_measured_model(args.pipeline, args.device)
    dtype = torch.bfloat16 if args.bf16 else None
    speed_up(model.unet, compile=args.compile, channels_last=True, dtype=dtype)
    nets = {
        FIRST: presets.classifier(args.classifier, images, labels),
        SECOND: spaces.make_feature_space("pixels", tuple(images.shape[1:])),
    }
    begun = time.perf_counter()
    found, cost = calibrate_samples(
        model,
        Images(images),
        {name: network.to(args.device) for name, network in nets.items()},
        SamplesJob(
            tuple(args.calls),
            args.num_images,
            batch_size=args.batch_size,
            space=SMALL if args.small else Space(),
        ),
        work_dir=args.output / "search",
        progress=lambda line: presets.say(f"{time.perf_counter() - begun:7.1f} s  {line}"),
    )
    text = "\n".join("\n".join(outcome.lines([*nets])) for outcome in found)
    (args.output / "search.txt").write_text(f"{text}\n{json.dumps(cost)}\n")
    presets.say(f"{text}\n{cost}")
    return found, model


def measure(args, network, distances, cells, keep, calls, name, config):
    """Fills in the cells of one number of calls that are missing."""
    for row in [name, "FEW_STEPS", *STOCK]:
        for seed in range(args.seeds):
            key = f"{row}|{calls}|{seed}"
            if key in cells:
                continue
            scheduler, settings, noisy = presets.build(network, row, {name: config})
            presets.plan(scheduler, settings, calls, args.device)
            drawn = torch.Generator(args.device).manual_seed(10_000 + seed)
            noises = network.noises(seed, args.n)
            try:
                x, made = network.run(scheduler, noises, drawn if noisy else None)
            except presets.STOCK_FAILS as error:
                presets.say(f"{calls:>3} {row}: left out, {error!r}")
                break
            shown = as_uint8_sees(x.clamp(-1, 1).cpu())
            cells[key] = {"calls": made, "noisy": noisy}
            cells[key] |= {space: distance.to(shown) for space, distance in distances.items()}
        keep()
        presets.say(f"{calls:>3} {row}: {presets.summary(cells, row, calls, FIRST)}")


def report(cells, chosen):
    """Returns the tables with the verdicts."""
    lines = []
    for calls, (name, setting) in chosen.items():

        def mean(row, space, calls=calls):
            return float(np.mean(presets.values_of(cells, row, calls, space)))

        lines += [f"## {calls} calls: {setting}", "", f"| | {FIRST} | {SECOND} |", "|---|---|---|"]
        stock = [row for row in STOCK if presets.values_of(cells, row, calls, FIRST)]
        for row in sorted([name, "FEW_STEPS", *stock], key=lambda row: mean(row, FIRST)):
            told = [presets.summary(cells, row, calls, space) for space in (FIRST, SECOND)]
            lines.append(f"| {'chosen' if row == name else row} | {told[0]} | {told[1]} |")
        best = min(stock, key=lambda row: mean(row, FIRST))
        ratio, most = mean(name, FIRST) / mean(best, FIRST), TARGETS.get(calls, 1.0)
        pixels = mean(name, SECOND), mean(best, SECOND)
        lines += [
            "",
            f"In {FIRST} {ratio:.3f} of {best} (target {most}: "
            f"{'met' if ratio <= most else 'missed'}), in {SECOND} {pixels[0]:.4f} against "
            f"{pixels[1]:.4f} ({'not above' if pixels[0] <= pixels[1] else 'above'}).",
            "",
        ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True, help="made where it is missing")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="the network in bfloat16; x in float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--num_images", type=int, default=2000, help="of a setting in the search")
    parser.add_argument("--n", type=int, default=2000, help="samples of a row and seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=2000)
    parser.add_argument("--first_images", type=int, help="of the data, for a try")
    parser.add_argument("--small", action="store_true", help="search little, for a try")
    args = parser.parse_args()
    logging.set_verbosity_error()  # stock schedulers tell of keys that they do not have
    args.output.mkdir(parents=True, exist_ok=True)
    pipeline = load_measured_model(args.pipeline).unet.config
    side = pipeline.sample_size
    images, labels = presets.real_images(args.data, (pipeline.in_channels, side, side))
    images, labels = images[: args.first_images], labels[: args.first_images]
    found, model = search(args, images, labels)
    chosen = {}
    for outcome in found:
        calls, setting = outcome.calls, outcome.setting
        config = args.output / f"chosen-{calls}.json"
        config.write_text(sampler_of(dict(model.saved), calls, setting).to_json_string())
        chosen[calls] = (f"chosen, {setting}", setting)
    told = {calls: asdict(setting) for calls, (_, setting) in chosen.items()}
    (args.output / "chosen.json").write_text(json.dumps(told, indent=1))
    if not args.seeds:
        return
    target, results = args.output / "cells.json", {"cells": {}}
    if target.is_file():
        results = json.loads(target.read_text())

    def keep():
        target.write_text(json.dumps(results, indent=1))

    with torch.inference_mode():
        network = presets.Model(args)
        nets = {
            FIRST: spaces.load_classifier(args.classifier),
            SECOND: spaces.make_feature_space("pixels", network.shape),
        }
        distances = {k: presets.Distance(net, images, args.device) for k, net in nets.items()}
        for calls, (name, _) in chosen.items():
            config = args.output / f"chosen-{calls}.json"
            measure(args, network, distances, results["cells"], keep, calls, name, config)
    text = report(results["cells"], chosen)
    (args.output / "report.md").write_text(text)
    presets.say(text)


if __name__ == "__main__":
    main()
