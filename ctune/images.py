"""Bytes to an RGB image: the one rule for ingestion, training and serving. Never imports torch.

The format is taken from the first bytes, never from a name; the size is checked in the header,
before anything is decoded; the first frame is decoded in full. Then, in this order:

===================== ===========================================================================
grey, 16 bit          divided by 257 (65,535 becomes 255), rounded
colour, 16 bit        Pillow keeps the high byte
32 bit, float         refused: nothing says which value is white
palette               through RGBA
alpha                 composited over white
CMYK, YCbCr, HSV      converted plainly; colour profiles are not applied
EXIF orientation      applied
===================== ===========================================================================
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, WebPImagePlugin

from ctune.errors import DataError

Conversion = Literal["alpha", "cmyk", "depth_16", "first_frame", "orientation", "palette"]
ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
LOADED_PLUGINS = (TiffImagePlugin, WebPImagePlugin)
"""Imported here so that Pillow need not load all its 43 formats to find these two."""

DEFAULT_MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 20_000
MAX_JPEG_SCANS = 100
"""Progressive files have about ten; each scan costs a pass over the whole image."""
MAGIC: tuple[tuple[bytes, ImageFormat], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)
OTHER_IMAGES: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
)
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PLAIN_MODES = ("1", "L", "RGB", "RGBX", "YCbCr", "HSV")
ALPHA_MODES = ("LA", "La", "RGBA", "RGBa", "PA")


class ImageError(DataError):
    """One image cannot be used; `error_code` says why.

    Codes: `empty_file`, `not_an_image`, `unsupported_format`, `unsupported_depth`,
    `image_too_large`, `corrupt`.
    """

    code = "corrupt"


@dataclass(frozen=True)
class Decoded:
    """An RGB image and what was done to make it one."""

    image: Image.Image
    conversions: tuple[Conversion, ...]


def decode_rgb(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, max_side_px: int = MAX_SIDE_PX
) -> Image.Image:
    """Return `data` as an RGB image; see `decode`."""
    return decode(data, max_pixels=max_pixels, max_side_px=max_side_px).image


def decode(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, max_side_px: int = MAX_SIDE_PX
) -> Decoded:
    """Decode one image file in full by the rule of this module.

    Raises:
        ImageError: the bytes are no image of a supported kind, are damaged, or break a limit.
    """
    with _opened(data) as image:
        _check_size(image.size, max_pixels=max_pixels, max_side_px=max_side_px)
        kind = image_format(data)
        if kind == "JPEG" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
            raise ImageError("the JPEG has more scans than an image needs")
        return _to_rgb(image, kind)


def header_size_px(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) as the header says, before EXIF transposition, without decoding.

    Raises:
        ImageError: as `decode`, for what the header alone shows.
    """
    with _opened(data) as image:
        _check_size(image.size, max_pixels=max_pixels, max_side_px=MAX_SIDE_PX)
        return image.size


def image_format(head: bytes) -> ImageFormat:
    """Return the format that the first bytes of a file name (16 are enough).

    Raises:
        ImageError: none of the supported ones.
    """
    if not head:
        raise ImageError("the file is empty", code="empty_file")
    for magic, kind in MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    for offset, magic, name in OTHER_IMAGES:
        if head[offset:].startswith(magic):
            message = f"{name} files are not supported; convert it to JPEG or PNG"
            raise ImageError(message, code="unsupported_format")
    raise ImageError(
        f"the file is no image: it starts with {head[:8]!r}",
        hint="supported are JPEG, PNG, WebP, BMP, GIF and TIFF",
        code="not_an_image",
    )


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image for the block; whatever goes wrong in it is an `ImageError`."""
    kind = image_format(data)
    _quiet_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), code="image_too_large") from error
    except MemoryError as error:
        message = "decoding needs more memory than an image may take"
        raise ImageError(message, code="image_too_large") from error
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        reason = str(error) or type(error).__name__
        raise ImageError(f"the {kind} cannot be decoded: {reason}") from error


def _quiet_pillow() -> None:
    """Silence Pillow's warnings for good: what matters in them is an `ImageError` here.

    A process-wide filter, since `warnings.catch_warnings` is not safe among threads.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[0] != "ignore" or getattr(first[3], "pattern", "") != r"PIL(\.|$)":
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


def _check_size(size: tuple[int, int], *, max_pixels: int, max_side_px: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels: {width} x {height}")
    if max(size) > max_side_px or width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} px is more than {max_pixels} pixels or {max_side_px} px a side",
            code="image_too_large",
        )


def _to_rgb(image: Image.Image, kind: ImageFormat) -> Decoded:
    """Decode the first frame and convert it."""
    done: list[Conversion] = []
    if getattr(image, "is_animated", False):
        done.append("first_frame")
    orientation = _orientation(image) if kind == "TIFF" else 1
    image.load()
    turned = orientation != 1  # Pillow turns a TIFF itself while it loads it
    orientation = _orientation(image)
    if image.mode == "CMYK":
        done.append("cmyk")
    rgb = _convert(image, done)
    if orientation in TRANSPOSE:
        rgb = rgb.transpose(TRANSPOSE[orientation])
        turned = True
    if turned:
        done.append("orientation")
    return Decoded(rgb, tuple(sorted(done)))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none or it is unreadable."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1
    return value if value in TRANSPOSE else 1


def _convert(image: Image.Image, done: list[Conversion]) -> Image.Image:
    """Return the loaded frame as RGB, noting in `done` what that took."""
    if image.mode.startswith("I;16"):
        done.append("depth_16")
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        message = f"pixels of mode {image.mode} (32 bit or float) have no known white"
        raise ImageError(message, code="unsupported_depth")
    if image.mode == "P":
        done.append("palette")
    if image.mode in ("P", *ALPHA_MODES) or "transparency" in image.info:
        return _over_white(image.convert("RGBA"), done)
    if image.mode in (*PLAIN_MODES, "CMYK"):
        return image.convert("RGB")
    raise ImageError(f"pixels of mode {image.mode} are not supported", code="unsupported_format")


def _over_white(rgba: Image.Image, done: list[Conversion]) -> Image.Image:
    lowest, _ = rgba.getchannel("A").getextrema()
    if lowest == 255:
        return rgba.convert("RGB")
    done.append("alpha")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")
