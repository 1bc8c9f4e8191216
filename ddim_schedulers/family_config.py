"""What a scheduler's config says: its keys, and what travels from one class to another."""

import difflib
import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from .parameterization import check_prediction_type
from .settings import restore_settings
from .sigmas import check_sigma
from .timesteps import TIMESTEP_SPACINGS, check_quadratic_end, check_timesteps

# Constructor arguments that one of our classes has and another lacks. They travel through
# `from_config` as hidden keys, without diffusers' warning about unexpected ones.
FAMILY_KEYS = (
    "calibration",
    "dynamic_thresholding_ratio",
    "eta",
    "lower_order_final",
    "quadratic_end",
    "reverse_variance",
    "sample_max_value",
    "set_alpha_to_one",
    "sigma",
    "solver_corrector",
    "solver_form",
    "solver_order",
    "thresholding",
    "timesteps",
    "variance_type",
)

# What callers hand to every component's `from_pretrained`; a scheduler has no use for it.
LOADING_KEYS = (
    "device_map",
    "disable_mmap",
    "dtype",
    "low_cpu_mem_usage",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
    "variant",
)

# What says which process a network was trained on.
PROCESS_KEYS = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
)

# Settings that stock multistep solvers have too, with another default. Ours is left out of configs,
# so that those keep theirs: UniPC without `lower_order_final` ends in NaN.
SHARED_WITH_SOLVERS = {"solver_order": 1, "lower_order_final": False}

# Which noise a scheduler adds where nobody has said it.
UNSAID = {"reverse_variance": "sigma", "variance_type": "fixed_small"}

# A scheduler knows the network, so two of its trajectories come from measurements of it.
SCHEDULER_SPACINGS = (*TIMESTEP_SPACINGS, "optimal", "calibrated")


class FamilyConfigMixin:
    """How a scheduler is built from a config of any class, and how its own config is written."""

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build the scheduler from any discrete variance-preserving diffusers scheduler's config.

        Args:
            config: a scheduler's config; `kwargs` override its keys. Settings that a portable
                export keeps under `_ddim_schedulers` are restored.
            return_unused_kwargs: as in diffusers.
            **kwargs: constructor arguments, of any scheduler that can be swapped with this one.

        Raises:
            ValueError: if the config has no betas of its own (EDM, flow matching) or predicts a
                flow; or for an argument that none of those schedulers has. Keys of the config are
                as free as in diffusers.
        """
        if isinstance(config, dict):
            if not return_unused_kwargs:
                cls._check_argument_names(kwargs)
            own = cls._get_init_keys(cls)  # type: ignore[attr-defined]
            hidden = {k: kwargs.pop(k) for k in FAMILY_KEYS if k in kwargs and k not in own}
            config = _with_own_process(cls, {**restore_settings(config), **hidden})
            _check_discrete_vp(config, kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @classmethod
    def _check_argument_names(cls, names: Mapping[str, Any]) -> None:
        """Refuse a name that nobody knows: diffusers would drop it in silence."""
        host: Any = cls
        known = {*host._get_init_keys(cls), *FAMILY_KEYS, *LOADING_KEYS}
        if all(name in known or name.startswith("_") for name in names):
            return
        for other in host._get_compatibles():  # one that lacks a dependency has a stand-in
            known |= {*host._get_init_keys(other), *getattr(other, "_deprecated_kwargs", ())}
        known -= {"self", "args", "kwargs"}
        for name in names:
            if name not in known and not name.startswith("_"):
                near = difflib.get_close_matches(name, sorted(known), 1, 0.0)
                raise ValueError(
                    f"`{name}` is no argument of {cls.__name__} or of a scheduler that it can take "
                    f"the place of; the nearest one is `{near[0]}`."
                )

    def to_json_string(self) -> str:
        """Return the config as diffusers writes it, without the defaults of shared settings.

        Nor does it say a noise that nobody has said.
        """
        written = json.loads(super().to_json_string())  # type: ignore[misc]
        for key in unsaid_noise(self.config):  # type: ignore[attr-defined]
            del written[key]
        return json.dumps(_without_shared_defaults(written), indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        """Split a config as diffusers does; arguments of our other classes become hidden keys."""
        own = cls._get_init_keys(cls)  # type: ignore[attr-defined]
        other = {k: v for k, v in config_dict.items() if k in FAMILY_KEYS and k not in own}
        rest = {k: v for k, v in config_dict.items() if k not in other}
        init, unused, hidden = super().extract_init_dict(rest, **kwargs)  # type: ignore[misc]
        return init, unused, {**hidden, **other}


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: arrays, tensors and their scalars in Python's types."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value


def predicts_variance(config: Mapping[str, Any]) -> bool:
    """Tell whether a config says that the network predicts a variance in a second set of channels.

    `variance_type` is DDPM's name for it, `reverse_variance` that of our DDIM; either travels.
    """
    learned = ("learned", "learned_range")
    return config.get("variance_type") in learned or config.get("reverse_variance") in learned


def unsaid_noise(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of noise that are defaults, though the network predicts a variance.

    With such a network a default is no choice: a step with noise asks for one. So these are not
    written into files, where a default could not be told from a choice.
    """
    if not predicts_variance(config):
        return []
    defaults = config.get("_use_default_values", [])
    return [key for key, value in UNSAID.items() if key in defaults and config.get(key) == value]


