"""Which images show the same thing, and which split an image belongs to, both by content alone.

The signature is a 16x16 thumbnail. Two images are near duplicates if the root mean square
difference of their thumbnails, in grey levels, is below a distance.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aegan.config import Split

if TYPE_CHECKING:  # imported where a search needs it: decoding processes start without it
    from scipy.spatial import cKDTree

THUMBNAIL_SIZE = 16
PROJECTION_DIMS = 8
_PIXELS_AT_ONCE = 1 << 20  # of images that become thumbnails
_ROWS_AT_ONCE = 1 << 11  # thumbnails held as numbers; bounds the memory

Indices = NDArray[np.int64]


def thumbnails(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, H, C] => uint8 [N, 16, 16, C], every pixel the mean of its area.

    H is a multiple of 16, so no area reaches into the next image of a stack.
    """
    count, height, width, channels = images.shape
    small = np.empty((count, THUMBNAIL_SIZE, THUMBNAIL_SIZE, channels), np.uint8)
    for part in _parts(np.arange(count), max(1, _PIXELS_AT_ONCE // height**2)):
        stack = images[part[0] : part[-1] + 1].reshape(-1, width, channels)
        picture = Image.fromarray(stack.squeeze(-1) if channels == 1 else stack)
        # One axis after the other: Pillow's own order of both depends on a picture's shape.
        picture = picture.resize((THUMBNAIL_SIZE, picture.height), Image.Resampling.BOX)
        size = (THUMBNAIL_SIZE, len(part) * THUMBNAIL_SIZE)
        picture = picture.resize(size, Image.Resampling.BOX)
        small[part] = np.asarray(picture).reshape(-1, *small.shape[1:])
    return small


def splits_of(
    small: np.ndarray, *, validation_fraction: float, test_fraction: float
) -> list[Split]:
    """The split of each image from its thumbnail alone, uint8 [N, 16, 16, C].

    The thumbnail is brought down to 12 coarse colour values (16 grey ones) first, so that most
    near duplicates agree, while few other images do and the fractions come out as wanted.
    """
    cells = 2 if small.shape[-1] == 3 else 4
    side = THUMBNAIL_SIZE // cells
    means = small.reshape(-1, cells, side, cells, side, small.shape[-1]).mean(axis=(2, 4))
    draws = [
        int.from_bytes(hashlib.sha256(coarse.tobytes()).digest()[:8]) / 2**64
        for coarse in np.round(means / 16).astype(np.uint8)
    ]
    held_out = test_fraction + validation_fraction
    return [
        "test" if draw < test_fraction else "validation" if draw < held_out else "train"
        for draw in draws
    ]


class NearDuplicates:
    """Search among thumbnails uint8 [N, 16 * 16 * C] that lie one after another in a file.

    No orthogonal projection lengthens a distance, so a tree over a few principal components has
    every near duplicate among its candidates; the candidates are then compared exactly.
    """

    def __init__(self, file: Path, *, channels: int, distance: float) -> None:
        dims = THUMBNAIL_SIZE**2 * channels
        self._thumbnails = np.memmap(file, np.uint8, "r").reshape(-1, dims)
        self._limit = distance**2 * dims  # of the summed squared differences
        self._radius = self._limit**0.5 * (1 + 1e-4) + 1e-2  # room for rounding
        self._points = _principal_components(file, *self._thumbnails.shape)

    def nearest(self, queries: Indices, among: Indices) -> Indices:
        """For each query a near duplicate among others (the nearest candidate), or -1."""
        from scipy.spatial import cKDTree

        found = np.full(len(queries), -1, np.int64)
        if not len(among):
            return found
        tree = cKDTree(self._points[among])
        pending = np.arange(len(queries))
        count = min(8, len(among))
        while len(pending):
            open_ends = []
            for part in _parts(pending, _ROWS_AT_ONCE * 4 // count + 1):
                neighbours = self._candidates(tree, queries[part], count)
                rows, columns = np.nonzero(neighbours < tree.n)
                others = among[neighbours[rows, columns]]
                squares = self._squared_differences(queries[part][rows], others)
                # Written from the farthest to the nearest: the nearest stays.
                order = np.lexsort((others, squares))[::-1]
                order = order[squares[order] < self._limit]
                found[part[rows[order]]] = others[order]
                more = (found[part] < 0) & (neighbours[:, -1] < tree.n) & (count < len(among))
                open_ends.append(part[more])
            pending = np.concatenate(open_ends)
            count = min(count * 4, len(among))
        return found

    def groups(self, images: Indices, *, neighbours: int = 16) -> tuple[int, int]:
        """(groups, images in them) when each is tied to its nearest near duplicates."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
        from scipy.spatial import cKDTree

        if len(images) < 2:
            return 0, 0
        tree = cKDTree(self._points[images])
        count = min(neighbours + 1, len(images))
        edges = [np.empty((2, 0), np.int64)]
        for part in _parts(np.arange(len(images)), _ROWS_AT_ONCE):
            near = self._candidates(tree, images[part], count)
            rows, columns = np.nonzero(near < tree.n)
            pairs = np.stack([part[rows], near[rows, columns]])
            pairs = pairs[:, pairs[0] != pairs[1]]
            squares = self._squared_differences(images[pairs[0]], images[pairs[1]])
            edges.append(pairs[:, squares < self._limit])
        start, end = np.concatenate(edges, axis=1)
        graph = coo_array((np.ones(len(start), np.bool_), (start, end)), shape=(len(images),) * 2)
        _, labels = connected_components(graph, directed=False)
        sizes = np.bincount(labels)
        return int((sizes > 1).sum()), int(sizes[sizes > 1].sum())

    def _candidates(self, tree: "cKDTree", queries: Indices, count: int) -> Indices:
        """Positions in the tree [Q, count], nearest first; `tree.n` where there is none."""
        _, positions = tree.query(
            self._points[queries],
            k=np.arange(1, count + 1),
            distance_upper_bound=self._radius,
            workers=-1,
        )
        return np.asarray(positions, np.int64)

    def _squared_differences(self, first: Indices, second: Indices) -> NDArray[np.int64]:
        sums = [np.empty(0, np.int64)]
        for part in _parts(np.arange(len(first)), _ROWS_AT_ONCE):
            difference = self._thumbnails[first[part]].astype(np.int32)
            difference -= self._thumbnails[second[part]]
            sums.append(np.square(difference).sum(axis=1, dtype=np.int64))
        return np.concatenate(sums)


def _principal_components(file: Path, count: int, dims: int) -> NDArray[np.float32]:
    """uint8 [N, 16 * 16 * C] => float32 [N, 8], distances never longer than before.

    Two orthogonal projections: to the means of 4x4 cells, then to the main axes of a sample.
    Read as a stream: pages of a memory map would count as ours.
    """

    def cells(thumbnails: bytes) -> NDArray[np.float32]:
        pixels = np.frombuffer(thumbnails, np.uint8)
        pixels = pixels.reshape(-1, 4, 4, 4, 4, dims // THUMBNAIL_SIZE**2)
        means = pixels.mean(axis=(2, 4), dtype=np.float32)
        return np.asarray(means.reshape(len(pixels), -1) * 4)  # root of the 16 pixels in a cell

    points = np.empty((count, PROJECTION_DIMS), np.float32)
    with file.open("rb") as stream:

        def read(first: int, rows: int) -> bytes:
            stream.seek(first * dims)
            return stream.read(rows * dims)

        places = np.linspace(0, count - 1, min(count, 4096)).astype(np.int64)
        sample = cells(b"".join(read(int(place), 1) for place in places))
        mean = sample.mean(axis=0)
        _, axes = np.linalg.eigh((sample - mean).T @ (sample - mean))
        for part in _parts(np.arange(count), _ROWS_AT_ONCE):
            some = cells(read(int(part[0]), len(part)))
            points[part] = (some - mean) @ axes[:, -PROJECTION_DIMS:]
    return points


def _parts(indices: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
