"""Looking at a run while it trains: loss over t, samples, Frechet distance, channel drift.

Everything here uses the weights that will be exported (`AveragedUNet.unet`), draws from generators
of its own, one for each image, and is shared out over the processes, so that it neither disturbs
the run nor depends on how many processes there are.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL.Image import Resampling
from torch import Tensor

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.class_labels import class_labels_of
from ddim_schedulers.pipelines.files import write_atomically, write_png
from ddim_schedulers.pipelines.pictures import tiled
from ddim_schedulers.training.common.figures import can_plot
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.images import ImageData
from ddim_schedulers.training.metrics.distances import frechet_metric
from ddim_schedulers.training.metrics.features import make_feature_space
from ddim_schedulers.training.objectives.losses import Objective
from ddim_schedulers.training.trainer.latents import Latents

# With more reference images a distance in `pixels` changes less than it varies between samples.
REFERENCE_LIMIT = 10_000
# Classes side by side in a grid of samples; more go on in the next row.
MOST_COLUMNS = 20


@dataclass
class Watcher:
    """Evaluates a run at intervals; see `validate` and `sample`.

    Attributes:
        accelerator: of the run.
        config: of the run.
        data: training images, the reference of distance and drift.
        held_out: images of the validation loss.
        objective: of the run.
        scheduler: the process of the run.
        folder: where pictures go.
        latents: of the run; None for one on pixels.
    """

    accelerator: Accelerator
    config: TrainingConfig
    data: ImageData
    held_out: ImageData | None
    objective: Objective
    scheduler: MarkovianDDPMScheduler
    folder: Path
    latents: Latents | None = None
    _distance: Any = field(default=None, init=False)
    _moments: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Make the feature space, which may run code of others; a dry run does not."""
        if self.config.frechet_images:  # a wrong name is found before training begins
            self.features = make_feature_space(self.config.feature_space, self.data.shape)

    def __post_init__(self) -> None:
        fewest = self.accelerator.num_processes
        for name in ("validation_images", "sample_images"):
            if getattr(self.config, name) < fewest:
                raise ValueError(
                    f"`{name}` is {getattr(self.config, name)}; it must be at least the number of "
                    f"processes, {fewest}"
                )
        if self.config.validate_every and self.held_out is None:
            raise ValueError(
                f"`validate_every` is {self.config.validate_every}; it needs held-out images: "
                "raise validation_fraction, or set it to 0"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of what the network is trained on."""
        return self.data.shape if self.latents is None else self.latents.shape

    @torch.no_grad()
    def validate(self, unet: UNet2DModel, step: int) -> dict[str, Any]:
        """Measure the loss on held-out images, t spread evenly over 0 .. T - 1, and plot it."""
        assert self.held_out is not None
        count = min(self.config.validation_images, len(self.held_out))
        t = ((torch.arange(count) + 0.5) * (self.objective.steps / count)).long()
        values = [
            self._losses(unet, rows, t[rows])
            for rows in self._shares(count, self.config.eval_batch_size)
        ]
        table = self._gathered(values, count)
        if self.accelerator.is_main_process:
            plot_over_t(t, table[:, 1], self.folder / f"loss_over_t-{step:08d}.png")
        return {
            "validation_loss": float(table[:, 0].mean()),
            "validation_mse": float(table[:, 1].mean()),
            "validation_n": count,
        }

    def _losses(self, unet: UNet2DModel, rows: Tensor, t: Tensor) -> Tensor:
        assert self.held_out is not None
        dtype, device = self.objective.rows.dtype, self.accelerator.device
        images, used = self.held_out.read(rows.numpy())
        x0, labels = images.to(device, dtype), self.held_out.labels_of(used)
        labels = None if labels is None else labels.to(device)
        noise = noise_of("validation", self.config.seed, rows, self.shape).to(device, dtype)
        if self.latents is not None:
            drawn = None
            if self.latents.sampled:
                drawn = noise_of("posterior", self.config.seed, rows, self.shape).to(device, dtype)
            x0 = self.latents.x0_of(x0, drawn)
        t = t.to(device)
        with self.accelerator.autocast():
            x_t = self.objective.noisy(x0, noise, t)
            output = unet(x_t, t, class_labels=labels, return_dict=False)[0]
        return torch.stack(self.objective(output, x0, noise, t), dim=1)

    def sample(self, unet: UNet2DModel, step: int) -> dict[str, Any]:
        """Save a grid of fixed seeds; with `frechet_images` also the distance and the drift.

        The samples of a network with classes take these in turn; each of up to 20 has its column.
        """
        config = self.config
        count = max(config.sample_images, config.frechet_images)
        parts = [self.draw(unet, rows) for rows in self._shares(count, config.eval_batch_size)]
        report: dict[str, Any] = {}
        if config.frechet_images:
            report = self._distances(parts, count)
        images = self._gathered(parts, count)
        if self.accelerator.is_main_process:
            columns = None
            if (labels := class_labels_of(unet)) is not None:
                columns = min(len(labels.ids), config.sample_images, MOST_COLUMNS)
            save_grid(images[: config.sample_images], self.grid_path(step), columns)
        return report

    def grid_path(self, step: int) -> Path:
        """Return where the grid of a step is."""
        return self.folder / f"samples-{step:08d}.png"

    @torch.no_grad()
    def draw(self, unet: UNet2DModel, rows: Tensor) -> Tensor:
        """Draw the samples `rows`, (n, C, H, W): DDIM with eta 0, each from its own seed.

        Latents are decoded.
        """
        dtype, device = self.objective.rows.dtype, self.accelerator.device
        scheduler = GeneralizedDDIMScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(
            min(self.config.sample_steps, self.config.num_train_timesteps), device=device
        )
        x = noise_of("samples", self.config.seed, rows, self.shape).to(device, dtype)
        labels = None
        if (classes := class_labels_of(unet)) is not None:
            ids = torch.tensor(classes.ids)
            labels = ids[rows % len(ids)].to(device)
        for t in scheduler.timesteps:
            with self.accelerator.autocast():
                output = unet(x, t, class_labels=labels, return_dict=False)[0]
            output = output[:, : self.shape[0]]
            x = scheduler.step(output.to(dtype), t, x, eta=0.0).prev_sample
        return x if self.latents is None else self.latents.codec.decode(x)

    def _distances(self, parts: list[Tensor], count: int) -> dict[str, Any]:
        reference = min(len(self.data), REFERENCE_LIMIT)
        if self._distance is None:
            self._distance = frechet_metric(self.features).to(self.accelerator.device)
            moments = torch.zeros(3, self.data.channels, dtype=torch.float64)
            for rows in self._shares(reference, self.config.eval_batch_size):
                images = self.data.batch(rows.numpy())[0]
                self._distance.update(images.to(self.accelerator.device), real=True)
                moments += channel_sums(images)
            self._moments = mean_and_std(self._summed(moments))
        for images in parts:
            self._distance.update(images.clamp(-1, 1), real=False)
        value = float(self._distance.compute())
        self._distance.reset()
        sums = sum(
            (channel_sums(images.cpu()) for images in parts), torch.zeros(3, self.data.channels)
        )
        mean, std = mean_and_std(self._summed(sums.double()))
        assert self._moments is not None
        return {
            "frechet": value,
            "frechet_n": count,
            "frechet_reference_n": reference,
            "feature_space": self.config.feature_space,
            "channel_mean_drift": (mean - self._moments[0]).tolist(),
            "channel_std_drift": (std - self._moments[1]).tolist(),
        }

    def _shares(self, count: int, size: int) -> list[Tensor]:
        """Return the rows of 0 .. count - 1 that this process takes, in batches."""
        mine = torch.arange(self.accelerator.process_index, count, self.accelerator.num_processes)
        return list(mine.split(size))

    def _gathered(self, parts: list[Tensor], count: int) -> Tensor:
        """Return all rows of `_shares` in order, float32 or float64 on the CPU."""
        processes = self.accelerator.num_processes
        mine = torch.cat(parts)
        if processes == 1:
            return mine.cpu()
        most = math.ceil(count / processes)
        padded = torch.cat([mine, mine[-1:].expand(most - len(mine), *mine.shape[1:])])
        everyone = self.accelerator.gather(padded.contiguous()).cpu()
        return (
            everyone.reshape(processes, most, *mine.shape[1:]).transpose(0, 1).flatten(0, 1)[:count]
        )

    def _summed(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum").cpu()


def noise_of(purpose: str, seed: int, rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Draw standard normal noise (len(rows), *shape), row i from its own generator."""
    noise = [torch.randn(shape, generator=generator(seed, purpose, int(row))) for row in rows]
    return torch.stack(noise)


def channel_sums(images: Tensor) -> Tensor:
    """Return (3, C): number of pixels, their sum and their sum of squares, float64."""
    flat = images.double().transpose(0, 1).flatten(1)
    count = torch.full((flat.shape[0],), float(flat.shape[1]), dtype=torch.float64)
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (C,), from `channel_sums`."""
    mean = sums[1] / sums[0]
    return mean, (sums[2] / sums[0] - mean.square()).clamp(min=0).sqrt()


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Save a PNG of `images` (n, C, H, W) in [-1, 1], small ones enlarged without smoothing.

    `columns` images are side by side; None makes as many rows as columns. One and three channels
    are shown as grey and colour; of other numbers, the first.
    """
    grid = tiled(images, columns or math.ceil(math.sqrt(len(images))), grey=255)
    scale = max(1, 48 // images.shape[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, grid.resize((grid.width * scale, grid.height * scale), Resampling.NEAREST))


def plot_over_t(t: Tensor, error: Tensor, path: Path) -> None:
    """Save a PNG of the squared error of the prediction over t, with its mean in 20 intervals.

    Without matplotlib nothing is drawn; `can_plot` says so once.
    """
    if not can_plot():
        return
    figure, axes = _figure()
    axes.plot(t, error, ".", markersize=2, color="0.7")
    groups = np.array_split(np.arange(len(t)), min(20, len(t)))
    middles = [float(t[group].float().mean()) for group in groups]
    axes.plot(middles, [float(error[group].mean()) for group in groups])
    axes.set(xlabel="t", ylabel="squared error of the prediction", yscale="log")
    _save(figure, path)


def plot_losses(steps: list[int], losses: list[float], path: Path) -> None:
    """Save a PNG of the training loss; each point is the mean since the point before.

    Without matplotlib nothing is drawn, as in `plot_over_t`.
    """
    if not can_plot():
        return
    figure, axes = _figure()
    axes.plot(steps, losses, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
