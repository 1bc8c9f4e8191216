"""What a checkpoint must hold so that a run can continue from it, even if its manifest is right."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddim_schedulers.reading import DamagedFileError, read_json, safetensors_shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
SAMPLER = "sampler.safetensors"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
LAST_STEP = 2**53
NAME = re.compile(r"step-(\d+)")


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of the run in a checkpoint.

    Raises:
        DamagedFileError: it says something that no run can have written.
    """
    path = folder / STATE
    state: dict[str, Any] = read_json(path)

    def require(holds: bool, name: str, value: Any, allowed: str) -> None:
        if not holds:
            raise DamagedFileError(path, f"{name} is {str(value)[:80]!r}; it must be {allowed}")

    step: Any = state.get("step")
    require(_is_count(step, LAST_STEP), "step", step, "an integer >= 0")
    named = NAME.fullmatch(folder.name)
    require(named is None or int(named[1]) == step, "step", step, "that of the folder's name")
    for name in ("config", "data", "ema", "best"):
        require(isinstance(state.get(name), dict), name, state.get(name), "an object")
    for name in ("contents", "versions"):  # which the first versions did not write
        require(isinstance(state.get(name, {}), dict), name, state.get(name), "an object")
    if (vae := state.get("contents", {}).get("vae")) is not None:
        fits = isinstance(vae, dict) and _is_number(vae.get("scale")) and vae["scale"] > 0
        require(fits and _is_number(vae.get("shift")), "contents.vae", vae, "a scale and a shift")
    for name in ("validate_every", "validation_images"):
        value = state["config"].get(name, 0)
        require(value is None or _is_count(value), f"config.{name}", value, "an integer >= 0")
    place = state.get("place", [0, 0])
    pair = isinstance(place, list) and len(place) == 2 and all(_is_count(p) for p in place)
    require(pair, "place", place, "two integers >= 0")
    if state["ema"] or state["config"].get("use_ema") is True:
        clock = state["ema"].get("optimization_step")
        require(_is_count(clock, step), "optimization_step", clock, "an integer, 0 .. step")
    if best := state["best"]:
        require(_is_count(best.get("step"), step), "best.step", best.get("step"), "0 .. step")
        require(_is_number(best.get("value")), "best.value", best.get("value"), "a number")
        for name in ("figure", "weights"):
            require(isinstance(best.get(name), str), f"best.{name}", best.get(name), "a name")
    if (scaler := state.get("scaler")) is not None and scaler != {}:
        parts = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        fits = isinstance(scaler, dict) and all(_is_number(scaler.get(name)) for name in parts)
        require(fits, "scaler", scaler, f"an object of the numbers {', '.join(parts)}")
        require(scaler["scale"] > 0, "scaler.scale", scaler["scale"], "above 0")
    return state


def lacks(folder: Path, listed: Iterable[str]) -> str | None:
    """Return what a run needs and the checkpoint lacks or holds wrongly; None if nothing.

    Args:
        folder: the checkpoint, whose files are those that its manifest says.
        listed: names of these files.
    """
    names = set(listed)
    try:
        if STATE not in names:
            return f"it does not list {STATE}"
        state = read_state(folder)
        if missing := [name for name in _needed(state) if name not in names]:
            return f"it does not list {missing[0]}"
        read_json(folder / "unet" / "config.json")
        shapes = safetensors_shapes(folder / "unet" / WEIGHTS)
        if not shapes:
            return f"unet/{WEIGHTS} holds no weights"
        if state["ema"] and safetensors_shapes(folder / "unet_ema" / WEIGHTS) != shapes:
            return f"unet_ema/{WEIGHTS} holds other tensors than unet/{WEIGHTS}"
        return _wrong_moments(safetensors_shapes(folder / OPTIMIZER), shapes, state)
    except DamagedFileError as error:
        return f"{error.path.name}: {error.reason}"


def _needed(state: Mapping[str, Any]) -> list[str]:
    names = ["unet/config.json", f"unet/{WEIGHTS}", OPTIMIZER]
    if state["ema"]:
        names += ["unet_ema/config.json", f"unet_ema/{WEIGHTS}"]
    if state["config"].get("timestep_sampling") == "loss_aware":
        names.append(SAMPLER)
    return names


def _wrong_moments(
    moments: Mapping[str, tuple[str, tuple[int, ...]]],
    weights: Mapping[str, tuple[str, tuple[int, ...]]],
    state: Mapping[str, Any],
) -> str | None:
    """Say what is wrong with AdamW's moments, None if nothing."""
    # there are no moments if a gradient scaler has skipped every step so far
    if not moments and state["step"] > 0 and not state.get("scaler"):
        return f"{OPTIMIZER} holds no moments"
    known = {shape for _, shape in weights.values()}
    parts: dict[str, set[str]] = {}
    for name, (_, shape) in moments.items():
        index, _, part = name.partition(".")
        if not re.fullmatch(r"\d{1,6}", index) or int(index) >= len(weights):
            return f"{OPTIMIZER} holds {name[:80]!r}, which is of no parameter"
        if part != "step" and shape not in known:
            return f"{OPTIMIZER} holds {name[:80]!r} of a shape that no weight has"
        parts.setdefault(index, set()).add(part)
    for index, found in parts.items():
        if found != set(MOMENTS):
            return f"{OPTIMIZER} holds {sorted(found)} of parameter {index}, not {sorted(MOMENTS)}"
    return None


def _is_count(value: Any, most: int = LAST_STEP) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
