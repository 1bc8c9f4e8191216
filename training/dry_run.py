"""What a run would be: its settings, a batch, one step, its size and how long it would take."""

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from ddim_schedulers.training.batches import make_loader
from ddim_schedulers.training.parsing import to_yaml
from ddim_schedulers.training.records import Window
from ddim_schedulers.training.streams import StreamBatches

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer import Trainer


def report(trainer: "Trainer") -> str:
    """Does one step to warm up and one to measure; writes nothing to `output_dir`.

    Returns:
        Text for the terminal: settings, data, parameters, memory, loss of the first step, time.
    """
    config, share = trainer.config, trainer.share
    if isinstance(trainer.batches, StreamBatches):
        trainer.batches.stop = 2
    batch = next(iter(make_loader(trainer.batches, 0, 1, 0, False)))
    loader = iter(make_loader(trainer.batches, 0, 2, config.num_workers, False))
    window, seconds = Window(share, 0), 0.0
    for _ in range(2):
        began = time.perf_counter()
        trainer.one_step(loader, window)
        reading = window.read(trainer.accelerator, stop=False)
        seconds = time.perf_counter() - began
        trainer.step += 1
        if trainer.step == 1:
            first = float(reading.loss.mean())
    parameters = sum(p.numel() for p in trainer.parameters)
    images = batch["images"]
    count = "a stream of" if config.streaming else f"{len(trainer.data):,}"
    held_out = 0 if trainer.held_out is None else len(trainer.held_out)
    return "\n".join(
        [
            to_yaml(config),
            f"data        {count} images {trainer.data.shape}, {held_out:,} held out; this batch "
            f"in [{images.min():.3f}, {images.max():.3f}], levels: {trainer.data.levels}",
            f"batch       {config.batch_size} = {share.num_processes} processes x {share.parts} "
            f"parts x {share.rows} images",
            f"parameters  {parameters:,}",
            f"memory      {_memory(trainer)}",
            f"loss        {first:.4f} at the first step",
            f"time        {seconds:.2f} s a step, without validation and sampling about "
            f"{_duration(seconds, config.max_train_steps)} for {config.max_train_steps:,} steps",
        ]
    )


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


def _duration(seconds: float, steps: int) -> str:
    total = seconds * steps
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if total >= 2 * length:
            return f"{total / length:.1f} {unit}"
    return f"{total:.0f} seconds"
