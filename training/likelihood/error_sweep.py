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
from diffusers.utils import logging

from ddim_schedulers.betas import alpha_bar_before
from ddim_schedulers.likelihood import predict_x0
from ddim_schedulers.pipelines.base import check_batch_size
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.ownership import Owner
from ddim_schedulers.pipelines.workdir import Workdir
from ddim_schedulers.reading import DamagedFileError, read_json
from ddim_schedulers.training.common.processes import Team, own_together
from ddim_schedulers.training.common.sealed_parts import discard_parts
from ddim_schedulers.training.common.seals import pack_sealed, read_sealed
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.common.storage import to_json
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel

logger = logging.get_logger(__name__)

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
    work_dir.mkdir(parents=True, exist_ok=True)  # on each machine
    kept = SweepFiles(work_dir, images.shape, blocks, batch_size, tells=team.index == 0)
    if team.index == 0:
        kept.claim(settings_of(measured_model, images, asked, clip, seed, batch_size))
    team.wait()
    todo = kept.missing(parts)
    mine = todo[team.index :: team.count]
    team.wait()  # nobody writes before all have seen what is left
    for number, (c, b) in enumerate(mine):
        start, stop = c * batch_size, (c + 1) * batch_size
        model = measured_model.of(start, stop)
        values = measure(model, images[start:stop], blocks[b], clip, seed, c)
        owner.check()
        kept.save((c, b), values)
        if progress is not None:
            progress(f"part {number + 1} of {len(mine)}")
    team.wait()
    if missing := [p for p in parts if not kept.path_of(p).exists()]:
        raise ValueError(
            f"`work_dir` is {str(work_dir)!r}, which lacks {len(missing)} of {len(parts)} parts; "
            "it must be a folder that all processes see"
        )
    read = [[kept.read((c, b)) for b in range(len(blocks))] for c in range(chunks)]
    statistics = torch.cat([torch.cat([p["statistics"] for p in row], 2) for row in read], 1)
    first = torch.cat([row[0]["x0_hat"] for row in read])
    team.wait()  # nobody deletes the parts before all have read them
    calls = sum(len(blocks[b]) for _, b in todo)
    return ErrorSweep(asked, statistics, first, calls)


def discard(work_dir: Path) -> None:
    """Delete the parts of a pass that is done, and the folder unless it holds anything else."""
    discard_parts(work_dir, CLAIM)


Part = tuple[int, int]  # the number of a chunk of images, and of a block of timesteps


class SweepFiles(Workdir[Part, dict[str, torch.Tensor]]):
    """The parts of one pass, and the claim that says what they are of.

    Args:
        work_dir: where they are.
        images: shape (N, C, H, W) of all images.
        blocks: the timesteps of each block.
        batch_size: images in a chunk.
        tells: whether this process tells of damage.
    """

    argument = "work_dir"
    holds = "an unfinished pass"
    remedy = "delete it, or choose another folder"
    settings_name = CLAIM

    def __init__(
        self,
        work_dir: Path,
        images: torch.Size,
        blocks: list[list[int]],
        batch_size: int,
        *,
        tells: bool,
    ) -> None:
        super().__init__(work_dir)
        self.images, self.blocks, self.batch_size, self.tells = images, blocks, batch_size, tells

    def claim(self, settings: dict[str, Any]) -> None:
        """Note what the parts in the folder are of, or refuse those of another pass.

        Raises:
            ValueError: naming what differs.
        """
        try:
            before = self.kept_settings()
        except DamagedFileError as error:
            # the parts that were sealed for this very pass are still recognised
            logger.warning(f"{error} It is made again, and parts of this pass are used.")
            before = None
        if before is None:
            write_bytes(self.folder / CLAIM, to_json({**settings, SEALED: True}))
            return
        # which inputs of `network` differ is not known of a pass of an earlier version
        unknown = {name: settings[name] for name in NETWORK_PARTS if name not in before}
        self.require_same({SEALED: True, **unknown, **before}, {SEALED: True, **settings})

    @cached_property
    def claimed(self) -> dict[str, Any]:
        """Return the claim, once it is made."""
        return read_json(self.folder / CLAIM, finite=True)

    def about(self, part: Part) -> str:
        """Return what a part is of, for its check sum."""
        return f"{json.dumps(self.claimed, sort_keys=True)} {part}"

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
        found = read_sealed(path, self.about(item), unsealed=SEALED not in self.claimed)
        rows = min(self.batch_size, self.images[0] - c * self.batch_size)
        block = self.blocks[b]
        first = (rows, *self.images[1:]) if 0 in block else (0,)
        shapes = {"statistics": (len(STATISTICS), rows, len(block)), "x0_hat": first}
        if {name: tuple(t.shape) for name, t in found.items()} != shapes:
            raise DamagedFileError(path, f"it does not hold {shapes}")
        if found["statistics"].dtype != torch.float64 or bool((found["statistics"] < 0).any()):
            raise DamagedFileError(path, "its statistics are no mean squares")
        return found

    def save(self, item: Part, value: dict[str, torch.Tensor]) -> None:
        """Write the tensors of a part."""
        write_bytes(self.path_of(item), pack_sealed(value, self.about(item)))

    def tell(self, error: DamagedFileError) -> None:
        """Warn of a damaged part."""
        if self.tells:
            logger.warning(f"{error} It is measured again.")


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
