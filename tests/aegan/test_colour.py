"""Files that state their colours, against the same colours computed here by the formulas."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from aegan.data import colour
from aegan.data.image_files import decode_image
from tests.pictures import blocks, chunk, encode, png

RIGHT = blocks(1)[0] // 2 + 64  # sRGB, within what every space here can hold
GREY = RIGHT[..., 0]
BT2020 = (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
DISPLAY_P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
ADOBE = (0.3127, 0.3290, 0.640, 0.330, 0.210, 0.710, 0.150, 0.060)
SRGB = (0.3127, 0.3290, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)


def decode(content: bytes, channels: int = 3) -> np.ndarray:
    return decode_image(content, image_size=16, image_channels=channels).astype(int)


def linear(srgb: np.ndarray) -> np.ndarray:
    v = srgb / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def to_xyz(xy: tuple[float, ...]) -> np.ndarray:
    points = np.array(xy).reshape(4, 2)
    white, *primaries = np.column_stack([points, 1 - points.sum(axis=1)]) / points[:, 1:]
    matrix = np.array(primaries).T
    return matrix * np.linalg.solve(matrix, white)


def light_in(xy: tuple[float, ...], srgb: np.ndarray = RIGHT) -> np.ndarray:
    """The light [0, 1] of sRGB colours in other primaries of the same white."""
    return np.clip(linear(srgb) @ (np.linalg.inv(to_xyz(xy)) @ to_xyz(SRGB)).T, 0, 1)


def levels(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


def srgb_curve(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def bt709_curve(light: np.ndarray) -> np.ndarray:
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


def coded(primaries: int, transfer: int, full: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, 0, full]))


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def chromaticities(xy: tuple[float, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in xy)))


def icc(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


def profile_in(xy: tuple[float, ...], exponent: float) -> bytes:
    """An ICC profile written here, by LittleCMS' own idea of white."""
    made = colour._profile(xy, lambda values: values**exponent)
    assert made
    return made


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def grey_profile(exponent: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(exponent * 256))
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = struct.pack(">I", 2)
    tags += b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 16)
    body = tags + white + curve
    header = struct.pack(">I4xI", 128 + len(body), 0x02400000) + b"mntrGRAYXYZ " + bytes(12)
    return (header + b"acsp" + bytes(28) + white[8:]).ljust(128, b"\0") + body


INKS = np.array([[0, 174, 239], [236, 0, 140], [255, 242, 0], [35, 31, 32]])  # C, M, Y, K


def press_profile() -> bytes:
    """A CMYK profile of 16 colours: all overprints, each the product of its inks."""
    corners = np.indices((2, 2, 2, 2)).reshape(4, 16).T
    paper = np.where(corners[..., None], INKS / 255, 1.0).prod(axis=1)
    d50 = np.array([0.9642, 1.0, 0.8249])
    bradford = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
         [0.0139322, 0.0971045, 0.7141733]]
    )  # fmt: skip
    ratio = linear(paper * 255) @ bradford.T / d50
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)
    table = np.round(np.clip(lab * [2.55, 1, 1] + [0, 128, 128], 0, 255)).astype(np.uint8)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int))
    lut = b"mft1\0\0\0\0\4\3\2\0" + matrix + identity * 4 + table.tobytes() + identity * 3
    tags = struct.pack(">I", 1) + b"A2B0" + struct.pack(">II", 144, len(lut))
    header = struct.pack(">I4xI", 144 + len(lut), 0x02400000) + b"prtrCMYKLab " + bytes(12)
    white = struct.pack(">3i", 63190, 65536, 54061)
    return (header + b"acsp" + bytes(28) + white).ljust(128, b"\0") + tags + lut


def with_p3(values: np.ndarray, *chunks: bytes) -> bytes:
    return png(levels(srgb_curve(light_in(DISPLAY_P3, values))), coded(12, 13), *chunks)


