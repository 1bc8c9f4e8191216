"""The real images of an evaluation: read, taken through the feature spaces, compared with samples.

Their features are kept in a file with their fingerprint, and so is the classifier. Processes share
the work; the features are then put in the order of the images.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers.class_labels import ClassLabels
from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.images import to_uint8
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.data.images import ImageData, load_data
from ddim_schedulers.training.data.labels import classes_of
from ddim_schedulers.training.evaluation.caches import ClassifierFile, FeatureFiles
from ddim_schedulers.training.evaluation.config import CLASSIFIER, EvaluationConfig
from ddim_schedulers.training.metrics import features as spaces
from ddim_schedulers.training.metrics.classifier import save_classifier, train_classifier
from ddim_schedulers.training.metrics.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_metrics,
    recognised,
)

READ_BATCH = 500
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The real images of one feature space.

    Attributes:
        train: features of the training part, (m, F).
        held_out: features of the held-out part, (k, F).
        fingerprint: of the images, as they went in, and of the feature space.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    fingerprint: str


class RealImages:
    """The real images that samples are compared with, and the feature spaces.

    Args:
        config: what is asked for.
        team: the processes that share the work.
        device: of the feature spaces.
        shape: (C, H, W) of the network.
        progress: called with a line of text now and then.

    Raises:
        ValueError: images that do not fit the network, are not 8-bit or too few.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        team: Team,
        device: torch.device,
        shape: tuple[int, int, int],
        progress: Progress,
    ) -> None:
        self.config, self.team, self.progress, self.device = config, team, progress, device
        self.folder = Path(config.output_dir)
        self.train, self.held_out = self._load_data(shape)

    def prepare(self) -> None:
        """Make the feature spaces and the features of the real images.

        Raises:
            ValueError: too few images, or a feature space that gives something else than features.
        """
        config = self.config
        self.networks = {name: self._network(name) for name in config.features}
        self.order = self._order()
        self.features = {name: self._real(name) for name in config.features}
        # the self-check: what a perfect sampler would get, by the n of the tables
        self.self_check: dict[int, dict[str, Any]] = {}
        if self.team.index == 0:
            self.self_check = {n: self.measure_held_out(n) for n in {t.n for t in config.tables}}

    def _load_data(self, shape: tuple[int, int, int]) -> tuple[ImageData, ImageData]:
        reference, held_out = load_data(self.config.data)
        if reference.shape != shape:
            raise ValueError(
                f"`data` has images of {reference.shape}; they must be {shape} (C, H, W), "
                "as the network's"
            )
        if reference.levels is None or reference.levels > 256:
            raise ValueError(
                "`data` has images that are not 8-bit; both sides of a comparison must be"
            )
        if self.config.held_out is not None:
            held_out = load_data(self.config.held_out)[0]
        if self.team.index == 0:
            self.progress(reference.inventory.line())
            if self.config.held_out is not None and held_out is not None:
                self.progress(f"held out: {held_out.inventory.line()}")
        if held_out is None or len(held_out) < 2 or held_out.shape != reference.shape:
            found = "none" if held_out is None else f"{len(held_out)} of {held_out.shape}"
            raise ValueError(
                f"`held_out` is {found}; real images are measured like samples, so there must be "
                f"at least 2 of {reference.shape}: set validation_fraction or held_out"
            )
        return reference, held_out

    def _order(self) -> np.ndarray:
        """Return the sorted positions of the reference images: all, or a fixed choice."""
        count = min(len(self.train), self.config.reference_images or len(self.train))
        fewest = min([count, *(table.n for table in self.config.tables)])
        if self.config.neighbours >= fewest:
            raise ValueError(
                f"`neighbours` is {self.config.neighbours}; it must be below the number of samples "
                f"and of reference images, here {fewest}"
            )
        return np.sort(np.random.default_rng(self.config.seed).permutation(len(self.train))[:count])

    def _network(self, name: str) -> torch.nn.Module:
        if name == CLASSIFIER:
            name = str(self._classifier())
        return spaces.make_feature_space(name, self.train.shape).to(self.device)

    def classifier_path(self) -> Path:
        """Return where the classifier is, or will be."""
        return Path(self.config.classifier or self.folder / "classifier.safetensors")

    def _classifier(self) -> Path:
        path = self.classifier_path()
        self.team.wait()  # all processes look before one writes
        if self.config.classifier is not None:
            there = path.exists()
        else:
            wanted = {"epochs": self.config.classifier_epochs, "seed": self.config.seed}
            wanted["images"] = len(self.train)
            there = ClassifierFile(self.folder, self.progress).is_there(CLASSIFIER, wanted)
        self.team.wait()  # all processes look before one writes
        if not there and self.team.index == 0:
            labels, called = labels_of(self.train, self.config)
            network, facts = train_classifier(
                lambda rows: as_uint8_sees(self.train.batch(rows)[0]),
                labels,
                self.train.shape,
                epochs=self.config.classifier_epochs,
                seed=self.config.seed,
                progress=self.progress,
            )
            network.called = tuple(called)
            save_classifier(network, facts, path)
        self.team.wait()
        return path

    def _real(self, name: str) -> Reference:
        """Return features of the real images, from the cache where they are in it."""
        parts = {"train": (self.train, self.order)}
        parts["held_out"] = (self.held_out, np.arange(len(self.held_out)))
        digest = hashlib.sha256(spaces.space_fingerprint(name, self.networks[name]).encode())
        for part, (data, rows) in parts.items():
            digest.update(f"{part} {len(rows)} {data.shape}".encode())
            for images in _batches(data, rows):
                digest.update(to_uint8(images).tobytes())
        fingerprint = digest.hexdigest()
        counts = {part: len(rows) for part, (_, rows) in parts.items()}
        cache = FeatureFiles(Path(self.config.cache_dir or self.folder), counts, self.progress)
        self.team.wait()
        kept = cache.load(fingerprint)
        if kept is None:
            self.progress(f"features of the real images: {name}")
            kept = {part: self._shared(name, data, rows) for part, (data, rows) in parts.items()}
            for part, value in kept.items():
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"`features` has {name!r}, which gives values that are not finite for real "
                        f"images ({part}); all must be finite"
                    )
            if self.team.index == 0:
                cache.save(fingerprint, kept)
            self.team.wait()
        return Reference(kept["train"], kept["held_out"], fingerprint)

    def _shared(self, name: str, data: ImageData, rows: np.ndarray) -> torch.Tensor:
        parts = chunks(len(rows), READ_BATCH)
        mine = [
            (start, self.features_of(name, to_uint8(data.batch(rows[start:stop])[0])))
            for start, stop in parts[self.team.index :: self.team.count]
        ]
        return self.joined(mine)

    def features_of(self, name: str, images: np.ndarray) -> torch.Tensor:
        """Return features of uint8 images (B, H, W, C)."""
        return spaces.extract(self.networks[name], from_uint8(images))

    def joined(self, mine: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Return the rows of all processes, in the order of their positions."""
        found = self.team.gather([(start, value.numpy()) for start, value in mine])
        return torch.cat(
            [torch.from_numpy(value) for _, value in sorted(found, key=lambda f: f[0])]
        )

    def note(self, name: str) -> dict[str, Any]:
        """Return what a cell's measurements in a feature space are compared with."""
        real = self.features[name]
        return {"fingerprint": real.fingerprint, "n": len(real.train)}

    def measure(
        self,
        name: str,
        fake: torch.Tensor,
        labels: Sequence[int] | None = None,
        classes: ClassLabels | None = None,
    ) -> dict[str, Any]:
        """Return all measurements of features (n, F), each with what it was compared to.

        Args:
            name: of the feature space.
            fake: the features.
            labels: the class of each sample, where they were asked for by class.
            classes: of the network that made them.
        """
        real = self.features[name]
        k = min(self.config.neighbours, len(fake) - 1)
        shuffled = np.random.default_rng(self.config.seed).permutation(len(real.train))
        equal = real.train[
            shuffled[: len(fake)]
        ]  # as many as samples, so that both sides have balls of like size
        kernel, spread = kernel_distance(real.train, fake, seed=self.config.seed)
        found: dict[str, Any] = {
            "n": len(fake),
            "reference": self.note(name),
            "frechet": frechet_distance(real.train, fake),
            "kernel": kernel,
            "kernel_std": spread,
            **neighbour_metrics(equal, fake, k),
            "k": k,
            "neighbour_reference_n": len(equal),
        }
        network: Any = self.networks[name]
        if hasattr(network, "head"):
            with torch.no_grad():
                logits = network.head(fake.to(self.device)).cpu()
            found["inception_score"] = inception_score(logits)
            # a classifier of other data does not know the network's classes
            if name != CLASSIFIER or classes is None or labels is None:
                return found
            rows = rows_of(network.called or range(logits.shape[1]), classes)
            if rows is not None:
                shares = recognised(logits, labels, rows)
                found["recognised"] = float(np.mean(list(shares.values())))
                found["recognised_by_class"] = {
                    classes.name(number): share for number, share in shares.items()
                }
        return found

    def measure_held_out(self, n: int) -> dict[str, Any]:
        """Measure n held-out images in each feature space, as if a perfect sampler had made them.

        If fewer are held out, all of them; their measurements then have an n of their own.
        """
        rows = self.chosen_held_out(n)
        return {
            name: self.measure(name, self.features[name].held_out[rows]) for name in self.features
        }

    def chosen_held_out(self, n: int) -> np.ndarray:
        """Return the positions of n held-out images, or of all if they are fewer."""
        return np.random.default_rng(self.config.seed).permutation(len(self.held_out))[:n]

    def measure_images(
        self, rows: np.ndarray, change: Callable[[torch.Tensor], np.ndarray]
    ) -> dict[str, Any]:
        """Measure held-out images in each feature space after a change to uint8 (B, H, W, C)."""
        changed = [change(images) for images in _batches(self.held_out, rows)]
        return {
            name: self.measure(name, torch.cat([self.features_of(name, part) for part in changed]))
            for name in self.features
        }

    def nearest(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance (n,) to the nearest of all training images, and its position."""
        best = torch.full((len(images),), torch.inf)
        where = torch.zeros(len(images), dtype=torch.int64)
        start = 0
        flat = images.flatten(1).double()
        for batch in _batches(self.train, np.arange(len(self.train))):
            value, index = torch.cdist(flat, batch.flatten(1).double()).min(1)
            closer = value.float() < best
            best, where = (
                torch.where(closer, value.float(), best),
                torch.where(closer, index + start, where),
            )
            start += len(batch)
        return best, where


def labels_of(data: ImageData, config: EvaluationConfig) -> tuple[np.ndarray, list[str | int]]:
    """Return labels for a classifier of the images of `data`, from the place `config.labels`.

    Returns:
        labels (n,) int64 of the classes that there are, 0 .. K - 1; and what the data call these,
        names or numbers.

    Raises:
        ValueError: no place is given, nothing is there, or as `classes_of`.
    """
    own, place = config.data, config.labels
    if own.data == "digits":
        place = None
    elif place is None and not own.class_conditional:
        raise ValueError(
            "`labels` is not set, but a classifier needs them; say where they are, or leave "
            "it out of `features`"
        )
    column = {None: own.label_column, "folders": None}.get(place, place)
    own = dataclasses.replace(own, class_conditional=True, label_column=column)
    try:
        classes = classes_of(data.source, own, data.ids)
    except ValueError as error:
        raise ValueError(f"`labels` is {config.labels!r}: {error}") from error
    assert classes.numbers is not None
    present, labels = np.unique(classes.numbers[data.ids], return_inverse=True)
    called: list[str | int] = [
        classes.names[number] if classes.names else number for number in present.tolist()
    ]
    return labels.reshape(-1).astype(np.int64), called


def rows_of(called: Sequence[str | int], classes: ClassLabels) -> list[int] | None:
    """Return the network's class for each class of a classifier; None where they differ.

    Names are found by name, if both have them. Otherwise the order tells.

    Args:
        called: names or numbers of the classifier's classes, in its order.
        classes: of the network.
    """
    named = {name: number for number, name in classes.names.items()}
    if named and all(isinstance(label, str) for label in called):
        return [named[str(label)] for label in called] if set(called) <= set(named) else None
    return list(classes.ids) if len(called) == len(classes.ids) else None


def from_uint8(images: np.ndarray) -> torch.Tensor:
    """Return images uint8 (B, H, W, C) as (B, C, H, W) in [-1, 1], float32."""
    return torch.from_numpy(images).movedim(-1, 1).float().div(127.5).sub(1)


def as_uint8_sees(images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] after a round trip through uint8."""
    return from_uint8(to_uint8(images))


def _batches(data: ImageData, rows: np.ndarray) -> Iterator[torch.Tensor]:
    for start, stop in chunks(len(rows), READ_BATCH):
        yield data.batch(rows[start:stop])[0]
