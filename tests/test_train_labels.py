"""Training a network with classes: what it starts as, what it learns, and that a run goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import UNET, quick_config, same_files

from ddim_schedulers.class_labels import ClassLabels, class_labels_of, note_class_labels
from ddim_schedulers.export import export_folder
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.networks.checkpoint_network import load_checkpoint
from ddim_schedulers.training.networks.models import make_scheduler, make_unet, with_class_embedding
from ddim_schedulers.training.sharing.cards import render
from ddim_schedulers.training.train import main, train
from ddim_schedulers.training.trainer.trainer import Trainer

FITS = {"channels": 1, "size": (8, 8)}
COLOURS = ["black", "grey", "white"]


@pytest.fixture
def settings(tmp_path):
    """Settings of a quick run on 30 images of three classes, which are told by their brightness."""
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    labels = np.arange(30) % 3
    noise = np.random.default_rng(0).integers(0, 16, (30, 8, 8))
    images = (noise + 110 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)

    def make(name="run", **changes):
        values = {
            "data": str(tmp_path / "set.npz"),
            "array_key": "images",
            "class_conditional": True,
            "validation_fraction": 0.2,
            "max_train_steps": 6,
        }
        return quick_config(tmp_path, name, **values | changes)

    return make


@pytest.fixture
def saved(tmp_path):
    """A pipeline with a network of so many classes, as a function of these."""

    def save(name, count=None, null_class=None, names=()):
        torch.manual_seed(1)
        (tmp_path / "unet.json").write_text(json.dumps(UNET))
        unet = make_unet(str(tmp_path / "unet.json"), **FITS, num_class_embeds=count)
        if names or null_class is not None:
            note_class_labels(unet, null_class, names)
        pipeline = DDPMPipeline(unet=unet, scheduler=make_scheduler(TrainingConfig()))
        pipeline.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_a_run_leaves_a_network_with_the_null_class_and_the_names(settings):
    result = train(settings(class_names=COLOURS))
    expected = ClassLabels(4, 3, dict(enumerate(COLOURS)))
    (folder,) = checkpoints.listed(result.output_dir / "checkpoints")
    places = (result.unet, DiffusionPipeline.from_pretrained(result.pipeline_dir))
    for model in (*places, load_checkpoint(folder)[0], load_checkpoint(folder, "raw")[0]):
        assert class_labels_of(model) == expected
    data = json.loads((result.output_dir / "data.json").read_text())
    assert data["classes"] == dict.fromkeys(COLOURS, 10)
    x, t = torch.zeros(4, 1, 8, 8), torch.full((4,), 500)
    with torch.no_grad():
        output = result.unet(x, t, class_labels=torch.arange(4)).sample
    assert len({float(image.sum()) for image in output}) == 4


def test_without_dropout_there_is_no_null_class(settings, capsys):
    trainer = Trainer(settings(label_dropout=0.0))
    assert class_labels_of(trainer.unet) == ClassLabels(3)
    assert "no null class: no label is dropped" in capsys.readouterr().err
    assert trainer.batches[(0, 0)]["labels"].max() == 2


def test_labels_are_learned(settings):
    """The loss with the true labels is below that with labels of others.

    The difference is what the mutation of `labels` in the batch would take away.
    """
    trainer = Trainer(
        settings(max_train_steps=60, prediction_type="sample", lr=3e-3, num_train_timesteps=10)
    )
    trainer.run()
    images, labels = trainer.data.all(), trainer.data.labels(range(len(trainer.data)))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(images),), 9)
    # at pure noise nothing but the label tells how bright the image is
    x_t = 0.1 * images + 0.99 * noise
    unet = trainer.average.unet.eval()

    def error(labels):
        with torch.no_grad():
            return float((unet(x_t, t, class_labels=labels).sample - images).square().mean())

    null = torch.full_like(labels, 3)
    assert 2 * error(labels) < error(null) < error((labels + 1) % 3)


def test_resume_is_exact_with_labels_and_everything_on(settings):
    everything = {
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "label_dropout": 0.3,
        "variance_type": "learned_range",
        "timestep_sampling": "loss_aware",
        "num_train_timesteps": 10,
        "sampling_history": 3,
    }
    whole = settings("whole", **everything)
    expected = train(whole)
    first = train(settings("parts", **everything, stop_after=4))
    torch.manual_seed(123)  # what the global generator was at must not matter
    second = train(settings("parts", **everything, resume="latest"))
    assert first.losses + second.losses == expected.losses
    assert same_files(whole, settings("parts", **everything), 6)
    undropped = train(settings("undropped", **everything | {"label_dropout": 0.0001}))
    assert undropped.losses != expected.losses


def test_other_labels_are_another_run(settings, tmp_path):
    train(settings(stop_after=2, class_names=COLOURS))
    with pytest.raises(ValueError, match="class_names was .* and is .*; start a new run"):
        Trainer(settings(resume="latest", class_names=COLOURS[::-1]))
    assert Trainer(settings(resume="latest", class_names=tuple(COLOURS))).step == 2
    with pytest.raises(ValueError, match="label_dropout was None and is 0.2"):
        Trainer(settings(resume="latest", class_names=COLOURS, label_dropout=0.2))
    with np.load(tmp_path / "set.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    np.savez(tmp_path / "set.npz", images=images, labels=(labels + 1) % 3)
    with pytest.raises(ValueError, match="the labels of the images, or the names of their classes"):
        Trainer(settings(resume="latest", class_names=COLOURS))
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    assert train(settings(resume="latest", class_names=COLOURS)).steps == 6


@pytest.mark.parametrize("shape", ["tiny", "small"])
def test_an_added_embedding_changes_nothing_at_first(shape, assert_close):
    torch.manual_seed(0)
    unet = make_unet(shape, **FITS).eval()
    with_classes = with_class_embedding(unet, 4).eval()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        expected = unet(x, t).sample
        for labels in (torch.arange(4), torch.full((4,), 3)):
            got = with_classes(x, t, class_labels=labels).sample
            assert_close(got.flatten().tolist(), expected.flatten().tolist())
        with_classes.class_embedding.weight[1] = 1.0
        changed = with_classes(x, t, class_labels=torch.arange(4)).sample
    assert float((changed - expected)[1].abs().max()) > 1e-4


def test_an_unconditional_network_gets_classes_and_keeps_its_weights(settings, saved):
    config = settings(model="tiny", from_pretrained=saved("p"), class_names=COLOURS)
    trainer = Trainer(config)
    assert class_labels_of(trainer.unet) == ClassLabels(4, 3, dict(enumerate(COLOURS)))
    before = load_file(Path(config.from_pretrained) / "unet/diffusion_pytorch_model.safetensors")
    own = {k: v for k, v in trainer.unet.state_dict().items() if not k.startswith("class_emb")}
    assert own.keys() == before.keys() and all(torch.equal(own[k], before[k]) for k in own)
    trainer.run()
    assert float(trainer.unet.class_embedding.weight.detach().abs().amax(1).min()) > 0


def test_a_network_without_a_null_class_goes_on_without_one(settings, saved, capsys):
    place = saved("p", 3)
    trainer = Trainer(settings(model="tiny", from_pretrained=place, class_names=COLOURS))
    assert class_labels_of(trainer.unet) == ClassLabels(3, None, dict(enumerate(COLOURS)))
    assert "the network has no null class" in capsys.readouterr().err
    labels = torch.cat([trainer.batches[(step, 0)]["labels"] for step in range(40)])
    assert set(labels.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="`label_dropout` is 0.1; it must be 0 or left out"):
        Trainer(settings(model="tiny", from_pretrained=place, label_dropout=0.1))


def test_classes_of_a_trained_network_are_taken_by_their_names(settings, saved):
    place = saved("p", 5, null_class=0, names=["white", "red", "black", "grey"])
    trainer = Trainer(settings(model="tiny", from_pretrained=place, class_names=COLOURS))
    assert trainer.data.labels(range(6)).tolist() == [
        {"black": 3, "grey": 4, "white": 1}[COLOURS[int(i) % 3]] for i in trainer.data.ids[:6]
    ]
    assert trainer.null_class == 0 and trainer.label_dropout == 0.1
    with pytest.raises(ValueError, match="`data` is 'pink'; it must be"):
        Trainer(settings(model="tiny", from_pretrained=place, class_names=["black", "pink", "x"]))
    with pytest.raises(ValueError, match="is class-conditional, and class_conditional is false"):
        Trainer(settings(model="tiny", from_pretrained=place, class_conditional=False))


def test_pictures_have_a_column_for_each_class(settings):
    looks = {"sample_every": 60, "sample_images": 7, "sample_steps": 3, "frechet_images": 9}
    more = {"validate_every": 60, "validation_images": 6, "num_train_timesteps": 10}
    result = train(settings(max_train_steps=60, prediction_type="sample", lr=3e-3, **looks, **more))
    with Image.open(result.output_dir / "pictures" / "samples-00000060.png") as picture:
        pixels = np.asarray(picture.convert("L")).astype(float)
    scale = 6  # 48 pixels an image; two pixels between
    width = pixels.shape[1] // 3
    means = [pixels[: 8 * scale, i * width : (i + 1) * width].mean() for i in range(3)]
    assert means[0] + 20 < means[1] < means[2] - 20
    report = result.evaluations[-1]
    assert report["frechet_n"] == 9 and report["validation_n"] == 6


def test_the_dry_run_shows_the_classes(settings, capsys):
    config = settings(class_names=COLOURS)
    words = ["--dry_run", "--cpu", "true", "--class_names", *COLOURS]
    for name in ("data", "array_key", "model", "output_dir", "class_conditional", "batch_size"):
        words += [f"--{name}", str(getattr(config, name))]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "classes     3 and a null class, which takes the place of 10 % of the labels" in said


def test_a_run_without_labels_is_what_it_was(settings):
    """No new key is written: neither in the config of the network nor in a checkpoint's record."""
    result = train(settings(class_conditional=False))
    (folder,) = checkpoints.listed(result.output_dir / "checkpoints")
    for place in (folder / "unet", result.pipeline_dir / "unet"):
        config = json.loads((place / "config.json").read_text())
        assert config["num_class_embeds"] is None and "_ddim_schedulers" not in config
    state = json.loads((folder / "state.json").read_text())
    assert "labels" not in state["contents"]
    assert "classes" not in json.loads((result.output_dir / "data.json").read_text())


