"""First pass of `preprocess`: row groups of the snapshot -> part files, on all cores.

A worker reads its own row group and writes its own part: no pixel travels between processes. It
marks on disk which file it is at; so a file at which a process dies is known by name, and one that
crashes the decoder (a bug in it, not an error) is left out with that reason. A snapshot that is
only a listing is decoded by `decode_on_ray.py` instead, with the same function of `pieces.py`.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from aegan.data.image_files import UnusableImageError
from aegan.files import write_json
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.names import shown
from pipelines.base.progress import progress
from pipelines.ingest.decoded_before import DecodedBefore, write_index
from pipelines.ingest.pieces import Piece, decode_rows, is_complete, plan
from pipelines.ingest.shards import write_parquet

CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")  # of code; others come from outside
MAX_CRASHES = 5  # of one set: more are no fault of single files

log = logging.getLogger(__name__)


class _DiedError(Exception):
    """A worker ended; `signal`: the name of what ended it, if that is known."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal = signal_name


def decode_snapshot(
    config: PreprocessConfig,
    raw: Path,
    shards: list[dict[str, Any]],
    *,
    work: Path,
    earlier: Path | None = None,
    processes: int | None = None,
) -> list[Path]:
    """Decode all row groups that have no part in `work` yet; returns all parts in order.

    What parts in `earlier`, of the same parameters and code, hold is taken from there. With
    `processes=1` in this process, else in as many others (default: one a core).
    """
    started = time.monotonic()
    pieces = list(plan(raw, shards, work))
    missing = [piece for piece in pieces if not is_complete(piece)]
    if missing and is_listing(raw, shards):
        # Slow to import, for listings alone.
        from pipelines.ingest.decode_on_ray import decode_pieces

        known = _run(decode_pieces(config, missing), total=len(missing))
    else:
        index = work / "known.npy"
        if missing and earlier:
            write_index(earlier, index)
        decode = partial(_decode_row_group, config, earlier, index)
        if processes == 1 and not any(piece.mark.exists() for piece in missing):
            known = _run(map(decode, missing), total=len(missing))
        else:
            known = _decode_in_processes(decode, missing, processes=processes or available_cores())
    rows = sum(piece.rows for piece in missing) - known
    log.info("decoded %d files, %.0f a second", rows, rows / (time.monotonic() - started))
    if known:
        log.info("%d files had been decoded before", known)
    return [piece.part for piece in pieces]


def is_listing(raw: Path, shards: list[dict[str, Any]]) -> bool:
    """Whether a snapshot holds the addresses of its files in place of the files."""
    return "url" in pq.read_schema(raw / shards[0]["file"]).names


Decode = Callable[[Piece], int]  # returns how many of its files were known


def _decode_in_processes(decode: Decode, pieces: list[Piece], *, processes: int) -> int:
    """Decode pieces; those at which a process died, now or in an earlier run, one at a time."""
    missing, suspects = pieces, [piece for piece in pieces if piece.mark.exists()]
    while True:
        for piece in suspects:
            _decode_alone(decode, piece)
        missing = [piece for piece in missing if not is_complete(piece)]
        try:
            return _run_in_pool(decode, missing, processes=min(processes, len(missing)))
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


def _decode_alone(decode: Decode, piece: Piece) -> None:
    """Decode a piece while nothing else is decoded; leaves out files that crash the decoder."""
    while not is_complete(piece):
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
            with clear_disk_errors(piece.crashes):
                write_json(piece.crashes, _crashes_of(piece) | {str(row): reason})
            log.warning("%s is left out: the decoder crashes at it (%s)", name, death.signal)


def _crashes_of(piece: Piece) -> dict[str, str]:
    if not piece.crashes.exists():
        return {}
    found: dict[str, str] = json.loads(piece.crashes.read_text(encoding="utf-8"))
    return found


def _run_in_pool(decode: Decode, pieces: list[Piece], *, processes: int) -> int:
    """Decode pieces in processes of their own; raises _DiedError if one of them does."""
    if not pieces:
        return 0
    others = set(active_children())
    # `spawn`: a forked copy of a process with threads can hang.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=set_up_worker)
    workers = set()
    known, has_died = 0, False
    try:
        results = pool.map(decode, pieces)
        workers = set(active_children()) - others
        known = _run(results, total=len(pieces))
    except BrokenProcessPool:
        has_died = True
    finally:
        pool.shutdown(cancel_futures=True)
    if has_died:
        codes = [worker.exitcode or 0 for worker in workers]
        names = [signal.Signals(-code).name for code in codes if code < 0]
        raise _DiedError(names[0] if len(names) == 1 else "")
    return known


def _run(results: Iterator[int], *, total: int) -> int:
    return sum(progress(results, "decoding", unit="parts", total=total))


def available_cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_up_worker() -> None:
    """One thread; Ctrl-C is the parent's business; when the parent is gone, so are we."""
    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _decode_row_group(
    config: PreprocessConfig, earlier: Path | None, index: Path, piece: Piece
) -> int:
    """Rows of the snapshot => the same rows decoded, or with the reason why not.

    Returns how many of them were known.
    """
    known = DecodedBefore(earlier, index, config) if earlier else None
    found = pq.ParquetFile(piece.shard).read_row_group(piece.row_group)
    crashes = _crashes_of(piece)
    with clear_disk_errors(piece.mark), piece.mark.open("wb", buffering=0) as mark:

        def before(row: int) -> None:
            if reason := crashes.get(str(row)):
                raise UnusableImageError(reason)
            os.pwrite(mark.fileno(), row.to_bytes(8, "little"), 0)

        try:
            write_parquet(decode_rows(found, config, before, known), piece.part, checksums=True)
        finally:
            piece.mark.unlink()
    return known.taken if known else 0
