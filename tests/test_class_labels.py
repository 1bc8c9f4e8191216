"""The classes of a network: what is kept with it, and what is refused."""

import copy

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from tiny_models import tiny_unet

from ddim_schedulers.class_labels import (
    ClassLabels,
    class_labels_of,
    labels_in,
    note_class_labels,
)
from ddim_schedulers.network_config import check_saved
from ddim_schedulers.settings import SETTINGS_KEY

NAMES = ("cat", "dog", "7")


def test_the_null_class_and_the_names_stay_with_a_network(tmp_path, caplog):
    unet = tiny_unet(num_class_embeds=4)
    note_class_labels(unet, 3, NAMES)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    check_saved(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    again.save_pretrained(tmp_path / "again")
    third = UNet2DModel.from_pretrained(tmp_path / "again")
    expected = ClassLabels(4, 3, dict(enumerate(NAMES)))
    for model in (unet, copy.deepcopy(unet), loaded, loaded.unet, again, third):
        assert class_labels_of(model) == expected
    assert class_labels_of(UNet2DModel.from_config(third.config)) == expected
    assert not [r for r in caplog.records if "not expected" in r.getMessage()]


def test_a_network_of_others_has_numbers_alone():
    assert class_labels_of(tiny_unet()) is None
    labels = class_labels_of(tiny_unet(num_class_embeds=3))
    assert labels == ClassLabels(3)
    assert labels.ids == (0, 1, 2)
    assert labels.name(1) == "1"


def test_a_label_is_a_name_or_a_number():
    labels = ClassLabels(4, 3, dict(enumerate(NAMES)))
    assert [labels.number(x) for x in ("cat", "dog", 2, "1", "7")] == [0, 1, 2, 1, 2]
    assert labels.balanced(5) == [0, 1, 2, 0, 1]
    assert ClassLabels(3, 0).balanced(3) == [1, 2, 1]
    assert labels.name(3) == "no class"


@pytest.mark.parametrize("label", ["Cat", "", "3", 3, 4, -1, "-1", True, 1.0, None, "99999999999"])
def test_labels_that_no_class_has_are_refused(label):
    labels = ClassLabels(4, 3, dict(enumerate(NAMES)))
    with pytest.raises(ValueError, match=r"`class_labels` is .*; it must be .*0 to 2.*'cat'"):
        labels.number(label)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"class_embed_type": "identity", "num_class_embeds": 3}, "class_embed_type"),
        ({"num_class_embeds": 0}, "num_class_embeds"),
        ({"num_class_embeds": 2.0}, "num_class_embeds"),
        ({"num_class_embeds": True}, "num_class_embeds"),
        ({"num_class_embeds": 10**7}, "num_class_embeds"),
        ({SETTINGS_KEY: {"null_class": 2}}, SETTINGS_KEY),
        ({"num_class_embeds": 3, SETTINGS_KEY: [2]}, SETTINGS_KEY),
        *(
            ({"num_class_embeds": 3, SETTINGS_KEY: {"null_class": value}}, "null_class")
            for value in (3, -1, True, "2", 1.0)
        ),
        ({"num_class_embeds": 1, SETTINGS_KEY: {"null_class": 0}}, "null_class"),
        *(
            (
                {"num_class_embeds": 3, SETTINGS_KEY: {"null_class": 2, "id2label": value}},
                "id2label",
            )
            for value in (["a"], {"2": "a"}, {"3": "a"}, {"a": "a"}, {"0": ""}, {"0": 1})
        ),
        *(
            ({"num_class_embeds": 3, SETTINGS_KEY: {"id2label": value}}, "id2label")
            for value in (
                *(["a"], {"3": "a"}, {"a": "a"}, {"0": ""}, {"0": 1}),
                *({"0": "a", "1": "a"}, {"0": "a\nb"}, {"0": "a" * 201}, {"0": " a"}),
            )
        ),
    ],
)
def test_configs_that_contradict_themselves_are_refused(config, key):
    with pytest.raises(ValueError, match=rf"^`{key}` is .*; it must be"):
        labels_in(config)


def test_names_that_do_not_fit_are_not_noted():
    unet = tiny_unet(num_class_embeds=3)
    with pytest.raises(ValueError):
        note_class_labels(unet, 2, ["a"])
    with pytest.raises(ValueError, match="`id2label`"):
        note_class_labels(unet, 2, ["a", "a"])
    assert class_labels_of(unet) == ClassLabels(3)


def test_a_repository_with_such_a_config_is_refused_before_it_is_loaded(tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    unet.register_to_config(**{SETTINGS_KEY: {"null_class": 7}})
    unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json': `null_class` is '7'"):
        check_saved(tmp_path)
