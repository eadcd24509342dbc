"""Small made-up pictures for tests: far apart from each other, cheap, the same every time."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def blocks(count: int, *, seed: int = 0, size: int = 16, channels: int = 3) -> np.ndarray:
    """uint8 [N, size, size, C] of 4x4 random colours: no two are near duplicates."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (count, 4, 4, channels), dtype=np.uint8)
    return colours.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An image as the bytes of a file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """`0000.png`, `0001.png`, ... in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        (folder / f"{index:04d}.png").write_bytes(encode(image))
    return folder


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(samples: np.ndarray, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG written by hand: samples [H, W, ...] as they lie in the file, and further chunks."""
    height, width = samples.shape[:2]
    if depth < 8:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=-1)
    else:
        rows = samples.reshape(height, -1).astype(">u2" if depth == 16 else np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    middle = (*chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(middle)


def tiff(samples: np.ndarray, *tags: tuple[int, int], order: str = "<") -> bytes:
    """A TIFF of one strip written by hand: samples [H, W] and short tags besides the size's."""
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    height, width = samples.shape[:2]
    strip = {256: width, 257: height, 273: 8, 278: height, 279: len(data)}
    entries = sorted([*strip.items(), *tags])
    directory = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8 + len(data)) + data + directory + bytes(4)
