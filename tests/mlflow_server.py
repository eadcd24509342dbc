"""A real MLflow server, which can be killed and started again."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.compose import free_port, wait_until


class Server:
    """`mlflow server` with an SQLite file and its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = ["server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "files"), "--workers", "1"]
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command, "--port", str(self.port)],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
            )
        health = f"{self.address}/health"
        try:
            wait_until(lambda: requests.get(health, timeout=10).ok, seconds=400, what="a server")
        except AssertionError:
            self.kill()
            raise

    def kill(self) -> None:
        process = psutil.Process(self._process.pid)
        for one in [process, *process.children(recursive=True)]:
            one.send_signal(signal.SIGKILL)
        self._process.wait()

    def column(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.folder / "mlflow.db", timeout=30)) as database:
            found = [value for (value,) in database.execute(query)]
            database.commit()
            return found

    def runs(self, status: str) -> int:
        of_status = f"lifecycle_stage = 'active' AND status = '{status}'"
        return int(self.column(f"SELECT count(*) FROM runs WHERE {of_status}")[0])
