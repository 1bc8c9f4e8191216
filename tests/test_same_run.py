"""A resumed run is the same run: data, gamma, network and precision by contents, not by names."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import UNET, quick_config

from ddim_schedulers.training.data.sources import ArraySource, FolderSource, Reading
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.train import train
from ddim_schedulers.training.trainer import contents, same_run
from ddim_schedulers.training.trainer.contents import images_fingerprint
from ddim_schedulers.training.trainer.trainer import Trainer


def picture(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def settings(tmp_path):
    for number in range(8):
        picture(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    np.save(tmp_path / "gamma.npy", np.linspace(1, 2, 10))

    def make(**changes):
        values = {
            "data": str(tmp_path / "images"),
            "loss": "gamma",
            "gamma": str(tmp_path / "gamma.npy"),
            "num_train_timesteps": 10,
            "batch_size": 4,
            "max_train_steps": 4,
            "stop_after": 1,
            "resume": "latest",
        }
        return quick_config(tmp_path, "run", **values | changes)

    return make


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(same_run.logger, "warning", said.append)
    return said


def change_state(config, change):
    folder = checkpoints.listed(Path(config.output_dir) / "checkpoints")[0]
    state = json.loads((folder / "state.json").read_text())
    change(state)
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["state.json"]
    entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_run_is_told_by_contents_and_not_by_names_of_files(settings, tmp_path, warned):
    train(settings())
    assert Trainer(settings()).step == 1 and warned == []
    images, gamma, unet = tmp_path / "images", tmp_path / "gamma.npy", tmp_path / "unet.json"

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message) as error:
            Trainer(settings(**changes))
        assert "new run" in str(error.value)  # and how to go on

    whole = (images / "3.png").read_bytes()
    picture(images / "3.png", 99)  # another picture under the same name
    refused("the images, their bytes or their names are not those")
    (images / "3.png").write_bytes(whole)
    (images / "3.png").rename(images / "9.png")  # the same pictures in another order
    refused("the images, their bytes or their names are not those")
    (images / "9.png").rename(images / "3.png")
    np.save(gamma, np.linspace(1, 3, 10))
    refused("the weights in the file of gamma are not those")
    np.save(gamma, np.linspace(1, 2, 10))
    unet.write_text(json.dumps(UNET | {"attention_head_dim": 4}))
    refused("another network: attention_head_dim was 8 and is 4")
    unet.write_text(json.dumps(UNET | {"dropout": 0.1}))
    refused("another network: dropout was 0.0 and is 0.1")
    unet.write_text(json.dumps(UNET))
    refused("another precision: mixed_precision was 'no' and is 'bf16'", mixed_precision="bf16")
    refused("another precision: allow_tf32 was False and is True", allow_tf32=True)
    refused("background was 'white' and is 'black'", background="black")

    images.rename(tmp_path / "moved")  # the same pictures in another place are the same data
    gamma.rename(tmp_path / "weights.npy")
    unet.rename(tmp_path / "network.json")
    moved = {
        "data": str(tmp_path / "moved"),
        "gamma": str(tmp_path / "weights.npy"),
        "model": str(tmp_path / "network.json"),
    }
    assert Trainer(settings(**moved)).step == 1
    (tmp_path / "moved" / "new.txt").write_text("")  # what is not used does not count
    assert Trainer(settings(**moved)).step == 1
    assert warned == []


@pytest.mark.parametrize("package", ["torch", "ddim_schedulers"])
def test_other_versions_are_warned_about_once(settings, warned, package):
    train(settings())
    change_state(settings(), lambda state: state["versions"].update({package: "0.0.1"}))
    assert Trainer(settings()).step == 1
    assert len(warned) == 1 and f"{package} was 0.0.1 and is " in warned[0]


def test_a_run_from_before_goes_on_with_a_warning(settings, warned, tmp_path):
    train(settings())

    def before(state):
        del state["contents"]
        for name in ("background", "max_image_pixels"):
            del state["config"][name]

    change_state(settings(), before)
    picture(tmp_path / "images" / "3.png", 99)
    assert Trainer(settings()).step == 1
    assert len(warned) == 1 and "does not hold the images, their bytes or their nam" in warned[0]
    (tmp_path / "images").rename(tmp_path / "moved")  # without a record the name must do
    with pytest.raises(ValueError, match=r"data was .*images' and is .*moved'"):
        Trainer(settings(data=str(tmp_path / "moved")))
    train(settings(data=str(tmp_path / "moved"), output_dir=str(tmp_path / "other")))


def test_a_run_from_before_on_a_folder_of_splits_goes_on_with_all(settings, warned, tmp_path):
    for number in range(3):
        picture(tmp_path / "split" / "train" / f"{number}.png", number)
        picture(tmp_path / "split" / "test" / f"{number}.png", 9 + number)
    data = str(tmp_path / "split")
    train(settings(data=data, split="all"))

    def before(state):
        del state["contents"]
        state["config"]["split"] = "train"  # which was read as nothing

    change_state(settings(), before)
    with pytest.raises(ValueError, match=r"split train of test, train; split 'all' reads all"):
        Trainer(settings(data=data))
    assert Trainer(settings(data=data, split="all")).step == 1


def test_a_run_says_what_it_found_and_writes_it_down(settings, tmp_path, capsys):
    (tmp_path / "images" / "labels.txt").write_text("")
    train(settings())
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"data: {tmp_path}/images: 9 found, 8 used; left out 1: no image by")
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert record["line"] == line and record["found"] == 9 and record["used"] == 8
    assert record["sizes"] == {"8x8": 8} and record["modes"] == {"L": 8}
    assert record["digest"]["of"] == "names and bytes of all 8 images"
    assert len(record["digest"]["sha256"]) == 64


def folder(path, names="abcdefgh"):
    for number, name in enumerate(names):
        picture(path / f"{name}.png", number)
    return FolderSource(path, Reading(), "train")


def test_a_large_set_is_told_by_a_sample_that_is_stated(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "WHOLE", 100)
    monkeypatch.setattr(contents, "SAMPLE", 3)
    one = images_fingerprint(folder(tmp_path / "one"))
    assert "names and sizes of all 8 images" in one["of"] and "of 3 of them" in one["of"]
    assert images_fingerprint(folder(tmp_path / "two")) == one
    for change in (
        lambda at: picture(at / "h.png", 99),  # the last one is in every sample
        lambda at: (at / "c.png").rename(at / "cc.png"),  # names and sizes are compared for all
        lambda at: (at / "f.png").write_bytes((at / "f.png").read_bytes() + b" "),
        lambda at: picture(at / "i.png", 8),
        lambda at: (at / "b.png").unlink(),
    ):
        folder(tmp_path / "three")
        (tmp_path / "three" / "cc.png").unlink(missing_ok=True)
        (tmp_path / "three" / "i.png").unlink(missing_ok=True)
        change(tmp_path / "three")
        source = FolderSource(tmp_path / "three", Reading(), "train")
        assert images_fingerprint(source)["sha256"] != one["sha256"]


@pytest.mark.parametrize("whole", [10, 2**20])
def test_arrays_are_told_apart_by_a_value_a_shape_or_a_dtype(monkeypatch, whole):
    monkeypatch.setattr(contents, "WHOLE", whole)
    images = np.arange(4 * 8 * 6, dtype=np.uint8).reshape(4, 8, 6)
    other = images.copy()
    other[-1, -1, -1] += 1
    arrays = [
        images,
        other,
        images.reshape(4, 6, 8),
        images.view(np.int8),
        images[::-1],
        images[:3],
    ]
    digests = [images_fingerprint(ArraySource(array, "a"))["sha256"] for array in arrays]
    assert len(set(digests)) == len(arrays)
    assert images_fingerprint(ArraySource(images.copy(), "b"))["sha256"] == digests[0]


COUNTED = """
import json, os, sys
from pathlib import Path
from ddim_schedulers.training.trainer import contents
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.common.processes import settle
from ddim_schedulers.training.trainer.trainer import Trainer
real = contents.images_fingerprint
def counted(*arguments):
    Path(sys.argv[2], os.environ["RANK"]).write_text("")
    return real(*arguments)
contents.images_fingerprint = counted
trainer = Trainer(TrainingConfig(**json.loads(sys.argv[1])))
assert trainer.accelerator.num_processes == 2
assert len(trainer.contents["data"]["sha256"]) == 64
settle()
"""


def test_the_digest_is_made_once_for_several_processes(settings, tmp_path, processes):
    script = tmp_path / "count.py"
    script.write_text(COUNTED)
    (tmp_path / "counts").mkdir()
    values = json.dumps(settings().to_dict())
    _, err = processes([script, values, tmp_path / "counts"], 2, tmp_path)
    assert [path.name for path in (tmp_path / "counts").iterdir()] == ["0"]
    assert err.count("data: ") == 1
