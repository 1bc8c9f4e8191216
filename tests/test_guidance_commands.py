"""Classes and guidance in sampling jobs and in the verbs of the command line."""

import json
import shutil

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
from ddim_schedulers.training.metrics.features import SmallClassifier, save_classifier
from ddim_schedulers.training.networks.noisy_classifier import load_noisy_classifier

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


def test_sample_takes_labels_and_guidance(models, tmp_path, capsys, log):
    few = ["--num_images", "4"]
    guided = ["--labels", "cat", "2", "--guidance_scale", "2", "--guidance_interval", "0.2", "0.8"]
    assert run("sample", models, tmp_path / "a", *few, *guided, "--guidance_rescale", "0.7") == 0
    said = json.loads((tmp_path / "a" / "sample.json").read_text())["job"]
    assert said["class_labels"] == [0, 2] and said["guidance_interval"] == [0.2, 0.8]
    assert said["guidance_rescale"] == 0.7
    guide = ["--guide", str(models / "earlier"), "--guidance_scale", "1.5"]
    assert run("sample", models, tmp_path / "b", *few, *guide, "--dtype", "bfloat16") == 0
    assert "float32" not in log.text
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
            "`--labels[0]` is 'cow'; it must be the number of a class, 0 to 2, or its name: 'cat'",
        ),
        (["--guidance_interval", "0.2", "0.8"], "`guidance_scale` is None"),
        (["--guide", str(models / "v"), "--guidance_scale", "2"], "`guide` predicts 'v_predic"),
        (["--guide", str(models / "other betas"), "--guidance_scale", "2"], "noise levels"),
        (["--guide", str(tmp_path / "no"), "--guidance_scale", "2"], "--guide"),
    ):
        assert run("sample", models, tmp_path / "bad", *few, *options) != 0
        assert message in capsys.readouterr().err
    assert run("sample", models, tmp_path / "bad", *few, "--labels", "1", name="plain") != 0
    assert "`--labels` is given, but `unet` is unconditional" in capsys.readouterr().err


def train_classifier(models, folder, *options):
    words = ["train-classifier", "--pipeline", str(models / "plain"), "--cpu"]
    words += ["--data", str(models / "set.npz"), "--output", str(folder), "--steps", "3"]
    assert cli.main([*words, "--batch_size", "4", "--lr", "0.1", *options]) == 0


@pytest.fixture(scope="module")
def classifier(models):
    """A folder that `train-classifier` made for the network without classes."""
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 80, (60, SIZE, SIZE)) + 80 * labels[:, None, None]
    np.savez(models / "set.npz", images=images.astype(np.uint8), labels=labels)
    train_classifier(models, models / "classifier", "--class_names", *NAMES)
    return models / "classifier"


def test_sample_takes_a_classifier(models, classifier, tmp_path):
    leads = ["--num_images", "4", "--labels", "hot dog", "--format", "npz", "--batch_size", "4"]
    leads += ["--classifier", str(classifier)]
    for name, w in (("none", "0"), ("some", "50")):
        options = [*leads, "--guidance_scale", w]
        assert run("sample", models, tmp_path / name, *options, name="plain") == 0
    pipe = GenerationPipeline.from_pretrained(models / "plain")
    pipe.set_progress_bar_config(disable=True)
    settings = {"seeds": range(4), "num_inference_steps": 2, "output_type": "np"}
    alone = pipe(**settings).images
    network = load_noisy_classifier(classifier)
    guided = pipe(class_labels="hot dog", guidance_scale=50, classifier=network, **settings).images
    for folder, expected in (("none", alone), ("some", guided)):
        found = shards(tmp_path / folder)
        assert found["labels"].tolist() == [1] * 4
        assert abs(found["images"] / 255 - expected).max() <= 1.01 / 255
    assert abs(alone - guided).max() > 0.02
    said = json.loads((tmp_path / "some" / "sample.json").read_text())
    assert "network" in said["classifier"]


def test_a_classifier_that_does_not_fit_is_named(models, classifier, tmp_path, capsys):
    def refused(message, path, name="plain", labels=("--labels", "0")):
        options = ["--num_images", "2", *labels, "--guidance_scale", "2", "--classifier", str(path)]
        assert run("sample", models, tmp_path / "bad", *options, name=name) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()

    def edited(**change):
        folder = tmp_path / "edited"
        shutil.copytree(classifier, folder, dirs_exist_ok=True)
        config = json.loads((classifier / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    refused(
        "`classifier` has sample_size=[16, 16]; it must be (8, 8)", edited(sample_size=[16, 16])
    )
    refused(
        "`classifier` has num_train_timesteps=900; it",
        edited(num_train_timesteps=900, process=None),
    )
    refused("at t = 100; it must be 0.895", edited(process={"alpha_bar": {"100": 0.9}}))
    other = edited(class_names=["cat", "bun", "shirt"])
    refused("`classifier` calls class 1 'bun'; it must be 'hot dog'", other, name="classes")
    refused("`--labels[0]` is 'cow'; it must be", classifier, labels=("--labels", "cow"))
    refused("`--labels` is None; with a `classifier` it must be a class", classifier, labels=())
    train_classifier(models, tmp_path / "four", "--class_names", *"abcd")
    refused("`classifier` has the classes 0 to 3; it must", tmp_path / "four", name="classes")
    judge = SmallClassifier((1, SIZE, SIZE), 3)
    save_classifier(judge, {}, tmp_path / "judge.safetensors")
    refused("it must be a folder that `ddim-schedulers train", tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match="SmallClassifier, whose forward does not take"):
        pipeline(tiny_unet(None))(class_labels=0, guidance_scale=2, classifier=judge)


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
    assert "`--labels` has 3 labels for 2 ends" in capsys.readouterr().err
    grid = ["--seeds", *"1234", "--scheduler", "ddim", "--mode", "grid", "--num_points", "1"]
    assert run("interpolate", models, tmp_path / "x", *grid, "--labels", "cat") != 0
    assert "`--num_points` is 1; it must be an integer >= 2" in capsys.readouterr().err
