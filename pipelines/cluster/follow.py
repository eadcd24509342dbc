"""Show a running training to a person: a live bar in a terminal, else a plain line now and then."""

import json
import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

POLL_SECONDS = 0.5
LINE_INTERVAL_SECONDS = 20.0
SYSTEM_INTERVAL_SECONDS = 5.0
STRAGGLER_SECONDS = 20.0
SHOWN = {"image_reconstruction": "image", "latent_reconstruction": "latent",
         "image_discriminator": "D_x", "latent_discriminator": "D_z"}  # fmt: skip

log = logging.getLogger(__name__)


def follow(
    run_folder: Path,
    ended: threading.Event,
    *,
    num_steps: int,
    stop_file: Path,
    outcome_file: Path,
) -> None:
    """Until the event is set: show new rows of metrics.jsonl, record system metrics.

    The first Ctrl-C asks the workers to save and end; the second one does not wait for them. Once
    there is an outcome, workers that do not end by themselves are not waited for either.
    """
    with tqdm(total=num_steps, unit="step", disable=None, dynamic_ncols=True) as bar:
        view = _View(bar, run_folder, num_steps)
        while True:
            try:
                ended_at: float | None = None
                # An event, since an interrupted join leaves a running thread marked as ended.
                while not ended.wait(POLL_SECONDS):
                    view.update()
                    if ended_at is None and outcome_file.exists():
                        ended_at = time.monotonic()
                    if ended_at is not None and time.monotonic() - ended_at > STRAGGLER_SECONDS:
                        return
                return
            except KeyboardInterrupt:
                if stop_file.exists():
                    raise
                stop_file.touch()
                log.info("\nstopping: saving a checkpoint (Ctrl-C again: do not wait)")


class _View:
    """What a person sees of the run, and the record of the machine's state."""

    def __init__(self, bar: "tqdm[Any]", run_folder: Path, num_steps: int) -> None:
        self._bar = bar
        self._num_steps = num_steps
        self._rows = _Rows(run_folder / "metrics.jsonl")
        self._system = run_folder / "system.jsonl"
        self._first: tuple[float, int] | None = None  # time and step of the first row
        self._last_line = self._last_system = time.monotonic()
        bar.set_description("train (Ray is starting)")

    def update(self) -> None:
        now = time.monotonic()
        if now - self._last_system > SYSTEM_INTERVAL_SECONDS:
            self._last_system = now
            with suppress(OSError):  # a full disk: for the workers to say
                _record_system(self._system)
        row = self._rows.newest()
        if row is None:
            return
        if self._first is None:
            self._first = now, row["step"]
            self._bar.set_description("train")
            self._bar.initial = row["step"]
            self._bar.reset()
        self._bar.n = row["step"]
        self._bar.set_postfix_str(_describe(row))
        if self._bar.disable and now - self._last_line > LINE_INTERVAL_SECONDS:
            self._last_line = now
            started, first_step = self._first
            steps_left = self._num_steps - row["step"]
            seconds = (now - started) * steps_left / max(row["step"] - first_step, 1)
            log.info(
                "step %d/%d  %s  %s left",
                row["step"],
                self._num_steps,
                _describe(row),
                tqdm.format_interval(seconds),
            )


class _Rows:
    """The rows that are appended to a JSON-lines file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size if path.exists() else 0

    def newest(self) -> dict[str, Any] | None:
        """The last whole row, if there is a new one since the last call."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size == self._size:
            return None
        self._size = size
        lines = self._path.read_text(encoding="utf-8").splitlines()
        try:
            return dict(json.loads(lines[-1])) if lines else None
        except ValueError:  # in the middle of being written
            return None


def _describe(row: dict[str, Any]) -> str:
    losses = [f"{short} {row[name]:.3f}" for name, short in SHOWN.items() if name in row]
    return "  ".join([f"{row['images_per_second']:.0f} images/s", *losses])


def _record_system(path: Path) -> None:
    row = {
        "time": time.time(),
        "cpu_percent": psutil.cpu_percent(),
        "memory_bytes": psutil.virtual_memory().used,
        "disk_percent": psutil.disk_usage(path.anchor or "/").percent,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
