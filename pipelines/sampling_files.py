"""The files of a sampling job: their names, which are missing, writing and reading them."""

from __future__ import annotations

import io
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from diffusers.utils import logging
from PIL import Image, UnidentifiedImageError

from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.files import write_npz, write_png
from ddim_schedulers.pipelines.images import PIL_MODES, to_pil
from ddim_schedulers.pipelines.workdir import whole
from ddim_schedulers.reading import DamagedFileError, opened, read_bytes, read_npz

if TYPE_CHECKING:
    from ddim_schedulers.pipelines.sampling_job import SamplingJob

logger = logging.get_logger(__name__)

FORMATS = ("png", "npz")
FOLDERS = {"png": "images", "npz": "shards"}
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".npz", ".png", ".tif", ".tiff", ".webp")


class SamplingFiles:
    """Names, presence, writing and reading of a job's files.

    Args:
        folder: the output of the job.
        job: what is sampled.
        rank: of this process.
        shape: (C, H, W) of the images.
    """

    def __init__(
        self, folder: Path, job: SamplingJob, rank: int, shape: tuple[int, int, int]
    ) -> None:
        self.job, self.chunks, self.rank = job, chunks(job.num_images, job.batch_size), rank
        self.folder, self.shape = folder / FOLDERS[job.file_format], shape
        self.damaged: list[DamagedFileError] = []

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of the files of a chunk, in order."""
        if self.job.file_format == "png":
            return [f"{i:06d}.png" for i in range(start, stop)]
        return [f"{start:06d}-{stop - 1:06d}.npz"]

    def missing(self, start: int, stop: int) -> list[str]:
        """Return the names of the files of a chunk that are missing or not whole."""
        return [name for name in self.names(start, stop) if not self._is_whole(name, start, stop)]

    def _is_whole(self, name: str, start: int, stop: int) -> bool:
        path = self.folder / name
        read = partial(self._load, name, start, stop)
        return whole(path, read, self.damaged.append) is not None

    def tell_of_damage(self) -> None:
        """Warn once of all files that were made again."""
        if self.damaged:
            more = f" So are {len(self.damaged) - 1} more." if len(self.damaged) > 1 else ""
            logger.warning(f"{self.damaged[0]} It was made again.{more}")

    def write(self, start: int, images: np.ndarray, missing: list[str]) -> None:
        """Write the missing files of a chunk; existing files stay untouched."""
        stop = start + len(images)
        if self.job.file_format == "npz":
            arrays = {"images": images, "seeds": self._seeds(start, stop)}
            write_npz(self.folder / missing[0], arrays, self.rank)
            return
        for name, image in zip(self.names(start, stop), to_pil(images), strict=True):
            if name in missing:
                write_png(self.folder / name, image, self.rank)

    def drop_short_shards(self) -> None:
        """Delete the last shard of a job that was extended: a longer one holds its images."""
        if self.job.file_format == "npz":
            own = {name for chunk in self.chunks for name in self.names(*chunk)}
            for path in self.folder.glob("*.npz"):
                if path.name not in own:
                    path.unlink(missing_ok=True)

    def _seeds(self, start: int, stop: int) -> np.ndarray:
        return np.arange(self.job.seed + start, self.job.seed + stop, dtype=np.int64)

    def read(self, count: int) -> list[Image.Image]:
        """Read the first images back, for the grid."""
        images: list[Image.Image] = []
        for start, stop in self.chunks:
            for name in self.names(start, stop)[: count - len(images)]:
                images.extend(self._load(name, start, stop))
            if len(images) >= count:
                break
        return images[:count]

    def _load(self, name: str, start: int, stop: int) -> list[Image.Image]:
        """Read a file of the chunk.

        Raises:
            DamagedFileError: it is not whole, or not of the job's size, mode or seeds.
        """
        channels, height, width = self.shape
        path = self.folder / name
        if self.job.file_format == "png":
            return [read_png(path, (width, height), PIL_MODES[channels])]
        shape, seeds = (stop - start, height, width, channels), self._seeds(start, stop)
        images = read_shard(path, shape, seeds)
        # a grid of data that has no colours shows its first channel
        return to_pil(images if channels in PIL_MODES else images[..., :1])

    def check_origin(self, settings: Path) -> None:
        """Refuse images of which nothing says how they were made, or that are not of this job.

        Raises:
            ValueError: naming one of them.
        """
        folder = settings.parent
        # images first: who starts at the same time writes the settings before the first image
        found = [p for place in (self.folder, folder) for p in place.glob("*") if _is_picture(p)]
        if not settings.exists():
            if found:
                raise ValueError(
                    f"`output` {str(folder)!r} holds images (e.g. {found[0].relative_to(folder)}) "
                    f"but no {settings.name}, which would say how they were made; choose another "
                    "folder, or delete them."
                )
            return
        own = re.compile(r"\d{6,}\.png" if self.job.file_format == "png" else r"\d{6,}-\d{6,}\.npz")
        others = [p for p in found if p.parent == self.folder and not own.fullmatch(p.name)]
        if others:
            raise ValueError(
                f"`output` {str(folder)!r} holds images that are not of its samples "
                f"({len(others)}, e.g. {others[0].relative_to(folder)}); choose another folder, or "
                "take them away."
            )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def read_shard(path: Path, shape: tuple[int, ...], seeds: np.ndarray) -> np.ndarray:
    """Return the images of a shard, uint8 `shape`.

    Raises:
        DamagedFileError: it is not whole, or of other images than those of the seeds.
    """
    found = read_npz(path, ("images", "seeds"), limit=int(np.prod(shape)) + seeds.nbytes)
    images = found["images"]
    if images.shape != shape or images.dtype != np.uint8:
        raise DamagedFileError(
            path, f"its images are {images.shape} of {images.dtype}, not {shape} of uint8"
        )
    if not np.array_equal(found["seeds"], seeds):
        raise DamagedFileError(path, f"its seeds are not {seeds[0]} .. {seeds[-1]}")
    return images


def read_png(path: Path, size: tuple[int, int], mode: str) -> Image.Image:
    """Return the image of a PNG; the check sums of all its parts are compared.

    Raises:
        DamagedFileError: it is not whole, or not of that size (width, height) and mode.
    """
    # what a PNG of that many values can take, stored, with room for what other programs add
    data = read_bytes(path, 16 * size[0] * size[1] + (1 << 20))
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if (image.size, image.mode) != (size, mode):
                raise DamagedFileError(
                    path, f"it is {image.size} of mode {image.mode}, not {size} of {mode}"
                )
            image.verify()  # leaves it unusable
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            return image
    except DamagedFileError:
        raise
    except UnidentifiedImageError as error:
        raise DamagedFileError(path, "it is no PNG") from error
    except Exception as error:  # PIL has many, and struct's and zlib's beside its own
        raise DamagedFileError(path, f"it is no whole PNG ({error})") from error


def is_whole_png(path: Path) -> bool:
    """Tell whether a file is a PNG whose check sums are right."""
    try:
        with opened(path) as file, Image.open(file, formats=("PNG",)) as image:
            image.verify()
    except Exception:
        return False
    return True
