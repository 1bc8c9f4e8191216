"""The three forms in which a pipeline with our scheduler is shared.

| form             | `model_index.json` names       | who can load it                           |
|------------------|--------------------------------|-------------------------------------------|
| `portable`       | the stock class                | anyone; our settings travel under one key |
| `plug-in`        | `["ddim_schedulers", <class>]` | who has imported this package             |
| `self-contained` | a `.py` beside the config      | anyone, with `trust_remote_code=True`     |

A form is a matter of two small JSON files (and the one `.py`): weights are neither read nor copied.
No pipeline class of diffusers samples a network with classes, so the self-contained form of one
carries `ClassConditionalPipeline` in a second `.py`; the other forms load, and sample with this
package. `LatentPipeline` is the same for latents with classes or with a shift, which `LDMPipeline`
would sample wrongly.
`export_folder` says what a saved pipeline looks like in a form, `save_pipeline` writes it.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bundle import (
    BUNDLE_PREFIX,
    CLASS_PIPELINE,
    LATENT_PIPELINE,
    bundle,
    bundle_pipeline,
    is_bundled_pipeline,
)
from .class_labels import ClassLabels, labels_in
from .forms import FORMS as FORMS
from .forms import check_form as check_form
from .latent_forms import LATENT_CLASS, latent_class
from .plugin import STOCK_CLASSES, to_portable
from .reading import read_json
from .settings import SETTINGS_KEY

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
VAE = "vqvae"  # the autoencoder of a network of latents, as `LDMPipeline` calls it
VAE_NAMES = (VAE, "vae")  # other pipelines use the second; both are read
# Names that we write for a pipeline of ours; with one of them the components decide the class.
_WRITTEN = ("DDPMPipeline", "LDMPipeline", LATENT_CLASS)

# What a diffusers pipeline consists of. Checkpoints, optimiser states, pickles and code of others
# are not part of it.
COMPONENT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
ROOT_FILES = (INDEX, "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
_PARTS = {"unet", "scheduler"}
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


@dataclass(frozen=True)
class Export:
    """A pipeline folder in one form.

    Attributes:
        files: path in the repository -> the file on disk, or new content where the form changes it.
        notes: one sentence for each setting that the form cannot express.
        left_out: files of the folder that are not part of the pipeline.
        schedulers: component name -> our scheduler, as it is after loading with this package.
        classes: of the network; None where it has none.
    """

    files: dict[str, Path | bytes]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    schedulers: dict[str, Any] = field(default_factory=dict)
    classes: ClassLabels | None = None


def export_folder(pipeline_dir: str | os.PathLike[str], form: str = "portable") -> Export:
    """Return the files of a saved pipeline in the given form; nothing on disk is changed.

    Args:
        pipeline_dir: a folder that `save_pretrained` wrote, in any form.
        form: one of `FORMS`.

    Raises:
        ValueError: for an unknown form, a folder that is not a pipeline, pickled weights, a
            scheduler that the form cannot hold, or `plug-in` and `self-contained` without one of
            ours.
    """
    check_form(form)
    root = Path(pipeline_dir)
    index = _read_index(root)
    components = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and name != "_class_name"
    ]
    files, left_out = _pipeline_files(root, components)
    own: Any = index.get("_class_name")
    other = VAE_NAMES[1]
    if {*components} == {*_PARTS, other} and own in _WRITTEN:
        index[VAE] = index.pop(other)
        components = [VAE if name == other else name for name in components]
        files = {re.sub(f"^{other}/", f"{VAE}/", name): found for name, found in files.items()}
    if is_bundled_pipeline(own):
        left_out.remove(f"{own[0]}.py")
        index["_class_name"] = own = "DDPMPipeline"
    if isinstance(own, list) and f"{own[0]}.py" in left_out:  # a pipeline with code of its own
        left_out.remove(f"{own[0]}.py")
        files[f"{own[0]}.py"] = root / f"{own[0]}.py"
    notes: list[str] = []
    schedulers: dict[str, Any] = {}
    for name in components:
        scheduler = _our_scheduler(root, name, index[name])
        if scheduler is None:
            continue
        schedulers[name] = scheduler
        for path in [p for p in files if p.startswith(f"{name}/") and p.endswith(".py")]:
            del files[path]
        entry, written, lost = scheduler_files(scheduler, form)
        index[name] = entry
        files.update({f"{name}/{path}": content for path, content in written.items()})
        notes += lost
    classes = _classes_of(root, index)
    index["_class_name"] = _pipeline_class(root, index, schedulers, form, files)
    own_class = _own_class(index["_class_name"] if VAE in index else None, classes is not None)
    _check_any(schedulers, form, str(root), own_class)
    if own_class is not None and form == "self-contained":
        module, source = bundle_pipeline(own_class)
        index["_class_name"] = [module, own_class]
        files[f"{module}.py"] = source.encode()
    index.pop("_name_or_path", None)  # a folder of the machine where it was loaded
    for path, content in list(files.items()):
        if path.endswith("/config.json") and isinstance(content, Path):
            files[path] = _without_local_path(content)
    files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return Export(files, notes, left_out, schedulers, classes)


def save_pipeline(
    pipeline: Any, directory: str | os.PathLike[str], form: str = "portable"
) -> list[str]:
    """Save a pipeline in the given form.

    Args:
        pipeline: a diffusers pipeline.
        directory: where to, as in `save_pretrained`.
        form: one of `FORMS`.

    Returns:
        One sentence for each setting that the form cannot express.

    Raises:
        ValueError: as `export_folder`, before anything is written.
    """
    check_form(form)
    schedulers = {}
    for name, component in pipeline.components.items():
        if (scheduler := _our_component(component)) is not None:
            schedulers[name] = scheduler
            scheduler_files(scheduler, form)  # refuses what the form cannot hold
    parts, written = pipeline.components, None
    labelled = {*parts} - {VAE} == _PARTS and labels_in(parts["unet"].config) is not None
    if (vae := parts.get(VAE)) is not None:  # refused before anything is written
        written = latent_class(vae.config, labelled, form)
    _check_any(schedulers, form, f"this {type(pipeline).__name__}", _own_class(written, labelled))
    pipeline.save_pretrained(directory)
    root = Path(directory)
    export = export_folder(root, form)
    folders = [root, *(root / name for name in export.schedulers)]
    for code in [path for folder in folders for path in folder.glob(f"{BUNDLE_PREFIX}*.py")]:
        code.unlink()
    # the index last: until then the folder is the plug-in form that `save_pretrained` wrote
    for path, content in sorted(export.files.items(), key=lambda item: item[0] == INDEX):
        if isinstance(content, bytes):
            _write(root / path, content)
    return export.notes


def scheduler_files(scheduler: Any, form: str) -> tuple[list[str], dict[str, bytes], list[str]]:
    """Return the entry in `model_index.json`, the files of the scheduler folder, and what is lost.

    Args:
        scheduler: one of ours.
        form: one of `FORMS`.

    Raises:
        ValueError: if the form cannot hold the scheduler.
    """
    check_form(form)
    name = type(scheduler).__name__
    if form == "portable":
        stock, notes = to_portable(scheduler)
        entry = ["diffusers", type(stock).__name__]
        return entry, {SCHEDULER_CONFIG: stock.to_json_string().encode()}, notes
    config = {SCHEDULER_CONFIG: scheduler.to_json_string().encode()}
    if form == "plug-in":
        return ["ddim_schedulers", name], config, []
    module, source = bundle(name)
    return [module, name], {**config, f"{module}.py": source.encode()}, []


def with_installed_schedulers(index: dict[str, Any]) -> dict[str, Any]:
    """Return a `model_index.json` whose self-contained schedulers are the plug-in's own classes.

    So is the pipeline of a network with classes, which our pipelines take the place of. Both forms
    have the same config, so nothing else changes, and no code of the repository runs.
    """

    def installed(entry: Any) -> Any:
        if not isinstance(entry, list) or len(entry) != 2:
            return entry
        module, name = map(str, entry)
        ours = module.startswith(BUNDLE_PREFIX) and name in STOCK_CLASSES
        return ["ddim_schedulers", name] if ours else entry

    plain = {name: installed(entry) for name, entry in index.items()}
    if is_bundled_pipeline(plain.get("_class_name")):
        plain["_class_name"] = "DDPMPipeline"
    return plain


# -- reading a saved pipeline


def _read_index(root: Path) -> dict[str, Any]:
    path = root / INDEX
    if not path.is_file():
        raise ValueError(
            f"`pipeline_dir` is {str(root)!r}, which is not a saved pipeline; it must have a file "
            f"{INDEX}."
        )
    index = read_json(path)
    own = index.get("_class_name")
    if not isinstance(own, str) and not isinstance(own, list):
        raise ValueError(f"{path}: `_class_name` is {own!r}; it must name the pipeline's class.")
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise ValueError(f"{path}: {name!r} is {entry!r}; it must be a library and a class.")
        if not re.fullmatch(r"\w+", name) or not re.fullmatch(r"[\w.]*", str(entry[0])):
            raise ValueError(
                f"{path}: {name!r} or its library {entry[0]!r} is no name; a name must consist of "
                "letters, digits, _ and, for a library, dots."
            )
    return index


def _pipeline_files(root: Path, components: list[str]) -> tuple[dict[str, Path | bytes], list[str]]:
    files: dict[str, Path] = {}
    left_out = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        if len(parts) == 2 and parts[0] in components and path.suffix in COMPONENT_SUFFIXES:
            files[name] = path
        elif len(parts) == 2 and parts[0] in components and path.suffix == ".py":
            files[name] = path
        elif len(parts) == 1 and (name in ROOT_FILES or path.suffix.lower() in PICTURES):
            files[name] = path
        elif parts[0] == "assets" and path.suffix.lower() in PICTURES:
            files[name] = path
        elif not (len(parts) == 1 and name.startswith(".owner")):  # says which process works here
            left_out.append(name)
    for found in files.values():
        _check_inside(root, found)
    pickled = [n for n in left_out if n.partition("/")[0] in components and n.endswith(".bin")]
    if pickled:
        raise ValueError(
            f"{root / pickled[0]} is a pickle, which can run code where it is loaded; save the "
            "pipeline again with `safe_serialization=True`."
        )
    return {**files}, left_out


def _check_inside(root: Path, path: Path) -> None:
    """Refuse a link out of the pipeline's folder: what it points to was not meant to be shared.

    In the Hub's cache every file of a snapshot is a link to the same repository's `blobs`.
    """
    home, target = root.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    of_the_cache = home.parent.name == "snapshots" and target.parent == blobs
    if not (target.is_relative_to(home) or of_the_cache):
        raise ValueError(
            f"{path} is a link to {target}, outside of the pipeline's folder; replace it by the "
            "file itself, or remove it."
        )


def _without_local_path(config: Path) -> Path | bytes:
    """Return a model's config without the folder from which it was loaded on this machine."""
    content = read_json(config)
    if not os.path.isabs(str(content.get("_name_or_path", ""))):
        return config
    del content["_name_or_path"]
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _classes_of(root: Path, index: dict[str, Any]) -> ClassLabels | None:
    """Return the classes of the network of an unconditional pipeline's shape, or None."""
    components = {key for key, entry in index.items() if isinstance(entry, list)} - {"_class_name"}
    path = root / "unet" / "config.json"
    if components - {VAE} != _PARTS or not path.is_file():
        return None
    return labels_in(read_json(path))


def _our_scheduler(root: Path, name: str, entry: list[Any]) -> Any:
    """Return the component as a scheduler of ours, or None if it is something else."""
    import ddim_schedulers

    path = root / name / SCHEDULER_CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    class_name = _our_class(entry, config)
    if class_name is None:
        return None
    if class_name not in STOCK_CLASSES:
        raise ValueError(
            f"{path} names the class {class_name!r}; it must be one of {sorted(STOCK_CLASSES)}."
        )
    return getattr(ddim_schedulers, class_name).from_config(config)


def _our_component(component: Any) -> Any:
    """Return a component in memory as `_our_scheduler` returns one on disk."""
    from diffusers import SchedulerMixin

    import ddim_schedulers

    if not isinstance(component, SchedulerMixin):
        return None
    library = type(component).__module__
    library = "diffusers" if library.startswith("diffusers.") else library
    config: Any = component.config  # type: ignore[attr-defined]
    class_name = _our_class([library, type(component).__name__], config)
    if class_name not in STOCK_CLASSES:
        return None
    return getattr(ddim_schedulers, class_name).from_config(config)


def _our_class(entry: list[Any], config: Mapping[str, Any]) -> str | None:
    """Return the class that an entry of `model_index.json` and a config say, if one of ours."""
    library, class_name = entry
    private = config.get(SETTINGS_KEY)
    if library == "diffusers" and isinstance(private, dict):
        stock_name, class_name = class_name, private.get("class")
        # our settings stay in the config when a user swaps to another stock class: keep that one
        if isinstance(class_name, str) and STOCK_CLASSES.get(class_name, stock_name) != stock_name:
            return None
    elif library != "ddim_schedulers" and not library.startswith(
        ("ddim_schedulers.", BUNDLE_PREFIX)
    ):
        return None
    return str(class_name)


def _own_class(written: Any, labelled: bool) -> str | None:
    """Return the pipeline of ours that a self-contained repository carries; None without one.

    Args:
        written: class in `model_index.json` of a network of latents; None for one of pixels.
        labelled: whether the network has classes.
    """
    if written == LATENT_CLASS:
        return LATENT_PIPELINE
    return CLASS_PIPELINE if labelled else None


def _check_any(schedulers: dict[str, Any], form: str, where: str, own_class: str | None) -> None:
    """Raise `ValueError` for a form that is about our classes where there is none."""
    if own_class == LATENT_PIPELINE or (own_class is not None and form == "self-contained"):
        return
    if not schedulers and form != "portable":
        raise ValueError(
            f"`form` is {form!r}, but no scheduler of {where} is one of {sorted(STOCK_CLASSES)}; a "
            "pipeline of stock classes is portable as it is."
        )


def _pipeline_class(
    root: Path,
    index: dict[str, Any],
    schedulers: dict[str, Any],
    form: str,
    files: Mapping[str, Path | bytes],
) -> Any:
    """Return the pipeline class by which everyone can load the folder.

    `DDIMPipeline` puts a stock scheduler in the place of any other, so a scheduler of ours needs
    `DDPMPipeline`, whose loop is the same; our own pipelines are unknown to diffusers.
    """
    import diffusers

    name = index.get("_class_name")
    components = {key for key, entry in index.items() if isinstance(entry, list)} - {"_class_name"}
    if components == {*_PARTS, VAE}:
        if name not in _WRITTEN:
            return name
        labelled = labels_in(read_json(root / "unet" / "config.json")) is not None
        config = files.get(f"{VAE}/config.json")
        if not isinstance(config, Path):
            raise ValueError(
                f"`pipeline_dir` is {str(root)!r}, whose {VAE} has no config.json; it must have "
                "one."
            )
        return latent_class(read_json(config), labelled, form)
    if components != _PARTS or "scheduler" not in schedulers:
        return name
    if isinstance(name, list):  # code in the repository
        return name
    known = isinstance(name, str) and hasattr(diffusers, name)
    if known and name not in ("DDPMPipeline", "DDIMPipeline"):
        return name
    ours = type(schedulers["scheduler"]).__name__
    if ours == "GeneralizedDDIMInverseScheduler":
        return name
    ddim = ours == "GeneralizedDDIMScheduler"
    return "DDIMPipeline" if ddim and form == "portable" else "DDPMPipeline"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    with open(partial, "xb") as file:  # a new file: an existing link is not followed
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
