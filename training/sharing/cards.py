"""The model card of a pushed pipeline, from the one template in `ddim_schedulers.model_cards`.

The template's marked section says how the repository is loaded; it belongs to the form in which the
pipeline is pushed, and is put into a card that is already there in place of an older one.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Any

from ddim_schedulers.betas import terminal_signal
from ddim_schedulers.bundle import LATENT_PIPELINE
from ddim_schedulers.class_labels import labels_in
from ddim_schedulers.export import INDEX, Export
from ddim_schedulers.latent_forms import LATENT_CLASS
from ddim_schedulers.reading import parse_json, read_text

MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|!&]")  # what has a meaning there
# The grid of samples that a run leaves in its pipeline, without classes and with them.
PICTURE = "assets/samples.png"
CLASS_PICTURE = "assets/classes.png"
SECTION = re.compile(
    r"<!-- ddim-schedulers: how to load it -->.*?<!-- /ddim-schedulers -->", re.DOTALL
)


def card_for(export: Export, repo_id: str, form: str) -> bytes:
    """Return the card of an export: the folder's own README.md with our section, or a new one.

    Args:
        export: the pipeline in the form in which it is pushed.
        repo_id: `USER/NAME`.
        form: the form's name.

    Raises:
        ValueError: for a README.md that is not text.
    """
    fresh = render(export, repo_id, form)
    own = export.files.get("README.md")
    if own is None:
        return fresh.encode()
    try:  # some editors put a byte order mark before the metadata
        text = (own if isinstance(own, bytes) else Path(own).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`README.md` of the pipeline is not UTF-8 ({error.reason}); it must be."
        ) from None
    text = text.replace("\r\n", "\n")
    section = SECTION.search(fresh)
    assert section is not None, "the template has lost its marked section"
    if SECTION.search(text):
        text = SECTION.sub(lambda _: section[0], text)
    else:
        text = f"{text.rstrip()}\n\n{section[0]}\n"
    if not text.startswith("---\n"):
        text = f"{fresh[: fresh.index('---', 3) + 4]}\n{text}"
    return text.encode()


def _classes(export: Export) -> dict[str, Any]:
    """Return the values of the template that are about the classes of the network."""
    config = export.files.get("unet/config.json")
    if config is None:
        return {"classes": []}
    text = config.decode() if isinstance(config, bytes) else read_text(config)
    labels = labels_in(parse_json(text, "unet/config.json"))
    if labels is None:
        return {"classes": []}
    # a name is shown as it is, without Markdown or HTML
    names = {
        number: MARKDOWN.sub(r"\\\g<0>", name)
        for number, name in labels.names.items()
        if name != str(number)  # it would be told twice
    }
    first = labels.ids[0]
    return {
        "classes": [(number, names.get(number, "")) for number in labels.ids],
        "example_class": repr(labels.names.get(first, first)),
        "null_class": labels.null_class,
        "class_picture": CLASS_PICTURE if CLASS_PICTURE in export.files else None,
    }


def render(export: Export, repo_id: str, form: str, **fields: Any) -> str:
    """Return the template filled in for an export.

    Args:
        export: the pipeline.
        repo_id: `USER/NAME`.
        form: the form's name.
        **fields: values of the template that replace the ones from the export.
    """
    from huggingface_hub import ModelCard, ModelCardData

    index = export.files[INDEX]
    text = index.decode() if isinstance(index, bytes) else read_text(index)
    pipeline_class = parse_json(text, INDEX)["_class_name"]
    home = "of ddim-schedulers" if pipeline_class == LATENT_CLASS else "of diffusers"
    if isinstance(pipeline_class, list):  # [module, class] of code in the repository
        pipeline_class, home = pipeline_class[1], "in the code of this repository"
    classes = _classes(export)
    unconditional = (
        pipeline_class
        in ("DDPMPipeline", "DDIMPipeline", "LDMPipeline", LATENT_CLASS, LATENT_PIPELINE)
        and not classes["classes"]
    )
    data = ModelCardData(
        library_name="diffusers",
        tags=["ddim-schedulers", *(["class-conditional"] if classes["classes"] else [])],
        pipeline_tag="unconditional-image-generation" if unconditional else None,
    )
    values: dict[str, Any] = {
        "title": repo_id.partition("/")[2],
        "summary": f"A `{pipeline_class}` {home}.",
        "own_class": pipeline_class == LATENT_CLASS,
        "carried": pipeline_class == LATENT_PIPELINE,
        "repo_id": repo_id,
        "form": form,
        "pipeline_class": pipeline_class,
        "schedulers": {name: type(s).__name__ for name, s in export.schedulers.items()},
        "code": [path for path in export.files if path.endswith(".py")],
        "notes": export.notes,
        "warnings": sorted(
            {terminal_signal(s.alpha_bar) for s in export.schedulers.values()} - {None}
        ),
    }
    values |= classes
    template = resources.files("ddim_schedulers.model_cards").joinpath("template.md")
    card = ModelCard.from_template(
        data, template_str=template.read_text(encoding="utf-8"), **{**values, **fields}
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"
