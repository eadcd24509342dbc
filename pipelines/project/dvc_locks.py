"""DVC's own locks, told apart: those of a DVC at work, and those of one that was killed.

DVC notes the number of the process that reads or writes an output in `.dvc/tmp/rwlock`, and takes
any process of that number for it: after a restart of a container another program has the number,
and DVC refuses for ever. A killed process whose parent never asks for it keeps its number, too.
"""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dvc.lock import LockError, make_lock

from aegan.files import write_text
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors

FOLDERS = (Path(".dvc/tmp"), Path(".dvc/tmp/exps"))  # of outputs, and of experiments
CLOCK_SECONDS = 60.0  # by which the clock of a file server may be late
PROGRAM = re.compile(r".*(?:^|/)(?:dvc|\w+\.py)(?: |$)", re.DOTALL)  # then come its arguments


def release_stale(project: Path) -> None:
    """Take out of DVC's locks whatever no process holds any more, and say so on stderr.

    A lock is kept where its process may be at work. A file that was cut off while DVC wrote it is
    removed: DVC itself would refuse to read it.
    """
    for folder in FOLDERS:
        file = project / folder / "rwlock"
        # Where another DVC changes it, or the disk is full or read-only, DVC speaks for itself.
        with suppress(LockError, OSError, UserError):
            # DVC's guard while it changes the file is the operating system's: it cannot be stale.
            if file.exists():
                with make_lock(f"{file}.lock"):
                    _release(file)


def _release(file: Path) -> None:
    written = file.stat().st_mtime
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        writers, readers = entries.get("write", {}), entries.get("read", {})
        kept = {
            "write": {path: entry for path, entry in writers.items() if _held(entry, written)},
            "read": {
                path: held
                for path, all_held in readers.items()
                if (held := [entry for entry in all_held if _held(entry, written)])
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"note: {file} was cut off when a DVC was killed: removed", file=sys.stderr)
        file.unlink()
        return
    if kept != {"write": writers, "read": readers}:
        with clear_disk_errors(file):
            write_text(file, json.dumps(kept))
        print(f"note: released locks of a DVC that was killed, in {file}", file=sys.stderr)


def _held(entry: dict[str, Any], written: float) -> bool:
    """Whether the process of this number can be the one that took the lock before `written`."""
    pid, command = int(entry["pid"]), str(entry["cmd"])
    try:
        process = psutil.Process(pid)
        if pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False  # this one has taken none yet
        if process.create_time() > written + CLOCK_SECONDS:
            return False
        running = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # hidden from this user
        return True
    # DVC notes its arguments: a process with other ones is another program.
    return PROGRAM.match(command) is None or running.endswith(PROGRAM.sub("", command, count=1))
