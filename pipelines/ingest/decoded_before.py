"""Images that an earlier run has decoded, found again by the bytes of their file.

The parts of the last run stay in its work folder, under the same parameters, code and decoder as
today's. Each row names its file's hash (the first 128 bits are the draw and the turn), so a file
that is there again, under whatever name and among whatever others, is not decoded again. Only what
the decoder gave is taken over; all else in a row is made from it, as if it had been decoded now.
Files that were unusable are looked at again: they are few, and a crash may be no fault of theirs.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from aegan.data.image_files import Decoded
from pipelines.ingest.splits import draw

DAMAGED = (OSError, pa.ArrowException)  # of a part that is missing, cut off or has a wrong checksum
FREE_ROWS = 8 * 1024  # that may be read whatever is found among them
DEAR = 8  # rows read for each one found: decoding takes less time than to read more


def part_of(folder: Path, number: int) -> Path:
    """The file of a part in a work folder."""
    return folder / f"part-{number:06d}.parquet"


def write_index(earlier: Path, file: Path) -> None:
    """Where the images of each usable file lie, uint64 [5, files]: draw, turn, part, row, frames.

    Ordered by the draw, so that a process finds a file without reading them all.
    """
    found = [np.empty((5, 0), np.uint64)]
    for part in sorted(earlier.glob("part-*.parquet")):
        try:
            table = _open(part).read(["frame", "draw", "turn", "reason"])
        except DAMAGED:
            continue
        first = np.flatnonzero(table.column("frame").to_numpy() == 0)
        first_rows = table.take(first)
        number = int(part.stem.removeprefix("part-"))
        rows = [
            first_rows.column("draw").to_numpy(),
            first_rows.column("turn").to_numpy(),
            np.full(len(first), number, np.uint64),
            first.astype(np.uint64),
            np.diff(first, append=len(table)).astype(np.uint64),
        ]
        found.append(np.stack(rows)[:, first_rows.column("reason").is_null().to_numpy()])
    index = np.concatenate(found, axis=1)
    np.save(file, index[:, np.argsort(index[0], kind="stable")])


class DecodedBefore:
    """What was decoded in an earlier run; holds one row group at a time."""

    def __init__(self, earlier: Path, index: Path, config: PreprocessConfig) -> None:
        self.taken = 0  # files found so far
        self._earlier = earlier
        self._index = np.asarray(np.load(index, mmap_mode="r"))  # pages that processes share
        self._shape = (config.image_size, config.image_size, config.image_channels)
        self._part = -1  # of the row group that is held
        self._start = 0  # its first row within the part
        self._images = np.empty((0, *self._shape), np.uint8)
        self._facts: list[tuple[int, int | None]] = []  # frames left out, largest value
        self._rows_read = self._rows_taken = 0

    def find(self, content: bytes) -> Decoded | None:
        """What the decoder made of these bytes; None if it is not known, or dear to read."""
        place, turn = draw(content)
        position = int(np.searchsorted(self._index[0], np.uint64(place)))
        if position == self._index.shape[1]:
            return None
        known_place, known_turn, part, row, frames = self._index[:, position].tolist()
        if (known_place, known_turn) != (place, turn) or not self._hold(part, row):
            return None
        first = row - self._start
        left_out, largest = self._facts[first]
        self.taken += 1
        self._rows_taken += frames
        images = self._images[first : first + frames].copy()  # or they would keep the row group
        return Decoded(list(images), left_out, largest)

    def _hold(self, part: int, row: int) -> bool:
        """Read the row group of this row, unless it is the one that is held; False: it is not."""
        if part == self._part and 0 <= row - self._start < len(self._images):
            return True
        # Files whose order has changed altogether lie in a row group each.
        if self._rows_read > FREE_ROWS + DEAR * self._rows_taken:
            return False
        try:
            file = _open(part_of(self._earlier, part))
            rows = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            ends = np.cumsum(rows)
            group = int(np.searchsorted(ends, row, side="right"))
            table = file.read_row_group(group, ["image", "frames_left_out", "largest_value"])
        except DAMAGED:
            return False
        image = table.column("image").combine_chunks()
        pixels = np.frombuffer(image.buffers()[1], np.uint8).reshape(-1, *self._shape)
        self._images = pixels[image.offset : image.offset + len(image)]
        left_out, largest = (table.column(name).to_pylist() for name in table.column_names[1:])
        self._facts = list(zip(left_out, largest, strict=True))
        self._part, self._start = part, int(ends[group]) - len(table)
        self._rows_read += len(table)
        return True


def _open(part: Path) -> pq.ParquetFile:
    return pq.ParquetFile(part, page_checksum_verification=True)
