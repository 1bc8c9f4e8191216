"""Image files as pixels: the one way in which this project opens pictures that others made.

An image is taken as every viewer shows it: turned as its EXIF orientation says, the first frame of
several, and what is transparent in the colour of the background. Nothing else is converted except
what the user asked for (`image_mode`) and palettes, which have no other meaning.

Pixels of an image of up to `LARGE` pixels are those that Pillow decodes. A larger image that is to
be resized is made smaller in bands of rows, so that it needs only a few megabytes more than the
decoded image; a JPEG is decoded at a fraction of its size. The result is rounded to the levels of
the file.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError
from PIL.Image import Resampling

from ddim_schedulers.pipelines.orientation import orientation_of, shown_size, turn_of, turned

# Larger images are cropped and reduced first, so that only the pixels that stay are converted.
LARGE = 2**22
# Averaging whole pixels down to this many times the wanted size, and no further, leaves what cubic
# interpolation makes of it as good as unchanged; Pillow's advice for `reducing_gap`.
REDUCING_GAP = 3
_BAND = 2**20  # pixels that are converted at a time
# Pillow lets another program draw these; the file holds commands for that program.
_REFUSED_FORMATS = frozenset({"EPS", "WMF"})
_CHANNELS = {"L": 1, "1": 1, "RGB": 3, "RGBA": 4, "LA": 2, "F": 1, "I": 1}
_CHANNELS |= {"I;16": 1, "I;16B": 1, "I;16L": 1, "I;16N": 1}
_CONVERTED = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
)


@dataclass(frozen=True)
class Fit:
    """The size (height, width) that is wanted, and the way there; see `DataConfig.fit`."""

    size: tuple[int, int]
    how: str

    @property
    def resizes(self) -> bool:
        """Return whether pixels are computed, and not only cut off or added."""
        return self.how in ("squash", "resize_crop")

    def resized(self, have: tuple[int, int]) -> tuple[int, int]:
        """Return the size (height, width) to which an image is resized before the cut."""
        if have == self.size or not self.resizes:
            return have
        if self.how == "squash":
            return self.size
        (height, width), size = have, self.size
        factor = max(size[0] / height, size[1] / width)
        return max(size[0], round(height * factor)), max(size[1], round(width * factor))

    def corner(self, have: tuple[int, int], crop: np.ndarray | None) -> tuple[int, int]:
        """Return top and left of the cut; `crop` (2,) lies in [0, 1], None is the centre."""
        at = (0.5, 0.5) if crop is None else crop
        top, left = (
            min(int(at[i] * (have[i] - self.size[i] + 1)), have[i] - self.size[i]) for i in (0, 1)
        )
        return top, left


class BadImageError(ValueError):
    """An image that cannot be decoded; `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"`data`: cannot read image {name}: {reason}")

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # else its message is made twice in a worker


@dataclass(frozen=True)
class Reading:
    """How files become pixels.

    Attributes:
        mode: see `DataConfig.image_mode`.
        background: see `DataConfig.background`.
        max_pixels: see `DataConfig.max_image_pixels`.
        setting: what named the files, for messages.
    """

    mode: str = "keep"
    background: str = "white"
    max_pixels: int | None = None
    setting: str = "data"


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are decoded.

    Attributes:
        channels: of the pixels that come out.
        size: height and width, as the image is shown.
        dtype: of the pixels that come out.
        stored: mode of the file in Pillow's words, or the dtype of an array.
        turned: whether its EXIF orientation turns or mirrors it.
        frames: images in the file, of which the first is taken.
        alpha: what happens to its transparency, 'composed' or 'kept'; '' where it has none.
    """

    channels: int
    size: tuple[int, int]
    dtype: str
    stored: str = ""
    turned: bool = False
    frames: int = 1
    alpha: str = ""


def header_of(file: io.BytesIO | Path | None, name: str, reading: Reading) -> Header:
    """Return what an image file holds, without decoding its pixels.

    Raises:
        BadImageError: it cannot be read.
        ValueError: it can, but has no mode that is trained on.
    """
    with opened(file, name, reading) as image:
        mode = _mode_of(image, name, reading)
        kept = mode in ("RGBA", "LA")
        return Header(
            _CHANNELS[mode],
            shown_size(image),
            _dtype(mode),
            image.mode,
            orientation_of(image) > 1,
            _frames(image),
            ("kept" if kept else "composed") if _has_alpha(image) else "",
        )


def decode(
    file: io.BytesIO | Path | None,
    name: str,
    reading: Reading,
    fit: Fit | None = None,
    crop: np.ndarray | None = None,
) -> np.ndarray:
    """Return the pixels of an image file, (C, H, W), uint8, uint16, int32 or float32.

    Args:
        file: where it is.
        name: what to call it in a message.
        reading: how to read it.
        fit: what will be made of it. A large image comes out resized or cut accordingly.
        crop: see `Fit.corner`.

    Raises:
        BadImageError: it cannot be read.
        ValueError: it can, but has no mode that is trained on.
    """
    with opened(file, name, reading) as image:
        mode = _mode_of(image, name, reading)
        turn, have = turn_of(image), shown_size(image)
        large = have[0] * have[1] > LARGE
        shrink = fit is not None and fit.resizes and large
        to, box = (1, 1), None
        if shrink and fit is not None:
            height, width = fit.resized(have)
            to = (height, width) if turn >= 5 else (width, height)
            # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size; others ignore this
            drafted = image.draft(None, tuple(REDUCING_GAP * side for side in to))  # type: ignore
            box = None if drafted is None else drafted[1]
        _load(image, name)

        def convert(part: Image.Image) -> Image.Image:
            return _converted(part, mode, reading.background)

        if shrink:
            picture = _shrunk(image, convert, mode, to, box or (0, 0, *image.size))
        elif large and fit is not None and fit.how == "crop":
            picture = convert(image.crop(_window(image, fit, have, crop, turn)))
        else:
            picture = convert(image)
        pixels = _array(turned(picture, turn), mode, image if shrink else None)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadImageError(name, "it holds values that are not finite")
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_shown(file: Path, reading: Reading) -> Image.Image:
    """Return the image of a file as a viewer shows it, in the mode that `reading` says.

    Raises:
        BadImageError: it cannot be read.
        ValueError: it can, but has no mode that is used here.
    """
    pixels = decode(file, repr(str(file)), reading)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


@contextlib.contextmanager
def opened(file: io.BytesIO | Path | None, name: str, reading: Reading) -> Iterator[Image.Image]:
    """Open an image file, identified by its bytes; its pixels are not decoded yet.

    Raises:
        BadImageError: there is none, it is no regular file, no image, or larger than allowed.
    """
    if file is None:
        raise BadImageError(name, "the row holds no image")
    if isinstance(file, Path) and not file.is_file():  # opening a pipe waits for ever
        what = "is no regular file" if file.exists() else "does not exist"
        raise BadImageError(name, f"it {what}")
    Image.init()
    formats = [kind for kind in Image.ID if kind not in _REFUSED_FORMATS]
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is handled or refused here
        try:
            if reading.max_pixels is not None:  # Pillow refuses what has twice as many
                Image.MAX_IMAGE_PIXELS = reading.max_pixels / 2  # type: ignore[assignment]
            try:
                image = Image.open(file, formats=formats)
            except MemoryError:
                raise
            except Exception as error:
                raise BadImageError(name, _reason(error)) from error
            with image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        said = str(error).split(", could be")[0]
        return f"{said}; scale it down, or raise max_image_pixels if you trust the file"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow can read here"
    return str(error) or type(error).__name__


def _mode_of(image: Image.Image, name: str, reading: Reading) -> str:
    """Return the mode in which the pixels are taken."""
    wanted, name = reading.mode, f"`{reading.setting}`: {name}"
    tiles: Any = getattr(image, "tile", ())
    # PIL has no mode for colours of 16 bits: it would drop the lower half.
    if not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in tiles):
        raise ValueError(
            f"{name} has colours of 16 bits a channel, of which PIL reads only 8; store such "
            "images as an array of uint16 in a .npy file, or convert them to 8 bits yourself"
        )
    if image.mode.startswith(("I", "F")) and "transparency" in image.info:
        raise ValueError(
            f"{name} has mode {image.mode} and a transparent value, which cannot be composed "
            "over a background; remove it, or convert the image to 8 bits yourself"
        )
    if wanted != "keep":
        if image.mode.startswith(("I", "F")):  # PIL would clip these to 8 bits
            raise ValueError(f"{name} has mode {image.mode}; image_mode must be keep for it")
        if image.mode not in _CONVERTED:
            raise ValueError(
                f"{name} has mode {image.mode}, which PIL cannot convert to {wanted}; "
                "convert it yourself"
            )
        return wanted
    if image.mode in ("P", "PA"):  # a palette is a way to store colours, not a kind of pixel
        return "RGBA" if _has_alpha(image) else "RGB"
    if image.mode not in _CHANNELS:
        raise ValueError(f"{name} has mode {image.mode}; convert it, or set image_mode")
    return str(image.mode)


def _dtype(mode: str) -> str:
    if mode.startswith("I;16"):
        return "uint16"
    return {"F": "float32", "I": "int32"}.get(mode, "uint8")


def _has_alpha(image: Image.Image) -> bool:
    palette = image.palette if image.mode == "P" else None
    return (
        image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or "transparency" in image.info
        or (palette is not None and palette.mode.endswith("A"))
    )


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is broken; the first one is what is used
        return 1


def _stored_box(
    box: tuple[int, int, int, int], orientation: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return where a box (left, top, right, bottom) of the turned image lies before the turn."""
    left, top, right, bottom = box
    width, height = size
    if orientation >= 5:  # these swap the axes; what is left is one of the first four
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _window(
    image: Image.Image, fit: Fit, have: tuple[int, int], crop: np.ndarray | None, turn: int
) -> tuple[int, int, int, int]:
    """Return the box that `fit` cuts from a large image, before the turn; a small one is whole."""
    if min(np.subtract(have, fit.size)) < 0:
        return 0, 0, *image.size
    top, left = fit.corner(have, crop)
    return _stored_box((left, top, left + fit.size[1], top + fit.size[0]), turn, image.size)


def _converted(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Return an image in `mode`: what is transparent gets the colour of the background."""
    target = "L" if mode == "1" else mode
    if not _has_alpha(image):
        return image if image.mode == target else image.convert(target)
    colour = ImageColor.getrgb(background)[:3]
    if target not in ("RGBA", "LA"):
        ground = Image.new("RGBA", image.size, (*colour, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert(target)
    kept = image.convert(target)
    # Fully transparent pixels have colours that nobody sees.
    unseen = kept.getchannel("A").point(lambda alpha: 255 * (alpha == 0))
    if unseen.getbbox() is None:
        return kept
    empty = Image.new("RGBA", image.size, (*colour, 0)).convert(target)
    return Image.composite(empty, kept, unseen)


def _shrunk(
    image: Image.Image,
    convert: Callable[[Image.Image], Image.Image],
    mode: str,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
) -> Image.Image:
    """Return the box of a large image, converted and resized to (width, height), band by band.

    Pixels of 16 bits come out as floating point.
    """
    work = "L" if mode == "1" else "F" if mode.startswith("I;16") else mode

    def band(top: int, bottom: int) -> Image.Image:
        part = convert(image.crop((0, top, image.width, bottom)))
        return part if part.mode == work else part.convert(work)

    factors = [max(1, int(box[2 + i] / size[i] / REDUCING_GAP)) for i in (0, 1)]
    if max(factors) > 1:
        across, down = factors
        rows = down * max(1, _BAND // (down * image.width))
        small = Image.new(work, (math.ceil(image.width / across), math.ceil(image.height / down)))
        for top in range(0, image.height, rows):
            part = band(top, min(top + rows, image.height)).reduce((across, down))
            small.paste(part, (0, top // down))
        # go on with the small image, which is converted already
        image, convert = small, lambda part: part
        box = (0, 0, box[2] / across, box[3] / down)
    scale = box[3] / size[1]
    margin = math.ceil(2 * max(scale, 1)) + 1  # a cubic kernel reaches two pixels
    rows = max(1, int(_BAND / (image.width * scale)))
    result = Image.new(work, size)
    for top in range(0, size[1], rows):
        bottom = min(top + rows, size[1])
        first = max(0, int(top * scale) - margin)
        part = band(first, min(image.height, math.ceil(bottom * scale) + margin))
        part_box = (0, top * scale - first, box[2], min(bottom * scale - first, part.height))
        result.paste(part.resize((size[0], bottom - top), Resampling.BICUBIC, part_box), (0, top))
    return result


def _array(picture: Image.Image, mode: str, limits: Image.Image | None) -> np.ndarray:
    """Return pixels (H, W) or (H, W, C); a resized image keeps the range of its file."""
    pixels, dtype = np.array(picture), _dtype(mode)
    if limits is not None and dtype != "uint8":
        pixels = np.clip(pixels, *limits.getextrema())
        pixels = pixels if dtype == "float32" else np.rint(pixels)
    return pixels.astype(dtype, copy=False)


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything over foreign bytes
        raise BadImageError(name, _reason(error)) from error
