"""Real servers for the registry's tests: MLflow's, and PostgreSQL."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.compose import free_port, wait_until

START_SECONDS = 240
needs_postgres = pytest.mark.skipif(  # in CI its absence is a failure
    not shutil.which("initdb") and not os.environ.get("CI"), reason="needs PostgreSQL"
)


@contextmanager
def model_server(
    *arguments: str, log: Path, environment: Mapping[str, str], folder: Path | None = None
) -> Iterator[str]:
    """The address of our own server, on a free port; SIGTERM ends it well."""
    command = [sys.executable, "-m", "pipelines.serve", "--port", "0", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not (found := re.search(r"(http://127.0.0.1:\d+)/invocations", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


class Server:
    """One that may be killed, by us or by somebody else."""

    _process: subprocess.Popen[bytes]

    def processes(self) -> list[int]:
        """Its own and those that it has started."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        return [self._process.pid, *(one.pid for one in family)]

    def kill(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):  # the others may end when the first one is gone
                os.kill(process, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """For the end of one that somebody else has killed."""
        self._process.wait()


class MLflowServer(Server):
    """`mlflow server` with an SQLite file or another database, and its files in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        database: str = "",
        options: Sequence[str] = (),
        environment: Mapping[str, str] = {},
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        database = database or f"sqlite:///{folder}/mlflow.db"
        self._command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port)]
        self._command += ["--backend-store-uri", database, "--workers", "1", *options]
        self._command += ["--artifacts-destination", str(folder / "files")]
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env={**os.environ, **self._environment},
                stdout=log,
                stderr=log,
            )
        health = f"{self.address}/health"
        try:
            wait_until(lambda: requests.get(health, timeout=10).ok, seconds=400, what="a server")
        except AssertionError:
            self.kill()
            raise


class GuardedServer(MLflowServer):
    """On PostgreSQL; it asks for passwords and serves one host."""

    def __init__(self, folder: Path, database: "Postgres", *, password: str) -> None:
        settings = folder / "auth.ini"
        settings.write_text(
            f"[mlflow]\ndatabase_uri = sqlite:///{folder}/auth.db\n"
            "default_permission = NO_PERMISSIONS\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            f"admin_username = admin\nadmin_password = {password}\n"
        )
        super().__init__(
            folder,
            database=database.address,
            options=["--app-name", "basic-auth", "--allowed-hosts", "127.0.0.1:*,127.0.0.1"],
            environment={
                "MLFLOW_AUTH_CONFIG_PATH": str(settings),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-flask",
            },
        )
        self.variables = {  # of who may do all there
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": password,
        }


class SQLiteServer(MLflowServer):
    """With an SQLite file, whose rows are looked at."""

    def column(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.folder / "mlflow.db", timeout=30)) as database:
            found = [value for (value,) in database.execute(query)]
            database.commit()
            return found

    def runs(self, status: str) -> int:
        of_status = f"lifecycle_stage = 'active' AND status = '{status}'"
        return int(self.column(f"SELECT count(*) FROM runs WHERE {of_status}")[0])


class Postgres(Server):
    """A new PostgreSQL with the user and database of the compose file."""

    def __init__(self, password: str) -> None:
        self._folder, self.port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
        self._user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to be root
        if self._user:
            shutil.chown(self._folder, self._user)
        self.address = f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{self.port}/mlflow"
        password_file = self._folder / "password"
        password_file.write_text(password)
        password_file.chmod(0o644)
        create = ["initdb", "--auth=scram-sha-256", "--username=mlflow", "--pwfile=password"]
        subprocess.run(
            [*create, "data"], user=self._user, cwd=self._folder, check=True, capture_output=True
        )
        self.start()
        as_mlflow = os.environ | {"PGPASSWORD": password}
        create = ["createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=mlflow"]
        subprocess.run([*create, "mlflow"], env=as_mlflow, check=True)

    def start(self) -> None:
        """Also after `kill`, whose traces in its folder it clears up itself."""
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        self._process = subprocess.Popen(
            ["postgres", "-D", "data", "-p", str(self.port), *options],
            user=self._user,
            cwd=self._folder,
            stderr=subprocess.DEVNULL,
        )
        ready = ["pg_isready", "--host=127.0.0.1", f"--port={self.port}", "--quiet"]
        wait_until(lambda: subprocess.call(ready) == 0, seconds=60, what="PostgreSQL is ready")

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)  # SIGTERM waits for its clients
        self._process.wait(30)
        shutil.rmtree(self._folder)


@contextmanager
def postgres(password: str) -> Iterator[Postgres]:
    """One that ends with its use."""
    server = Postgres(password)
    try:
        yield server
    finally:
        server.end()
