"""Sealed parts of a long computation, in a folder that a later call goes on with."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.workdir import Item, Workdir
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.common.seals import pack_sealed, read_sealed
from ddim_schedulers.training.common.storage import to_json

logger = logging.get_logger(__name__)


class SealedParts(Workdir[Item, dict[str, torch.Tensor]]):
    """Tensors of one computation, each sealed with its settings, and the claim that says them.

    A sub-class says where the file of a part is.

    Attributes:
        unit: what the parts belong to, for messages.
        made: how a part is made, for messages.

    Args:
        work_dir: where they are.
        settings: everything that they depend on, as JSON types.
        tells: whether this process tells of damage.
    """

    argument = "work_dir"
    holds = "an unfinished calibration"
    remedy = "delete it, or choose another folder"
    unit = "run"
    made = "computed"

    def __init__(self, work_dir: Path, settings: dict[str, Any], *, tells: bool = True) -> None:
        super().__init__(work_dir)
        self.settings, self.tells = settings, tells

    def claim(self) -> None:
        """Note what the parts in the folder are of, or refuse those of another computation.

        Raises:
            ValueError: naming what differs.
        """
        try:
            before = self.kept_settings()
        except DamagedFileError as error:
            # the parts that were sealed for this very computation are still recognised
            logger.warning(f"{error} It is made again, and parts of this {self.unit} are used.")
            before = None
        if before is None:
            write_bytes(self.folder / self.settings_name, to_json(self.settings))
        else:
            self.require_same(before, self.settings)

    @cached_property
    def _about(self) -> str:
        return json.dumps(self.settings, sort_keys=True)

    def read(self, item: Item) -> dict[str, torch.Tensor]:
        """Return the tensors of a part.

        Raises:
            DamagedFileError: it is not what was written.
        """
        return read_sealed(self.path_of(item), f"{self._about} {item}", unsealed=False)

    def save(self, item: Item, value: dict[str, torch.Tensor]) -> None:
        """Write the tensors of a part."""
        write_bytes(self.path_of(item), pack_sealed(value, f"{self._about} {item}"))

    def tell(self, error: DamagedFileError) -> None:
        """Warn of a damaged part."""
        if self.tells:
            logger.warning(f"{error} It is {self.made} again.")


def discard_parts(work_dir: Path, claim: str, *others: str) -> None:
    """Delete the parts of what is done, and the folder unless it holds anything else.

    Args:
        work_dir: where they are.
        claim: the file with their settings.
        others: further files to delete.
    """
    for pattern in (claim, *others, "part-*.safetensors", ".part-*.tmp", f".{claim}.*.tmp"):
        for path in work_dir.glob(pattern):
            path.unlink(missing_ok=True)
    if work_dir.is_dir() and not any(work_dir.iterdir()):
        work_dir.rmdir()
