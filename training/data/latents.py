"""Latents of a set of images, encoded once and kept in files that belong to the run.

A file holds what the encoder gave for `CHUNK` images in their order, of an `AutoencoderKL` mean and
log variance, so that every epoch can draw anew; with flips that of the mirrored image beside it. It
is sealed with the fingerprint of data and autoencoder: a file of something else is made again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.workdir import Workdir
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.common.seals import pack_sealed, read_sealed
from ddim_schedulers.training.data.images import ImageData

CHUNK = 1024  # images in a file
ENCODED = 32  # images that are encoded at a time

Encode = Callable[[torch.Tensor], torch.Tensor]


class LatentCache(Workdir[int, dict[str, torch.Tensor]]):
    """The encodings of the images of a set, by their positions.

    Args:
        folder: of the files.
        fingerprint: of all that the encodings depend on.
        data: the images.
        mirrored: keep the encodings of the mirrored images, too.
        say: called with a line of text about a damaged file.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        data: ImageData,
        mirrored: bool,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(folder)
        self.fingerprint, self.data, self.mirrored, self.say = fingerprint, data, mirrored, say
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: it opens the files itself."""
        return {**self.__dict__, "_open": {}}

    def path_of(self, item: int) -> Path:
        """Return where the encodings from image `item` CHUNK on are."""
        return self.folder / f"{item:06d}.safetensors"

    def read(self, item: int) -> dict[str, torch.Tensor]:
        """Return the encodings (n, views, M, h, w) and the images that they are of (n,).

        Raises:
            DamagedFileError: they are not whole, or of other images or another autoencoder.
        """
        return read_sealed(self.path_of(item), f"{self.fingerprint} {item}", unsealed=False)

    def save(self, item: int, value: dict[str, torch.Tensor]) -> None:
        """Write the encodings of a chunk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path_of(item), pack_sealed(value, f"{self.fingerprint} {item}"))

    def tell(self, error: DamagedFileError) -> None:
        """Say that a file is of something else, or damaged."""
        self.say(f"{error} It is made again.")

    def fill(self, encode: Encode, index: int = 0, count: int = 1) -> int:
        """Encode the chunks of process `index` of `count` that are missing; return how many."""
        parts = chunks(len(self.data), CHUNK)
        made = 0
        for item, (start, stop) in list(enumerate(parts))[index::count]:
            if self.load(item) is None:
                self.save(item, self._encoded(encode, start, stop))
                made += 1
        return made

    def rows(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
        """Return the encodings of images by position.

        Returns:
            encodings (B, M, h, w) float32, those of the mirrored images or None, and which image of
            the source each is of, (B,).
        """
        items, places = np.divmod(positions, CHUNK)
        found = [self._chunk(int(item)) for item in items]
        views = torch.stack([f["views"][p] for f, p in zip(found, places, strict=True)])
        used = [int(f["images"][p]) for f, p in zip(found, places, strict=True)]
        mirrored = views[:, 1] if self.mirrored else None
        return views[:, 0], mirrored, np.array(used, dtype=np.int64)

    def _chunk(self, item: int) -> dict[str, torch.Tensor]:
        if item not in self._open:
            with safe_open(self.path_of(item), "pt") as file:  # mapped: the system keeps what fits
                self._open[item] = {name: file.get_tensor(name) for name in ("views", "images")}
        return self._open[item]

    def _encoded(self, encode: Encode, start: int, stop: int) -> dict[str, torch.Tensor]:
        views, images = [], []
        for first, last in chunks(stop - start, ENCODED):
            x, used = self.data.read(np.arange(start + first, start + last))
            both = [encode(x)] + ([encode(x.flip(-1))] if self.mirrored else [])
            views.append(torch.stack(both, dim=1).cpu())
            images.append(torch.from_numpy(used))
        return {"views": torch.cat(views), "images": torch.cat(images)}
