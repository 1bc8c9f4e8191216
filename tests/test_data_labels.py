"""The class of every image, from folders, columns and arrays; bad labels are named at once."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_schedulers.class_labels import ClassLabels
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.batches import Draws, MapBatches, Share, open_loader
from ddim_schedulers.training.data.images import load_data
from ddim_schedulers.training.data.streams import StreamBatches, open_stream


def unscaled(data, images):
    """Returns the values of the source that images in [-1, 1] came of."""
    low, high = data.value_range
    return (images + 1) * ((high - low) / 2) + low


def load(**settings):
    values = {"validation_fraction": 0.0, "class_conditional": True}
    return load_data(TrainingConfig(**values | settings))[0]


def save(folder, *places):
    """Write a picture to each place, all different."""
    for number, place in enumerate(places):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(path)
    return str(folder)


def labels_by_name(data):
    names = [name.rpartition("/")[2] for name in data.names(range(len(data)))]
    return dict(zip(names, data.labels(range(len(data))).tolist(), strict=True))


TREES = {
    "classes": (["dog/a.png", "cat/b.png", "cat/c.png"], "train"),
    "classes in splits": (["train/dog/a.png", "train/cat/b.png", "train/cat/c.png"], "train"),
    "two splits": (["train/dog/a.png", "val/cat/b.png", "val/cat/c.png"], "train+val"),
    "splits in classes": (["dog/train/a.png", "cat/train/b.png", "cat/train/c.png"], "train"),
    "a folder around": (["all/dog/a.png", "all/cat/b.png", "all/cat/c.png"], "train"),
    "splits within": (["all/train/dog/a.png", "all/train/cat/b.png", "all/val/cat/c.png"], "all"),
    "folders within": (["dog/old/a.png", "cat/young/b.png", "cat/old/c.png"], "train"),
}


@pytest.mark.parametrize("name", TREES)
def test_the_folder_tells_the_class(tmp_path, name):
    places, split = TREES[name]
    others = ["test/bird/x.png"] if places[0].startswith("train/") else []
    data = load(data=save(tmp_path, *places, *others), split=split)
    assert data.classes.names == ("cat", "dog")
    assert labels_by_name(data) == {"a.png": 1, "b.png": 0, "c.png": 0}
    assert data.inventory.classes == {"cat": 2, "dog": 1}
    assert "classes 2: cat (2), dog (1)" in data.inventory.line()


def test_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    data = load(data=save(tmp_path, *(f"{i}/{i}.png" for i in range(12))))
    assert data.classes.names == tuple(map(str, range(12)))
    assert labels_by_name(data) == {f"{i}.png": i for i in range(12)}


def test_a_listed_order_of_names_wins(tmp_path):
    place = save(tmp_path, "dog/a.png", "cat/b.png")
    data = load(data=place, class_names=["dog", "bird", "cat"])
    assert labels_by_name(data) == {"a.png": 0, "b.png": 2}
    assert data.inventory.classes == {"dog": 1, "bird": 0, "cat": 1}
    assert "no image of bird" in data.inventory.line()
    with pytest.raises(ValueError, match=r"the label of .*a.png is 'dog'; it must be .*cat, bird"):
        load(data=place, class_names=["cat", "bird"])


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["cat/a.png", "dog/b.png", "c.png"], "c.png is in no folder of a class"),
        (["a.png", "b.png"], "a.png is in no folder of a class"),
        (["cat/a.png", "cat/b.png"], "all images of .* are of one class, 'cat'; there must be at"),
        (["train/cat/a.png", "train/cat/b.png", "test/dog/c.png"], "of one class, 'cat'"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path, places, said):
    with pytest.raises(ValueError, match=f"^`data`: .*{said}"):
        load(data=save(tmp_path, *places))


def test_digits_have_labels():
    from sklearn.datasets import load_digits

    train, held_out = load_data(TrainingConfig(class_conditional=True))
    for data in (train, held_out):
        assert data.labels([5, 0]).tolist() == load_digits().target[data.ids[[5, 0]]].tolist()
    assert sum(train.inventory.classes.values()) == 1437
    assert load_data(TrainingConfig())[0].labels([0]) is None


def archive(tmp_path, labels, count=6, **more):
    images = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
    np.savez(tmp_path / "set.npz", images=images, labels=labels, **more)
    return str(tmp_path / "set.npz")


@pytest.mark.parametrize("kind", [np.uint8, np.int64, "<i2", ">i4", "<U3"])
def test_an_array_beside_the_images_tells_the_classes(tmp_path, kind):
    labels = np.array([2, 0, 1, 1, 0, 2]).astype(kind)
    data = load(data=archive(tmp_path, labels))
    assert data.labels(range(6)).tolist() == [2, 0, 1, 1, 0, 2]
    assert data.labels(range(6)).dtype == torch.int64
    assert data.classes.names == (("0", "1", "2") if kind == "<U3" else ())


def test_the_array_of_labels_may_have_another_name(tmp_path):
    path = archive(tmp_path, np.zeros(6), kind=[0, 1, 0, 1, 1, 1])
    data = load(data=path, label_column="kind", array_key="images", class_names=["a", "b"])
    assert data.inventory.classes == {"a": 2, "b": 4}
    with pytest.raises(ValueError, match=r"holds \['images', 'labels', 'kind'\], and no labels"):
        load(data=path, label_column="sort", array_key="images")


def test_held_out_images_keep_their_labels(tmp_path):
    path = archive(tmp_path, [0, 1, 2, 0, 1, 2])
    train, held_out = load_data(
        TrainingConfig(data=path, class_conditional=True, validation_fraction=0.5)
    )
    for data in (train, held_out):
        assert data.labels(range(3)).tolist() == [int(i) % 3 for i in data.ids]


BAD_ARRAYS = {
    "missing": ([0, 1, 0, 1, 0], r"5 labels and 6 images; there must be as many"),
    "more labels": ([0, 1, 0, 1, 0, 1, 1], r"7 labels and 6 images"),
    "negative": ([0, 1, -1, 1, 0, 1], r"the label of set.npz\[2\] is -1; it must be an integer, 0"),
    "fractions": ([0.0, 1.0, 0, 1, 0, 1], "labels of .* holds float64; it must hold integers"),
    "flags": ([True, False] * 3, "labels of .* holds bool"),
    "one-hot": (np.eye(6, dtype=int), r"labels of .* has shape \(6, 6\); it must be \(N,\)"),
    "bytes": (np.array([b"a", b"b"] * 3), r"labels of .* holds \|S1"),
    "from one": ([1, 2, 3, 1, 2, 3], "labels go up to 3, and no image is of 0; number the"),
    "a gap": ([0, 1, 4, 1, 0, 4], "labels go up to 4, and no image is of 2, 3; number"),
    "far too many": ([0, 1, 10**12, 1, 0, 1], r"is 1000000000000; it must be an integer, 0 to 99"),
    "one class": ([0] * 6, "all images of .* are of one class, '0'; there must be at least 2"),
    "no name": (["a", "", "b", "a", "b", "a"], r"label of set.npz\[1\] is missing; .* one of a, b"),
    "a bad name": (["a", "b\n", "a", "a", "a", "a"], r"the name of a class is 'b\\n'; it must"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_no_labels_are_refused(tmp_path, name):
    labels, said = BAD_ARRAYS[name]
    with pytest.raises(ValueError, match=f"^`data`: .*{said}"):
        load(data=archive(tmp_path, np.array(labels)))


def test_labels_beyond_the_names_are_refused(tmp_path):
    path = archive(tmp_path, [0, 1, 3, 1, 0, 1])
    with pytest.raises(ValueError, match=r"set.npz\[2\] is 3; it must be .* 0 to 2, .* a, b, c"):
        load(data=path, class_names=["a", "b", "c"])
    assert load(data=path, class_names=["a", "b", "c", "d"]).classes.count == 4


def test_data_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "bare.npz", images=np.zeros((4, 4, 4), np.uint8))
    np.save(tmp_path / "bare.npy", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="holds .'images'., and no labels"):
        load(data=str(tmp_path / "bare.npz"))
    with pytest.raises(ValueError, match="bare.npy holds no labels; put them beside the images"):
        load(data=str(tmp_path / "bare.npy"))
    for place in (save(tmp_path / "f", "a/b.png", "b/c.png"), "digits"):
        with pytest.raises(ValueError, match="`label_column` is 'x', but .* has no columns"):
            load(data=place, label_column="x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"label_column": "x"}, "`label_column` is 'x'; it needs class_conditional"),
        ({"class_names": ["a", "b"]}, "`class_names` is .*; it needs class_conditional"),
        ({"label_dropout": 0.1}, "`label_dropout` is 0.1; it needs class_conditional"),
        ({"class_conditional": True, "label_dropout": 1.0}, "`label_dropout` is 1.0; it must be"),
        ({"class_conditional": True, "class_names": ["a"]}, "must be a list of at least 2 names"),
        ({"class_conditional": True, "class_names": ["a", "a"]}, "holds 'a' more than once"),
        ({"class_conditional": True, "class_names": ["a", " "]}, "holds ' '; a name must have"),
        ({"class_conditional": True, "class_names": ["a", 1]}, "holds 1; a name must have"),
    ],
)
def test_settings_that_contradict_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**settings)


def table(path, labels, kind=None):
    """Write images and labels, of a type of `datasets`, to a Parquet file."""
    import io

    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    rows = []
    for number, label in enumerate(labels):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(file, "png")
        rows.append({"scan": {"bytes": file.getvalue(), "path": f"{number}.png"}, "kind": label})
    features = Features({"scan": ImageColumn(), "kind": kind or Value("int64"), "n": Value("int8")})
    Dataset.from_list([row | {"n": 1} for row in rows], features=features).to_parquet(path)
    return str(path)


@pytest.fixture
def kinds():
    from datasets import ClassLabel, Value

    return {
        "labels": ClassLabel(names=["dog", "cat"]),
        "text": Value("string"),
        "numbers": Value("int64"),
        "fractions": Value("float32"),
        "flags": Value("bool"),
    }


def test_a_column_tells_the_classes(tmp_path, kinds):
    path = table(tmp_path / "l.parquet", [1, 0, 1, 1], kinds["labels"])
    for settings in ({}, {"label_column": "kind"}):
        data = load(data=path, **settings)
        assert data.classes.names == ("dog", "cat") and data.labels(range(4)).tolist() == [
            1,
            0,
            1,
            1,
        ]
    other = load(data=path, class_names=["bird", "cat", "dog"])
    assert other.labels(range(4)).tolist() == [1, 2, 1, 1]
    with pytest.raises(ValueError, match="`class_names` is cat, dogs; .* and lacks dog"):
        load(data=path, class_names=["cat", "dogs"])
    text = table(tmp_path / "t.parquet", ["b", "a", "b", "b"], kinds["text"])
    data = load(data=text, label_column="kind")
    assert data.classes.names == ("a", "b") and data.labels(range(4)).tolist() == [1, 0, 1, 1]
    numbers = table(tmp_path / "n.parquet", [1, 0, 2, 1])
    assert load(data=numbers, label_column="kind").classes.count == 3


@pytest.mark.parametrize(
    ("kind", "labels", "said"),
    [
        (
            "labels",
            [1, 0, None, 1],
            r"label of .*\[2\].* is missing; it must be .* one of dog, cat",
        ),
        ("labels", [1, 0, -1, 1], r"label of .*\[2\].* is -1; it must be an integer, 0 to 1"),
        ("labels", [1, 1, 1, 1], "of one class, 'cat'"),
        ("text", ["a", None, "b", "a"], r"label of .*\[1\].* is missing"),
        ("numbers", [0, 1, None, 0], r"label of .*\[2\].* is missing"),
        ("numbers", [0, 1, -5, 0], r"label of .*\[2\].* is -5"),
        ("fractions", [0, 1, 1, 0], "column 'kind' of .* holds float32; it must hold integers"),
        ("flags", [True, False, True, True], "column 'kind' of .* holds bool"),
    ],
)
def test_columns_that_are_no_labels_are_refused(tmp_path, kinds, kind, labels, said):
    path = table(tmp_path / "bad.parquet", labels, kinds[kind])
    with pytest.raises(ValueError, match=f"^`data`: .*{said}"):
        load(data=path, label_column="kind")


def test_the_column_must_be_told_where_it_cannot_be_found(tmp_path):
    path = table(tmp_path / "n.parquet", [1, 0, 2, 1])
    with pytest.raises(ValueError, match=r"0 columns of class labels among .*; name the right one"):
        load(data=path)
    with pytest.raises(ValueError, match="`label_column` is 'x'; the columns are scan, kind, n"):
        load(data=path, label_column="x")
    with pytest.raises(ValueError, match="column 'scan' of .* holds PIL"):
        load(data=path, label_column="scan")


def stream_of(path, **settings):
    config = TrainingConfig(data=path, streaming=True, class_conditional=True, **settings)
    return open_stream(config)


def test_a_stream_gives_each_image_with_its_label(tmp_path, kinds):
    labels = [n % 2 for n in range(20)]
    path = table(tmp_path / "l.parquet", labels, kinds["labels"])
    more = {"shuffle_buffer": 4, "validate_every": 1, "validation_images": 4}
    stream, data, held_out = stream_of(path, **more)
    assert held_out.labels(range(4)).tolist() == [0, 1, 0, 1]
    for share in (Share(8, 1, 0, 1), Share(8, 2, 1, 2)):
        batches = StreamBatches(stream, data, Draws(0, 8, False, False, False), share)
        batches.stop = 6
        with open_loader(batches, 0, 6) as loader:
            for batch in loader:
                number = unscaled(data, batch["images"])[:, 0, 0, 0].round().long()
                assert torch.equal(batch["labels"], number % 2)
    turned = stream_of(path, class_names=["cat", "dog"], **more)[1]
    assert turned.labels(range(4)).tolist() == [1, 0, 1, 0]


def test_labels_of_a_stream_are_checked_as_they_come(tmp_path, kinds):
    labels = [n % 2 for n in range(70)]
    early = table(tmp_path / "early.parquet", [None, *labels], kinds["labels"])
    with pytest.raises(ValueError, match=r"label of .*\[0\].* is missing"):
        stream_of(early)
    late = table(tmp_path / "late.parquet", [*labels, 7], kinds["numbers"])
    with pytest.raises(ValueError, match="does not tell which classes there are; list them with"):
        stream_of(late, label_column="kind")
    stream, data, _ = stream_of(late, label_column="kind", class_names=["a", "b"])
    batches = StreamBatches(stream, data, Draws(0, 71, False, False, False), Share(71, 1, 0, 1))
    batches.stop = 1
    with pytest.raises(ValueError, match="image .* of the shuffled stream .* is 7; it must be"):
        with open_loader(batches, 0, 1, workers=1) as loader:
            list(loader)


def test_a_stream_of_one_class_is_refused(tmp_path, kinds):
    from datasets import ClassLabel

    short = table(tmp_path / "short.parquet", [1] * 20, kinds["labels"])
    with pytest.raises(ValueError, match="of one class, 'cat'; there must be at least 2"):
        stream_of(short)
    alone = table(tmp_path / "alone.parquet", [0] * 80, ClassLabel(names=["cat"]))
    with pytest.raises(ValueError, match="of one class, 'cat'"):
        stream_of(alone)
    # the others of a long stream in the order of its classes may come later
    sorted_ones = table(tmp_path / "sorted.parquet", [0] * 70 + [1] * 10, kinds["labels"])
    assert stream_of(sorted_ones)[1].classes.count == 2


def test_an_image_that_replaces_a_broken_one_brings_its_own_label(tmp_path):
    place = save(tmp_path, *(f"{'ab'[n % 2]}/{n}.png" for n in range(6)))
    data = load(data=place, on_bad_image="skip")
    victim = int(data.ids[2])  # the last of class a: its neighbour is of class b
    whole = data.source.paths[victim].read_bytes()
    data.source.paths[victim].write_bytes(whole[:-20])
    batches = MapBatches(data, Draws(0, 6, False, False, False), Share(6, 1, 0, 1))
    batch = batches[(0, 0)]
    number = unscaled(data, batch["images"])[:, 0, 0, 0].round().long()
    assert int(batch["replaced"]) == 1 and torch.equal(batch["labels"], number % 2)


def test_labels_are_dropped_by_seed_step_and_position_alone():
    data = load()
    share, null = 0.25, 10
    draws = Draws(3, 24, True, True, False, share, null)
    plain = Draws(3, 24, True, True, False)
    dropped = torch.stack([draws.dropped(step) for step in range(2000)])
    rate = dropped.double().mean(0)
    # 2,000 draws at each of 24 positions: 4.5 standard errors are 0.044; 0.0097 of the whole
    assert float((rate - share).abs().max()) < 0.044
    assert abs(float(rate.mean()) - share) < 0.0097
    # neighbouring steps and positions do not agree more often than chance
    same = (dropped[1:] == dropped[:-1]).double().mean()
    assert abs(float(same) - (share**2 + (1 - share) ** 2)) < 0.01
    whole = MapBatches(data, draws, Share(24, 1, 0, 1))[(5, 0)]
    bare = MapBatches(data, plain, Share(24, 1, 0, 1))[(5, 0)]
    assert torch.equal(whole["labels"] == null, draws.dropped(5))
    assert torch.equal(whole["labels"][~draws.dropped(5)], bare["labels"][~draws.dropped(5)])
    for name in ("images", "noise", "u", "ids"):  # labels change no other draw
        assert torch.equal(whole[name], bare[name])
    for processes, parts in ((2, 1), (1, 3), (2, 3), (4, 2)):
        got = [
            MapBatches(data, draws, Share(24, processes, rank, parts))[(5, part)]["labels"]
            for part in range(parts)
            for rank in range(processes)
        ]
        assert torch.equal(torch.cat(got), whole["labels"])
    assert not torch.equal(Draws(4, 24, True, True, False, share, null).dropped(5), dropped[5])
    assert (
        "labels" not in MapBatches(load(class_conditional=False), plain, Share(24, 1, 0, 1))[(0, 0)]
    )


def test_classes_of_a_trained_network_are_found_by_name(tmp_path):
    data = load(data=save(tmp_path, "dog/a.png", "cat/b.png"))
    trained = ClassLabels(4, 0, {1: "bird", 2: "dog", 3: "cat"})
    assert data.classes.for_network(trained).rows == (3, 2)
    assert data.classes.for_network(ClassLabels(3, 2)).rows == (0, 1)
    assert data.classes.for_network(ClassLabels(3, 0)).rows == (1, 2)
    with pytest.raises(ValueError, match="`data` is 'cat'; it must be .* 'dog'"):
        data.classes.for_network(ClassLabels(2, None, {0: "dog", 1: "bird"}))
    with pytest.raises(ValueError, match="there are 2 classes, but the network has 3 without"):
        data.classes.for_network(ClassLabels(4, 3))
