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
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddim_schedulers.pipelines.fingerprints import weights_fingerprint
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.common.repositories import divided
from ddim_schedulers.training.metrics.classifier import CLASSIFIER_KIND as CLASSIFIER_KIND
from ddim_schedulers.training.metrics.classifier import SmallClassifier as SmallClassifier
from ddim_schedulers.training.metrics.classifier import class_names as class_names
from ddim_schedulers.training.metrics.classifier import classifier_facts as classifier_facts
from ddim_schedulers.training.metrics.classifier import load_classifier as load_classifier
from ddim_schedulers.training.metrics.classifier import save_classifier as save_classifier
from ddim_schedulers.training.metrics.classifier import train_classifier as train_classifier

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
    if source := getattr(module, "__file__", None):  # a module may have no weights
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
