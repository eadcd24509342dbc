"""Photograph-like image files for benchmarks: designed faces, uneven light, sensor noise."""

import io

import numpy as np
from PIL import Image

from aegan.data import designed_faces

RENDERED_SIZE = 256  # pixels: larger pictures are enlarged from it, as soft as a lens
FORMATS = {"jpeg": {"quality": 90}, "png": {"compress_level": 6}}  # as cameras and tools write them


def photograph(index: int, size: int) -> Image.Image:
    """Always the same picture for the same index; RGB, `size` pixels a side."""
    random = np.random.default_rng(index)
    faces, _ = designed_faces.generate(index, 1, seed=0, image_size=min(size, RENDERED_SIZE))
    picture = Image.fromarray(faces[0]).resize((size, size), Image.Resampling.BICUBIC)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    light = 1 + 0.3 * (x * random.uniform(-1, 1) + y * random.uniform(-1, 1))
    noise = random.standard_normal((size, size, 3), np.float32) * 4
    pixels = np.asarray(picture) * light[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, format: str) -> bytes:
    """The picture as the bytes of a file of a format in FORMATS."""
    content = io.BytesIO()
    picture.save(content, format, **FORMATS[format])
    return content.getvalue()
