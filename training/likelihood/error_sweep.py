"""One pass of a network over images and timesteps, in parts that are kept and shared out.

A part is (a chunk of images, a block of timesteps). Its noise depends on the seed, the chunk and t
alone, so that any number of processes gets the same numbers, and a part that is on disk is not
computed again.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers.betas import alpha_bar_before
from ddim_schedulers.likelihood import predict_x0
from ddim_schedulers.pipelines.base import check_batch_size
from ddim_schedulers.pipelines.ownership import Owner
from ddim_schedulers.reading import DamagedFileError, read_json
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.sealed_parts import SealedParts, Tensors, discard_parts
from ddim_schedulers.training.common.seals import read_sealed
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel

STATISTICS = ("gamma", "eps_error", "x0_error")
TIMESTEPS_PER_PART = 50
CLAIM = "pass.json"
SEALED = "sealed"  # in the claim: every part has a check sum
# what the fingerprint of a network is of, so that a refusal can say which of them differs
NETWORK_PARTS = ("weights", "alpha_bar", "prediction_type", "scheduler_clip")


@dataclass(frozen=True)
class ErrorSweep:
    """What one network call for each image and timestep says.

    Attributes:
        timesteps: the n timesteps, increasing.
        statistics: of each image, float64 (3, N, n): ||eps_theta||^2 / d, ||eps - eps_theta||^2 /
            d, and ||x_0 - x0_hat||^2 / d with the clipping asked for.
        x0_hat: at timestep 0, float64 (N, C, H, W); empty if 0 is not among the timesteps.
        calls: network calls that this session made, of all processes, in batches.
    """

    timesteps: list[int]
    statistics: torch.Tensor
    x0_hat: torch.Tensor
    calls: int


def measure(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    timesteps: Sequence[int],
    clip: float | None,
    seed: int,
    chunk: int,
) -> dict[str, torch.Tensor]:
    """Measure one part: `statistics` (3, B, n) of images (B, C, H, W), `x0_hat` at timestep 0."""
    x0, before = images.to(torch.float64), alpha_bar_before(measured_model.alpha_bar)
    rows, first = [], torch.empty(0)
    for t in timesteps:
        noise = torch.randn(x0.shape, generator=generator(seed, "pass", chunk, t)).to(x0)
        steps = torch.full((len(x0),), t)
        x0_hat, eps_hat, _ = predict_x0(
            measured_model.predict_mean,
            x0,
            steps,
            measured_model.alpha_bar[steps],
            before[steps],
            noise,
            measured_model.prediction_type,
            clip,
            measured_model.dtype,
        )
        squares = (eps_hat**2, (noise - eps_hat) ** 2, (x0 - x0_hat) ** 2)
        rows.append(torch.stack([v.flatten(1).mean(1) for v in squares]))
        if t == 0:
            first = x0_hat
    return {"statistics": torch.stack(rows, 2), "x0_hat": first}


def run_error_sweep(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    timesteps: Sequence[int],
    *,
    clip: float | None,
    seed: int,
    batch_size: int,
    work_dir: Path,
    team: Team | None = None,
    progress: Any = None,
) -> ErrorSweep:
    """Measure all images at all timesteps, sharing the parts among processes.

    Args:
        measured_model: network and process.
        images: (N, C, H, W) in [-1, 1], the same on every process.
        timesteps: which, any order.
        clip: limit of |x0_hat|, or None.
        seed: of the noise.
        batch_size: images in a chunk.
        work_dir: where parts are kept; all processes must see it. An interrupted pass goes on.
        team: the processes that share it; None for this one alone.
        progress: called with a line of text after each part, or None.

    Raises:
        FolderInUseError: another process owns `work_dir`.
        ValueError: if `batch_size` is below 1, or `work_dir` holds parts of another pass.
    """
    check_batch_size(batch_size)
    team = Team() if team is None else team
    with own_together(work_dir, "a pass", team, transient=True) as owner:
        return _run(
            measured_model,
            images,
            sorted(timesteps),
            clip=clip,
            seed=seed,
            batch_size=batch_size,
            work_dir=work_dir,
            team=team,
            progress=progress,
            owner=owner,
        )


def _run(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    asked: list[int],
    *,
    clip: float | None,
    seed: int,
    batch_size: int,
    work_dir: Path,
    team: Team,
    progress: Any,
    owner: Owner,
) -> ErrorSweep:
    blocks = [asked[i : i + TIMESTEPS_PER_PART] for i in range(0, len(asked), TIMESTEPS_PER_PART)]
    chunks = math.ceil(len(images) / batch_size)
    parts = [(c, b) for c in range(chunks) for b in range(len(blocks))]
    settings = settings_of(measured_model, images, asked, clip, seed, batch_size)
    kept = SweepFiles(work_dir, settings, images.shape, blocks, batch_size, team, owner)
    kept.claim()
    calls = 0

    def make(part: Part) -> Tensors:
        nonlocal calls
        (c, b), start = part, part[0] * batch_size
        calls += len(blocks[b])
        model = measured_model.of(start, start + batch_size)
        return measure(model, images[start : start + batch_size], blocks[b], clip, seed, c)

    found = kept.shared(parts, make, progress or (lambda line: None))
    read = [found[c * len(blocks) : (c + 1) * len(blocks)] for c in range(chunks)]
    statistics = torch.cat([torch.cat([p["statistics"] for p in row], 2) for row in read], 1)
    first = torch.cat([row[0]["x0_hat"] for row in read])
    return ErrorSweep(asked, statistics, first, sum(team.gather([calls])))


def discard(work_dir: Path) -> None:
    """Delete the parts of a pass that is done, and the folder unless it holds anything else."""
    discard_parts(work_dir, SweepFiles)


Part = tuple[int, int]  # the number of a chunk of images, and of a block of timesteps


class SweepFiles(SealedParts[Part]):
    """The parts of one pass, and the claim that says what they are of.

    Args:
        work_dir: where they are.
        settings: see `settings_of`.
        images: shape (N, C, H, W) of all images.
        blocks: the timesteps of each block.
        batch_size: images in a chunk.
        team: the processes.
        owner: of the folder.
    """

    holds = "an unfinished pass"
    settings_name = CLAIM
    unit = "pass"
    names = (f"part-{'[0-9]' * 5}-{'[0-9]' * 5}.safetensors",)
    # an earlier version noted less, and not which inputs of `network` differ
    newer = (SEALED, *NETWORK_PARTS)

    def __init__(
        self,
        work_dir: Path,
        settings: dict[str, Any],
        images: torch.Size,
        blocks: list[list[int]],
        batch_size: int,
        team: Team,
        owner: Owner,
    ) -> None:
        super().__init__(work_dir, {**settings, SEALED: True}, team, owner)
        self.images, self.blocks, self.batch_size = images, blocks, batch_size

    @cached_property
    def _about(self) -> str:
        return json.dumps(self.claimed, sort_keys=True)

    @cached_property
    def claimed(self) -> dict[str, Any]:
        """Return the claim, once it is made."""
        return read_json(self.folder / CLAIM, finite=True)

    def path_of(self, item: Part) -> Path:
        """Return where a part is, or will be."""
        return self.folder / f"part-{item[0]:05d}-{item[1]:05d}.safetensors"

    def read(self, item: Part) -> dict[str, torch.Tensor]:
        """Return the tensors of a part.

        Raises:
            DamagedFileError: it is not what was written.
        """
        path, (c, b) = self.path_of(item), item
        # a pass of an earlier version goes on with the parts that it has
        found = read_sealed(path, f"{self._about} {item}", unsealed=SEALED not in self.claimed)
        rows = min(self.batch_size, self.images[0] - c * self.batch_size)
        block = self.blocks[b]
        first = (rows, *self.images[1:]) if 0 in block else (0,)
        shapes = {"statistics": (len(STATISTICS), rows, len(block)), "x0_hat": first}
        if {name: tuple(t.shape) for name, t in found.items()} != shapes:
            raise DamagedFileError(path, f"it does not hold {shapes}")
        if found["statistics"].dtype != torch.float64 or bool((found["statistics"] < 0).any()):
            raise DamagedFileError(path, "its statistics are no mean squares")
        return found


def settings_of(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    timesteps: list[int],
    clip: float | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Return everything that the parts of a pass depend on, as JSON types."""
    data = hashlib.sha256(images.to(torch.float64).contiguous().numpy().tobytes()).hexdigest()
    labels = {}
    if measured_model.labels is not None:
        numbers = measured_model.labels.to(torch.int64).cpu().numpy().tobytes()
        labels["labels"] = hashlib.sha256(numbers).hexdigest()
    return {
        **labels,
        "network": measured_model.fingerprint(),
        "images": [len(images), data],
        "timesteps": timesteps,
        "clip": clip,
        "seed": seed,
        "batch_size": batch_size,
        **dict(zip(NETWORK_PARTS, measured_model.parts(), strict=True)),
    }
