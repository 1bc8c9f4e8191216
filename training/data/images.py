"""Images from anywhere, as one thing: `ImageData`, a sequence of tensors (C, H, W) in [-1, 1].

Sources say what an image is (`sources.py`); this module checks that they agree with each other
before any training begins, brings them to one size and to [-1, 1], and splits off the held-out
part.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from ddim_schedulers.pipelines.image_files import BadImageError, Fit, Header
from ddim_schedulers.training.config import DataConfig, TrainingConfig
from ddim_schedulers.training.data.fitting import check_fit, fit_image
from ddim_schedulers.training.data.inventory import Inventory, listed
from ddim_schedulers.training.data.labels import Classes, classes_of
from ddim_schedulers.training.data.sources import ArraySource, ImageSource, open_source

# The split of the digits is part of what the name "digits" means here: it depends on no setting.
DIGITS_SPLIT_SEED = 0
DIGITS_HELD_OUT = 360
_DIGITS: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")


@dataclass
class ImageData:
    """Images of one shape, read on demand.

    Attributes:
        source: where they are.
        ids: (n,) which images of the source belong to this set.
        channels: C.
        size: height and width after `fit`.
        value_range: the values of the source that become -1 and 1.
        levels: number of equally spaced values a pixel can take, None if continuous.
        fit: see `DataConfig`.
        on_bad_image: 'stop' raises `BadImageError`, 'skip' takes the next image instead.
        skipped: names of files that were left out because even their header was unreadable.
        inventory: what was found in the source, for the line at the start of a run.
        classes: of the images of the source; None where no labels are asked for.
    """

    source: ImageSource
    ids: np.ndarray
    channels: int
    size: tuple[int, int]
    value_range: tuple[float, float]
    levels: int | None
    fit: str = "exact"
    on_bad_image: str = "stop"
    skipped: list[str] = field(default_factory=list)
    inventory: Inventory = field(default_factory=Inventory)
    classes: Classes | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of an image, (C, H, W)."""
        return (self.channels, *self.size)

    def batch(
        self, indices: Sequence[int] | np.ndarray, crops: np.ndarray | None = None
    ) -> tuple[torch.Tensor, int]:
        """Return images (B, C, H, W), float32 in [-1, 1], and how many had to be replaced.

        Args:
            indices: positions 0 .. len(self) - 1.
            crops: (B, 2) in [0, 1], where to cut a larger image; None cuts the centre.

        Raises:
            BadImageError: an image cannot be decoded and `on_bad_image` is 'stop'.
        """
        images, ids = self.read(indices, crops)
        return images, int((ids != self.ids[np.asarray(indices, dtype=np.int64)]).sum())

    def read(
        self, indices: Sequence[int] | np.ndarray, crops: np.ndarray | None = None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Return images as `batch`, and which of the source each of them is, (B,) int64."""
        ids = self.ids[np.asarray(indices, dtype=np.int64)]
        if isinstance(self.source, ArraySource) and self.fit in ("exact", "pad"):
            whole = self.scale(torch.from_numpy(self.source.many(ids)))  # without a crop
            return fit_image(whole, self.size, self.fit), ids
        images = []
        for row, position in enumerate(np.asarray(indices)):
            crop = None if crops is None else crops[row]
            array, ids[row] = self._read(int(position), crop)
            images.append(self.prepare(array, crop))
        return torch.stack(images), ids

    def labels(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor | None:
        """Return the classes (B,) int64 of images by position; None where none are asked for."""
        return self.labels_of(self.ids[np.asarray(indices, dtype=np.int64)])

    def labels_of(self, ids: np.ndarray) -> torch.Tensor | None:
        """Return the classes (B,) int64 of images of the source; None as in `labels`."""
        return None if self.classes is None else torch.from_numpy(self.classes.rows_of(ids))

    def all(self, limit: int | None = None) -> torch.Tensor:
        """Return the first `limit` images, or all of them, (n, C, H, W)."""
        return self.batch(range(len(self) if limit is None else min(limit, len(self))))[0]

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return what to call these images in a report."""
        return [self.source.name(int(self.ids[i])) for i in indices]

    def prepare(self, array: np.ndarray, crop: np.ndarray | None) -> torch.Tensor:
        """Return one image (C, H, W) of the source's dtype, brought to size and to [-1, 1]."""
        image = self.scale(torch.from_numpy(np.ascontiguousarray(array)))
        return fit_image(image, self.size, self.fit, crop)

    def scale(self, images: torch.Tensor) -> torch.Tensor:
        """Scale values of the source to [-1, 1] in float32."""
        low, high = self.value_range
        return (images.to(torch.float32) - low) * (2 / (high - low)) - 1

    def split(self, fraction: float, seed: int) -> tuple["ImageData", "ImageData | None"]:
        """Return a training part and a held-out part, drawn with `seed`; None for an empty one."""
        held_out = round(len(self) * fraction)
        if held_out == 0:
            return self, None
        if held_out == len(self):
            raise ValueError(
                f"`validation_fraction` is {fraction}, which holds out all {held_out} images; it "
                "must leave some to train on"
            )
        order = np.random.default_rng(seed).permutation(self.ids)
        rest, taken = np.sort(order[held_out:]), np.sort(order[:held_out])
        return replace(self, ids=rest), replace(self, ids=taken)

    def _read(self, position: int, crop: np.ndarray | None) -> tuple[np.ndarray, int]:
        fit = Fit(self.size, self.fit)
        for tries in range(len(self)):
            index = int(self.ids[(position + tries) % len(self)])
            try:
                return self.source.read(index, fit, crop), index
            except BadImageError:
                if self.on_bad_image == "stop":
                    raise
        raise BadImageError(self.source.name(int(self.ids[position])), "nor can any other")


def digits(split: Literal["train", "held_out", "all"] = "train") -> ImageData:
    """Return the 1,797 digits that scikit-learn embeds, 8x8, 17 grey levels 0..16.

    The held-out part is always the same 360 images.
    """
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.float32)
    order = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(images))
    parts = {"train": order[DIGITS_HELD_OUT:], "held_out": order[:DIGITS_HELD_OUT], "all": order}
    if split not in parts:
        raise ValueError(f"`split` is {split!r}; it must be one of {', '.join(parts)}")
    source = ArraySource(images, "digits")
    data = ImageData(source, np.sort(parts[split]), 1, (8, 8), (0.0, 16.0), 17)
    data.inventory = _taken(source, "digits", [source.header(0)], [], data)
    data.inventory.found = len(data)
    return data


