"""The files of a sampling job: their names, their settings, writing and reading them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from diffusers.utils import logging
from PIL import Image, UnidentifiedImageError

from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.files import write_json, write_npz, write_png
from ddim_schedulers.pipelines.images import PIL_MODES, to_pil
from ddim_schedulers.pipelines.workdir import Workdir
from ddim_schedulers.reading import DamagedFileError, opened, read_bytes, read_npz

if TYPE_CHECKING:
    from ddim_schedulers.class_labels import ClassLabels
    from ddim_schedulers.pipelines.labels import Label
    from ddim_schedulers.pipelines.sampling_job import SamplingJob

logger = logging.get_logger(__name__)

SETTINGS = "sample.json"
GRID = "grid.png"
GRID_IMAGES = 64
ORIGIN = "pipeline"
FORMATS = ("png", "npz")
FOLDERS = {"png": "images", "npz": "shards"}
LONGEST_NAME = 60  # of a class, in the name of a file
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".npz", ".png", ".tif", ".tiff", ".webp")


class Piece(NamedTuple):
    """A file of a job: its name, and the images from `start` to before `stop` in it."""

    name: str
    start: int
    stop: int


class SamplingFiles(Workdir[Piece, np.ndarray]):
    """The files of a job: one for each image or each chunk, and the settings of all.

    Args:
        output: the output of the job.
        job: what is sampled.
        rank: of this process.
        shape: (C, H, W) of the images.
        classes: names of the classes that the job numbers; None: the numbers are their names.
    """

    holds = "samples"
    remedy = "choose another folder, or the settings of the run to continue"
    settings_name = SETTINGS

    def __init__(
        self,
        output: Path,
        job: SamplingJob,
        rank: int,
        shape: tuple[int, int, int],
        classes: ClassLabels | None = None,
    ) -> None:
        super().__init__(output)
        self.classes = classes
        self.job, self.chunks, self.rank = job, chunks(job.num_images, job.batch_size), rank
        self.images, self.shape = output / FOLDERS[job.file_format], shape
        self.damaged: list[DamagedFileError] = []

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Return the files of a chunk, in order."""
        if self.job.file_format == "png":
            labels = self.job.labels(start, stop)
            ends = [""] * (stop - start) if labels is None else map(self._class_name, labels)
            numbered = zip(range(start, stop), ends, strict=True)
            return [Piece(f"{i:06d}{end}.png", i, i + 1) for i, end in numbered]
        return [Piece(f"{start:06d}-{stop - 1:06d}.npz", start, stop)]

    def all_pieces(self) -> list[Piece]:
        """Return the files of the job, in order."""
        return [piece for chunk in self.chunks for piece in self.pieces(*chunk)]

    def _class_name(self, label: Label) -> str:
        name = str(label) if self.classes is None else self.classes.name(int(label))
        return "-" + re.sub(r"[^\w]+", "_", name)[:LONGEST_NAME]

    def path_of(self, item: Piece) -> Path:
        """Return where a file is, or will be."""
        return self.images / item.name

    def read(self, item: Piece) -> np.ndarray:
        """Return the images of a file, uint8 (n, H, W, C).

        Raises:
            DamagedFileError: it is not whole, or not of the job's size, mode or seeds.
        """
        channels, height, width = self.shape
        path, shape = self.path_of(item), (item.stop - item.start, height, width, channels)
        if self.job.file_format == "png":
            return np.asarray(read_png(path, (width, height), PIL_MODES[channels])).reshape(shape)
        seeds = self._seeds(item)
        found = read_npz(path, ("images", "seeds"), limit=int(np.prod(shape)) + seeds.nbytes)
        images = found["images"]
        if images.shape != shape or images.dtype != np.uint8:
            raise DamagedFileError(
                path, f"its images are {images.shape} of {images.dtype}, not {shape} of uint8"
            )
        if not np.array_equal(found["seeds"], seeds):
            raise DamagedFileError(path, f"its seeds are not {seeds[0]} .. {seeds[-1]}")
        return images

    def save(self, item: Piece, value: np.ndarray) -> None:
        """Write the images of a file, uint8 (n, H, W, C)."""
        if self.job.file_format == "npz":
            arrays = {"images": value, "seeds": self._seeds(item)}
            if (labels := self.job.labels(item.start, item.stop)) is not None:
                arrays["labels"] = np.array(labels, dtype=np.int64)
            write_npz(self.path_of(item), arrays, self.rank)
        else:
            write_png(self.path_of(item), to_pil(value)[0], self.rank)

    def tell(self, error: DamagedFileError) -> None:
        """Keep the damage of a file, for `tell_of_damage`."""
        self.damaged.append(error)

    def tell_of_damage(self) -> None:
        """Warn once of all files that were made again."""
        if self.damaged:
            more = f" So are {len(self.damaged) - 1} more." if len(self.damaged) > 1 else ""
            logger.warning(f"{self.damaged[0]} It was made again.{more}")

    def drop_short_shards(self) -> None:
        """Delete the last shard of a job that was extended: a longer one holds its images."""
        if self.job.file_format == "npz":
            own = {piece.name for piece in self.all_pieces()}
            for path in self.images.glob("*.npz"):
                if path.name not in own:
                    path.unlink(missing_ok=True)

    def _seeds(self, piece: Piece) -> np.ndarray:
        return np.arange(self.job.seed + piece.start, self.job.seed + piece.stop, dtype=np.int64)

    def first(self, count: int) -> list[Image.Image]:
        """Read the first images back, for the grid.

        Raises:
            DamagedFileError: as `read`.
        """
        images: list[Image.Image] = []
        for piece in self.all_pieces():
            if len(images) >= count:
                break
            array = self.read(piece)
            # a grid of data that has no colours shows its first channel
            images += to_pil(array if self.shape[0] in PIL_MODES else array[..., :1])
        return images[:count]

    def compare(self, settings: dict[str, Any], defaults: Mapping[str, Any]) -> int | None:
        """Compare the settings with those of the run that is continued, if there is one.

        Args:
            settings: of this job, see `sampling_job.settings_of`.
            defaults: what a setting counts as that the run did not know.

        Returns:
            The number of images of that run, which may be smaller; None if there is none.

        Raises:
            ValueError: naming what differs.
        """
        try:
            before = self.kept_settings()
        except DamagedFileError as error:
            raise ValueError(
                f"{str(self.folder / self.settings_name)!r} is damaged ({error.reason}), so "
                "nothing tells how its images were made; choose another folder, or delete them "
                "and it."
            ) from error
        if before is None:
            return None
        before.pop(ORIGIN, None)
        job, asked = before.get("job"), self.job.num_images
        count: int | None = job.get("num_images") if isinstance(job, dict) else None
        if type(count) is int and 1 <= count < asked:
            before["job"] = {**before["job"], "num_images": asked}
        self.require_same(before, settings, defaults)
        return count

    def settle(
        self, settings: dict[str, Any], defaults: Mapping[str, Any], origin: dict[str, Any]
    ) -> None:
        """Write the settings, or compare them with those of the run that is continued.

        Args:
            settings: what the files depend on.
            defaults: as in `compare`.
            origin: what is written beside them, and not compared: the weights are.

        Raises:
            ValueError: naming what differs.
        """
        earlier, count = self.compare(settings, defaults), self.job.num_images
        if earlier is not None and earlier < min(count, GRID_IMAGES):
            (self.folder / GRID).unlink(missing_ok=True)  # the old grid shows fewer images
        if earlier != count:
            # processes that start together write the same bytes
            write_json(self.folder / self.settings_name, settings | origin, self.rank)

    def check_origin(self) -> None:
        """Refuse images of which nothing says how they were made, or that are not of this job.

        Raises:
            ValueError: naming one of them.
        """
        folder = self.folder
        # look at images first: a process that starts now writes its settings before its images
        found = [p for place in (self.images, folder) for p in place.glob("*") if _is_picture(p)]
        if not (folder / self.settings_name).exists():
            if found:
                raise ValueError(
                    f"`output` {str(folder)!r} holds images (e.g. {found[0].relative_to(folder)}) "
                    f"but no {self.settings_name}, which would say how they were made; choose "
                    "another folder, or delete them."
                )
            return
        own = re.compile(
            r"\d{6,}(-\w+)?\.png" if self.job.file_format == "png" else r"\d{6,}-\d{6,}\.npz"
        )
        others = [p for p in found if p.parent == self.images and not own.fullmatch(p.name)]
        if others:
            raise ValueError(
                f"`output` {str(folder)!r} holds images that are not of its samples "
                f"({len(others)}, e.g. {others[0].relative_to(folder)}); choose another folder, or "
                "take them away."
            )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def read_png(path: Path, size: tuple[int, int], mode: str) -> Image.Image:
    """Return the image of a PNG; the check sums of all its parts are compared.

    Raises:
        DamagedFileError: it is not whole, or not of that size (width, height) and mode.
    """
    # the largest PNG of that many values, uncompressed, and room for what programs add
    data = read_bytes(path, 16 * size[0] * size[1] + (1 << 20))
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if (image.size, image.mode) != (size, mode):
                raise DamagedFileError(
                    path, f"it is {image.size} of mode {image.mode}, not {size} of {mode}"
                )
            image.verify()  # the object cannot be used after this
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            return image
    except DamagedFileError:
        raise
    except UnidentifiedImageError as error:
        raise DamagedFileError(path, "it is no PNG") from error
    except Exception as error:  # PIL raises many classes, those of struct and zlib too
        raise DamagedFileError(path, f"it is no whole PNG ({error})") from error


def is_whole_png(path: Path) -> bool:
    """Tell whether a file is a PNG whose check sums are right."""
    try:
        with opened(path) as file, Image.open(file, formats=("PNG",)) as image:
            image.verify()
    except Exception:
        return False
    return True
