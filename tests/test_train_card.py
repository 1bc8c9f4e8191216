"""The card that a training run leaves with its pipeline."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants, metadata_load, metadata_save

from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.sharing.hub import contents_of_push
from ddim_schedulers.training.trainer.card import card_of
from ddim_schedulers.training.trainer.trainer import open_trainer

UNET = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A complete run, and the folder that it and its data lie in."""
    root = tmp_path_factory.mktemp("private")
    (root / "unet.json").write_text(json.dumps(UNET))
    np.save(root / "secret.npy", np.random.default_rng(0).integers(0, 255, (12, 8, 8), np.uint8))
    config = TrainingConfig(
        data=str(root / "secret.npy"),
        model=str(root / "unet.json"),
        output_dir=str(root / "eyes"),
        validate_every=2,
        validation_images=4,
        sample_every=2,
        sample_images=2,
        sample_steps=2,
        max_train_steps=2,
        batch_size=4,
        lr_warmup_steps=0,
        progress_bar=False,
        cpu=True,
    )
    with open_trainer(config) as trainer:
        return trainer, trainer.run().pipeline_dir, root


def test_it_says_what_was_trained_and_names_no_place_of_the_machine(done):
    trainer, folder, root = done
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n") and "# eyes\n" in text
    assert f"| images | {len(trainer.data)} |" in text and "8x8 images with 1 channel." in text
    assert "| steps | 2 of 4 images, learning rate 0.0002 (constant) |" in text
    assert "| validation loss | " in text and "| seed | 0 |" in text
    assert "--preset few" in text and "--num_inference_steps 1000" in text
    assert "](assets/samples.png)" in text and (folder / "assets" / "samples.png").is_file()
    assert "secret" not in text and str(root) not in text


def test_a_push_sends_it_with_how_to_load_it(done):
    files = contents_of_push(done[1], "me/eyes")
    text = files["README.md"].decode()
    assert 'from_pretrained("me/eyes")' in text and "`ddim-schedulers push` writes" not in text
    assert "## How it was trained" in text and "assets/samples.png" in files


def test_the_hub_reads_its_metadata(done, loopback_hub, monkeypatch, tmp_path):
    place = done[1] / "README.md"
    monkeypatch.setattr(constants, "ENDPOINT", loopback_hub.url)
    ModelCard.load(place).validate()
    found = metadata_load(place)
    assert found["library_name"] == "diffusers" and "base_model" not in found
    assert found["pipeline_tag"] == "unconditional-image-generation" and "datasets" not in found
    copy = tmp_path / "README.md"
    copy.write_bytes(place.read_bytes())
    metadata_save(copy, {**found, "license": "mit"})
    assert ModelCard.load(copy).data.license == "mit"


def test_what_comes_from_the_hub_is_named_by_its_id(done, monkeypatch):
    trainer = done[0]
    monkeypatch.setattr(trainer.config, "data", "you/pictures@v2")
    monkeypatch.setattr(trainer.config, "from_pretrained", "you/base@main")
    card = ModelCard(card_of(trainer, picture=False))
    assert card.data.datasets == ["you/pictures"] and card.data.base_model == "you/base"
    assert "of `you/pictures@v2`" in card.text and "weights of `you/base@main`" in card.text
    assert "![" not in card.text
