"""The classes that a caller asks for: names, numbers and mixtures, read into tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddim_schedulers.class_labels import ClassLabels

Label = int | str


@dataclass(frozen=True)
class ClassMixture:
    """Labels that lie between classes: the product of their densities to the powers `weights`.

    eps of an image is sum_k u_k eps(x_t, c_k), in one network call of a batch of K times the size
    (arXiv:2206.01714, with weights that sum to 1). Weights of 1 and 0 are the first class.

    Attributes:
        labels: K classes, names or numbers, for all images; or such a list for each image.
        weights: u, one row of K numbers for each image, each row sums to 1.
    """

    labels: Sequence[Label] | Sequence[Sequence[Label]]
    weights: Sequence[Sequence[float]] | torch.Tensor


ClassLabelInput = Label | Sequence[Label] | np.ndarray | torch.Tensor | ClassMixture


def count_of(labels: ClassLabelInput | None) -> int | None:
    """Return for how many images labels are; None for one that serves all."""
    if isinstance(labels, ClassMixture):
        return count_of(labels.weights)  # type: ignore[arg-type]
    if isinstance(labels, np.ndarray | torch.Tensor):
        return labels.shape[0] if labels.ndim else None
    return len(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else None


def label_numbers(
    labels: Any,  # noqa: ANN401
    classes: ClassLabels | None,
    name: str = "class_labels",
) -> list[int]:
    """Return the numbers of a list, array or tensor of labels.

    Args:
        labels: names or numbers.
        classes: which there are; None where a classifier alone knows: any number >= 0.
        name: of the argument, for the message.

    Raises:
        ValueError: naming the first that is no class.
    """
    if isinstance(labels, np.ndarray | torch.Tensor):
        if labels.ndim != 1:
            raise ValueError(f"`{name}` has shape {tuple(labels.shape)}; it must be (N,).")
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ValueError(
            f"`{name}` is {labels!r}; it must be the name or the number of a class, or a list, "
            "array or tensor of them, one for each image in their order."
        )
    return [_number(label, classes, f"{name}[{i}]") for i, label in enumerate(labels)]


def _number(label: Any, classes: ClassLabels | None, name: str) -> int:  # noqa: ANN401
    if isinstance(label, np.integer):
        label = int(label)
    if classes is not None:
        return classes.number(label, name)
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError(f"`{name}` is {label!r}; it must be the number of a class, >= 0.")
    return label


def read_labels(
    labels: ClassLabelInput, classes: ClassLabels | None, num_images: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return labels int64 (N, K), and for a mixture its weights (N, K).

    Args:
        labels: of the caller; K = 1 unless it is a mixture.
        classes: which there are; None where a classifier alone knows: any number >= 0.
        num_images: N.
        device: where the tensors go.

    Raises:
        ValueError: naming the label that is no class, or the shape that does not fit.
    """
    if isinstance(labels, ClassMixture):
        return _read_mixture(labels, classes, num_images, device)
    if count_of(labels) is None:
        one = labels.item() if isinstance(labels, np.ndarray | torch.Tensor) else labels
        numbers = [_number(one, classes, "class_labels")] * num_images
    else:
        numbers = label_numbers(labels, classes)
    if len(numbers) != num_images:
        raise ValueError(
            f"`class_labels` has {len(numbers)} labels for {num_images} images; it must have one "
            "for each, or be a single label for all."
        )
    return torch.tensor(numbers, device=device)[:, None], None


def _read_mixture(
    mixture: ClassMixture, classes: ClassLabels | None, num_images: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        weights = torch.as_tensor(mixture.weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`class_labels.weights` is {mixture.weights!r}; it must be a row of numbers for each "
            "image, all of one length."
        ) from error
    rows: list[Any] = list(mixture.labels)
    if not rows or not isinstance(rows[0], list | tuple):
        rows = [rows] * num_images
    numbers = [label_numbers(row, classes, "class_labels.labels") for row in rows]
    shape = (num_images, len(numbers[0]))
    if {len(row) for row in numbers} != {shape[1]} or len(numbers) != num_images:
        raise ValueError(
            f"`class_labels.labels` has rows of {sorted({len(r) for r in numbers})} labels for "
            f"{len(numbers)} images; it must be K labels for each of {num_images} images."
        )
    if tuple(weights.shape) != shape or not bool(weights.isfinite().all()):
        raise ValueError(
            f"`class_labels.weights` has shape {tuple(weights.shape)}; it must be {shape} finite "
            "numbers, a row for each image and a column for each label."
        )
    if bool(((weights.sum(dim=1) - 1).abs() > 1e-6).any()):
        raise ValueError("`class_labels.weights` has rows whose sum is not 1; each must sum to 1.")
    return torch.tensor(numbers, device=device), weights.to(device)
