"""Second pass of `preprocess`: what becomes of each file, from ids and thumbnails alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aegan.config import SPLITS
from pipelines.near_duplicates import Indices, NearDuplicates
from pipelines.progress import progress

UNUSABLE, DUPLICATE, SET_ASIDE = 3, 4, 5  # fates besides a split's position in SPLITS: 0, 1, 2


@dataclass(frozen=True)
class Verdict:
    """What becomes of each file of the snapshot, in its order."""

    fate: NDArray[np.int8]  # position in SPLITS, or UNUSABLE, DUPLICATE, SET_ASIDE
    twin: Indices  # the file that a duplicate or set-aside image resembles, or -1
    sources: pa.ChunkedArray
    groups: tuple[int, int]  # groups of near duplicates, images in them


def decide(parts: list[Path], *, thumbnails_file: Path, channels: int, distance: float) -> Verdict:
    """Exact duplicates of an earlier file and near duplicates of a held-out image go.

    Test images stay; validation images near them go; training images near either go. An image
    that stays is in the split its own content says, whatever else the set holds.
    """
    ids, fate, sources = _gather(parts, thumbnails_file)
    twin = np.full(len(fate), -1, np.int64)
    usable = np.flatnonzero(fate != UNUSABLE)
    if not len(usable):
        return Verdict(fate, twin, sources, (0, 0))

    _, first, code = np.unique(ids[usable], return_index=True, return_inverse=True)
    original = usable[first[code]]
    repeated = usable != original
    fate[usable[repeated]] = DUPLICATE
    twin[usable[repeated]] = original[repeated]

    search = NearDuplicates(thumbnails_file, channels=channels, distance=distance)
    train, validation, test = range(len(SPLITS))
    for later, earlier in ((validation, (test,)), (train, (validation, test))):
        candidates = np.flatnonzero(fate == later)
        found = search.nearest(candidates, np.flatnonzero(np.isin(fate, earlier)))
        near = found >= 0
        fate[candidates[near]] = SET_ASIDE
        twin[candidates[near]] = found[near]
    return Verdict(fate, twin, sources, search.groups(usable[~repeated]))


def _gather(
    parts: list[Path], thumbnails_file: Path
) -> tuple[np.ndarray, NDArray[np.int8], pa.ChunkedArray]:
    """Ids, splits and sources of all files; their thumbnails go to a file."""
    ids, fates, sources = [], [], []
    with thumbnails_file.open("wb") as out:
        for part in progress(parts, "comparing", unit="parts", total=len(parts)):
            table = pq.read_table(part, columns=["source", "image_id", "split", "thumbnail"])
            out.write(b"".join(table.column("thumbnail").to_pylist()))
            # 128 bits of the hash tell any number of images apart, in half the memory.
            ids.append(np.array(table.column("image_id").to_pylist(), "S32"))
            fate = pc.index_in(table.column("split"), value_set=pa.array(SPLITS))
            fates.append(fate.fill_null(UNUSABLE).to_numpy().astype(np.int8))
            sources.append(pa.array(table.column("source").to_pylist(), pa.string()))
    return np.concatenate(ids), np.concatenate(fates), pa.chunked_array(sources)
