"""Feature spaces: networks that map images to vectors, in which sets of images are compared.

A feature space is any `torch.nn.Module` that maps images (B, C, H, W) in [-1, 1] to features
(B, F). If it has a method `head` that maps its features to logits (B, K), an Inception score can be
computed from it as well.

| name | network |
|---|---|
| `pixels` | none: images averaged down to at most 8x8 |
| `details` | none: differences of pixels that lie side by side, averaged down to at most 4x4 |
| `FILE.safetensors` | a classifier that `train_classifier` made and `save_classifier` wrote |
| `package.module:Name` | what calling `Name` without arguments returns |
| `inception` | the InceptionV3 of the published FIDs, through torch-fidelity |
| `dinov2`, `dinov2:MODEL` | the CLS token of DINOv2, through transformers (ViT-B/14 if not said) |
| `dinov2:MODEL@REVISION` | of a branch, tag or commit |
"""

import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.fingerprints import fingerprint_of, weights_fingerprint
from ddim_schedulers.reading import DamagedFileError, parse_json, read_safetensors
from ddim_schedulers.training.common.repositories import divided
from ddim_schedulers.training.common.seals import SEAL
from ddim_schedulers.training.common.seeds import generator

CLASSIFIER_KIND = "ddim_schedulers.small_classifier"
DINOV2 = "facebook/dinov2-base"
# Mean and standard deviation of ImageNet in [0, 1], which DINOv2 was trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PooledPixels(torch.nn.Module):
    """The feature space `pixels`: images averaged down to at most 8x8 and flattened, float64."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = (min(8, shape[1]), min(8, shape[2]))
        self.num_features = shape[0] * self.size[0] * self.size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to features (B, num_features)."""
        return F.adaptive_avg_pool2d(images.double(), self.size).flatten(1)


class PooledDetails(torch.nn.Module):
    """The feature space `details`: grain and edges, which `pixels` averages away.

    Absolute differences to the pixel on the right and to the one below, averaged down to at most
    4x4 and flattened, float64.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = (min(4, shape[1]), min(4, shape[2]))
        self.num_features = 2 * shape[0] * self.size[0] * self.size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to features (B, num_features)."""
        rows = images.double()
        aside, below = rows.diff(dim=3).abs(), rows.diff(dim=2).abs()
        pooled = [F.adaptive_avg_pool2d(part, self.size).flatten(1) for part in (aside, below)]
        return torch.cat(pooled, dim=1)


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


