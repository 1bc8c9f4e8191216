"""Many samples to a folder: resumable, split over processes, the same files for every split.

The images 0 .. N - 1 are cut into chunks of `batch_size`. Chunk boundaries depend on nothing else,
so that an image is computed in the same batch for any number of processes. Process r of W takes the
chunks r, r + W, ... Image i has the seed `seed + i`. The processes do not talk to each other; each
writes its files under a temporary name and renames them.

    OUTPUT/sample.json          the settings; a second call with other settings is refused, except
                                that a larger number of images adds the missing ones
    OUTPUT/images/000000.png    one file an image, or
    OUTPUT/shards/000000-000063.npz
                                one file a chunk: `images` uint8 (n, H, W, C) and `seeds` (n,)
    OUTPUT/images/000000-cat.png, and `labels` (n,) in a shard: the class, where images have one
    OUTPUT/grid.png             the first images, once all files exist
"""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_schedulers.class_labels import class_labels_of
from ddim_schedulers.pipelines.base import UnconditionalPipeline, check_batch_size
from ddim_schedulers.pipelines.compatibility import SINGLE_STEP, check_scheduler
from ddim_schedulers.pipelines.conditions import BoundConditions, Conditions, known_classes
from ddim_schedulers.pipelines.files import check_folders, remove_leftovers, write_png
from ddim_schedulers.pipelines.fingerprints import weights_fingerprint
from ddim_schedulers.pipelines.generation import GenerationPipeline
from ddim_schedulers.pipelines.images import check_pil_channels, read_image, to_uint8
from ddim_schedulers.pipelines.labels import Label
from ddim_schedulers.pipelines.noise import MAX_SEED
from ddim_schedulers.pipelines.observers import warn_of_clipping
from ddim_schedulers.pipelines.ownership import Owner, own
from ddim_schedulers.pipelines.pictures import make_grid
from ddim_schedulers.pipelines.sampling import is_compiled, plan, step_arguments
from ddim_schedulers.pipelines.sampling_files import (
    FOLDERS,
    FORMATS,
    GRID,
    GRID_IMAGES,
    ORIGIN,
    SamplingFiles,
    is_whole_png,
)
from ddim_schedulers.pipelines.source import check_strength, steps_of
from ddim_schedulers.reading import DamagedFileError

# What a job says of classes and guidance.
CONDITION_KEYS = (
    "class_labels",
    "guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "negative_label",
)


@dataclass(frozen=True)
class Guides:
    """The networks beside the pipeline's, on its device; see `conditions.Conditions`."""

    guide: Any = None
    classifier: torch.nn.Module | None = None


NO_GUIDES = Guides()


