"""The scale of latents, as the config of an autoencoder of diffusers tells it."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from .settings import SETTINGS_KEY


def scale_in(config: Mapping[str, Any], name: str = "vae") -> tuple[float, float]:
    """Return scale and shift in the config of an autoencoder: x_0 = (z - shift) * scale.

    They are `scaling_factor` and `shift_factor`; a class that has no `shift_factor` keeps it under
    the private key of this package.

    Raises:
        ValueError: for a scale that is not a finite number above 0, or a shift that is not finite.
    """
    private = config.get(SETTINGS_KEY)
    own = private if isinstance(private, Mapping) else {}
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    scale = 1.0 if scale is None else scale
    shift = own.get("shift_factor", 0.0) if shift is None else shift
    for key, value, allowed in (
        ("scaling_factor", scale, "a finite number above 0"),
        ("shift_factor", shift, "a finite number"),
    ):
        fits = type(value) in (int, float) and math.isfinite(value)
        if not fits or (key == "scaling_factor" and value <= 0):
            raise ValueError(
                f"`{name}.config.{key}` is {reprlib.repr(value)}; it must be {allowed}."
            )
    return float(scale), float(shift)
