"""One piece of the snapshot: some rows of files as found -> the same rows decoded.

What a row becomes depends on the file's bytes and `config` alone, wherever it is decoded.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from aegan.data.image_files import Decoded, UnusableImageError, decode_file
from pipelines.base.errors import UserError
from pipelines.ingest.decoded_before import DecodedBefore, part_of
from pipelines.ingest.near_duplicates import thumbnails
from pipelines.ingest.splits import draw_frames

TABLE_BYTES = 64 * 1024**2  # of images decoded before they are written
Before = Callable[[int], None]  # called with each file's position; UnusableImageError leaves it out


@dataclass(frozen=True)
class Piece:
    """One row group of the snapshot and the part file it becomes."""

    shard: Path
    row_group: int
    rows: int
    part: Path

    @property
    def mark(self) -> Path:
        """Which row a process is at, or was at when it died."""
        return self.part.with_suffix(".at")

    @property
    def crashes(self) -> Path:
        """The rows that are not decoded, since a process died of them, and why."""
        return self.part.with_suffix(".crashes.json")


def plan(raw: Path, shards: list[dict[str, Any]], work: Path) -> Iterator[Piece]:
    """All pieces of a snapshot, in order; raises UserError where it is not as it was left."""
    number = 0
    for shard in shards:
        file = raw / shard["file"]
        if not file.exists() or file.stat().st_size != shard["bytes"]:
            raise UserError(f"{file} is missing or changed: run the stage download again")
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            yield Piece(file, group, rows, part_of(work, number))
            number += 1


def is_complete(piece: Piece) -> bool:
    """Whether an earlier run finished this part (parts are renamed into place when whole)."""
    try:
        return bool(pq.read_metadata(piece.part).num_rows >= piece.rows)  # a row a frame
    except (FileNotFoundError, pa.ArrowInvalid):  # the latter after a power cut
        return False


def _nothing(file: int) -> None:
    pass


def _shifted(before: Before, start: int) -> Before:
    return lambda file: before(start + file)


def decode_rows(
    found: pa.Table,
    config: PreprocessConfig,
    before: Before = _nothing,
    known: DecodedBefore | None = None,
) -> Iterator[pa.Table]:
    """`decode_files` of the column `content`, beside the other columns; raises UserError.

    Several tables, since all frames of all files may be more than memory holds.
    """
    size = config.image_size**2 * config.image_channels
    files = max(1, TABLE_BYTES // size) if config.frames == "first" else 1
    tables: list[pa.Table] = []
    for start in range(0, len(found), files):
        rows = found.slice(start, files)
        try:
            decoded = decode_files(rows.column("content"), config, _shifted(before, start), known)
        except MemoryError:
            names = rows.column("source").to_pylist()
            raise UserError(
                f"not enough memory to decode {names[0]}"
                + (f" or one of the {len(names) - 1} files after it" if len(names) > 1 else "")
                + ": lower preprocess.max_pixels or free some, then run the same command again"
            ) from None
        file = decoded.column("file")
        for name in rows.column_names:
            if name != "content":
                decoded = decoded.append_column(name, rows.column(name).take(file))
        if config.frames == "all":
            decoded = _with_numbers(decoded)
        tables.append(decoded)
        if sum(map(len, tables)) * size >= TABLE_BYTES:
            yield pa.concat_tables(tables).combine_chunks()
            tables = []
    if tables:
        yield pa.concat_tables(tables).combine_chunks()


def _with_numbers(decoded: pa.Table) -> pa.Table:
    """Later frames of a file get names of their own: `name#2`, ..."""
    names = [
        f"{name}#{frame + 1}" if frame else name
        for name, frame in zip(
            decoded.column("source").to_pylist(), decoded.column("frame").to_pylist(), strict=True
        )
    ]
    place = decoded.column_names.index("source")
    return decoded.set_column(place, "source", pa.array(names, pa.string()))


def decode_files(
    contents: pa.ChunkedArray,
    config: PreprocessConfig,
    before: Before = _nothing,
    known: DecodedBefore | None = None,
) -> pa.Table:
    """A row for each file or frame, which depends on the file's bytes and `config` alone.

    `file` (its position in `contents`), `frame`, `image_id`, `image`, `thumbnail`, `draw`, `turn`,
    `frames_left_out`, `largest_value`; only `reason` counts if the file is no usable image.
    """
    size, channels = config.image_size, config.image_channels
    blank = np.zeros((size, size, channels), np.uint8)
    found: list[tuple[int, int, np.ndarray]] = []
    reasons: list[str | None] = []
    left_out: list[int] = []
    largest: list[int | None] = []
    draws: list[tuple[int, int]] = []
    for file, stored in enumerate(contents):
        content, reason = stored.as_py(), None
        try:
            before(file)
            decoded = (known and known.find(content)) or decode_file(
                content,
                image_size=size,
                image_channels=channels,
                fit=config.fit,
                max_pixels=config.max_pixels,
                value_range=config.value_range,
                frames=config.frames,
            )
        except UnusableImageError as error:
            decoded, reason = Decoded([blank], 0, None), str(error)
        draws += draw_frames(content, len(decoded.images))
        for frame, image in enumerate(decoded.images):
            found.append((file, frame, image))
            reasons.append(reason)
            left_out.append(0 if frame else decoded.left_out)
            largest.append(decoded.largest_value)
    images = np.array([image for _, _, image in found], np.uint8).reshape(-1, size, size, channels)
    return pa.table(
        {
            "file": pa.array([file for file, _, _ in found], pa.int64()),
            "frame": pa.array([frame for _, frame, _ in found], pa.int32()),
            "image_id": pa.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images]),
            "image": _as_column(images),
            "thumbnail": _as_column(thumbnails(images)),
            "draw": pa.array([place for place, _ in draws], pa.uint64()),
            "turn": pa.array([turn for _, turn in draws], pa.uint64()),
            "reason": pa.array(reasons, pa.string()),
            "frames_left_out": pa.array(left_out, pa.int32()),
            "largest_value": pa.array(largest, pa.int32()),
        }
    )


def _as_column(images: np.ndarray) -> pa.FixedSizeBinaryArray:
    """uint8 [N, H, W, C] => their bytes, without a copy."""
    kind = pa.binary(math.prod(images.shape[1:]))
    buffers = [None, pa.py_buffer(np.ascontiguousarray(images))]
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(images), buffers)
