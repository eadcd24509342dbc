"""Image files -> images, in other processes and in the order in which they came.

A decoder that crashes (a bug in it, not an error) takes a process along: its files are decoded
again one by one, and the one at which that happens is left out with this reason.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType

import numpy as np

from aegan.data.image_files import Fit, UnusableImageError, decode_image
from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.ingest.decode import LACK_CURE, MAX_CRASHES, set_up_worker
from pipelines.ingest.entries import RawFile

GROUP_FILES, GROUP_BYTES = 16, 16 * 1024**2  # at most, that a process is given at once
CRASHED = "cannot be decoded: the decoder crashes"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a model's images are like."""

    image_size: int
    image_channels: int
    fit: Fit
    value_range: str

    def decode(self, files: list[RawFile]) -> list[np.ndarray | str]:
        """Of each file uint8 [image_size, image_size, C], or why there is none."""
        return [self._decode_one(file.content) for file in files]

    def _decode_one(self, content: bytes) -> np.ndarray | str:
        try:
            return decode_image(
                content,
                image_size=self.image_size,
                image_channels=self.image_channels,
                fit=self.fit,
                value_range=self.value_range,
            )
        except UnusableImageError as error:
            return str(error)


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

    def decode(self, files: Iterable[RawFile]) -> Iterator[tuple[RawFile, np.ndarray | str]]:
        """Each file with its image, or why there is none; raises UserError."""
        waiting: deque[tuple[list[RawFile], Future[list[np.ndarray | str]]]] = deque()
        for group in _groups(files):
            waiting.append((group, self._pool.submit(self._form.decode, group)))
            if len(waiting) > 2 * self._processes:
                yield from self._first(waiting)
        while waiting:
            yield from self._first(waiting)

    def _first(
        self, waiting: deque[tuple[list[RawFile], Future[list[np.ndarray | str]]]]
    ) -> Iterator[tuple[RawFile, np.ndarray | str]]:
        group, future = waiting.popleft()
        try:
            found = future.result()
        except BrokenProcessPool:
            log.warning("a decoding process died: what it was at is decoded again, file by file")
            self._pool.shutdown()
            found = [self._alone(file) for file in group]
            self._pool = _pool(self._processes)
            again = [(left, self._pool.submit(self._form.decode, left)) for left, _ in waiting]
            waiting.clear()
            waiting.extend(again)
        yield from zip(group, found, strict=True)

    def _alone(self, file: RawFile) -> np.ndarray | str:
        with _pool(1) as pool:
            try:
                return pool.submit(self._form.decode, [file]).result()[0]
            except BrokenProcessPool:
                self._crashes += 1
        if self._crashes > MAX_CRASHES:
            raise UserError(
                f"decoding processes died at {MAX_CRASHES} files and now at {shown(file.source)}: "
                f"that is no fault of files, {LACK_CURE}"
            )
        return CRASHED


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
