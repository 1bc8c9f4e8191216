"""What is taken from a folder: splits, links, hidden and foreign files; places that are no data."""

import io
import os
import signal
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.folders import IMAGE_SUFFIXES
from ddim_schedulers.training.data.images import load_data


@pytest.fixture(autouse=True)
def _ends():
    """Ends a test that waits for a pipe or walks in circles."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def save(folder, name, shade=0, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = None if path.suffix else "PNG"
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path, kind, **options)


def load(folder, **settings):
    return load_data(TrainingConfig(data=str(folder), validation_fraction=0.0, **settings))[0]


def used(folder, **settings):
    data = load(folder, **settings)
    return {Path(name).relative_to(folder).as_posix() for name in data.names(range(len(data)))}


# Places of images -> what is trained on, for each split; None where the split is refused.
LAYOUTS = {
    "splits": (
        ["train/a", "validation/b", "test/c"],
        {"train": ["train/a"], "test": ["test/c"], "val": ["validation/b"], "nonsense": None},
    ),
    "other names": (["Train/a", "Val/b"], {"train": ["Train/a"], "valid": ["Val/b"], "test": None}),
    "joined": (
        ["training/a", "dev/b", "testing/c"],
        {"train+test": ["training/a", "testing/c"], "all": ["training/a", "dev/b", "testing/c"]},
    ),
    "classes in splits": (
        ["train/cat/a", "train/dog/b", "test/cat/c"],
        {"train": ["train/cat/a", "train/dog/b"], "test": ["test/cat/c"]},
    ),
    "splits in classes": (
        ["cat/train/a", "cat/test/b", "dog/train/c", "dog/test/d"],
        {"train": ["cat/train/a", "dog/train/c"], "test": ["cat/test/b", "dog/test/d"]},
    ),
    "further down": (
        ["set/images/train/a", "set/images/test/b"],
        {"train": ["set/images/train/a"]},
    ),
    "years": (["train2017/a", "val2017/b"], {"train": ["train2017/a"], "val": ["val2017/b"]}),
    "long names": (
        ["DIV2K_train_HR/a", "DIV2K_valid_HR/b"],
        {"train": ["DIV2K_train_HR/a"], "DIV2K_valid_HR": ["DIV2K_valid_HR/b"]},
    ),
    "two domains": (
        ["trainA/a", "trainB/b", "testA/c"],
        {"train": ["trainA/a", "trainB/b"], "trainA": ["trainA/a"], "testA": ["testA/c"]},
    ),
    "exact before alike": (
        ["train/a", "val/b", "validation/c"],
        {"val": ["val/b"], "validation": ["validation/c"], "dev": ["val/b", "validation/c"]},
    ),
    "more kinds": (["train/a", "test/b", "extra/c", "unlabeled/d"], {"train": ["train/a"]}),
    "no train": (["validation/b", "test/c"], {"train": None, "test": ["test/c"]}),
    "only one": (["train/a"], {"train": ["train/a"], "test": None}),
    "loose": (
        ["a", "train/b", "test/c"],
        {"train": ["train/b"], "all": ["a", "train/b", "test/c"]},
    ),
    "a class called train": (
        ["car/a", "plane/b", "train/c"],
        {"train": ["car/a", "plane/b", "train/c"], "test": None, "car": None},
    ),
    "classes that sound alike": (
        ["test_tube/a", "train_car/b"],
        {"train": ["test_tube/a", "train_car/b"]},
    ),
    "a lone class called test": (["cat/a", "things/test/b"], {"train": ["cat/a", "things/test/b"]}),
    "flat": (["a", "b"], {"train": ["a", "b"], "all": ["a", "b"], "test": None, "train[:1]": None}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_split_that_is_meant_is_trained_on_and_no_other(tmp_path, layout):
    places, wanted = LAYOUTS[layout]
    for place in places:
        save(tmp_path, f"{place}.png")
    (tmp_path / "labels" / "train").mkdir(parents=True)  # folders without images say nothing
    (tmp_path / "labels" / "train" / "a.txt").write_text("7")
    for split, images in wanted.items():
        if images is None:
            with pytest.raises(ValueError, match=rf"`split` is '{split}'".replace("[", r"\[")):
                load(tmp_path, split=split)
            continue
        assert used(tmp_path, split=split) == {f"{name}.png" for name in images}
        inventory = load(tmp_path, split=split).inventory
        assert inventory.found == len(places) + 1
        assert inventory.left_out.total() == 1 + len(places) - len(images)


def test_the_line_says_what_was_understood(tmp_path):
    for place in ("train/a", "test/b", "test/c"):
        save(tmp_path / "split", f"{place}.png")
        save(tmp_path / "class", f"{place}.png")
    save(tmp_path / "class", "ship/d.png")
    line = load(tmp_path / "split").inventory.line()
    assert "(split train of test, train): 3 found, 1 used" in line
    assert "left out 2: of test, another split (2)" in line
    line = load(tmp_path / "class").inventory.line()
    assert "(test, train taken as a class, since not all folders beside are splits)" in line
    assert ": 4 found, 4 used" in line


def test_every_file_that_is_not_used_is_counted_with_its_reason(tmp_path):
    for name in ("a.png", "b.JPG", "c.jfif", "d.jp2", "e.avif", "f.webp", "g", "h.gif", "i.apng"):
        path = tmp_path / name
        kind = {"c.jfif": "JPEG", "i.apng": "PNG"}.get(name)
        Image.new("RGB", (4, 4)).save(path, kind or (None if path.suffix else "PNG"))
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "labels.txt").write_text("cat")
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "a.odd-suffix").write_text("")
    save(tmp_path, ".hidden.png")
    save(tmp_path, ".git/b.png")
    save(tmp_path, "__MACOSX/c.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # an address has at most 107 bytes
        server.bind("socket.png")
        os.chdir(here)
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    data = load(tmp_path, image_mode="RGB")
    assert {Path(n).name for n in data.names(range(len(data)))} == {
        "a.png", "b.JPG", "c.jfif", "d.jp2", "e.avif", "f.webp", "g", "h.gif", "i.apng"
    }  # fmt: skip
    assert dict(data.inventory.left_out) == {
        ".heic, which Pillow cannot read here": 1,
        "no image by its name (.txt)": 1,
        "no image by its name": 1,
        "no image, and without a suffix": 1,
        "hidden": 3,
        "pipe, socket or device": 4,
        "link that leads nowhere": 2,
    }
    assert data.inventory.found == 9 + 13 and data.inventory.used == 9
    for name in ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"):
        assert f".{name}" in IMAGE_SUFFIXES


def test_links_are_followed_once_and_circles_end(tmp_path):
    save(tmp_path / "set", "a/one.png")
    save(tmp_path / "elsewhere", "two.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "self").symlink_to(".")
    data = load(tmp_path / "set")
    assert len(data) == 2
    assert data.inventory.left_out == {"link to a folder that is read already": 3}


def test_broken_images_are_counted_beside_what_is_left_out(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path, name)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "list.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"cannot read image .*bad\.png: it is not an image"):
        load(tmp_path)
    inventory = load(tmp_path, on_bad_image="skip").inventory
    assert (inventory.found, inventory.used) == (4, 2)
    assert inventory.left_out == {"no image by its name (.csv)": 1, "image that cannot be read": 1}
    assert inventory.to_dict()["line"] == inventory.line()


def test_sizes_and_modes_are_in_the_line(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{number}.png")
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    line = load(tmp_path, image_size=4, fit="resize_crop", image_mode="RGB").inventory.line()
    assert "height x width 6x8 (3), 4x4 (1), taken by resize_crop to 4x4, channels: 3" in line
    assert "modes RGB (3), L (1)" in line and "\n" not in line


def test_a_thousand_kinds_of_things_still_make_one_line(tmp_path):
    for number in range(1, 41):
        Image.new("L", (number, 4)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.x{chr(97 + number % 26)}y").write_text("")
    line = load(tmp_path, image_size=4, fit="squash").inventory.line()
    assert len(line) < 700 and "and 34 more kinds" in line and "and 20 more kinds" in line


def test_an_empty_folder_says_what_lies_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / ".b.png").write_text("")
    with pytest.raises(ValueError, match=r"holds no images; left out: .*\.txt\) \(1\)"):
        load(tmp_path)


def test_places_that_are_no_data_are_told_what_they_are(tmp_path):
    save(tmp_path, "one.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.write(tmp_path / "one.png", "one.png")
    (tmp_path / "renamed.data").write_bytes((tmp_path / "set.zip").read_bytes())
    (tmp_path / "set.tar.gz").write_bytes(b"")
    (tmp_path / "words.txt").write_text("cats")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.npy")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name, message in {
        "one.png": "a single image; it must be the folder",
        "set.zip": "an archive; it must be a folder: unpack it",
        "renamed.data": "an archive; it must be a folder: unpack it",
        "set.tar.gz": "an archive; it must be a folder: unpack it",
        "words.txt": "a file that holds no images",
        "pipe": "a pipe, socket or device",
        "pipe.npy": "a pipe, socket or device",
        "pipe.parquet": "a pipe, socket or device",
    }.items():
        for streaming in (False, True):
            with pytest.raises(ValueError, match=f"`data` is .*{name}', {message}"):
                if streaming:
                    from ddim_schedulers.training.data.streams import open_stream

                    open_stream(TrainingConfig(data=str(tmp_path / name), streaming=True))
                else:
                    load(tmp_path / name)


def test_what_has_no_splits_refuses_one(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="`split` is 'test', but .*a.npy is an array"):
        load(tmp_path / "a.npy", split="test")
    with pytest.raises(ValueError, match="`split` is 'test', but digits"):
        load("digits", split="test")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_save_to_disk_wrote_has_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    def table(count):
        buffer = io.BytesIO()
        Image.new("L", (4, 4)).save(buffer, "PNG")
        rows = [{"bytes": buffer.getvalue(), "path": None}] * count
        return Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))

    DatasetDict({"train": table(3), "test": table(2)}).save_to_disk(str(tmp_path / "both"))
    assert [len(load(tmp_path / "both", split=s)) for s in ("train", "test")] == [3, 2]
    with pytest.raises(ValueError, match="`split` is 'val'; the splits are train, test"):
        load(tmp_path / "both", split="val")
    table(3).save_to_disk(str(tmp_path / "one"))
    assert len(load(tmp_path / "one")) == 3
    with pytest.raises(ValueError, match="`split` is 'test'; the saved table is without splits"):
        load(tmp_path / "one", split="test")
