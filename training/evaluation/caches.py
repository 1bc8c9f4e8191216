"""What an evaluation keeps of the real images: their features, and the classifier of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.workdir import Workdir
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.common.seals import pack_sealed, read_sealed
from ddim_schedulers.training.metrics.classifier import classifier_facts


class FeatureFiles(Workdir[str, dict[str, torch.Tensor]]):
    """Features of real images, in files named by the fingerprint of all that they depend on.

    Args:
        folder: of the cache.
        rows: how many images each part has.
        say: called with a line of text about a damaged file.
    """

    def __init__(self, folder: Path, rows: dict[str, int], say: Callable[[str], None]) -> None:
        super().__init__(folder)
        self.rows, self.say = rows, say

    def path_of(self, item: str) -> Path:
        """Return where the features of a fingerprint are, or will be."""
        return self.folder / f"reference-{item[:16]}.safetensors"

    def read(self, item: str) -> dict[str, torch.Tensor]:
        """Return the features of each part, (rows, F).

        Raises:
            DamagedFileError: they are not whole, or of other images.
        """
        path = self.path_of(item)
        kept = read_sealed(path, item, unsealed=True)
        found = {part: len(value) if value.ndim == 2 else -1 for part, value in kept.items()}
        if found != self.rows or len({value.shape[1] for value in kept.values()}) != 1:
            raise DamagedFileError(path, f"it does not hold features of {self.rows} images")
        return kept

    def save(self, item: str, value: dict[str, torch.Tensor]) -> None:
        """Write the features of each part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path_of(item), pack_sealed(value, item))

    def tell(self, error: DamagedFileError) -> None:
        """Say that a file is damaged."""
        self.say(f"{error} It is made again.")


class ClassifierFile(Workdir[str, dict[str, Any]]):
    """The classifier that an evaluation trains for itself, and the facts of how.

    Args:
        folder: of the evaluation.
        say: called with a line of text about a damaged file.
    """

    argument = "output_dir"
    holds = "a classifier"
    remedy = (
        "delete it, and the cells are measured again with another, or write `classifier` to use it"
    )

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__(folder)
        self.say = say

    def path_of(self, item: str) -> Path:
        """Return where the classifier is, or will be."""
        return self.folder / f"{item}.safetensors"

    def read(self, item: str) -> dict[str, Any]:
        """Return what is known of the classifier's training.

        Raises:
            DamagedFileError: it is not whole.
        """
        return classifier_facts(self.path_of(item))

    def is_there(self, item: str, wanted: dict[str, Any]) -> bool:
        """Return whether the classifier is whole; if not, it is trained again.

        Raises:
            ValueError: it was trained in another way than is wanted.
        """
        facts = self.load(item)
        if facts is None:
            return False
        found = {**facts, "images": facts["train_n"] + facts["held_out_n"]}
        self.require_same({name: found[name] for name in wanted}, wanted)
        return True

    def tell(self, error: DamagedFileError) -> None:
        """Say that the file is damaged."""
        self.say(f"{error} It is trained again.")
