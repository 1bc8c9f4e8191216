"""What a training step sees, as a pure function of (seed, step, position in the global batch).

The global batch of a step has `batch_size` positions. Positions are dealt out as

    position = (part * num_processes + process) * images_per_part + row

so any division of the same batch over processes and accumulation parts sees the same images, with
the same flips, crops, timesteps (through `u`), dropped labels and noise at the same positions.

Small draws (u, flip, crop) for all positions of a step come from one generator, those of dropped
labels from another, so that labels change nothing else; the noise of each
position has a generator of its own, so that a process draws only the noise it needs. All are CPU
generators: the numbers do not depend on the device. With `num_workers` they are drawn ahead of
time.
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ddim_schedulers.training.common.seeds import derive_seed, generator
from ddim_schedulers.training.data.images import ImageData

Batch = dict[str, torch.Tensor]
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Share:
    """How the global batch is dealt out, and which share this process has."""

    batch_size: int
    num_processes: int
    process_index: int
    parts: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.num_processes * self.parts):
            raise ValueError(
                f"`batch_size` is {self.batch_size}; it must be a multiple of processes x "
                f"gradient_accumulation_steps = {self.num_processes} x {self.parts}"
            )

    @property
    def rows(self) -> int:
        """Return images of this process in one part."""
        return self.batch_size // (self.num_processes * self.parts)

    def positions(self, part: int) -> np.ndarray:
        """Return the positions in the global batch, (rows,)."""
        start = (part * self.num_processes + self.process_index) * self.rows
        return np.arange(start, start + self.rows)


class Draws:
    """All random numbers of the steps of a run.

    Args:
        seed: of the run.
        batch_size: positions in a global batch.
        stratified: let the u of a step fall one into each of `batch_size` equal intervals.
        random_flip: draw flips; otherwise none.
        random_crop: draw crops; otherwise the centre.
        label_dropout: share of labels that become the null class.
        null_class: what they become; None where no label is ever dropped.
        shape: of the noise of an image; None is that of the image, latents have another.
        posterior: draw a second noise for each image, of the same shape, for its latents.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        stratified: bool,
        random_flip: bool,
        random_crop: bool,
        label_dropout: float = 0.0,
        null_class: int | None = None,
        shape: tuple[int, int, int] | None = None,
        posterior: bool = False,
    ) -> None:
        self.shape, self.posterior = shape, posterior
        self.seed, self.batch_size = seed, batch_size
        self.label_dropout, self.null_class = label_dropout, null_class
        self.stratified, self.random_flip, self.random_crop = stratified, random_flip, random_crop

    def small(self, step: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray | None]:
        """Draw u in [0, 1) float64 (G,), flip bool (G,), and crop (G, 2) in [0, 1) or None."""
        source = generator(self.seed, "draws", step)
        u = torch.rand(self.batch_size, generator=source, dtype=torch.float64)
        flip = torch.rand(self.batch_size, generator=source) < 0.5
        crop = torch.rand(self.batch_size, 2, generator=source, dtype=torch.float64).numpy()
        if self.stratified:
            u = (torch.randperm(self.batch_size, generator=source) + u) / self.batch_size
        if not self.random_flip:
            flip = torch.zeros_like(flip)
        return u, flip, crop if self.random_crop else None

    def noise(
        self, step: int, positions: np.ndarray, shape: tuple[int, ...], purpose: str = "noise"
    ) -> torch.Tensor:
        """Draw standard normal noise (len(positions), *shape), float32."""
        base = derive_seed(self.seed, purpose, step)
        noise = torch.empty(len(positions), *shape)
        source = torch.Generator()
        for row, position in enumerate(positions.tolist()):
            source.manual_seed(_scramble(base + position))
            torch.randn(shape, generator=source, out=noise[row])
        return noise

    def dropped(self, step: int) -> torch.Tensor:
        """Draw which labels of a step become the null class, bool (G,)."""
        # a separate generator, so that a run without labels draws the same other numbers
        source = generator(self.seed, "label_dropout", step)
        u = torch.rand(self.batch_size, generator=source, dtype=torch.float64)
        return u < self.label_dropout

    def make_batch(
        self,
        step: int,
        positions: np.ndarray,
        images: torch.Tensor,
        ids: np.ndarray,
        replaced: int,
        labels: torch.Tensor | None = None,
        mirrored: torch.Tensor | None = None,
    ) -> Batch:
        """Return the batch of one part: flips the images, drops labels, adds noise and u.

        `mirrored` are the flipped images where they are at hand, as encodings are.
        """
        u, flip, _ = self.small(step)
        if self.random_flip:
            mirrored = images.flip(-1) if mirrored is None else mirrored
            images = torch.where(flip[positions][:, None, None, None], mirrored, images)
        shape = tuple(images.shape[1:]) if self.shape is None else self.shape
        batch = {} if labels is None else {"labels": labels}
        if labels is not None and self.null_class is not None:
            dropped = self.dropped(step)[positions]
            batch["labels"] = torch.where(dropped, self.null_class, labels)
        if self.posterior:
            batch["posterior"] = self.noise(step, positions, shape, "posterior")
        return batch | {
            "images": images,
            "noise": self.noise(step, positions, shape),
            "u": u[positions],
            "ids": torch.from_numpy(ids.astype(np.int64)),
            "replaced": torch.tensor(replaced),
        }


