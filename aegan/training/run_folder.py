"""The folder that a training works in: the names of its files, and how its rows are read.

A bucket holds a run under the same names. To ask for a name needs no package.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aegan import files

Row = dict[str, float]

DRIVER_LOCK = "driver.lock"  # held by whoever works in a folder, be it a run's or a search's
RENDEZVOUS = "rendezvous-{}"  # a file in which workers meet
STEP = f"step-{8 * '[0-9]'}"  # a pattern: the name of a checkpoint


class RunFolder:
    """A run's files, whether they are there or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log = path / "metrics.jsonl"  # a copy of the newest checkpoint's, for people
        self.samples = path / "samples"
        self.facts = path / "run.json"  # what is trained, with what, where
        self.system = path / "system.jsonl"  # how busy the driver's machine was
        self.outcome = path / "outcome.json"  # how the workers ended
        self.stop = path / "stop"  # there if the workers are to save and end
        self.status = path / "status"  # how the training ended: a word of MLflow's; absent before
        self.tracking = path / "tracking.json"  # by which MLflow's run of it is found
        self.tracking_lock = path / "tracking.lock"  # held by whoever sends values to that run
        self.driver_lock = path / DRIVER_LOCK
        self.worker_lock = path / "worker.lock"  # held by the worker that writes here
        self.outbox = path / "outbox"  # what is on its way into a bucket, under its names here
        self.ray = path / "ray"  # Ray Train's own

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint, for `aegan.training.checkpoint`."""
        return self.checkpoints / step_name(step)

    def newest_checkpoint(self) -> Path | None:
        """Of those that are there, sound or not."""
        return max(self.checkpoints.glob(STEP), default=None)

    def picture(self, step: int, kind: str) -> Path:
        """The file of one picture: `samples` or `reconstructions`."""
        return self.samples / f"{step_name(step)}-{kind}.png"

    def pictures(self, kind: str = "*") -> list[Path]:
        """Those of one kind, or all, that are there, by step."""
        return sorted(self.samples.glob(f"{STEP}-{kind}.png"))

    def rows(self) -> list[Row]:
        """The log's whole rows; none if it is not there."""
        return list(_newest_rows(self.log, "step"))[::-1]

    def newest_row(self) -> Row | None:
        """The log's last whole row."""
        return next(_newest_rows(self.log, "step"), None)

    def system_rows(self) -> list[Row]:
        """The whole rows of `system`."""
        return list(_newest_rows(self.system, "time"))[::-1]

    def kept_rows(self) -> list[Row]:
        """The newest checkpoint's log, which no resume takes back; none if it is damaged."""
        newest = self.newest_checkpoint()
        if newest is None:
            return []
        try:
            log = json.loads((newest / "state.json").read_text(encoding="utf-8"))["log"]
            rows = [*log["rows"], *filter(None, [log["ending"]])]
            return list({row["step"]: row for row in rows}.values())
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def write_rows(self, rows: Iterable[Row]) -> None:
        """A new log; whole or not at all."""
        files.write_text(self.log, "".join(map(_line, rows)))


NAMES = RunFolder(Path())  # relative to any run's folder, or to its place in a bucket
WRITTEN = (  # patterns of what runs leave in their folders, `*` for slashes too
    *("step-[0-9]*/state.json", "state.safetensors", "scores.json", "step-[0-9]*.png"),
    *map(str, (NAMES.facts, NAMES.outcome, NAMES.log, NAMES.system, NAMES.stop, NAMES.status)),
    str(NAMES.tracking),
    *(RENDEZVOUS.format("*"), f"{NAMES.ray}/*", f"{NAMES.outbox}/*"),
)


def append_row(file: Path, row: Row) -> None:
    """One more row of a log or of `system`, flushed to the disk."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(_line(row))
        lines.flush()
        os.fsync(lines.fileno())


def step_name(step: int) -> str:
    """What names of a step begin with."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder or a picture."""
    return int(path.name.split("-")[1])


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _newest_rows(file: Path, key: str) -> Iterator[Row]:
    """Newest first; half a row, as a power cut or a writer at work leaves it, is passed over."""
    if not file.exists():
        return
    for line in reversed(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and key in row:
            yield row
