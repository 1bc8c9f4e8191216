"""`ddim-schedulers sample`: many images to a folder, resumable, on any number of processes."""

import argparse
from pathlib import Path

from ddim_schedulers.training.commands import _loading, _model_options

HELP = "Sample images into a folder; continues where it was stopped, on any number of processes."
RENAMED = _model_options.RENAMED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    _model_options.add_model_arguments(parser)
    _model_options.add_condition_arguments(
        parser,
        "classes, names or numbers: image i has class i modulo their number (all classes in turn)",
    )
    parser.add_argument("--num_images", type=int, required=True, help="how many, in all processes")
    parser.add_argument(
        "--output", required=True, help="folder for images/ or shards/ and grid.png"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (0)")
    parser.add_argument(
        "--image",
        nargs="+",
        help="pictures to start from, of the network's size: image i from picture i modulo their "
        "number (none)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="with --image: share of the steps that are run, above 0 and up to 1; small values "
        "keep the picture",
    )
    parser.add_argument(
        "--format",
        choices=("png", "npz"),
        default="png",
        help="one PNG an image, or one .npz shard of uint8 images for each batch (png)",
    )


def run(args: argparse.Namespace) -> int:
    """Sample this process's share; 0 when it is done."""
    from ddim_schedulers.pipelines import GenerationPipeline
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.pipelines.sampling_files import FOLDERS
    from ddim_schedulers.pipelines.sampling_job import (
        Guides,
        SamplingJob,
        process_of,
        sample_to_directory,
    )

    _model_options.apply_preset(args)
    rank, world_size = process_of()
    job = SamplingJob(
        num_images=args.num_images,
        batch_size=args.batch_size,
        seed=args.seed,
        file_format=args.format,
        num_inference_steps=args.num_inference_steps,
        timesteps=None if args.timesteps is None else tuple(args.timesteps),
        eta=_model_options.eta_of_call(args),
        class_labels=None if args.labels is None else tuple(args.labels),
        image=None if args.image is None else tuple(args.image),
        strength=args.strength,
        **_model_options.conditions_of(args),
    )
    check_folders(Path(args.output), FOLDERS[args.format], "--output")
    with own(args.output, "sample", rank=rank, world_size=world_size):
        pipe = _loading.load(GenerationPipeline, args)
        _loading.check_own_scheduler(pipe.scheduler, args)
        guides = Guides(**_loading.load_guides(pipe, args))
        report = sample_to_directory(
            pipe, args.output, job, rank=rank, world_size=world_size, guides=guides
        )
    state = "complete" if report.complete else "other processes are still at work"
    # one write for the whole line: processes share the terminal
    print(
        f"process {rank + 1} of {world_size}: {report.written} files written, "
        f"{report.present} found; {args.output}: {state}"
        f"{_loading.table_used(pipe) if report.written else ''}\n",
        end="",
        flush=True,
    )
    return 0
