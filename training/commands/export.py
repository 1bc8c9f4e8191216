"""`ddim-schedulers export`: a pipeline's folder out of a run, a checkpoint or another pipeline."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from ddim_schedulers.forms import FORMS
from ddim_schedulers.training.commands._model_options import add_repository_arguments
from ddim_schedulers.training.networks.places import WEIGHTS

HELP = "Make a pipeline's folder of a run, a checkpoint, or a pipeline in another form."
RENAMED = {"form": "--form"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--pipeline",
        required=True,
        help="folder of a run, a checkpoint or a saved pipeline, or a Hub name",
    )
    add_repository_arguments(parser)
    parser.add_argument("--output", required=True, help="new folder of the pipeline")
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="as in `push` (portable; plug-in where no stock scheduler knows the prediction)",
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="averaged", help="of a run or checkpoint (averaged)"
    )


def run(args: argparse.Namespace) -> int:
    """Export; what the form cannot express goes to stderr."""
    from diffusers import DDPMPipeline

    from ddim_schedulers.class_labels import labels_in
    from ddim_schedulers.export import save_pipeline
    from ddim_schedulers.latent_forms import form_of_latents
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.training.commands._loading import read_saved

    output = Path(args.output)
    check_folders(output, "", "--output")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"`--output` is {args.output!r}, which is not empty; choose a new folder.")
    saved = read_saved(args.pipeline, args.weights, args.revision, args.allow_pickle)
    knows = saved.scheduler.config.get("prediction_type") != "posterior_mean"
    form = args.form or ("portable" if knows else "plug-in")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline: Any = saved
    if saved.vae is None:  # any network and scheduler will do
        pipeline = DDPMPipeline(unet=saved.unet, scheduler=saved.scheduler)  # type: ignore[arg-type]
    elif args.form is None:
        form = form_of_latents(saved.vae.config, labels_in(saved.unet.config) is not None, form)
    for note in save_pipeline(pipeline, partial, form):
        print(note, file=sys.stderr)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    print(args.output)
    return 0
