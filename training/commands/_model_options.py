"""Options that `sample`, `reconstruct` and `interpolate` share: model, scheduler, device."""

import argparse
import os
from typing import TYPE_CHECKING, Any, TypeVar

from ddim_schedulers.training.config import DTYPES

if TYPE_CHECKING:
    from ddim_schedulers.pipelines.base import UnconditionalPipeline

P = TypeVar("P", bound="UnconditionalPipeline")

# Options that set something in a scheduler of ours, by the config key.
SCHEDULER_OPTIONS = ("timestep_spacing", "reverse_variance", "variance_type", "clip_sample")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--pipeline", required=True, help="folder or Hub name of a saved pipeline")
    parser.add_argument(
        "--scheduler",
        choices=("saved", "ddim", "ddpm"),
        default="saved",
        help="the pipeline's own, or the scheduler classes of this package on its config",
    )
    parser.add_argument("--num_inference_steps", type=int, help="steps; 50 if nothing is said")
    parser.add_argument("--timesteps", type=int, nargs="+", help="explicit trajectory, decreasing")
    parser.add_argument("--eta", type=float, help="DDIM's eta")
    parser.add_argument("--timestep_spacing", help="of ddim or ddpm; see their documentation")
    parser.add_argument("--reverse_variance", help="of ddim, e.g. sigma_hat with --eta 1")
    parser.add_argument("--variance_type", help="of ddpm, e.g. fixed_large")
    parser.add_argument(
        "--clip_sample",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="clip x_0-hat in ddim or ddpm; the saved setting if not given",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images in one network call")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; an accelerator where there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the network: a minute at the start"
    )
    parser.add_argument(
        "--channels_last", action="store_true", help="the network in channels_last memory format"
    )


def eta_of_call(args: argparse.Namespace) -> float | None:
    """The eta to pass when sampling: with `--scheduler ddim` it stands in the config instead."""
    return None if args.scheduler == "ddim" else args.eta


def load(cls: type[P], args: argparse.Namespace) -> P:
    """Loads the pipeline as `cls`, with the scheduler that was asked for, on the device.

    Raises:
        ValueError: for a pipeline that cannot be read or does not fit, or options that the chosen
            scheduler does not have.
    """
    import torch
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        pipe = cls.from_pretrained(args.pipeline)
    except OSError as error:
        raise ValueError(f"--pipeline {args.pipeline!r} cannot be loaded: {error}") from error
    scheduler = _scheduler(pipe.scheduler, args)
    if scheduler is not pipe.scheduler:
        pipe = cls(**{**pipe.components, "scheduler": scheduler})
    # the name of from_pretrained's own argument for the dtype differs between versions of diffusers
    try:
        pipe = pipe.to(_device(args.device))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {args.device!r} cannot be used: {error}") from error
    return pipe.speed_up(
        compile=args.compile,
        channels_last=args.channels_last,
        dtype=getattr(torch, args.dtype),
    )


def _scheduler(saved: Any, args: argparse.Namespace) -> Any:  # noqa: ANN401
    given = {k: getattr(args, k) for k in SCHEDULER_OPTIONS if getattr(args, k) is not None}
    if args.scheduler == "saved":
        if given:
            raise ValueError(
                f"--{next(iter(given))} needs --scheduler ddim or ddpm: the saved scheduler stays "
                "as it is."
            )
        return saved
    from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

    foreign = "variance_type" if args.scheduler == "ddim" else "reverse_variance"
    if foreign in given:
        raise ValueError(f"--{foreign} does not belong to --scheduler {args.scheduler}.")
    if args.scheduler == "ddpm":
        return MarkovianDDPMScheduler.from_config(saved.config, **given)
    if args.eta is not None:
        given["eta"] = args.eta
    return GeneralizedDDIMScheduler.from_config(saved.config, **given)


def _device(name: str | None) -> str:
    import torch

    if name is not None:
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
