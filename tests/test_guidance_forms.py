"""A network with classes in the three forms, loaded with and without this package."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, export
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.class_pipeline import ClassConditionalPipeline
from ddim_schedulers.export import save_pipeline
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.training import cli
from ddim_schedulers.training.sharing import cards, hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # see test_hub

TOKEN = "hf_" + "a" * 34
SEEDS = [0, 1, 2]


def network(classes=3, null=2, names=("cat", "dog")):
    unet = tiny_unet(num_class_embeds=classes)
    if classes is not None:
        note_class_labels(unet, null, names)
        torch.nn.init.normal_(unet.class_embedding.weight)
    return unet


def stock(scheduler=None, **settings):
    scheduler = scheduler or GeneralizedDDIMScheduler(eta=0.5)
    return DDPMPipeline(unet=network(**settings), scheduler=scheduler)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each form, and the images of our own pipeline."""
    root = tmp_path_factory.mktemp("forms")
    for form in export.FORMS:
        save_pipeline(stock(), root / form, form)
    pipe = GenerationPipeline.from_pipe(stock())
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(s) for s in SEEDS]
    images = pipe(
        generator=noise,
        class_labels=["cat", "dog", "cat"],
        guidance_scale=2.0,
        num_inference_steps=4,
        output_type="np",
    ).images
    torch.save(torch.from_numpy(images), root / "images.pt")
    return root


PRELUDE = """
import torch
from diffusers import DiffusionPipeline
def load(path, **options):
    pipe = DiffusionPipeline.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
def difference(pipe):
    noise = [torch.Generator().manual_seed(s) for s in (0, 1, 2)]
    settings = {"class_labels": ["cat", "dog", "cat"], "guidance_scale": 2.0}
    images = pipe(generator=noise, num_inference_steps=4, output_type="np", **settings).images
    return float((torch.from_numpy(images) - torch.load(root + "/images.pt")).abs().max())
seen = {}
"""
WITHOUT = """
for place in places:
    try:
        load(place["self-contained"])
    except ValueError as error:
        seen[place["where"], "no trust"] = str(error)
    pipe = load(place["self-contained"], trust_remote_code=True)
    seen[place["where"], "trusted"] = type(pipe).__name__, difference(pipe)
    assert pipe(guidance_scale=0, num_inference_steps=2, num_images=2).images[0].size == (8, 8)
    pipe.save_pretrained("again " + place["where"])
    again = load("again " + place["where"], trust_remote_code=True)
    seen[place["where"], "again"] = type(again).__name__, difference(again)
    portable = load(place["portable"])
    try:
        portable(num_inference_steps=2)
    except ValueError as error:
        seen[place["where"], "portable"] = str(error)
print("RESULT", repr(seen))
"""
WITH = """
import ddim_schedulers
from ddim_schedulers.pipelines import GenerationPipeline
for place in places:
    for form in ("portable", "plug-in", "self-contained"):
        pipe = GenerationPipeline.from_pretrained(place[form])
        pipe.set_progress_bar_config(disable=True)
        if form == "portable":
            from ddim_schedulers import GeneralizedDDIMScheduler as Ours
            pipe.scheduler = Ours.from_config(pipe.scheduler.config)
        seen[place["where"], form] = difference(pipe)
    load(place["plug-in"])
    pipe = load(place["self-contained"], trust_remote_code=True)
    seen[place["where"], "trusted"] = type(pipe).__name__, difference(pipe)
    own = ddim_schedulers.GeneralizedDDIMScheduler(eta=0.5)
    ours = GenerationPipeline.from_pipe(pipe, scheduler=own)
    seen[place["where"], "from_pipe"] = difference(ours)
print("RESULT", repr(seen))
"""


