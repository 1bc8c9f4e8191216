"""`ddim-schedulers train-classifier`: a classifier of noisy images, for classifier guidance."""

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "Train a classifier of noisy images, which guides a network that knows no classes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from ddim_schedulers.training.commands._model_options import add_repository_arguments
    from ddim_schedulers.training.likelihood.measured_data import (
        add_data_arguments,
        add_label_arguments,
    )

    parser.add_argument(
        "--pipeline", required=True, help="folder or Hub name of the pipeline that it will guide"
    )
    add_repository_arguments(parser)
    add_data_arguments(parser)
    add_label_arguments(parser)
    parser.add_argument("--output", required=True, help="folder for the classifier")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps (2000)")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a step (128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of AdamW (0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, noise and t (0)")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.05,
        help="share of the images on which the accuracy is measured (0.05)",
    )
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that prepare batches (0)"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use an accelerator")


def run(args: argparse.Namespace) -> int:
    """Train, and write the classifier's config and weights, and record.json beside them."""
    import torch

    from ddim_schedulers.pipelines.files import check_folders, write_bytes
    from ddim_schedulers.training.common.processes import on_cpu, own_together
    from ddim_schedulers.training.common.repositories import pinned
    from ddim_schedulers.training.common.storage import to_json
    from ddim_schedulers.training.common.versions import versions
    from ddim_schedulers.training.likelihood.measured_data import load_measured_data
    from ddim_schedulers.training.likelihood.measured_model import load_measured_model
    from ddim_schedulers.training.trainer.classifier_training import (
        levels_of,
        train_noisy_classifier,
    )

    _check(args)
    output = Path(args.output)
    check_folders(output, "", "--output")
    measured_model = load_measured_model(
        pinned(args.pipeline, args.revision), allow_pickle=args.allow_pickle
    )
    if measured_model.codec is not None:
        raise ValueError(
            f"`--pipeline` is {args.pipeline!r}, a model of latents; it must be a model of pixels: "
            "guide latents without a classifier (--guidance_scale), or by a weaker network"
        )
    whole = load_measured_data(args, measured_model, class_conditional=True)
    data, held_out = whole.split(args.validation_fraction, args.seed)
    if held_out is None:
        raise ValueError(
            f"`--validation_fraction` is {args.validation_fraction}; it must hold out an image or "
            f"more of {len(whole)}"
        )
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    process: dict[str, Any] = {key: measured_model.config[key] for key in keys}
    table = measured_model.alpha_bar
    process["alpha_bar"] = {str(t): float(table[t]) for t in levels_of(len(table))}
    device = "cpu" if on_cpu(args.cpu) else torch.accelerator.current_accelerator() or "cpu"
    with own_together(output, "train-classifier") as owner:
        classifier, record = train_noisy_classifier(
            data,
            held_out,
            measured_model.alpha_bar,
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
            num_workers=args.num_workers,
            device=device,
            process=process,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        owner.check()
        classifier.save_pretrained(output)
        about = {
            "pipeline": measured_model.commit or args.pipeline,
            "found": whole.inventory.counts(),
            "versions": versions("ddim_schedulers", "diffusers", "torch"),
        }
        write_bytes(output / "record.json", to_json({**record, **about}))
    print(f"{'t':>6} {'recognised':>12}")
    for t, share in record["accuracy"].items():
        print(f"{t:>6} {100 * share:>10.1f} %")
    print(f"{record['held_out_n']} held-out images; written to {output}")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}")
    if not args.lr > 0:
        raise ValueError(f"`--lr` is {args.lr}; it must be above 0")
    if not 0 < args.validation_fraction < 1:
        raise ValueError(
            f"`--validation_fraction` is {args.validation_fraction}; it must be between 0 and 1"
        )
