"""Show a running training to a person: a live bar in a terminal, else a plain line now and then."""

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
from tqdm import tqdm

from aegan.training.run_folder import Row, RunFolder, append_row

POLL_SECONDS = 0.5
LINE_INTERVAL_SECONDS = 20.0
SYSTEM_INTERVAL_SECONDS = 5.0
STRAGGLER_SECONDS = 20.0
SHOWN = {"image_reconstruction": "image", "latent_reconstruction": "latent",
         "image_discriminator": "D_x", "latent_discriminator": "D_z"}  # fmt: skip

log = logging.getLogger(__name__)


def follow(folder: RunFolder, ended: threading.Event, *, num_steps: int) -> None:
    """Until the event is set: show new rows of metrics.jsonl, record system metrics.

    The first Ctrl-C asks the workers to save and end; the second one does not wait for them. Once
    there is an outcome, workers that do not end by themselves are not waited for either.
    """
    with tqdm(total=num_steps, unit="step", disable=None, dynamic_ncols=True) as bar:
        view = _View(bar, folder, num_steps)
        while True:
            try:
                ended_at: float | None = None
                # An event, since an interrupted join leaves a running thread marked as ended.
                while not ended.wait(POLL_SECONDS):
                    view.update()
                    if ended_at is None and folder.outcome.exists():
                        ended_at = time.monotonic()
                    if ended_at is not None and time.monotonic() - ended_at > STRAGGLER_SECONDS:
                        return
                return
            except KeyboardInterrupt:
                if folder.stop.exists():
                    raise
                folder.stop.touch()
                log.info("\nstopping: saving a checkpoint (Ctrl-C again: do not wait)")


class _View:
    """What a person sees of the run, and the record of the machine's state."""

    def __init__(self, bar: "tqdm[Any]", folder: RunFolder, num_steps: int) -> None:
        self._bar = bar
        self._num_steps = num_steps
        self._folder, self._size = folder, _size_of_log(folder)
        self._first: tuple[float, int] | None = None  # time and step of the first row
        self._last_line = self._last_system = time.monotonic()
        bar.set_description("train (Ray is starting)")

    def update(self) -> None:
        now = time.monotonic()
        if now - self._last_system > SYSTEM_INTERVAL_SECONDS:
            self._last_system = now
            with suppress(OSError):  # a full disk: for the workers to say
                append_row(self._folder.system, _system_row())
        size = _size_of_log(self._folder)
        row = self._folder.newest_row() if size != self._size else None
        self._size = size
        if row is None:
            return
        step = int(row["step"])
        if self._first is None:
            self._first = now, step
            self._bar.set_description("train")
            self._bar.initial = step
            self._bar.reset()
        self._bar.n = step
        self._bar.set_postfix_str(_describe(row))
        if self._bar.disable and now - self._last_line > LINE_INTERVAL_SECONDS:
            self._last_line = now
            started, first_step = self._first
            seconds = (now - started) * (self._num_steps - step) / max(step - first_step, 1)
            log.info(
                "step %d/%d  %s  %s left",
                step,
                self._num_steps,
                _describe(row),
                tqdm.format_interval(seconds),
            )


def _size_of_log(folder: RunFolder) -> int:
    return folder.log.stat().st_size if folder.log.exists() else 0


def _describe(row: Row) -> str:
    losses = [f"{short} {row[name]:.3f}" for name, short in SHOWN.items() if name in row]
    return "  ".join([f"{row['images_per_second']:.0f} images/s", *losses])


def _system_row() -> Row:
    return {
        "time": time.time(),
        "cpu_percent": psutil.cpu_percent(),
        "memory_bytes": psutil.virtual_memory().used,
        "disk_percent": psutil.disk_usage("/").percent,
    }
