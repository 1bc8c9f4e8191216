"""A small classifier of one's own images, whose features are a feature space (`features`)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.fingerprints import fingerprint_of
from ddim_schedulers.reading import DamagedFileError, parse_json, read_safetensors
from ddim_schedulers.training.common.seals import SEAL
from ddim_schedulers.training.common.seeds import generator

CLASSIFIER_KIND = "ddim_schedulers.small_classifier"


class SmallClassifier(torch.nn.Module):
    """Three convolutions and two linear layers; the features are what the last layer sees.

    Args:
        shape: (C, H, W) of the images.
        num_classes: K.

    Attributes:
        called: what the data call the classes, K names or numbers; empty where that is not known.
    """

    num_features = 128
    called: tuple[str | int, ...] = ()

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.shape, self.num_classes = tuple(shape), num_classes
        layers: list[torch.nn.Module] = []
        widths = (shape[0], 32, 64, 128)
        for i in range(3):
            layers += [
                torch.nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 if i == 0 else 2, padding=1),
                torch.nn.GroupNorm(8, widths[i + 1]),
                torch.nn.ReLU(),
            ]
        layers += [torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
        layers += [torch.nn.Linear(4 * widths[-1], self.num_features), torch.nn.ReLU()]
        self.body = torch.nn.Sequential(*layers)
        self.output = torch.nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to features (B, 128).

        Raises:
            ValueError: images of another shape than the ones it was made for.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"`images` are {tuple(images.shape[1:])} (C, H, W); they must be {self.shape}, as "
                "those that the classifier was trained on"
            )
        return self.body(images)

    def head(self, features: Tensor) -> Tensor:
        """Return the logits (B, K) of features (B, 128)."""
        return self.output(features)


def train_classifier(
    images: Callable[[np.ndarray], Tensor],
    labels: np.ndarray,
    shape: tuple[int, int, int],
    *,
    epochs: int = 3,
    batch_size: int = 128,
    lr: float = 2e-3,
    held_out: float = 0.05,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[SmallClassifier, dict[str, Any]]:
    """Train a `SmallClassifier` on a labelled set.

    Args:
        images: gives the images (B, C, H, W) in [-1, 1] at positions (B,).
        labels: (n,) class numbers 0 .. K - 1.
        shape: (C, H, W).
        epochs: passes over the training part.
        batch_size: images in a step.
        lr: peak rate of AdamW, with a cosine decay to zero.
        held_out: share of the images on which the accuracy is measured.
        seed: of weights, split and order.
        progress: called with a line of text after each epoch, or None.

    Returns:
        the network in evaluation mode, and its facts: `accuracy` on the `held_out_n` images that it
        has not seen, `train_n`, `classes` and the settings.

    Raises:
        ValueError: for fewer than two classes, or labels that are not 0 .. K - 1.
    """
    classes = np.unique(labels)
    if len(classes) < 2 or classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise ValueError(
            f"`labels` has the classes {classes[:12].tolist()}; they must be 0 .. K - 1, K >= 2"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    aside = max(1, round(held_out * len(labels)))
    test, train = np.sort(order[:aside]), order[aside:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallClassifier(shape, len(classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    steps = epochs * -(-len(train) // batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        shuffled = torch.randperm(len(train), generator=generator(seed, "classifier", epoch))
        for rows in shuffled.split(batch_size):
            chosen = train[rows.numpy()]
            loss = F.cross_entropy(
                network.head(network(images(chosen))), torch.from_numpy(labels[chosen]).long()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        if progress is not None:
            progress(f"classifier: epoch {epoch + 1} of {epochs}, loss {float(loss.detach()):.3f}")
    network.eval().requires_grad_(False)
    right = 0
    for start in range(0, len(test), 500):
        chosen = test[start : start + 500]
        guess = network.head(network(images(chosen))).argmax(1).numpy()
        right += int((guess == labels[chosen]).sum())
    facts = {
        "accuracy": round(right / len(test), 4),
        "held_out_n": len(test),
        "train_n": len(train),
        "classes": len(classes),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    return network, facts


def save_classifier(network: SmallClassifier, facts: dict[str, Any], path: Path) -> None:
    """Write a classifier and its facts as one safetensors file, whole or not at all."""
    from safetensors.torch import save

    metadata = {
        "kind": CLASSIFIER_KIND,
        "shape": json.dumps(network.shape),
        "num_classes": str(network.num_classes),
        "record": json.dumps(facts),
        "called": json.dumps(network.called),
    }
    tensors = network.state_dict()
    metadata[SEAL] = fingerprint_of(tensors, json.dumps(metadata, sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, metadata))


def load_classifier(path: str | Path) -> SmallClassifier:
    """Read what `save_classifier` wrote.

    Raises:
        ValueError: no such file, one of another kind, or one that is not whole.
    """
    return _read_classifier(path)[0]


def classifier_facts(path: str | Path) -> dict[str, Any]:
    """Return the facts that `train_classifier` made of the classifier in a file."""
    return _read_classifier(path)[1]


def _read_classifier(path: str | Path) -> tuple[SmallClassifier, dict[str, Any]]:
    tensors, metadata = read_safetensors(path)
    if metadata.get("kind") != CLASSIFIER_KIND:
        raise ValueError(
            f"`feature_space` is {str(path)!r}, which holds no classifier that this package "
            "trained; it must hold one"
        )
    if SEAL in metadata:  # classifiers of earlier versions have none
        rest = {name: text for name, text in metadata.items() if name != SEAL}
        if metadata[SEAL] != fingerprint_of(tensors, json.dumps(rest, sort_keys=True)):
            raise DamagedFileError(path, "its contents have changed")
    shape = parse_json(metadata.get("shape", ""), path, list)
    count = parse_json(metadata.get("num_classes", ""), path, int)
    facts = parse_json(metadata.get("record", ""), path, dict, finite=True)
    if [type(side) for side in shape] != [int] * 3 or min(*shape, count) < 1:
        raise DamagedFileError(path, f"its images are {shape}, its classes {count}")
    counts = ("epochs", "seed", "train_n", "held_out_n", "classes")
    if not all(type(facts.get(name)) is int for name in counts):
        raise DamagedFileError(path, f"its facts do not say {', '.join(counts)}")
    with torch.device("meta"):  # shapes alone: nothing is allocated before they are known to fit
        network = SmallClassifier(tuple(shape), count)
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise DamagedFileError(path, "its weights do not fit the shapes that it names")
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in tensors.values()):
        raise DamagedFileError(path, "its weights hold values that are not finite")
    called = parse_json(metadata.get("called", "[]"), path, list)  # earlier versions have none
    if not all(type(label) in (str, int) for label in called) or len(called) not in (0, count):
        raise DamagedFileError(path, "it does not tell what its classes are called")
    network.to_empty(device="cpu").load_state_dict(tensors)
    network.called = tuple(called)
    return network.eval().requires_grad_(False), facts


def class_names(labels: Sequence[Any] | np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Return distinct labels in order, and for each label its number 0 .. K - 1, (n,) int64."""
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return names.tolist(), numbers.reshape(-1).astype(np.int64)
