"""Small made-up pictures for tests: far apart from each other, cheap, the same every time."""

import io
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