def check_names(config: Any, own: Collection[str]) -> None:
    """Check the names in a config, and the numbers that its clipping uses.

    Args:
        config: of a scheduler.
        own: the settings of its class; others only travel, and the class that uses them checks.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    check_prediction_type(config.prediction_type)
    if config.timestep_spacing not in SCHEDULER_SPACINGS:
        raise ValueError(
            f"`timestep_spacing` is {config.timestep_spacing!r}; it must be one of "
            f"{SCHEDULER_SPACINGS}."
        )
    clipping = {"clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"} & set(own)
    for name in sorted(clipping):
        value = config.get(name, 1.0)
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` is {value!r}; it must be a finite number > 0.")
    if "sample_max_value" in clipping and config.sample_max_value < 1:
        raise ValueError(f"`sample_max_value` is {config.sample_max_value!r}; it must be >= 1.")
    ratio = config.get("dynamic_thresholding_ratio", 1.0)
    if "dynamic_thresholding_ratio" in clipping and ratio > 1:
        raise ValueError(f"`dynamic_thresholding_ratio` is {ratio!r}; it must lie in (0, 1].")


def check_planned(config: Any, big_t: int) -> None:
    """Refuse a trajectory or a sigma that no plan could have; each plan checks the rest.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    planned, sigma = config.get("timesteps"), config.get("sigma")
    if planned is not None:
        check_timesteps(planned, big_t)
    if sigma is not None:
        least = torch.zeros((), dtype=torch.float64, device="cpu")  # sigma^2 <= 1 - alpha_bar_s
        check_sigma(torch.tensor(sigma, dtype=torch.float64, device="cpu"), least)
        if planned is not None and len(sigma) != len(planned):
            raise ValueError(
                f"`sigma` has {len(sigma)} values, but `timesteps` has {len(planned)}; give one "
                "for each."
            )
    check_quadratic_end(config.get("quadratic_end", 1.0))


def _with_own_process(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the process that it describes kept, also where it is a default.

    diffusers drops every key that its scheduler was not given, and lets the defaults of the new
    class stand in. For betas that is another process: those of Heun's or KDPM2's scheduler end at
    0.012, ours at 0.02. Where both defaults agree, the key stays a default. A `variance_type` of
    None (DPM-Solver's "not learned") is no name of DDPM, and a `solver_order` that came with
    another solver is not ours: a swap gives DDIM, unless a setting that goes with a higher order of
    ours has travelled along.
    """
    kept = {k: v for k, v in config.items() if not (k == "variance_type" and v is None)}
    if "solver_type" in kept:  # of DPM-Solver, UniPC, ...
        higher = kept.get("solver_corrector") or kept.get("solver_form") == "epsilon"
        theirs = ("solver_type", "lower_order_final", *(() if higher else ("solver_order",)))
        kept = {k: v for k, v in kept.items() if k not in theirs}
    kept = _without_shared_defaults(kept)
    defaults = kept.get("_use_default_values", [])
    if kept.get("reverse_variance") == "learned_range" and "reverse_variance" not in defaults:
        # the network goes on predicting a variance where another noise is chosen
        if "variance_type" not in kept or "variance_type" in defaults:
            kept["variance_type"] = "learned_range"
            if defaults:
                kept["_use_default_values"] = [k for k in defaults if k != "variance_type"]
    if "_use_default_values" in kept:
        ours = inspect.signature(cls.__init__).parameters
        kept["_use_default_values"] = [
            k
            for k in kept["_use_default_values"]
            if k not in PROCESS_KEYS or (k in kept and k in ours and kept[k] == ours[k].default)
        ]
    return kept


def _without_shared_defaults(config: dict[str, Any]) -> dict[str, Any]:
    ours = SHARED_WITH_SOLVERS  # by type, too: True is no order, and must be refused
    return {k: v for k, v in config.items() if k not in ours or repr(v) != repr(ours[k])}


def _check_discrete_vp(config: dict[str, Any], overrides: dict[str, Any]) -> None:
    merged = {**config, **overrides}
    name = merged.get("_class_name", "the given scheduler")
    if merged.get("prediction_type") == "flow_prediction" or merged.get("use_flow_sigmas"):
        raise ValueError(
            f"The config of {name} predicts a flow "
            f"(`prediction_type`={merged.get('prediction_type')!r}, "
            f"`use_flow_sigmas`={merged.get('use_flow_sigmas')!r}); only discrete "
            f"variance-preserving "
            "processes can be converted."
        )
    has_betas = merged.get("trained_betas") is not None or "beta_schedule" in merged
    # the config of a scheduler object has no class name, unlike the JSON of a saved one
    of_a_scheduler = any(k in merged for k in ("_class_name", "_use_default_values", "sigma_data"))
    if of_a_scheduler and not has_betas:
        raise ValueError(
            f"The config of {name} has no betas of its own (`beta_schedule` or `trained_betas`); "
            f"only discrete "
            "variance-preserving processes can be converted."
        )
