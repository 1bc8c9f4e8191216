"""What `ddim_schedulers.training` exports, and the names that moved."""

import importlib
import itertools
import subprocess
import sys

import pytest

import ddim_schedulers.training
from ddim_schedulers.training import TrainingConfig, train
from ddim_schedulers.training.train import train as function

ROOM = "ddim_schedulers.training"
# Each is one way in which a user reaches `train`, or imports a module on the way.
WAYS = {
    "export": "from ddim_schedulers.training import train",
    "attribute": "import ddim_schedulers.training; train = ddim_schedulers.training.train",
    "module": "import ddim_schedulers.training.train",
    "function": "from ddim_schedulers.training.train import train",
    "config": "from ddim_schedulers.training import TrainingConfig",
    "star": "from ddim_schedulers.training import *",
}


def run(code):
    words = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_is_called_with_the_config_alone(monkeypatch):
    called = []
    monkeypatch.setattr(train, "train", lambda config: called.append(config) or "result")
    config = TrainingConfig()
    assert train(config) == "result"
    assert ddim_schedulers.training.train(config) == "result"
    assert called == [config, config]
    with pytest.raises(TypeError):
        train()


def test_the_module_and_the_function_are_one():
    assert train.train is function
    assert train is sys.modules[f"{ROOM}.train"]
    assert train.__call__.__doc__ == function.__doc__
    assert {"TrainingConfig", "train"} <= set(dir(ddim_schedulers.training))


def test_train_can_be_called_whatever_was_imported_before():
    # in one process: what an import binds does not depend on the others but through these modules
    code = f"""
import itertools, sys, ddim_schedulers
for ways in itertools.permutations({list(WAYS.values())!r}, 2):
    for name in [n for n in sys.modules if n.startswith({ROOM!r})]:
        del sys.modules[name]
    vars(ddim_schedulers).pop("training", None)
    names = {{}}
    for way in ways:
        exec(way, names)
    exec("from ddim_schedulers.training import train, TrainingConfig", names)
    sys.modules[{f"{ROOM}.train"!r}].train = lambda config: ("trained", config)
    config = names["TrainingConfig"]()
    for found in (names["train"], sys.modules[{ROOM!r}].train):
        assert found(config) == ("trained", config), ways
"""
    assert len(list(itertools.permutations(WAYS, 2))) == 30
    run(code)


def test_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError, match="ddim_schedulers.training.*'trian'"):
        ddim_schedulers.training.trian  # noqa: B018
    with pytest.raises(ImportError, match="TrainingConfg"):
        exec("from ddim_schedulers.training import TrainingConfg")


@pytest.mark.parametrize("module", ["train", "cli"])
def test_help_of_a_module_that_is_run_warns_of_nothing(module):
    words = [sys.executable, "-W", "error", "-m", f"{ROOM}.{module}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


# Every public name that these modules had when they moved.
MOVED = {
    "learned_betas.LearnedBetas": "likelihood.learned_betas",
    "learned_betas.learn_betas": "likelihood.learned_betas",
    "learned_betas.save_betas": "likelihood.learned_betas",
    "learned_betas.LOG_SNR_MAX": "likelihood.learned_betas",
    "learned_betas.LOG_SNR_MIN": "likelihood.learned_betas",
    "features.CLASSIFIER_KIND": "metrics.features",
    "features.DINOV2": "metrics.features",
    "features.IMAGENET_MEAN": "metrics.features",
    "features.IMAGENET_STD": "metrics.features",
    "features.DinoFeatures": "metrics.features",
    "features.InceptionFeatures": "metrics.features",
    "features.PooledPixels": "metrics.features",
    "features.SmallClassifier": "metrics.features",
    "features.class_names": "metrics.features",
    "features.extract": "metrics.features",
    "features.load_classifier": "metrics.features",
    "features.make_feature_space": "metrics.features",
    "features.save_classifier": "metrics.features",
    "features.train_classifier": "metrics.features",
    "metrics.frechet_distance": "metrics.distances",
    "metrics.kernel_distance": "metrics.distances",
    "metrics.neighbour_metrics": "metrics.distances",
    "metrics.inception_score": "metrics.distances",
}


@pytest.mark.parametrize("former", MOVED)
def test_a_former_name_is_the_same_object_and_names_its_new_place(former):
    place, name = former.split(".")
    home = f"{ROOM}.{MOVED[former]}"
    with pytest.warns(DeprecationWarning, match=f"is now {home}.{name};") as warned:
        found = {}
        exec(f"from {ROOM}.{place} import {name}", found)
    assert found[name] is getattr(importlib.import_module(home), name)
    assert {w.filename for w in warned} == {"<string>"}  # the line that imports is blamed
    with pytest.raises(AttributeError, match=place):
        getattr(importlib.import_module(f"{ROOM}.{place}"), name + "s")


@pytest.mark.parametrize(
    ("place", "name", "now"),
    [
        ("ddim_schedulers.likelihood", "Plan", "Chain"),
        ("ddim_schedulers.likelihood", "make_plan", "make_chain"),
        (f"{ROOM}.features", "classifier_record", "classifier_facts"),
        (f"{ROOM}.features", "fingerprint", "space_fingerprint"),
    ],
)
def test_a_former_word_is_the_same_object_and_gives_the_present_one(place, name, now):
    module = importlib.import_module(place)
    with pytest.warns(DeprecationWarning, match=f"{place}.{name} is now .*[.]{now};") as warned:
        found = getattr(module, name)
    home = str(warned[0].message).split(" is now ")[1].partition(f".{now};")[0]
    assert found is getattr(importlib.import_module(home), now)
    assert name not in getattr(module, "__all__", ())


def test_names_that_stayed_warn_of_nothing():
    code = """
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.parsing import load_config, parse_args, read_file, to_yaml
from ddim_schedulers.training.train import main, train
from ddim_schedulers.training.cli import main
assert load_config(lr=1e-3) == TrainingConfig(lr=1e-3)
"""
    run(code)
