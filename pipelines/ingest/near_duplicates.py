"""Which images show the same thing, by content alone.

The signature is a 16x16 thumbnail. Two images are near duplicates if the root mean square
difference of their thumbnails, in grey levels, is below a distance. Pictures of little contrast
(stars, night, fog) differ little, whatever they show: for them the distance is shortened.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:  # imported where a search needs it: decoding processes start without it
    from scipy.spatial import cKDTree

THUMBNAIL_SIZE = 16
FULL_CONTRAST = 12.0  # standard deviation of a thumbnail from which on the distance is whole
LEAST_SHARE = 1 / 3  # of the distance for flat thumbnails: rounding alone makes these differ
PROJECTION_DIMS = 8
MOST_CANDIDATES = 128  # of one image; a crowd around it is compared as a whole
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


class NearDuplicates:
    """Search among thumbnails uint8 [N, 16 * 16 * C] that lie one after another in a file.

    No orthogonal projection lengthens a distance, so a tree over a few principal components has
    every near duplicate among its candidates; the candidates are then compared exactly. Where
    a tree finds too many of them, all pairs are compared, as one product of matrices.
    """

    def __init__(self, file: Path, *, channels: int, distance: float) -> None:
        dims = THUMBNAIL_SIZE**2 * channels
        self._thumbnails = np.memmap(file, np.uint8, "r").reshape(-1, dims)
        self._points, contrasts, self._centre = _describe(file, *self._thumbnails.shape)
        shares = np.clip(contrasts / FULL_CONTRAST, LEAST_SHARE, 1)
        # Of the summed squared differences; of two images the lower limit counts.
        self._limits = np.square(distance * shares) * dims

    @property
    def count(self) -> int:
        """How many thumbnails there are."""
        return len(self._thumbnails)

    def nearest(self, queries: Indices, among: Indices) -> Indices:
        """For each query a near duplicate among others (the nearest candidate), or -1."""
        from scipy.spatial import cKDTree

        found = np.full(len(queries), -1, np.int64)
        if not len(among) or not self._limits.any():  # at distance 0 nothing is near
            return found
        tree = cKDTree(self._points[among])
        # Queries of similar limits go together: the largest of them is the radius of the search.
        pending = np.argsort(self._limits[queries], kind="stable")
        count = min(8, len(among))
        while len(pending) and count <= MOST_CANDIDATES:
            open_ends = []
            for part in _parts(pending, _ROWS_AT_ONCE * 4 // count + 1):
                neighbours = self._candidates(tree, queries[part], count)
                rows, columns = np.nonzero(neighbours < tree.n)
                firsts, others = queries[part][rows], among[neighbours[rows, columns]]
                squares = self._squared_differences(firsts, others)
                # Written from the farthest to the nearest: the nearest stays.
                order = np.lexsort((others, squares))[::-1]
                order = order[squares[order] < self._limits_of(firsts[order], others[order])]
                found[part[rows[order]]] = others[order]
                more = (found[part] < 0) & (neighbours[:, -1] < tree.n) & (count < len(among))
                open_ends.append(part[more])
            pending = np.concatenate(open_ends)
            count = min(count * 4, len(among))
        for part in _parts(pending, _ROWS_AT_ONCE // 2):
            for others in _parts(among, _ROWS_AT_ONCE // 2):
                near = self.near(queries[part], others)
                new = (found[part] < 0) & near.any(axis=1)
                found[part[new]] = others[near[new].argmax(axis=1)]
        return found

    def near(self, first: Indices, second: Indices) -> NDArray[np.bool_]:
        """Which are near duplicates, all pairs [F, S]; takes some 20 bytes a pair."""
        a, b = (self._thumbnails[rows] - self._centre for rows in (first, second))
        norms_a, norms_b = (np.square(x).sum(axis=1, dtype=np.float64) for x in (a, b))
        norms = (norms_a[:, None] + norms_b).astype(np.float32)
        squares = norms - 2 * (a @ b.T)
        limits = np.minimum(self._limits[first][:, None], self._limits[second]).astype(np.float32)
        near = squares < limits
        # What rounding may have decided is compared in integers.
        unsure = np.abs(squares - limits) <= norms * (a.shape[1] * 2.0**-23) + limits * 2.0**-20
        rows, columns = np.nonzero(unsure)
        exact = self._squared_differences(first[rows], second[columns])
        near[rows, columns] = exact < self._limits_of(first[rows], second[columns])
        return np.asarray(near)

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
            first, second = images[pairs]
            squares = self._squared_differences(first, second)
            edges.append(pairs[:, squares < self._limits_of(first, second)])
        start, end = np.concatenate(edges, axis=1)
        graph = coo_array((np.ones(len(start), np.bool_), (start, end)), shape=(len(images),) * 2)
        _, labels = connected_components(graph, directed=False)
        sizes = np.bincount(labels)
        return int((sizes > 1).sum()), int(sizes[sizes > 1].sum())

    def _candidates(self, tree: "cKDTree", queries: Indices, count: int) -> Indices:
        """Positions in the tree [Q, count], nearest first; `tree.n` where there is none."""
        radius = self._limits[queries].max() ** 0.5
        _, positions = tree.query(
            self._points[queries],
            k=np.arange(1, count + 1),
            distance_upper_bound=radius * (1 + 1e-4) + 1e-2,  # room for rounding
            workers=-1,
        )
        return np.asarray(positions, np.int64)

    def _limits_of(self, first: Indices, second: Indices) -> NDArray[np.float64]:
        return np.asarray(np.minimum(self._limits[first], self._limits[second]))

    def _squared_differences(self, first: Indices, second: Indices) -> NDArray[np.int64]:
        sums = [np.empty(0, np.int64)]
        for part in _parts(np.arange(len(first)), _ROWS_AT_ONCE):
            difference = self._thumbnails[first[part]].astype(np.int32)
            difference -= self._thumbnails[second[part]]
            sums.append(np.square(difference).sum(axis=1, dtype=np.int64))
        return np.concatenate(sums)


def _describe(
    file: Path, count: int, dims: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Of uint8 [N, 16 * 16 * C]: points [N, 8], contrasts [N], and the middle of a sample [dims].

    Distances of points are never longer than those of thumbnails. They come from two orthogonal
    projections: to the means of 4x4 cells, then to the main axes of a sample. The contrast is the
    standard deviation within the channels, in grey levels; the middle is made of whole numbers.
    Read as a stream: pages of a memory map would count as ours.
    """
    channels = dims // THUMBNAIL_SIZE**2

    def cells(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        means = pixels.reshape(-1, 4, 4, 4, 4, channels).mean(axis=(2, 4), dtype=np.float32)
        return np.asarray(means.reshape(len(pixels), -1) * 4)  # root of the 16 pixels in a cell

    averaging = np.tile(np.eye(channels) / THUMBNAIL_SIZE**2, (THUMBNAIL_SIZE**2, 1))
    points = np.empty((count, PROJECTION_DIMS), np.float32)
    contrasts = np.empty(count, np.float32)
    with file.open("rb") as stream:

        def read(first: int, rows: int) -> NDArray[np.uint8]:
            stream.seek(first * dims)
            return np.frombuffer(stream.read(rows * dims), np.uint8).reshape(rows, dims)

        places = np.linspace(0, count - 1, min(count, 4096)).astype(np.int64)
        sample = np.concatenate([read(int(place), 1) for place in places])
        middle = sample.mean(axis=0, dtype=np.float32).round()
        sample_cells = cells(sample)
        mean = sample_cells.mean(axis=0)
        _, axes = np.linalg.eigh((sample_cells - mean).T @ (sample_cells - mean))
        for part in _parts(np.arange(count), _ROWS_AT_ONCE):
            some = read(int(part[0]), len(part))
            points[part] = (cells(some) - mean) @ axes[:, -PROJECTION_DIMS:]
            values = some.astype(np.float64)  # whose products with ones are exact
            means, squares = values @ averaging, np.square(values) @ averaging
            contrasts[part] = (squares - np.square(means)).mean(axis=1) ** 0.5
    return points, contrasts, middle


def _parts(indices: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
