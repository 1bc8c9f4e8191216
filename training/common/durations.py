"""Durations in words."""


def duration(seconds: float) -> str:
    """Return a duration in the largest unit of which there are two or more."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
