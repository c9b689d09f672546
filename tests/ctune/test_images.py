"""The conversion rule, and every bad image of the policy table."""

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from ctune.images import ImageError, decode, decode_rgb, image_format


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 20, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, channels), dtype=np.uint8))


def png_header(width: int, height: int, payload: bytes = b"") -> bytes:
    """Make a valid 8-bit grey PNG header of any size; the pixels stay unwritten."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", payload or zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **limits)
    assert caught.value.fault == "user"
    return caught.value.error_code


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_by_magic(kind: str) -> None:
    data = encode(noise(), kind)
    assert image_format(data[:16]) == kind
    image = decode_rgb(data)
    assert (image.mode, image.size) == ("RGB", (40, 20))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_pixels_are_kept(kind: str) -> None:
    decoded = decode(encode(noise(), kind))
    assert decoded.conversions == ()
    assert np.array_equal(np.asarray(decoded.image), np.asarray(noise()))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"hello world, I am text", "not_an_image"),
        (b"<!DOCTYPE html><html></html>", "not_an_image"),
        (b"\0" * 100, "not_an_image"),
        (b"\x00\x00\x00\x1cftypavif" + b"\0" * 50, "unsupported_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_format"),
        (b"SIMPLE  =                    T", "unsupported_format"),
        (b"8BPS\0\1" + b"\0" * 50, "unsupported_format"),
        (b"\xff\xd8\xff", "corrupt"),
        (b"\x89PNG\r\n\x1a\n", "corrupt"),
        (b"BM", "corrupt"),
        (b"GIF89a", "corrupt"),
        (b"II*\0", "corrupt"),
        (b"RIFF\x10\0\0\0WEBP", "corrupt"),
    ],
)
def test_what_is_no_image(data: bytes, code: str) -> None:
    assert code_of(data) == code


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.25, 0.5, 0.9, 0.99])
def test_truncated(kind: str, part: float) -> None:
    data = encode(noise(200, 200), kind)
    assert code_of(data[: int(len(data) * part)]) == "corrupt"


def test_a_huge_header_is_refused_without_decoding() -> None:
    data = png_header(40_000, 40_000, zlib.compress(bytes(50_000_000)))
    tracemalloc.start()
    assert code_of(data) == "image_too_large"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_limits_on_area_and_side() -> None:
    assert code_of(png_header(13_000, 13_000)) == "image_too_large"  # Pillow itself only warns
    assert code_of(png_header(20_001, 1)) == "image_too_large"
    data = encode(noise(), "PNG")
    assert code_of(data, max_pixels=799) == "image_too_large"
    assert code_of(data, max_side_px=39) == "image_too_large"
    decode(data, max_pixels=800, max_side_px=40)


def test_no_warning_escapes_even_among_threads() -> None:
    bomb = png_header(9_900, 9_900)
    data = encode(noise(), "PNG")

    def once(n: int) -> str:
        try:
            decode(bomb if n % 2 else data)
        except ImageError as error:
            return error.error_code
        return "fine"

    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        assert set(pool.map(once, range(200))) == {"fine", "image_too_large"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        once(1)
    assert seen == []


def test_memory_that_runs_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert code_of(encode(noise(), "BMP")) == "image_too_large"


def test_a_jpeg_with_absurdly_many_scans_is_refused() -> None:
    data = encode(noise(), "JPEG")
    assert code_of(data[:-2] + b"\xff\xda" * 200 + data[-2:]) == "corrupt"
    decode(encode(noise(), "JPEG", progressive=True))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_value(kind: str) -> None:
    values = np.array([[0, 40_000, 65_535, 257, 128, 129]], dtype=np.uint16)
    decoded = decode(encode(Image.fromarray(values), kind))
    assert decoded.conversions == ("depth_16",)
    assert np.asarray(decoded.image)[0, :, 0].tolist() == [0, 156, 255, 1, 0, 1]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_is_refused(dtype: type) -> None:
    data = encode(Image.fromarray(np.ones((4, 4), dtype=dtype)), "TIFF")
    assert code_of(data) == "unsupported_depth"


def test_alpha_is_over_white_and_hides_what_it_hid() -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 0] = 255  # red everywhere
    pixels[0, :, 3] = (0, 255, 128)
    decoded = decode(encode(Image.fromarray(pixels), "PNG"))
    assert decoded.conversions == ("alpha",)
    assert np.asarray(decoded.image)[0].tolist() == [[255] * 3, [255, 0, 0], [255, 127, 127]]


def test_opaque_alpha_is_no_conversion() -> None:
    image = noise()
    image.putalpha(255)
    decoded = decode(encode(image, "PNG"))
    assert decoded.conversions == ()
    assert np.array_equal(np.asarray(decoded.image), np.asarray(noise()))


def test_grey_with_alpha_and_transparent_colour() -> None:
    grey = Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8))
    assert grey.mode == "LA"
    assert np.asarray(decode_rgb(encode(grey, "PNG")))[0, :, 0].tolist() == [255, 10]
    rgb = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8))
    decoded = decode(encode(rgb, "PNG", transparency=(9, 8, 7)))
    assert decoded.conversions == ("alpha",)
    assert np.asarray(decoded.image)[0].tolist() == [[255] * 3, [1, 2, 3]]


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    decoded = decode(encode(image, "PNG"))
    assert decoded.conversions == ("palette",)
    assert np.asarray(decoded.image)[0].tolist() == [[255, 0, 0], [0, 255, 0]]
    decoded = decode(encode(image, "PNG", transparency=b"\x00\xff"))
    assert decoded.conversions == ("alpha", "palette")
    assert np.asarray(decoded.image)[0].tolist() == [[255] * 3, [0, 255, 0]]


def test_cmyk() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    decoded = decode(data)
    assert decoded.conversions == ("cmyk",)
    red, green, blue = np.asarray(decoded.image)[4, 4].tolist()
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste("white", (0, 0, 10, 5))  # a mark at the top left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # inverse of what a viewer does
    stored = upright
    if orientation > 1:
        stored = upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(stored, kind, exif=exif))
    assert decoded.image.size == (40, 20)
    assert decoded.conversions == (() if orientation == 1 else ("orientation",))
    pixels = np.asarray(decoded.image)[..., 0]
    assert pixels[1, 1] > 200
    assert max(pixels[-2, 1], pixels[1, -2], pixels[-2, -2]) < 60


def test_a_damaged_exif_block_costs_nothing() -> None:
    data = encode(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert decode_rgb(data).size == (40, 20)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    decoded = decode(data)
    assert "first_frame" in decoded.conversions
    red, green, blue = np.asarray(decoded.image)[4, 4].tolist()
    assert red > 230
    assert max(green, blue) < 25


def test_first_frame_of_mpo() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    decoded = decode(encode(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert decoded.conversions == ("first_frame",)
    assert np.asarray(decoded.image)[8, 8, 0] > 200


def test_polyglot_counts_as_the_image_it_starts_as() -> None:
    assert decode_rgb(encode(noise(), "JPEG") + b"PK\x03\x04 and so on").size == (40, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_random_damage_raises_nothing_but_image_errors(kind: str) -> None:
    data = encode(noise(64, 64), kind)
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        places = rng.integers(0, len(damaged), rng.integers(1, 8))
        damaged[places] = rng.integers(0, 256, len(places))
        try:
            image = decode_rgb(damaged.tobytes(), max_pixels=1_000_000)
        except ImageError:
            continue
        assert image.mode == "RGB"
