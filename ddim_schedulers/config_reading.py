"""How a config of any diffusers scheduler, of any year, is read as a config of ours.

The keys that say which process a network was trained on, and at which noise levels it is asked, are
read as the class that the config names reads them: with its defaults, its old spellings and what it
does without a key. A config of another process is refused. What is only a solver's own way along
the process (Karras sigmas, orders, correctors) stays in the config as a hidden key without effect.
"""

import inspect
import reprlib
from collections.abc import Mapping
from typing import Any

from .betas import SCHEDULES_WITHOUT_ENDS
from .config_types import FLAGS
from .reverse_noise import LEARNED

# What says which process a network was trained on.
PROCESS_KEYS = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "trained_betas",
)

# The keys that say at which timesteps the network is called, and what happens to its output.
# diffusers drops a value that its earlier scheduler had by default; with these keys it counts.
SAMPLING_KEYS = (
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "original_inference_steps",
    "sample_max_value",
    "set_alpha_to_one",
    "steps_offset",
    "thresholding",
    "timestep_spacing",
)

# Keys above that DDIM, DDPM and the solvers that they are swapped with do not have: diffusers warns
# where such a key is handed to them.
UNKNOWN_TO_STOCK = ("original_inference_steps", "snr_shift_scale")

# Settings that stock multistep solvers have too, with another default. Ours is left out of configs,
# so that those keep theirs: UniPC without `lower_order_final` ends in NaN.
SHARED_WITH_SOLVERS = {"solver_order": 1, "lower_order_final": False}

# Names of diffusers 0.0 (`clip_predicted_image`), and of its inverse scheduler before 0.18. Not in
# this table: `timesteps` (0.0), an integer, and `predict_epsilon` (before 0.11), another type.
OLD_NAMES = {"clip_predicted_image": "clip_sample", "set_alpha_to_zero": "set_alpha_to_one"}

OUR_CLASSES = (
    "GeneralizedDDIMInverseScheduler",
    "GeneralizedDDIMScheduler",
    "MarkovianDDPMScheduler",
)

# A key that only our classes have, and all of them: the mark of a config that has no class name.
OUR_KEY = "quadratic_end"

# Classes that have `clip_sample`, and some `thresholding`, but never read them.
NEVER_CLIP = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "TCDScheduler")

# Classes without `timestep_spacing` whose timesteps are equally spaced with both ends.
ON_LINSPACE = ("DPMSolverSinglestepScheduler", "UnCLIPScheduler")

# Classes whose networks know only `original_inference_steps` noise levels.
DISTILLED = ("LCMScheduler", "TCDScheduler")

# Our settings that may not be null (flags may not either) and that some of our classes lack.
NEVER_NULL = (
    "dynamic_thresholding_ratio",
    "end_scale",
    "eps_scale",
    "quadratic_end",
    "reverse_variance",
    "sample_max_value",
    "solver_form",
    "solver_order",
    "solver_weights",
)

# The largest weight that a consistency model's boundary condition may give to x_t where it is left
# out; LCM's own settings give 7e-6.
MAX_BOUNDARY = 1e-4


