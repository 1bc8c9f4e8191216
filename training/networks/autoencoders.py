"""Reading an autoencoder that is to stay as it is: from a folder or the Hub, checked, frozen."""

from pathlib import Path
from typing import Any

from ddim_schedulers.network_config import check_autoencoder_config, check_complete
from ddim_schedulers.pipelines.codec import (
    AUTOENCODERS,
    check_autoencoder,
    check_finite_weights,
)
from ddim_schedulers.reading import DamagedFileError, read_json, safetensors_shapes
from ddim_schedulers.training.common.repositories import (
    divided,
    may_be_repository,
    tell_of_hub,
)

CONFIG = "config.json"
# Where an autoencoder lies in a pipeline's folder.
_PARTS = ("", "vae", "vqvae")
_WEIGHTS = "diffusion_pytorch_model"


def load_vae(place: str, revision: str | None = None, option: str = "vae") -> Any:  # noqa: ANN401
    """Return a frozen autoencoder in float32, in evaluation mode.

    Args:
        place: a folder of an autoencoder, or of a pipeline that has one; or a name on the Hub,
            perhaps with @REVISION.
        revision: branch, tag or commit of a name on the Hub.
        option: what named it, for messages.

    Raises:
        ValueError: nothing there, no config, another class, no safetensors, a file that cannot be
            read, weights that are missing (a decoder alone) or not finite.
    """
    folder, commit = _folder(place, revision, option)
    part = next((p for p in _PARTS if (folder / p / CONFIG).is_file()), None)
    if part is None or ((folder / "model_index.json").is_file() and part == ""):
        raise ValueError(
            f"`{option}` is {place!r}, which has no {CONFIG} of an autoencoder; it must have one, "
            "in itself or in its folder vae or vqvae."
        )
    folder = folder / part
    try:
        vae = _read(folder, place, option)
    except DamagedFileError as error:
        raise ValueError(f"`{option}` is {place!r}; its files must be whole: {error}") from error
    if commit:
        vae.register_to_config(_name_or_path=commit)
    return vae.eval().requires_grad_(False).float()


def _read(folder: Path, place: str, option: str) -> Any:
    config: dict[str, Any] = read_json(folder / CONFIG)
    classes = {cls.__name__: cls for cls in AUTOENCODERS}
    name = config.get("_class_name")
    if name not in classes:
        raise ValueError(
            f"`{option}` is {place!r}, a {str(name)[:80]}; it must be one of {', '.join(classes)}."
        )
    check_autoencoder_config(config, folder / CONFIG)
    files = sorted(folder.glob(f"{_WEIGHTS}*.safetensors"))
    if not files:
        raise ValueError(
            f"`{option}` is {place!r}, which has no weights as safetensors; it must have "
            f"{_WEIGHTS}.safetensors."
        )
    for file in files:
        safetensors_shapes(file)
    cls: Any = classes[name]
    try:
        vae = cls.from_pretrained(folder, use_safetensors=True)
    except (OSError, RuntimeError, ValueError) as error:  # sizes of weights that do not fit, too
        raise ValueError(
            f"`{option}` is {place!r}; it must be an autoencoder that can be loaded: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    try:
        check_complete(vae, folder)
    except ValueError as error:
        raise ValueError(
            f"`{option}` is {place!r}; it must have an encoder and a decoder: {error}"
        ) from None
    check_autoencoder(vae, option)
    check_finite_weights(vae, option)
    return vae


def _folder(place: str, revision: str | None, option: str) -> tuple[Path, str]:
    """Return where the files are, and NAME@COMMIT of a repository."""
    if Path(place).is_dir():
        if revision is not None:
            raise ValueError(
                f"`{option}_revision` is {revision!r}; it must be left out, for `{option}` is "
                f"{place!r}, a folder."
            )
        return Path(place), ""
    if Path(place).exists() or not may_be_repository(place):
        raise ValueError(
            f"`{option}` is {place!r}, which is no folder; it must be a folder with an "
            "autoencoder, or a name on the Hub such as stabilityai/sd-vae-ft-mse."
        )
    name, own = divided(place)
    if own is not None and revision is not None:
        raise ValueError(
            f"`{option}_revision` is {revision!r}; it must be left out, for `{option}` is "
            f"{place!r}, which names one already."
        )
    tell_of_hub(option, place)
    from huggingface_hub import snapshot_download

    try:
        configs = [f"{p}/{CONFIG}".lstrip("/") for p in _PARTS] + ["model_index.json"]
        folder = Path(snapshot_download(name, revision=own or revision, allow_patterns=configs))
        parts = [p for p in _PARTS if (folder / p / CONFIG).is_file()]
        weights = [f"{p}/{_WEIGHTS}*.safetensors*".lstrip("/") for p in parts[:1]]
        snapshot_download(name, revision=folder.name, allow_patterns=weights)
    except OSError as error:
        raise ValueError(
            f"`{option}` is {place!r}, which is no folder here; as a name on the Hub it cannot be "
            f"loaded: {' '.join(str(error).split())}"
        ) from error
    return folder, f"{name}@{folder.name}"