def test_the_card_tells_the_classes_and_shows_them(settings):
    looks = {"sample_every": 6, "sample_images": 6, "sample_steps": 2}
    names = ["T-shirt/top", "a_b*c", "<b>"]
    result = train(settings(class_names=names, **looks))
    export = export_folder(result.pipeline_dir, "portable")
    card = render(export, "me/clothes", "portable")
    assert "It draws 3 classes" in card and "class_labels='T-shirt/top', guidance_scale=2.0" in card
    assert r"0 T-shirt/top, 1 a\_b\*c, 2 \<b\>." in card
    assert "](assets/classes.png)" in card and "assets/classes.png" in export.files
    assert "- class-conditional" in card and "unconditional-image-generation" not in card
    plain = train(settings("plain", class_conditional=False, **looks))
    export = export_folder(plain.pipeline_dir, "portable")
    card = render(export, "me/clothes", "portable")
    assert "classes" not in card and "unconditional-image-generation" in card
    assert [n for n in export.files if n.startswith("assets")] == ["assets/samples.png"]


@pytest.mark.parametrize(("names", "first"), [(None, "0"), (["0", "1", "2"], "'0'")])
def test_the_card_of_a_network_without_a_null_class_or_names(names, first, settings):
    result = train(settings(label_dropout=0.0, class_names=names))
    card = render(export_folder(result.pipeline_dir, "portable"), "me/clothes", "portable")
    assert f"class_labels={first})" in card and "\n0, 1, 2." in card
    assert "It has no null class" in card and "](assets/classes.png)" not in card
