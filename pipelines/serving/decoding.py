"""Image files -> images, in other processes, here or on the nodes of a cluster.

A decoder that crashes (a bug in it, not an error) takes a process along: its files are decoded
again one by one, and the one at which that happens is left out with this reason.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from aegan.data.image_files import MAX_PIXELS, Form, UnusableImageError
from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.ingest.decode import LACK_CURE, MAX_CRASHES, set_up_worker
from pipelines.ingest.entries import ListedFile, RawFile
from pipelines.ingest.pieces import Piece, is_complete

LISTED_ROWS = 256  # that a node is given at once
GROUP_FILES, GROUP_BYTES = 16, 16 * 1024**2  # at most, that a process is given at once
CRASHED = "cannot be decoded: the decoder crashes"

Decoded = tuple[str, np.ndarray | str]  # a file's name; its image, or why there is none

log = logging.getLogger(__name__)


class Decoder:
    """Processes that decode, until the block ends."""

    def __init__(self, form: Form, *, processes: int) -> None:
        self._form, self._processes = form, processes
        self._crashes = 0

    def __enter__(self) -> "Decoder":
        self._pool = _pool(self._processes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def decode(self, files: Iterable[RawFile]) -> Iterator[Decoded]:
        """Each file's name with its image, or why there is none; raises UserError."""
        waiting: deque[tuple[list[RawFile], Future[list[np.ndarray | str]]]] = deque()
        for group in _groups(files):
            waiting.append((group, self._submit(group)))
            if len(waiting) > 2 * self._processes:
                yield from self._first(waiting)
        while waiting:
            yield from self._first(waiting)

    def _submit(self, group: list[RawFile]) -> Future[list[np.ndarray | str]]:
        """A group's images to be; what says so if a process has died already, too."""
        try:
            return self._pool.submit(_decode, self._form, group)
        except BrokenProcessPool as error:
            broken: Future[list[np.ndarray | str]] = Future()
            broken.set_exception(error)
            return broken

    def _first(
        self, waiting: deque[tuple[list[RawFile], Future[list[np.ndarray | str]]]]
    ) -> Iterator[Decoded]:
        group, future = waiting.popleft()
        try:
            found = future.result()
        except BrokenProcessPool:
            log.warning("a decoding process died: what it was at is decoded again, file by file")
            self._pool.shutdown()
            found = [self._alone(file) for file in group]
            self._pool = _pool(self._processes)
            again = [(left, self._submit(left)) for left, _ in waiting]
            waiting.clear()
            waiting.extend(again)
        yield from zip([file.source for file in group], found, strict=True)

    def _alone(self, file: RawFile) -> np.ndarray | str:
        with _pool(1) as pool:
            try:
                return pool.submit(_decode, self._form, [file]).result()[0]
            except BrokenProcessPool:
                self._crashes += 1
        if self._crashes > MAX_CRASHES:
            raise UserError(
                f"decoding processes died at {MAX_CRASHES} files and now at {shown(file.source)}: "
                f"that is no fault of files, {LACK_CURE}"
            )
        return CRASHED


def decode_on_cluster(files: Iterable[ListedFile], form: Form, work: Path) -> Iterator[Decoded]:
    """The same for a bucket's objects, read and decoded by the nodes of a Ray cluster.

    The listing and what comes back lie in `work`, an empty folder. Raises UserError.
    """
    from pipelines.ingest.decode_on_ray import decode_pieces  # slow to import: Ray

    config = PreprocessConfig(
        **asdict(form),
        max_pixels=MAX_PIXELS,
        frames="first",
        near_duplicate_distance=0.0,
        keep_out="",
        validation_fraction=0.0,
        test_fraction=0.0,
        rows_per_shard=1,
        rows_per_row_group=1,
    )
    pending = _listed(files, work)
    for _ in decode_pieces(config, list(pending)):
        for piece in [piece for piece in pending if is_complete(piece)]:
            pending.remove(piece)
            yield from _rows(piece.part, form)
            piece.part.unlink()


def _listed(files: Iterable[ListedFile], work: Path) -> list[Piece]:
    """The pieces of a listing."""
    files, fields = list(files), ("source", "url", "etag", "size")
    columns = {name: [getattr(file, name) for file in files] for name in fields}
    if not columns["source"]:
        return []
    listing = work / "listing.parquet"
    columns["bytes"] = columns.pop("size")
    pq.write_table(pa.table(columns), listing, row_group_size=LISTED_ROWS)
    metadata = pq.read_metadata(listing)
    return [
        Piece(listing, group, metadata.row_group(group).num_rows, work / f"{group:06d}.parquet")
        for group in range(metadata.num_row_groups)
    ]


def _rows(part: Path, form: Form) -> Iterator[Decoded]:
    shape = (form.image_size, form.image_size, form.image_channels)
    table = pq.read_table(part, columns=["source", "image", "reason"])
    for source, image, reason in zip(*table.to_pydict().values(), strict=True):
        yield source, reason or np.frombuffer(image, np.uint8).reshape(shape)


def _decode(form: Form, files: list[RawFile]) -> list[np.ndarray | str]:
    """Of each file uint8 [image_size, image_size, C], or why there is none."""
    return [_decode_one(form, file.content) for file in files]


def _decode_one(form: Form, content: bytes) -> np.ndarray | str:
    try:
        return form.decode(content)
    except UnusableImageError as error:
        return str(error)


def _pool(processes: int) -> ProcessPoolExecutor:
    # `spawn`: a forked copy of a process with threads can hang.
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=set_up_worker)


def _groups(files: Iterable[RawFile]) -> Iterator[list[RawFile]]:
    group: list[RawFile] = []
    for file in files:
        group.append(file)
        if len(group) == GROUP_FILES or sum(each.size for each in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
