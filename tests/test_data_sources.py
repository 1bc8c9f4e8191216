"""Images of every kind and from every place; bad ones are named before training begins."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_schedulers.pipelines.image_files import BadImageError
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.batches import Draws, MapBatches, Share, open_loader
from ddim_schedulers.training.data.images import digits, fit_image, load_data
from ddim_schedulers.training.data.sources import ArraySource


def unscaled(data, images):
    """Returns the values of the source that images in [-1, 1] came of."""
    low, high = data.value_range
    return (images + 1) * ((high - low) / 2) + low


def pixels(*shape, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype, endpoint=True)


def save_images(folder, arrays, suffix=".png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array, **options).save(folder / f"{number:03d}{suffix}")


def load(**settings):
    return load_data(TrainingConfig(**{"validation_fraction": 0.0} | settings))[0]


def test_digits_have_a_split_of_their_own():
    train, held_out = load_data(TrainingConfig(seed=5, validation_fraction=0.3))
    assert (len(train), len(held_out), train.shape) == (1437, 360, (1, 8, 8))
    assert not set(train.ids) & set(held_out.ids)
    assert np.array_equal(train.ids, digits("train").ids)
    images = train.all()
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1
    assert torch.equal(unscaled(train, images).round(), unscaled(train, images))
    assert train.levels == 17
    with pytest.raises(ValueError, match="`split` is 'test'"):
        digits("test")


@pytest.mark.parametrize(
    ("array", "channels"),
    [
        (pixels(5, 8, 6), 1),
        (pixels(5, 8, 6, 1), 1),
        (pixels(5, 8, 6, 3), 3),
        (pixels(5, 8, 6, 4), 4),
        (pixels(5, 8, 6, 5), 5),
        (pixels(5, 8, 6, dtype=np.uint16), 1),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_any_number_of_channels(tmp_path, array, channels, suffix):
    path = tmp_path / f"images{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, images=array)
    data = load(data=str(path))
    assert data.shape == (channels, 8, 6) and len(data) == 5
    assert data.levels == int(np.iinfo(array.dtype).max) + 1
    expected = torch.from_numpy(array.reshape(5, 8, 6, -1).transpose(0, 3, 1, 2).astype(np.float32))
    torch.testing.assert_close(unscaled(data, data.all()), expected, atol=0.01, rtol=1e-6)


def test_floating_point_arrays_need_a_range(tmp_path):
    array = np.random.default_rng(0).random((4, 8, 8), dtype=np.float32) * 3 - 1
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="float32; it must say which values"):
        load(data=str(tmp_path / "a.npy"))
    data = load(data=str(tmp_path / "a.npy"), value_range=[-1.0, 2.0])
    assert data.levels is None
    torch.testing.assert_close(data.all()[:, 0], torch.from_numpy((array + 1) * 2 / 3 - 1))


def test_arrays_that_are_not_images_are_refused(tmp_path):
    for array, message in (
        (pixels(5, 8), "must be \\(N, H, W\\)"),
        (pixels(5, 3, 32, 32), "looks like channels first"),
        (np.array([["a"]]).reshape(1, 1, 1), "must hold numbers"),
        (pixels(0, 8, 8), "holds no images"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=message):
            load(data=str(tmp_path / "a.npy"))
    np.savez(tmp_path / "a.npz", x=pixels(2, 8, 8), y=pixels(2, 8, 8))
    with pytest.raises(ValueError, match="`array_key` is None; it must be one of"):
        load(data=str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="`array_key` is 'z'"):
        load(data=str(tmp_path / "a.npz"), array_key="z")
    assert len(load(data=str(tmp_path / "a.npz"), array_key="y")) == 2
    (tmp_path / "b.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match="cannot be read"):
        load(data=str(tmp_path / "b.npy"))


@pytest.mark.parametrize(
    ("shape", "dtype", "channels"),
    [
        ((8, 8), np.uint8, 1),
        ((8, 8), np.uint16, 1),
        ((8, 8, 2), np.uint8, 2),
        ((8, 8, 3), np.uint8, 3),
        ((8, 8, 4), np.uint8, 4),
    ],
)
def test_image_files_keep_their_channels_and_depth(tmp_path, shape, dtype, channels):
    arrays = [pixels(*shape, dtype=dtype, seed=n) for n in range(3)]
    save_images(tmp_path / "deep" / "er", arrays)
    data = load(data=str(tmp_path))
    assert data.shape == (channels, 8, 8) and len(data) == 3
    got = unscaled(data, data.all()).double().round().numpy().transpose(0, 2, 3, 1)
    expected = np.stack(arrays).astype(np.float64)
    if channels in (2, 4):  # where nothing shows, the colour is that of the background
        expected[expected[..., -1] == 0, :-1] = 255
    assert np.array_equal(got.reshape(3, *shape), expected)
    assert data.value_range == (0.0, float(np.iinfo(dtype).max))


def png16(array):
    """A PNG of 16-bit colours (H, W, C), which PIL cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("mode", ["keep", "RGB"])
