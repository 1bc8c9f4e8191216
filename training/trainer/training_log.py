"""Losses and flags: kept on the device between readings, then shown, written down and returned."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.reading import DamagedFileError, parse_json
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.batches import Share


@dataclass
class Reading:
    """What was read back for some steps, on the host, float64.

    Attributes:
        first: number of the first step, from 0.
        t: (steps, G) timesteps, in the order of the global batch.
        loss: (steps, G) losses as they were averaged.
        error: (steps, G) unweighted squared errors of the prediction.
        norms: (steps,) gradient norms.
        stop_requested: a signal came to one of the processes.
        replaced: broken images for which a neighbour was used.
    """

    first: int
    t: Tensor
    loss: Tensor
    error: Tensor
    norms: Tensor
    stop_requested: bool
    replaced: int

    def failed_steps(self, fp16: bool) -> list[int]:
        """Return the steps that were not applied, without the routine overflows of fp16."""
        bad = ~torch.isfinite(self.loss).all(1)
        if not fp16:
            bad |= ~torch.isfinite(self.norms)
        return [self.first + int(i) for i in bad.nonzero().flatten()]

    def of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Return t and loss (G,) of one step."""
        return self.t[step - self.first], self.loss[step - self.first]

    def norm_of(self, step: int) -> float:
        """Return the gradient norm of one step."""
        return float(self.norms[step - self.first])


class Window:
    """Collects references to small device tensors since the last reading; copies nothing."""

    def __init__(self, share: Share, first: int) -> None:
        self.share, self.first = share, first
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._raw: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._replaced = 0

    def add(self, t: Tensor, raw: Tensor, loss: Tensor, error: Tensor, replaced: int) -> None:
        """Add one part of a step: timesteps, losses before and after the weights, errors."""
        self._rows.append((t, loss, error))
        self._raw.append(raw)
        self._replaced += replaced

    def close_step(self, norm: Tensor) -> None:
        """Add the gradient norm, which ends a step."""
        self._norms.append(norm.detach())

    def last_step(self) -> tuple[Tensor, Tensor]:
        """Return t and unweighted loss of this process in the last step, part after part."""
        parts = self.share.parts
        t = torch.cat([row[0] for row in self._rows[-parts:]])
        return t, torch.cat(self._raw[-parts:])

    def norms(self) -> Tensor:
        """Return the gradient norms (steps,) since the last reading, equal on all processes."""
        return torch.stack(self._norms).cpu().double() if self._norms else torch.empty(0)

    def read(self, accelerator: Accelerator, stop: bool) -> Reading:
        """Gather over processes and read once."""
        share, steps = self.share, len(self._norms)
        dtype = self._rows[0][1].dtype
        table = torch.stack([torch.stack([t.to(dtype), loss, e]) for t, loss, e in self._rows])
        norms = torch.stack(self._norms).to(dtype)
        flags = torch.tensor([float(stop), float(self._replaced)], dtype=dtype).to(
            table.device, non_blocking=True
        )
        flat = torch.cat([table.flatten(), norms, flags])
        if accelerator.num_processes > 1:
            flat = accelerator.gather(flat)
        host = flat.cpu().double().reshape(share.num_processes, -1)
        size = steps * share.parts * 3 * share.rows
        table = host[:, :size].reshape(share.num_processes, steps, share.parts, 3, share.rows)
        # (process, step, part, kind, row) -> kind, step, and the order of the global batch
        t, loss, error = table.permute(3, 1, 2, 0, 4).reshape(3, steps, share.batch_size)
        reading = Reading(
            first=self.first,
            t=t.long(),
            loss=loss,
            error=error,
            norms=host[0, size : size + steps],
            stop_requested=bool(host[:, -2].any()),
            replaced=int(host[:, -1].sum()),
        )
        self.first += steps
        self._clear()
        return reading


