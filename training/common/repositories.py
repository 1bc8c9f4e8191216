"""Repositories of the Hub: which revision is meant, and what of them is read.

A name may say which revision is meant, as addresses of the Hub do: USER/NAME@REVISION, a branch, a
tag or a commit. The configs are downloaded first and checked, and then the weights of the
network, as safetensors unless a pickle is asked for. Nothing of a repository is run.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddim_schedulers.export import VAE_NAMES
from ddim_schedulers.network_config import check_complete, check_saved
from ddim_schedulers.reading import read_json

HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>\w[\w./-]*))?")
_CONFIGS = ["model_index.json", "config.json", "scheduler_config.json"]
_CONFIGS += ["unet/config.json", "scheduler/scheduler_config.json", "vqvae/config.json"]
_STEM = "diffusion_pytorch_model"


def divided(name: str) -> tuple[str, str | None]:
    """Return name and revision of NAME@REVISION; the revision of the newest state is None."""
    found = HUB_NAME.fullmatch(name)
    return (found["name"], found["revision"]) if found else (name, None)


def may_be_repository(place: str) -> bool:
    """Return whether `place`, which is not here, can be a name on the Hub.

    `runs/digits` is no repository of a user `runs` where there is a folder `runs`.
    """
    if not HUB_NAME.fullmatch(place):
        return False
    return "/" not in place or not Path(divided(place)[0]).parent.is_dir()


@cache
def tell_of_hub(option: str, place: str) -> None:
    """Print, once and on the main process alone, that a place is not here but may be on the Hub."""
    from ddim_schedulers.pipelines.sampling_job import process_of

    if process_of()[0] == 0:
        print(f"{option} {place!r} is no folder here; it is looked for on the Hub", file=sys.stderr)


def pinned(place: str, revision: str | None, option: str = "--pipeline") -> str:
    """Return `place` with the revision that a flag of its own gives.

    Raises:
        ValueError: it is a folder, or names a revision itself.
    """
    if revision is None:
        return place
    if Path(place).exists() or not HUB_NAME.fullmatch(f"{divided(place)[0]}@{revision}"):
        raise ValueError(
            f"`--revision` is {revision!r}, a branch, tag or commit of a repository; `{option}` "
            f"must then be a name on the Hub, and is {place!r}."
        )
    if divided(place)[1] is not None:
        raise ValueError(
            f"`--revision` is {revision!r}; it must be left out, for `{option}` is {place!r}, "
            "which names one already."
        )
    return f"{place}@{revision}"


@dataclass(frozen=True)
class Saved:
    """A saved pipeline on this machine, whose configs and headers have been checked.

    Attributes:
        folder: where it lies.
        commit: NAME@COMMIT, where it came from the Hub; '' for a folder.
        allow_pickle: whether its weights may be a pickle.
    """

    folder: Path
    commit: str = ""
    allow_pickle: bool = False

    def read(self, network: Any, **where: Any) -> Any:
        """Call `from_pretrained` on the folder: safetensors alone, unless pickles are allowed."""
        from diffusers.utils import is_accelerate_available

        return network.from_pretrained(
            self.folder,
            use_safetensors=None if self.allow_pickle else True,
            low_cpu_mem_usage=is_accelerate_available(),  # without it diffusers asks for it
            **where,
        )

    def finish(self, network: Any, vae: Any = None) -> None:
        """Check a network that was read, and note in its config where it came from.

        Args:
            network: the network.
            vae: the autoencoder of a pipeline of latents.

        Raises:
            ValueError: weights are missing.
        """
        check_complete(network, self.commit or self.folder)
        if vae is not None:
            check_complete(vae, self.commit or self.folder)
        if self.commit:
            network.register_to_config(_name_or_path=self.commit)


def fetch(name: str, option: str = "pipeline", *, allow_pickle: bool = False) -> Saved:
    """Return the folder of a saved pipeline or network, downloaded where `name` is one on the Hub.

    Args:
        name: of a `Place`.
        option: what named it, for messages.
        allow_pickle: read weights from a `.bin` file, by `torch.load(weights_only=True)`, where
            there are none as safetensors.

    Raises:
        ValueError: nothing is there, a file cannot be read or says too much, see
            `network_config.check_saved`, or the weights are a pickle and are not to be.
    """
    folder, commit = Path(name), ""
    if not folder.is_dir():
        folder = _download(name, option, allow_pickle)
        commit = f"{divided(name)[0]}@{folder.name}"
        print(f"{option}: {commit}", file=sys.stderr)
    check_saved(folder)
    places = [place for place in (folder / "unet", folder) if (place / "config.json").is_file()]
    if places and not allow_pickle and not any(places[0].glob("*.safetensors")):
        found = ", ".join(path.name for path in sorted(places[0].glob("*.bin")))
        raise ValueError(
            f"`{option}` is {name!r}, which has no weights as "
            f"safetensors{found and f', but {found}'}; pickles (.bin) are read only where that is "
            f"asked for: `ddim-schedulers export --allow_pickle --pipeline {name} --output FOLDER` "
            "makes a folder with safetensors."
        )
    return Saved(folder, commit, allow_pickle)


def _download(name: str, option: str, allow_pickle: bool) -> Path:
    """Fetch the configs, and the weights of the network once those are known to be in order."""
    from huggingface_hub import snapshot_download

    repository, revision = divided(name)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_CONFIGS))
        check_saved(folder)
        vae = _vae_in(folder)
        if vae is not None:
            snapshot_download(
                repository, revision=folder.name, allow_patterns=[f"{vae}/config.json"]
            )
            check_saved(folder)
        start = "unet/" if (folder / "unet" / "config.json").is_file() else ""
        for kind in (".safetensors", ".bin") if allow_pickle else (".safetensors",):
            files = [f"{start}{_STEM}{part}{kind}" for part in ("", "-?????-of-?????")]
            files.append(f"{start}{_STEM}{kind}.index.json")
            # the commit of the configs, even after another push
            snapshot_download(repository, revision=folder.name, allow_patterns=files)
            if any((folder / start).glob(f"*{kind}")):
                break
        if vae is not None:
            files = [f"{vae}/{_STEM}{part}.safetensors" for part in ("", "-?????-of-?????")]
            snapshot_download(repository, revision=folder.name, allow_patterns=files)
    except OSError as error:
        raise ValueError(
            f"`{option}` is {name!r}, which is no folder here; as a name on the Hub it cannot be "
            f"loaded: {' '.join(str(error).split())}"
        ) from error
    return folder


def _vae_in(folder: Path) -> str | None:
    """Return the component of an autoencoder that the index of a pipeline names, or None."""
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    named = [name for name in VAE_NAMES if index.get(name) not in (None, [None, None])]
    return named[0] if named else None
