"""`ddim-schedulers convert`: a published PyTorch DDPM checkpoint into a diffusers pipeline."""

import argparse
import sys
from pathlib import Path

from ddim_schedulers.forms import FORMS

HELP = "Turn a PyTorch DDPM checkpoint (pesser/pytorch_diffusion, DDIM) into a pipeline."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--checkpoint", required=True, help="file that torch.save wrote")
    parser.add_argument("--output", required=True, help="new folder of the pipeline")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="where the file holds both (ema)"
    )
    parser.add_argument(
        "--image_size", type=int, help="side of the images; by default found from the attention"
    )
    parser.add_argument(
        "--variance_type",
        choices=("fixed_small", "fixed_large"),
        help="of the sampler; by default fixed_large for 32 x 32 images, else fixed_small",
    )
    parser.add_argument("--form", choices=FORMS, default="portable", help="as in `push` (portable)")


def run(args: argparse.Namespace) -> int:
    """Convert; what the form cannot express goes to stderr."""
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.training.sharing import convert

    check_folders(Path(args.output), "", "--output")
    notes = convert.convert_checkpoint(
        args.checkpoint,
        args.output,
        weights=args.weights,
        image_size=args.image_size,
        variance_type=args.variance_type,
        form=args.form,
    )
    for note in notes:
        print(note, file=sys.stderr)
    print(args.output)
    return 0