def read_config(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the defaults of its class written out.

    Args:
        config: of any scheduler: the one of an object, or what a JSON file holds.
        overrides: keyword arguments that replace its keys.

    Raises:
        ValueError: for another process, and for keys that contradict each other or leave the
            process open.
    """
    defaulted = config.get("_use_default_values", [])
    if not isinstance(defaulted, list | tuple | set):
        raise ValueError(f"`_use_default_values` is {defaulted!r}; it must be a list of names.")
    read = with_new_names(config)
    name = _class_of(read)
    if name not in (None, *OUR_CLASSES) and type(read.get("timesteps")) is int:
        # T in diffusers 0.0; in our configs a list, the trajectory
        _replace(read, "timesteps", "num_train_timesteps", read["timesteps"])
    _check_process({**read, **overrides}, name)
    if name in NEVER_CLIP:
        read |= {"clip_sample": False, "thresholding": False}
    defaults = _defaults_of(name) if name is not None else {}
    read = _at_its_timesteps(read, name, defaults, overrides)
    for key in (*PROCESS_KEYS, *SAMPLING_KEYS):
        if key in defaults:
            read.setdefault(key, defaults[key])
    if read.get("variance_type", "") is None:  # DPM-Solver's way to say that it is not learned
        del read["variance_type"]
    if _is_of_stock(config, name):
        read.setdefault("clip_sample", False)  # a class without the key never clips
    if name in OUR_CLASSES:
        _check_own_null(read)
    else:
        read = _without_null(read, overrides)
    read = _with_learned_variance(without_shared_defaults(_without_solver(read)))
    if "_use_default_values" in read:
        counted = (*PROCESS_KEYS, *SAMPLING_KEYS)
        dropped = [k for k in read["_use_default_values"] if k not in counted]
        read["_use_default_values"] = dropped
    return read


def with_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the keys of diffusers' first releases under today's names.

    Raises:
        ValueError: if it says the same in both ways, differently.
    """
    renamed = dict(config)
    for old, new in OLD_NAMES.items():
        if old in renamed:
            _replace(renamed, old, new, renamed[old])
    if "predict_epsilon" in renamed:
        said = renamed["predict_epsilon"]
        if said is not None and not isinstance(said, bool):
            raise ValueError(f"`predict_epsilon` is {said!r}; it must be True or False.")
        means = None if said is None else ("epsilon" if said else "sample")
        _replace(renamed, "predict_epsilon", "prediction_type", means)
    return renamed


def _replace(config: dict[str, Any], old: str, new: str, value: Any) -> None:
    said = config.pop(old)
    if value is None:
        return
    if new in config and new not in config.get("_use_default_values", ()) and config[new] != value:
        raise ValueError(
            f"`{old}` is {said!r}, the old way to say `{new}`={value!r}, but `{new}` is "
            f"{config[new]!r}; they must agree, leave one of them out."
        )
    config[new] = value


def without_shared_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` without those of our defaults that a stock solver would take for its own."""
    ours = SHARED_WITH_SOLVERS  # with the type: True equals 1, but is no order
    return {k: v for k, v in config.items() if k not in ours or repr(v) != repr(ours[k])}


def _class_of(config: Mapping[str, Any]) -> str | None:
    """Return the name of the scheduler class that a config is of, as far as it can be known.

    The config of an object that never was in a file has no name, but every key of its class.
    """
    name = config.get("_class_name")
    if isinstance(name, list | tuple) and name:  # code in a repository: [module, class]
        name = name[-1]
    if isinstance(name, str):
        return name.removeprefix("Flax")
    if "_use_default_values" not in config or OUR_KEY in config:
        return None
    if "snr_shift_scale" in config:
        return "CogVideoXDDIMScheduler"
    if "timestep_scaling" in config and "original_inference_steps" in config:
        return "LCMScheduler"
    if "beta_schedule" in config and "timestep_spacing" not in config:
        if "solver_order" in config:
            return "DPMSolverSinglestepScheduler"
        if "beta_start" not in config:
            return "UnCLIPScheduler"
    return None


def _is_of_stock(config: Mapping[str, Any], name: str | None) -> bool:
    """Tell whether a config is of a scheduler, and not of one of ours or a plain dictionary."""
    if name is None:
        return "_use_default_values" in config and OUR_KEY not in config
    return name not in OUR_CLASSES and OUR_KEY not in config


def _stock_class(name: str | None) -> Any:
    """Return the diffusers class of that name; `None` where there is none or it cannot be used."""
    import diffusers
    from diffusers.utils.import_utils import DummyObject

    found = getattr(diffusers, name, None) if name else None
    return found if inspect.isclass(found) and not isinstance(found, DummyObject) else None


def _defaults_of(name: str) -> dict[str, Any]:
    stock = _stock_class(name)
    if stock is None:
        return {}
    parameters = inspect.signature(stock.__init__).parameters.items()
    return {key: p.default for key, p in parameters if p.default is not p.empty}


def _check_process(merged: Mapping[str, Any], name: str | None) -> None:
    """Refuse a config of another process, or one that does not say which."""
    of = name or "the given scheduler"
    allowed = "only discrete variance-preserving processes can be converted."
    if merged.get("prediction_type") == "flow_prediction" or merged.get("use_flow_sigmas"):
        raise ValueError(
            f"`prediction_type` is {merged.get('prediction_type')!r} and `use_flow_sigmas` is "
            f"{merged.get('use_flow_sigmas')!r}: the config of {of} predicts a flow; {allowed}"
        )
    if merged.get("timestep_type", "discrete") not in ("discrete", None):
        raise ValueError(
            f"`timestep_type` is {merged['timestep_type']!r} in the config of {of}: the network is "
            f"asked at continuous noise levels, not at timesteps; {allowed}"
        )
    if merged.get("timestep_values") is not None:
        raise ValueError(
            f"`timestep_values` is {str(merged['timestep_values'])[:60]} in the config of {of}: "
            "the network is asked at other numbers than its timesteps; it must be None."
        )
    stock = _stock_class(name)
    known = stock is not None or name in OUR_CLASSES
    # an object has every key of its class; IPNDM's `trained_betas` are no betas of this process
    has_betas = "beta_schedule" in merged or merged.get("trained_betas") is not None
    if stock is not None:
        has_betas = "beta_schedule" in inspect.signature(stock.__init__).parameters
    elif name is None and "_use_default_values" in merged:
        has_betas = "beta_schedule" in merged
    elif name is None:
        has_betas = has_betas or "sigma_data" not in merged
    elif name in OUR_CLASSES:
        has_betas = True
    if not has_betas:
        raise ValueError(
            "`beta_schedule` or `trained_betas` must define the process, but the config of "
            f"{of} has no betas of its own; {allowed}"
        )
    if not known and name is not None:
        _check_complete(merged, name)


def _check_complete(config: Mapping[str, Any], name: str) -> None:
    """Refuse a config that leaves its process to the defaults of an unknown class."""
    needed = ["num_train_timesteps", "prediction_type"]
    if _reads_ends(config):
        needed += ["beta_start", "beta_end"]
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(
            f"`_class_name` is {name!r}, which the installed diffusers cannot load, so that its "
            f"defaults are unknown; its config must have {', '.join(f'`{k}`' for k in missing)}."
        )


def _at_its_timesteps(
    config: dict[str, Any],
    name: str | None,
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Return `config` with the trajectory of a class whose `timestep_spacing` does not tell it."""
    if name in ON_LINSPACE:
        return {**config, "timestep_spacing": "linspace"}
    if name not in DISTILLED:
        if not _is_of_stock(config, name):
            return config
        # an earlier scheduler left the key; this class does not use it
        return {k: v for k, v in config.items() if k != "original_inference_steps"}
    if name == "LCMScheduler":
        _check_boundary({**defaults, **config, **overrides})
    return {**config, "timestep_spacing": "trailing"}


def _check_boundary(asked: Mapping[str, Any]) -> None:
    """Refuse a consistency model whose boundary condition acts at its timesteps."""
    steps, scaling = asked.get("original_inference_steps"), asked.get("timestep_scaling")
    big_t = asked.get("num_train_timesteps")
    if not isinstance(scaling, int | float) or not 0 < scaling < 1e9:
        shown = reprlib.repr(scaling)
        raise ValueError(f"`timestep_scaling` is {shown}; it must lie between 0 and 1e9.")
    # the constructor refuses what is no number of steps
    if isinstance(steps, int) and isinstance(big_t, int) and steps > 0:
        first = (big_t // steps - 1) * scaling
        boundary = 0.25 / (first**2 + 0.25)  # c_skip, arXiv:2310.04378, with sigma_data = 0.5
        if boundary > MAX_BOUNDARY:
            raise ValueError(
                f"`timestep_scaling` is {scaling!r} and `original_inference_steps` is {steps}: at "
                "the first of its timesteps the boundary condition of a consistency model makes "
                f"{boundary:.2g} of x_0 out of x_t itself, which no member of the family does; at "
                f"most {MAX_BOUNDARY} can be left out."
            )


def _check_own_null(config: Mapping[str, Any]) -> None:
    """Refuse null in a config of ours, also for a key that another of our classes reads."""
    for key in (*FLAGS, *NEVER_NULL):
        if key in config and config[key] is None:
            raise ValueError(f"`{key}` is None; it must have a value, or be left out.")


def _without_null(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with each null as stock takes it.

    A flag that is null is off. A number or a name that nothing reads is left out; where it is read,
    null stays, for the constructor to refuse.
    """
    read = {**config, **overrides}
    limits = bool(read.get("thresholding")), bool(read.get("clip_sample", True))
    unread = [
        "quadratic_end",
        "reverse_variance",
        "solver_form",
        "solver_order",
        "solver_weights",
    ]
    if read.get("trained_betas") is not None:
        unread.append("beta_schedule")
    if not _reads_ends(read):
        unread += ["beta_start", "beta_end"]
    if not limits[0]:
        unread += ["dynamic_thresholding_ratio", "sample_max_value"]
    if limits[0] or not limits[1]:
        unread.append("clip_sample_range")
    if read.get("timestep_spacing", "leading") != "leading":
        unread.append("steps_offset")
    kept = {k: v for k, v in config.items() if v is not None or k not in unread}
    return {k: False if v is None and k in FLAGS else v for k, v in kept.items()}


def _reads_ends(config: Mapping[str, Any]) -> bool:
    """Tell whether the betas depend on `beta_start` and `beta_end`."""
    given = config.get("trained_betas") is not None
    return not given and config.get("beta_schedule") not in SCHEDULES_WITHOUT_ENDS


def _with_learned_variance(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config`, still saying that the network predicts a variance where our DDIM said so.

    It goes on doing that where another noise is chosen.
    """
    defaults = config.get("_use_default_values", [])
    said = config.get("reverse_variance") in LEARNED and "reverse_variance" not in defaults
    if not said or ("variance_type" in config and "variance_type" not in defaults):
        return config
    kept = {**config, "variance_type": "learned_range"}
    if defaults:
        kept["_use_default_values"] = [k for k in defaults if k != "variance_type"]
    return kept


def _without_solver(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` without the order of another solver.

    A swap gives DDIM, unless a setting that goes with a higher order of ours has travelled along.
    """
    if "solver_type" not in config:  # of DPM-Solver, UniPC, ...
        return config
    higher = (
        config.get("solver_corrector")
        or config.get("solver_form") == "epsilon"
        or config.get("solver_variable") is not None
    ) and "solver_order" not in config.get("_use_default_values", ())
    theirs = ("solver_type", "lower_order_final", *(() if higher else ("solver_order",)))
    return {k: v for k, v in config.items() if k not in theirs}
