"""Batches from a stream: `datasets` sets that are read in order and never held in memory.

Every process reads the whole stream and decodes only the images at its own positions of the global
batch, so that the split over processes does not matter here either. The stream is shuffled within a
buffer, with a seed of its own for each epoch. A resumed run reads up to the image where the
checkpoint was made.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ddim_schedulers.pipelines.image_files import (
    BadImageError,
    Fit,
    Reading,
    decode,
    header_of,
)
from ddim_schedulers.training.common.seeds import derive_seed
from ddim_schedulers.training.config import DataConfig, TrainingConfig
from ddim_schedulers.training.data.batches import Batch, Draws, Share
from ddim_schedulers.training.data.fitting import check_fit
from ddim_schedulers.training.data.images import ImageData, checked
from ddim_schedulers.training.data.labels import check_several, classes_of_stream, find_label_column
from ddim_schedulers.training.data.sources import (
    find_image_column,
    load_table,
    path_note,
    raw_file,
    raw_row,
    reading_of,
)

# Images of a stream that are looked at before training, to learn what its images are like.
LOOKED_AT = 64

Example = dict[str, Any] | None


@dataclass
class ListSource:
    """The first images of a stream, undecoded, which are kept."""

    examples: list[Example]
    label: str
    reading: Reading
    uniform: bool = field(default=False, init=False)
    left_out: Counter[str] = field(default_factory=Counter, init=False)
    understood: str = field(default="", init=False)

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, index: int) -> str:
        """Return the place in the stream, with the file name where there is one."""
        return f"{self.label}[{index}]{path_note(self.examples[index])}"

    def header(self, index: int) -> Any:
        """Read the header from the first bytes."""
        return header_of(raw_file(self.examples[index]), self.name(index), self.reading)

    def read(
        self, index: int, fit: Fit | None = None, crop: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the decoded image."""
        return decode(raw_file(self.examples[index]), self.name(index), self.reading, fit, crop)

    def raw(self, index: int) -> tuple[str, Any]:
        """Return file name and bytes, or path, as the example holds them."""
        return raw_row(self.examples[index])

    def stored_bytes(self) -> int:
        """Return the bytes of the examples that are kept."""
        return sum(len(e["bytes"] or b"") for e in self.examples if e is not None)

    def listing(self) -> Iterable[str]:
        """Return nothing: every image that is kept can be read."""
        return ()


def held_out_of_stream(validate_every: int, validation_images: int) -> int:
    """Return how many images at the start of a stream are not trained on."""
    return validation_images if validate_every else 0


def open_stream(config: TrainingConfig) -> tuple["Stream", ImageData, ImageData | None]:
    """Return the stream, its first images, and those of them that are held out.

    The first images say what all are like, and are the reference of the Frechet distance; the
    first `validation_images` are held out if `validate_every` is set.

    Raises:
        ValueError: no such set, no image column, nothing in it or nothing beyond the held-out
            images, or one of the first images does not fit.
    """
    from datasets import Image

    table = load_table(config, streaming=True)
    if not hasattr(table, "features") or table.features is None:
        table = table._resolve_features()
    column = find_image_column(table.features, config)
    classes, label = None, None
    if config.class_conditional:
        label = find_label_column(table.features, config)
        classes = classes_of_stream(table.features, label, config)
    columns = [column] if label is None else [column, label]
    table = table.select_columns(columns).cast_column(column, Image(decode=False))
    held_out = held_out_of_stream(config.validate_every, config.validation_images)
    reference = config.validation_images if config.frechet_images else 0
    most = max(held_out + 1, reference, LOOKED_AT)
    looked_at = list(table.take(most))
    examples = [row[column] for row in looked_at]
    if not examples:
        raise ValueError(f"`data` is {config.data!r}, a stream without images; it must hold some")
    if len(examples) <= held_out:
        raise ValueError(
            f"`validation_images` is {held_out}, but the stream {config.data} has only "
            f"{len(examples)} images; it must leave some to train on"
        )
    source = ListSource(examples, config.data, reading_of(config))
    data = checked(source, config)
    data.inventory.looked_at = len(examples)
    if classes is not None:
        numbers = [
            classes.number(row[label], partial(source.name, i)) for i, row in enumerate(looked_at)
        ]
        classes = replace(classes, numbers=np.array(numbers, dtype=np.int64))
        data.inventory.classes = classes.counted(data.ids)
        if len(examples) < most:  # the stream ended: these are all
            check_several(data.inventory.classes, config)
        data = replace(data, classes=classes)
    if held_out == 0:
        return Stream(table, column, config, label), data, None
    kept = replace(data, ids=data.ids[data.ids < held_out])
    if len(kept) == 0:
        raise ValueError(
            f"`data` is {config.data!r}; none of its {held_out} held-out images can be "
            "read, and some must be"
        )
    return Stream(table.skip(held_out), column, config, label), data, kept


