"""The bounds of every setting of a training run, and which settings go together."""

import typing
from typing import TYPE_CHECKING, Literal

from ddim_schedulers.class_labels import NAME_LENGTH, is_name

if TYPE_CHECKING:
    from ddim_schedulers.training.config import TrainingConfig

AT_LEAST = {
    "shuffle_buffer": 1,
    "num_workers": 0,
    "num_train_timesteps": 1,
    "sampling_history": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    "ema_update_after_step": 0,
    "validate_every": 0,
    "validation_images": 1,
    "sample_every": 0,
    "sample_images": 1,
    "sample_steps": 1,
    "frechet_images": 0,
    "eval_batch_size": 1,
    "checkpoint_every": 0,
    "keep_last": 1,
    "log_every": 1,
    "hybrid_lambda": 0,
    "image_size": 1,
    "stop_after": 1,
    "nonfinite_limit": 1,
    "max_image_pixels": 1,
}
ABOVE_ZERO = ("lr", "adam_epsilon", "snr_gamma", "gamma_eta", "ema_inv_gamma", "ema_power")
SHARES = (
    "adam_beta1",
    "adam_beta2",
    "ema_decay",
    "label_dropout",
    "sampling_uniform",
    "validation_fraction",
)


def check(config: "TrainingConfig") -> None:
    """Raise `ValueError` for a setting out of bounds or one that contradicts another."""
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}")
    for name in ABOVE_ZERO:
        if not getattr(config, name) > 0:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it must be above 0")
    for name in SHARES:
        if getattr(config, name) is not None and not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it must be in [0, 1)")
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` is {config.max_grad_norm}; it must be above 0, or null")
    _check_choices(config)
    _check_together(config)


def _check_choices(config: "TrainingConfig") -> None:
    # Flags and files are checked by argparse already; this is for configs built in Python.
    for name, hint in typing.get_type_hints(type(config)).items():
        allowed = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if allowed and getattr(config, name) not in allowed:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}; allowed: {', '.join(allowed)}"
            )


def _check_together(config: "TrainingConfig") -> None:
    if config.from_pretrained is not None:
        for name in ("model", "dropout"):  # a trained network brings its own
            if getattr(config, name) != getattr(type(config), name):
                raise ValueError(
                    f"`{name}` is {getattr(config, name)!r}, but the network is that of "
                    f"from_pretrained, {config.from_pretrained!r}; leave {name} out"
                )
    if config.loss == "gamma" and config.gamma is None:
        raise ValueError(
            "`loss` is 'gamma'; it needs its weights: set gamma to a file, or to 'ddim'"
        )
    if config.gamma is not None and config.loss != "gamma":
        raise ValueError(
            f"`gamma` is {config.gamma!r}, but loss is {config.loss!r}; set loss to 'gamma'"
        )
    if config.fit != "exact" and config.image_size is None:
        raise ValueError(f"`fit` is {config.fit!r}; it needs image_size")
    if config.random_crop and config.fit not in ("crop", "resize_crop"):
        raise ValueError(
            "`random_crop` is true; it needs fit 'crop' or 'resize_crop', and fit is "
            f"{config.fit!r}"
        )
    if config.value_range is not None and (
        len(config.value_range) != 2 or not config.value_range[0] < config.value_range[1]
    ):
        raise ValueError(f"`value_range` is {config.value_range}; it must be two rising numbers")
    _check_labels(config)
    _check_latents(config)
    if config.background != type(config).background:
        _check_colour(config.background)
    if config.streaming and config.num_workers > 1:
        raise ValueError(
            f"`num_workers` is {config.num_workers}; a stream is read in order, by at most 1 worker"
        )
    if config.push_to_hub:
        _check_push(config)
    if config.best_by == "frechet" and not (config.frechet_images and config.sample_every):
        raise ValueError(
            "`best_by` is 'frechet'; it needs `frechet_images` and `sample_every` above 0"
        )
    if config.frechet_images == 1:
        raise ValueError("`frechet_images` is 1; a covariance needs at least 2, 0 switches it off")
    if config.loss == "vlb" and config.hybrid_lambda != type(config).hybrid_lambda:
        raise ValueError(
            "`hybrid_lambda` has no effect with loss 'vlb', which is the bound itself; leave it out"
        )


def _check_latents(config: "TrainingConfig") -> None:
    if config.vae is None:
        for name in ("vae_revision", "vae_scale", "vae_posterior", "vae_cache"):
            if getattr(config, name) != getattr(type(config), name):
                raise ValueError(
                    f"`{name}` is {getattr(config, name)!r}; it needs vae, which is not set"
                )
        return
    if config.random_crop and config.vae_cache == "on":
        raise ValueError(
            "`vae_cache` is 'on', but random_crop cuts each image anew; it must be 'off', and "
            "images are then encoded at each step"
        )
    labelled = config.push_to_hub and config.class_conditional
    if labelled and config.hub_form == "portable":
        raise ValueError(
            "`hub_form` is 'portable' with vae and class_conditional, which no pipeline of "
            "diffusers samples; set hub_form to 'plug-in' or 'self-contained'"
        )


def _check_labels(config: "TrainingConfig") -> None:
    if not config.class_conditional:
        for name in ("label_column", "class_names", "label_dropout"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"`{name}` is {getattr(config, name)!r}; it needs class_conditional, which is "
                    "false"
                )
    names = config.class_names
    if names is None:
        return
    if not isinstance(names, list | tuple) or len(names) < 2:
        raise ValueError(f"`class_names` is {names!r}; it must be a list of at least 2 names")
    if wrong := [name for name in names if not is_name(name)]:
        raise ValueError(
            f"`class_names` holds {wrong[0]!r}; a name must have 1 to {NAME_LENGTH} printable "
            "characters, and no blank at its ends"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"`class_names` holds {twice!r} more than once; names must differ")


def _check_colour(name: str) -> None:
    from PIL import ImageColor

    try:
        opaque = len(ImageColor.getrgb(name)) == 3
    except (ValueError, AttributeError, TypeError):
        opaque = False
    if not opaque:
        raise ValueError(
            f"`background` is {name!r}; it must be an opaque colour by name or as #rrggbb, e.g. "
            "white"
        )


def _check_push(config: "TrainingConfig") -> None:
    from ddim_schedulers.training.sharing.hub import check_repo_id

    if not config.hub_repo_id:
        raise ValueError("`push_to_hub` is true; it needs hub_repo_id, as in USER/NAME")
    try:
        check_repo_id(config.hub_repo_id)
    except ValueError as error:
        raise ValueError(
            f"`hub_repo_id` is {config.hub_repo_id!r}; it cannot be used: {error}"
        ) from None
    if config.prediction_type == "posterior_mean" and config.hub_form == "portable":
        raise ValueError(
            "`hub_form` is 'portable' but prediction_type is 'posterior_mean', which no stock "
            "scheduler understands; set hub_form to 'plug-in' or 'self-contained'"
        )
