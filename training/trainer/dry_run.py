"""What a run would be: its settings, a batch, one step, its size and how long it would take."""

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from ddim_schedulers.training.common.durations import duration
from ddim_schedulers.training.parsing import to_yaml
from ddim_schedulers.training.trainer.training_log import Window

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer.trainer import Trainer


def report(trainer: "Trainer") -> str:
    """Do one step to warm up and one to measure; write nothing to `output_dir`.

    Returns:
        Text for the terminal: settings, data, parameters, memory, loss of the first step, time.
    """
    config, share = trainer.config, trainer.share
    start = trainer.step
    with trainer.loader(start + 1) as loader:
        batch = next(loader)
    losses, seconds = [], 0.0
    with trainer.loader(start + 2) as loader:
        window = Window(share, start)
        for _ in range(2):
            began = time.perf_counter()
            trainer.one_step(loader, window)
            reading = window.read(trainer.accelerator, stop=False)
            seconds = time.perf_counter() - began
            trainer.step += 1
            losses.append(float(reading.loss.mean()))
    parameters = sum(p.numel() for p in trainer.parameters)
    images = batch["images"]
    count = "a stream of" if config.streaming else f"{len(trainer.data):,}"
    left = max(config.max_train_steps - start, 0)
    held_out = 0 if trainer.held_out is None else len(trainer.held_out)
    return "\n".join(
        [
            to_yaml(config),
            f"data        {count} images {trainer.data.shape}, {held_out:,} held out; this batch "
            f"in [{images.min():.3f}, {images.max():.3f}], levels: {trainer.data.levels}",
            *_classes(trainer),
            f"batch       {config.batch_size} = {share.num_processes} processes x {share.parts} "
            f"parts x {share.rows} images",
            f"parameters  {parameters:,}",
            f"memory      {_memory(trainer)}",
            f"loss        {losses[0]:.4f} at step {start}",
            f"time        {seconds:.2f} s a step, without validation and sampling about "
            f"{duration(seconds * left)} for {left:,} steps",
        ]
    )


def _classes(trainer: "Trainer") -> list[str]:
    if (classes := trainer.data.classes) is None:
        return []
    null = "no null class" if trainer.null_class is None else "a null class"
    if trainer.null_class is not None:
        null += f", which takes the place of {100 * trainer.label_dropout:g} % of the labels"
    return [f"classes     {classes.count} and {null}"]


def _memory(trainer: "Trainer") -> str:
    size = sum(p.numel() * p.element_size() for p in trainer.parameters)
    copies = 4 + (trainer.average.ema is not None)  # weights, gradients, two moments, average
    if trainer.device.type == "cuda":
        peak, what = torch.cuda.max_memory_allocated(trainer.device), "peak on the device"
    else:
        # In bytes on macOS, in KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        what = "peak of the process"
    return (
        f"{copies * size / 2**20:,.0f} MiB for weights, gradients, AdamW and average; "
        f"{peak / 2**20:,.0f} MiB {what}"
    )
