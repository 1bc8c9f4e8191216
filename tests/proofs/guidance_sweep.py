"""A sweep over the guidance scale: Frechet distance, share recognised, precision, recall.

    python tests/proofs/guidance_sweep.py --pipeline COND --unconditional UNCOND --guide EARLY \\
        --data fashion-mnist.npz --output sweep --device cuda

COND is a pipeline with classes, UNCOND one of the same network, steps and data without, EARLY an
earlier checkpoint of COND. Every cell has n samples of balanced classes, at each number of calls,
three times with other seeds. The judge is a classifier of clean images that guides nothing;
`--classifier FILE` is used, or trained and kept there. It ends with an error unless the Frechet
distance at w = 1 is below that of UNCOND at every number of calls, in every space.

Writes OUTPUT/{conditional,unconditional}/report.md with pictures, OUTPUT/sweep.{md,json}, and
OUTPUT/scales.png: the same seeds at w = 0, 1, 2, 4, then 4 with rescale, and in an interval.
"""

import argparse
import json
from pathlib import Path

import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline, make_grid
from ddim_schedulers.training.evaluation.config import parse_evaluation
from ddim_schedulers.training.evaluation.report import evaluate

SCALES = (0, 1, 2, 4)
METRICS = ("frechet", "recognised", "precision", "recall")


def settings(args, name, pipeline, guidance):
    """Returns what an evaluation is asked for."""
    block = {"steps": args.steps, "members": [0], "repeats": args.repeats}
    if args.order > 1:
        block["settings"] = {"solver_order": args.order, "solver_corrector": True}
    block |= {"guidance": guidance} if guidance else {}
    data = {"data": args.data, "validation_fraction": args.held_out}
    if Path(args.data).suffix == ".npz":
        data |= {"array_key": "images", "image_size": 32, "fit": "pad"}
    return {
        "pipeline": pipeline,
        "output_dir": str(Path(args.output) / name),
        "cache_dir": str(Path(args.output) / "cache"),
        "data": data,
        "labels": "labels",
        "features": ["pixels", "classifier"],
        "classifier": args.classifier or str(Path(args.output) / "classifier.safetensors"),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "tables": [{"name": "Guidance", "n": args.n, "grid": [block]}],
    }


def measured(args, name, pipeline, guidance):
    """Runs an evaluation, and returns the cells of its table."""
    config = parse_evaluation(settings(args, name, pipeline, guidance))
    _, results, _ = evaluate(config, device=args.device, progress=print, warns=False)
    (table,) = results["tables"]
    return table["cells"]


def line(row, steps, found):
    """Returns a line of the Markdown table."""
    texts = []
    for space in ("pixels", "classifier"):
        for metric in METRICS:
            value = found[space].get(metric)
            spread = "" if value is None or value["std"] is None else f" +- {value['std']:.3f}"
            texts.append("" if value is None else f"{value['mean']:.3f}{spread}")
    return f"| {row} | {steps} | " + " | ".join(texts) + " |"


@torch.no_grad()
def scales_picture(args, path):
    """Writes rows of the same seeds and classes, a row for each scale."""
    pipe = GenerationPipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.scheduler = GeneralizedDDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    pipe.set_progress_bar_config(disable=True)
    rows = [{"guidance_scale": w} for w in SCALES]
    rows += [
        {"guidance_scale": 4, "guidance_rescale": 0.7},
        {"guidance_scale": 4, "guidance_interval": [0.1, 0.6]},
    ]
    shown = []
    for row in rows:
        shown += pipe(
            seeds=range(20),
            class_labels=[i % 10 for i in range(20)],
            num_inference_steps=20,
            eta=0.0,
            **row,
        ).images
    make_grid(shown, 20).save(path)


def main():
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--unconditional", required=True)
    parser.add_argument("--guide", help="a weaker network: its cells are made too")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--classifier")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--held_out", type=float, default=0.05)
    parser.add_argument("--batch_size", type=int, default=500)
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    scales_picture(args, output / "scales.png")
    guidance = [*SCALES, {"scale": 2, "interval": [0.1, 0.6]}]
    if args.guide:
        guidance.append({"scale": 2, "guide": args.guide})
    plain = measured(args, "unconditional", args.unconditional, None)
    swept = measured(args, "conditional", args.pipeline, guidance)
    spaces = ("pixels", "classifier")
    head = [f"{metric}, {space}" for space in spaces for metric in METRICS]
    lines = [f"n = {args.n}, {args.repeats} times, order {args.order}", ""]
    lines += ["| | calls | " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) + 1)]
    lines += [line("unconditional", c["steps"], c["metrics"]) for c in plain]
    lines += [line(c["row"], c["steps"], c["metrics"]) for c in swept]
    (output / "sweep.md").write_text("\n".join(lines) + "\n")
    (output / "sweep.json").write_text(json.dumps({"plain": plain, "swept": swept}, indent=1))
    print("\n".join(lines))
    worse = [
        (space, c["steps"])
        for c in plain
        for space in spaces
        for d in swept
        if d["steps"] == c["steps"]
        and d["row"].endswith("w 1")
        and d["metrics"][space]["frechet"]["mean"] >= c["metrics"][space]["frechet"]["mean"]
    ]
    if worse:
        raise SystemExit(f"w = 1 is not below the unconditional network in {worse}")


if __name__ == "__main__":
    main()
