"""First pass of `preprocess`: row groups of the snapshot -> part files, on all cores.

A worker reads its own row group and writes its own part: no pixel travels between processes. It
marks on disk which file it is at; so a file at which a process dies is known by name, and one that
crashes the decoder (a bug in it, not an error) is left out with that reason. A snapshot that is
only a listing is decoded by `decode_on_ray.py` instead, with the same function.
"""

import hashlib
import json
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
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from aegan.image_files import Decoded, UnusableImageError, decode_file
from pipelines.errors import UserError
from pipelines.files import clear_disk_errors, write_json
from pipelines.names import shown
from pipelines.near_duplicates import thumbnails
from pipelines.progress import progress
from pipelines.shards import write_parquet
from pipelines.splits import draw_frames

TABLE_BYTES = 64 * 1024**2  # of images decoded before they are written
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")  # of code; others come from outside
MAX_CRASHES = 5  # of one set: more are no fault of single files

Before = Callable[[int], None]  # called with each file's position; UnusableImageError leaves it out
log = logging.getLogger(__name__)


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


class _DiedError(Exception):
    """A worker ended; `signal`: the name of what ended it, if that is known."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal = signal_name


def _nothing(file: int) -> None:
    pass


def _shifted(before: Before, start: int) -> Before:
    return lambda file: before(start + file)


def decode_snapshot(
    config: PreprocessConfig,
    raw: Path,
    shards: list[dict[str, Any]],
    *,
    work: Path,
    processes: int | None = None,
) -> list[Path]:
    """Decode all row groups that have no part in `work` yet; returns all parts in order.

    With `processes=1` in this process, else in as many others (default: one a core).
    """
    started = time.monotonic()
    pieces = list(_plan(raw, shards, work))
    missing = [piece for piece in pieces if not _is_complete(piece)]
    if missing and "url" in pq.read_schema(missing[0].shard).names:  # a listing, not the files
        from pipelines.decode_on_ray import decode_pieces  # slow to import, for listings alone

        _run(decode_pieces(config, missing), total=len(missing))
    elif processes == 1 and not any(piece.mark.exists() for piece in missing):
        _run(map(partial(_decode_row_group, config), missing), total=len(missing))
    else:
        _decode_in_processes(config, missing, processes=processes or available_cores())
    rows = sum(piece.rows for piece in missing)
    log.info("decoded %d files, %.0f a second", rows, rows / (time.monotonic() - started))
    return [piece.part for piece in pieces]


def _decode_in_processes(config: PreprocessConfig, pieces: list[Piece], *, processes: int) -> None:
    """Decode pieces; those at which a process died, now or in an earlier run, one at a time."""
    decode = partial(_decode_row_group, config)
    missing, suspects = pieces, [piece for piece in pieces if piece.mark.exists()]
    while missing:
        for piece in suspects:
            _decode_alone(decode, piece)
        missing = [piece for piece in missing if not _is_complete(piece)]
        try:
            if missing:
                _run_in_pool(decode, missing, processes=min(processes, len(missing)))
            return
        except _DiedError:
            suspects = [piece for piece in missing if piece.mark.exists()]
            if not suspects:
                raise UserError(
                    f"a decoding process was killed at its start, {LACK_CURE}"
                ) from None
            log.warning("a decoding process died: what it was at is decoded again, on its own")


LACK_CURE = (
    "perhaps for lack of memory: lower preprocess.max_pixels or free some, then run the same "
    "command again"
)


def _decode_alone(decode: Callable[[Piece], None], piece: Piece) -> None:
    """Decode a piece while nothing else is decoded; leaves out files that crash the decoder."""
    while not _is_complete(piece):
        try:
            _run_in_pool(decode, [piece], processes=1)
        except _DiedError as death:
            row = int.from_bytes(piece.mark.read_bytes() if piece.mark.exists() else b"", "little")
            rows = pq.ParquetFile(piece.shard).read_row_group(piece.row_group, columns=["source"])
            name = shown(rows.column("source")[row].as_py())
            if death.signal not in CRASHES:
                raise UserError(
                    f"a decoding process was killed while it decoded {name}, {LACK_CURE}"
                ) from None
            crashes = piece.part.parent.glob("*.crashes.json")
            if sum(len(json.loads(file.read_text())) for file in crashes) == MAX_CRASHES:
                raise UserError(
                    f"the image decoder crashed at {MAX_CRASHES} files and now at {name} "
                    f"({death.signal}): that is no fault of files; install Pillow anew "
                    "(rm -r .venv, then the same command again)"
                ) from None
            reason = f"cannot be decoded: the decoder crashes ({death.signal})"
            write_json(_crashes_of(piece) | {str(row): reason}, piece.crashes)
            log.warning("%s is left out: the decoder crashes at it (%s)", name, death.signal)


def _crashes_of(piece: Piece) -> dict[str, str]:
    if not piece.crashes.exists():
        return {}
    found: dict[str, str] = json.loads(piece.crashes.read_text(encoding="utf-8"))
    return found


def _run_in_pool(decode: Callable[[Piece], None], pieces: list[Piece], *, processes: int) -> None:
    """Decode pieces in processes of their own; raises _DiedError if one of them does."""
    others = set(active_children())
    # `spawn`: a forked copy of a process with threads can hang.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_set_up_worker)
    workers = set()
    has_died = False
    try:
        results = pool.map(decode, pieces)
        workers = set(active_children()) - others
        _run(results, total=len(pieces))
    except BrokenProcessPool:
        has_died = True
    finally:
        pool.shutdown(cancel_futures=True)
    if has_died:
        codes = [worker.exitcode or 0 for worker in workers]
        names = [signal.Signals(-code).name for code in codes if code < 0]
        raise _DiedError(names[0] if len(names) == 1 else "")


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
    crashes = _crashes_of(piece)
    with clear_disk_errors(piece.mark), piece.mark.open("wb", buffering=0) as mark:

        def before(row: int) -> None:
            if reason := crashes.get(str(row)):
                raise UnusableImageError(reason)
            os.pwrite(mark.fileno(), row.to_bytes(8, "little"), 0)

        try:
            write_parquet(decode_rows(found, config, before), piece.part)
        finally:
            piece.mark.unlink()


def decode_rows(
    found: pa.Table, config: PreprocessConfig, before: Before = _nothing
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
            decoded = decode_files(rows.column("content"), config, _shifted(before, start))
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
    contents: pa.ChunkedArray, config: PreprocessConfig, before: Before = _nothing
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
