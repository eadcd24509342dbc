import numpy as np
import pytest
from PIL import Image

from aegan.config import ValueRange
from aegan.data.image_files import UnusableImageError, decode_file, decode_image
from tests.pictures import chunk, encode, png, tiff

RAMP = np.arange(256).reshape(16, 16)
GREY_TIFF = ((258, 16), (259, 1), (262, 1))  # bits, uncompressed, black is zero


def grey(content: bytes, **options) -> np.ndarray:
    options = {"image_size": 16, "image_channels": 1} | options
    return decode_image(content, **options)[..., 0].astype(int)


def reason(content: bytes, **options) -> str:
    with pytest.raises(UnusableImageError) as caught:
        grey(content, **options)
    return str(caught.value)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_value_is_white_at_every_depth_of_a_source(depth):
    most = (1 << depth) - 1
    samples = RAMP * 257 if depth == 16 else RAMP % (most + 1)
    key = int(samples[0, 1])
    content = png(samples, chunk(b"tRNS", key.to_bytes(2, "big")), depth=depth, colour=0)
    expected = np.where(samples == key, 255, samples * 255 // most)
    assert np.abs(grey(content) - expected).max() <= 1
    assert np.abs(grey(png(samples, depth=depth, colour=0)) - samples * 255 // most).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_white_and_its_neighbours_are_not(depth):
    samples = np.stack([RAMP, RAMP, RAMP], axis=-1) + (RAMP[..., None] * 256 if depth == 16 else 0)
    key = samples[3, 3]
    samples[3, 4] = (*key[:2], key[2] + 1)  # differs in the lowest bit alone
    content = png(samples, chunk(b"tRNS", key.astype(">u2").tobytes()), depth=depth)
    found = decode_image(content, image_size=16, image_channels=3).astype(int)
    assert (found[3, 3] == 255).all()
    expected = samples >> 8 if depth == 16 else samples
    expected[3, 3] = 255
    np.testing.assert_array_equal(found, expected)


def test_a_transparent_palette_entry_of_a_source_is_white():
    palette = chunk(b"PLTE", bytes([10, 10, 10, 200, 0, 0, 0, 0, 200]))
    samples = RAMP % 3
    content = png(samples, palette, chunk(b"tRNS", b"\xff\0"), depth=2, colour=3)
    found = decode_image(content, image_size=16, image_channels=3)
    colours = np.array([[10, 10, 10], [255, 255, 255], [0, 0, 200]])
    np.testing.assert_array_equal(found, colours[samples])


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_a_source_of_fewer_bits_than_its_files_has_its_range_found_and_taken(bits):
    most = 2**bits - 1
    samples = (RAMP * most + 127) // 255
    for content in (
        png(samples, depth=16, colour=0),
        encode(Image.fromarray(samples.astype(np.uint16)), "TIFF"),
        tiff(samples.astype(np.uint16), *GREY_TIFF, order=">"),
    ):
        found = decode_file(content, image_size=16, image_channels=1)
        assert found.largest_value == most
        assert found.images[0].max() == 255 >> (16 - bits)  # black
        assert np.abs(grey(content, value_range=f"0..{most}") - RAMP).max() <= 1
    colours = png(np.stack([samples] * 3, axis=-1), depth=16)
    assert decode_file(colours, image_size=16, image_channels=1).largest_value >= most
    assert np.abs(grey(colours, value_range=f"0..{most}") - RAMP).max() <= 1
    named = encode(Image.fromarray(RAMP.astype(np.uint8)))
    np.testing.assert_array_equal(grey(named, value_range=f"0..{most}"), RAMP)  # 8 bits stay


def test_a_source_of_12_bits_that_says_so_needs_no_range():
    samples = RAMP * 16
    packed = np.stack([samples[:, ::2] >> 4, (samples[:, ::2] & 15) << 4 | samples[:, 1::2] >> 8,
                       samples[:, 1::2] & 255], axis=-1).astype(np.uint8)  # fmt: skip
    content = bytearray(tiff(packed.reshape(16, 24), (258, 12), (259, 1), (262, 1)))
    width = content.index(b"\x00\x01\x04\x00\x01\x00\x00\x00\x18")
    content[width + 8] = 16
    np.testing.assert_array_equal(grey(bytes(content)), RAMP)


def test_white_is_zero_in_a_deep_source_that_says_so():
    content = tiff((RAMP * 257).astype(np.uint16), (258, 16), (259, 1), (262, 0))
    np.testing.assert_array_equal(grey(content), 255 - RAMP)


@pytest.mark.parametrize(
    ("kind", "tags", "low", "high"),
    [
        (np.int16, (*GREY_TIFF, (339, 2)), -1024, 3071),
        (np.int32, ((258, 32), (259, 1), (262, 1), (339, 2)), -1024, 3071),
        (np.uint32, ((258, 32), (259, 1), (262, 1)), 2**31, 2**32 - 1),
        (np.float32, ((258, 32), (259, 1), (262, 1), (339, 3)), 0, 1),
    ],
)
def test_signed_long_and_floating_point_sources_are_named_and_read_in_a_range(
    kind, tags, low, high
):
    values = low + RAMP / 255 * (high - low)
    content = tiff(values.astype(kind), *tags)
    assert np.abs(grey(content, value_range=f"{low}..{high}") - RAMP).max() <= 1
    message = reason(content)
    assert message.startswith("unknown range of values: ")
    assert "value_range" in message
    assert f"from {low:g} to {high:g}" in message


def test_a_floating_point_source_may_have_holes():
    values = (RAMP / 255).astype(np.float32)
    values[0, 0], values[15, 15] = np.nan, np.inf
    found = grey(encode(Image.fromarray(values), "TIFF"), value_range="0..1")
    assert np.abs(found - RAMP).max() <= 1


def test_a_range_that_no_source_can_have_is_refused():
    for text in ("", "12", "4095..0", "0..nan", "0..inf", "full..1", "0,4095"):
        with pytest.raises(ValueError, match=r"expected full, or as in 0\.\.4095"):
            ValueRange.parse(text)