@dataclass(frozen=True)
class SamplingJob:
    """What is to be sampled.

    Attributes:
        num_images: N.
        batch_size: images in one network call, and in one shard.
        seed: image i has the seed `seed + i`.
        file_format: `png` (one file an image) or `npz` (one shard a chunk); both are lossless
            uint8.
        num_inference_steps: as in generation.
        timesteps: as in generation.
        eta: as in generation.
        use_clipped_model_output: as in generation.
        class_labels: names or numbers of classes; image i has the class i modulo their number. None
            takes all classes of a conditional network in turn.
        guidance_scale: as in generation.
        guidance_interval: as in generation.
        guidance_rescale: as in generation.
        negative_label: as in generation.
        image: paths of pictures to start from; image i starts from picture i modulo their number.
            The settings of the files name their check sums, not their paths.
        strength: as in generation.
    """

    num_images: int
    batch_size: int = 64
    seed: int = 0
    file_format: str = "png"
    num_inference_steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    use_clipped_model_output: bool | None = None
    class_labels: tuple[Label, ...] | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    negative_label: Label | None = None
    image: tuple[str, ...] | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the one that is out of range.
        """
        check_batch_size(self.batch_size)
        if (
            isinstance(self.num_images, bool)
            or not isinstance(self.num_images, int)
            or self.num_images < 1
        ):
            raise ValueError(f"`num_images` is {self.num_images!r}; it must be an integer >= 1.")
        if self.file_format not in FORMATS:
            raise ValueError(f"`file_format` is {self.file_format!r}; it must be one of {FORMATS}.")
        if not 0 <= self.seed <= MAX_SEED - self.num_images:
            raise ValueError(
                f"`seed` is {self.seed!r}; the seeds seed .. seed + num_images - 1 must lie in 0 "
                ".. 2**63 - 1."
            )
        if self.class_labels is not None and not self.class_labels:
            raise ValueError("`class_labels` is empty; it must be None or at least one class.")
        if self.image is not None and not self.image:
            raise ValueError("`image` is empty; it must be None or at least one path.")
        check_strength(self.image, self.strength)
        Conditions(**{key: getattr(self, key) for key in CONDITION_KEYS})

    def labels(self, start: int, stop: int) -> list[Label] | None:
        """Return the classes of the images start .. stop - 1."""
        given = self.class_labels
        return None if given is None else [given[i % len(given)] for i in range(start, stop)]

    def pictures(self, start: int, stop: int) -> list[str] | None:
        """Return the paths of the pictures that the images start .. stop - 1 start from."""
        given = self.image
        return None if given is None else [given[i % len(given)] for i in range(start, stop)]

    def conditions(self, guides: Guides, start: int, stop: int) -> dict[str, Any]:
        """Return the arguments of generation that are the conditions of some images."""
        own = {key: getattr(self, key) for key in CONDITION_KEYS}
        return {**own, **vars(guides), "class_labels": self.labels(start, stop)}


@dataclass(frozen=True)
class SamplingReport:
    """What one process did.

    Attributes:
        written: files that it wrote.
        present: files that it found whole.
        complete: are all files there?
        sampled: images that it computed.
    """

    written: int
    present: int
    complete: bool
    sampled: int = 0


def process_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (rank, number of processes) as torchrun and accelerate launch announce them.

    Raises:
        ValueError: if they are not integers, or RANK is not below WORLD_SIZE.
    """
    named = {"RANK": environment.get("RANK", "0"), "WORLD_SIZE": environment.get("WORLD_SIZE", "1")}
    try:
        rank, size = (int(value) for value in named.values())
    except ValueError as error:
        raise ValueError(
            f"`RANK` is {named['RANK']!r} in the environment and `WORLD_SIZE` "
            f"{named['WORLD_SIZE']!r}; both must be integers, as torchrun sets them."
        ) from error
    if not 0 <= rank < size:
        raise ValueError(
            f"`RANK` is {rank} and `WORLD_SIZE` {size}; RANK must lie in 0 .. WORLD_SIZE - 1."
        )
    return rank, size


def sample_to_directory(
    pipe: GenerationPipeline,
    output: str | Path,
    job: SamplingJob,
    *,
    rank: int = 0,
    world_size: int = 1,
    guides: Guides = NO_GUIDES,
) -> SamplingReport:
    """Sample this process's share of a job into a folder, without the files that are whole.

    A file that is damaged, or not of the job's size and mode, is made again, with a warning.

    Args:
        pipe: the pipeline, on its device.
        output: the folder; created where missing.
        job: what to sample, the same for every process.
        rank: of this process.
        world_size: number of processes.
        guides: of auto guidance, or classifier guidance.

    Raises:
        FolderInUseError: another process owns the folder, see `ownership`.
        ValueError: if the folder holds a job with other settings, naming what differs, or images
            without settings, if its settings are damaged, if the network's channels do not fit
            PNG, for steps or an eta that the scheduler refuses, or for samples that are not
            finite, of which no file is written.
    """
    if job.file_format == "png":
        check_pil_channels(pipe.picture_shape[0])
    # before the settings are written: a corrected call would have to agree with them
    if job.strength is not None:
        check_scheduler(pipe.scheduler, SINGLE_STEP, "`image`")
    tau = plan(pipe.scheduler, job.num_inference_steps, job.timesteps, "cpu")
    if job.strength is not None:
        steps_of(job.strength, tau)
    step_arguments(pipe.scheduler, None, job.eta, job.use_clipped_model_output)
    job = with_classes(pipe, job, guides)
    folder = Path(output)
    check_folders(folder, FOLDERS[job.file_format], "output")
    with own(folder, "sample", rank=rank, world_size=world_size) as owner:
        return _sample_share(pipe, folder, job, guides, rank, world_size, owner)