class TrainingLog:
    """The history of a session: progress bar, `metrics.jsonl`, and the losses of the result."""

    def __init__(self, root: Path, is_main: bool) -> None:
        self.path, self.is_main = root / "metrics.jsonl", is_main
        self.losses: list[float] = []
        self.skipped = 0
        self.replaced = 0
        self._bar: Any = None
        self._clock = (0, time.perf_counter())

    @contextlib.contextmanager
    def progress(self, config: TrainingConfig, start: int) -> Iterator[None]:
        """Show a bar over all steps of the run, on the main process only."""
        from tqdm.auto import tqdm

        shown = self.is_main and config.progress_bar
        self._clock = (start, time.perf_counter())
        with tqdm(
            total=config.max_train_steps,
            initial=start,
            disable=not shown,
            unit="step",
            desc="train",
        ) as self._bar:
            yield

    @property
    def recent_loss(self) -> float:
        """Return the mean of the last 100 losses of this session; NaN before the first."""
        recent = self.losses[-100:]
        return sum(recent) / len(recent) if recent else float("nan")

    def take(self, reading: Reading, step: int, rate: float, batch_size: int) -> dict[str, float]:
        """Show and write one reading; return what a tracker should log."""
        losses = reading.loss.mean(1)
        self.losses += losses.tolist()
        self.skipped += int((~torch.isfinite(reading.norms)).sum())
        self.replaced += reading.replaced
        now = time.perf_counter()
        rate_images = (step - self._clock[0]) * batch_size / max(now - self._clock[1], 1e-9)
        self._clock = (step, now)
        values = {
            "loss": float(losses.mean()),
            "mse": float(reading.error.mean()),
            "lr": rate,
            "grad_norm": float(reading.norms.mean()),
            "images_per_s": rate_images,
            "skipped_steps": float(self.skipped),
            "replaced_images": float(self.replaced),
        }
        if self._bar is not None:
            self._bar.set_postfix(
                loss=f"{self.recent_loss:.4f}",
                lr=f"{rate:.1e}",
                images_s=f"{rate_images:.0f}",
                refresh=False,
            )
            self._bar.update(step - self._bar.n)
        self.write({"step": step, **values})
        return values

    def restart_clock(self, step: int) -> None:
        """Leave out of `images_per_s` what was not training."""
        self._clock = (step, time.perf_counter())

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def show_pictures(self, trackers: list[Any], folder: Path, step: int) -> None:
        """Hand the pictures of `step` to trackers; that of trackio takes none."""
        from PIL import Image

        if not self.is_main:
            return
        for path in sorted(folder.glob(f"*-{step:08d}.png")):
            with Image.open(path) as image:
                pictures = {path.stem.split("-")[0]: np.asarray(image.convert("RGB"))[None]}
            for tracker in trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images(pictures, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images(pictures, step=step)

    def _lines(self) -> list[str]:
        """Return the lines of `metrics.jsonl`; bytes that are no text are replaced."""
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()

    def curve(self) -> tuple[list[int], list[float]]:
        """Return steps and training losses of all sessions, from `metrics.jsonl`."""
        lines = [content for line in self._lines() if (content := _content(line)) is not None]
        points = [(x["step"], x["loss"]) for x in lines if isinstance(x.get("loss"), int | float)]
        return [step for step, _ in points], [loss for _, loss in points]

    def rewind(self, step: int) -> None:
        """Drop what a session that died wrote after `step`, where this one begins."""
        if self.is_main and self.path.exists():
            kept = [
                line
                for line in self._lines()
                if (content := _content(line)) is not None and content["step"] <= step
            ]
            text = "".join(f"{line}\n" for line in kept)
            write_bytes(self.path, text.encode())


def _content(line: str) -> dict[str, Any] | None:
    """Return what a line says; None for one that was cut short or changed."""
    try:
        content: dict[str, Any] = parse_json(line, "metrics.jsonl")
    except DamagedFileError:
        return None
    return content if type(content.get("step")) in (int, float) else None
