"""What a scheduler's config says: its keys, and what travels from one class to another."""

import copy
import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict

from .config_reading import (
    OLD_NAMES,
    PROCESS_KEYS,
    SAMPLING_KEYS,
    UNKNOWN_TO_STOCK,
    read_config,
    with_new_names,
    without_shared_defaults,
)
from .parameterization import check_prediction_type
from .planning import SCHEDULER_SPACINGS
from .reverse_noise import LEARNED
from .scales import check_scales
from .settings import restore_settings
from .sigmas import check_sigma
from .timesteps import check_original_steps, check_quadratic_end, check_timesteps

# Constructor arguments that one of our classes has and another lacks. They travel through
# `from_config` as hidden keys, without diffusers' warning about unexpected ones.
FAMILY_KEYS = (
    "calibration",
    "dynamic_thresholding_ratio",
    "eta",
    "eta_interval",
    "late_noise_cap",
    "lower_order_final",
    "quadratic_end",
    "reverse_variance",
    "sample_max_value",
    "set_alpha_to_one",
    "sigma",
    "solver_calibrated",
    "solver_corrector",
    "solver_corrector_order",
    "solver_form",
    "solver_order",
    "solver_variable",
    "solver_weights",
    "thresholding",
    "timesteps",
    "variance_type",
)

# Arguments that callers pass to the `from_pretrained` of every component; schedulers ignore them.
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

# What the betas are made of.
BETA_KEYS = tuple(key for key in PROCESS_KEYS if key != "prediction_type")

# Which noise a scheduler adds where nobody has said it.
UNSAID = {"reverse_variance": "sigma", "variance_type": "fixed_small"}


class Settings(FrozenDict):
    """A config whose attributes and items are one, and which counts its changes.

    diffusers computes from the attributes of a config, copies and saves its items, and lets either
    be assigned. A setting that was assigned is no default any more.
    """

    changes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "changes", 0)
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the item, too."""
        if name.startswith("_FrozenDict"):  # set by diffusers itself
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        """Set the attribute, too."""
        known = vars(self)
        if name in known and not (known[name] is value or repr(known[name]) == repr(value)):
            object.__setattr__(self, "changes", self.changes + 1)
            defaults = known.get("_use_default_values", ())
            if name in defaults:
                self["_use_default_values"] = [key for key in defaults if key != name]
        object.__setattr__(self, name, value)
        super().__setitem__(name, value)

    def __eq__(self, other: object) -> bool:
        """Compare the settings; which of them are defaults is not one of them."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return _settings_of(self) == _settings_of(other)

    def __ne__(self, other: object) -> bool:
        """Compare as `==`: an ordered dictionary has a comparison of its own here."""
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # as any dictionary


def _settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_use_default_values"}


class FamilyConfigMixin:
    """How a scheduler is built from a config of any class, and how its own config is written."""

    _internal_dict: Any

    @property
    def config(self) -> Any:
        """Return the settings, as `Settings`, also where a pipeline has put in its own config.

        There the attributes count, as diffusers computes from them.
        """
        held = self._internal_dict
        if type(held) is not Settings:
            assigned = {k: v for k, v in vars(held).items() if k in held}
            held = self._internal_dict = Settings({**held, **assigned})
        return held

    def register_to_config(self, **kwargs: Any) -> None:
        """Set settings, as in diffusers; one that gets another value is no default any more."""
        if "_internal_dict" not in vars(self):
            super().register_to_config(**kwargs)  # type: ignore[misc]
            return
        kwargs.pop("kwargs", None)
        changed = copy.copy(self.config)
        for name, value in kwargs.items():
            changed[name] = value
        self._internal_dict = changed

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build the scheduler from any discrete variance-preserving diffusers scheduler's config.

        The process that the network was trained on is kept: a key that the config leaves out has
        the default of the class that the config names (`config_reading`).

        Args:
            config: a scheduler's config; `kwargs` override its keys. Settings that a portable
                export keeps under `_ddim_schedulers` are restored.
            return_unused_kwargs: as in diffusers.
            **kwargs: constructor arguments, of any scheduler that can be swapped with this one.

        Raises:
            ValueError: if the config is of another process (EDM, flow matching, continuous time),
                leaves the process open, or says it twice, in two ways; or for an argument that
                none of those schedulers has. Other keys of the config are as free as in diffusers.
        """
        if isinstance(config, dict):
            if not return_unused_kwargs:
                cls._check_argument_names(kwargs)
            own = cls._get_init_keys(cls)  # type: ignore[attr-defined]
            kwargs = with_new_names(kwargs)
            hidden = {k: kwargs.pop(k) for k in FAMILY_KEYS if k in kwargs and k not in own}
            config = read_config({**restore_settings(config), **hidden}, kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @classmethod
    def _check_argument_names(cls, names: Mapping[str, Any]) -> None:
        """Refuse an unknown name: diffusers would drop it in silence."""
        host: Any = cls
        known = {*host._get_init_keys(cls), *FAMILY_KEYS, *LOADING_KEYS}
        if all(name in known or name.startswith("_") for name in names):
            return
        for other in host._get_compatibles():  # dummies for missing packages, too
            known |= {*host._get_init_keys(other), *getattr(other, "_deprecated_kwargs", ())}
        known |= {*OLD_NAMES, "predict_epsilon"}
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

        It also leaves out a noise that no setting has chosen.
        """
        config = self.config
        written = json.loads(super().to_json_string())  # type: ignore[misc]
        for key in unsaid_noise(config):
            del written[key]
        return json.dumps(without_shared_defaults(written), indent=2, sort_keys=True) + "\n"

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
    return config.get("variance_type") in LEARNED or config.get("reverse_variance") in LEARNED


def unsaid_noise(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of noise that are defaults, though the network predicts a variance.

    With such a network a default is no choice: a step with noise asks for one. So these are not
    written into files, where a default could not be told from a choice.
    """
    if not predicts_variance(config):
        return []
    defaults = config.get("_use_default_values", [])
    return [key for key, value in UNSAID.items() if key in defaults and config.get(key) == value]


def written(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new scheduler's config in Python's types, its process said outright.

    diffusers drops a value that is a default where the next class is built, which has other
    defaults: Heun's betas end at 0.012.
    """
    told = {name: plain(value) for name, value in config.items()}
    if "_use_default_values" in told:
        said = {*PROCESS_KEYS, *SAMPLING_KEYS} - {*UNKNOWN_TO_STOCK}
        told["_use_default_values"] = sorted(set(told["_use_default_values"]) - said)
    return told


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
    if "eps_scale" in own:
        check_scales(config.eps_scale, config.end_scale)
    cap = config.get("late_noise_cap")
    if "late_noise_cap" in own and cap is not None and not (np.isfinite(cap) and cap > 0):
        raise ValueError(f"`late_noise_cap` is {cap!r}; it must be None or a finite number > 0.")
    ratio = config.get("dynamic_thresholding_ratio", 1.0)
    if "dynamic_thresholding_ratio" in clipping and ratio > 1:
        raise ValueError(f"`dynamic_thresholding_ratio` is {ratio!r}; it must lie in (0, 1].")


def check_planned(config: Any, big_t: int) -> None:
    """Refuse timesteps or a sigma that no plan could have; each plan checks the rest.

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
    if config.original_inference_steps is not None:
        check_original_steps(config.original_inference_steps, config.timestep_spacing, big_t)