class EncodedImages(Protocol):
    """Encodings of images by position, as `LatentCache` keeps them."""

    def rows(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
        """Return encodings, those of the mirrored images, and which images they are of."""
        ...


class MapBatches(Dataset[Batch]):
    """The batches of a set with random access; the key is (step, part).

    With a `cache` the images of a batch are their encodings.
    """

    def __init__(self, data: ImageData, draws: Draws, share: Share) -> None:
        self.data, self.draws, self.share = data, draws, share
        self.cache: EncodedImages | None = None
        self._orders: dict[int, np.ndarray] = {}

    def ids(self, step: int) -> np.ndarray:
        """Return the images of a step, (G,); each epoch has its own order and follows at once."""
        places = np.arange(step * self.share.batch_size, (step + 1) * self.share.batch_size)
        epochs, offsets = np.divmod(places, len(self.data))
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._order(int(epoch))[offsets[epochs == epoch]]
        return ids

    def names(self, ids: np.ndarray) -> list[str]:
        """Return what to call the images of `ids` in a report."""
        return self.data.names(ids.tolist())

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        step, part = key
        positions = self.share.positions(part)
        ids = self.ids(step)[positions]
        crops = self.draws.small(step)[2] if self.draws.random_crop else None
        mirrored = None
        if self.cache is not None:
            images, mirrored, used = self.cache.rows(ids)
        else:
            images, used = self.data.read(ids, None if crops is None else crops[positions])
        replaced = int((used != self.data.ids[ids]).sum())
        labels = self.data.labels_of(used)
        return self.draws.make_batch(step, positions, images, ids, replaced, labels, mirrored)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            source = generator(self.draws.seed, "order", epoch)
            order = torch.randperm(len(self.data), generator=source).numpy()
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1} | {
                epoch: order
            }
        return self._orders[epoch]


class Keys(Sampler[tuple[int, int]]):
    """(step, part) from `start` on, up to `stop`."""

    def __init__(self, start: int, stop: int, parts: int) -> None:
        self.start, self.stop, self.parts = start, stop, parts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((s, p) for s in range(self.start, self.stop) for p in range(self.parts))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.parts


@contextlib.contextmanager
def open_loader(
    batches: Any, start: int, stop: int, workers: int = 0, pin: bool = False
) -> Iterator[Iterator[Batch]]:
    """Return a loader of ready batches, whose order workers cannot change.

    The workers have ended when the context has.

    Raises:
        ValueError: what `batches` raised, with its own message, from a worker too.
    """
    streaming = isinstance(batches, IterableDataset)
    loader: Any = iter(
        DataLoader(
            _CarriedStream(batches) if streaming else _Carried(batches),
            sampler=None if streaming else Keys(start, stop, batches.share.parts),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=_quiet_worker,
            # Without this argument the loader takes a number from the global generator.
            generator=torch.Generator(),
        )
    )
    try:
        yield _raised(loader)
    finally:
        if workers:
            # They ignore the signal by which Python would end them at its exit, and would be waited
            # for. The frames of an exception can keep the loader alive until then.
            loader._shutdown_workers()


class _Carried(Dataset[Any]):
    """Hands on a `ValueError` as a batch: torch would rename it and put a traceback into it."""

    def __init__(self, batches: MapBatches) -> None:
        self.batches = batches

    def __getitem__(self, key: tuple[int, int]) -> Batch | ValueError:
        try:
            return self.batches[key]
        except ValueError as error:
            return error


class _CarriedStream(IterableDataset[Any]):
    """The same for a stream."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch | ValueError]:
        try:
            yield from self.batches
        except ValueError as error:
            yield error


def _raised(loader: Iterator[Batch | ValueError]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def _scramble(value: int) -> int:
    # The finaliser of splitmix64: neighbouring positions get unrelated seeds.
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _quiet_worker(_: int) -> None:
    # Ctrl-C, and the SIGTERM of a batch system, reach all processes. The main one needs its workers
    # to finish the step, and ends them itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
