"""Many restorations to a folder: resumable, split over processes, as `sampling_job`.

OUTPUT/restore.json                     the settings; a call with other settings is refused
OUTPUT/images/000000.png                sample k of measurement i is image i K + k, and has the
                                        seed `seed + i K + k`
OUTPUT/records/000000-000063.json       of a chunk: how far its images are from the measurement,
                                        and what they cost
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddim_schedulers.pipelines.files import check_folders, remove_leftovers, write_json
from ddim_schedulers.pipelines.fingerprints import fingerprint_of
from ddim_schedulers.pipelines.images import check_pil_channels, to_uint8
from ddim_schedulers.pipelines.interfaces import Bar
from ddim_schedulers.pipelines.labels import Label
from ddim_schedulers.pipelines.ownership import Owner, own
from ddim_schedulers.pipelines.restoration.checks import check_noise_std
from ddim_schedulers.pipelines.restoration.methods import Ddnm, Method
from ddim_schedulers.pipelines.restoration.pipeline import RestorationOutput, RestorationPipeline
from ddim_schedulers.pipelines.restoration.tasks import Task
from ddim_schedulers.pipelines.sampling import is_compiled
from ddim_schedulers.pipelines.sampling_files import FOLDERS, SamplingFiles
from ddim_schedulers.pipelines.sampling_job import (
    NO_GUIDES,
    Guides,
    SamplingJob,
    SamplingReport,
    origin_of,
    settings_of,
)
from ddim_schedulers.pipelines.workdir import Workdir
from ddim_schedulers.reading import DamagedFileError, read_json

SETTINGS = "restore.json"
RECORDS = "records"
_NUMBERS = ("network_calls", "backward_passes")
_LISTS = ("residual", "residual_clamped")


@dataclass(frozen=True)
class RestorationJob(SamplingJob):
    """What is to be restored; `num_images` counts the samples of all measurements.

    Attributes:
        num_samples: K, of each measurement; divides `num_images`.
        noise_std: of the measurements, in units of images in [-1, 1].
        method: with its settings.
        eta_rule: as in restoration.
    """

    num_samples: int = 1
    noise_std: float = 0.0
    method: Method = field(default_factory=Ddnm)
    eta_rule: str = "family"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the one that is out of range.
        """
        super().__post_init__()
        each = self.num_samples
        if isinstance(each, bool) or not isinstance(each, int) or each < 1:
            raise ValueError(f"`num_samples` is {each!r}; it must be an integer >= 1.")
        if self.num_images % each:
            raise ValueError(
                f"`num_images` is {self.num_images}; it must be a multiple of `num_samples`, "
                f"{each}."
            )
        check_noise_std(self.noise_std)

    def labels(self, start: int, stop: int) -> list[Label] | None:
        """Return the classes of some images: measurement i has class i modulo their number."""
        given = self.class_labels
        if given is None:
            return None
        return [given[i // self.num_samples % len(given)] for i in range(start, stop)]


class Chunk(NamedTuple):
    """Images that are computed together, from `start` to before `stop`."""

    start: int
    stop: int


class Records(Workdir[Chunk, dict[str, Any]]):
    """What is known of each chunk beside its pictures."""

    def __init__(self, folder: Path, rank: int, files: SamplingFiles) -> None:
        super().__init__(folder)
        self.rank, self.files = rank, files

    def path_of(self, item: Chunk) -> Path:
        """Return where the record of a chunk is, or will be."""
        return self.folder / RECORDS / f"{item.start:06d}-{item.stop - 1:06d}.json"

    def read(self, item: Chunk) -> dict[str, Any]:
        """Return a record.

        Raises:
            DamagedFileError: it is not whole, or not of this chunk.
        """
        path, count = self.path_of(item), item.stop - item.start
        found = read_json(path)
        lists = [found.get(name) for name in _LISTS]
        if any(not isinstance(x, list) or len(x) != count for x in lists) or any(
            type(found.get(name)) is not int for name in _NUMBERS
        ):
            raise DamagedFileError(path, f"it is no record of {count} images")
        return found

    def save(self, item: Chunk, value: dict[str, Any]) -> None:
        """Write a record."""
        write_json(self.path_of(item), value, self.rank)

    def tell(self, error: DamagedFileError) -> None:
        """Keep the damage with that of the pictures."""
        self.files.tell(error)


class RestorationFiles(SamplingFiles):
    """The files of a restoration."""

    holds = "restorations"
    settings_name = SETTINGS


def restore_to_directory(
    pipe: RestorationPipeline,
    output: str | Path,
    job: RestorationJob,
    task: Task,
    measurement: torch.Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
    guides: Guides = NO_GUIDES,
) -> SamplingReport:
    """Restore this process's share of a job into a folder, without the files that are whole.

    Args:
        pipe: the pipeline, on its device.
        output: the folder; created where missing.
        job: what to restore, the same for every process.
        task: the operator, and what it depends on.
        measurement: y, (N, ...), of images in [-1, 1]; the same for every process.
        rank: of this process.
        world_size: number of processes.
        guides: the networks beside the pipeline's.

    Raises:
        FolderInUseError: another process owns the folder, see `ownership`.
        ValueError: as `RestorationPipeline`, or if the folder holds other restorations.
    """
    check_pil_channels(pipe.image_shape[0])
    if len(measurement) * job.num_samples != job.num_images:
        raise ValueError(
            f"`measurement` has {len(measurement)} rows of {job.num_samples} samples each; they "
            f"must be {job.num_images} images, as `num_images`."
        )
    folder = Path(output)
    check_folders(folder, FOLDERS[job.file_format], "`output`")
    with own(folder, "restore", rank=rank, world_size=world_size) as owner:
        return _restore_share(pipe, folder, job, task, measurement, rank, world_size, guides, owner)


def records_of(output: str | Path, job: RestorationJob) -> dict[str, Any]:
    """Return the records of all images of a job that is complete, put together.

    Raises:
        DamagedFileError: one is not whole.
    """
    files = RestorationFiles(Path(output), job, 0, (1, 1, 1))
    found = [Records(Path(output), 0, files).read(Chunk(*chunk)) for chunk in files.chunks]
    whole: dict[str, Any] = {name: [x for r in found for x in r[name]] for name in _LISTS}
    return whole | {name: max(r[name] for r in found) for name in _NUMBERS}


def images_of(output: str | Path, job: RestorationJob, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images of a job that is complete, uint8 (N K, H, W, C).

    Raises:
        DamagedFileError: one is not whole.
    """
    files = RestorationFiles(Path(output), job, 0, shape)
    return np.concatenate([files.read(piece) for piece in files.all_pieces()])


def _restore_share(
    pipe: RestorationPipeline,
    folder: Path,
    job: RestorationJob,
    task: Task,
    measurement: torch.Tensor,
    rank: int,
    world_size: int,
    guides: Guides,
    owner: Owner,
) -> SamplingReport:
    files = RestorationFiles(folder, job, rank, pipe.image_shape)
    records = Records(folder, rank, files)
    for place in (folder, files.images, folder / RECORDS):
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place, rank, world_size)
    settings = _settings(pipe, job, task, measurement, guides)
    files.check_origin()
    files.compare(settings, {})
    mine = [Chunk(*chunk) for chunk in files.chunks[rank::world_size]]
    calls = job.method.calls(len(pipe.planned(job.num_inference_steps, job.timesteps, "cpu")))
    written = present = restored = 0
    with pipe.progress_bar(total=calls * len(mine)) as bar:
        bar.set_description(f"{job.num_images} images, network calls")
        for chunk in mine:
            pieces = files.pieces(*chunk)
            missing = files.missing(pieces)
            if not missing and records.load(chunk) is not None:
                bar.update(calls)
            else:
                restored += chunk.stop - chunk.start
                output = _restore(pipe, job, task, measurement, chunk, guides, bar)
                owner.check()
                if not written:
                    # not before there are images: a job that fails binds no corrected call
                    files.settle(settings, {}, origin_of(pipe))
                assert isinstance(output.images, torch.Tensor)
                images = to_uint8(output.images)
                for piece in missing:
                    files.save(piece, images[piece.start - chunk.start : piece.stop - chunk.start])
                records.save(chunk, _record(output))
            written += len(missing)
            present += len(pieces) - len(missing)
    files.tell_of_damage()
    complete = all(files.path_of(piece).is_file() for piece in files.all_pieces())
    complete &= all(records.path_of(Chunk(*chunk)).is_file() for chunk in files.chunks)
    return SamplingReport(written, present, complete, restored)


def _restore(
    pipe: RestorationPipeline,
    job: RestorationJob,
    task: Task,
    measurement: torch.Tensor,
    chunk: Chunk,
    guides: Guides,
    bar: Bar,
) -> RestorationOutput:
    """Return the restored images of a chunk, on the CPU in [-1, 1]."""
    start, stop = chunk
    # a compiled network would compile again for a smaller last batch: it makes images too many
    full = is_compiled(pipe.unet) and job.num_images > job.batch_size
    end = start + job.batch_size if full else stop
    rows = [min(i // job.num_samples, len(measurement) - 1) for i in range(start, end)]
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        output = pipe(
            measurement[rows],
            task.operator,
            job.noise_std,
            job.method,
            seeds=range(job.seed + start, job.seed + end),
            batch_size=job.batch_size,
            num_inference_steps=job.num_inference_steps,
            timesteps=job.timesteps,
            eta=job.eta,
            eta_rule=job.eta_rule,
            callback_on_step_end=bar.update,
            output_type="latent",
            **job.conditions(guides, start, end),
        )
    finally:
        pipe.set_progress_bar_config(**quiet)
    count = stop - start
    for name in ("images", "residual", "residual_clamped"):
        setattr(output, name, getattr(output, name)[:count])
    return output


def _record(output: RestorationOutput) -> dict[str, Any]:
    lists = {name: getattr(output, name).tolist() for name in _LISTS}
    return lists | {name: getattr(output, name) for name in _NUMBERS}


def _settings(
    pipe: RestorationPipeline,
    job: RestorationJob,
    task: Task,
    measurement: torch.Tensor,
    guides: Guides,
) -> dict[str, Any]:
    """Return everything that the files depend on, as JSON types."""
    settings = settings_of(pipe, job, guides)
    settings["job"]["method"] = job.method.settings()
    settings["task"] = {"name": task.name, **task.settings}
    settings["measurement"] = fingerprint_of({"measurement": measurement})
    return json.loads(json.dumps(settings))
