"""Checkpoints that are whole or absent.

A checkpoint is a folder `checkpoints/step-00001000` with

    unet/  unet_ema/         raw and averaged weights, each a UNet2DModel folder
    optimizer.safetensors    AdamW's moments
    sampler.safetensors      history of loss-aware timestep sampling, where used
    state.json               step, clocks, settings, versions
    failed.json              why the run stopped there; only in the checkpoint of a failed session
    manifest.json            size and SHA-256 of every other file, written last

A checkpoint of a failed session takes no part in the rotation: nothing is deleted for it, and
`latest` passes over it.

It is written under a temporary name, every file and the folder are flushed to the disk, and then it
is renamed. Nothing in it is pickled. It holds nothing of a single process (all random numbers are
functions of seed and step, see `batches.py`), so a run can be continued on another number of
processes.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ddim_schedulers.reading import DamagedFileError, read_bytes, read_json
from ddim_schedulers.training.common.storage import to_json
from ddim_schedulers.training.networks.checkpoint_contents import lacks

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step-"
FAILED = "failed.json"
TEMPORARY = ".writing-"
DISCARDED = ".discarded-"
FILE = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # a path inside the checkpoint
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that can be read."""


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies under `root`."""
    return root / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix(PREFIX))


def listed(root: Path) -> list[Path]:
    """Return the checkpoints under `root`, newest first; `verify` says whether they are whole.

    Those of failed sessions are not among them, see `failed_in`.
    """
    return [p for p in _folders(root) if not (p / FAILED).exists()]


def failed_in(root: Path) -> list[Path]:
    """Return the checkpoints of failed sessions under `root`, newest first."""
    return [p for p in _folders(root) if (p / FAILED).exists()]


def _folders(root: Path) -> list[Path]:
    folders = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def names_in(root: Path) -> set[str]:
    """Return all of `root` that belongs to checkpoints, and what dead runs left unfinished."""
    patterns = (f"{PREFIX}*", f"{TEMPORARY}*", f"{DISCARDED}*")
    return {path.name for pattern in patterns for path in root.glob(pattern)}


def write(
    root: Path, step: int, files: Mapping[str, bytes], check: Callable[[], None] = lambda: None
) -> Path:
    """Write a whole checkpoint or nothing.

    Args:
        root: the folder of the checkpoints.
        step: its step; a checkpoint of the same step is replaced.
        files: contents by name.
        check: is called before anything is replaced, and may raise.

    Raises:
        CheckpointError: the disk is full or cannot be written to; checkpoints from before are
        untouched.
    """
    target = folder_of(root, step)
    temporary = root / f"{TEMPORARY}{step}-{secrets.token_hex(6)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        manifest = {}
        for name, data in files.items():
            write_file(temporary / name, data)
            manifest[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_file(temporary / MANIFEST, to_json(manifest))
        for folder in {(temporary / name).parent for name in files} | {temporary}:
            flush_folder(folder)
        check()
        discard(target)
        os.replace(temporary, target)
        flush_folder(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(describe_failure(root, step, error)) from error
    return target


def write_file(path: Path, data: bytes) -> None:
    """Write and flush one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Delete a folder; if that is interrupted, what is left no longer looks like a checkpoint."""
    if folder.exists():
        moved = folder.with_name(f"{DISCARDED}{folder.name}-{secrets.token_hex(6)}")
        os.replace(folder, moved)
        shutil.rmtree(moved, ignore_errors=True)


def prune(
    root: Path,
    step: int,
    keep_last: int,
    best_step: int | None,
    known: Container[str] | None = None,
) -> None:
    """Delete all but the last `keep_last` checkpoints and the best, and what dead runs left.

    Call it after the checkpoint of `step` was written. Those of later steps go first: a run that
    was resumed before them has passed them over as damaged, or replaces them. Nothing is deleted
    whose name is not in `known`: what the run found at its start or wrote; None is everything.
    """
    known = names_in(root) if known is None else known
    earlier = [folder for folder in listed(root) if step_of(folder) <= step]
    kept = {step_of(folder) for folder in earlier[:keep_last]} | {best_step}
    for folder in listed(root):
        if step_of(folder) not in kept and folder.name in known:
            discard(folder)
    for pattern in (f"{TEMPORARY}*", f"{DISCARDED}*"):
        for leftover in [path for path in root.glob(pattern) if path.name in known]:
            shutil.rmtree(leftover, ignore_errors=True)


def verify(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if a run can go on from it.

    Every file has the size and hash that the manifest says, and the files are those that are
    needed, see `checkpoint_contents`.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except DamagedFileError as error:
        if not (folder / MANIFEST).exists():
            return f"{MANIFEST} is missing"
        return f"{MANIFEST} cannot be used: {error.reason}"
    for name, entry in manifest.items():
        if (damage := _verify_file(folder, name, entry)) is not None:
            return damage
    if "state.json" not in manifest:
        return f"{MANIFEST} does not list state.json"
    return lacks(folder, manifest)


def _verify_file(folder: Path, name: str, entry: Any) -> str | None:
    """Return what is wrong with a file; None if it is that of the manifest's entry."""
    known = isinstance(entry, dict) and type(entry.get("size")) is int
    if not known or not isinstance(entry.get("sha256"), str) or not FILE.fullmatch(name):
        return f"{MANIFEST} cannot be used: its entry {name[:80]!r} is {str(entry)[:80]}"
    path = folder / name
    if not path.exists():
        return f"{path.name} is missing"
    try:
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
        data = read_bytes(path, entry["size"])
    except (DamagedFileError, OSError) as error:
        return f"{name} cannot be read: {error}"
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return f"the contents of {name} have changed"
    return None


