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

SETTINGS_KEY = "_ddim_schedulers"

STOCK_CLASSES = {
    "GeneralizedDDIMInverseScheduler": "DDIMInverseScheduler",
    "GeneralizedDDIMScheduler": "DDIMScheduler",
    "MarkovianDDPMScheduler": "DDPMScheduler",
}


def register() -> None:
    """Tell diffusers that the classes of this package can be saved and loaded by
    `["ddim_schedulers", name]`.

    Raises:
        ImportError: if this diffusers keeps its table of loadable classes elsewhere.
    """
    try:
        tables = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
        loadable, importable = tables.LOADABLE_CLASSES, tables.ALL_IMPORTABLE_CLASSES
    except (ImportError, AttributeError) as error:
        import diffusers

        raise ImportError(
            f"diffusers {diffusers.__version__} has no LOADABLE_CLASSES in "
            "diffusers.pipelines.pipeline_loading_utils, so ddim_schedulers cannot register its "
            "schedulers; "
            "please report this with your version."
        ) from error
    methods = {name: ["save_pretrained", "from_pretrained"] for name in STOCK_CLASSES}
    loadable["ddim_schedulers"] = methods
    importable.update(methods)


def to_portable(scheduler: Any) -> tuple[Any, list[str]]:
    """Return the stock scheduler that stands in for ours, carrying our settings in its config.

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
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    if config["prediction_type"] == "posterior_mean":
        raise ValueError(
            "`prediction_type` is 'posterior_mean', which no stock scheduler understands; a "
            "portable export "
            "would sample noise. Train with 'epsilon', 'sample' or 'v_prediction' to share it that "
            "way."
        )
    stand_ins = _stand_ins(name, config)
    stock_keys = inspect.signature(stock.__init__).parameters
    settings = {k: v for k, v in config.items() if k not in stock_keys or k in stand_ins}
    kept = {k: v for k, v in config.items() if k in stock_keys}
    portable = stock(**{**kept, **stand_ins})
    private = {"class": name, "settings": settings, "stand_ins": stand_ins}
    portable.register_to_config(**{SETTINGS_KEY: private})
    return portable, _what_is_lost(name, config, stand_ins, stock.__name__)


def restore_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the settings of a portable export put back; other configs are returned
    as they are.

    A value that stands in for one of ours is replaced only where nobody changed it since.
    """
    private = config.get(SETTINGS_KEY)
    if private is None:
        return config
    if not isinstance(private, dict) or not isinstance(private.get("settings"), dict):
        raise ValueError(
            f"`{SETTINGS_KEY}` in the config is not a record of this package: {private!r}."
        )
    restored = {k: v for k, v in config.items() if k != SETTINGS_KEY}
    stand_ins = private.get("stand_ins", {})
    for key, value in private["settings"].items():
        if key in stand_ins and restored.get(key) != stand_ins[key]:
            continue
        restored[key] = value
    return restored


def _stand_ins(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the nearest stock value of each setting whose key stock has, but whose value it
    lacks.
    """
    stand_ins: dict[str, Any] = {}
    stock_spacings = {"leading", "trailing", "linspace"}
    if name == "GeneralizedDDIMInverseScheduler":
        stock_spacings = {"leading", "trailing"}
    if config["timestep_spacing"] not in stock_spacings:
        stand_ins["timestep_spacing"] = "leading"
    if config["trained_betas"] is None:
        import diffusers

        stock_schedules = {"linear", "scaled_linear", "squaredcos_cap_v2"}
        if STOCK_CLASSES[name] == "DDPMScheduler":
            stock_schedules |= {"sigmoid", "laplace"}
        if config["beta_schedule"] not in stock_schedules:
            # the betas themselves can always be said in numbers
            ours = getattr(importlib.import_module("ddim_schedulers"), name)
            del diffusers
            betas = ours(
                **{
                    k: v
                    for k, v in config.items()
                    if k in inspect.signature(ours.__init__).parameters
                }
            )
            stand_ins["trained_betas"] = betas.betas.tolist()
    return stand_ins


def _what_is_lost(
    name: str, config: dict[str, Any], stand_ins: dict[str, Any], stock: str
) -> list[str]:
    notes = []
    if "timestep_spacing" in stand_ins:
        notes.append(
            f"{stock} has no timestep_spacing={config['timestep_spacing']!r}; without "
            f"ddim_schedulers it uses "
            f"{stand_ins['timestep_spacing']!r}."
        )
    neutral = {
        "eta": (None, 0.0),
        "sigma": (None,),
        "timesteps": (None,),
        "reverse_variance": (None, "sigma"),
    }
    for key, values in neutral.items():
        if config.get(key) not in values:
            notes.append(
                f"{stock} has no `{key}`; without ddim_schedulers {key}={config[key]!r} has no "
                f"effect."
            )
    return notes