def result(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return eval(re.search(r"RESULT (.*)", done.stdout)[1])


def test_every_form_in_fresh_processes(folders, loopback_hub, fresh_python, rounding):
    loopback_hub.tokens[TOKEN] = ("me", True)
    for form in export.FORMS:
        hub.push_pipeline(folders / form, f"me/{form}", form=form, token=TOKEN)
    places = [{form: str(folders / form) for form in export.FORMS} | {"where": "disk"}]
    places.append({form: f"me/{form}" for form in export.FORMS} | {"where": "hub"})
    online = {"HF_ENDPOINT": loopback_hub.url, "HF_HUB_OFFLINE": "0"}
    head = PRELUDE.replace("seen = {}", f"root, places, seen = {str(folders)!r}, {places!r}, {{}}")

    seen = result(fresh_python(head + WITHOUT, without_package=True, **online))
    for where in ("disk", "hub"):
        assert "trust_remote_code=True" in seen[where, "no trust"]
        for name in ("trusted", "again"):
            kind, apart = seen[where, name]
            assert kind == "ClassConditionalPipeline" and apart < rounding
        assert "class_labels should be provided" in seen[where, "portable"]

    seen = result(fresh_python(head + WITH, **online))
    for where in ("disk", "hub"):
        for form in (*export.FORMS, "from_pipe"):
            assert seen[where, form] < rounding
        assert seen[where, "trusted"][0] == "ClassConditionalPipeline"
        assert seen[where, "trusted"][1] < rounding


def test_the_index_of_each_form_and_the_way_back(folders, tmp_path):
    for form in export.FORMS:
        index = json.loads((folders / form / "model_index.json").read_text())
        codes = [p.name for p in (folders / form).glob("*.py")]
        if form == "self-contained":
            module, name = index["_class_name"]
            assert name == "ClassConditionalPipeline" and codes == [f"{module}.py"]
        else:
            assert index["_class_name"] in ("DDPMPipeline", "DDIMPipeline") and not codes
        for other in export.FORMS:
            made = export.export_folder(folders / form, other)
            again = json.loads(made.files["model_index.json"])
            assert isinstance(again["_class_name"], list) == (other == "self-contained")
            assert len([f for f in made.files if f.endswith(".py")]) == (
                2 if other == "self-contained" else 0
            )
            assert made.classes.names == {0: "cat", 1: "dog"} and not made.left_out
    root = shutil.copytree(folders / "self-contained", tmp_path / "p")
    save_pipeline(GenerationPipeline.from_pretrained(root), root, "portable")
    assert not list(root.rglob("*.py"))


def test_a_stock_scheduler_needs_the_class_pipeline_alone(tmp_path):
    save_pipeline(stock(DDPMScheduler()), tmp_path / "p", "self-contained")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["_class_name"][1] == "ClassConditionalPipeline"
    with pytest.raises(ValueError, match="no scheduler of"):
        save_pipeline(stock(DDPMScheduler()), tmp_path / "q", "plug-in")
    with pytest.raises(ValueError, match="no scheduler of"):
        save_pipeline(stock(DDPMScheduler(), classes=None), tmp_path / "q", "self-contained")
    save_pipeline(stock(classes=None), tmp_path / "r", "self-contained")
    assert json.loads((tmp_path / "r" / "model_index.json").read_text())["_class_name"] == (
        "DDPMPipeline"
    )


def test_the_command_line_reads_every_form(folders, tmp_path):
    """Without running the code of the repository."""
    root = shutil.copytree(folders / "self-contained", tmp_path / "p")
    for code in root.rglob("*.py"):
        code.write_text("raise SystemExit('ran')")
    options = ["--num_images", "2", "--num_inference_steps", "2", "--device", "cpu"]
    for place in (root, folders / "portable", folders / "plug-in"):
        output = tmp_path / f"images of {place.name}"
        words = ["sample", "--pipeline", str(place), *options, "--labels", "dog"]
        assert cli.main([*words, "--output", str(output)]) == 0
        assert len(list((output / "images").glob("*-dog.png"))) == 2
    again = ["export", "--pipeline", str(root), "--form", "self-contained"]
    assert cli.main([*again, "--output", str(tmp_path / "again")]) == 0
    (code,) = (tmp_path / "again").glob("*.py")
    assert "raise SystemExit('ran')" not in code.read_text()


def test_a_card_says_what_its_form_can_do(folders):
    for form in export.FORMS:
        text = cards.render(export.export_folder(folders / form, form), "me/model", form)
        assert "class_labels='cat', guidance_scale=2.0" in text
        assert ("class_labels should be provided" in text) == (form != "self-contained")
        assert ("ClassConditionalPipeline" in text) == (form == "self-contained")
        assert ("trust_remote_code=True" in text) == (form == "self-contained")
        assert "unconditional-image-generation" not in text


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("negative", [None, "dog"])
def test_the_bundled_pipeline_samples_as_ours(w, negative):
    parts = stock(GeneralizedDDIMScheduler(eta=0.5)).components
    bundled, ours = ClassConditionalPipeline(**parts), GenerationPipeline(**parts)
    images = []
    for pipe in (bundled, ours):
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe(
                class_labels=["cat", 1],
                generator=[torch.Generator().manual_seed(s) for s in (0, 1)],
                guidance_scale=w,
                negative_label=negative,
                num_inference_steps=3,
                output_type="pt",
            ).images
        )
    assert (images[0] - images[1]).abs().max() < 1e-5
    assert len(bundled(class_labels="cat", num_images=3, num_inference_steps=1).images) == 3
    assert len(bundled(class_labels=torch.tensor([0, 1]), num_inference_steps=1).images) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`class_labels` is None; it must be the number of a class, 0 to 1"),
        ({"class_labels": "cow"}, "'cow'"),
        ({"class_labels": [0, 1], "num_images": 3}, "`class_labels` has 2 labels for 3 images"),
        ({"class_labels": []}, "`class_labels` has 0 labels"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"class_labels": 0, "negative_label": 5}, "`negative_label` is 5"),
        ({"class_labels": 0, "num_images": 0}, "`num_images` is 0; it must be an integer >= 1"),
        ({"class_labels": 0, "num_images": -1}, "`num_images` is -1"),
        ({"class_labels": 0, "num_images": True}, "`num_images` is True"),
        ({"class_labels": 0, "num_images": 2.0}, "`num_images` is 2.0"),
        ({"guidance_scale": 0, "num_images": 0}, "`num_images` is 0"),
        ({"class_labels": 0, "num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"class_labels": 0, "num_inference_steps": None}, "`num_inference_steps` is None"),
        ({"class_labels": {0, 1}}, r"`class_labels` is \{0, 1\}"),
        ({"class_labels": 0.5}, "`class_labels` is 0.5"),
        ({"class_labels": 0, "eta": -1}, "`eta` is -1"),
        ({"class_labels": 0, "eta": float("nan")}, "`eta` is nan"),
        ({"class_labels": 0, "output_type": "latent"}, "`output_type` is 'latent'"),
    ],
)
def test_the_bundled_pipeline_names_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassConditionalPipeline(**stock().components)(**{"num_inference_steps": 1, **settings})


def test_a_bundled_pipeline_without_a_null_class_or_classes_says_so():
    pipe = ClassConditionalPipeline(**stock(classes=2, null=None).components)
    with pytest.raises(ValueError, match="without a null class"):
        pipe(class_labels=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="`unet` has no classes"):
        ClassConditionalPipeline(**stock(classes=None).components)()
