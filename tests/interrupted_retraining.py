"""`aegan retrain` in a process to which something happens, at a step, where a test says.

One process that has everything in its memory forks them: to import it would take longer.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from pipelines.retraining import lease
from tests.trained import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.interrupted_retraining", "pipelines.cli", "pipelines.retrain"]
)

Moment = Literal["beginning", "end"]


def start(
    folder: Path,
    environment: Mapping[str, str],
    step: str,
    interruption: Callable[[], None],
    *arguments: str,
    moment: Moment = "beginning",
    output: str = os.devnull,
    lease_seconds: float = lease.SECONDS,
) -> BaseProcess:
    """A retraining of a project, interrupted when a step begins, or when its work is done.

    At its end the ledger does not know yet that it is. A short lease is soon another's.
    """
    work = (
        *(folder, dict(environment), step, interruption, arguments, moment, output),
        lease_seconds,
    )
    process = CONTEXT.Process(target=_retrain, args=work)
    with chdir(ROOT):  # where that process finds our modules
        process.start()
    return process


def kill(folder: Path, environment: Mapping[str, str], step: str, moment: Moment) -> None:
    """Retrain until a process is killed at a step."""
    process = start(folder, environment, step, partial(end_by, signal.SIGKILL), moment=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (step, moment, process.exitcode)


def end_by(number: int) -> None:
    """The process sends itself a signal."""
    os.kill(os.getpid(), number)


def ask(request: Path) -> None:
    """Write a file, and wait until somebody has done what it asks for and removed it."""
    request.touch()
    while request.exists():
        time.sleep(0.05)


def _retrain(
    folder: Path,
    environment: dict[str, str],
    step: str,
    interruption: Callable[[], None],
    arguments: Sequence[str],
    moment: Moment,
    output: str,
    lease_seconds: float,
) -> None:
    from pipelines import cli
    from pipelines.retraining.steps import STEPS

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    for name in ("PYTHONPATH", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    lease.SECONDS = lease_seconds
    work = STEPS[step]

    def interrupted(retraining: Any) -> Any:
        if moment == "beginning":
            interruption()
        result = work(retraining)
        if moment == "end":
            interruption()
        return result

    STEPS[step] = interrupted
    sys.argv = ["aegan", "retrain", *arguments]
    cli.main()
