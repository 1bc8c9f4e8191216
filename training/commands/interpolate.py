"""`ddim-schedulers interpolate`: between seeds or images, to a folder."""

import argparse
from pathlib import Path
from typing import Any

from ddim_schedulers.training.commands import _loading, _model_options

HELP = "Interpolate between seeds or images: a chain, a four-corner grid, or DDPM's own way."
RENAMED = {**_model_options.RENAMED, "rows": "--num_points"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    _model_options.add_model_arguments(parser)
    _model_options.add_condition_arguments(
        parser, "the class of all pictures, or one for each end; between two the class goes over"
    )
    parser.add_argument("--output", required=True, help="folder for images/, latents and grid.png")
    ends = parser.add_mutually_exclusive_group(required=True)
    ends.add_argument("--seeds", type=int, nargs="+", help="ends as seeds")
    ends.add_argument("--images", nargs="+", help="ends as image files, which are encoded first")
    parser.add_argument(
        "--mode",
        choices=("chain", "grid", "diffuse"),
        default="chain",
        help="two or more ends in a row; four corners; or two images diffused to --timestep "
        "(chain)",
    )
    parser.add_argument(
        "--num_points", type=int, default=8, help="pictures of a stretch or side (8)"
    )
    parser.add_argument(
        "--refinements", type=int, default=0, help="of the encoding of --images (0)"
    )
    parser.add_argument("--timestep", type=int, help="of diffuse: how far to diffuse")
    parser.add_argument(
        "--noise", choices=("separate", "same"), help="of diffuse: the draws (separate)"
    )
    parser.add_argument("--seed", type=int, help="of diffuse: noise of the decoding (0)")


def run(args: argparse.Namespace) -> int:
    """Interpolate; 0 when it is done."""
    from ddim_schedulers.pipelines import InterpolationPipeline, make_grid
    from ddim_schedulers.pipelines.compatibility import SINGLE_STEP, is_deterministic
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.training.commands import _picture_files

    if args.images is not None and args.mode != "diffuse":
        _model_options.refuse_solver(args, "--images go through plain DDIM of order 1 both ways")
    _model_options.apply_preset(args)
    if args.mode == "diffuse" and (args.images is None or args.timestep is None):
        raise ValueError(
            "`--mode` is 'diffuse'; two --images and a --timestep must be given with it."
        )
    for option in ("timestep", "noise", "seed"):
        if args.mode != "diffuse" and getattr(args, option) is not None:
            raise ValueError(
                f"`--{option}` is {getattr(args, option)!r}; it must be left out with --mode "
                f"{args.mode}, for it belongs to --mode diffuse."
            )
    encoded = args.images is not None and args.mode != "diffuse"
    if args.refinements and not encoded:
        raise ValueError(
            f"`--refinements` is {args.refinements}; it must be left out here: it belongs to the "
            "encoding of --images in --mode chain or grid."
        )
    if args.mode != "diffuse" and args.eta:
        raise ValueError(
            f"`--eta` is {args.eta}; it must be 0 with --mode {args.mode}, which "
            "decodes without noise."
        )
    images = None
    if args.images is not None:
        images = _picture_files.read(_picture_files.find(args.images, None))
    folder = Path(args.output)
    names = _names(args, len(args.seeds or images or ()))
    _picture_files.check_output(folder, names)
    with own(folder, "interpolate"):
        pipe = _loading.load(InterpolationPipeline, args)
        if args.images is not None and not isinstance(pipe.scheduler, SINGLE_STEP):
            raise ValueError(
                f"`--images` is {args.images}, which does not fit {type(pipe.scheduler).__name__}, "
                "whose steps depend on those before them; use --scheduler ddim."
            )
        if not encoded:  # images are encoded by DDIM, with every scheduler
            _loading.check_own_scheduler(pipe.scheduler, args)
            if args.seeds is not None and not is_deterministic(pipe.scheduler):
                raise ValueError(
                    f"`--seeds` is {args.seeds}, which does not determine the images of "
                    f"{type(pipe.scheduler).__name__}: it draws noise in its steps; use "
                    "--scheduler ddim."
                )
        output = _interpolate(pipe, args, images)
        _picture_files.write(folder, names, output.images)
        _picture_files.write_latents(folder / "latents.safetensors", output.latents)
        columns = len(output.images) // output.rows
        _picture_files.write_grid(folder, make_grid(output.images, columns, scale=None))
        used = _loading.table_used(pipe)
        print(f"{len(output.images)} images written to {folder}{used}")
        return 0


def _names(args: argparse.Namespace, ends: int) -> list[str]:
    """Return the files of the pictures, known before the first network call."""
    points = args.num_points
    counts = {"chain": (ends - 1) * (points - 1) + 1, "grid": points**2, "diffuse": points}
    return [f"{i:06d}.png" for i in range(counts[args.mode])]


def _interpolate(pipe: Any, args: argparse.Namespace, images: list | None) -> Any:  # noqa: ANN401
    common = {
        "num_inference_steps": args.num_inference_steps,
        "timesteps": args.timesteps,
        "batch_size": args.batch_size,
        "class_labels": _model_options.labels_of(args),
        **_model_options.conditions_of(args),
        **_loading.load_guides(pipe, args),
    }
    if args.mode == "diffuse":
        return pipe.diffuse(
            images,
            args.timestep,
            num_points=args.num_points,
            noise=args.noise or "separate",
            seed=args.seed or 0,
            eta=_model_options.eta_of_call(args),
            **common,
        )
    ends = {"seeds": args.seeds, "images": images, "refinements": args.refinements}
    if args.mode == "grid":
        return pipe.grid(rows=args.num_points, columns=args.num_points, **ends, **common)
    return pipe(num_points=args.num_points, **ends, **common)
