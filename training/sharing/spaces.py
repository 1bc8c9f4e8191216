"""Sharing a Space that `ddim-schedulers app --export_space` wrote, as `hub` shares a pipeline."""

import os
from pathlib import Path
from typing import Any

from ddim_schedulers.export import Export
from ddim_schedulers.pipelines.ownership import own
from ddim_schedulers.training.sharing import hub

CARD, REQUIREMENTS = "README.md", "requirements.txt"


def push_space(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload Space",
    endpoint: str | None = None,
    attempts: int = hub.ATTEMPTS,
) -> str:
    """Create or update a Gradio Space from a folder, in one commit.

    Hidden files stay here. Pushing again with the same content makes no new commit.

    Args:
        folder: what `ddim-schedulers app --export_space` wrote; it may have been edited.
        repo_id: `USER/NAME`.
        private: as in `hub.push_pipeline`, and so are the five below.
        revision: branch.
        token: of the Hub.
        message: the commit's first line.
        endpoint: URL of the Hub.
        attempts: how often a step is tried, >= 1.

    Returns:
        The URL of the commit.

    Raises:
        FolderInUseError: another process writes to the folder.
        ValueError: for an argument out of its range, or a folder that is no Gradio Space.
        PushError: if the Hub cannot be reached or refuses.
    """
    settings = hub.PushSettings(repo_id, private, revision, token, message, endpoint, attempts)
    if not Path(folder).is_dir():  # raises, and names the fault
        space_files(folder)
    with own(folder, "push", read_only=True):
        return hub.send(space_files(folder), hub.SPACE, settings)


def space_files(folder: str | os.PathLike[str]) -> Export:
    """Return the files of a Space; reads its card.

    Raises:
        ValueError: for a folder that is no Gradio Space, or that holds a link.
    """
    root = Path(folder)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            raise ValueError(f"{path} is a link; replace it by what it points to, or remove it.")
        if not path.is_file() or name.startswith(".owner"):
            continue
        if any(part.startswith(".") or part == "__pycache__" for part in name.split("/")):
            left_out.append(name)
        else:
            files[name] = path
    for name in (CARD, REQUIREMENTS, hub.SPACE.mark):
        if name not in files:
            raise ValueError(
                f"`--space` is {os.fspath(folder)!r}, which has no {name}; it must be a folder "
                "that `ddim-schedulers app --export_space` wrote."
            )
    card = _metadata(root / CARD)
    if card.get("sdk") != "gradio":
        raise ValueError(f"{root / CARD}: `sdk` is {card.get('sdk')!r}; it must be gradio.")
    if (app := card.get("app_file")) not in files:
        raise ValueError(f"{root / CARD}: `app_file` is {app!r}; it must be a file of the Space.")
    return Export(files, left_out=left_out)


def _metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        found: dict[str, Any] | None = metadata_load(card)
    except Exception as error:  # of YAML, and of the encoding
        reason = " ".join(str(error).split())
        raise ValueError(f"{card} must begin with metadata in YAML: {reason}") from error
    return found or {}
