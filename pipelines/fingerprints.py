"""Fingerprints: a SHA-256 of what a result depends on; another one means another result."""

import hashlib
from collections.abc import Mapping

import torch


def fingerprint_of(tensors: Mapping[str, torch.Tensor], about: str | None = None) -> str:
    """Return the SHA-256 of tensors, with their names, dtypes and shapes, in the order of names.

    Args:
        tensors: on any device.
        about: what they are of; None for the tensors alone.
    """
    digest = hashlib.sha256(b"" if about is None else f"{about}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(network: torch.nn.Module) -> str:
    """Return the fingerprint of a network's weights."""
    return fingerprint_of(network.state_dict())
