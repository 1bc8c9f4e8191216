"""Signals that end a process leave through its `finally` blocks, as an exception would."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class _Ended(SystemExit):
    """A signal that ends the process, on its way through the blocks that release folders."""


@contextlib.contextmanager
def signals_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack if they would end the process at once."""
    numbers = [n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n is not None]
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in numbers if signal.getsignal(n) == signal.SIG_DFL]
    else:
        numbers = []
    pid = os.getpid()

    def unwind(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:  # a forked child
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise _Ended(number)

    for number in numbers:
        signal.signal(number, unwind)
    try:
        yield
    except _Ended as ended:
        if not numbers:
            raise
        code = int(str(ended.code))
        signal.signal(code, signal.SIG_DFL)
        signal.raise_signal(code)
        raise
    finally:
        for number in numbers:
            if signal.getsignal(number) is unwind:
                signal.signal(number, signal.SIG_DFL)
