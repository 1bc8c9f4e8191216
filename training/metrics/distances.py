"""Distances between two sets of images, from their features; everything in float64 on the CPU.

Frechet and kernel distance are torchmetrics'; the features are computed once and handed to it.
Measurements of different numbers of samples cannot be compared: each of these estimates moves
with n.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """What an evaluation knows of a metric besides its value.

    Attributes:
        name: in a report.
        low: the least value that can be; a value below it is damage.
        high: the largest.
        scale: the factor of the values in a table.
        of_classes: whether it is measured only where a feature space has a classifier.
        of_labels: whether it is measured only where the samples were asked for by class, too.
        of_ode: whether it is measured only for deterministic rows, and where it is asked for.
        distance: whether it is a distance, of which less is better; of any other more is better.
        form: how a table writes it, as `format` takes it.
    """

    name: str
    low: float
    high: float
    scale: float = 1.0
    of_classes: bool = False
    of_labels: bool = False
    of_ode: bool = False
    distance: bool = False
    form: str = ".3f"

    @property
    def heading(self) -> str:
        """Return the heading of its column."""
        return self.name if self.scale == 1 else f"{self.name} x {self.scale:g}"


# Every metric of an evaluation, in the order of the columns; `RealImages.measure` measures them.
# A Frechet distance that is zero may be negative by rounding; the kernel one is unbiased, so that
# it may be negative anyway.
METRICS = {
    "frechet": Metric("Frechet", -1e-2, math.inf, distance=True),
    "kernel": Metric("kernel", -math.inf, math.inf, scale=1000.0, distance=True),
    "precision": Metric("precision", 0, 1),
    "recall": Metric("recall", 0, 1),
    "density": Metric("density", 0, math.inf),
    "coverage": Metric("coverage", 0, 1),
    "inception_score": Metric("Inception score", 1 - 1e-6, math.inf, of_classes=True),
    "recognised": Metric("recognised", 0, 1, of_labels=True),
    "endpoint": Metric("end-point error", 0, 4, scale=1000.0, distance=True, of_ode=True),
}


class _Given(torch.nn.Module):
    """What torchmetrics takes for a feature network when the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_metric(network: torch.nn.Module, **settings: Any) -> Any:
    """Return torchmetrics' Frechet distance over the features of a network.

    Despite its name it takes any features. Their moments are summed over processes in float64, and
    those of the real images stay after `reset`.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(network, reset_real_features=False, **settings)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets (FID, arXiv:1706.08500).

    Args:
        real: features (m, F), m >= 2.
        fake: features (n, F), n >= 2.

    Raises:
        ValueError: fewer than two rows, other shapes, or values that are not finite.
    """
    real, fake = _checked(real, fake)
    # every process has all features in one order: any number of processes gives one distance
    metric = frechet_metric(_Given(real.shape[1]), sync_on_compute=False)
    # The same centre for both changes nothing in the distance; moments about it lose fewer digits.
    centre = real.mean(0)
    metric.update(real - centre, real=True)
    metric.update(fake - centre, real=False)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 20, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the unbiased MMD^2 with the kernel (x y / F + 1)^3 (KID, arXiv:1801.01401).

    Args:
        real: features (m, F).
        fake: features (n, F).
        subsets: random subsets that it is averaged over.
        subset_size: rows in a subset; at most m and n are taken.
        seed: of the subsets.

    Returns:
        mean and standard deviation over the subsets.

    Raises:
        ValueError: as `frechet_distance`.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = _checked(real, fake)
    size = min(subset_size, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        metric: Any = KernelInceptionDistance(
            _Given(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws from the global generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def neighbour_metrics(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Return precision, recall (arXiv:1904.06991), density, coverage (arXiv:2002.09797).

    A ball around each row reaches to its k-th nearest other row of the same set. Precision is the
    share of fake rows inside a real ball, recall the share of real rows inside a fake ball, density
    the mean number of real balls that a fake row is inside of, over k, and coverage the share of
    real balls with a fake row inside.

    Args:
        real: features (m, F), m > k.
        fake: features (n, F), n > k.
        k: which neighbour.

    Raises:
        ValueError: as `frechet_distance`, or for k out of 1 .. min(m, n) - 1.
    """
    real, fake = _checked(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"`k` is {k}; it must be 1 to {min(len(real), len(fake)) - 1}, below n")
    real_radius, fake_radius = _radius(real, k), _radius(fake, k)
    inside_fake = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    balls = []
    for start in range(0, len(fake), 1000):
        distance = torch.cdist(real, fake[start : start + 1000])
        within = distance < real_radius[:, None]
        balls.append(within.sum(0))
        covered |= within.any(1)
        inside_fake |= (distance < fake_radius[start : start + 1000]).any(1)
    counts = torch.cat(balls)
    return {
        "precision": float((counts > 0).double().mean()),
        "recall": float(inside_fake.double().mean()),
        "density": float(counts.double().mean() / k),
        "coverage": float(covered.double().mean()),
    }


def _radius(rows: Tensor, k: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (n,)."""
    # the smallest distance is the row's own, zero
    parts = [torch.cdist(part, rows).kthvalue(k + 1, dim=1).values for part in rows.split(1000)]
    return torch.cat(parts)


def inception_score(logits: Tensor) -> float:
    """Return the Inception score, 1 .. K (arXiv:1606.03498).

    It is the exponential of the mutual information of image and class.

    Args:
        logits: (n, K) of a classifier.

    Raises:
        ValueError: values that are not finite, or no rows.
    """
    if logits.ndim != 2 or len(logits) == 0 or not bool(logits.isfinite().all()):
        raise ValueError(f"`logits` has shape {tuple(logits.shape)}; it must be finite, (n, K)")
    log_p = logits.double().log_softmax(1)
    marginal = log_p.logsumexp(0) - torch.tensor(float(len(log_p))).double().log()
    return float((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())


def recognised(logits: Tensor, labels: Sequence[int], ids: Sequence[int]) -> dict[int, float]:
    """Return for each class the share of its samples that a classifier takes for it.

    Args:
        logits: (n, K), of a classifier of the K classes in the order of `ids`.
        labels: class of each sample, (n,).
        ids: numbers of the classes.
    """
    found = torch.tensor(ids)[logits.argmax(1)]
    asked = torch.as_tensor(labels)
    return {
        int(c): float((found[asked == c] == c).double().mean()) for c in asked.unique().tolist()
    }


def _checked(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    for name, rows in (("real", real), ("fake", fake)):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != real.shape[1]:
            raise ValueError(
                f"`{name}` has shape {tuple(rows.shape)}; both sets must be (n, F) with "
                f"n >= 2 and the same F, here {real.shape[-1]}"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"`{name}` holds features that are not finite; all must be")
    return real.detach().cpu().double(), fake.detach().cpu().double()


class Gaussian(NamedTuple):
    """A Gaussian that was fitted to features: mean (F,) and covariance (F, F), float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, count: Tensor, total: Tensor, outer: Tensor) -> "Gaussian":
        """Return it from sums over features, which any number of parts can add up to.

        Args:
            count: how many, 0-d, at least 2.
            total: their sum, (F,).
            outer: the sum of their products with themselves, (F, F).
        """
        mean = total / count
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


def frechet_of_gaussians(real: Gaussian, fake: Gaussian, root: Tensor | None = None) -> float:
    """Return the Frechet distance of two Gaussians (FID, arXiv:1706.08500).

    `frechet_distance` fits them to features; from sums it costs no second pass over the samples.

    Args:
        real: one of them.
        fake: the other.
        root: of the first covariance, from `root_of`; None computes it.
    """
    root = root_of(real.covariance) if root is None else root
    between = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (real.mean - fake.mean).square().sum()
    traces = real.covariance.trace() + fake.covariance.trace()
    return float(apart + traces - 2 * between)


def root_of(covariance: Tensor) -> Tensor:
    """Return the symmetric root of a covariance, (F, F)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def endpoint_errors(samples: Tensor, fine: Tensor) -> Tensor:
    """Return the mean squared difference of samples to the end points of the ODE, float64 (n,).

    Args:
        samples: (n, C, H, W) in [-1, 1], of a deterministic sampler.
        fine: of a fine solution of the probability-flow ODE from the same noises, in the same
            order.
    """
    return (samples.double() - fine.double()).square().flatten(1).mean(1)
