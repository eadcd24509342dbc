"""Processes that outlive the command that started them, each with a mark in its environment.

They are found by that mark and not by a number in a file, which after a crash or a restart of the
machine may be the number of somebody else's process.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipelines.base.errors import UserError

MARK = "AEGAN_STACK"
END_SECONDS = 20  # that processes have to end by themselves
PASSED_ON = ("HOME", "LANG", "PATH", "TMPDIR")  # nothing else of this shell: it may have passwords


def find(mark: str) -> list[psutil.Process]:
    """All processes with this mark, those that they started included; no dead ones."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if _has_mark(process, mark):
                found.append(process)
    return found


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.ZombieProcess:
        return False
    except (psutil.AccessDenied, OSError):  # another user's: PostgreSQL's, where we are root
        return process.name() == "postgres" and mark in process.cmdline()


def leader(mark: str) -> psutil.Process | None:
    """The process with this mark that was started first, if it lives."""
    with suppress(ProcessLookupError):
        return next((found for found in find(mark) if os.getsid(found.pid) == found.pid), None)
    return None


def start(
    command: Sequence[str],
    mark: str,
    *,
    environment: Mapping[str, str],
    log: Path,
    user: str | None,
) -> None:
    """Start a program that goes on when this one and its terminal are gone."""
    inherited = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        subprocess.Popen(
            command,
            env=inherited | {**environment, MARK: mark},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            umask=0o077,
            **as_user(user),
        )
    finally:
        os.close(descriptor)


def as_user(user: str | None) -> dict[str, Any]:
    """Arguments of `subprocess` for a program that is to run as another user, for root to give."""
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def end(mark: str, how: signal.Signals) -> bool:
    """End all processes with this mark, first gently; whether there were any. Raises UserError."""
    if not find(mark):
        return False
    for number in (how, signal.SIGKILL):
        for process in find(mark):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)  # psutil looks first whether it is still that process
        if wait_until(lambda: not find(mark), END_SECONDS):
            return True
    numbers = ", ".join(str(process.pid) for process in find(mark))
    raise UserError(f"{mark}: these processes cannot be ended: {numbers}; ask your administrator")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition has come true within this time."""
    end_of_patience = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end_of_patience:
            return False
        time.sleep(0.1)
    return True


def listener(port: int) -> str:
    """Who listens on a port, for a message."""
    for connection in psutil.net_connections("tcp"):
        where = connection.laddr
        if where and where.port == port and connection.status == psutil.CONN_LISTEN:
            if connection.pid is None:
                break
            with suppress(psutil.Error):
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:100]})"
    return "a process of another user"
