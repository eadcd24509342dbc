import contextlib
import importlib.util
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aegan.data.image_files import UnusableImageError, decode_file, decode_image
from tests.pictures import blocks, chunk, encode, png, tiff


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


LOSSLESS = {
    "PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "TGA": {}, "JPEG2000": {},
    "WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}  # fmt: skip


@pytest.mark.parametrize("format", LOSSLESS)
def test_every_format_of_a_source_is_read(format):
    found = decode(encode(PICTURE, format, **LOSSLESS[format])).astype(int)
    assert np.abs(found - PICTURE).max() <= (2 if format == "AVIF" else 0)
    grey = encode(PICTURE[..., :1], format, **LOSSLESS[format])
    assert np.abs(decode(grey).astype(int) - PICTURE[..., :1]).max() <= 2


def test_portable_maps_in_a_source_are_read_in_all_their_kinds():
    grey = PICTURE[..., 0]
    numbers = b" ".join(b"%d" % value for value in grey.ravel())
    stripes = np.tile(np.array([255, 0], np.uint8), (16, 8))
    kinds = [
        (b"P2\n# made by hand\n16 16 255\n" + numbers, grey),
        (b"P5 16 16 255 " + grey.tobytes(), grey),
        (b"P5 16 16 4095 " + (grey * np.uint16(16)).astype(">u2").tobytes(), grey),
        (b"P5 16 16 65535 " + (grey * np.uint16(257)).astype(">u2").tobytes(), grey),
        (b"P5 16 16 100 " + (grey // 3).tobytes(), np.round(grey // 3 * 2.55)),
        (b"P6 16 16 100 " + (PICTURE // 3).tobytes(), np.round(PICTURE // 3 * 2.55)),
        (b"P6 16 16 65535 " + (PICTURE * np.uint16(257)).astype(">u2").tobytes(), PICTURE),
        (b"P6 16 16 4095 " + (PICTURE * np.uint16(16)).astype(">u2").tobytes(), PICTURE),
        (b"P1 16 16 " + b"01" * 128, stripes),
        (b"P4 16 16 " + b"\x55" * 32, stripes),
        (b"P6 16 16 255\n" + PICTURE.tobytes(), PICTURE),
    ]
    for content, expected in kinds:
        channels = 1 if expected.ndim == 2 else 3
        found = decode(content, image_channels=channels).squeeze()
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert reason(b"P5 16 16 100 " + bytes(255)) == "cannot be decoded: the file ends too early"
    assert "slowly" in reason(b"P2 5000 5000 255 0")


@pytest.mark.parametrize("options", [{}, {"compression": "tga_rle"}])
def test_a_targa_picture_of_a_source_needs_no_footer(options):
    content = encode(PICTURE, "TGA", **options)
    assert content.endswith(b"TRUEVISION-XFILE.\0")
    bare = content[:-26]
    np.testing.assert_array_equal(decode(bare), PICTURE)
    if not options:
        assert reason(bare[:-1]).startswith("not an image")


def test_heic_in_a_source_is_named_with_the_cure():
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    if importlib.util.find_spec("pillow_heif"):
        assert reason(heic).startswith("cannot be decoded")
    else:
        assert reason(heic).startswith("not an image: HEIC is read once pillow-heif is there")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_source_that_lacks_only_its_end_is_read(progressive):
    whole = encode(blocks(1, size=64)[0], "JPEG", progressive=progressive)
    assert whole.endswith(b"\xff\xd9")
    for cut in (1, 2):
        np.testing.assert_array_equal(decode(whole[:-cut]), decode(whole))
    too_early = "cannot be decoded: the file ends too early"
    assert reason(whole[: len(whole) * 3 // 4]) == too_early
    assert reason(whole[: len(whole) * 3 // 4] + b"\xff") == too_early


@pytest.mark.fault("damaged files")
def test_too_many_pixels_are_refused_before_any_is_decoded():
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels
    assert reason(bomb).startswith("too many pixels")
    assert reason(encode(PICTURE), max_pixels=255).startswith("too many pixels: 16x16")
    assert decode(encode(PICTURE), max_pixels=256).shape == (16, 16, 3)


def halves(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, its left half white."""
    row = b"\0" + b"\xff" * (width // 16) + bytes(width // 16)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(row * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_max_pixels_of_a_source_means_what_it_says_above_the_decoders_own_limit():
    width, height = 24_000, 8_000
    assert width * height > 178_956_970
    found = decode(halves(width, height), max_pixels=width * height, fit="pad")
    assert found[8, :7].min() >= 254
    assert found[8, 9:].max() <= 1
    said = reason(halves(width, height), max_pixels=width * height - 1)
    assert said.startswith("too many pixels: 24000x8000")


def test_a_large_jpeg_of_a_source_is_read_at_a_reduced_scale():
    content = encode(np.full((512, 1024, 3), (200, 30, 90), np.uint8), "JPEG", quality=95)
    assert np.abs(decode(content, max_pixels=10_000).astype(int) - (200, 30, 90)).max() <= 4
    assert reason(content, max_pixels=5_000).startswith("too many pixels: 1024x512")
    progressive = encode(PICTURE.repeat(64, axis=0).repeat(32, axis=1), "JPEG", progressive=True)
    assert reason(progressive, max_pixels=50_000).startswith("too many pixels: 512x1024 in a prog")


@pytest.mark.fault("damaged files")
def test_a_jpeg_source_of_thousands_of_scans_is_refused():
    content = encode(blocks(1, size=512)[0], "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    scan = content[last:-2]
    assert reason(content[:-2] + scan * 5000 + content[-2:]).startswith("too many scans")
    assert decode(content[:-2] + scan * 20 + content[-2:]).shape == (16, 16, 3)
    np.testing.assert_array_equal(  # as if a video were behind the picture, as phones write
        decode(content + b"\xff\xda" * 5000), decode(content)
    )


@pytest.mark.fault("damaged files")
def test_a_source_file_of_a_hundred_thousand_parts_is_refused_before_it_is_opened():
    jpeg, part = encode(PICTURE, "JPEG"), b"\xff\xe5\0\2"
    assert reason(jpeg[:2] + part * 110_000 + jpeg[2:]).endswith("more than 100000 parts")
    assert reason(png(PICTURE, chunk(b"prVt", b"") * 110_000)).endswith("more than 100000 parts")
    np.testing.assert_array_equal(
        decode(jpeg[:2] + part * 1000 + jpeg[2:] + bytes(10**6)), decode(jpeg)
    )


@pytest.mark.fault("damaged files")
def test_a_tiff_source_of_costly_strips_or_tiles_is_refused():
    grey = ((258, 8), (259, 1), (262, 1))
    content = tiff(np.zeros((16, 16), np.uint8), *grey)
    np.testing.assert_array_equal(decode(content), 0)
    at = content.index(struct.pack("<HHI", 273, 4, 1))
    strips = content[: at + 4] + struct.pack("<II", 10**7, 8) + content[at + 12 :]
    assert reason(strips + bytes(10**6)).endswith("more than 100000 parts")
    tiles = tiff(np.zeros((16, 16), np.uint8), *grey, (322, 40_000), (323, 40_000), (324, 8))
    assert "40000x40000" in reason(tiles)


def test_long_texts_and_profiles_in_a_png_source_do_not_lose_the_picture():
    bomb = zlib.compress(bytes(4 * 2**20))
    for extra in (chunk(b"zTXt", b"key\0\0" + bomb), chunk(b"iCCP", b"key\0\0" + bomb)):
        np.testing.assert_array_equal(decode(png(PICTURE, extra)), PICTURE)


@pytest.mark.fault("damaged files")
def test_a_jpeg2000_source_that_belies_its_size_is_refused():
    content = bytearray(encode(PICTURE, "JPEG2000"))
    at = content.index(b"\xff\x4f\xff\x51") + 8
    struct.pack_into(">II", content, at, 60_000, 60_000)
    struct.pack_into(">II", content, at + 16, 60_000, 60_000)
    assert "60000x60000" in reason(bytes(content))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_all_frames_of_a_source_are_taken_when_asked_for_and_counted_else(format):
    pictures = [Image.fromarray(image) for image in blocks(4)]
    content = encode(
        pictures[0], format, save_all=True, append_images=pictures[1:], **LOSSLESS.get(format, {})
    )
    options = {"image_size": 16, "image_channels": 3}
    first = decode_file(content, **options)
    assert len(first.images) == 1
    assert first.left_out == 3
    every = decode_file(content, **options, frames="all")
    assert len(every.images) == 4
    assert every.left_out == 0
    np.testing.assert_array_equal(every.images[0], first.images[0])
    for found, picture in zip(every.images, blocks(4), strict=True):
        assert np.abs(found.astype(int) - picture).mean() < 4


def test_more_frames_of_a_source_than_one_file_may_cost_are_refused():
    pictures = [Image.fromarray(image) for image in blocks(30)]
    content = encode(pictures[0], "TIFF", save_all=True, append_images=pictures[1:])
    with pytest.raises(UnusableImageError, match="too many frames: 30 of 16x16, at most 20"):
        decode_file(content, image_size=16, image_channels=3, max_pixels=256, frames="all")
    assert decode(content, max_pixels=256).shape == (16, 16, 3)


@pytest.mark.fault("damaged files")
def test_lack_of_memory_is_no_fault_of_the_source(tmp_path):
    script = """
import resource, sys
from aegan.data.image_files import decode_image
content = open(sys.argv[1], "rb").read()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000,) * 2)
try:
    decode_image(content, image_size=16, image_channels=3)
except MemoryError:
    print("MemoryError")
"""
    for format in ("PNG", "BMP", "TIFF"):
        (tmp_path / "large").write_bytes(encode(Image.new("RGB", (6000, 6000)), format))
        command = [sys.executable, "-c", script, str(tmp_path / "large")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.stdout == "MemoryError\n", (format, result.stderr)


def test_values_of_unknown_range_are_refused():
    floats = Image.fromarray(np.ones((16, 16), np.float32))
    assert reason(encode(floats, "TIFF")).startswith("unknown range")


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_file_is_refused(format):
    content = encode(blocks(1, size=64)[0], format)
    assert reason(content[: len(content) // 2]).split(":")[0] in (
        "cannot be decoded",
        "not an image",
    )


@pytest.mark.fault("damaged files")
@settings(deadline=None)
@given(st.sampled_from([*LOSSLESS, "JPEG", "GIF"]), st.data())
def test_a_damaged_file_gives_an_image_or_a_reason_and_never_another_error(format, data):
    content = bytearray(encode(PICTURE, format))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnusableImageError):
        assert decode(bytes(content)).shape == (16, 16, 3)
        assert decode_file(bytes(content), image_size=16, image_channels=3, frames="all").images


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_the_reason_for_a_damaged_source_is_a_plain_sentence(noise):
    for start in (encode(PICTURE, format)[:30] for format in ("PNG", "PPM", "TIFF", "GIF", "BMP")):
        with contextlib.suppress(UnusableImageError):
            decode(start + noise)
            continue
        said = reason(start + noise)
        assert "Error" not in said
        assert "b'" not in said
