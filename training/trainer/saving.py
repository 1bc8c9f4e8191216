"""The state of a run as files: what goes into a checkpoint, how it comes back, what is exported."""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from diffusers import DDPMPipeline
from diffusers.utils import logging
from safetensors import SafetensorError

from ddim_schedulers.export import save_pipeline
from ddim_schedulers.latent_forms import form_of_latents
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.generation import GenerationPipeline
from ddim_schedulers.pipelines.ownership import OwnershipError
from ddim_schedulers.training.common.storage import pack, to_json, unpack
from ddim_schedulers.training.common.versions import versions
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.networks.checkpoint_contents import read_state
from ddim_schedulers.training.networks.checkpoint_network import VAE_FOLDER
from ddim_schedulers.training.sharing.cards import CLASS_PICTURE, PICTURE
from ddim_schedulers.training.trainer.card import card_of
from ddim_schedulers.training.trainer.ema import copy_into
from ddim_schedulers.training.trainer.same_run import STAMPED, describe_data, require_same_run
from ddim_schedulers.training.trainer.validation import plot_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ddim_schedulers.training.trainer.trainer import Trainer

logger = logging.get_logger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def choose_checkpoint(config: TrainingConfig, accelerator: "Accelerator") -> Path | None:
    """Return the checkpoint to continue from: the main process chooses it for all."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = checkpoints.chosen(config.resume, Path(config.output_dir) / "checkpoints")
        except (ValueError, checkpoints.CheckpointError) as error:
            found[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def scale_in(folder: Path | None) -> tuple[float, float] | None:
    """Return scale and shift of the latents of a checkpoint's run; None for one on pixels.

    Raises:
        DamagedFileError: the checkpoint says something that no run can have written.
    """
    vae = None if folder is None else read_state(folder).get("contents", {}).get("vae")
    return None if vae is None else (vae["scale"], vae["shift"])


def keep_vae(trainer: "Trainer") -> None:
    """Write the autoencoder of a run on latents, with its scale, where checkpoints find it."""
    if trainer.latents is not None:
        _replace(trainer, trainer.root / VAE_FOLDER, trainer.latents.codec.vae.save_pretrained)


def state_files(trainer: "Trainer") -> dict[str, bytes]:
    """Return the contents of a checkpoint, by file name."""
    state = {
        "step": trainer.step,
        "updates": trainer.updates,
        "place": list(trainer.stream_position),
        "ema": trainer.average.state_dict(),
        "best": trainer.best,
        "config": trainer.config.to_dict(),
        "data": describe_data(trainer),
        "contents": trainer.contents,
        "scaler": None
        if trainer.accelerator.scaler is None
        else trainer.accelerator.scaler.state_dict(),
        "versions": versions(*STAMPED),
    }
    files = {"state.json": to_json(state)}
    networks = {"unet": trainer.unet}
    if trainer.average.ema is not None:
        networks["unet_ema"] = trainer.average.unet
    for name, unet in networks.items():
        files[f"{name}/config.json"] = unet.to_json_string().encode()
        files[f"{name}/diffusion_pytorch_model.safetensors"] = pack(unet.state_dict())
    tensors = checkpoints.optimizer_tensors(trainer.optimizer.optimizer)
    files["optimizer.safetensors"] = pack(tensors)
    if tables := trainer.sampler.state_dict():
        files["sampler.safetensors"] = pack(tables)
    return files


def save(trainer: "Trainer", failed: str | None = None) -> None:
    """Write a checkpoint from the main process; an error there ends all of them.

    Args:
        trainer: the run.
        failed: why the session fails, which puts the checkpoint outside the rotation.

    Raises:
        CheckpointError: on every process, if the checkpoint cannot be written.
        OwnershipLostError: on every process, if the folder was taken over.
    """
    found: list[Exception | None] = [None]
    if trainer.accelerator.is_main_process:
        try:
            write_checkpoint(trainer, failed)
        except (checkpoints.CheckpointError, OwnershipError) as error:
            found[0] = error
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]
    if failed is None:
        trainer.saved, trainer.saved_updates = trainer.step, trainer.updates


def write_checkpoint(trainer: "Trainer", failed: str | None) -> None:
    """Write a checkpoint on this process alone, and delete those that it replaces; see `save`."""
    root, best = trainer.root / "checkpoints", trainer.best.get("step")
    files = state_files(trainer)
    target = checkpoints.folder_of(root, trainer.step)
    if failed is not None:
        if target in checkpoints.listed(root):
            return  # keep the good checkpoint of this step
        files[checkpoints.FAILED] = to_json({"why": failed})
    checkpoints.write(root, trainer.step, files, trainer.owner.check)
    trainer.known.add(target.name)
    if failed is not None:
        for folder in checkpoints.failed_in(root):  # keep one failed checkpoint
            if folder != target and folder.name in trainer.known:
                checkpoints.discard(folder)
        return
    if trainer.updates == trainer.saved_updates and trainer.saved not in (None, trainer.step, best):
        # The weights are the same as there, so a row of skipped steps removes no other checkpoint.
        assert trainer.saved is not None
        checkpoints.discard(checkpoints.folder_of(root, trainer.saved))
    checkpoints.prune(root, trainer.step, trainer.config.keep_last, best, trainer.known)


def restore(trainer: "Trainer", folder: Path) -> None:
    """Continue `trainer` where the checkpoint in `folder` was made.

    Raises:
        ValueError: it is of a run with other settings or other data.
    """
    state = read_state(folder)
    require_same_run(trainer, state, folder)
    copy_into(trainer.unet.named_parameters(), unpack(folder / "unet" / WEIGHTS))
    if trainer.average.ema is not None:
        trainer.average.load(unpack(folder / "unet_ema" / WEIGHTS), state["ema"])
    checkpoints.restore_optimizer(
        trainer.optimizer.optimizer, unpack(folder / "optimizer.safetensors")
    )
    if tables := unpack(folder / "sampler.safetensors"):
        trainer.sampler.load_state_dict(tables)
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.best = state["step"], state["best"]
    # earlier versions did not count the steps that were applied
    trainer.updates = trainer.saved_updates = state.get("updates", trainer.step)
    failed = (folder / checkpoints.FAILED).exists()
    own = folder.resolve().parent == (trainer.root / "checkpoints").resolve()
    trainer.saved = trainer.step if own and not failed else None
    trainer.stream_position = tuple(state.get("place", (0, 0)))


def export(trainer: "Trainer") -> Path:
    """Write the pipeline with the averaged weights, and the raw UNet beside it.

    Raises:
        OSError: it cannot be written.
    """
    try:
        return _export(trainer)
    except SafetensorError as error:  # its writer wraps what the system says
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _export(trainer: "Trainer") -> Path:
    config, target = trainer.config, trainer.root / "pipeline"
    if trainer.accelerator.is_main_process:
        # whoever lacks this package loads it too, unless no stock scheduler knows the prediction
        form = "portable" if config.prediction_type != "posterior_mean" else "plug-in"
        pipeline: Any = None
        if trainer.latents is None:
            pipeline = DDPMPipeline(unet=trainer.average.unet, scheduler=trainer.scheduler)
        else:
            codec = trainer.latents.codec
            pipeline = GenerationPipeline(
                unet=trainer.average.unet, scheduler=trainer.scheduler, vae=codec.vae
            )
            # no pipeline of diffusers knows a shift or classes
            labelled = trainer.data.classes is not None
            form = form_of_latents(codec.vae.config, labelled, form)

        def write_pipeline(folder: Path) -> None:
            for note in save_pipeline(pipeline, folder, form):
                logger.warning(note)
            grid = trainer.watcher.grid_path(trainer.step)
            if grid.is_file():
                picture = folder / (PICTURE if trainer.data.classes is None else CLASS_PICTURE)
                picture.parent.mkdir(exist_ok=True)
                write_bytes(picture, grid.read_bytes())
            write_bytes(folder / "README.md", card_of(trainer, grid.is_file()).encode())

        _replace(trainer, target, write_pipeline)
        _replace(trainer, trainer.root / "unet_raw", trainer.unet.save_pretrained)
        plot_losses(*trainer.log.curve(), trainer.root / "pictures" / "loss.png")
    trainer.accelerator.wait_for_everyone()
    return target


def _replace(trainer: "Trainer", folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place and rename it when it is whole; it replaces the old one."""
    trainer.owner.check()
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # left by a run that was killed
        checkpoints.discard(leftover)
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    write(partial)
    trainer.owner.check()
    checkpoints.discard(folder)
    partial.rename(folder)


def push(trainer: "Trainer", pipeline_dir: Path | None) -> None:
    """Share the pipeline of a complete run, if the settings say so; a failure only gives a message.

    No process may be waiting for the main one: an upload takes longer than a barrier waits.
    """
    config = trainer.config
    if pipeline_dir is None or not (config.push_to_hub and trainer.accelerator.is_main_process):
        return
    from ddim_schedulers.training.sharing.hub import push_after_training

    push_after_training(
        pipeline_dir,
        str(config.hub_repo_id),
        form=config.hub_form,
        private=config.hub_private,
        revision=config.hub_revision,
    )
