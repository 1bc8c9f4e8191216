"""Tables and plans are made outside the modes of torch, because they outlive them."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def outside_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside `FakeTensorMode`, `torch.export`, `make_fx` and the like.

    Tables and plans depend on nothing that these trace. Made inside, they would be tensors without
    numbers, which the scheduler keeps, or a part of the traced program. `torch.compile` takes care
    of what its code makes.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapped
