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


def decide(parts: list[Path], *, thumbnails_file: Path, distance: float) -> Verdict:
    """Exact duplicates of an earlier file and near duplicates of a held-out image go.

    Test images stay; validation images near them go; training images near either go. An image
    that stays is in the split its own content says, whatever else the set holds.
    """
    table = _gather(parts, thumbnails_file)
    fate = pc.index_in(table.column("split"), value_set=pa.array(SPLITS)).fill_null(UNUSABLE)
    fate = fate.to_numpy().astype(np.int8)
    twin = np.full(len(fate), -1, np.int64)
    usable = np.flatnonzero(fate != UNUSABLE)
    if not len(usable):
        return Verdict(fate, twin, table.column("source"), (0, 0))

    codes = table.column("image_id").combine_chunks().dictionary_encode().indices.drop_null()
    _, first, code = np.unique(codes.to_numpy(), return_index=True, return_inverse=True)
    original = usable[first[code]]
    repeated = usable != original
    fate[usable[repeated]] = DUPLICATE
    twin[usable[repeated]] = original[repeated]

    thumbnails = np.memmap(thumbnails_file, np.uint8, "r").reshape(len(fate), -1)
    search = NearDuplicates(thumbnails, distance=distance)
    train, validation, test = range(len(SPLITS))
    for later, earlier in ((validation, (test,)), (train, (validation, test))):
        candidates = np.flatnonzero(fate == later)
        found = search.nearest(candidates, np.flatnonzero(np.isin(fate, earlier)))
        near = found >= 0
        fate[candidates[near]] = SET_ASIDE
        twin[candidates[near]] = found[near]
    return Verdict(fate, twin, table.column("source"), search.groups(usable[~repeated]))


def _gather(parts: list[Path], thumbnails_file: Path) -> pa.Table:
    """`source`, `image_id` and `split` of all files; their thumbnails go to a file."""
    tables = []
    with thumbnails_file.open("wb") as out:
        for part in progress(parts, "comparing", unit="parts", total=len(parts)):
            table = pq.read_table(part, columns=["source", "image_id", "split", "thumbnail"])
            thumbnails = table.column("thumbnail")
            out.write(b"".join(thumbnails.fill_null(bytes(thumbnails.type.byte_width)).to_pylist()))
            tables.append(table.drop_columns("thumbnail"))
    return pa.concat_tables(tables)
