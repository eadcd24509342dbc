import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aegan.image_files import UnusableImageError, decode_image
from tests.pictures import blocks, encode


def decode(content: bytes, **options) -> np.ndarray:
    return decode_image(content, **({"image_size": 16, "image_channels": 3} | options))


def reason(content: bytes, **options) -> str:
    with pytest.raises(UnusableImageError) as caught:
        decode(content, **options)
    return str(caught.value)


PICTURE = blocks(1)[0]


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_files_of_the_right_size_keep_every_pixel(format):
    np.testing.assert_array_equal(decode(encode(PICTURE, format)), PICTURE)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_files_keep_the_picture(format):
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    found = decode(encode(flat, format, quality=95)).astype(int)
    assert np.abs(found - flat).max() <= 4


def test_transparent_parts_become_white_in_every_mode():
    alpha = np.zeros((16, 16, 4), np.uint8)
    palette = Image.fromarray(PICTURE).quantize(8)
    palette.info["transparency"] = bytes(8)
    grey = Image.new("LA", (16, 16), (0, 0))
    for content in (encode(alpha), encode(palette), encode(grey), encode(alpha, "WEBP")):
        assert (decode(content) == 255).all()


def test_half_transparency_is_mixed_with_white():
    half = np.zeros((16, 16, 4), np.uint8)
    half[..., 3] = 128
    assert np.abs(decode(encode(half)).astype(int) - 127).max() <= 1


def test_palette_and_cmyk_and_bilevel_become_rgb():
    palette = Image.fromarray(PICTURE).quantize(256)
    np.testing.assert_array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(encode(red, "TIFF")) - np.array([255, 0, 0])).max() <= 1
    assert (decode(encode(Image.new("1", (16, 16), 1))) == 255).all()


def test_grey_levels_of_16_bits_keep_their_upper_8():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for format in ("PNG", "TIFF"):
        found = decode(encode(Image.fromarray(values), format), image_channels=1)
        np.testing.assert_array_equal(found[..., 0], values >> 8)


def test_one_channel_is_luminance():
    found = decode(encode(PICTURE), image_channels=1)
    np.testing.assert_array_equal(found[..., 0], np.asarray(Image.fromarray(PICTURE).convert("L")))


def test_only_the_first_frame_of_an_animation_counts():
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("blue", "yellow"))
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encode(first, format, save_all=True, append_images=[second])
        assert np.abs(decode(content) - np.array([0, 0, 255])).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    found = decode(encode(Image.fromarray(PICTURE), exif=exif))
    np.testing.assert_array_equal(found, turns[orientation](PICTURE))


def test_crop_takes_the_centre_and_pad_keeps_all_on_white():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = (0, 200, 0)
    assert (decode(encode(wide)) == (0, 200, 0)).all()
    padded = decode(encode(wide), image_size=48, fit="pad")
    np.testing.assert_array_equal(padded[16:32], wide)
    assert (padded[:16] == 255).all()
    assert (padded[32:] == 255).all()


def test_shrinking_averages_instead_of_picking_pixels():
    fine = np.indices((256, 256)).sum(axis=0) % 2 * np.uint8(255)
    assert np.abs(decode(encode(fine.astype(np.uint8))).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_shrinking_a_large_photograph_in_two_steps_is_not_visible(format):
    y, x = np.mgrid[0:1024, 0:1024] / 1024
    waves = [np.sin(8 * x + 5 * y * y + phase) * 110 + 128 for phase in range(3)]
    content = encode(np.stack(waves, axis=-1).astype(np.uint8), format, quality=92)
    whole = Image.open(io.BytesIO(content)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.abs(decode(content).astype(int) - np.asarray(whole)).mean() < 1


def test_the_content_and_not_the_name_says_what_a_file_is():
    assert reason(b"just words").startswith("not an image")
    assert reason(b"%PDF-1.7 ...").startswith("not an image")
    assert reason(b"") == "empty file"
    icon = encode(PICTURE, "ICO")  # a real image, but of no format we take
    assert reason(icon).startswith("not an image")


def test_too_many_pixels_are_refused_before_any_is_decoded():
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    assert reason(bomb).startswith("too many pixels")
    assert reason(encode(PICTURE), max_pixels=255).startswith("too many pixels: 16x16")
    assert decode(encode(PICTURE), max_pixels=256).shape == (16, 16, 3)


def test_values_of_unknown_range_are_refused():
    floats = Image.fromarray(np.ones((16, 16), np.float32))
    assert reason(encode(floats, "TIFF")).startswith("unknown range")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_file_is_refused(format):
    content = encode(blocks(1, size=64)[0], format)
    assert reason(content[: len(content) // 2]).split(":")[0] in (
        "cannot be decoded",
        "not an image",
    )


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]), st.data())
def test_a_damaged_file_gives_an_image_or_a_reason_and_never_another_error(format, data):
    content = bytearray(encode(PICTURE, format))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnusableImageError):
        assert decode(bytes(content)).shape == (16, 16, 3)