@dataclass
class Stream:
    """Undecoded images of one epoch after another.

    Attributes:
        table: a `datasets.IterableDataset`.
        column: its image column, undecoded.
        config: of the run.
        label: its column of labels, if they are asked for.
    """

    table: Any
    column: str
    config: DataConfig
    label: str | None = None

    def examples(
        self, seed: int, epoch: int, offset: int
    ) -> Iterator[tuple[int, int, Example, Any]]:
        """Give (epoch, number in it, image, label) from image `offset` of `epoch` on, without end.

        Raises:
            ValueError: an epoch without images.
        """
        while True:
            number = 0
            random = np.random.default_rng(derive_seed(seed, "stream", epoch))
            for example in self._shuffled(random):
                if number >= offset:
                    label = None if self.label is None else example[self.label]
                    yield epoch, number, example[self.column], label
                number += 1
            if number == 0:
                raise ValueError(
                    f"`data` is {self.config.data!r}, a stream without images; it must hold some"
                )
            epoch, offset = epoch + 1, 0

    def _shuffled(self, random: np.random.Generator) -> Iterator[dict[str, Any]]:
        # The shuffle of `datasets` gives another order in a worker process than in the main one.
        held: list[dict[str, Any]] = []
        for row in self.table:
            if len(held) < self.config.shuffle_buffer:
                held.append(row)
                continue
            at = int(random.integers(len(held)))
            out, held[at] = held[at], row
            yield out
        yield from (held[i] for i in random.permutation(len(held)))


class StreamBatches(IterableDataset[Batch]):
    """The batches of a stream, from a position in it on; see `MapBatches` for what a batch is."""

    def __init__(self, stream: Stream, data: ImageData, draws: Draws, share: Share) -> None:
        self.stream, self.data, self.draws, self.share = stream, data, draws, share
        self.dtype = data.source.header(int(data.ids[0])).dtype
        self.start, self.stop = 0, 0
        self.stream_position = (0, 0)  # epoch and image of it, where the first batch begins

    def ids(self, step: int) -> np.ndarray:
        """Return the count of images seen before each, (G,): images of a stream have no numbers."""
        return np.arange(step * self.share.batch_size, (step + 1) * self.share.batch_size)

    def names(self, ids: np.ndarray) -> list[str]:
        """Return what to call the images of `ids` in a report."""
        return [f"{self.stream.config.data}, image {i} of the shuffled stream" for i in ids]

    def __iter__(self) -> Iterator[Batch]:
        examples = self.stream.examples(self.draws.seed, *self.stream_position)
        for step in range(self.start, self.stop):
            taken = [next(examples) for _ in range(self.share.batch_size)]
            after = torch.tensor([taken[-1][0], taken[-1][1] + 1])
            crops = self.draws.small(step)[2] if self.draws.random_crop else None
            for part in range(self.share.parts):
                positions = self.share.positions(part)
                images, labels, replaced = [], [], 0
                for position in positions.tolist():
                    crop = None if crops is None else crops[position]
                    array, example = self._read(taken, position, crop)
                    replaced += example is not taken[position]
                    images.append(self._prepare(array, crop, example))
                    if self.data.classes is not None:
                        place = partial(self._name, example)
                        labels.append(self.data.classes.row(example[3], place))
                batch = self.draws.make_batch(
                    step,
                    positions,
                    torch.stack(images),
                    self.ids(step)[positions],
                    replaced,
                    torch.tensor(labels) if labels else None,
                )
                yield batch | {"stream_position": after}

    def _prepare(self, array: np.ndarray, crop: np.ndarray | None, row: Any) -> torch.Tensor:
        if array.shape[0] != self.data.channels:
            raise ValueError(
                f"`data` has images of different channels: {self._name(row)} has {array.shape[0]}, "
                f"the first image has {self.data.channels}; set `image_mode` to convert them"
            )
        if array.dtype.name != self.dtype:
            raise ValueError(
                f"`data` has images of different dtype: {self._name(row)} is {array.dtype.name}, "
                f"the first image is {self.dtype}; convert the files to one bit depth"
            )
        check_fit(array.shape[-2:], self.data.size, self.data.fit, self._name(row))
        return self.data.prepare(array, crop)

    def _read(
        self, taken: list[Any], position: int, crop: np.ndarray | None
    ) -> tuple[np.ndarray, Any]:
        reading, fit = reading_of(self.stream.config), Fit(self.data.size, self.data.fit)
        for tries in range(len(taken)):
            row = taken[(position + tries) % len(taken)]
            try:
                array = decode(raw_file(row[2]), self._name(row), reading, fit, crop)
                return array, row
            except BadImageError:
                if self.data.on_bad_image == "stop":
                    raise
        raise BadImageError(self._name(taken[position]), "nor can any other of its batch")

    def _name(self, row: Any) -> str:
        at = f"{self.stream.config.data}, epoch {row[0]}, image {row[1]} of the shuffled stream"
        return at + path_note(row[2])