STATED = {
    "icc": png(levels(light_in(ADOBE) ** (1 / 2.2)), icc(profile_in(ADOBE, 2.2))),
    "icc of sRGB": png(RIGHT, icc(srgb_profile())),
    "cicp Display P3": with_p3(RIGHT),
    "cicp BT.2020": png(levels(bt709_curve(light_in(BT2020))), coded(9, 14)),
    "cicp BT.709": png(levels(bt709_curve(linear(RIGHT))), coded(1, 1)),
    "cicp gamma 2.2": png(levels(linear(RIGHT) ** (1 / 2.2)), coded(1, 4)),
    "cicp gamma 2.8": png(levels(linear(RIGHT) ** (1 / 2.8)), coded(1, 5)),
    "cicp linear": png(levels(linear(RIGHT)), coded(1, 8)),
    "cicp narrow": png(np.round(16 + RIGHT / 255 * 219).astype(np.uint8), coded(1, 13, 0)),
    "gAMA linear": png(levels((RIGHT / 255) ** 2.2), gamma(1)),
    "gAMA of sRGB": png(RIGHT, gamma(1 / 2.2)),
    "gAMA and cHRM": png(
        levels(srgb_curve(light_in(ADOBE)) ** 2.2), gamma(1), chromaticities(ADOBE)
    ),
    "cHRM": png(levels(srgb_curve(light_in(DISPLAY_P3))), chromaticities(DISPLAY_P3)),
    "none": png(RIGHT),
}  # fmt: skip


@pytest.mark.parametrize("statement", STATED)
def test_colours_come_out_as_the_file_states_them(statement):
    assert np.abs(decode(STATED[statement]) - RIGHT).max() <= 3


def test_grey_follows_the_colour_statements_too():
    cases = {
        "gamma": png(levels((GREY / 255) ** 2.2), gamma(1), colour=0),
        "icc": png(levels(linear(GREY) ** (1 / 1.8)), icc(grey_profile(1.8)), colour=0),
        "rgb profile": encode(
            levels(linear(GREY) ** (1 / 1.8)), "TIFF", icc_profile=profile_in(SRGB, 1.8)
        ),
    }
    for channels in (1, 3):
        for name, content in cases.items():
            difference = decode(content, channels) - GREY[..., None]
            assert np.abs(difference).max() <= 2, name


@pytest.mark.parametrize(
    ("chunks", "counts"),
    [
        ([coded(12, 13), icc(srgb_profile()), chunk(b"sRGB", b"\0"), gamma(1)], "cICP"),
        ([icc(profile_in(DISPLAY_P3, 2.2)), chunk(b"sRGB", b"\0"), gamma(1)], "iCCP"),
        ([chunk(b"sRGB", b"\0"), gamma(1), chromaticities(DISPLAY_P3)], "sRGB"),
        ([gamma(1), chromaticities(SRGB)], "gAMA"),
        ([coded(1, 13), gamma(1)], "sRGB"),
        ([coded(2, 2), gamma(1)], "gAMA"),  # unspecified
    ],
)
def test_of_several_colour_statements_the_one_counts_that_png_says(chunks, counts):
    alone = {
        "cICP": [coded(12, 13)],
        "iCCP": [icc(profile_in(DISPLAY_P3, 2.2))],
        "sRGB": [],
        "gAMA": [gamma(1)],
    }
    np.testing.assert_array_equal(decode(png(RIGHT, *chunks)), decode(png(RIGHT, *alone[counts])))


def test_the_four_colour_statements_of_the_order_above_differ():
    one = [decode(png(RIGHT, *c)) for c in ([], [coded(12, 13)], [gamma(1)])]
    assert np.abs(one[0] - one[1]).max() > 5
    assert np.abs(one[0] - one[2]).max() > 5


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "TIFF", "PNG"])
def test_the_colour_profile_counts_in_every_format_that_carries_one(format):
    flat = np.full((16, 16, 3), RIGHT[0, 0], np.uint8)
    stored = levels(light_in(ADOBE, flat) ** (1 / 2.2))
    content = encode(stored, format, icc_profile=profile_in(ADOBE, 2.2), quality=95)
    assert np.abs(decode(content) - flat).max() <= 5


def test_a_colour_picture_for_a_press_gets_the_colours_of_its_inks():
    for ink, expected in zip(np.eye(4, dtype=np.uint8) * 255, INKS, strict=True):
        flat = Image.fromarray(np.broadcast_to(ink, (16, 16, 4)).copy(), "CMYK")
        for format in ("JPEG", "TIFF"):
            content = encode(flat, format, icc_profile=press_profile())
            assert np.abs(decode(content) - expected).mean() <= 6
        assert np.abs(decode(encode(flat, "JPEG")) - flat.convert("RGB").getpixel((0, 0))).max() < 3


def test_lab_colours_are_converted():
    lab = Image.frombytes("LAB", (16, 16), bytes([137, 208 - 128, 195 - 128]) * 256)  # near red
    found = decode(encode(lab, "TIFF"))[0, 0]
    assert found[0] > 220
    assert found[1:].max() < 60


