"""What a run is built of: data, networks, objective, optimiser and batches, from its settings."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddim_schedulers.class_labels import class_labels_of, note_class_labels
from ddim_schedulers.pipelines.codec import rescaled
from ddim_schedulers.training.common.processes import from_main
from ddim_schedulers.training.common.seeds import derive_seed
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.batches import Draws, MapBatches, Share
from ddim_schedulers.training.data.images import ImageData, load_data
from ddim_schedulers.training.data.streams import Stream, StreamBatches, open_stream
from ddim_schedulers.training.networks.models import (
    load_unet,
    make_scheduler,
    make_unet,
    with_class_embedding,
)
from ddim_schedulers.training.objectives.losses import make_objective
from ddim_schedulers.training.objectives.timestep_sampling import make_timestep_sampler
from ddim_schedulers.training.trainer.compiling import (
    check_gradients,
    compile_for_training,
    loses_gradients,
)
from ddim_schedulers.training.trainer.ema import AveragedUNet
from ddim_schedulers.training.trainer.engine import LearningRate, make_optimizer
from ddim_schedulers.training.trainer.latents import make_latents
from ddim_schedulers.training.trainer.validation import Watcher

LABEL_DROPOUT = 0.1  # as in arXiv:2207.12598 and most conditional models


class Parts:
    """The parts of a run.

    Args:
        config: the settings.
        accelerator: the devices and processes.

    Raises:
        ValueError: bad settings or data.
    """

    known_scale: tuple[float, float] | None = None  # of the latents of a run that goes on

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device = self.accelerator.device
        self.dtype = torch.float64 if config.weights_dtype == "float64" else torch.float32
        self.share = Share(
            config.batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.accelerator.gradient_accumulation_steps,
        )
        # The main process first: what it downloads or caches, the others find.
        with self.accelerator.main_process_first():
            self.data, self.held_out = self._load_data()
            self.latents = make_latents(config, self.data, self.device, self.known_scale)
        if (latents := self.latents) is not None:  # devices round sums differently
            measured = latents.codec
            scale = from_main(self.accelerator, lambda: (measured.scale, measured.shift))
            latents.codec = rescaled(measured.vae, *scale)
        if self.accelerator.is_main_process:
            print(self.data.inventory.line(), file=sys.stderr)
        self._build()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of what the network is trained on: images, or latents."""
        return self.data.shape if self.latents is None else self.latents.shape

    def _build(self) -> None:
        config = self.config
        self.objective = make_objective(config, self.data.levels if self.latents is None else None)
        self.objective.to(self.device, self.dtype)
        self.scheduler = make_scheduler(config, clip=self.latents is None)
        if self.latents is not None and self.accelerator.is_main_process:
            last = float(self.scheduler.alpha_bar[-1])
            snr = f"signal-to-noise ratio at the last timestep: {last / (1 - last):.3g}"
            print(f"{self.latents.said}; {snr}", file=sys.stderr)
        self.sampler = make_timestep_sampler(
            config.timestep_sampling,
            config.num_train_timesteps,
            config.sampling_history,
            config.sampling_uniform,
            self.device,
        )
        self.unet = self._make_unet()
        self.average = AveragedUNet(self.unet, config)
        self.parameters = list(self.unet.parameters())
        self.has_dropout = any(
            isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.unet.modules()
        )
        optimizer = make_optimizer(self.parameters, config)
        network: Any = self.unet
        if config.compile:
            network = compile_for_training(self.unet, config.compile_mode, config.compile_backend)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        if config.compile and loses_gradients(self.device):
            self._check_compiled()
        self.learning_rate = LearningRate(config)
        draws = Draws(
            config.seed,
            config.batch_size,
            config.timestep_sampling == "stratified",
            config.random_flip,
            config.random_crop,
            self.label_dropout,
            self.null_class,
            None if self.latents is None else self.latents.shape,
            self.latents is not None and self.latents.sampled,
        )
        self.batches: MapBatches | StreamBatches = (
            MapBatches(self.data, draws, self.share)
            if self.stream is None
            else StreamBatches(self.stream, self.data, draws, self.share)
        )
        self.watcher = Watcher(
            self.accelerator,
            config,
            self.data,
            self.held_out,
            self.objective,
            self.scheduler,
            Path(config.output_dir) / "pictures",
            self.latents,
        )

    def _check_compiled(self) -> None:
        """Refuse a compiler that loses gradients, by a batch of noise of the size of a real one."""
        if self.has_dropout:
            raise ValueError(
                "`compile` is true on the CPU with torch below 2.14, where gradients are compared "
                "with those without it, and the network has dropout, whose masks would differ; "
                "set dropout to 0"
            )
        source = torch.Generator().manual_seed(self.config.seed)
        x = torch.randn(self.share.rows, *self.shape, generator=source, dtype=self.dtype)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        t = torch.randint(self.config.num_train_timesteps, (len(x),), generator=source)
        labels = None if self.data.classes is None else self.data.labels([0] * len(x))
        autocast = None if self.accelerator.mixed_precision == "no" else self.accelerator.autocast
        check_gradients(self.network, self.unet, x, t, autocast, labels)

    def _load_data(self) -> tuple[ImageData, ImageData | None]:
        self.stream: Stream | None = None
        if not self.config.streaming:
            return load_data(self.config)
        self.stream, data, held_out = open_stream(self.config)
        return data, held_out

    def _make_unet(self) -> UNet2DModel:
        config = self.config
        learned = config.variance_type == "learned_range"
        fits: dict[str, Any] = {
            "channels": self.shape[0],
            "size": self.shape[1:],
            "learned_variance": learned,
        }
        torch.manual_seed(derive_seed(config.seed, "weights"))
        if config.from_pretrained is not None:
            unet = load_unet(
                config.from_pretrained, class_conditional=config.class_conditional, **fits
            )
        else:
            unet = make_unet(
                config.model, dropout=config.dropout, num_class_embeds=self._rows(), **fits
            )
        unet = self._with_classes(unet)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet = unet.to(self.device)
        if self.dtype == torch.float64:
            unet = unet.double()
        if config.channels_last:
            unet = unet.to(memory_format=torch.channels_last)
        return unet.train()

    def _rows(self) -> int | None:
        """Return how many classes a new embedding has: those of the data, and the null class."""
        if self.data.classes is None:
            return None
        return self.data.classes.count + (self.config.label_dropout != 0)

    def _with_classes(self, unet: UNet2DModel) -> UNet2DModel:
        """Return a network that has the classes of the data, and settle which labels are dropped.

        Raises:
            ValueError: a trained network has other classes, or no null class to drop labels for.
        """
        self.null_class: int | None = None
        self.label_dropout = 0.0
        classes, rows = self.data.classes, self._rows()
        if classes is None or rows is None:
            return unet
        labels = class_labels_of(unet)
        if labels is None:
            unet = with_class_embedding(unet, rows)
        if labels is None or self.config.from_pretrained is None:
            null = classes.count if rows > classes.count else None
            note_class_labels(unet, null, classes.names)
        else:
            classes = classes.for_network(labels)
            self.data = replace(self.data, classes=classes)
            if self.held_out is not None:
                self.held_out = replace(self.held_out, classes=classes)
            if classes.names and not labels.names:
                note_class_labels(unet, labels.null_class, classes.names)
        self.null_class = self._null_class(unet)
        if self.null_class is not None:
            share = self.config.label_dropout
            self.label_dropout = LABEL_DROPOUT if share is None else share
        return unet

    def _null_class(self, unet: UNet2DModel) -> int | None:
        labels = class_labels_of(unet)
        assert labels is not None
        if labels.null_class is None and self.config.label_dropout:
            raise ValueError(
                f"`label_dropout` is {self.config.label_dropout}; it must be 0 or left out: the "
                f"network of from_pretrained, {self.config.from_pretrained!r}, has no null class"
            )
        if labels.null_class is None and self.accelerator.is_main_process:
            print(
                "the network has no null class: no label is dropped in training, and guidance "
                "without a classifier will not be possible",
                file=sys.stderr,
            )
        return labels.null_class
