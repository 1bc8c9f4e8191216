"""A small classifier of noisy images, p(y | x_t): what guides an unconditional network.

Classifier guidance (arXiv:2105.05233) follows grad log p(y | x_t), so the classifier sees images at
every t. It is the half of a UNet that goes down, told t as the UNet is. The classifier that judges
samples (`metrics.features`) is another network, of clean images: a judge that also guides would
reward itself.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ddim_schedulers.class_labels import MOST_CLASSES, is_name
from ddim_schedulers.network_config import CHANNELS, LEVELS, SIDE, check_complete
from ddim_schedulers.reading import read_json, safetensors_shapes

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class NoisyClassifier(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Residual blocks that halve the image, told t, then an average over pixels and one layer.

    Args:
        sample_size: height and width of the images.
        in_channels: C.
        num_classes: K.
        num_train_timesteps: T of the process whose x_t it knows.
        block_out_channels: of each level; the image is halved between levels.
        norm_num_groups: groups of GroupNorm.
        class_names: of the classes, in the order of their numbers; None if they have numbers alone.
        process: settings of the process, for the reader.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int],
        in_channels: int,
        num_classes: int,
        num_train_timesteps: int = 1000,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        norm_num_groups: int = 8,
        class_names: list[str] | None = None,
        process: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        width = block_out_channels[0]
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, 4 * width)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        blocks: list[nn.Module] = []
        for number, channels in enumerate(block_out_channels):
            if number:
                blocks.append(Downsample2D(width, use_conv=True, name="op"))
            blocks.append(
                ResnetBlock2D(
                    in_channels=width,
                    out_channels=channels,
                    temb_channels=4 * block_out_channels[0],
                    groups=norm_num_groups,
                )
            )
            width = channels
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.GroupNorm(norm_num_groups, width)
        self.output = nn.Linear(width, num_classes)

    @property
    def names(self) -> list[str]:
        """Return what to call the classes: their names, or their numbers as text."""
        config: Any = self.config
        return list(config.class_names or map(str, range(config.num_classes)))

    def forward(self, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Return logits (B, K) for images x_t (B, C, H, W) at timesteps t, one or (B,).

        Raises:
            ValueError: images of another shape than those that it was made for.
        """
        config: Any = self.config
        shape = (config.in_channels, *config.sample_size)
        if tuple(x_t.shape[1:]) != shape:
            raise ValueError(
                f"`x_t` is {tuple(x_t.shape[1:])} (C, H, W); it must be {shape}, as those that the "
                "classifier was trained on"
            )
        steps = torch.as_tensor(t, device=x_t.device).reshape(-1).expand(len(x_t))
        told = self.time_embedding(self.time_proj(steps).to(x_t.dtype))
        features = self.conv_in(x_t)
        for block in self.blocks:
            features = (
                block(features, told) if isinstance(block, ResnetBlock2D) else block(features)
            )
        features = nn.functional.silu(self.norm_out(features))
        return self.output(features.mean((2, 3)))


def load_noisy_classifier(path: str | Path) -> NoisyClassifier:
    """Return the classifier that `train-classifier` wrote to a folder, in evaluation mode.

    Raises:
        ValueError: nothing is there, or a config or weights that are no such classifier's.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"`classifier` is {str(path)!r}; it must be a folder that `ddim-schedulers "
            f"train-classifier` made, with a {CONFIG}"
        )
    config = read_json(folder / CONFIG)
    _check(config, folder / CONFIG)
    safetensors_shapes(folder / WEIGHTS)
    known = inspect.signature(NoisyClassifier.__init__).parameters
    given = {key: value for key, value in config.items() if key in known}
    try:
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in NoisyClassifier(**given).state_dict().items()}
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read: no classifier has these settings: {error}"
        ) from error
    found = {name: shape for name, (_, shape) in safetensors_shapes(folder / WEIGHTS).items()}
    if found != {name: tuple(shape) for name, shape in shapes.items()}:
        raise ValueError(
            f"{folder / WEIGHTS} cannot be read: its weights do not fit {CONFIG}; they must"
        )
    classifier = NoisyClassifier.from_pretrained(folder, use_safetensors=True)
    check_complete(classifier, folder)
    return classifier.eval().requires_grad_(False)


def _check(config: dict[str, Any], path: Path) -> None:
    """Check the values of a config before anything of its size is built."""

    def whole(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    def share(value: Any) -> bool:
        return isinstance(value, int | float) and 0 <= value <= 1

    def several(value: Any, count: range, low: int, high: int) -> bool:
        fits = isinstance(value, list) and len(value) in count
        return fits and all(whole(item, low, high) for item in value)

    def whole_process(process: Any) -> bool:
        told = process.get("alpha_bar", {}) if isinstance(process, dict) else None
        steps = map(str, range(config["num_train_timesteps"]))
        return isinstance(told, dict) and set(told) <= set(steps) and all(map(share, told.values()))

    names, count = config.get("class_names"), config.get("num_classes")
    groups, widths = config.get("norm_num_groups"), config.get("block_out_channels")
    levels = range(1, LEVELS + 1)
    holds: Sequence[tuple[str, bool, str]] = (
        ("_class_name", config.get("_class_name") == NoisyClassifier.__name__, "NoisyClassifier"),
        ("sample_size", several(config.get("sample_size"), range(2, 3), 1, SIDE), "two integers"),
        ("in_channels", whole(config.get("in_channels"), 1, CHANNELS), "an integer >= 1"),
        ("num_classes", whole(count, 2, MOST_CLASSES), f"an integer, 2 to {MOST_CLASSES}"),
        ("num_train_timesteps", whole(config.get("num_train_timesteps"), 1, 10**6), "an integer"),
        ("norm_num_groups", whole(groups, 1, CHANNELS), "an integer >= 1"),
        ("block_out_channels", several(widths, levels, 1, CHANNELS), "a list of integers"),
    )
    for key, fits, allowed in holds:
        if not fits:
            raise ValueError(
                f"{str(path)!r}: `{key}` is {str(config.get(key))[:80]!r}; it must be {allowed}"
            )
    if (process := config.get("process")) is not None and not whole_process(process):
        raise ValueError(
            f"{str(path)!r}: `process` is {str(process)[:80]!r}; it must be null or an object "
            "whose `alpha_bar` has a number in 0 .. 1 by timestep"
        )
    if names is not None and not (
        isinstance(names, list) and len(names) == count and all(is_name(name) for name in names)
    ):
        raise ValueError(
            f"{str(path)!r}: `class_names` is {str(names)[:80]!r}; it must be null or {count} names"
        )