def test_colours_of_16_bits_are_refused_rather_than_cut_to_8(tmp_path, channels, mode):
    (tmp_path / "deep.png").write_bytes(png16(pixels(8, 8, channels, dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"deep\.png has colours of 16 bits .* \.npy") as caught:
        load(data=str(tmp_path), image_mode=mode, on_bad_image="skip")
    assert not isinstance(caught.value, BadImageError)


def test_arrays_of_another_byte_order(tmp_path):
    array = pixels(5, 8, 6, dtype=np.uint16)
    np.save(tmp_path / "big.npy", array.astype(">u2"))
    np.save(tmp_path / "small.npy", array.astype("<u2"))
    big, small = (load(data=str(tmp_path / f"{name}.npy")) for name in ("big", "small"))
    assert torch.equal(big.all(), small.all()) and big.levels == small.levels == 65536


def test_palettes_and_bitmaps_become_what_they_show(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "b").mkdir()
    colours = Image.fromarray(pixels(8, 8, 3)).quantize(4)
    colours.save(tmp_path / "p" / "a.png")
    assert load(data=str(tmp_path / "p")).channels == 3
    Image.fromarray(pixels(8, 8) > 127).save(tmp_path / "b" / "a.png")
    assert set(load(data=str(tmp_path / "b")).all().unique().tolist()) == {-1.0, 1.0}


def test_conversion_only_on_request(tmp_path):
    save_images(tmp_path, [pixels(8, 8), pixels(8, 8, 3)])
    with pytest.raises(ValueError, match=r"images of different channels: .*000.png has 1, .*001"):
        load(data=str(tmp_path))
    assert load(data=str(tmp_path), image_mode="RGB").channels == 3
    assert load(data=str(tmp_path), image_mode="L").channels == 1
    save_images(tmp_path / "deep", [pixels(8, 8, dtype=np.uint16)])
    with pytest.raises(ValueError, match="image_mode must be keep"):
        load(data=str(tmp_path / "deep"), image_mode="L")
    save_images(tmp_path / "mixed", [pixels(8, 8), pixels(8, 8, dtype=np.uint16)])
    with pytest.raises(ValueError, match="images of different dtype"):
        load(data=str(tmp_path / "mixed"))


def test_mixed_sizes_are_refused_or_brought_to_one(tmp_path):
    save_images(tmp_path, [pixels(8, 8, seed=1), pixels(12, 10, seed=2)])
    with pytest.raises(ValueError, match=r"images of different size: .*\(8, 8\).*\(12, 10\)"):
        load(data=str(tmp_path))
    with pytest.raises(ValueError, match="001.png is 12x10, and `image_size` is 8; set `fit`"):
        load(data=str(tmp_path), image_size=8)
    with pytest.raises(ValueError, match="`fit` is 'pad', which cannot make .* into 8"):
        load(data=str(tmp_path), image_size=8, fit="pad")
    with pytest.raises(ValueError, match="`fit` is 'crop', which cannot make .* into 10"):
        load(data=str(tmp_path), image_size=10, fit="crop")
    for fit in ("crop", "resize_crop", "squash"):
        images = load(data=str(tmp_path), image_size=8, fit=fit).all()
        assert images.shape == (2, 1, 8, 8) and images.abs().max() <= 1
    assert load(data=str(tmp_path), image_size=16, fit="pad").all()[0, 0, 0, 0] == -1


def test_fit_keeps_what_it_says():
    image = torch.arange(24.0).reshape(1, 4, 6) / 12 - 1
    assert torch.equal(fit_image(image, (4, 6), "squash"), fit_image(image, (4, 6), "exact"))
    padded = fit_image(image, (6, 6), "pad")
    assert torch.equal(padded[:, 1:5], image) and (padded[:, [0, 5]] == -1).all()
    assert torch.equal(fit_image(image, (4, 4), "crop"), image[:, :, 1:5])
    assert torch.equal(fit_image(image, (4, 4), "crop", np.array([0.0, 0.99])), image[:, :, 2:])
    assert fit_image(image, (8, 8), "resize_crop").shape == (1, 8, 8)


def test_a_broken_file_stops_with_its_name_or_is_counted(tmp_path):
    save_images(tmp_path, [pixels(16, 16, 3, seed=n) for n in range(6)])
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])  # header fine, pixels cut short
    (tmp_path / "004.png").write_bytes(b"nothing")
    with pytest.raises(BadImageError, match=r"cannot read image .*004\.png"):
        load(data=str(tmp_path))
    data = load(data=str(tmp_path), on_bad_image="skip")
    assert len(data) == 5 and [name[-7:] for name in data.skipped] == ["004.png"]
    images, replaced = data.batch([1, 2, 3])
    assert replaced == 1
    assert torch.equal(images[1], images[2])  # its neighbour took its place
    (tmp_path / "004.png").unlink()
    broken = load(data=str(tmp_path))
    with pytest.raises(BadImageError, match=r"002\.png") as here:
        broken.all()
    batches = MapBatches(broken, Draws(0, 5, False, False, False), Share(5, 1, 0, 1))
    with pytest.raises(BadImageError) as there, open_loader(batches, 0, 1, 1) as loader:
        list(loader)
    assert str(there.value) == str(here.value)  # a worker's message is the same


