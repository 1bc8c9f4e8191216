"""What the operating system refuses, in one sentence."""

import os
import re


def sentence(error: BaseException) -> str | None:
    """Return what the operating system says in `error`, with the file; None for any other error."""
    if isinstance(error, OSError):
        if error.strerror is None:  # a library's own error, not the system's
            return " ".join(str(error).split()) or type(error).__name__
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if _is_name(n)]
        return error.strerror + "".join(f": {name!r}" for name in names[:1])
    # safetensors wraps the error of the system
    number = re.search(r"os error (\d+)", str(error))
    if type(error).__name__ == "SafetensorError" and number is not None:
        return os.strerror(int(number[1]))
    return None


def _is_name(value: object) -> bool:
    return isinstance(value, str | bytes | os.PathLike)
