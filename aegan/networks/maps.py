"""Between vectors and maps: how often a side is halved, and the first map of a generator."""

import math

from torch import Tensor


def halvings(image_size: int) -> tuple[int, int]:
    """How often the side is halved, and the smallest map's side: 4, or 3 where it is 3 x 2^n.

    So 48 pixels have the layers of 64, each on a map three quarters as wide.
    """
    smallest = 3 if image_size % 3 == 0 else 4
    return int(math.log2(image_size // smallest)), smallest


def to_map(flat: Tensor, size: int) -> Tensor:
    """[N, size * size * C] => [N, C, size, size], channels last in memory."""
    pixels: Tensor = flat.unflatten(1, (size, size, -1))
    return pixels.permute(0, 3, 1, 2)