def test_colours_count_under_transparency_too_and_white_stays_white():
    half = np.zeros((16, 16, 4), np.uint8)
    half[..., :3] = levels(srgb_curve(light_in(DISPLAY_P3)))
    half[:, :8, 3] = 255
    found = decode(png(half, coded(12, 13), colour=6))
    assert np.abs(found[:, :8] - RIGHT[:, :8]).max() <= 3
    assert (found[:, 8:] == 255).all()


def test_a_large_colour_picture_is_converted_after_it_was_shrunk_with_no_visible_difference():
    large = blocks(1, size=256)[0] // 2 + 64
    y, x = np.mgrid[0:256, 0:256] / 256
    large = (large * 0.3 + (60 * x + 60 * y * y)[..., None]).astype(np.uint8)
    plain = decode(png(large))
    converted = decode(with_p3(large))
    assert np.abs(converted - plain).max() <= 3


def test_high_dynamic_range_colours_keep_order_and_shades():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 3)).reshape(16, 16, 3)
    for transfer in (16, 18):  # PQ, HLG
        found = decode(png(ramp, coded(9, transfer))).reshape(256, 3)
        assert (np.diff(found, axis=0) >= 0).all()
        assert found[0].max() == 0
        assert found[-1].min() >= 250
    white = 148  # of 255: PQ's value for 203 candela a square metre
    assert 190 <= decode(png(ramp, coded(9, 16))).reshape(256, 3)[white].min() <= 240


def test_avif_that_states_its_colours_by_numbers_alone():
    content = encode(np.full((16, 16, 3), 120, np.uint8), "AVIF", quality=100)
    at = content.index(b"colrnclx") + 8
    linear_light = content[:at] + struct.pack(">HH", 1, 8) + content[at + 4 :]
    assert abs(decode(linear_light)[0, 0, 0] - decode(content)[0, 0, 0]) > 40


def test_a_picture_with_an_absurd_colour_statement_is_read_as_it_is():
    truth = decode(png(RIGHT))
    sound = profile_in(ADOBE, 2.2)
    zeros = bytes(len(sound))
    absurd = [
        [icc(b"")],
        [icc(sound[:100])],
        [icc(zeros)],
        [icc(sound[:16] + b"XYZ " + sound[20:])],
        [icc(press_profile())],
        [icc(grey_profile(1.8))],
        [icc(bytes(2**21))],  # Pillow refuses files with longer profiles
        [chunk(b"iCCP", b"x\0\0not compressed")],
        [coded(200, 200)],
        [coded(12, 255)],
        [chunk(b"cICP", b"\x0c")],
        [gamma(0)],
        [gamma(1000)],
        [gamma(1 / 2.2), chromaticities((0,) * 8)],
        [chromaticities((0.3,) * 8)],
    ]
    for chunks in absurd:
        np.testing.assert_array_equal(decode(png(RIGHT, *chunks)), truth)
    for profile in (b"", zeros, press_profile(), sound[:130]):
        content = encode(RIGHT, "TIFF", icc_profile=profile)
        np.testing.assert_array_equal(decode(content), truth)


@settings(deadline=None)  # a damaged table may take a while
@given(st.data())
def test_a_damaged_colour_profile_never_loses_the_picture(data):
    press = data.draw(st.booleans())
    profile = bytearray(press_profile() if press else profile_in(ADOBE, 2.2))
    for position in data.draw(st.lists(st.integers(0, len(profile) - 1), max_size=8)):
        profile[position] = data.draw(st.integers(0, 255))
    mode = data.draw(st.sampled_from(["RGB", "CMYK", "L"]))
    image = Image.fromarray(RIGHT).convert(mode)
    assert decode(encode(image, "TIFF", icc_profile=bytes(profile))).shape == (16, 16, 3)


def test_a_profile_of_srgb_itself_costs_no_colour_conversion():
    assert colour._transform(srgb_profile(), "RGB") is None
    assert colour._transform(profile_in(SRGB, 2.2), "RGB") is not None


def test_the_colour_profile_written_here_is_one_to_other_programs():
    profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_in(DISPLAY_P3, 2.2))).profile
    assert profile.xcolor_space.strip() == "RGB"
    assert np.allclose(profile.red_primary[1][:2], (0.680, 0.320), atol=0.02)
