"""The playground without a browser: settings in, pictures and code out."""

import importlib.util
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from tiny_models import latent_pipeline, tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.training import cli
from ddim_schedulers.training.app.playground import Limits, Playground
from ddim_schedulers.training.app.settings import STOCK, Settings

with_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the extra `app` is not installed"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    unet = tiny_unet(blocks=(8, 8), num_class_embeds=4)
    note_class_labels(unet, 3, ["ant", "bee", "cat"])
    folder = tmp_path_factory.mktemp("app") / "pipeline"
    scheduler = GeneralizedDDIMScheduler(num_train_timesteps=100)
    GenerationPipeline(unet, scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def play(place):
    return Playground(place, "cpu")


@pytest.fixture
def picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.arange(30 * 20, dtype=np.int64).reshape(20, 30) * 7 % 256
    Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save("upload.png")
    return "upload.png"


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def of_python(result):
    names = {}
    exec(result.python, names)
    return names.get("images") or names["output"].images


def of_command(result, folder):
    assert cli.main(shlex.split(result.command)[1:]) == 0
    return [Image.open(path) for path in sorted((folder / "images").rglob("*.png"))]


ddim = Settings("ddim", num_inference_steps=3, num_images=2, labels=("bee", "2"))
SAMPLERS = {
    "saved": Settings(num_inference_steps=3, num_images=2, labels=("ant",)),
    "guided": Settings("ddim", None, 3, 0.5, labels=("bee", "cat"), guidance_scale=2.5, seed=7),
    "ddpm": Settings("ddpm", None, 3, timestep_spacing="trailing", num_images=1, labels=("0",)),
    "few": Settings("ddim", "few", 4, num_images=2, labels=("bee",)),
    "calibrated": Settings("ddim", "calibrated", None, num_images=1, labels=("bee",)),
    "own": Settings(
        "ddim",
        None,
        5,
        0.0,
        solver_order=3,
        solver_form="sample",
        solver_variable="log_rho",
        solver_corrector=False,
        labels=("cat",),
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_and_its_code_give_the_same_images(play, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = SAMPLERS[name]
    result = play.sample(settings)
    assert len(result.images) == len(result.captions) == settings.num_images
    assert (pixels(of_python(result)) == pixels(result.images)).all()
    assert (pixels(of_command(result, tmp_path / "samples")) == pixels(result.images)).all()


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of stock code, with numpy 2
@pytest.mark.parametrize("name", STOCK)
def test_stock_schedulers_have_python_lines_alone(play, name):
    result = play.sample(Settings(name, None, 4, num_images=1, labels=("ant",)))
    assert (pixels(of_python(result)) == pixels(result.images)).all()
    assert result.command.startswith("#") and name in result.command


def test_watch_reports_every_step_and_shows_the_path(play, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = []
    result = play.watch(ddim, lambda text, frame: told.append((text, frame)))
    frames = [frame for _, frame in told if frame is not None]
    assert [text for text, frame in told if frame is not None] == [
        f"step {i + 1}, t = {t}" for i, t in enumerate((66, 33, 0))
    ]
    assert all(frame.size == (2 * 10 + 2, 2 * 10 + 2) for frame in frames)  # x_t over x0_hat
    assert result.captions == ["x_t", "x0_hat"]
    samples = pixels(play.sample(ddim).images)
    assert (pixels(of_python(result)) == samples).all()
    last = result.images[1].crop((30 + 2, 2, 30 + 10, 10))  # the result of the first row
    assert (pixels([last])[0] == samples[0]).all()
    strip = Image.open("path.png")
    assert (np.asarray(strip) == np.asarray(result.images[1])).all()
    assert (pixels(of_command(result, tmp_path / "samples")) == samples).all()


def test_compare_takes_seeds_and_classes_of_the_first(play):
    second = Settings("ddim", None, 5, seed=9, num_images=1, labels=("ant",))
    result = play.compare(ddim, second)
    assert result.python.count("seeds=[0, 1]") == result.python.count("'bee', '2'") == 2
    assert "--output samples-2" in result.command
    same = play.compare(ddim, ddim)
    assert same.note.endswith("0.0000.") and not result.note.endswith("0.0000.")
    assert (pixels(same.images[:1]) == pixels(same.images[1:])).all()


def test_interpolate_ends_at_plain_samples(play, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = Settings("ddim", None, 3, seed=4, num_images=1, labels=("bee",))
    result = play.interpolate(settings, 11, 5)
    assert len(result.images) == 5
    for seed, image in ((4, result.images[0]), (11, result.images[-1])):
        alone = play.sample(Settings("ddim", None, 3, seed=seed, num_images=1, labels=("bee",)))
        assert abs(pixels(alone.images) - pixels([image])).max() <= 1
    assert (pixels(of_python(result)) == pixels(result.images)).all()
    assert (pixels(of_command(result, tmp_path / "chain")) == pixels(result.images)).all()


def test_reconstruct(play, picture, tmp_path, capsys):
    settings = Settings("ddim", None, 20, num_images=2, labels=("bee", "ant"))
    result = play.reconstruct(settings, picture, "resize_crop", 2)
    assert "30x20 was resized and cut to its middle: 8x8" in result.note
    result.files["picture.png"].save("picture.png")
    again = result.images[1:]
    assert (pixels(of_python(result)) == pixels(again)).all()
    assert (pixels(of_command(result, tmp_path / "again")) == pixels(again)).all()
    error = float(re.search(r"in 0 \.\. 1: ([\d.e-]+)\.$", result.note)[1])
    # an unclamped error; the clamped images are no further apart
    assert ((pixels(again) - pixels(result.images[:1])) ** 2).mean() / 255**2 <= error + 1e-3


@pytest.mark.parametrize("own_mask", [False, True])
def test_restore_keeps_what_is_known(play, picture, own_mask, tmp_path, capsys):
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 15:] = 255
    Image.fromarray(mask).save("upload-mask.png")
    given = "upload-mask.png" if own_mask else None
    result = play.restore(ddim, picture, "squash", "half", given)
    for name, image in result.files.items():
        image.save(name)
    known = np.s_[:, :, 4:] if own_mask else np.s_[:, :, :4]
    found, original = pixels(result.images[2:]), pixels(result.images[:1])
    assert abs(found[known] - original[known]).max() <= 1
    assert (pixels(of_python(result)) == found).all()
    assert (pixels(of_command(result, tmp_path / "restored")) == found).all()


def refuse(words, call, *arguments):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(*arguments)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_images": 0}, "`num_images` is 0; it must be an integer in 1 .. 16."),
        ({"num_images": 17}, "`num_images` is 17;"),
        ({"num_inference_steps": 251}, "`num_inference_steps` is 251;"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0;"),
        ({"seed": -1}, "`seed` is -1;"),
        ({"seed": None}, "`seed` is None;"),
        ({"labels": ("dog",)}, "dog"),
        ({"scheduler": "euler"}, "`scheduler` is 'euler';"),
        ({"scheduler": "ddpm", "preset": "few"}, "`--preset` is 'few';"),
        ({"scheduler": "UniPCMultistepScheduler", "solver_order": 2}, "`solver_order` is 2;"),
        ({"scheduler": "saved", "solver_order": 2}, "`--solver_order` is 2;"),
        ({"solver_order": 9}, "argument --solver_order: invalid choice: 9"),
        ({"eta": -1.0}, "`eta` is -1.0"),
    ],
)
@pytest.mark.parametrize("method", ["sample", "watch"])
def test_bad_settings_are_refused_before_a_network_call(play, change, words, method):
    settings = Settings(**{**vars(ddim), **change})

    def never(text, picture):
        raise AssertionError(text)

    refuse(words, getattr(play, method), settings, never)


def test_a_bad_second_sampler_is_refused_before_a_network_call(play):
    told = []
    second = Settings("ddim", None, 999)
    refuse("`num_inference_steps` is 999;", play.compare, ddim, second, lambda *a: told.append(a))
    assert told == []


def test_bad_pictures_are_refused(play, picture, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    for method in (play.reconstruct, play.restore):
        refuse("`picture` is missing", method, ddim, None)
        for fit in ("exact", "squash"):
            refuse("it must be an image.", method, ddim, "no.png", fit)
        refuse("has mode 'RGB'", method, ddim, picture, "exact")
        refuse("`fit` is 'pad'; it must be one of", method, ddim, picture, "pad")
    refuse("`mask` is 'left'", play.restore, ddim, picture, "squash", "left")
    refuse("grey pixels", play.restore, ddim, picture, "squash", "half", picture)
    refuse("`num_points` is 1;", play.interpolate, ddim, 1, 1)
    refuse("`refinements` is 99;", play.reconstruct, ddim, picture, "squash", 99)
    few = Settings("ddim", "few", 3)
    refuse("plain DDIM of order 1", play.reconstruct, few, picture, "squash")


def test_pixels_of_an_upload_are_limited(place, picture):
    small = Playground(place, "cpu", Limits(pixels=100))
    refuse("600", small.reconstruct, ddim, picture, "squash")


def test_a_run_that_is_stopped_leaves_the_network_as_it_was(play):
    calls = []

    def stop(text, picture):
        calls.append(text)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play.sample(ddim, stop)
    assert len(calls) == 2
    play.sample(ddim)
    assert len(calls) == 2


def test_a_network_without_classes(tiny_ddpm, tmp_path):
    tiny_ddpm(MarkovianDDPMScheduler()).save_pretrained(tmp_path / "p")
    play = Playground(str(tmp_path / "p"), "cpu")
    assert play.class_names() == []
    result = play.sample(Settings("ddim", None, 2, num_images=1))
    assert "labels" not in result.python + result.command


def test_digits_is_what_comes_with_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    play = Playground("digits", "cpu")
    result = play.sample(Settings("ddim", None, 2, num_images=1))
    assert "--pipeline digits " in result.command and str(tmp_path.anchor) not in result.python
    assert (pixels(of_python(result)) == pixels(result.images)).all()
    assert (pixels(of_command(result, tmp_path / "samples")) == pixels(result.images)).all()
    tiny = GenerationPipeline.from_pretrained(play.saved.config._name_or_path)
    tiny.save_pretrained("digits")  # a folder of that name wins
    local = Playground("digits", "cpu").sample(Settings("ddim", None, 2, num_images=1))
    assert "from_pretrained('digits')" in local.python


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "pipeline"
    latent_pipeline().save_pretrained(folder)
    return Playground(str(folder), "cpu")


def test_latents_are_decoded(latent, picture, tmp_path, capsys):
    two = Settings("ddim", None, 3, num_images=2)
    sampled = latent.sample(two)
    assert all(image.size == (8, 8) for image in sampled.images)
    told = []
    watched = latent.watch(two, lambda text, frame: told.append(frame))
    assert {frame.size for frame in told if frame is not None} == {(22, 22)}
    assert [image.size for image in watched.images] == [(42, 22), (42, 22)]
    assert (pixels(of_python(watched)) == pixels(sampled.images)).all()
    assert (np.asarray(Image.open("path.png")) == np.asarray(watched.images[1])).all()
    chain = latent.interpolate(two, 9, 3)
    assert (pixels(of_command(chain, tmp_path / "chain")) == pixels(chain.images)).all()
    again = latent.reconstruct(two, picture, "squash")
    again.files["picture.png"].save("picture.png")
    assert (pixels(of_python(again)) == pixels(again.images[1:])).all()


@with_gradio
def test_latents_have_no_restoration(latent, play, picture, fresh_python):
    refuse("it must be left out of RestorationPipeline", latent.restore, Settings(), picture)
    # a page that is not served leaves an event loop open, so it is built elsewhere
    code = f"""
from ddim_schedulers.training.app.page import make_page
from ddim_schedulers.training.app.playground import Playground
for place in {[latent.place, play.place]}:
    shown = str(make_page(Playground(place, "cpu")).get_config_file())
    print("a measurement is of pixels" in shown, "restore_run" in shown)
"""
    done = fresh_python(code)
    assert done.stdout.split() == ["True", "False", "False", "True"], done.stderr


@with_gradio
def test_a_space_holds_the_page_and_the_pipeline(place, tmp_path, monkeypatch, capsys):
    from huggingface_hub import metadata_load

    folder = tmp_path / "space"
    assert cli.main(["app", "--pipeline", place, "--export_space", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(p) for p in sorted(folder.rglob("*")) if p.is_file()
    ]
    card = metadata_load(folder / "README.md")
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert re.search(r"^ddim-schedulers\[app\]==", (folder / "requirements.txt").read_text(), re.M)
    text = (folder / "app.py").read_text()
    compile(text, "app.py", "exec")
    assert "serve('pipeline', host=\"0.0.0.0\", port=7860)" in text
    again = Playground(str(folder / "pipeline"), "cpu").sample(ddim)
    assert (pixels(again.images) == pixels(Playground(place, "cpu").sample(ddim).images)).all()
    assert cli.main(["app", "--pipeline", place, "--export_space", str(folder)]) == 2
    assert "new or an empty folder" in capsys.readouterr().err


@with_gradio
def test_a_space_that_cannot_be_written_leaves_nothing(place, tmp_path, monkeypatch):
    from ddim_schedulers.training.app import space

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(space.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        space.write_space(place, str(tmp_path / "space"))
    assert list(tmp_path.iterdir()) == []
