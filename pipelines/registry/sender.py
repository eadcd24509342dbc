"""A process beside a training that sends its values to MLflow; it takes no time from it.

`python -m pipelines.registry.sender RUN_FOLDER EXPERIMENT` ends with the process that started it,
however that ends: its standard input is closed then. No server is waited for any longer than
`END_SECONDS`.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from aegan.training.run_folder import RunFolder
from pipelines.base.errors import UserError, run_stage
from pipelines.registry.live_run import RUNNING, LiveRun, ended_as

END_SECONDS = 10.0  # at most, from the training's end to that of the command
SEND_SECONDS = 30.0  # between two looks at the machine's state; a checkpoint is sent at once
POLL_SECONDS = 1.0
ENVIRONMENT = {  # unless the user has set it: one try, for the next one comes anyway
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

log = logging.getLogger(__name__)


@contextmanager
def sending(folder: RunFolder, experiment: str) -> Iterator[None]:
    """Values of the training inside go to MLflow, last those of its end."""
    sender = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__, str(folder.path), experiment],
        env={**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C in the terminal is the training's
    )
    try:
        yield
    finally:
        assert sender.stdin
        sender.stdin.close()
        try:
            sender.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            sender.kill()


def main() -> None:
    folder, experiment = RunFolder(Path(sys.argv[1])), sys.argv[2]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the training saves first
    os.nice(19)
    sender = _Sender(folder, experiment)
    threading.Thread(target=sender.end_with_starter, daemon=True).start()
    with FileLock(folder.tracking_lock):  # after that of a training that was killed
        sender.run()


class _Sender:
    def __init__(self, folder: RunFolder, experiment: str) -> None:
        self._folder, self._live_run = folder, LiveRun(folder, experiment)
        self._ended = threading.Event()
        self._has_complained = False

    def run(self) -> None:
        """Send at once, at each new checkpoint, after a while, and at the end."""
        seen, sent_at, ended = None, -math.inf, False
        while not ended:
            newest = self._folder.newest_checkpoint()
            if newest != seen or time.monotonic() - sent_at > SEND_SECONDS:
                self._send(RUNNING)
                seen, sent_at = newest, time.monotonic()
            ended = self._ended.wait(POLL_SECONDS)
        self._send(ended_as(self._folder))

    def _send(self, status: str) -> None:
        try:
            self._live_run.send(status)
        except UserError as error:
            self._complain(str(error))
        except Exception as error:  # whatever it is that answers there
            self._complain(f"MLflow: {type(error).__name__}: {error}")

    def end_with_starter(self) -> None:
        """End the sending when the other end of the standard input is closed, soon in any case."""
        os.read(sys.stdin.fileno(), 1)
        self._ended.set()
        time.sleep(END_SECONDS - POLL_SECONDS)
        self._complain("MLflow does not answer")
        os._exit(1)

    def _complain(self, reason: str) -> None:
        """One line, the first time."""
        if not self._has_complained:
            self._has_complained = True
            log.warning("%s (training is not affected; `aegan sync` sends what is missing)", reason)


if __name__ == "__main__":
    run_stage(main)
