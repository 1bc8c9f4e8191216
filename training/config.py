"""Every setting of a training run, in one place: the dataclasses generate the command line.

The groups below have flat, unique field names. `TrainingConfig` inherits all of them, so that
`config.lr` works everywhere and `TrainingConfig(lr=1e-3)` is all a script needs. Values come, later
ones winning, from the defaults here, a YAML or JSON file, and flags (`parsing.py`).
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from ddim_schedulers.training.config_checks import check

# Of a network that samples, by the names in torch.
DTYPES = ("float16", "bfloat16", "float32", "float64")


# Feature spaces that this package makes itself; any other name says what to import.
FEATURE_SPACES = ("pixels", "classifier", "inception", "dinov2")


def names_code(feature_space: str) -> bool:
    """Return whether a feature space is an import, which runs the code of that module."""
    known = feature_space.partition(":")[0] in FEATURE_SPACES
    return ":" in feature_space and not known and not feature_space.endswith(".safetensors")


def option(default: Any, help_text: str, *aliases: str) -> Any:
    """Return a field whose `help_text` is what `--help` shows; `aliases` are more flags of it."""
    return dataclasses.field(default=default, metadata={"help": help_text, "aliases": aliases})


@dataclass
class DataConfig:
    """Where the images come from and how they are brought to [-1, 1] and to one size."""

    _argument_group_name = "data"

    data: str = option(
        "digits",
        "'digits' (embedded, 8x8), a folder of images, a .npy/.npz/.parquet file, "
        "or the name of a data set of the `datasets` library, perhaps with @REVISION",
    )
    data_config: str | None = option(None, "configuration name of a `datasets` data set")
    split: str = option(
        "train", "split of a data set, or of a folder whose sub-folders are splits; a+b, all"
    )
    image_column: str | None = option(None, "image column; None takes the only image column")
    array_key: str | None = option(None, "array in an .npz file; None takes the only one")
    class_conditional: bool = option(
        False, "learn the classes of the images, from folders, a column, or an array beside them"
    )
    label_column: str | None = option(
        None,
        "column of a table, or array of an .npz file, with the class of each image; None takes the "
        "only column of class labels, or the array `labels`",
    )
    class_names: list[str] | None = option(
        None, "names of all classes, in the order of their numbers; None: those of the data"
    )
    streaming: bool = option(
        False, "read a `datasets` data set as a stream, without downloading it"
    )
    shuffle_buffer: int = option(1024, "images held back to shuffle a stream")
    image_size: int | None = option(None, "side of the square images; None keeps their size")
    fit: Literal["exact", "pad", "crop", "resize_crop", "squash"] = option(
        "exact",
        "how an image of another size becomes image_size: refuse it, pad with the lowest value, "
        "cut the centre, resize the short side and cut the centre, or resize both sides",
    )
    random_crop: bool = option(False, "cut at a random place instead of the centre (training only)")
    random_flip: bool = option(False, "mirror half of the training images from left to right")
    image_mode: Literal["keep", "L", "RGB", "RGBA"] = option(
        "keep", "convert image files to grey, colour, or colour with alpha; 'keep' converts nothing"
    )
    background: str = option(
        "white", "colour (a name or #rrggbb) that is seen through transparent pixels of image files"
    )
    max_image_pixels: int | None = option(
        None, "pixels of the largest image file that is opened; None is Pillow's limit, 178,956,970"
    )
    value_range: list[float] | None = option(
        None, "the two values that become -1 and 1; None: 0 255 for 8-bit, 0 65535 for 16-bit data"
    )
    on_bad_image: Literal["stop", "skip"] = option(
        "stop", "a file that cannot be decoded stops the run, or its neighbour takes its place"
    )
    num_workers: int = option(0, "processes that prepare batches, for each training process")


@dataclass
class ModelConfig:
    """Which `UNet2DModel` is trained."""

    _argument_group_name = "model"

    model: str = option(
        "tiny",
        "preset (tiny, small, ddpm-cifar10, ddpm-256; for latents latent-32, latent-64) or a "
        "UNet2DModel config file (JSON)",
    )
    from_pretrained: str | None = option(
        None, "pipeline or UNet folder, or Hub name, perhaps with @REVISION, to start from"
    )
    dropout: float | None = option(None, "dropout of the residual blocks; None: as the preset says")


@dataclass
class LatentConfig:
    """The autoencoder behind which the network is trained, if any."""

    _argument_group_name = "latents"

    vae: str | None = option(
        None,
        "train on latents of this AutoencoderKL, AutoencoderTiny or VQModel, which stays as it is: "
        "a folder, or a Hub name, perhaps with @REVISION",
    )
    vae_revision: str | None = option(None, "branch, tag or commit of a vae from the Hub")
    vae_scale: Literal["auto", "config"] = option(
        "auto",
        "factor and shift of the latents: measured, or the config's if its factor gives a "
        "deviation within a tenth of 1; config: the config's",
    )
    vae_posterior: Literal["sample", "mean"] = option(
        "sample", "of an AutoencoderKL: draw latents anew each time, or take their mean"
    )
    vae_cache: Literal["on", "off"] = option(
        "on",
        "encode the images once and keep the latents in output_dir; off: at each step, which "
        "random_crop needs, and a stream always does",
    )


@dataclass
class ProcessConfig:
    """The forward process and what the network predicts."""

    _argument_group_name = "process"

    num_train_timesteps: int = option(1000, "T, the number of steps of the forward process")
    beta_schedule: str = option("linear", "linear, scaled_linear, squaredcos_cap_v2, sigmoid, ...")
    beta_start: float = option(1e-4, "first beta")
    beta_end: float = option(0.02, "last beta")
    rescale_betas_zero_snr: bool = option(False, "make the last timestep pure noise")
    prediction_type: Literal["epsilon", "sample", "v_prediction", "posterior_mean"] = option(
        "epsilon", "what the network outputs"
    )
    variance_type: Literal["auto", "fixed_small", "fixed_large", "learned_range"] = option(
        "auto",
        "variance of the reverse steps: of the saved scheduler and of the bound of loss vlb; "
        "learned_range trains it (Improved DDPM), auto saves fixed_small and takes fixed_large "
        "for the bound",
    )


@dataclass
class ObjectiveConfig:
    """The loss and the timesteps at which it is taken."""

    _argument_group_name = "objective"

    loss: Literal["simple", "gamma", "vlb", "min_snr"] = option(
        "simple", "L_simple, L_gamma, the variational bound, or min-SNR weights"
    )
    gamma: str | None = option(
        None,
        "weights of L_gamma: a .npy, .json or .txt file with T numbers, or 'ddim' for those that "
        "make L_gamma + C the variational objective J_sigma of the DDIM paper",
    )
    gamma_eta: float = option(1.0, "eta of the family member for gamma 'ddim'; must be above 0")
    label_dropout: float | None = option(
        None,
        "share of images that are shown without their class (as the null class), for guidance "
        "without a classifier; None: 0.1, or 0 for a network of from_pretrained without a null "
        "class",
    )
    snr_gamma: float = option(5.0, "the limit of the min-SNR weights")
    hybrid_lambda: float = option(0.001, "weight of the bound that trains a learned variance")
    timestep_sampling: Literal["uniform", "stratified", "loss_aware"] = option(
        "uniform", "how t is drawn; loss_aware is the importance sampling of Improved DDPM"
    )
    sampling_history: int = option(10, "losses kept for each t by loss_aware")
    sampling_uniform: float = option(0.001, "share of uniform draws in loss_aware")


@dataclass
class OptimisationConfig:
    """Batch, length, AdamW and its learning rate."""

    _argument_group_name = "optimisation"

    batch_size: int = option(64, "images for each optimiser step, over all processes together")
    gradient_accumulation_steps: int = option(1, "parts in which a process computes its share")
    max_train_steps: int = option(1000, "optimiser steps of the whole run")
    stop_after: int | None = option(
        None, "end this session after so many steps with a checkpoint; the run can be resumed"
    )
    lr: float = option(2e-4, "peak learning rate")
    lr_schedule: Literal["constant", "linear", "cosine", "polynomial"] = option(
        "constant", "decay after the warm-up, a function of the step alone"
    )
    lr_warmup_steps: int = option(500, "steps of linear warm-up")
    adam_beta1: float = option(0.9, "AdamW beta1")
    adam_beta2: float = option(0.999, "AdamW beta2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to this norm; null: never")
    seed: int = option(0, "seed of weights, data order, noise, t, augmentation and dropout")


@dataclass
class EMAConfig:
    """The moving average of the weights, which is what gets evaluated and exported."""

    _argument_group_name = "EMA"

    use_ema: bool = option(True, "keep an exponential moving average of the weights")
    ema_decay: float = option(0.9999, "largest decay")
    ema_warmup: bool = option(
        True,
        "decay 1 - (1 + step / inv_gamma)^-power up to ema_decay; else (1 + step) / (10 + step)",
    )
    ema_inv_gamma: float = option(1.0, "see ema_warmup")
    ema_power: float = option(0.75, "see ema_warmup")
    ema_update_after_step: int = option(0, "until this step the average equals the weights")


@dataclass
class PrecisionConfig:
    """Number formats and speed."""

    _argument_group_name = "precision and speed"

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "autocast of the network (noise and loss stay in weights_dtype); auto: as "
        "`accelerate launch` or its config file says, else no",
    )
    weights_dtype: Literal["float32", "float64"] = option(
        "float32", "weights, noise and loss; float64 is for checks of exactness"
    )
    cpu: bool = option(False, "use the CPU even where there is an accelerator")
    allow_tf32: bool = option(False, "TensorFloat-32 matrix products on GPUs that have them")
    compile: bool = option(False, "torch.compile the network")
    compile_mode: str | None = option(None, "mode of torch.compile")
    compile_backend: str = option("inductor", "backend of torch.compile")
    channels_last: bool = option(False, "channels_last memory format")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    on_nonfinite: Literal["stop", "count"] = option(
        "stop", "a step that is not finite is never applied; stop the run, or go on and count"
    )
    nonfinite_limit: int = option(
        100, "stop after so many steps in a row that were not finite, also where they are counted"
    )


@dataclass
class ValidationConfig:
    """What is looked at during the run, always with the weights that will be exported."""

    _argument_group_name = "validation"

    validation_fraction: float = option(0.05, "share of the images held out; digits have their own")
    validate_every: int = option(
        0, "steps between validation losses and loss-over-t plots; 0: never"
    )
    validation_images: int = option(256, "held-out images in the validation loss")
    sample_every: int = option(0, "steps between sample grids; 0: never")
    sample_images: int = option(36, "images in the grid")
    sample_steps: int = option(50, "DDIM steps (eta 0) of samples for grid, distance and drift")
    frechet_images: int = option(0, "samples for Frechet distance and channel drift; 0: neither")
    feature_space: str = option(
        "pixels",
        "'pixels' (pooled to at most 8x8), or module:Name of a torch.nn.Module; a file that names "
        "one needs --trust_code",
    )
    eval_batch_size: int = option(64, "images at a time, for each process, in evaluation")
    best_by: Literal["loss", "frechet"] = option("loss", "metric that decides the best checkpoint")


@dataclass
class CheckpointConfig:
    """Where the run is written and how it is continued."""

    _argument_group_name = "checkpoints"

    output_dir: str = option("runs/train", "folder of the run", "--output")
    checkpoint_every: int = option(1000, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(2, "checkpoints kept, the best one not counted")
    resume: str = option(
        "never", "'latest' continues the run in output_dir (or starts it), or a checkpoint folder"
    )


@dataclass
class TrackingConfig:
    """How the run reports."""

    _argument_group_name = "tracking"

    log_every: int = option(20, "steps between readings of loss and flags from the device")
    progress_bar: bool = option(True, "show a progress bar on the main process")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "tracker, through Accelerate"
    )
    run_name: str = option("ddim-schedulers", "project name for the tracker")


@dataclass
class HubConfig:
    """Sharing the result: the pipeline folder only, never checkpoints."""

    _argument_group_name = "Hub"

    push_to_hub: bool = option(False, "upload the pipeline folder when the run is complete")
    hub_repo_id: str | None = option(None, "USER/NAME on the Hub")
    hub_private: bool = option(False, "create the repository as private")
    hub_revision: str | None = option(None, "branch; None is main")
    hub_form: Literal["portable", "plug-in", "self-contained"] = option(
        "portable", "form in which the scheduler is shared, see `ddim-schedulers push --help`"
    )


GROUPS: tuple[Any, ...] = (
    DataConfig,
    ModelConfig,
    LatentConfig,
    ProcessConfig,
    ObjectiveConfig,
    OptimisationConfig,
    EMAConfig,
    PrecisionConfig,
    ValidationConfig,
    CheckpointConfig,
    TrackingConfig,
    HubConfig,
)


@dataclass
class TrainingConfig(
    DataConfig,
    ModelConfig,
    LatentConfig,
    ProcessConfig,
    ObjectiveConfig,
    OptimisationConfig,
    EMAConfig,
    PrecisionConfig,
    ValidationConfig,
    CheckpointConfig,
    TrackingConfig,
    HubConfig,
):
    """All groups in one flat object.

    Raises:
        ValueError: a value out of its bounds, named with what is allowed.
    """

    _argument_group_name = "all"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # files and flags give text
            if isinstance(value := getattr(self, field.name), os.PathLike):
                setattr(self, field.name, os.fspath(value))
            elif isinstance(value, tuple):  # files and flags give lists
                setattr(self, field.name, list(value))
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved settings, ready for YAML or JSON."""
        return dataclasses.asdict(self)


# Fields that change what is computed. A resumed run that differs here is a different run.
COMPUTED_FROM = frozenset(
    field.name
    for group in GROUPS[: GROUPS.index(PrecisionConfig)]
    for field in dataclasses.fields(group)
) - {
    "stop_after",
    "num_workers",
    "gradient_accumulation_steps",
    "on_bad_image",
    "max_image_pixels",
    "vae_cache",
} | {
    "weights_dtype",
    "validation_fraction",
}
