"""Decisions by other processes: several at once, or one that kills itself or a server."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pipelines.base.errors import UserError
from pipelines.registry import mlflow_store
from tests.forked import CONTEXT
from tests.trained import ROOT

WRITES = (b"POST", b"PUT", b"PATCH", b"DELETE")
SEARCHES = b"/search"  # which are POST, too


class Outcome(NamedTuple):
    code: int  # as of subprocess: negative for a signal
    error: str  # a user's
    writes: int  # 0 for one that was killed


def decide(
    *calls: Mapping[str, Any],
    model_name: str = "aegan",
    environment: Mapping[str, str],
    kill_at: int = 0,
    victims: Sequence[int] = (),
) -> list[Outcome]:
    """Decide all of these at once; `calls` are the arguments.

    Before its write number `kill_at` a process kills the victims, itself if there are none.
    """
    running = []
    for call in calls:
        ours, theirs = CONTEXT.Pipe()
        arguments = (theirs, model_name, dict(call), dict(environment), kill_at, list(victims))
        process = CONTEXT.Process(target=_decide, args=arguments)
        with chdir(ROOT):  # where that process finds our modules
            process.start()
        theirs.close()
        running.append((process, ours))
    outcomes = []
    for process, ours in running:
        process.join()
        code = process.exitcode or 0
        outcomes.append(Outcome(code, *(ours.recv() if code >= 0 else ("", 0))))
    return outcomes


def _decide(
    answer: Connection,
    model_name: str,
    call: dict[str, Any],
    environment: dict[str, str],
    kill_at: int,
    victims: list[int],
) -> None:
    import sqlalchemy

    from pipelines.registry import decisions

    writes = 0

    def write(*_: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == kill_at:
            for process in victims or [os.getpid()]:
                os.kill(process, signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "http.client.send" and isinstance(arguments[1], bytes):
            first_line = arguments[1].split(b"\r\n")[0]
            if first_line.startswith(WRITES) and SEARCHES not in first_line:
                write()

    sys.addaudithook(watch)
    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", write)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.update(environment)
    error = ""
    try:
        decisions.decide(model_name, **call)
    except UserError as raised:
        error = str(raised)
    answer.send((error, writes))
    if error:
        sys.exit(1)


def make_versions(client: Any, count: int, *, model_name: str = "aegan") -> None:
    """So many more versions of a model, of a run each; they hold no files."""
    with mlflow_store.unless_there():
        client.create_registered_model(model_name)
    for _ in range(count):
        run = client.create_run("0")
        client.create_model_version(model_name, run.info.artifact_uri, run.info.run_id)
