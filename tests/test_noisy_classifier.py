"""A classifier of noisy images: it learns, it is kept, and nonsense in its place is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim_schedulers.betas import alpha_bar_from_betas, make_betas
from ddim_schedulers.training import cli
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.images import load_data
from ddim_schedulers.training.networks.noisy_classifier import (
    NoisyClassifier,
    load_noisy_classifier,
)
from ddim_schedulers.training.trainer.classifier_training import (
    accuracy_by_t,
    train_noisy_classifier,
)

ALPHA_BAR = alpha_bar_from_betas(make_betas("linear", 20, 1e-3, 0.3))


@pytest.fixture(scope="module")
def digits():
    return load_data(TrainingConfig(class_conditional=True))


@pytest.fixture(scope="module")
def trained(digits):
    return train_noisy_classifier(*digits, ALPHA_BAR, steps=120, batch_size=32, lr=2e-3)


@pytest.fixture
def saved(trained, tmp_path):
    trained[0].save_pretrained(tmp_path / "c")
    return tmp_path / "c"


def test_it_recognises_what_the_noise_leaves(trained, digits):
    classifier, record = trained
    accuracy = record["accuracy"]
    assert accuracy["0"] > 0.9 and accuracy["18"] < 0.3
    assert accuracy["0"] > accuracy["10"] > accuracy["18"]
    assert record["held_out_n"] == 360 and record["train_n"] == 1437
    assert accuracy_by_t(classifier, digits[1], ALPHA_BAR, seed=0, batch_size=360) == accuracy


def test_it_is_told_t(trained):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classifier = trained[0]
    steps = torch.tensor([0, 10, 19])
    together = classifier(x, steps)
    assert together.shape == (3, 10)
    alone = torch.cat([classifier(x[i : i + 1], int(t)) for i, t in enumerate(steps)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert float((classifier(x, 0) - classifier(x, 19)).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"`x_t` is \(1, 4, 4\) \(C, H, W\); it must be \(1, 8, 8"):
        classifier(x[..., :4, :4], 0)


def test_the_same_seed_gives_the_same_classifier(digits):
    runs = [
        train_noisy_classifier(*digits, ALPHA_BAR, steps=3, batch_size=16, seed=seed)
        for seed in (1, 1, 2)
    ]
    weights = [run[0].output.weight for run in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_saved_classifier_is_the_same(trained, saved, assert_close):
    loaded = load_noisy_classifier(saved)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(loaded(x, 5).flatten().tolist(), trained[0](x, 5).flatten().tolist())
    assert loaded.names == [str(i) for i in range(10)] and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DModel"),
        ("num_classes", 1),
        ("num_classes", 10.0),
        ("num_classes", 10**9),
        ("sample_size", [8]),
        ("sample_size", [8, 10**9]),
        ("in_channels", 0),
        ("block_out_channels", []),
        ("block_out_channels", [32] * 40),
        ("block_out_channels", [10**9]),
        ("norm_num_groups", None),
        ("num_train_timesteps", True),
        ("class_names", ["a"]),
        ("class_names", [1] * 10),
        ("process", 3),
        ("process", {"alpha_bar": {"20": 0.5}}),
        ("process", {"alpha_bar": {"3": "x"}}),
    ],
)
def test_configs_of_no_classifier_are_refused(saved, key, value):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"config.json': `{key}` is .*; it must be"):
        load_noisy_classifier(saved)


def test_weights_of_another_classifier_are_refused(saved):
    path = saved / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "output.bias"}, path)
    with pytest.raises(ValueError, match="its weights do not fit config.json"):
        load_noisy_classifier(saved)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        load_noisy_classifier(saved)
    with pytest.raises(ValueError, match="`classifier` is .*; it must be a folder that"):
        load_noisy_classifier(saved / "absent")


def test_widths_that_the_groups_do_not_divide_are_refused(saved):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_num_groups": 7}))
    with pytest.raises(ValueError, match="no classifier has these settings"):
        load_noisy_classifier(saved)


def test_the_command_leaves_a_classifier_and_its_record(tiny_ddpm, tmp_path, capsys):
    from ddim_schedulers import MarkovianDDPMScheduler

    pipeline = tiny_ddpm(MarkovianDDPMScheduler())
    pipeline.unet.register_to_config(sample_size=8)
    pipeline.save_pretrained(tmp_path / "p")
    words = ["train-classifier", "--pipeline", str(tmp_path / "p"), "--data", "digits", "--cpu"]
    words += ["--output", str(tmp_path / "c"), "--steps", "3", "--batch_size", "8"]
    assert cli.main([*words, "--class_names", *"abcdefghij"]) == 0
    assert "72 held-out images" in capsys.readouterr().out
    loaded = load_noisy_classifier(tmp_path / "c")
    assert isinstance(loaded, NoisyClassifier) and loaded.names == list("abcdefghij")
    assert loaded.config.process["beta_schedule"] == "linear"
    record = json.loads((tmp_path / "c" / "record.json").read_text())
    assert record["steps"] == 3 and sum(record["found"]["classes"].values()) == 1437
    assert cli.main([*words, "--steps", "0"]) == 2
    assert "`--steps` is 0; it must be at least 1" in capsys.readouterr().err
    assert cli.main([*words, "--validation_fraction", "1"]) == 2
    assert cli.main([*words, "--lr", "0"]) == 2
