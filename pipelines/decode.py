"""First pass of `preprocess`: row groups of the snapshot -> part files, on all cores.

A worker reads its own row group and writes its own part: no pixel travels between processes. A
snapshot that is only a listing is decoded by `decode_on_ray.py` instead, with the same function.
"""

import hashlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from aegan.image_files import Decoded, UnusableImageError, decode_file
from pipelines.errors import UserError
from pipelines.near_duplicates import thumbnails
from pipelines.progress import progress
from pipelines.shards import write_parquet
from pipelines.splits import draw_frames

TABLE_BYTES = 64 * 1024**2  # of images decoded before they are written

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One row group of the snapshot and the part file it becomes."""

    shard: Path
    row_group: int
    rows: int
    part: Path


def decode_snapshot(
    config: PreprocessConfig,
    raw: Path,
    shards: list[dict[str, Any]],
    *,
    work: Path,
    processes: int | None = None,
) -> list[Path]:
    """Decode all row groups that have no part in `work` yet; returns all parts in order."""
    started = time.monotonic()
    pieces = list(_plan(raw, shards, work))
    missing = [piece for piece in pieces if not _is_complete(piece)]
    processes = min(processes or available_cores(), max(1, len(missing)))
    decode = partial(_decode_row_group, config)
    if missing and "url" in pq.read_schema(missing[0].shard).names:  # a listing, not the files
        from pipelines.decode_on_ray import decode_pieces  # slow to import, for listings alone

        _run(decode_pieces(config, missing), total=len(missing))
    elif processes == 1:
        _run(map(decode, missing), total=len(missing))
    else:
        _run_in_pool(decode, missing, processes=processes)
    rows = sum(piece.rows for piece in missing)
    log.info("decoded %d files, %.0f a second", rows, rows / (time.monotonic() - started))
    return [piece.part for piece in pieces]


def _run_in_pool(decode: Callable[[Piece], None], pieces: list[Piece], *, processes: int) -> None:
    # `spawn`: a forked copy of a process with threads can hang.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_set_up_worker)
    try:
        _run(pool.map(decode, pieces), total=len(pieces))
    except BrokenProcessPool:
        raise UserError(
            "a decoding process was killed, perhaps for lack of memory: lower "
            "preprocess.max_pixels or free some, then run the same command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _run(results: Iterator[None], *, total: int) -> None:
    for _ in progress(results, "decoding", unit="parts", total=total):
        pass


def _plan(raw: Path, shards: list[dict[str, Any]], work: Path) -> Iterator[Piece]:
    number = 0
    for shard in shards:
        file = raw / shard["file"]
        if not file.exists() or file.stat().st_size != shard["bytes"]:
            raise UserError(f"{file} is missing or changed: run the stage download again")
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            yield Piece(file, group, rows, work / f"part-{number:06d}.parquet")
            number += 1


def _is_complete(piece: Piece) -> bool:
    """Whether an earlier run finished this part (parts are renamed into place when whole)."""
    try:
        return bool(pq.read_metadata(piece.part).num_rows >= piece.rows)  # a row a frame
    except (FileNotFoundError, pa.ArrowInvalid):  # the latter after a power cut
        return False


def available_cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _set_up_worker() -> None:
    """One thread; Ctrl-C is the parent's business; when the parent is gone, so are we."""
    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _decode_row_group(config: PreprocessConfig, piece: Piece) -> None:
    """Rows of the snapshot => the same rows decoded, or with the reason why not."""
    found = pq.ParquetFile(piece.shard).read_row_group(piece.row_group)
    write_parquet(decode_rows(found, config), piece.part)


def decode_rows(found: pa.Table, config: PreprocessConfig) -> Iterator[pa.Table]:
    """`decode_files` of the column `content`, beside the other columns; raises UserError.

    Several tables, since all frames of all files may be more than memory holds.
    """
    size = config.image_size**2 * config.image_channels
    files = max(1, TABLE_BYTES // size) if config.frames == "first" else 1
    tables: list[pa.Table] = []
    for start in range(0, len(found), files):
        rows = found.slice(start, files)
        try:
            decoded = decode_files(rows.column("content"), config)
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


def decode_files(contents: pa.ChunkedArray, config: PreprocessConfig) -> pa.Table:
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
            decoded = decode_file(
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
