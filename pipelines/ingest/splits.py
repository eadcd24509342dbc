"""Which split an image belongs to: drawn from the bytes of its file, and from nothing else.

So the draw is the same at any image size, in any set, under any name. A second number of the same
hash says who comes first where two images cannot both stay (deduplicate.py).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from aegan.config import SPLITS, PreprocessConfig

TRAIN, VALIDATION, TEST = range(len(SPLITS))
Numbers = NDArray[np.uint64]


def draw(content: bytes, frame: int = 0) -> tuple[int, int]:
    """Two independent 64-bit numbers of a frame of a file: where it falls, and its turn."""
    return draw_frames(content, frame + 1)[frame]


def draw_frames(content: bytes, count: int) -> list[tuple[int, int]]:
    """`draw` of a file's first frames."""
    file = hashlib.sha256(content).digest()
    later = [hashlib.sha256(file + frame.to_bytes(8)).digest() for frame in range(1, count)]
    return [(int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])) for digest in (file, *later)]


def fractions(config: PreprocessConfig) -> tuple[float, float, float]:
    """What share of the images each split is to have, in the order of SPLITS."""
    held_out = config.validation_fraction, config.test_fraction
    return (1 - sum(held_out), *held_out)


def drawn_splits(draws: Numbers, config: PreprocessConfig) -> NDArray[np.int8]:
    """Positions in SPLITS [N]: the lowest draws are test images, then come validation images."""
    places = draws / 2.0**64
    held_out = config.test_fraction + config.validation_fraction
    split = np.where(places < held_out, VALIDATION, TRAIN)
    return np.where(places < config.test_fraction, TEST, split).astype(np.int8)


def waiting_times(
    turns: Numbers, split: NDArray[np.int8], config: PreprocessConfig
) -> NDArray[np.float64]:
    """When each image takes its turn [N], drawn so that every split loses about alike.

    A held-out image meets near duplicates in other splits more often than a training image: most
    images are training images. So the smaller a split, the sooner come its images: the times are
    exponential, with rates of one over the fractions.
    """
    return np.asarray(-np.log1p(-(turns / 2.0**64)) * np.array(fractions(config))[split])
