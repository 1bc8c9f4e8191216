"""One seed for each purpose, from the seed of a run."""

import hashlib

import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """Return a 64-bit seed for one purpose; different keys give unrelated seeds."""
    text = "/".join(str(key) for key in (seed, *keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
