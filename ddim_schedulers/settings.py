"""The private key in which a stock scheduler carries our settings, and how it is read back.

Kept apart from `plugin`, so that the self-contained export needs nothing that knows this package by
name.
"""

from typing import Any

SETTINGS_KEY = "_ddim_schedulers"


def restore_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the settings of a portable export put back; any other as it is.

    A stock value in the place of one of ours is replaced only where nobody changed it since. The
    values are checked by the constructor, like those of any config.

    Raises:
        ValueError: if the private key holds something that this package does not write.
    """
    private = config.get(SETTINGS_KEY)
    if private is None:
        return config
    settings = private.get("settings") if isinstance(private, dict) else None
    stand_ins = private.get("stand_ins", {}) if isinstance(private, dict) else None
    if not isinstance(settings, dict) or not isinstance(stand_ins, dict):
        raise ValueError(
            f"`{SETTINGS_KEY}` in the config is {str(private)[:80]}; it must hold the dictionaries "
            "`settings` and `stand_ins`."
        )
    restored = {k: v for k, v in config.items() if k != SETTINGS_KEY}
    for key, value in settings.items():
        if key in stand_ins and restored.get(key) != stand_ins[key]:
            continue
        restored[key] = value
    return restored
