import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aegan.data import image_headers
from tests.pictures import blocks, chunk, encode

PICTURES = [Image.fromarray(image) for image in blocks(5)]


def animation(format: str, count: int, **options) -> bytes:
    return encode(
        PICTURES[0], format, save_all=True, append_images=PICTURES[1:count], duration=50, **options
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_frames_of_a_source_are_counted_without_decoding(count):
    assert image_headers.gif_frames(animation("GIF", count)) == count
    assert image_headers.png_frames(animation("PNG", count)) == count
    assert image_headers.tiff_pages(animation("TIFF", count)) == list(range(count))
    assert image_headers.tiff_pages(animation("TIFF", count, big_tiff=True)) == list(range(count))


def test_a_poster_before_an_animation_is_one_frame_more_of_a_source():
    content = animation("PNG", 3, default_image=True)
    assert image_headers.png_frames(content) == Image.open(io.BytesIO(content)).n_frames


def test_thumbnails_and_masks_are_no_pages_of_a_source():
    content = bytearray(animation("TIFF", 3, tiffinfo={254: 0}))
    (at,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, at)
    (at,) = struct.unpack_from("<I", content, at + 2 + 12 * entries)  # the second page
    assert struct.unpack_from("<H", content, at + 2) == (254,)
    struct.pack_into("<I", content, at + 10, 1)
    assert image_headers.tiff_pages(bytes(content)) == [0, 2]


def test_a_tiff_source_whose_pages_go_in_circles_ends():
    content = bytearray(animation("TIFF", 2))
    (first,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * entries, first)
    assert image_headers.tiff_pages(bytes(content)) == [0]


def test_scans_of_a_jpeg_source_are_counted_and_those_of_its_thumbnail_are_not():
    plain = encode(PICTURES[0], "JPEG")
    assert image_headers.jpeg_scans(plain, enough=100) == 1
    progressive = encode(PICTURES[0], "JPEG", progressive=True)
    assert 5 < image_headers.jpeg_scans(progressive, enough=100) < 20
    assert image_headers.jpeg_scans(progressive, enough=3) == 3
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(progressive) + 2) + progressive
    assert image_headers.jpeg_scans(plain[:2] + thumbnail + plain[2:], enough=100) == 1
    assert image_headers.jpeg_scans(plain + progressive, enough=100) == 1


@pytest.mark.fault("served requests")
def test_scans_of_a_jpeg_are_counted_behind_bytes_that_its_decoder_passes_over():
    content = encode(blocks(1, size=64)[0], "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    comment = b"\xff\xfe\0\2 "  # and a byte that belongs to nothing
    hostile = content[:-2] + (comment + scan) * 50 + content[-2:]
    with Image.open(io.BytesIO(hostile)) as file:
        file.load()
    assert image_headers.jpeg_scans(hostile, enough=1000) > 50


@given(st.binary(max_size=200), st.sampled_from([b"", b"GIF89a", b"II*\0", b"MM\0+", b"\xff\xd8"]))
def test_any_bytes_of_a_source_are_counted_without_an_error(content, start):
    content = start + content
    assert image_headers.gif_frames(content) >= 1
    assert image_headers.png_frames(content) >= 1
    assert image_headers.tiff_pages(content)[0] == 0
    assert image_headers.jpeg_scans(content, enough=10) <= 10
    assert len(image_headers.jpeg2000_size(content)) == 3
    assert image_headers.is_tga(content) in (True, False)


@given(st.lists(st.sampled_from([b"acTL", b"fcTL", b"IDAT", b"fdAT"])))
def test_a_png_source_with_chunks_in_any_order_has_a_frame(kinds):
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, bytes(26)) for kind in kinds)
    assert 1 <= image_headers.png_frames(content) <= len(kinds) + 1