def _sample_share(
    pipe: GenerationPipeline,
    folder: Path,
    job: SamplingJob,
    guides: Guides,
    rank: int,
    world_size: int,
    owner: Owner,
) -> SamplingReport:
    classes = known_classes(pipe.unet, guides.classifier)
    files = SamplingFiles(folder, job, rank, pipe.picture_shape, classes)
    files.images.mkdir(parents=True, exist_ok=True)
    for place in (folder, files.images):
        remove_leftovers(place, rank, world_size)
    settings, defaults = settings_of(pipe, job, guides), defaults_of_settings(pipe)
    files.check_origin()
    files.compare(settings, defaults)
    tau = plan(pipe.scheduler, job.num_inference_steps, job.timesteps, "cpu")
    steps = len(tau) if job.strength is None else steps_of(job.strength, tau)
    written = present = sampled = 0
    clipped: list[tuple[float, int]] = []
    with pipe.progress_bar(total=steps * len(files.chunks[rank::world_size])) as bar:
        bar.set_description(f"{job.num_images} images, steps")
        for start, stop in files.chunks[rank::world_size]:
            pieces = files.pieces(start, stop)
            missing = files.missing(pieces)
            if missing:
                sampled += stop - start
                images, share = _sample(pipe, job, start, stop, bar, guides)
                owner.check()
                clipped += [] if share is None else [(share, len(images))]
                if not written:
                    # only after the first images: a corrected call is free of a job that failed
                    files.settle(settings, defaults, origin_of(pipe))
                for piece in missing:
                    files.save(piece, images[piece.start - start : piece.stop - start])
            written += len(missing)
            present += len(pieces) - len(missing)
            bar.update(0 if missing else steps)
    if clipped and pipe._warns_of_clipping:  # every image counts as many values
        total = sum(count for _, count in clipped)
        share = sum(s * count for s, count in clipped) / total
        warn_of_clipping(share, pipe.scheduler.config, pipe.image_shape[0])
    files.tell_of_damage()
    # this process has checked its own files; the others check theirs
    complete = all(files.path_of(piece).is_file() for piece in files.all_pieces())
    if complete:
        files.drop_short_shards()
    if complete and not is_whole_png(folder / GRID):
        try:
            first = files.first(min(job.num_images, GRID_IMAGES))
        except DamagedFileError:
            if world_size == 1:
                raise
            complete = False  # another process is about to make it again
        else:
            owner.check()
            write_png(folder / GRID, make_grid(first, scale=None), rank)
    return SamplingReport(written, present, complete, sampled)


def with_classes(pipe: GenerationPipeline, job: SamplingJob, guides: Guides) -> SamplingJob:
    """Return the job with the numbers of its classes: those asked for, else all in turn.

    Raises:
        ValueError: for conditions that do not fit the network.
    """
    classes = class_labels_of(pipe)
    without = job.guidance_scale == 0 and job.negative_label is None and guides == NO_GUIDES
    if job.class_labels is None and classes is not None and not without:
        job = replace(job, class_labels=classes.ids)
    count = 1 if job.class_labels is None else len(job.class_labels)
    asked = Conditions(**job.conditions(guides, 0, count))
    bound = BoundConditions(asked, pipe.unet, pipe.scheduler, count, pipe._execution_device)
    given = job.class_labels is not None and bound.numbers is not None
    return replace(job, class_labels=tuple(bound.numbers or ())) if given else job


