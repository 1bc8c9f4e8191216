"""`ddim-schedulers demo`: train on the embedded digits, sample, look, measure, save."""

import argparse
from pathlib import Path

HELP = "Train a small model on embedded digits and sample it with every member of the family."
FILES = {
    "results.md": "all tables and pictures",
    "samples.png": "the same seeds under DDPM and DDIM",
    "few.png": "few steps: schedulers of diffusers, and ours",
    "ways.png": "a sample as it forms, a way between two, digits encoded and decoded",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    parser.add_argument(
        "--output", default="runs/digits", help="folder for all that is written (runs/digits)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (0)")
    parser.add_argument(
        "--quick", action="store_true", help="show every part in under a minute, not its quality"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo and say where things are."""
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.training import demo

    output = Path(args.output)
    check_folders(output, "pipeline", "--output")
    settings = demo.quick(output, args.seed) if args.quick else demo.DemoSettings(output, args.seed)
    results = demo.run_demo(settings)
    print(results["short"])
    print("Open:")
    for name, what in FILES.items():
        print(f"  {output / name}  {what}")
    print(f'Load it: DiffusionPipeline.from_pretrained("{output / "pipeline"}")')
    print(f"{results['seconds']:.0f} seconds in all.")
    return 0
