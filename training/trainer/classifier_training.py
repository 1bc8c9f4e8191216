"""Training of a `NoisyClassifier`: cross-entropy at every t, on the same draws as a network's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddim_schedulers.training.common.seeds import derive_seed
from ddim_schedulers.training.data.batches import Draws, MapBatches, Share, open_loader
from ddim_schedulers.training.data.images import ImageData
from ddim_schedulers.training.networks.noisy_classifier import NoisyClassifier
from ddim_schedulers.training.trainer.validation import noise_of

# Shares of T at which the accuracy on held-out images is told.
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def train_noisy_classifier(
    data: ImageData,
    held_out: ImageData,
    alpha_bar: Tensor,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    process: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[NoisyClassifier, dict[str, Any]]:
    """Train a classifier of noisy images.

    Args:
        data: images with classes.
        held_out: others of them, on which the accuracy is measured.
        alpha_bar: float64 (T,), of the process.
        steps: optimiser steps.
        batch_size: images in a step.
        lr: peak rate of AdamW, with a cosine decay to zero.
        seed: of weights, order, noise and t.
        num_workers: processes that prepare batches.
        device: of the classifier.
        process: settings of the process, which are kept with the classifier.
        progress: called with a line of text now and then, or None.

    Returns:
        the classifier in evaluation mode, and a record: settings, `loss` at the end, and `accuracy`
        by t on the `held_out_n` images.

    Raises:
        ValueError: images without classes.
    """
    if data.classes is None:
        raise ValueError("`data` has no classes; it must be read with class_conditional")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        classifier = NoisyClassifier(
            data.size,
            data.channels,
            data.classes.count,
            len(alpha_bar),
            class_names=list(data.classes.names) or None,
            process=process,
        ).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = MapBatches(
        data, Draws(seed, batch_size, True, False, False), Share(batch_size, 1, 0, 1)
    )
    table = alpha_bar.to(device, torch.float32)
    pinned = torch.device(device).type == "cuda"
    losses: list[Tensor] = []
    with open_loader(batches, 0, steps, num_workers, pinned) as loader:
        for number, batch in enumerate(loader):
            x0, noise, u, labels = (
                batch[name].to(device, non_blocking=True)
                for name in ("images", "noise", "u", "labels")
            )
            t = (u * len(alpha_bar)).long()
            loss = F.cross_entropy(classifier(_noisy(x0, noise, table[t]), t), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            losses.append(loss.detach())
            if progress is not None and (number + 1) % max(1, steps // 10) == 0:
                recent = float(torch.stack(losses[-100:]).mean())
                progress(f"classifier: step {number + 1} of {steps}, loss {recent:.3f}")
    classifier.eval().requires_grad_(False)
    record = {
        "accuracy": accuracy_by_t(classifier, held_out, alpha_bar, seed=seed),
        "held_out_n": len(held_out),
        "train_n": len(data),
        "loss": round(float(torch.stack(losses[-100:]).mean()), 4),
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    return classifier, record


def levels_of(big_t: int) -> list[int]:
    """Return the timesteps of a process of T steps at which a classifier is judged."""
    return [int(share * big_t) for share in LEVELS]


@torch.no_grad()
def accuracy_by_t(
    classifier: NoisyClassifier,
    data: ImageData,
    alpha_bar: Tensor,
    *,
    seed: int,
    batch_size: int = 250,
) -> dict[str, float]:
    """Return the share of images that are recognised, by t, with noise of each image's own."""
    device, found = classifier.device, {}
    for step in levels_of(len(alpha_bar)):
        right = 0
        for rows in torch.arange(len(data)).split(batch_size):
            x0, labels = data.batch(rows.numpy())[0], data.labels(rows.numpy())
            noise = noise_of("classifier", seed, rows, data.shape)
            x_t = _noisy(x0, noise, alpha_bar[step].float())
            guess = classifier(x_t.to(device), step).argmax(1).cpu()
            right += int((guess == labels).sum())
        found[str(step)] = round(right / len(data), 4)
    return found


def _noisy(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t (DDPM, arXiv:2006.11239, Eq. 4); alpha_bar is one or (B,)."""
    a = alpha_bar.reshape(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise
