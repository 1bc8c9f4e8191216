"""A Hugging Face Space with the playground: its page, what it needs, and its card."""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from ddim_schedulers import __version__
from ddim_schedulers.export import export_folder
from ddim_schedulers.training.common.repositories import divided
from ddim_schedulers.training.networks.places import pipeline_folder

APP = '''"""The playground of ddim-schedulers for one pipeline."""

from ddim_schedulers.training.app.page import serve

serve({place!r}, host="0.0.0.0", port=7860)
'''
# torch is named, so that the Space takes the CPU's build.
REQUIREMENTS = """--extra-index-url https://download.pytorch.org/whl/cpu
torch
# From PyPI. A version that is not there, as one before its release, makes the build of the Space
# fail: put "ddim-schedulers[app] @ " and the address of a wheel in its place.
ddim-schedulers[app]=={version}
"""
CARD = """---
title: {title}
emoji: 🎲
colorFrom: indigo
colorTo: gray
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
{models}---

# {title}

The playground of [ddim-schedulers](https://github.com/ddim-schedulers/ddim-schedulers): sample with
any scheduler that fits, watch x_t and x0_hat form, compare two samplers on the same seeds,
interpolate, reconstruct and restore pictures. {where}
"""


def _pipeline_files(folder: Path) -> dict[str, bytes | Path]:
    """Return the files in the plug-in form, for the Space has this package, where there is one."""
    try:
        return export_folder(folder, "plug-in").files
    except ValueError:  # of stock classes alone; or it cannot be exported, which is reported later
        return export_folder(folder, "portable").files


def write_space(place: str, folder: str) -> list[Path]:
    """Write a Space into a new folder, the whole or nothing, and return its files.

    A pipeline that is a folder here is copied into it; one on the Hub is named.

    Args:
        place: folder of a saved pipeline or of a run, or a name on the Hub.
        folder: which must not exist, or be empty.

    Raises:
        ValueError: for a place that is no pipeline, or a folder that holds something.
    """
    gradio = importlib.metadata.version("gradio")  # without it: the extra `app` is missing
    name = pipeline_folder(place, "--pipeline")
    target = Path(os.path.abspath(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`--export_space` is {folder!r}; it must be a new or an empty folder.")
    files: dict[str, bytes | Path] = {}
    if Path(name).is_dir():
        files = {f"pipeline/{p}": c for p, c in _pipeline_files(Path(name)).items()}
        inside, models, where = "pipeline", "", "The pipeline lies in `pipeline/`."
        root = Path(name).resolve()
        title = (root.parent if root.name == "pipeline" else root).name
    else:
        repo = divided(name)[0]
        inside, models, title = name, f"models:\n- {repo}\n", repo.rpartition("/")[2]
        where = f"The pipeline is [{repo}](https://huggingface.co/{repo})."
    texts = {
        "app.py": APP.format(place=inside),
        "requirements.txt": REQUIREMENTS.format(version=__version__),
        "README.md": CARD.format(title=title, gradio=gradio, models=models, where=where),
    }
    files |= {path: text.encode() for path, text in texts.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made.chmod(0o755)
        for path, content in files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (made / path).write_bytes(content)
            else:
                shutil.copyfile(content, made / path)
        os.replace(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return [target / path for path in sorted(files)]
