"""Noise that belongs to an image: the k-th image's draws depend on its seed alone.

Each image has its own `torch.Generator` **on the CPU**, for every device of the network, and
draws x_T and the noise of each stochastic step from it in the order of sampling. So an image
depends on its seed (and the settings), not on batch size, chunking, order, device or number of
processes. Draws are made in the dtype of the sample: float64 for a float64 network, else float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

Generators = torch.Generator | list[torch.Generator]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Noise:
    """Where the noise of `num_images` images comes from: seeds, or the caller's generator(s)."""

    num_images: int
    seeds: tuple[int, ...] | None
    generator: Generators | None

    def of(self, start: int, stop: int) -> Generators:
        """Return the generators of a chunk of images, fresh ones where seeds were given."""
        if self.seeds is not None:
            return [torch.Generator("cpu").manual_seed(s) for s in self.seeds[start:stop]]
        if isinstance(self.generator, list):
            return self.generator[start:stop]
        assert self.generator is not None
        return self.generator


def make_noise(
    num_images: int | None,
    seeds: Sequence[int] | int | None,
    generator: Generators | None,
    latents: torch.Tensor | None = None,
    num_labels: int | None = None,
    num_pictures: int | None = None,
) -> Noise:
    """Settle how many images there are and where their noise comes from.

    Without seeds and generator, seeds are drawn from torch's global generator (so
    `torch.manual_seed` counts) and reported with the images, so that any image can be made again.

    Args:
        num_images: how many; None takes it from the others, else 1.
        seeds: one for each image, 0 .. 2^63 - 1.
        generator: one generator for all, drawn in diffusers' order (the noise then depends on the
            batch size like in diffusers), or a list with one for each image.
        latents: (N, C, H, W) starting points.
        num_labels: how many class labels there are, where each image has its own.
        num_pictures: how many pictures to start from there are, where each image has its own.

    Raises:
        ValueError: for counts that contradict each other, both seeds and generator, seeds without
            an order, or a seed out of range.
    """
    if seeds is not None and generator is not None:
        raise ValueError("`seeds` and `generator` are both given; pass one of the two.")
    seeds = None if seeds is None else check_seeds(seeds)
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(
                f"`generator` is {generator!r}; it must be a torch.Generator or a list of them."
            )
    counts = {"num_images": num_images}
    counts["seeds"] = None if seeds is None else len(seeds)
    counts["generator"] = len(generator) if isinstance(generator, list) else None
    counts["latents"] = None if latents is None else latents.shape[0]
    counts["class_labels"] = num_labels
    counts["image"] = num_pictures
    given = {k: v for k, v in counts.items() if v is not None}
    if len(set(given.values())) > 1:
        raise ValueError(
            f"`num_images` and the lengths of other arguments contradict each other: {given}; they "
            "must be equal."
        )
    n = next(iter(given.values()), 1)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"`num_images` is {n!r}; it must be an integer >= 1.")
    if seeds is None and generator is None:
        seeds = tuple(torch.randint(0, MAX_SEED, (n,)).tolist())
    return Noise(n, seeds, generator)


def check_seeds(seeds: Sequence[int] | int, name: str = "seeds") -> tuple[int, ...]:
    """Return `seeds` as a tuple if they have an order and each is an integer in 0 .. 2^63 - 1.

    A single integer is the seed of one image.

    Raises:
        ValueError: for a set, a mapping or no sequence at all; naming the first that is no seed.
    """
    if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool):
        seeds = [int(seeds)]
    if not isinstance(seeds, Sequence | np.ndarray):
        raise ValueError(
            f"`{name}` is {seeds!r}; it must be an integer, or a list, tuple, range or NumPy array "
            "of integers, one for each image in their order."
        )
    plain = [seed.item() if isinstance(seed, np.integer) else seed for seed in seeds]
    for i, seed in enumerate(plain):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"`{name}[{i}]` is {seed!r}; a seed is an integer in 0 .. 2**63 - 1.")
    return tuple(plain)


def draw(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return standard normal noise (B, C, H, W), row k from the k-th generator of a list."""
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
