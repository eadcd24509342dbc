"""What the bytes of an image file say about it, read before a decoder is let at them.

Decoders spend time and memory on what these numbers promise, and the files are untrusted: nothing
here raises, allocates or takes longer than a walk over the bytes, whatever they are.
"""

import re
import struct
from collections.abc import Iterator
from itertools import islice

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan: neither data nor restart
_MAX_PAGES = 100_000  # of a TIFF that are followed: a chain may go on for ever


def png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the data of each chunk, as far as the file goes."""
    at = 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        yield content[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


def has_more_parts(content: bytes, most: int) -> bool:
    """Whether a PNG has more chunks, a TIFF more strips, a JPEG more segments before its pixels."""
    if len(content) < 4 * most:
        return False
    if content.startswith((b"II", b"MM")):
        return tiff_strips(content) > most
    if content.startswith(b"\x89PNG"):
        return next(islice(png_chunks(content), most, None), None) is not None
    at, parts = 2, 0
    while content.startswith(b"\xff\xd8") and parts <= most and at + 4 <= len(content):
        marker, length = struct.unpack_from(">HH", content, at)
        if marker < 0xFF01 or marker == 0xFFDA:  # no marker, or the pixels
            break
        at += 2 + length if marker != 0xFFFF else 1
        parts += 1
    return parts > most


def png_header(content: bytes) -> dict[bytes, bytes]:
    """The data of the chunks before the pixels that say how samples and colours are meant."""
    found = {}
    for kind, start, end in png_chunks(content):
        if kind == b"IDAT":
            break
        if kind in (b"IHDR", b"cICP", b"tRNS"):
            found[kind] = content[start:end]
    return found


def png_frames(content: bytes) -> int:
    """Pictures in an animated PNG; 1 in any other."""
    kinds = [kind for kind, _, _ in png_chunks(content) if kind in (b"acTL", b"fcTL", b"IDAT")]
    if b"acTL" not in kinds:
        return 1
    poster = kinds.index(b"IDAT") < kinds.index(b"fcTL") if {b"IDAT", b"fcTL"} <= {*kinds} else 0
    return max(1, kinds.count(b"fcTL") + poster)


def gif_frames(content: bytes) -> int:
    """Pictures in a GIF."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    frames = 0
    try:
        at = 13 + table(content[10])
        while content[at] in (0x21, 0x2C):
            if content[at] == 0x2C:
                frames += 1
                at += 11 + table(content[at + 9])
            else:
                at += 2
            while content[at]:
                at += 1 + content[at]
            at += 1
    except IndexError:  # the file ends
        pass
    return max(1, frames)


def _tiff_layout(content: bytes) -> tuple[str, bool, str, int]:
    """Byte order, whether it is a BigTIFF, format of a pointer, bytes of an entry."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    return (order, big, "Q", 20) if big else (order, big, "I", 12)


def tiff_strips(content: bytes) -> int:
    """Strips or tiles of the first page of a TIFF."""
    order, big, pointer, entry = _tiff_layout(content)
    try:
        (at,) = struct.unpack_from(order + pointer, content, 8 if big else 4)
        (entries,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
        for first in range(at + (8 if big else 2), len(content), entry)[: min(entries, 1 << 16)]:
            tag, _, count = struct.unpack_from(order + "HH" + pointer, content, first)
            if tag in (273, 324):
                return int(count)
    except (struct.error, OverflowError):  # beyond the file's end
        pass
    return 0


def tiff_pages(content: bytes) -> list[int]:
    """Numbers of the pages of a TIFF, without thumbnails, pyramid levels and masks."""
    order, big, pointer, entry = _tiff_layout(content)
    pages, seen, number = [], set[int](), 0
    try:
        (at,) = struct.unpack_from(order + pointer, content, 8 if big else 4)
        while at and at not in seen and number < _MAX_PAGES:
            seen.add(at)
            (entries,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
            first = at + (8 if big else 2)
            tag, _, _, kind = struct.unpack_from(order + "HH" + pointer + "I", content, first)
            if number == 0 or tag != 254 or not kind & 0b101:  # NewSubfileType comes first
                pages.append(number)
            (at,) = struct.unpack_from(order + pointer, content, first + entries * entry)
            number += 1
    except (struct.error, OverflowError):  # beyond the file's end
        pass
    return pages or [0]


def jpeg_scans(content: bytes, *, enough: int) -> int:
    """Scans of a JPEG, counted up to `enough`: each costs a walk over all blocks."""
    scans, at = 0, 2
    while scans < enough and at + 4 <= len(content):
        if content[at] != 0xFF:  # decoders pass over what lies between segments
            found = _JPEG_MARKER.search(content, at)
            if not found:
                break
            at = found.start()
        marker = content[at + 1]
        if marker == 0xD9:  # end of image
            break
        if marker == 0xFF:  # fill
            at += 1
            continue
        at += 2
        if not (0xD0 <= marker <= 0xD8 or marker == 1):
            at += struct.unpack_from(">H", content, at)[0] if at + 2 <= len(content) else 2
        if marker == 0xDA:
            scans += 1
            found = _JPEG_MARKER.search(content, at)
            if not found:
                break
            at = found.start()
    return scans


def jpeg2000_size(content: bytes) -> tuple[int, int, int]:
    """Width, height and number of tiles of the code stream, which the container may belie."""
    at = content.find(b"\xff\x4f\xff\x51")
    if at < 0 or at + 40 > len(content):
        return 0, 0, 0
    x1, y1, x0, y0, wide, high, left, top = struct.unpack_from(">8I", content, at + 8)
    if not wide or not high:
        return 0, 0, 0
    tiles = -(-(x1 - left) // wide) * -(-(y1 - top) // high)
    return x1 - x0, y1 - y0, tiles


def is_tga(content: bytes) -> bool:
    """Whether a file is a Targa picture: by its footer, else by a header that fits the file."""
    if len(content) < 18:
        return False
    mapped, kind, map_length, map_bits = content[1], content[2], content[5:7], content[7]
    width, height = struct.unpack_from("<HH", content, 12)
    depth, flags = content[16], content[17]
    depths = {1: (8,), 2: (16, 24, 32), 3: (8, 16)}.get(kind & 7, ())
    fits = kind in (1, 2, 3, 9, 10, 11) and depth in depths and width > 0 < height
    if content.endswith(b"TRUEVISION-XFILE.\0"):
        return fits
    colours = int.from_bytes(map_length, "little")
    if mapped:
        fits = fits and mapped == 1 and kind & 7 == 1 and map_bits in (16, 24, 32) and colours > 0
    else:
        fits = fits and kind & 7 != 1 and content[3:8] == bytes(5)
    start = 18 + content[0] + colours * map_bits // 8
    pixels = start + width * height * depth // 8
    return fits and not flags & 0xC0 and (len(content) >= pixels or kind >= 9)
