"""How diffusers learns of our classes, and the portable form of a scheduler.

Diffusers never imports a module because a repository names it. After `import ddim_schedulers` a
pipeline with one of our schedulers is saved as `["ddim_schedulers", "<class>"]`, passes the checks
of a download and loads. A *portable* scheduler is a stock class that carries our settings under one
private key, which diffusers keeps in silence: whoever lacks this package loads the stock class, and
`from_config` of ours restores the settings.
"""

import importlib
import inspect
from typing import Any

from .family_config import plain, unsaid_noise
from .reverse_noise import LEARNED
from .settings import SETTINGS_KEY, restore_settings

__all__ = ["SETTINGS_KEY", "STOCK_CLASSES", "register", "restore_settings", "to_portable"]

STOCK_CLASSES = {
    "GeneralizedDDIMInverseScheduler": "DDIMInverseScheduler",
    "GeneralizedDDIMScheduler": "DDIMScheduler",
    "MarkovianDDPMScheduler": "DDPMScheduler",
}

# The named settings that each stock class knows (diffusers 0.42.1). DDIMInverse refuses `linspace`.
STOCK_SPACINGS = {
    "DDIMInverseScheduler": ("leading", "trailing"),
    "DDIMScheduler": ("leading", "trailing", "linspace"),
    "DDPMScheduler": ("leading", "trailing", "linspace"),
}
STOCK_SCHEDULES = {
    "DDIMInverseScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "DDIMScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "DDPMScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
}
# Any other noise is replaced by DDPM's default.
STOCK_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
# The same variance; stock's own `fixed_large_log` is NaN in the first step.
SAME_VARIANCE = {"fixed_large_log": "fixed_large"}

# Settings that no stock class has, with the values that change nothing.
NEUTRAL = {
    "eta": (None, 0.0),
    "eta_interval": (None,),
    "eps_scale": (None, 1, [1, 1]),
    "end_scale": (None, 1),
    "sigma": (None,),
    "timesteps": (None,),
    "original_inference_steps": (None,),
    "reverse_variance": (None, "sigma"),
    "solver_calibrated": (None, False),
    "solver_order": (None, 1),
}


def register() -> None:
    """Tell diffusers to save and load our classes as `["ddim_schedulers", name]`.

    Raises:
        ImportError: if this diffusers keeps its table of loadable classes elsewhere.
    """
    import diffusers

    module = "diffusers.pipelines.pipeline_loading_utils"
    try:
        tables = importlib.import_module(module)
        loadable, importable = tables.LOADABLE_CLASSES, tables.ALL_IMPORTABLE_CLASSES
    except (ImportError, AttributeError) as error:
        if isinstance(error, ImportError) and getattr(error, "name", None) != module:
            raise  # a package that diffusers needs is missing
        raise ImportError(
            f"diffusers {diffusers.__version__} has no LOADABLE_CLASSES in "
            "diffusers.pipelines.pipeline_loading_utils, so ddim_schedulers cannot register its "
            "schedulers; please report this with your version."
        ) from error
    methods = {name: ["save_pretrained", "from_pretrained"] for name in STOCK_CLASSES}
    loadable["ddim_schedulers"] = methods
    importable.update(methods)


def to_portable(scheduler: Any) -> tuple[Any, list[str]]:
    """Return the stock scheduler that takes the place of ours, with our settings in its config.

    Args:
        scheduler: one of our three schedulers.

    Returns:
        The stock scheduler, and one sentence for each setting that the stock class cannot express,
        so that it samples differently without this package.

    Raises:
        ValueError: if `scheduler` is not ours, or predicts `posterior_mean`, which no stock class
            can use.
    """
    import diffusers

    name = type(scheduler).__name__
    if name not in STOCK_CLASSES:
        raise ValueError(f"`scheduler` is a {name}; it must be one of {sorted(STOCK_CLASSES)}.")
    stock = getattr(diffusers, STOCK_CLASSES[name])
    config = {k: plain(v) for k, v in scheduler.config.items() if not k.startswith("_")}
    if config["prediction_type"] == "posterior_mean":
        raise ValueError(
            "`prediction_type` is 'posterior_mean', with which a stock scheduler would sample "
            "noise; a portable export must have 'epsilon', 'sample' or 'v_prediction'. Export it "
            "as 'plug-in' or 'self-contained'."
        )
    stand_ins = _stand_ins(stock.__name__, scheduler, config)
    stock_keys = inspect.signature(stock.__init__).parameters
    unsaid = unsaid_noise(scheduler.config)
    settings = {
        k: v for k, v in config.items() if k not in (*stock_keys, *unsaid) or k in stand_ins
    }
    kept = {k: v for k, v in config.items() if k in stock_keys}
    portable = stock(**{**kept, **stand_ins})
    private = {"class": name, "settings": settings, "stand_ins": stand_ins}
    portable.register_to_config(**{SETTINGS_KEY: private})
    return portable, _what_is_lost(stock.__name__, scheduler, config, stand_ins)


def _stand_ins(stock: str, scheduler: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return the nearest stock value of each setting that stock knows, but not with our value."""
    stand_ins: dict[str, Any] = {}
    if config["timestep_spacing"] not in STOCK_SPACINGS[stock]:
        stand_ins["timestep_spacing"] = "leading"
    shifted = config["snr_shift_scale"] != 1
    unknown = config["beta_schedule"] not in STOCK_SCHEDULES[stock]
    if shifted or (unknown and config["trained_betas"] is None):
        # a list of the betas always works
        stand_ins["trained_betas"] = scheduler.betas.tolist()
    if stock == "DDPMScheduler" and config["variance_type"] not in STOCK_VARIANCE_TYPES:
        name = config["variance_type"]
        stand_ins["variance_type"] = SAME_VARIANCE.get(name, "fixed_small")
    return stand_ins


def _what_is_lost(
    stock: str, scheduler: Any, config: dict[str, Any], stand_ins: dict[str, Any]
) -> list[str]:
    notes = []
    spacing = config["timestep_spacing"]
    if "timestep_spacing" in stand_ins:
        notes.append(
            f"{stock} has no timestep_spacing={spacing!r}; without ddim_schedulers it uses "
            f"{stand_ins['timestep_spacing']!r}."
        )
    elif spacing != "leading" and stock != "DDPMScheduler":
        notes.append(
            f"{stock} steps from a {spacing!r} timestep t to t - T // n, not to the next planned "
            "timestep as ddim_schedulers does; its samples differ a little."
        )
    if "variance_type" in stand_ins and config["variance_type"] not in SAME_VARIANCE:
        notes.append(
            f"{stock} has no variance_type={config['variance_type']!r}; without ddim_schedulers "
            f"it uses {stand_ins['variance_type']!r}."
        )
    for key, values in NEUTRAL.items():
        value = config.get(key)
        if value in values:
            continue
        without = f"without ddim_schedulers {key}={_short(value)} has no effect"
        note = f"{stock} has no `{key}`; {without}."
        if key == "eta":
            note += f" Pass `eta={value!r}` to the pipeline where its call takes it."
        elif key == "reverse_variance" and value in LEARNED:
            note = (
                f"{stock} cannot use a network that predicts its variance (reverse_variance="
                f"{value!r}, 2 C output channels); without ddim_schedulers it fails."
            )
        notes.append(note)
    return notes


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 6:
        return f"[{value[0]!r}, ..., {value[-1]!r}] ({len(value)} values)"
    return repr(value)