def test_absurdly_large_images_are_bad_ones(tmp_path, monkeypatch):
    save_images(tmp_path, [pixels(8, 8, seed=n) for n in range(2)])
    Image.fromarray(pixels(64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match=r"bomb\.png: Image size \(4096 pixels\)"):
        load(data=str(tmp_path))
    data = load(data=str(tmp_path), on_bad_image="skip")
    assert len(data) == 2 and len(data.skipped) == 1


def test_something_must_be_left_to_train_on(tmp_path):
    np.save(tmp_path / "a.npy", pixels(3, 8, 8))
    with pytest.raises(ValueError, match="`validation_fraction` is 0.9, which holds out all 3"):
        load(data=str(tmp_path / "a.npy"), validation_fraction=0.9)
    assert len(load(data=str(tmp_path / "a.npy"), validation_fraction=0.5)) == 1


def test_an_empty_or_absent_place_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load(data=str(tmp_path))
    for absent in (str(tmp_path / "absent"), "./absent", "../absent", "a.parquet", "a b"):
        with pytest.raises(ValueError, match="which does not exist; it must be a folder"):
            load(data=absent)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"):
        load(data=str(tmp_path), on_bad_image="skip")


def write_parquet(path, images):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"label": Value("int64"), "scan": ImageFeature()})
    columns = {"label": list(range(len(images))), "scan": images}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(path)


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(pixels(8, 8, 3, seed=number)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


@pytest.fixture
def parquet(tmp_path):
    return write_parquet(tmp_path / "set.parquet", [png(n) for n in range(40)])


def test_a_folder_of_parquet_files_has_the_splits_of_its_names(tmp_path):
    for name, numbers in (("train-0-of-2", [0, 1]), ("train-1-of-2", [2]), ("test", [7])):
        write_parquet(tmp_path / "set" / "data" / f"{name}.parquet", [png(n) for n in numbers])
    (tmp_path / "set" / "README.md").write_text("# A set\n")
    at = str(tmp_path / "set")
    assert [len(load(data=at, split=split)) for split in ("train", "test")] == [3, 1]
    with pytest.raises(ValueError, match="Unknown split .*nonsense"):
        load(data=at, split="nonsense")
    with pytest.raises(ValueError, match="Unknown split .*test"):
        load(data=str(tmp_path / "set" / "data" / "train-1-of-2.parquet"), split="test")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="data set that can be loaded"):
        load(data=str(tmp_path / "bad.parquet"))


def test_rows_without_an_image_are_bad_ones(tmp_path):
    path = write_parquet(tmp_path / "holes.parquet", [png(0), None, png(2)])
    with pytest.raises(BadImageError, match=r"holes.parquet\[1\]: the row holds no image"):
        load(data=path)
    data = load(data=path, on_bad_image="skip")
    assert len(data) == 2 and data.skipped == [f"{path}[1]"]


def test_parquet_with_an_image_column_of_any_name(parquet):
    data = load(data=parquet)
    assert len(data) == 40 and data.shape == (3, 8, 8)
    expected = pixels(8, 8, 3, seed=7).transpose(2, 0, 1)
    assert np.array_equal(unscaled(data, data.batch([7])[0])[0].round().byte().numpy(), expected)
    assert "7.png" in data.names([7])[0]
    with pytest.raises(ValueError, match="`image_column` is 'image'; the columns are label, scan"):
        load(data=parquet, image_column="image")


