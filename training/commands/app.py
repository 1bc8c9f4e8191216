"""`ddim-schedulers app`: a playground in the browser."""

import argparse
import shlex
import sys

from ddim_schedulers.training.commands import _model_options

HELP = "Open a playground for a pipeline in the browser, or write it as a Hugging Face Space."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--pipeline",
        default="digits",
        help=f"{_model_options.PIPELINE_HELP} (digits, which comes with the package)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port; 0 takes a free one (0)")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; an accelerator where there is one"
    )
    parser.add_argument("--max_images", type=int, default=16, help="largest number of images (16)")
    parser.add_argument("--max_steps", type=int, default=250, help="largest number of steps (250)")
    parser.add_argument(
        "--export_space", metavar="DIR", help="write a Space into a new folder, and start nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until it is interrupted, or write a Space; 0 when it is done."""
    for key, low, high in (("port", 0, 65535), ("max_images", 1, 1024), ("max_steps", 1, 10000)):
        if not low <= getattr(args, key) <= high:
            raise ValueError(f"`--{key}` is {getattr(args, key)}; it must be in {low} .. {high}.")
    if args.export_space is not None:
        from ddim_schedulers.training.app.space import write_space

        for path in write_space(args.pipeline, args.export_space):
            print(path)
        push = shlex.join(["ddim-schedulers", "push", "--space", args.export_space])
        print(
            f"To share it: {push} --repo_id USER/NAME\n"
            "Its requirements.txt asks PyPI for this version of the package.",
            file=sys.stderr,
        )
        return 0
    from ddim_schedulers.training.app.page import serve
    from ddim_schedulers.training.app.playground import Limits

    limits = Limits(num_images=args.max_images, steps=args.max_steps)
    serve(args.pipeline, args.host, args.port, args.device, limits)
    return 0
