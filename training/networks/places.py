"""Where a pipeline is: a saved one, one of a run, a checkpoint, or a name on the Hub."""

from dataclasses import dataclass
from pathlib import Path

INDEX = "model_index.json"
# Small trained pipelines that come with the package, by the name that stands for them where no
# folder of that name is.
SHIPPED = {"digits": Path(__file__).resolve().parent.parent / "examples" / "digits"}
STATE = "state.json"
WEIGHTS = ("averaged", "raw")


@dataclass(frozen=True)
class Place:
    """What was found where the user pointed.

    Attributes:
        name: a pipeline's folder or its name on the Hub, perhaps with @REVISION; '' for a
            checkpoint.
        checkpoint: a checkpoint's folder, or None.
    """

    name: str
    checkpoint: Path | None = None


def find(
    place: str, option: str = "pipeline", weights: str = "averaged", *, on_hub: bool = True
) -> Place:
    """Look for a pipeline without asking the Hub.

    `digits` is the trained pipeline that comes with the package, unless there is a folder so named.
    Of a run the pipeline is taken; where there is none, or a checkpoint is younger, the newest
    checkpoint.

    Args:
        place: a folder of a pipeline, a run or a checkpoint, or a name on the Hub.
        option: what named it, for messages.
        weights: `raw` takes the checkpoint of a run, whose pipeline has the averaged ones.
        on_hub: whether it may be a name on the Hub.

    Raises:
        ValueError: nothing is there, and it is no name on the Hub; or a folder that holds neither.
    """
    from ddim_schedulers.training.common.repositories import may_be_repository, tell_of_hub

    folder = Path(place)
    if folder.is_file():
        raise ValueError(f"`{option}` is {place!r}, a file; it must be a pipeline's folder.")
    if not folder.is_dir():
        if place in SHIPPED:
            return Place(str(SHIPPED[place]))
        if not on_hub:
            raise ValueError(
                f"`{option}` is {place!r}, which does not exist; it must be a pipeline's folder."
            )
        if not may_be_repository(place):
            raise ValueError(
                f"`{option}` is {place!r}, which does not exist; it must be a pipeline's folder, a "
                "run's or a checkpoint's, or a name on the Hub such as google/ddpm-cifar10-32, "
                "with @REVISION for one state of it."
            )
        tell_of_hub(option, place)
        return Place(place)
    if (folder / INDEX).exists():
        return Place(place)
    if (folder / STATE).is_file():
        return Place("", folder)
    return _of_run(folder, option, weights)


def _of_run(folder: Path, option: str, weights: str) -> Place:
    from ddim_schedulers.training.networks.checkpoints import CheckpointError, newest_whole

    made = folder / "pipeline" / INDEX
    try:
        newest = newest_whole(folder / "checkpoints")
    except CheckpointError as error:
        if not made.is_file():
            raise ValueError(
                f"`{option}` is {str(folder)!r}; it must have a checkpoint that is whole: {error}"
            ) from error
        newest = None
    if made.is_file() and not (newest is not None and (weights == "raw" or _younger(newest, made))):
        return Place(str(made.parent))
    if newest is None:
        raise ValueError(
            f"`{option}` is {str(folder)!r}, which is not a saved pipeline: it has no {INDEX}, and "
            "no checkpoint of a run; it must have one."
        )
    return Place("", newest)


def _younger(checkpoint: Path, pipeline: Path) -> bool:
    """Return whether a run that had made its pipeline went on after it."""
    return (checkpoint / STATE).stat().st_mtime > pipeline.stat().st_mtime


def pipeline_folder(place: str, option: str = "pipeline", *, on_hub: bool = True) -> str:
    """Return the folder or Hub name of a saved pipeline; that of a run is its pipeline.

    Raises:
        ValueError: as `find`, or a checkpoint, of which a pipeline is to be made first.
    """
    found = find(place, option, on_hub=on_hub)
    if found.checkpoint is not None:
        raise ValueError(
            f"`{option}` is {place!r}, a checkpoint or a run without a pipeline; make one with "
            f"`ddim-schedulers export --pipeline {place} --output FOLDER`."
        )
    return found.name
