"""Show a running training to a person: a live bar in a terminal, else a plain line now and then."""

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

POLL_SECONDS = 0.5
LINE_INTERVAL_SECONDS = 20.0
SYSTEM_INTERVAL_SECONDS = 5.0
SHOWN = {"image_reconstruction": "image", "latent_reconstruction": "latent",
         "image_discriminator": "D_x", "latent_discriminator": "D_z"}  # fmt: skip

log = logging.getLogger(__name__)


def follow(run_folder: Path, thread: threading.Thread, *, num_steps: int, stop_file: Path) -> None:
    """Until `thread` ends: show new rows of metrics.jsonl, record system metrics.

    The first Ctrl-C asks the workers to save and end; the second one does not wait for them.
    """
    rows = _Rows(run_folder / "metrics.jsonl")
    terminal = sys.stderr.isatty()
    last_line = last_system = time.monotonic()
    first_step: int | None = None
    started = time.monotonic()
    with tqdm(total=num_steps, unit="step", disable=not terminal, dynamic_ncols=True) as bar:
        bar.set_description("train (Ray is starting)")
        while thread.is_alive():
            try:
                thread.join(POLL_SECONDS)
                now = time.monotonic()
                if now - last_system > SYSTEM_INTERVAL_SECONDS:
                    last_system = now
                    _record_system(run_folder / "system.jsonl")
                row = rows.newest()
                if row is None:
                    continue
                if first_step is None:
                    first_step, started = row["step"], now
                    bar.initial = first_step
                    bar.reset()
                bar.set_description("train")
                bar.n = row["step"]
                bar.set_postfix_str(_describe(row))
                if not terminal and now - last_line > LINE_INTERVAL_SECONDS:
                    last_line = now
                    done = row["step"] - first_step
                    left = (now - started) * (num_steps - row["step"]) / done if done else 0
                    log.info(
                        "step %d/%d  %s  %s left",
                        row["step"],
                        num_steps,
                        _describe(row),
                        tqdm.format_interval(left),
                    )
            except KeyboardInterrupt:
                if stop_file.exists():
                    raise
                log.info("\nstopping: saving a checkpoint (Ctrl-C again: do not wait)")
                stop_file.touch()


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
