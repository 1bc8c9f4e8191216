"""How the processes that were started together come to know of each other."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ddim_schedulers.pipelines.sampling_job import process_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def from_main(accelerator: "Accelerator", make: Callable[[], Result]) -> Result:
    """What `make` returns on the main process, on all; so is a `ValueError` or `OSError` of it."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except (ValueError, OSError) as error:
            found[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    result: Result = found[0]
    return result


def on_cpu(cpu: bool) -> bool:
    """Tell Accelerate to use the CPU: because it was asked for, or because there is nothing else.

    Without an accelerator it joins processes only if it is told so; otherwise each believes to be
    alone, and all do the whole work over each other's files.
    """
    return cpu or not torch.accelerator.is_available()


def check_joined(count: int) -> None:
    """Refuse processes that were started together and that Accelerate has not joined.

    Args:
        count: processes that Accelerate knows of.

    Raises:
        ValueError: if there is one, and more were started.
    """
    _, started = process_of()
    if count == 1 < started:
        raise ValueError(
            f"WORLD_SIZE is {started}, but Accelerate sees one process on this kind of device; "
            "start one, or use --cpu"
        )
