"""Classes and guidance in sampling jobs and in the verbs of the command line."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.sampling_job import (
    CONDITION_KEYS,
    Guides,
    SamplingJob,
    sample_to_directory,
)
from ddim_schedulers.training import cli

SIZE = 8
NAMES = ["cat", "hot dog", "T-shirt/top"]


def tiny_unet(classes=4, null=3, names=NAMES, seed=0):
    unet = tiny_models.tiny_unet(seed=seed, num_class_embeds=classes)
    if classes is not None:
        note_class_labels(unet, null, names)
        torch.nn.init.normal_(unet.class_embedding.weight)
    return unet


def pipeline(unet=None):
    pipe = GenerationPipeline(
        unet=unet or tiny_unet(), scheduler=GeneralizedDDIMScheduler(clip_sample=False)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved stock pipelines: with classes, an earlier one of it, and one without classes."""
    folder = tmp_path_factory.mktemp("models")
    networks = {"classes": tiny_unet(), "earlier": tiny_unet(seed=1), "plain": tiny_unet(None)}
    for name, unet in networks.items():
        DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder / name)
    v = DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(unet=tiny_unet(), scheduler=v).save_pretrained(folder / "v")
    other = DDPMScheduler(beta_end=0.03)
    DDPMPipeline(unet=tiny_unet(), scheduler=other).save_pretrained(folder / "other betas")
    return folder


def job(**kwargs):
    return SamplingJob(
        **{
            "num_images": 7,
            "batch_size": 4,
            "num_inference_steps": 3,
            "file_format": "npz",
            **kwargs,
        }
    )


def shards(folder):
    files = [np.load(p) for p in sorted((folder / "shards").glob("*.npz"))]
    return {key: np.concatenate([f[key] for f in files]) for key in files[0].files}


def test_classes_come_in_turn_and_are_recorded(tmp_path):
    pipe = pipeline()
    sample_to_directory(pipe, tmp_path / "all", job(guidance_scale=2.0))
    found = shards(tmp_path / "all")
    assert found["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    same = pipe(
        seeds=range(7),
        class_labels=found["labels"],
        guidance_scale=2.0,
        num_inference_steps=3,
        output_type="np",
    ).images
    assert abs(found["images"].astype(int) - (same * 255).round().astype(int)).max() <= 1
    said = json.loads((tmp_path / "all" / "sample.json").read_text())
    assert said["job"]["class_labels"] == [0, 1, 2] and said["job"]["guidance_scale"] == 2.0
    assert said["null_class"] == 3 and said["job"]["guidance_interval"] is None
    sample_to_directory(pipe, tmp_path / "two", job(class_labels=("T-shirt/top", 0)))
    assert shards(tmp_path / "two")["labels"].tolist() == [2, 0, 2, 0, 2, 0, 2]
    sample_to_directory(pipe, tmp_path / "none", job(guidance_scale=0.0))
    assert "labels" not in shards(tmp_path / "none")


def test_a_png_is_named_after_its_class(tmp_path):
    pngs = job(file_format="png")
    sample_to_directory(pipeline(), tmp_path / "a", pngs)
    names = sorted(p.name for p in (tmp_path / "a" / "images").iterdir())
    assert names[:4] == [
        "000000-cat.png",
        "000001-hot_dog.png",
        "000002-T_shirt_top.png",
        "000003-cat.png",
    ]
    assert (tmp_path / "a" / "grid.png").exists()
    (tmp_path / "a" / "images" / names[5]).unlink()
    report = sample_to_directory(pipeline(), tmp_path / "a", pngs)
    assert (report.written, report.present) == (1, 6)
    more = sample_to_directory(pipeline(), tmp_path / "a", job(file_format="png", num_images=9))
    assert (more.written, more.present, more.complete) == (2, 7, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": (0, 1)}, "job.class_labels"),
        ({"guidance_scale": 3.0}, "job.guidance_scale: 2.0 there, 3.0 now"),
        ({"guidance_interval": (0.1, 0.9)}, "job.guidance_interval"),
        ({"guidance_rescale": 0.5}, "job.guidance_rescale"),
        ({"negative_label": 1}, "job.negative_label"),
    ],
)
def test_other_conditions_are_refused(tmp_path, change, message):
    sample_to_directory(pipeline(), tmp_path, job(guidance_scale=2.0))
    with pytest.raises(ValueError, match=message):
        sample_to_directory(pipeline(), tmp_path, job(**{"guidance_scale": 2.0, **change}))


def test_another_guide_or_null_class_is_refused(tmp_path):
    settings = job(guidance_scale=2.0)
    guides = [Guides(guide=tiny_unet(seed=i)) for i in (1, 2)]
    sample_to_directory(pipeline(), tmp_path, settings, guides=guides[0])
    for other in (guides[1], Guides()):
        with pytest.raises(ValueError, match=r"guide.network"):
            sample_to_directory(pipeline(), tmp_path, settings, guides=other)
    with pytest.raises(ValueError, match="null_class: 3 there, 0 now"):
        unet = tiny_unet(null=0)
        sample_to_directory(pipeline(), tmp_path / "null", settings)
        sample_to_directory(pipeline(unet), tmp_path / "null", settings)