class InceptionFeatures(torch.nn.Module):
    """The 2048 features of the InceptionV3 that published FIDs use; grey images become colour.

    Args:
        network: torch-fidelity's extractor with the features '2048': uint8 (B, 3, H, W) to a tuple.
            It resizes as the TensorFlow original does.
    """

    num_features = 2048
    network: Any

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1 or 3, H, W) in [-1, 1] to features (B, 2048)."""
        return self.network(((_colour(images) + 1) * 127.5).round().to(torch.uint8))[0]

    def head(self, features: Tensor) -> Tensor:
        """Return logits (B, 1008) without the bias, as the published Inception scores use them."""
        return features @ self.network.fc.weight.T


class DinoFeatures(torch.nn.Module):
    """The CLS token of a DINOv2 at 224x224; grey images become colour.

    Args:
        network: a `Dinov2Model` of transformers.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_features = int(network.config.hidden_size)
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1 or 3, H, W) in [-1, 1] to features (B, num_features)."""
        large = F.interpolate(
            _colour(images), (224, 224), mode="bicubic", align_corners=False, antialias=True
        )
        unit = (large.clamp(-1, 1) + 1) / 2
        return self.network(pixel_values=(unit - self.mean) / self.std).pooler_output


def _colour(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"`images` have {images.shape[1]} channels; inception and dinov2 take 1 or 3, choose "
            "another feature space"
        )
    return images.expand(-1, 3, -1, -1)


def make_feature_space(name: str, shape: tuple[int, int, int]) -> torch.nn.Module:
    """Return the network of a feature space, in evaluation mode on the CPU.

    Args:
        name: see the module's text.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: the name cannot be imported, gives something else, or its weights cannot be had.
    """
    if name == "pixels":
        return PooledPixels(shape)
    if name == "details":
        return PooledDetails(shape)
    if name == "inception":
        return _inception()
    if name == "dinov2" or name.startswith("dinov2:"):
        return _dinov2(name.partition(":")[2] or DINOV2)
    if name.endswith(".safetensors"):
        try:
            return load_classifier(name)
        except DamagedFileError as error:
            raise ValueError(
                f"`feature_space` is {name!r}, a classifier that cannot be read; its file must be "
                f"whole: {error.reason}"
            ) from error
    return _imported(name)


def _imported(name: str) -> torch.nn.Module:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
            raise ValueError(
                f"`{attribute}` is no class of torch.nn.Module, and is not called; it must be one"
            )
        made = found()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"`feature_space` is {name!r}; it must be 'pixels', 'details', 'inception', 'dinov2', "
            "a classifier's .safetensors file, or module:Name of a torch.nn.Module class: "
            f"{error}"
        ) from error
    return made.eval()


def _inception() -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:  # a failed download is one
        raise ValueError(_unavailable("inception", "torch-fidelity", error)) from error
    return InceptionFeatures(network).eval()


def _dinov2(model: str) -> torch.nn.Module:
    from transformers import Dinov2Model

    name, revision = (model, None) if Path(model).exists() else divided(model)
    try:
        network = Dinov2Model.from_pretrained(
            name, revision=revision or "main", use_safetensors=True
        )
    except OSError as error:
        raise ValueError(_unavailable(f"dinov2:{model}", "transformers", error)) from error
    return DinoFeatures(network).eval()


def commit_of(network: torch.nn.Module) -> str | None:
    """Return the commit of a feature space's repository, if transformers knows it."""
    config = getattr(getattr(network, "network", None), "config", None)
    return getattr(config, "_commit_hash", None)


def _unavailable(name: str, package: str, error: OSError) -> str:
    reason = str(error).partition("\n")[0]
    return (
        f"`feature_space` is {name!r}, whose weights {package} downloads once, and they cannot be "
        f"had: {reason}; run once with a connection, or choose 'pixels' or a trained classifier"
    )


def space_fingerprint(name: str, network: torch.nn.Module) -> str:
    """Return the SHA-256 of a feature space.

    It covers name and class, every weight, and the code of an imported one.
    """
    # the weights identify a classifier, not the place of its file
    label = "" if isinstance(network, SmallClassifier) else name
    module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
    if source := getattr(module, "__file__", None):  # what a module without weights consists of
        label += hashlib.sha256(Path(source).read_bytes()).hexdigest()
    text = f"{label}/{type(network).__qualname__}/{weights_fingerprint(network)}"
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def extract(network: torch.nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """Return the features (n, F) of images on the CPU, in the network's dtype.

    Args:
        network: of `make_feature_space`, on any device.
        images: (n, C, H, W) in [-1, 1].
        batch_size: images in a call. Features of an image may depend on it in the last bit.

    Raises:
        ValueError: the network gives something else than (B, F).
    """
    first = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
    parts = []
    for part in images.split(batch_size):
        features = network(part.to(first.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(part):
            found = getattr(features, "shape", type(features).__name__)
            raise ValueError(
                f"`feature_space` is {type(network).__name__}, which gives {found} for {len(part)} "
                "images; it "
                "must give a tensor (B, F)"
            )
        parts.append(features.cpu())
    return torch.cat(parts)


# -- a classifier of one's own --------------------------------------------------------------------


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
        the network in evaluation mode, and a facts: `accuracy` on the `held_out_n` images that it
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
        raise DamagedFileError(path, f"its facts does not say {', '.join(counts)}")
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