def _sample(
    pipe: GenerationPipeline, job: SamplingJob, start: int, stop: int, bar: Any, guides: Guides
) -> tuple[np.ndarray, float | None]:
    """Return the images of a chunk, and the share of their values that was clipped."""

    def advance(*_: object) -> None:
        bar.update()

    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    # a compiled network would compile again for a smaller last batch: it makes images too many
    full = is_compiled(pipe.unet) and job.num_images > job.batch_size
    end = start + job.batch_size if full else stop
    warns, pipe._warns_of_clipping = pipe._warns_of_clipping, False
    try:
        output: Any = pipe(
            seeds=range(job.seed + start, job.seed + end),
            batch_size=job.batch_size,
            num_inference_steps=job.num_inference_steps,
            timesteps=job.timesteps,
            eta=job.eta,
            use_clipped_model_output=job.use_clipped_model_output,
            image=job.pictures(start, end),
            strength=job.strength,
            **job.conditions(guides, start, end),
            callback_on_step_end=advance,
            output_type="latent",
        )
    finally:
        pipe._warns_of_clipping = warns
        pipe.set_progress_bar_config(**quiet)
    pixels = pipe.pixels_of(output.images[: stop - start], job.batch_size)
    return to_uint8(pixels), output.clipped_share


def settings_of(
    pipe: UnconditionalPipeline, job: SamplingJob, guides: Guides = NO_GUIDES
) -> dict[str, Any]:
    """Return everything that the files depend on, as JSON types."""
    told = asdict(job)
    if job.image is not None:
        told["image"] = [hashlib.sha256(picture_bytes(path)).hexdigest() for path in job.image]
    settings = {
        "job": told,
        "network": weights_fingerprint(pipe.unet),  # type: ignore[arg-type]
        # the same weights compute something else with another norm_eps or activation
        "network_config": _public(pipe.unet.config),
        "network_dtype": str(pipe.unet.dtype),
        "channels_last": _is_channels_last(pipe.unet),  # type: ignore[arg-type]
        "compiled": is_compiled(pipe.unet),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": _public(pipe.scheduler.config),
    }
    if pipe.vae is not None:
        settings["vae"] = {
            "network": weights_fingerprint(pipe.vae),
            "network_config": _public(pipe.vae.config),
            "scale": [pipe.codec.scale, pipe.codec.shift],  # type: ignore[union-attr]
        }
    if (classes := class_labels_of(pipe)) is not None:
        settings["null_class"] = classes.null_class
    for name, network in vars(guides).items():
        if network is not None:
            settings[name] = {
                "network": weights_fingerprint(network),
                "network_config": _public(getattr(network, "config", {})),
            }
    return json.loads(json.dumps(settings, default=lambda x: np.asarray(x).tolist()))


def defaults_of_settings(pipe: GenerationPipeline) -> dict[str, Any]:
    """Return the settings of the files that have defaults, by their names with groups.

    A folder of an earlier version lacks the settings that came later: it did what they default to.
    """
    groups: dict[str, type] = {
        "job": SamplingJob,
        "network_config": type(pipe.unet),
        "scheduler_config": type(pipe.scheduler),
    }
    found = {
        f"{group}.{name}": parameter.default
        for group, cls in groups.items()
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    return json.loads(json.dumps(found, default=str))


def picture_bytes(path: str) -> bytes:
    """Return what the file of a picture holds.

    Raises:
        ValueError: naming a file that is not there or is no picture.
    """
    read_image(path, "image")
    return Path(path).read_bytes()


def _public(config: Any) -> dict[str, Any]:  # noqa: ANN401
    # private keys say where the config comes from, in an order that varies
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _is_channels_last(network: torch.nn.Module) -> bool:
    """Tell whether a weight is kept in channels_last alone (1 x 1 ones are in both formats)."""
    return any(
        p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
        for p in network.parameters()
    )


def origin_of(pipe: UnconditionalPipeline) -> dict[str, Any]:
    """Return the name on the Hub that the network came from; nothing of a folder."""
    name = pipe.unet.config.get("_name_or_path")
    return {ORIGIN: name} if isinstance(name, str) and re.search(r"@[0-9a-f]{40}$", name) else {}
