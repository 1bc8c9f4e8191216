"""What a run is made from, as fingerprints: a resumed run can tell whether it is the same.

Settings name files; what decides is what is in them. A set of images of up to `WHOLE` bytes is read
whole; of a larger one the names and sizes count, and the bytes of `SAMPLE` images that are spread
evenly over it.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddim_schedulers.training.data.labels import Classes
from ddim_schedulers.training.data.sources import ImageSource
from ddim_schedulers.training.data.streams import LOOKED_AT
from ddim_schedulers.training.objectives.losses import read_vector

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer.trainer import Trainer

WHOLE = 256 * 2**20
SAMPLE = 1024
_FIRST = 256 * 2**10  # bytes of a sampled image that are read


def images_fingerprint(source: ImageSource, first: int | None = None) -> dict[str, str]:
    """Return the SHA-256 of a source's images in their order, and what it was taken of.

    With `first` only so many count: how many of a stream are held depends on what is looked at.
    """
    count = len(source) if first is None else min(first, len(source))
    whole = source.stored_bytes() <= WHOLE
    limit = None if whole else _FIRST
    chosen = range(count) if whole else np.linspace(0, count - 1, min(SAMPLE, count)).astype(int)
    digest = hashlib.sha256(str(count).encode())
    for line in source.listing():
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    for index in chosen:
        name, raw = source.raw(int(index))
        data = _bytes_of(raw, limit)
        digest.update(f"{name}\0{len(data)}\0".encode(errors="surrogateescape"))
        digest.update(data)
    of = f"names and bytes of {'all' if first is None else 'the first'} {count} images"
    if not whole:
        of = (
            f"names and sizes of all {count} images as far as they are listed, and the first "
            f"{_FIRST} bytes of {len(chosen)} of them"
        )
    return {"sha256": digest.hexdigest(), "of": of}


def labels_fingerprint(classes: Classes, first: int | None) -> str:
    """Return the SHA-256 of the classes and of the labels of all images, or of the `first`."""
    assert classes.numbers is not None
    known = json.dumps([classes.count, list(classes.names), classes.rows])
    numbers = classes.numbers[:first].astype("<i8")
    return hashlib.sha256(known.encode() + numbers.tobytes()).hexdigest()


def _bytes_of(raw: Any, limit: int | None) -> Any:
    if isinstance(raw, Path):
        if not raw.is_file():
            return b""
        try:
            with open(raw, "rb") as file:
                return file.read() if limit is None else file.read(limit)
        except OSError:  # it becomes a bad image where it is used
            return b""
    if raw is None:
        return b""
    data = np.ascontiguousarray(raw).tobytes() if isinstance(raw, np.ndarray) else raw
    return data if limit is None else data[:limit]


def contents_of(trainer: "Trainer") -> dict[str, Any]:
    """Return what `trainer` computes from, beside settings and network."""
    config, gamma = trainer.config, None
    if config.gamma not in (None, "ddim"):
        weights = read_vector(str(config.gamma)).numpy()
        gamma = hashlib.sha256(weights.tobytes()).hexdigest()
    found = {
        "data": images_fingerprint(
            trainer.data.source, LOOKED_AT if trainer.stream is not None else None
        ),
        "gamma": gamma,
        "mixed_precision": str(trainer.accelerator.mixed_precision),
        "allow_tf32": config.allow_tf32,
    }
    if trainer.data.classes is not None:
        first = None if trainer.stream is None else LOOKED_AT
        found["labels"] = labels_fingerprint(trainer.data.classes, first)
    if trainer.latents is not None:
        found["vae"] = trainer.latents.contents()
    return found
