"""Files as viewers show them: orientation, transparency, frames, odd modes, absurd sizes."""

import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddim_schedulers.pipelines import image_files
from ddim_schedulers.pipelines.image_files import BadImageError, Fit, Reading, decode, header_of
from ddim_schedulers.pipelines.images import read_image
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.images import load_data

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixels(*shape, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype, endpoint=True)


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(folder, **settings):
    return load_data(TrainingConfig(data=str(folder), validation_fraction=0.0, **settings))[0]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_exif_at_the_end(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = stored(image, "PNG")
    assert plain[-8:-4] == b"IEND"
    return plain[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]


def with_orientation(image, kind, orientation):
    if kind == "late PNG":
        return with_exif_at_the_end(image, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    return stored(image, kind, exif=exif, **lossless)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "late PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_of_every_format_is_applied(tmp_path, kind, orientation):
    data = with_orientation(Image.fromarray(pixels(6, 8, 3)), kind, orientation)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    assert expected.shape == ((3, 8, 6) if orientation >= 5 else (3, 6, 8))
    header = header_of(io.BytesIO(data), "a", Reading())
    assert header.size == expected.shape[1:] and header.turned == (orientation > 1)
    assert np.array_equal(decode(io.BytesIO(data), "a", Reading()), expected)
    path = tmp_path / "a"  # known by its bytes
    path.write_bytes(data)
    assert np.array_equal(np.asarray(read_image(path, "x")).transpose(2, 0, 1), expected)
    assert load(tmp_path).inventory.turned == (orientation > 1)


@pytest.mark.parametrize("place", ["table", "stream"])
def test_tables_and_streams_are_turned_too(tmp_path, place):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    from ddim_schedulers.training.data.streams import open_stream

    data = with_orientation(Image.fromarray(pixels(6, 8)), "PNG", 6)
    rows = [{"bytes": data, "path": f"{n}.png"} for n in range(3)]
    features = Features({"image": ImageFeature()})
    Dataset.from_dict({"image": rows}, features=features).to_parquet(str(tmp_path / "a.parquet"))
    config = TrainingConfig(data=str(tmp_path / "a.parquet"), streaming=place == "stream")
    got = (open_stream(config)[1] if place == "stream" else load_data(config)[0]).batch([0])[0]
    assert got.shape == (1, 1, 8, 6)
    assert np.array_equal(
        ((got[0, 0] + 1) * 127.5).round().numpy(), np.rot90(pixels(6, 8), -1).astype(np.float32)
    )


def test_what_exif_data_say_without_meaning_changes_nothing():
    image = Image.fromarray(pixels(6, 8, 3))
    for orientation in (0, 9, 65535):
        data = with_orientation(image, "PNG", orientation)
        assert np.array_equal(
            decode(io.BytesIO(data), "a", Reading()), pixels(6, 8, 3).transpose(2, 0, 1)
        )
    plain = stored(image, "PNG")
    for broken in (b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\0" * 40):
        for at in (33, len(plain) - 12):  # before the pixels, and after them
            data = plain[:at] + chunk(b"eXIf", broken) + plain[at:]
            assert header_of(io.BytesIO(data), "a", Reading()).size == (6, 8)
            assert decode(io.BytesIO(data), "a", Reading()).shape == (3, 6, 8)


def transparent(kind):
    """An 8x6 image of grey 100 (or close), the left half transparent with red behind it."""
    colours = np.full((6, 8, 4), (100, 100, 100, 255), np.uint8)
    colours[:, :4] = (*RED, 0)
    image = Image.fromarray(colours)
    if kind == "RGBA":
        return stored(image, "PNG")
    if kind == "WEBP":
        return stored(image, "WEBP", lossless=True, exact=True)
    if kind == "LA":
        return stored(
            Image.merge("LA", (Image.fromarray(colours[..., 0]), image.getchannel("A"))), "PNG"
        )
    if kind in ("P index", "P bytes", "GIF"):
        palette = Image.fromarray((colours[..., 0] == 100).astype(np.uint8)).convert("P")
        palette.putpalette([*RED, 100, 100, 100])
        transparency = b"\0\xff" if kind == "P bytes" else 0
        return stored(palette, "GIF" if kind == "GIF" else "PNG", transparency=transparency)
    if kind == "PA":
        return stored(image.convert("P").convert("PA"), "TIFF")  # opaque, for its mode alone
    if kind == "L key":
        return stored(Image.fromarray(colours[..., 0]), "PNG", transparency=255)
    return stored(image.convert("RGB"), "PNG", transparency=RED)


KINDS = ["RGBA", "WEBP", "LA", "P index", "P bytes", "GIF", "L key", "RGB key"]


@pytest.mark.parametrize("mode", ["keep", "L", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_sees_does_not_become_data(tmp_path, kind, mode):
    (tmp_path / "a").write_bytes(transparent(kind))
    for background, colour in (("white", WHITE), ("#204060", (32, 64, 96)), ("black", (0, 0, 0))):
        data = load(tmp_path, image_mode=mode, background=background)
        got = data.source.read(0)
        grey = np.asarray(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0]
        hidden = {1: [grey], 2: [grey, 0], 3: [*colour], 4: [*colour, 0]}[len(got)]
        shown = {1: [100], 2: [100, 255], 3: [100] * 3, 4: [100] * 3 + [255]}[len(got)]
        assert (got[:, :, :4] == np.reshape(hidden, (-1, 1, 1))).all()
        assert (got[:, :, 4:] == np.reshape(shown, (-1, 1, 1))).all()
        assert background in data.inventory.line()  # said, not only done
        assert sum(data.inventory.alpha.values()) == 1
    channels = {"L": 1, "RGB": 3, "RGBA": 4}
    own = {"LA": 2, "L key": 1, "RGB key": 3}.get(kind, 4)
    assert data.channels == channels.get(mode, own)


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    Image.new("RGBA", (4, 4), (*RED, 51)).save(tmp_path / "a.png")
    got = load(tmp_path, image_mode="RGB").source.read(0)[:, 0, 0]
    assert got.tolist() == [255, 204, 204]
    assert load(tmp_path).source.read(0)[:, 0, 0].tolist() == [*RED, 51]  # alpha is a channel


@pytest.mark.parametrize("name", ["", "nonsense", "#12", "#11223344", None, 3])
def test_a_background_is_an_opaque_colour(name):
    with pytest.raises(ValueError, match="`background` is .*; it must be an opaque colour"):
        TrainingConfig(background=name)


def test_odd_modes_are_right_or_refused_with_a_reason(tmp_path):
    def check(image, kind, expected=None, message=None, mode="keep", **options):
        data = stored(image, kind, **options)
        if message is not None:
            with pytest.raises(ValueError, match=f"`data`: odd {message}"):
                header_of(io.BytesIO(data), "odd", Reading(mode))
            with pytest.raises(ValueError, match=f"`data`: odd {message}"):
                decode(io.BytesIO(data), "odd", Reading(mode))
            return
        header = header_of(io.BytesIO(data), "odd", Reading(mode))
        got = decode(io.BytesIO(data), "odd", Reading(mode))
        assert np.array_equal(got, expected) and got.dtype == expected.dtype == header.dtype
        assert (header.channels, *header.size) == got.shape

    cmyk = Image.merge("CMYK", [Image.fromarray(pixels(6, 8, seed=n)) for n in range(4)])
    check(cmyk, "TIFF", message="has mode CMYK; convert it, or set image_mode")
    check(cmyk, "TIFF", np.asarray(cmyk.convert("RGB")).transpose(2, 0, 1), mode="RGB")
    lab = Image.merge("LAB", [Image.fromarray(pixels(6, 8, seed=n)) for n in range(3)])
    check(lab, "TIFF", message="has mode LAB; convert it")
    check(lab, "TIFF", message="has mode LAB, which PIL cannot convert to RGB", mode="RGB")
    bits = pixels(6, 8) > 127
    check(Image.fromarray(bits), "PNG", (bits * np.uint8(255))[None])
    check(Image.fromarray(bits), "PNG", (bits * np.uint8(255))[None].repeat(3, 0), mode="RGB")
    deep = pixels(6, 8, dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        check(Image.fromarray(deep), kind, deep[None])
        check(Image.fromarray(deep), kind, message="has mode I;16; image_mode must be", mode="L")
    check(Image.fromarray(deep), "PNG", message="has mode I;16 and a transparent", transparency=7)
    floats = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    check(Image.fromarray(floats), "TIFF", floats[None])
    for bad in (np.nan, np.inf):
        floats[2, 3] = bad
        with pytest.raises(BadImageError, match="odd: it holds values that are not finite"):
            decode(io.BytesIO(stored(Image.fromarray(floats), "TIFF")), "odd", Reading())
    opaque = np.full((1, 6, 8), 255, np.uint8)
    palette = Image.fromarray(pixels(6, 8)).convert("P").convert("PA")
    check(palette, "TIFF", np.concatenate([*[pixels(6, 8)[None]] * 3, opaque]))


def test_a_file_that_starts_a_program_is_not_opened():
    data = stored(Image.fromarray(pixels(8, 8, 3)), "EPS")
    with pytest.raises(BadImageError, match="it is not an image that Pillow can read here"):
        header_of(io.BytesIO(data), "a.png", Reading())


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_frames_that_are_left_out_are_counted(tmp_path, kind):
    frames = [Image.fromarray(pixels(6, 8, seed=n)) for n in range(4)]
    frames[0].save(tmp_path / "still.png")
    suffix = {"GIF": "gif", "PNG": "png", "TIFF": "tif", "WEBP": "webp"}[kind]
    frames[0].save(
        tmp_path / f"moves.{suffix}", kind, save_all=True, append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )  # fmt: skip
    data = load(tmp_path, image_mode="L")
    assert len(data) == 2 and data.inventory.more_frames == (1, 3)
    assert "only the first frame used of 1, 3 frames left out" in data.inventory.line()
    first, still = data.source.read(0), data.source.read(1)
    assert np.abs(first.astype(int) - still).max() <= 1  # WebP knows colours alone


def test_small_images_are_what_pillow_decodes_to_the_bit(tmp_path):
    for number, (shape, kind) in enumerate(
        [((9, 7), "png"), ((9, 7, 3), "png"), ((64, 48, 3), "jpg"), ((30, 20, 3), "webp")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        Image.fromarray(pixels(*shape)).save(folder / f"a.{kind}")
        with Image.open(folder / f"a.{kind}") as image:
            expected = np.asarray(image).reshape(*shape[:2], -1).transpose(2, 0, 1)
        for fit in (None, Fit((8, 8), "resize_crop"), Fit((4, 4), "crop")):
            got = load(folder).source.read(0, fit)
            assert got.dtype == np.uint8 and np.array_equal(got, expected)


# ------------------------------------------------------------------------------- large images

SHAPES = [(300, 420), (421, 297), (257, 64), (64, 1000)]
MODES = ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "F", "I"]


def smooth(mode, height, width):
    y, x = np.mgrid[0:height, 0:width]
    wave = 0.5 + 0.4 * np.sin(x / 17) * np.cos(y / 23)
    grey = Image.fromarray((wave * 255).astype(np.uint8))
    if mode in ("I;16", "I"):
        return Image.fromarray((wave * 65535).astype(np.uint16 if mode == "I;16" else np.int32))
    if mode == "F":
        return Image.fromarray(wave.astype(np.float32))
    colour = Image.merge("RGB", (grey, ImageOps.invert(grey), grey.transpose(0)))
    return {"P": colour.quantize(64)}.get(mode) or colour.convert(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fit", ["resize_crop", "squash", "crop"])
def test_large_images_become_what_small_ones_do(monkeypatch, mode, fit):
    turned = Image.Exif()
    for number, (height, width) in enumerate(SHAPES):
        turned[0x0112] = 5 + number
        kind = "TIFF" if mode in ("F", "I") else "PNG"
        data = io.BytesIO(stored(smooth(mode, height, width), kind, exif=turned))
        for side in (16, 50):
            want = Fit((side, side), fit)
            crop = np.array([0.3, 0.9])
            monkeypatch.setattr(image_files, "LARGE", 2**40)
            whole = decode(data, "a", Reading(), want, crop)
            monkeypatch.setattr(image_files, "LARGE", 1)
            monkeypatch.setattr(image_files, "_BAND", 5000)  # many bands
            small = decode(data, "a", Reading(), want, crop)
            assert small.dtype == whole.dtype
            if fit == "crop":
                top, left = want.corner(whole.shape[1:], crop)
                assert np.array_equal(small, whole[:, top : top + side, left : left + side])
                continue
            assert small.shape[1:] == want.resized(whole.shape[1:])
            expected = resized(whole, small.shape[1:])
            error = np.abs(small - expected) / np.ptp(whole)
            # rounding to the file's levels; averaging before is exact but for smooth pixels
            assert error.mean() < 0.01 and error.max() < 0.1, (mode, side, error.max())


def resized(array, size):
    bands = [Image.fromarray(band.astype(np.float32)) for band in array]
    return np.stack([np.asarray(b.resize(size[::-1], Image.Resampling.BICUBIC)) for b in bands])


def test_the_bands_of_a_large_image_leave_no_seams(monkeypatch):
    data = io.BytesIO(stored(Image.fromarray(pixels(500, 300, 3)), "PNG"))
    monkeypatch.setattr(image_files, "LARGE", 1)
    want = Fit((40, 40), "squash")
    whole = decode(data, "a", Reading(), want)
    monkeypatch.setattr(image_files, "_BAND", 1)
    assert np.array_equal(decode(data, "a", Reading(), want), whole)


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    data = io.BytesIO(stored(smooth("RGB", 800, 600), "JPEG", quality=95))
    want = Fit((16, 16), "squash")
    whole = resized(decode(data, "a", Reading()), (16, 16))
    seen = []
    real = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda im, box: seen.append(im.size) or real(im, box))
    monkeypatch.setattr(image_files, "LARGE", 1)
    small = decode(data, "a", Reading(), want)
    assert max(seen) <= (75, 100) and np.abs(small - whole).max() < 8


MEASURE = """
import json, resource, sys, warnings
warnings.simplefilter("error")
import torch
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.data.images import load_data
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
data = load_data(TrainingConfig(validation_fraction=0.0, **json.loads(sys.argv[1])))[0]
image = data.batch([0])[0]
json.dump({"peak": peak() - before, "shape": image.shape}, open(sys.argv[2], "w"))
"""


@pytest.mark.parametrize(
    ("mode", "bytes_each", "settings"),
    [
        ("RGB", 3, {"fit": "resize_crop", "image_size": 32}),
        ("RGBA", 4, {"fit": "squash", "image_size": 64, "image_mode": "RGB"}),
        ("P", 1, {"fit": "resize_crop", "image_size": 32, "image_mode": "RGB"}),
        ("RGB", 3, {"fit": "crop", "image_size": 64}),
    ],
)
def test_the_peak_is_little_more_than_the_decoded_image(
    tmp_path, processes, mode, bytes_each, settings
):
    side = 5000
    (tmp_path / "data").mkdir()
    Image.new(mode, (side, side), 7 if mode == "P" else None).save(
        tmp_path / "data" / "a.png", compress_level=1
    )
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    values = json.dumps({"data": str(tmp_path / "data"), **settings})
    processes([script, values, tmp_path / "out.json"], 1, tmp_path)
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["shape"] == [1, 3, settings["image_size"], settings["image_size"]]
    # Pillow keeps colours in four bytes; the bands, and what a process needs anyway, 24 MiB
    assert out["peak"] < 1.5 * bytes_each * side**2 + 24 * 2**20


# --------------------------------------------------------------------------- limits and hostility


def bomb(width, height):
    """A PNG of a few hundred bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_a_limit_comes_with_its_remedy_and_without_a_warning_of_pillow(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(20_000, 20_000))
    with pytest.raises(
        BadImageError, match=r"400000000 pixels.* scale it down, or raise max_image"
    ):
        load(tmp_path)
    assert header_of(tmp_path / "a.png", "a", Reading(max_pixels=400_000_000)).size == (20_000,) * 2
    (tmp_path / "a.png").write_bytes(bomb(10_000, 10_000))  # where Pillow only warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(tmp_path)) == 1
    Image.fromarray(pixels(30, 30)).save(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="900 pixels"):
        load(tmp_path, max_image_pixels=899)
    before = Image.MAX_IMAGE_PIXELS
    assert len(load(tmp_path, max_image_pixels=900)) == 1
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="`max_image_pixels` is 0"):
        TrainingConfig(max_image_pixels=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000"])
def test_damaged_files_are_named_whatever_is_wrong_with_them(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("GIF", "BMP", "JPEG2000") else {"exif": exif}
    whole = np.frombuffer(stored(Image.fromarray(pixels(9, 7, 3)), kind, **options), np.uint8)
    random = np.random.default_rng(0)
    for _ in range(60):
        data = whole.copy()
        at = random.integers(0, min(len(data), 200), 3)
        data[at] = random.integers(0, 256, 3)
        cut = data[: random.integers(1, len(data))] if random.random() < 0.3 else data
        file = io.BytesIO(cut.tobytes())
        for look in (header_of, decode):
            try:
                look(file, "hurt", Reading(max_pixels=10_000_000))
            except ValueError as error:
                assert "hurt" in str(error)


def test_no_file_is_opened_but_a_regular_one(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for path, message in (
        (tmp_path / "pipe.png", "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path, "is no regular file"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(BadImageError, match=message):
            header_of(path, "x", Reading())
    with pytest.raises(
        ValueError, match="`--images` has .*pipe.png', which cannot be read: it is no regular"
    ):
        read_image(tmp_path / "pipe.png", "--images")
