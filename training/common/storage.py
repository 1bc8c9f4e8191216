"""What files hold: JSON, tensors, and the names of files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from ddim_schedulers.reading import read_safetensors


def to_json(value: Any) -> bytes:
    """Return JSON that keeps floats to the bit."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as a safetensors file, on the CPU and contiguous."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save_tensors(ready, metadata={"format": "pt"})


def unpack(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; empty if there is none."""
    return read_safetensors(path)[0] if path.exists() else {}


def slug(text: str) -> str:
    """Return `text` as a file name: lower case, with dashes for all but letters, digits, dots."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
