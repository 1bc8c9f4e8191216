"""The card that a run leaves with its pipeline: what was trained, on what, and how it is sampled.

It names no folder and no file of the machine: a card is made to be shared.
"""

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ddim_schedulers.training.common.repositories import may_be_repository
from ddim_schedulers.training.common.versions import versions
from ddim_schedulers.training.networks.places import SHIPPED
from ddim_schedulers.training.sharing.cards import PICTURE
from ddim_schedulers.training.trainer.same_run import STAMPED

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer.trainer import Trainer


def card_of(trainer: "Trainer", picture: bool) -> str:
    """Return the card of a complete run.

    Args:
        trainer: the run.
        picture: whether the samples of its last step lie in the pipeline's folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, classes = trainer.config, trainer.data.classes
    height, width = trainer.data.size
    data, base = _on_hub(config.data), _on_hub(config.from_pretrained)
    kind = "An unconditional" if classes is None else "A class-conditional"
    card_data = ModelCardData(
        library_name="diffusers",
        tags=["ddim-schedulers", *(["class-conditional"] if classes is not None else [])],
        pipeline_tag="unconditional-image-generation" if classes is None else None,
        datasets=None if data is None else [data.partition("@")[0]],
        base_model=None if base is None else base.partition("@")[0],
    )
    template = resources.files("ddim_schedulers.model_cards").joinpath("trained.md")
    card = ModelCard.from_template(
        card_data,
        template_str=template.read_text(encoding="utf-8"),
        title=trainer.root.resolve().name,
        summary=f"{kind} diffusion model of {height}x{width} images with {trainer.data.channels} "
        f"channel{'s' * (trainer.data.channels != 1)}.",
        picture=PICTURE if picture and classes is None else None,
        chain=f"{config.num_train_timesteps}",
        facts=_facts(trainer, data, base),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


def _on_hub(place: str | None) -> str | None:
    """Return a place if it is a name on the Hub."""
    if place is None or place in SHIPPED or Path(place).exists():
        return None
    return place if may_be_repository(place) else None


def _facts(trainer: "Trainer", data: str | None, base: str | None) -> dict[str, str]:
    config = trainer.config
    images = "a stream" if trainer.stream is not None else f"{len(trainer.data):,}"
    if config.data == "digits" and data is None:
        source = " of the digits of scikit-learn"
    else:
        source = f" of `{data}`" if data is not None else ""
    parameters = sum(p.numel() for p in trainer.average.unet.parameters())
    network = f"`{type(trainer.average.unet).__name__}` of {parameters:,} parameters"
    if config.from_pretrained is not None:
        network += f", from the weights of {f'`{base}`' if base else 'another model'}"
    if trainer.latents is not None:
        network += ", behind an autoencoder"
    weights = f"averaged, decay {config.ema_decay}" if config.use_ema else "of the last step"
    _, losses = trainer.log.curve()
    facts = {
        "images": images + source,
        "network": network,
        "process": f"{config.num_train_timesteps:,} timesteps, betas `{config.beta_schedule}`, "
        f"prediction `{config.prediction_type}`, loss `{config.loss}`",
        "steps": f"{trainer.step:,} of {config.batch_size} images, learning rate {config.lr:g} "
        f"({config.lr_schedule})",
        "weights": weights,
        "training loss": f"{losses[-1]:.4f}" if losses else "",
    }
    last = trainer.evaluations[-1] if trainer.evaluations else {}
    for name, key in (("validation loss", "validation_loss"), ("Frechet distance", "frechet")):
        if last.get("step") == trainer.step and isinstance(last.get(key), float):
            facts[name] = f"{last[key]:.4f}"
    if "Frechet distance" in facts:
        facts["Frechet distance"] += (
            f" in `{config.feature_space}`, n = {config.frechet_images}, while it was trained"
        )
    facts["seed"] = str(config.seed)
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions(*STAMPED).items())
    return {name: value for name, value in facts.items() if value}
