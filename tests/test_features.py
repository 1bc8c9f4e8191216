"""Feature spaces: what each one maps to, where it comes from, and how it is known again."""

import sys
import types

import numpy as np
import pytest
import torch

from ddim_schedulers.training.metrics import features
from ddim_schedulers.training.metrics.features import (
    DinoFeatures,
    InceptionFeatures,
    classifier_facts,
    extract,
    load_classifier,
    make_feature_space,
    save_classifier,
    space_fingerprint,
    train_classifier,
)

SHAPE = (1, 8, 8)


class Stand(torch.nn.Module):
    """A feature space that is found by its import path."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return images.flatten(1) * self.scale


def _striped(count, seed=0):
    """Images of two classes: rows or columns that alternate."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    rows = torch.tensor([1.0, -1.0]).repeat(4).view(1, 8, 1).expand(1, 8, 8)
    images = torch.stack([rows if k == 0 else rows.transpose(1, 2) for k in labels])
    return images + 0.5 * torch.randn(images.shape, generator=generator), labels.numpy()


@pytest.fixture(scope="module")
def classifier():
    images, labels = _striped(300)
    return train_classifier(lambda rows: images[rows], labels, SHAPE, epochs=2, batch_size=32)


def test_pixels_are_averages():
    space = make_feature_space("pixels", (3, 32, 16))
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    got = extract(space, images)
    assert got.shape == (2, space.num_features) and got.dtype == torch.float64
    want = images.double().reshape(2, 3, 8, 4, 8, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(got, want)
    assert make_feature_space("pixels", SHAPE).num_features == 64


def test_a_classifier_learns_and_comes_back_from_its_file(classifier, rounding, tmp_path):
    network, facts = classifier
    assert facts["accuracy"] >= 0.9 and facts["classes"] == 2
    assert facts["held_out_n"] + facts["train_n"] == 300
    save_classifier(network, facts, tmp_path / "c.safetensors")
    again = make_feature_space(str(tmp_path / "c.safetensors"), SHAPE)
    images, labels = _striped(40, seed=1)
    got, before = (extract(n, images, batch_size=40) for n in (again, network))
    assert got.shape == (40, 128)
    torch.testing.assert_close(got, before, rtol=rounding, atol=rounding)
    pairs = zip(again.parameters(), network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (again.head(got).argmax(1).numpy() == labels).mean() >= 0.9
    assert classifier_facts(tmp_path / "c.safetensors") == facts
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(ValueError, match="that the classifier was trained on"):
        again(torch.zeros(1, 1, 9, 9))


def test_training_depends_on_its_seed_alone(classifier):
    images, labels = _striped(300)
    torch.rand(3)
    again, _ = train_classifier(lambda r: images[r], labels, SHAPE, epochs=2, batch_size=32)
    for a, b in zip(classifier[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    other, _ = train_classifier(lambda r: images[r], labels, SHAPE, epochs=1, seed=1)
    assert not torch.equal(next(other.parameters()), next(again.parameters()))


def test_any_module_is_a_feature_space_and_its_weights_are_its_name(monkeypatch):
    module = types.ModuleType("somewhere")
    module.Stand, module.wrong = Stand, lambda: 3
    monkeypatch.setitem(sys.modules, "somewhere", module)
    space = make_feature_space("somewhere:Stand", SHAPE)
    assert not space.training
    assert torch.equal(extract(space, torch.ones(2, *SHAPE)), torch.full((2, 64), 2.0))
    before = space_fingerprint("somewhere:Stand", space)
    assert space_fingerprint("somewhere:Stand", Stand()) == before
    space.scale.data += 1e-3
    assert space_fingerprint("somewhere:Stand", space) != before
    assert space_fingerprint("pixels", make_feature_space("pixels", SHAPE)) != before
    for name, message in (
        ("somewhere:wrong", "no class of torch.nn.Module, and is not called"),
        ("somewhere:none", "feature_space"),
        ("nowhere_at_all:X", "feature_space"),
        ("no/such.safetensors", "a classifier that cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            make_feature_space(name, SHAPE)


def test_an_imported_space_is_its_code_too(tmp_path, monkeypatch):
    source = tmp_path / "space_without_weights.py"
    text = "import torch\nclass Space(torch.nn.Module):\n    def forward(self, x): return x{}\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for change in ("", " * 2", ""):
        source.write_text(text.format(change))
        monkeypatch.delitem(sys.modules, source.stem, raising=False)
        name = f"{source.stem}:Space"
        found.append(space_fingerprint(name, make_feature_space(name, SHAPE)))
    assert found[0] == found[2] != found[1]


def test_images_go_where_the_weights_are_buffers_or_not():
    class Projection(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("matrix", torch.ones(64, 2, device="meta"))

        def forward(self, images):
            assert images.device == self.matrix.device
            return torch.ones(len(images), 2)

    assert extract(Projection(), torch.zeros(3, *SHAPE)).shape == (3, 2)


def test_a_file_of_other_weights_is_no_classifier(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(tmp_path / "w.safetensors")


def test_classes_must_be_numbered():
    for labels in (np.zeros(9, int), np.arange(1, 10), np.array([0, 2, 0, 2])):
        with pytest.raises(ValueError, match="0 .. K - 1"):
            train_classifier(lambda rows: torch.zeros(len(rows), *SHAPE), labels, SHAPE)
    names, numbers = features.class_names(["cat", "ant", "cat"])
    assert names == ["ant", "cat"] and numbers.tolist() == [1, 0, 1]


class _Extractor(torch.nn.Module):
    """Stands in for torch-fidelity's InceptionV3: the same signature, no weights."""

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.fc = torch.nn.Linear(2048, 1008)
        self.seen = []

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        self.seen.append(x)
        return (x.float().mean((1, 2, 3))[:, None].expand(-1, 2048),)


def test_wiring_of_inception_with_a_stand_in(monkeypatch):
    package = types.ModuleType("torch_fidelity")
    part = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    part.FeatureExtractorInceptionV3 = _Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", part)
    space = make_feature_space("inception", SHAPE)
    assert isinstance(space, InceptionFeatures)
    levels = torch.arange(64).view(1, 1, 8, 8) * 4
    got = extract(space, levels / 127.5 - 1)
    assert torch.equal(space.network.seen[0], levels.expand(1, 3, 8, 8).to(torch.uint8))
    assert got.shape == (1, space.num_features)
    assert torch.allclose(space.head(got), got @ space.network.fc.weight.T)
    with pytest.raises(ValueError, match="2 channels"):
        space(torch.zeros(1, 2, 8, 8))

    def unreachable(*_):
        raise OSError("no route to host\nmore")

    part.FeatureExtractorInceptionV3 = unreachable
    with pytest.raises(ValueError, match="inception.*cannot be had: no route to host; run once"):
        make_feature_space("inception", SHAPE)


def test_wiring_of_dinov2_with_random_weights(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=224
    )
    Dinov2Model(small).save_pretrained(tmp_path / "dino")
    space = make_feature_space(f"dinov2:{tmp_path / 'dino'}", SHAPE)
    assert isinstance(space, DinoFeatures) and space.num_features == 16
    got = extract(space, torch.rand(2, 1, 8, 8) * 2 - 1)
    assert got.shape == (2, 16) and got.isfinite().all() and not torch.equal(got[0], got[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="dinov2:.*cannot be had"):
        make_feature_space(f"dinov2:{tmp_path / 'empty'}", SHAPE)
