"""One run of training: what a step does, and what is read back when.

On the hot path nothing is read from the device. A step that is not finite is skipped by the
optimiser's kernel itself; losses and flags of `log_every` steps are read together.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging
from torch import Tensor

from ddim_schedulers.betas import terminal_signal
from ddim_schedulers.pipelines.files import check_folders, write_bytes
from ddim_schedulers.pipelines.ownership import Owner, OwnershipError
from ddim_schedulers.training.common.processes import AccelerateTeam, from_main, own_together
from ddim_schedulers.training.common.seeds import derive_seed
from ddim_schedulers.training.common.storage import to_json
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.batches import Batch, MapBatches, open_loader
from ddim_schedulers.training.data.streams import StreamBatches
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.parsing import to_yaml
from ddim_schedulers.training.trainer import saving
from ddim_schedulers.training.trainer.contents import contents_of
from ddim_schedulers.training.trainer.engine import make_accelerator
from ddim_schedulers.training.trainer.latents import fill_cache
from ddim_schedulers.training.trainer.parts import Parts
from ddim_schedulers.training.trainer.result import (
    NonFiniteError,
    TrainingResult,
    describe_left_out,
)
from ddim_schedulers.training.trainer.signals import StopSignals
from ddim_schedulers.training.trainer.training_log import TrainingLog, Window

logger = logging.get_logger(__name__)


VERB = "train"
# The folders that a run writes in its own. Other processes may own any other folder in it.
PARTS = frozenset({"checkpoints", "logs", "pictures", "pipeline", "unet_raw", "vae", "latents"})


@contextmanager
def open_trainer(config: TrainingConfig, owns: bool = True) -> Iterator["Trainer"]:
    """Open a trainer on every process; it owns its folder before it looks for checkpoints.

    Args:
        config: the settings.
        owns: False where nothing is written.

    Raises:
        FolderInUseError: another process owns the folder.
        ValueError: bad settings or data.
    """
    check_folders(Path(config.output_dir), "checkpoints", "output_dir")
    accelerator = make_accelerator(config)
    with ExitStack() as stack:
        owner = None
        if owns:
            team, root = AccelerateTeam(config.cpu), Path(config.output_dir)
            owner = stack.enter_context(own_together(root, VERB, team, parts=PARTS))
        yield Trainer(config, accelerator, owner)


class Trainer(Parts):
    """A run: its parts, how far it is, and the loop.

    Raises:
        ValueError: bad settings or data.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator | None = None,
        owner: Owner | None = None,
    ) -> None:
        accelerator = make_accelerator(config) if accelerator is None else accelerator
        self.root = Path(config.output_dir)
        self.owner = Owner(self.root) if owner is None else owner
        self.known = checkpoints.names_in(self.root / "checkpoints")
        self.start_from = saving.choose_checkpoint(config, accelerator)
        self.known_scale = saving.scale_in(self.start_from)
        super().__init__(config, accelerator)
        self.contents = from_main(self.accelerator, lambda: contents_of(self))
        self.log = TrainingLog(self.root, self.accelerator.is_main_process)
        self.step = 0
        self.updates = 0  # steps that were applied, in all sessions
        self.skipped_in_a_row = 0
        self.saved: int | None = None  # step of the newest checkpoint of the rotation
        self.saved_updates = 0
        self.between_steps = True  # weights and average belong to `step`
        self.stream_position = (0, 0)  # in a stream: epoch, and how many images of it were used
        self.best: dict[str, Any] = {}
        self.evaluations: list[dict[str, Any]] = []
        if self.start_from is not None:
            saving.restore(self, self.start_from)
        elif self.accelerator.is_main_process:
            self._warn_of_warmup()
        if self.data.skipped and self.accelerator.is_main_process:
            logger.warning(describe_left_out(self.data.skipped))
        wrong = terminal_signal(self.scheduler.alpha_bar)
        if wrong is not None and self.accelerator.is_main_process:
            logger.warning(wrong)

    def _warn_of_warmup(self) -> None:
        warmup, steps = self.config.lr_warmup_steps, self.config.max_train_steps
        if 3 * warmup > steps:
            logger.warning(
                f"lr_warmup_steps is {warmup}, more than a third of the {steps} steps "
                "(max_train_steps): much of the run has a learning rate below the one asked for"
            )

    def run(self) -> TrainingResult:
        """Train to the end, or until a signal or `stop_after`; push nothing. See `train`."""
        with own_together(self.root, VERB, AccelerateTeam(self.config.cpu), parts=PARTS) as owner:
            self.owner = owner
            return self._run()

    def _run(self) -> TrainingResult:
        config = self.config
        stop = config.max_train_steps
        if config.stop_after is not None:
            stop = min(stop, self.step + config.stop_after)
        self.watcher.prepare()
        if isinstance(self.batches, MapBatches):
            self.batches.cache = fill_cache(self)
        began = time.perf_counter()
        try:
            self._start_log()
            with StopSignals() as signals, self.log.progress(config, self.step):
                stopped_by = self._steps(stop, signals)
            seconds = time.perf_counter() - began
            if self.step < config.max_train_steps and stopped_by is None:
                stopped_by = "stop_after"
            if not stopped_by and self.updates == 0:
                raise NonFiniteError(
                    f"no step of {self.step} was finite and applied: the weights are those "
                    "of the start, and no pipeline is exported; lower lr, or look at the data"
                )
            pipeline_dir = None if stopped_by else saving.export(self)
        except OSError as error:
            if not checkpoints.is_full(error):
                raise
            raise checkpoints.CheckpointError(
                checkpoints.describe_failure(self.root / "checkpoints", self.step, error)
            ) from error
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()
        return self._result(pipeline_dir, stopped_by, seconds)

    def _steps(self, stop: int, signals: StopSignals) -> str | None:
        """Run to step `stop`; return the name of the signal that ended it before, or None."""
        with self.loader(stop) as loader:
            return self._steps_from(loader, stop, signals)

    def loader(self, stop: int) -> AbstractContextManager[Iterator[Batch]]:
        """Return the batches of the steps from the present one up to `stop`."""
        if isinstance(self.batches, StreamBatches):
            self.batches.start, self.batches.stop = self.step, stop
            self.batches.stream_position = self.stream_position
        pin = self.device.type == "cuda"
        return open_loader(self.batches, self.step, stop, self.config.num_workers, pin)

    def _steps_from(self, loader: Iterator[Batch], stop: int, signals: StopSignals) -> str | None:
        window = Window(self.share, self.step)
        try:
            return self._loop(loader, window, stop, signals)
        except (NonFiniteError, checkpoints.CheckpointError, OwnershipError):
            raise
        except Exception as error:
            self._save_what_was_done(window, error)
            raise

    def _loop(
        self, loader: Iterator[Batch], window: Window, stop: int, signals: StopSignals
    ) -> str | None:
        config = self.config
        alone = self.accelerator.num_processes == 1
        stopped_by: str | None = None
        while self.step < stop and stopped_by is None:
            self.one_step(loader, window)
            self.step += 1
            self.average.step()
            self.between_steps = True
            stopped_by = signals.name if alone else None
            due = self._due(config.checkpoint_every) and self.step < stop
            look = self._due(config.validate_every) or self._due(config.sample_every)
            if stopped_by or due or look or self._due(config.log_every) or self.step == stop:
                stopped_by = self._read(window, signals)
            if look and self._look() or due:
                saving.save(self)
            if look or due:
                self.log.restart_clock(self.step)
        if self.saved != self.step:
            nothing = self.updates == 0 and self.step >= config.max_train_steps
            saving.save(self, "no step was finite and applied" if nothing else None)
        return stopped_by

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.max_train_steps)

    def _look(self) -> bool:
        """Evaluate the averaged weights; return True if they are the best so far."""
        config, unet = self.config, self.average.unet
        self.owner.check()
        report: dict[str, Any] = {"step": self.step, "weights": self.average.name}
        unet.eval()
        if self._due(config.validate_every):
            report |= self.watcher.validate(unet, self.step)
        if self._due(config.sample_every):
            report |= self.watcher.sample(unet, self.step)
        if unet is self.unet:
            unet.train()
        self.evaluations.append(report)
        self.log.write(report)
        if config.tracker != "none":
            numbers = {
                k: v for k, v in report.items() if isinstance(v, int | float) and k != "step"
            }
            self.accelerator.log(numbers, step=self.step)
            self.log.show_pictures(self.accelerator.trackers, self.watcher.folder, self.step)
        metric = "frechet" if config.best_by == "frechet" else "validation_loss"
        value = report.get(metric)
        if value is None or not math.isfinite(value) or value >= self.best.get("value", math.inf):
            return False
        self.best = {
            "step": self.step,
            "figure": metric,
            "value": value,
            "weights": self.average.name,
        }
        return True

    def one_step(self, loader: Iterator[Batch], window: Window) -> None:
        """Go forward and backward over the parts of a batch, update once; read nothing back."""
        if self.has_dropout:
            # Dropout masks too are a function of the step, so no generator state is ever saved.
            torch.manual_seed(
                derive_seed(self.config.seed, "dropout", self.step, self.share.process_index)
            )
        stream_position = self.stream_position
        for _ in range(self.share.parts):
            batch: Batch = next(loader)
            if "stream_position" in batch:
                stream_position = tuple(batch["stream_position"].tolist())
            with self.accelerator.accumulate(self.network):
                loss = self._loss(batch, window)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._update(window)
        self._learn_from_losses(window)
        self.stream_position = stream_position

    def _loss(self, batch: Batch, window: Window) -> Tensor:
        x0, noise, u = (
            batch[name].to(self.device, non_blocking=True) for name in ("images", "noise", "u")
        )
        x0, noise = x0.to(self.dtype), noise.to(self.dtype)
        if self.latents is not None:
            drawn = batch.get("posterior")
            if drawn is not None:
                drawn = drawn.to(self.device, self.dtype, non_blocking=True)
            encoded = isinstance(self.batches, MapBatches) and self.batches.cache is not None
            x0 = self.latents.x0_of(x0, drawn, encoded)
        labels = batch.get("labels")
        if labels is not None:
            labels = labels.to(self.device, non_blocking=True)
        t, weight = self.sampler.draw(u)
        x_t = self.objective.noisy(x0, noise, t)
        if self.config.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        output = self.network(x_t, t, class_labels=labels, return_dict=False)[0]
        loss, error = self.objective(output, x0, noise, t)
        weighted = loss if weight is None else loss * weight.to(loss.dtype)
        window.add(t, loss.detach(), weighted.detach(), error, int(batch["replaced"]))
        mean = weighted.mean()
        # A loss can overflow while its gradient does not. This makes the gradient NaN on this
        # process, and the sum over processes then tells all of them.
        return mean * torch.where(torch.isfinite(mean), 1.0, torch.nan)

    def _update(self, window: Window) -> None:
        limit = self.config.max_grad_norm
        if limit is not None:
            norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        else:
            self.accelerator.unscale_gradients()
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters if p.grad is not None]
            )
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.accelerator.scaler is None:
            # What a gradient scaler would do: the fused kernel leaves weights and moments as they
            # are.
            inner = self.optimizer.optimizer
            inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).to(torch.float32)
        self.between_steps = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        window.close_step(norm)

    def _learn_from_losses(self, window: Window) -> None:
        if self.config.timestep_sampling != "loss_aware":
            return
        t, loss = window.last_step()
        if self.accelerator.num_processes > 1:
            t, loss = self.accelerator.gather(t), self.accelerator.gather(loss)
        # Gathered as (process, part, row); positions in the global batch go (part, process, row).
        shape = (self.share.num_processes, self.share.parts, self.share.rows)
        t, loss = (x.reshape(shape).transpose(0, 1).flatten() for x in (t, loss))
        self.sampler.update(t, loss)

    def _read(self, window: Window, signals: StopSignals) -> str | None:
        """Read losses, flags and signals of all processes, once in `log_every` steps."""
        reading = window.read(self.accelerator, signals.name is not None)
        longest = self._count(reading.norms)
        self.owner.check()
        rate = self.learning_rate(self.step - 1)
        values = self.log.take(reading, self.step, rate, self.config.batch_size)
        if self.config.tracker != "none":
            self.accelerator.log(values, step=self.step)
        failed = reading.failed_steps(fp16=self.accelerator.scaler is not None)
        if failed and self.config.on_nonfinite == "stop":
            raise self._failure(self._describe(reading, failed[0]))
        if longest >= self.config.nonfinite_limit:
            raise self._failure(
                f"{longest} steps in a row were not finite and were not applied "
                f"(nonfinite_limit is {self.config.nonfinite_limit}); the weights are those of the "
                f"last finite step; up to step {self.step} {self.updates} steps were applied"
            )
        if reading.stop_requested:
            return signals.name or "a signal to another process"
        return None

    def _count(self, norms: Tensor) -> int:
        """Count applied and skipped steps; return the longest row of skipped ones.

        Args:
            norms: (steps,) gradient norms, on the host.
        """
        longest = 0
        for applied in torch.isfinite(norms).tolist():
            self.updates += applied
            self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
            longest = max(longest, self.skipped_in_a_row)
        return longest

    def _failure(self, why: str) -> NonFiniteError:
        """Save the state outside the rotation; return the error that ends the run."""
        saving.save(self, why)
        folder = checkpoints.folder_of(self.root / "checkpoints", self.step)
        return NonFiniteError(
            f"{why} The state is kept in {folder}, which 'latest' passes over and no checkpoint "
            "was deleted for; --resume with that folder continues from it."
        )

    def _describe(self, reading: Any, step: int) -> str:
        ids = self.batches.ids(step)
        t, loss = reading.of_step(step)
        rows = ", ".join(
            f"{name} (id {i}) t={int(at)} loss={value:.4g}"
            for name, i, at, value in zip(self.batches.names(ids), ids, t, loss, strict=True)
        )
        bad = [f"{n}" for n, value in enumerate(loss) if not torch.isfinite(value)]
        return (
            f"step {step} was not finite and was not applied; the weights are those of the last "
            f"finite step. Gradient norm {reading.norm_of(step):.4g}; positions with a loss that "
            f"is not finite: {', '.join(bad) or 'none'}. Batch: {rows}"
        )

    def _save_what_was_done(self, window: Window, error: Exception) -> None:
        """Keep the finished steps after an error of the data or of another process.

        The other processes may be gone, so nothing is asked of them.
        """
        if not (self.between_steps and self.accelerator.is_main_process) or self.step == self.saved:
            return
        try:
            norms = window.norms()
            self._count(norms)
            finite = self.accelerator.scaler is not None or bool(torch.isfinite(norms).all())
            stop = self.config.on_nonfinite == "stop" and not finite
            saving.write_checkpoint(self, "a step was not finite" if stop else None)
            logger.warning(f"The run ends with an error; {self.step} finished steps are saved.")
        except Exception as second:  # the first error is the one to tell
            logger.warning(f"The {self.step} finished steps could not be saved: {second}")

    def _start_log(self) -> None:
        if self.accelerator.is_main_process:
            write_bytes(self.root / "config.yaml", to_yaml(self.config).encode())
            found = self.data.inventory.to_dict() | {"digest": self.contents["data"]}
            write_bytes(self.root / "data.json", to_json(found))
            saving.keep_vae(self)
        self.log.rewind(self.step)
        if self.config.tracker != "none":
            plain = {
                k: v if isinstance(v, int | float | str | bool) else str(v)
                for k, v in self.config.to_dict().items()
            }
            self.accelerator.init_trackers(self.config.run_name, config=plain)

    def _result(
        self, pipeline_dir: Path | None, stopped_by: str | None, seconds: float
    ) -> TrainingResult:
        return TrainingResult(
            output_dir=self.root,
            pipeline_dir=pipeline_dir,
            unet=self.average.unet.eval(),
            scheduler=self.scheduler,
            weights=self.average.name,
            steps=self.step,
            losses=self.log.losses,
            final_loss=self.log.recent_loss,
            seconds=seconds,
            stopped_by=stopped_by,
            skipped_steps=self.log.skipped,
            replaced_images=self.log.replaced,
            left_out=self.data.skipped,
            evaluations=self.evaluations,
        )
