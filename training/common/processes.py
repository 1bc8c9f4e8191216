"""The processes that were started together: what they share, and the folder they own."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ddim_schedulers.pipelines.ownership import Owner, OwnershipError, follow, own
from ddim_schedulers.pipelines.sampling_job import process_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def from_main(accelerator: "Accelerator", make: Callable[[], Result]) -> Result:
    """Return on all processes what `make` returns, or raises, on the main one.

    A `ValueError` or an `OSError` of `make` is raised on all processes.
    """
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

    Without an accelerator it joins processes only if it is told so; otherwise each works as if
    alone, and all write the same files.
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
            f"`WORLD_SIZE` is {started}, but Accelerate sees one process on this kind of device; "
            "start one, or use --cpu"
        )


class Team:
    """The processes that share a piece of work; this one alone, unless a sub-class says more."""

    index = 0
    count = 1

    def wait(self) -> None:
        """Return when every process is here."""

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the lists of all processes in one, on every process."""
        return values


class AccelerateTeam(Team):
    """The processes of `torchrun` or `accelerate launch`."""

    def __init__(self, cpu: bool = False) -> None:
        from accelerate import PartialState

        self.state = PartialState(cpu=on_cpu(cpu))
        check_joined(self.state.num_processes)
        self.index = self.state.process_index
        self.count = self.state.num_processes

    def wait(self) -> None:
        """Return when every process is here."""
        self.state.wait_for_everyone()

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the lists of all processes in one, on every process."""
        from accelerate.utils import gather_object

        return list(gather_object(values)) if self.count > 1 else values


@contextlib.contextmanager
def own_together(
    folder: Path,
    verb: str,
    team: Team | None = None,
    *,
    parts: frozenset[str] | None = None,
    transient: bool = False,
) -> Iterator[Owner]:
    """Own a folder inside the `with`, for all processes of a team; the main one holds it.

    Args:
        folder: as in `ownership.own`.
        verb: as there.
        team: the processes; None for this one alone.
        parts: as there.
        transient: as there.

    Raises:
        FolderInUseError: on every process.
        OSError: on every process, where nothing can be written to the folder.
    """
    team = Team() if team is None else team
    with contextlib.ExitStack() as stack:
        # what the main process got: token and record, or its error
        said: Any = None
        if team.index == 0:
            try:
                owner = stack.enter_context(own(folder, verb, parts=parts, transient=transient))
                record = owner.record
                said = (str(owner.folder), owner.token, None if record is None else record.name)
            except (OwnershipError, OSError) as error:
                said = error
        if team.count > 1:
            said = team.gather([said])[0]
        if isinstance(said, Exception):
            raise said
        if team.index > 0:
            owner = stack.enter_context(follow(folder, said))
        yield owner


def settle() -> None:
    """Let gloo put its last operation away: call it before a network in DDP or the process ends.

    A thread of gloo needs Python's lock to free the tensors of an operation that is done. Where
    Python gives up the network before that, it holds the lock and waits for the thread: neither
    ends (seen with torch 2.13). Where Python itself ends before that, the process is aborted
    ("terminate called without an active exception"). Sleeping hands over the lock.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.1)


def leave_group() -> None:
    """Leave the group of processes; no message follows."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        settle()
        torch.distributed.destroy_process_group()
