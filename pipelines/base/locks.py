"""One pipeline at a time in a project, and one process at a time for the outputs of a stage.

A lock is the operating system's: it ends with the process that holds it, however that ends. The
file says who that is.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors

LOCKS = Path("artifacts/.locks")
PIPELINE = "pipeline"


class HeldError(UserError):
    """Another process holds the lock."""


@contextmanager
def hold(name: str) -> Iterator[None]:
    """Hold the lock of a stage, or of the pipeline; HeldError at once if another process does.

    UserError for a disk that cannot be written to.
    """
    path = LOCKS / name
    with clear_disk_errors(path):
        LOCKS.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # children do not inherit it
    try:
        _acquire(descriptor, path)
        with clear_disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _this_process().encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def check_stages() -> None:
    """HeldError if a stage is at work, perhaps one whose DVC was killed."""
    for path in sorted(LOCKS.glob("*")):
        if path.name != PIPELINE:
            with clear_disk_errors(path), path.open("r+") as file:  # NFS locks what may be written
                _acquire(file.fileno(), path)


def _acquire(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "run" if path.name == PIPELINE else f"process of the stage {path.name}"
        raise HeldError(
            f"another {what} is at work in this folder: {_holder(path)}; wait for it or end it"
        ) from None


def _this_process() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    now = time.strftime("%H:%M:%S")
    return json.dumps(
        {"pid": os.getpid(), "host": os.uname().nodename, "command": command, "since": now}
    )


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return "process {pid} on {host} ({command}), since {since}".format(**holder)
    except (ValueError, KeyError):  # just begun
        return "a process that has just started"