def newest_whole(root: Path) -> Path | None:
    """Return the newest checkpoint that is whole; every damaged one on the way is warned about.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    found = listed(root)
    for folder in found:
        damage = verify(folder)
        if damage is None:
            return folder
        warnings.warn(
            f"checkpoint {folder} is damaged ({damage}); using the one before", stacklevel=2
        )
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {root} are damaged")
    return None


def chosen(resume: str, root: Path) -> Path | None:
    """Return the checkpoint that the setting `resume` means; None starts from the beginning.

    Raises:
        ValueError: 'never' while there are checkpoints, or a path that is no checkpoint.
        CheckpointError: the named checkpoint, or every one, is damaged.
    """
    if resume == "latest":
        folder = newest_whole(root)
        failed = [p for p in failed_in(root) if folder is None or step_of(p) > step_of(folder)]
        if failed:
            logger.warning(
                f"the last session failed; its state at step {step_of(failed[0])} is passed over. "
                f"To continue from there: --resume {failed[0]}"
            )
        return folder
    if resume == "never":
        if _folders(root):
            raise ValueError(
                f"`resume` is 'never', but {root} holds checkpoints of a run; set resume to "
                "'latest' to continue it, or output_dir to another folder"
            )
        return None
    folder = Path(resume)
    if not folder.is_dir():
        raise ValueError(f"`resume` is {resume!r}; it must be never, latest or a checkpoint folder")
    if (damage := verify(folder)) is not None:
        raise CheckpointError(f"checkpoint {folder} is damaged: {damage}")
    return folder


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state of every parameter under `<index>.<name>`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Return the inverse of `optimizer_tensors`; moments get the memory format of their parameter.

    Raises:
        CheckpointError: they are of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)] if int(index) < len(parameters) else None
        if parameter is None or (name != "step" and value.shape != parameter.shape):
            raise CheckpointError(
                f"the checkpoint's moment {key} has shape {tuple(value.shape)}, which no parameter "
                f"number {index} of this network has"
            )
        like = torch.empty_like(parameter) if value.shape == parameter.shape else None
        # The step counts of the fused optimiser are float32 scalars beside the parameter.
        restored = value.to(parameter.device) if like is None else like.copy_(value)
        optimizer.state[parameter][name] = restored


def is_full(error: OSError) -> bool:
    """Return whether there is no room left, on the disk or under a quota."""
    return error.errno in _FULL


def describe_failure(root: Path, step: int, error: OSError) -> str:
    """Return what could not be written, why, and what is left."""
    why = "the disk is full" if is_full(error) else str(error.strerror or error)
    whole = next((folder for folder in listed(root) if verify(folder) is None), None)
    left = f"the last good checkpoint is {whole}" if whole else "there is no checkpoint yet"
    return f"step {step} cannot be written to {root}: {why}; {left}"
