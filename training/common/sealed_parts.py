"""Sealed parts of a long computation, in a folder that a later call goes on with."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.ownership import Owner
from ddim_schedulers.pipelines.workdir import Item, Workdir
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.common.seals import pack_sealed, read_sealed
from ddim_schedulers.training.common.storage import to_json

logger = logging.get_logger(__name__)

Tensors = dict[str, torch.Tensor]


class SealedParts(Workdir[Item, Tensors]):
    """Tensors of one computation, each sealed with its settings, and the claim that says them.

    Several processes make them together. A sub-class says where the file of a part is.

    Attributes:
        unit: what the parts belong to, for messages.
        made: how a part is made, for messages.
        names: patterns of the files of parts, those of no other computation: several may use one
            folder.
        newer: settings that earlier versions did not note; what is not noted counts as the same.

    Args:
        work_dir: where they are; all processes must see it.
        settings: everything that they depend on, as JSON types.
        team: the processes.
        owner: of the folder.
    """

    argument = "work_dir"
    holds = "an unfinished calibration"
    remedy = "delete it, or choose another folder"
    unit = "calibration"
    made = "measured"
    names: tuple[str, ...]
    newer: tuple[str, ...] = ()

    def __init__(self, work_dir: Path, settings: dict[str, Any], team: Team, owner: Owner) -> None:
        super().__init__(work_dir)
        self.settings, self.team, self.owner = settings, team, owner

    def claim(self) -> None:
        """Write the settings of the parts into the folder, or refuse parts of another computation.

        Every process calls it, before anything is read or made.

        Raises:
            ValueError: naming what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)  # on each machine
        if self.team.index == 0:
            self._claim()
        self.team.wait()

    def _claim(self) -> None:
        try:
            before = self.kept_settings()
        except DamagedFileError as error:
            # parts that are sealed for the same computation are still used
            logger.warning(f"{error} It is made again, and parts of this {self.unit} are used.")
            before = None
        if before is None or not [*files_of(self.folder, self.names)]:
            write_bytes(self.folder / self.settings_name, to_json(self.settings))
        else:
            unknown = {name: self.settings[name] for name in self.newer}
            self.require_same({**unknown, **before}, self.settings)

    def shared(
        self,
        items: Sequence[Item],
        make: Callable[[Item], Tensors],
        progress: Callable[[str], object] = lambda line: None,
    ) -> list[Tensors]:
        """Return the parts of all items, in order; each process makes a share of the missing ones.

        Every process calls it with the same items.

        Args:
            items: which parts.
            make: computes one; the result must not depend on the process.
            progress: called with a line of text after each part that is made.

        Raises:
            ValueError: a part is not finite, or the processes see different folders.
        """
        todo = self.missing(items)
        self.team.wait()  # nobody writes before all have seen what is missing
        mine = todo[self.team.index :: self.team.count]
        for number, item in enumerate(mine):
            self._make(item, make)
            progress(f"part {number + 1} of {len(mine)}")
        self.team.wait()
        if lacking := [item for item in items if not self.path_of(item).exists()]:
            raise ValueError(
                f"`work_dir` is {str(self.folder)!r}, which lacks {len(lacking)} of {len(items)} "
                "parts; it must be a folder that all processes see"
            )
        found = [self.read(item) for item in items]
        self.team.wait()  # nobody deletes the parts before all have read them
        return found

    def part(self, item: Item, make: Callable[[Item], Tensors]) -> Tensors:
        """Return a part, from its file if there is one that is whole, for this process alone."""
        found = self.load(item)
        return self._make(item, make) if found is None else found

    def _make(self, item: Item, make: Callable[[Item], Tensors]) -> Tensors:
        found = {name: tensor.detach().cpu() for name, tensor in make(item).items()}
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"`unet` gives {name} (part {item}) that are not finite; its predictions must "
                    "stay finite, also where samples are not clipped"
                )
        self.owner.check()
        self.save(item, found)
        return found

    @cached_property
    def _about(self) -> str:
        return json.dumps(self.settings, sort_keys=True)

    def read(self, item: Item) -> Tensors:
        """Return the tensors of a part.

        Raises:
            DamagedFileError: it is not what was written.
        """
        return read_sealed(self.path_of(item), f"{self._about} {item}", unsealed=False)

    def save(self, item: Item, value: Tensors) -> None:
        """Write the tensors of a part."""
        write_bytes(self.path_of(item), pack_sealed(value, f"{self._about} {item}"))

    def tell(self, error: DamagedFileError) -> None:
        """Warn of a damaged part."""
        if self.team.index == 0:
            logger.warning(f"{error} It is {self.made} again.")


def files_of(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Find the files in a folder with names of these patterns."""
    for pattern in patterns:
        yield from folder.glob(pattern)


def discard_parts(work_dir: Path, kind: type[SealedParts[Any]], *others: str) -> None:
    """Delete the parts of what is done, and the folder unless it holds anything else.

    Args:
        work_dir: where they are.
        kind: of the parts.
        others: further files to delete.
    """
    names = (kind.settings_name, *kind.names, *others)
    for path in files_of(work_dir, (*names, *(f".{name}.*.tmp" for name in names))):
        path.unlink(missing_ok=True)
    if work_dir.is_dir() and not any(work_dir.iterdir()):
        work_dir.rmdir()
