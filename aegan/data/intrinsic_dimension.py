"""How many numbers describe images of a kind: an estimate from distances between neighbours.

The maximum likelihood estimate of Levina & Bickel 2004 (NIPS 17), averaged over images as MacKay
& Ghahramani 2005 correct it: in m dimensions the number of neighbours within a distance T grows
with T^m. The package scikit-dimension has it too, but brings numba and LLVM.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aegan.data.dataset import spread

NEIGHBOURS = 20
MIN_IMAGES = 10 * NEIGHBOURS  # among fewer, neighbours are no neighbours
MAX_IMAGES = 3000
SIDE = 32  # pixels; larger images are averaged down: the same pictures, compared faster


def of_shards(shards: Path) -> float | None:
    """That of the training images; None where there are too few."""
    parts = [_small(images) for images, _ in spread(shards, "train", count=MAX_IMAGES, seed=0)]
    return intrinsic_dimension(np.concatenate(parts)) if parts else None


def intrinsic_dimension(points: NDArray[np.float32]) -> float | None:
    """That of points [N, D]; None where there are too few different ones."""
    if len(points) < MIN_IMAGES:
        return None
    centred = points - points.mean(axis=0)
    lengths = np.square(centred).sum(axis=1)
    products = centred @ centred.T
    squares = lengths[:, None] + lengths - 2 * products
    np.fill_diagonal(squares, np.inf)
    nearest = np.sort(np.partition(squares, NEIGHBOURS, axis=1)[:, :NEIGHBOURS], axis=1)
    nearest = nearest[nearest[:, 0] > 1e-6 * lengths.mean()].astype(np.float64)  # without copies
    if len(nearest) < MIN_IMAGES:
        return None
    # ln(T_k / T_j), halved as these are squares of distances, over the k - 1 nearer neighbours.
    inverses = np.log(nearest[:, -1:] / nearest[:, :-1]).mean(axis=1) / 2
    return float(1 / inverses.mean())


def _small(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, H, W, C] => [N, D], as means of squares of pixels where they are large."""
    count, side, _, channels = images.shape
    factor = max(1, 2 ** int(np.ceil(np.log2(side / SIDE))))
    cells = side // factor
    blocks = images.reshape(count, cells, factor, cells, factor, channels)
    means: NDArray[np.float32] = blocks.mean(axis=(2, 4), dtype=np.float32)
    return means.reshape(count, -1)
