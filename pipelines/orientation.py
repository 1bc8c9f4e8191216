"""The EXIF orientation of an image file: how it is turned, and its size once it is."""

import io
import struct
from typing import Any

from PIL import Image
from PIL.Image import Transpose

_ORIENTATION = 0x0112


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of the turned image, from what its header tells."""
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow give the turned size
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[256]), int(tags[257])
    return (width, height) if orientation_of(image) >= 5 else (height, width)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where it is missing or has no meaning."""
    try:
        # `getexif` of a PNG would decode the pixels to read what follows them.
        value: Any = Image.Image.getexif(image).get(_ORIENTATION)
        if value is None and image.format == "PNG":
            value = _exif_after_pixels(image.fp).get(_ORIENTATION)  # type: ignore[attr-defined]
    except MemoryError:
        raise
    except Exception:  # EXIF data are broken: show it unturned, as viewers do
        return 1
    return int(value) if value in range(1, 9) else 1


def _exif_after_pixels(file: Any) -> Any:
    exif, place = Image.Exif(), file.tell()
    try:
        file.seek(8)
        for _ in range(2**16):  # pixels come in chunks of 8 KiB or more
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                break
            length = struct.unpack(">I", head[:4])[0]
            if head[4:] == b"eXIf" and length < 2**20:
                exif.load(b"Exif\0\0" + file.read(length))
                break
            file.seek(length + 4, io.SEEK_CUR)
    finally:
        file.seek(place)
    return exif


def turn_of(image: Image.Image) -> int:
    """Return the orientation that is left to be applied once the pixels are loaded."""
    return 1 if image.format == "TIFF" else orientation_of(image)  # Pillow turns a TIFF itself


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image as its orientation says it is shown."""
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == 1 else image.transpose(turns[orientation])
