"""`ddim-schedulers reconstruct`: images to latents and back, with the error."""

import argparse
from pathlib import Path
from typing import Any

from ddim_schedulers.training.commands import _loading, _model_options

HELP = "Encode images to latents with DDIM, decode them again and report the error."
RENAMED = _model_options.RENAMED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    _model_options.add_model_arguments(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, help="image files, or folders of them"
    )
    parser.add_argument("--output", required=True, help="folder for images/, latents and grid.png")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="of a network with classes: the class of all images, or one for each in their order",
    )
    parser.add_argument("--num_images", type=int, help="take the first ones only (all)")
    parser.add_argument(
        "--refinements",
        type=int,
        default=0,
        help="fixed-point iterations of each encoding step (0)",
    )
    parser.add_argument(
        "--tolerance", type=float, help="change at which --refinements stops (0.0001)"
    )


def run(args: argparse.Namespace) -> int:
    """Reconstruct; return 0, even if the refinement has not converged (a warning says so)."""
    from ddim_schedulers.pipelines import InversionPipeline, make_grid
    from ddim_schedulers.pipelines.files import write_json
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.pipelines.refinement import DEFAULT_TOLERANCE
    from ddim_schedulers.training.commands import _picture_files

    _model_options.refuse_solver(args, "reconstruction is plain DDIM of order 1 both ways")
    if args.eta:
        raise ValueError(
            f"`--eta` is {args.eta}; it must be 0, for reconstruction is deterministic."
        )
    if args.tolerance is not None and not args.refinements:
        raise ValueError(
            f"`--tolerance` is {args.tolerance}; it must be left out without --refinements."
        )
    tolerance = DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance
    paths = _picture_files.find(args.images, args.num_images)
    folder = Path(args.output)
    names = [f"{i:06d}-{path.stem}.png" for i, path in enumerate(paths)]
    _picture_files.check_output(folder, names)
    images = _picture_files.read(paths)
    with own(folder, "reconstruct"):
        pipe = _loading.load(InversionPipeline, args)
        output: Any = pipe.reconstruct(
            images,
            num_inference_steps=args.num_inference_steps,
            timesteps=args.timesteps,
            refinements=args.refinements,
            tolerance=tolerance,
            batch_size=args.batch_size,
            class_labels=_model_options.labels_of(args),
        )
        _picture_files.write(folder, names, output.images)
        _picture_files.write_latents(folder / "latents.safetensors", output.inversion.latents)
        pairs = [image for pair in zip(images, output.images, strict=True) for image in pair]
        _picture_files.write_grid(folder, make_grid(pairs, min(len(pairs), 16), scale=None))
        residual = output.inversion.residual
        mean = float(output.error.mean())
        report = {
            "error_mean": mean,
            "error": dict(zip(names, output.error.tolist(), strict=True)),
            "steps": len(output.inversion.timesteps),
            "timesteps": output.inversion.timesteps,
            "refinements": args.refinements,
            "tolerance": tolerance,
            "residual_max": None if residual is None else float(residual.max()),
            "converged": output.inversion.converged,
        }
        write_json(folder / "errors.json", report)
        print(
            f"{len(paths)} images, error per dimension on [0, 1]: {mean:.6g}; written to {folder}"
        )
        return 0
