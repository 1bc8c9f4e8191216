"""Check sums inside the files that a later run uses again: parts, features, measurements.

A file that was changed, by a disk or by hand, is found before its numbers are used. Files from
before there were seals have none: `unsealed` says whether such a one is taken as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ddim_schedulers.pipelines.fingerprints import fingerprint_of
from ddim_schedulers.reading import DamagedFileError, read_json, read_safetensors

SEAL = "sha256"


def pack_sealed(tensors: Mapping[str, torch.Tensor], about: str) -> bytes:
    """Return tensors as a safetensors file with a check sum of their contents.

    Args:
        tensors: what is kept.
        about: what they are of; a file of something else does not pass for this one.
    """
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # one key: the order of several would vary
    return save(ready, metadata={SEAL: fingerprint_of(ready, about)})


def read_sealed(path: Path, about: str, *, unsealed: bool) -> dict[str, torch.Tensor]:
    """Return the tensors that `pack_sealed` wrote.

    Args:
        path: the file.
        about: as it was when they were written.
        unsealed: take a file without a check sum, of an earlier version.

    Raises:
        DamagedFileError: it is not whole, was changed, is of something else, or holds numbers that
            are not finite.
    """
    tensors, metadata = read_safetensors(path)
    if metadata == {"format": "pt"} and unsealed:
        pass
    elif metadata.keys() != {SEAL}:
        raise DamagedFileError(path, "it has no check sum")
    elif metadata[SEAL] != fingerprint_of(tensors, about):
        raise DamagedFileError(path, "its contents have changed, or are of something else")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DamagedFileError(path, f"{name} holds values that are not finite")
    return tensors


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON content with a check sum of the rest under `SEAL`."""
    return {**content, SEAL: _check_sum(content)}


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Return what `sealed` was given, of a file; one without a check sum is taken as it is.

    Raises:
        DamagedFileError: it is not whole, or was changed.
    """
    content = read_json(path, finite=True)
    claimed = content.pop(SEAL, None)
    if claimed is not None and claimed != _check_sum(content):
        raise DamagedFileError(path, "its contents have changed")
    return content


def _check_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
