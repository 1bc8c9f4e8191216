"""Batches from a stream: `datasets` sets that are read in order and never held in memory.

Every process reads the whole stream and decodes only the images at its own positions of the global
batch, so that the split over processes does not matter here either. The stream is shuffled within a
buffer, with a seed of its own for each epoch. A resumed run reads up to the image where the
checkpoint was made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ddim_schedulers.training.batches import Batch, Draws, Share, derive_seed
from ddim_schedulers.training.config import DataConfig, TrainingConfig
from ddim_schedulers.training.data import ImageData, check_fit, find_range
from ddim_schedulers.training.sources import (
    BadImageError,
    decode,
    find_image_column,
    header_of,
    load_table,
    raw_file,
)


@dataclass
class ListSource:
    """Undecoded images of a stream that are kept: the held-out ones, or one for its shape."""

    rows: list[dict[str, Any]]
    label: str
    mode: str
    uniform: bool = field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Place in the stream, with the file name where there is one."""
        path = self.rows[index]["path"]
        return f"{self.label}[{index}]{f' ({path})' if path else ''}"

    def header(self, index: int) -> Any:
        """From the first bytes."""
        return header_of(raw_file(self.rows[index]), self.name(index), self.mode)

    def read(self, index: int) -> np.ndarray:
        """The decoded image."""
        return decode(raw_file(self.rows[index]), self.name(index), self.mode)


def open_stream(config: TrainingConfig) -> tuple["Stream", ImageData, ImageData | None]:
    """The stream, what its images are like (from the first one), and the held-out images.

    The first `validation_images` of the stream are held out if `validate_every` is set.

    Raises:
        ValueError: no such set, no image column, nothing in it, or an image that does not fit.
    """
    from datasets import Image

    table = load_table(config, streaming=True)
    if not hasattr(table, "features") or table.features is None:
        table = table._resolve_features()
    column = find_image_column(table.features, config)
    table = table.select_columns([column]).cast_column(column, Image(decode=False))
    kept = max(1, config.validation_images if config.validate_every else 0)
    rows = [row[column] for row in table.take(kept)]
    if not rows:
        raise ValueError(f"data: the stream {config.data} is empty")
    source = ListSource(rows, config.data, config.image_mode)
    header = source.header(0)
    size = header.size if config.image_size is None else (config.image_size, config.image_size)
    value_range, levels = find_range(header.dtype, None, config.value_range)
    data = ImageData(
        source,
        np.arange(len(rows)),
        header.channels,
        size,
        value_range,
        levels,
        config.fit,
        config.on_bad_image,
    )
    for index in range(len(rows)):
        check_fit(source.header(index).size, size, config.fit, source.name(index))
    if config.validate_every == 0:
        return Stream(table, column, config), data, None
    return Stream(table.skip(kept), column, config), data, data


@dataclass
class Stream:
    """Undecoded images of one epoch after another.

    Attributes:
        table: a `datasets.IterableDataset`.
        column: its image column, undecoded.
        config: of the run.
    """

    table: Any
    column: str
    config: DataConfig

    def rows(self, seed: int, epoch: int, offset: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(epoch, number in it, image) from image `offset` of `epoch` on, without end.

        Raises:
            ValueError: an epoch without images.
        """
        while True:
            number = 0
            for row in self._shuffled(np.random.default_rng(derive_seed(seed, "stream", epoch))):
                if number >= offset:
                    yield epoch, number, row
                number += 1
            if number == 0:
                raise ValueError(f"data: the stream {self.config.data} is empty")
            epoch, offset = epoch + 1, 0

    def _shuffled(self, random: np.random.Generator) -> Iterator[dict[str, Any]]:
        # The shuffle of `datasets` gives another order in a worker process than in the main one.
        held: list[dict[str, Any]] = []
        for row in self.table:
            if len(held) < self.config.shuffle_buffer:
                held.append(row[self.column])
                continue
            at = int(random.integers(len(held)))
            out, held[at] = held[at], row[self.column]
            yield out
        yield from (held[i] for i in random.permutation(len(held)))


class StreamBatches(IterableDataset[Batch]):
    """The batches of a stream, from a place in it on; see `MapBatches` for what a batch is."""

    def __init__(self, stream: Stream, data: ImageData, draws: Draws, share: Share) -> None:
        self.stream, self.data, self.draws, self.share = stream, data, draws, share
        self.start, self.stop = 0, 0
        self.place = (0, 0)  # epoch and image of it, where the first batch begins

    def ids(self, step: int) -> np.ndarray:
        """Images of a stream have no numbers: the count of images seen before, (G,)."""
        return np.arange(step * self.share.batch_size, (step + 1) * self.share.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rows = self.stream.rows(self.draws.seed, *self.place)
        for step in range(self.start, self.stop):
            taken = [next(rows) for _ in range(self.share.batch_size)]
            after = torch.tensor([taken[-1][0], taken[-1][1] + 1])
            crops = self.draws.small(step)[2] if self.draws.random_crop else None
            for part in range(self.share.parts):
                positions = self.share.positions(part)
                images, replaced = [], 0
                for position in positions.tolist():
                    array, moved = self._read(taken, position)
                    replaced += moved
                    crop = None if crops is None else crops[position]
                    images.append(self._prepare(array, crop, taken[position]))
                batch = self.draws.make_batch(
                    step, positions, torch.stack(images), self.ids(step)[positions], replaced
                )
                yield batch | {"place": after}

    def _prepare(self, array: np.ndarray, crop: np.ndarray | None, row: Any) -> torch.Tensor:
        if array.shape[0] != self.data.channels:
            raise ValueError(
                f"data: {self._name(row)} has {array.shape[0]} channels, the first image has "
                f"{self.data.channels}; set image_mode to convert"
            )
        check_fit(array.shape[-2:], self.data.size, self.data.fit, self._name(row))
        return self.data.prepare(array, crop)

    def _read(self, taken: list[Any], position: int) -> tuple[np.ndarray, int]:
        for tries in range(len(taken)):
            row = taken[(position + tries) % len(taken)]
            try:
                mode = self.stream.config.image_mode
                return decode(raw_file(row[2]), self._name(row), mode), min(tries, 1)
            except BadImageError:
                if self.data.on_bad_image == "stop":
                    raise
        raise BadImageError("none of the images of a batch can be decoded")

    def _name(self, row: Any) -> str:
        path = row[2]["path"]
        at = f"{self.stream.config.data}, epoch {row[0]}, image {row[1]} of the shuffled stream"
        return f"{at} ({path})" if path else at