def test_folders_of_earlier_versions_go_on(tmp_path):
    pipe = pipeline(tiny_unet(None))
    sample_to_directory(pipe, tmp_path, job())
    path = tmp_path / "sample.json"
    said = json.loads(path.read_text())
    assert not {"null_class", "guide", "classifier"} & set(said)
    for key in CONDITION_KEYS:  # which those versions did not know
        del said["job"][key]
    path.write_text(json.dumps(said))
    report = sample_to_directory(pipe, tmp_path, job(num_images=9))
    assert report.complete and report.present == 1
    with pytest.raises(ValueError, match="guide.network"):
        guides = Guides(guide=tiny_unet(None, seed=1))
        sample_to_directory(pipe, tmp_path, job(num_images=9, guidance_scale=2.0), guides=guides)


def test_bad_conditions_write_nothing(tmp_path):
    for change, message in (
        ({"class_labels": ("cow",)}, r"`class_labels\[0\]` is 'cow'"),
        ({"guidance_scale": 2.0, "negative_label": 9}, "`negative_label` is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_to_directory(pipeline(), tmp_path / "out", job(**change))
    with pytest.raises(ValueError, match="`class_labels` is given, but `unet` is unconditional"):
        sample_to_directory(pipeline(tiny_unet(None)), tmp_path / "out", job(class_labels=(0,)))
    assert not (tmp_path / "out").exists()
    for change, message in (
        ({"class_labels": ()}, "`class_labels` is empty"),
        ({"guidance_interval": (0.5, 0.2), "guidance_scale": 2.0}, "`guidance_interval`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            job(**change)


def run(verb, models, folder, *options, name="classes"):
    options = [verb, "--pipeline", str(models / name), "--device", "cpu", *options]
    return cli.main([*options, "--num_inference_steps", "2", "--output", str(folder)])


def test_sample_takes_labels_and_guidance(models, tmp_path, capsys):
    few = ["--num_images", "4"]
    guided = ["--labels", "cat", "2", "--guidance_scale", "2", "--guidance_interval", "0.2", "0.8"]
    assert run("sample", models, tmp_path / "a", *few, *guided, "--guidance_rescale", "0.7") == 0
    said = json.loads((tmp_path / "a" / "sample.json").read_text())["job"]
    assert said["class_labels"] == [0, 2] and said["guidance_interval"] == [0.2, 0.8]
    assert said["guidance_rescale"] == 0.7
    guide = ["--guide", str(models / "earlier"), "--guidance_scale", "1.5"]
    assert run("sample", models, tmp_path / "b", *few, *guide) == 0
    said = json.loads((tmp_path / "b" / "sample.json").read_text())
    assert said["job"]["class_labels"] == [0, 1, 2] and "network" in said["guide"]
    negative = ["--labels", "cat", "--guidance_scale", "2", "--negative_label", "hot dog"]
    assert run("sample", models, tmp_path / "c", *few, *negative) == 0
    plain = ["--guide", str(models / "plain"), "--guidance_scale", "2"]
    assert run("sample", models, tmp_path / "d", *few, *plain, name="plain") == 0
    assert run("sample", models, tmp_path / "e", *few, *plain) == 0
    capsys.readouterr()
    for options, message in (
        (
            ["--labels", "cow"],
            "'cow'; it must be the number of a class, 0 to 2, or its name: 'cat'",
        ),
        (["--guidance_interval", "0.2", "0.8"], "`guidance_scale` is None"),
        (["--guide", str(models / "v"), "--guidance_scale", "2"], "`guide` predicts 'v_predic"),
        (["--guide", str(models / "other betas"), "--guidance_scale", "2"], "noise levels"),
        (["--guide", str(tmp_path / "no"), "--guidance_scale", "2"], "--guide"),
    ):
        assert run("sample", models, tmp_path / "bad", *few, *options) != 0
        assert message in capsys.readouterr().err
    assert run("sample", models, tmp_path / "bad", *few, "--labels", "1", name="plain") != 0
    assert "`unet` is unconditional" in capsys.readouterr().err


def test_reconstruct_and_interpolate_take_labels(models, tmp_path, capsys):
    assert run("sample", models, tmp_path / "s", "--num_images", "2") == 0
    images = ["--images", str(tmp_path / "s" / "images")]
    assert run("reconstruct", models, tmp_path / "r", *images, "--labels", "cat", "hot dog") == 0
    assert run("reconstruct", models, tmp_path / "one", *images, "--labels", "1") == 0
    one, two = (
        json.loads((tmp_path / name / "errors.json").read_text())["error"] for name in ("one", "r")
    )
    assert list(one.values())[1] == pytest.approx(list(two.values())[1], rel=1e-3)
    assert list(one.values())[0] != pytest.approx(list(two.values())[0], rel=1e-3)
    assert run("reconstruct", models, tmp_path / "x", *images) != 0
    ends = ["--seeds", "1", "2", "--scheduler", "ddim", "--num_points", "3"]
    between = [*ends, "--labels", "cat", "T-shirt/top", "--guidance_scale", "2"]
    assert run("interpolate", models, tmp_path / "i", *between) == 0
    assert len(list((tmp_path / "i" / "images").iterdir())) == 3
    pair = sorted(map(str, (tmp_path / "s" / "images").iterdir()))
    diffuse = ["--images", *pair, "--mode", "diffuse", "--timestep", "500", "--num_points", "3"]
    assert run("interpolate", models, tmp_path / "d", *diffuse, "--labels", "0", "1") == 0
    capsys.readouterr()
    assert run("interpolate", models, tmp_path / "x", *ends, "--labels", "0", "1", "2") != 0
    assert "`class_labels` has 3 labels for 2 ends" in capsys.readouterr().err