def load_data(config: TrainingConfig) -> tuple[ImageData, ImageData | None]:
    """Return the training images and the held-out ones (None if there are none).

    Raises:
        ValueError: nothing there, images that disagree in size or channels, an unknown dtype or
            range, a broken image while `on_bad_image` is 'stop'.
    """
    if config.data == "digits" and config.split != "train":
        raise ValueError(
            f"`split` is {config.split!r}, but digits have a held-out part of their own; "
            "it must be train"
        )
    if config.data == "digits" and config.fit == "exact" and config.image_size in (None, 8):
        whole = with_classes(digits("all"), config)
        train, held_out = (replace(digits(part), classes=whole.classes) for part in _DIGITS)
        if train.classes is not None:
            train.inventory.classes = train.classes.counted(train.ids)
        return train, held_out
    source = digits("all").source if config.data == "digits" else open_source(config)
    if len(source) == 0:
        left = f"; left out: {listed(source.left_out)}" if source.left_out else ""
        raise ValueError(
            f"`data` is {config.data!r}, which holds no images{left}; it must hold some"
        )
    data = with_classes(checked(source, config), config)
    return data.split(config.validation_fraction, config.seed)


def with_classes(data: ImageData, config: DataConfig) -> ImageData:
    """Return the images with their classes, if the settings ask for them.

    Raises:
        ValueError: as `classes_of`.
    """
    if not config.class_conditional:
        return data
    data = replace(data, classes=classes_of(data.source, config, data.ids))
    assert data.classes is not None
    data.inventory.classes = data.classes.counted(data.ids)
    return data


def checked(source: ImageSource, config: DataConfig) -> ImageData:
    """Read every header, so that a set that cannot be trained on is refused at once.

    Raises:
        ValueError: as in `load_data`.
    """
    headers, ids, skipped = [], [], []
    for index in range(len(source)):
        try:
            headers.append(source.header(index))
            ids.append(index)
        except BadImageError as error:
            if config.on_bad_image == "stop":
                raise
            skipped.append(error.name)
        if source.uniform:  # all images have the shape of the first
            ids = list(range(len(source)))
            break
    if not headers:
        raise ValueError(
            f"`data` is {config.data!r}; none of the {len(source)} images in it can be "
            "read, and some must be"
        )
    _require_same(headers, ids, source, "channels")
    _require_same(headers, ids, source, "dtype")
    if config.image_size is None:
        _require_same(headers, ids, source, "size")
        size = headers[0].size
    else:
        size = (config.image_size, config.image_size)
        for header, index in zip(headers, ids, strict=False):
            check_fit(header.size, size, config.fit, source.name(index))
    value_range, levels = find_range(headers[0].dtype, source, config.value_range)
    data = ImageData(
        source,
        np.array(ids, dtype=np.int64),
        headers[0].channels,
        size,
        value_range,
        levels,
        config.fit,
        config.on_bad_image,
        skipped,
    )
    data.inventory = _taken(source, config.data, headers, skipped, data)
    data.inventory.background = config.background
    return data


def _taken(
    source: ImageSource, place: str, headers: list[Header], skipped: list[str], data: ImageData
) -> Inventory:
    """Return an account of what a source holds and what is used of it."""
    left_out = source.left_out + Counter({"image that cannot be read": len(skipped)})
    taken = Inventory(place, source.understood, len(source) + source.left_out.total())
    taken.left_out = left_out
    taken.count(headers, len(data) if source.uniform else 1)
    how = (
        "as they are" if data.fit == "exact" else f"by {data.fit} to {data.size[0]}x{data.size[1]}"
    )
    taken.becomes = f"{how}, channels: {data.channels}"
    return taken


def _require_same(headers: list[Header], ids: list[int], source: ImageSource, what: str) -> None:
    first = getattr(headers[0], what)
    for header, index in zip(headers, ids, strict=False):
        if getattr(header, what) != first:
            cure = {
                "size": "set `image_size` and `fit`",
                "channels": "set `image_mode` to convert image files",
                "dtype": "convert the files to one bit depth",
            }[what]
            raise ValueError(
                f"`data` has images of different {what}: {source.name(ids[0])} has {first}, "
                f"{source.name(index)} has {getattr(header, what)}; {cure}"
            )


def find_range(
    dtype: str, source: ImageSource | None, given: list[float] | None
) -> tuple[tuple[float, float], int | None]:
    """Return the values that become -1 and 1, and the number of levels (None: continuous)."""
    if isinstance(source, ArraySource) and source.label == "digits":
        return (0.0, 16.0), 17
    whole = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}
    if given is not None:
        levels = int(given[1] - given[0]) + 1 if np.dtype(dtype).kind in "iu" else None
        return (given[0], given[1]), levels
    if dtype not in whole:
        raise ValueError(
            f"`value_range` is not set, but the pixels are {dtype}; it must say which values "
            "become -1 and 1"
        )
    return whole[dtype], int(whole[dtype][1]) + 1