def test_a_stream_gives_the_same_batches_from_any_place_and_split(parquet):
    from ddim_schedulers.training.data.streams import StreamBatches, open_stream

    config = TrainingConfig(
        data=parquet, streaming=True, shuffle_buffer=8, validate_every=1, validation_images=4
    )
    stream, data, held_out = open_stream(config)
    assert data.shape == (3, 8, 8) and len(held_out) == 4
    draws = Draws(0, 16, False, True, False)

    def batches(start, stop, position, share):
        made = StreamBatches(stream, data, draws, share)
        made.start, made.stop, made.stream_position = start, stop, position
        with open_loader(made, start, stop) as loader:
            return list(loader)

    whole = batches(0, 5, (0, 0), Share(16, 1, 0, 1))
    after = whole[2]["stream_position"].tolist()
    assert after == [1, 12]  # 36 images an epoch: the third batch crosses it
    again = batches(3, 5, tuple(after), Share(16, 1, 0, 1))
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(whole[3:], again, strict=True))
    parts = [batches(0, 5, (0, 0), Share(16, 2, rank, 1)) for rank in (0, 1)]
    for step in range(5):
        joined = torch.cat([parts[rank][step]["images"] for rank in (0, 1)])
        assert torch.equal(joined, whole[step]["images"])
    seen = torch.cat([b["images"] for b in whole]).abs().flatten(1).sum(1)  # flips change no sum
    kept = held_out.all().abs().flatten(1).sum(1)
    assert not set(seen.tolist()) & set(kept.tolist())


def test_batches_are_a_function_of_seed_step_and_position():
    data = digits("train")
    draws = Draws(3, 24, True, True, False)
    whole = MapBatches(data, draws, Share(24, 1, 0, 1))[(5, 0)]
    assert not torch.equal(whole["noise"][0], whole["noise"][1])
    for processes, parts in ((2, 1), (1, 3), (2, 3), (4, 2)):
        got = [
            MapBatches(data, draws, Share(24, processes, rank, parts))[(5, part)]
            for part in range(parts)
            for rank in range(processes)
        ]
        for name in ("images", "noise", "u", "ids"):
            assert torch.equal(torch.cat([batch[name] for batch in got]), whole[name])
    other = MapBatches(data, Draws(4, 24, True, True, False), Share(24, 1, 0, 1))[(5, 0)]
    assert not torch.equal(other["noise"], whole["noise"])
    with pytest.raises(ValueError, match="`batch_size` is 24; it must be a multiple of"):
        Share(24, 5, 0, 1)


def test_every_epoch_shows_every_image_once():
    source = ArraySource(pixels(10, 2, 2), "ten")
    from ddim_schedulers.training.data.images import ImageData

    data = ImageData(source, np.arange(10), 1, (2, 2), (0.0, 255.0), 256)
    batches = MapBatches(data, Draws(0, 4, False, False, False), Share(4, 1, 0, 1))
    stream = np.concatenate([batches.ids(step) for step in range(10)])
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(stream[:10], stream[10:20])
    # A set smaller than the batch is simply seen more than once in it.
    small = MapBatches(data, Draws(0, 25, False, False, False), Share(25, 1, 0, 1))
    assert np.bincount(small.ids(0)).min() >= 2


def test_noise_is_standard_normal_and_flips_mirror():
    draws = Draws(0, 512, False, True, False)
    noise = draws.noise(0, np.arange(512), (1, 8, 8))
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    flat = noise.flatten(1)
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.75  # 131 k pairs of 64 numbers: 6 standard errors
    images = torch.arange(512 * 4.0).reshape(512, 1, 2, 2)
    made = draws.make_batch(0, np.arange(512), images, np.arange(512), 0)["images"]
    flip = draws.small(0)[1]
    assert 200 < int(flip.sum()) < 312
    assert torch.equal(made[flip], images[flip].flip(-1)) and torch.equal(
        made[~flip], images[~flip]
    )


def test_workers_do_not_change_the_batches():
    batches = MapBatches(digits("train"), Draws(0, 8, False, True, False), Share(8, 1, 0, 2))
    with open_loader(batches, 2, 5) as alone, open_loader(batches, 2, 5, 2) as helped:
        alone, helped = list(alone), list(helped)
    assert len(alone) == len(helped) == 6
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_padding_a_batch_is_padding_each_image(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    config = TrainingConfig(data=str(tmp_path / "a.npz"), image_size=8, fit="pad")
    data, _ = load_data(config)
    together = data.all()
    assert together.shape == (len(data), 3, 8, 8)
    alone = [data.prepare(images[i].transpose(2, 0, 1), None) for i in data.ids]
    assert torch.equal(together, torch.stack(alone))
