"""The servers of `make up`: PostgreSQL, an S3 endpoint, MLflow; what infra/compose.yaml has."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from pipelines.base.errors import UserError
from pipelines.project import daemons

HOST, ADMINISTRATOR, BUCKET = "127.0.0.1", "admin", "aegan"
AUTHENTICATION = Path(__file__).parents[2] / "infra/mlflow_auth.ini"  # which has no password in it
NO_ANSWER = "does not answer"
ANSWER_SECONDS = 10
LOSES = "moto, a simulation for trials: any key opens it, objects are in memory, gone when it ends"
STOPS = {  # how each part is asked to end, what uses another one first
    "mlflow": signal.SIGTERM,
    "s3": signal.SIGTERM,
    "postgresql": signal.SIGINT,  # SIGTERM would wait for its clients
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One server, and how it is started, asked and ended."""

    name: str
    address: str
    port: int
    about: str
    command: list[str]
    environment: dict[str, str]
    problem: Callable[[], str]  # "" where it answers as it should
    data: Path | None = None
    user: str | None = None
    patience_seconds: float = 60


def prepare(folder: Path, passwords: dict[str, str]) -> None:
    """Make the data folders that are not there yet; raises UserError."""
    (folder / "mlflow").mkdir(mode=0o700, exist_ok=True)
    data = folder / "postgresql"
    if not data.exists():
        _create(data, passwords["postgresql"])
    _forget_stranger(data / "postmaster.pid")


def postgresql(folder: Path, port: int) -> Part:
    """PostgreSQL with the user and database `mlflow`; raises UserError where it is not there."""
    programs, data = _programs(), folder / "postgresql"
    options = ["-p", str(port), "-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="]
    ready = [str(programs / "pg_isready"), "-q", "-h", HOST, "-p", str(port)]
    return Part(
        name="postgresql",
        address=f"{HOST}:{port}",
        port=port,
        about="MLflow's runs, models and users",
        command=[str(programs / "postgres"), "-D", str(data), *options],
        environment={},
        problem=lambda: NO_ANSWER if subprocess.call(ready) else "",
        data=data,
        user=_user_of_postgresql(folder),
    )


def moto(port: int) -> Part:
    """A simulated S3 for trials, with the bucket of infra/compose.yaml."""
    address = f"http://{HOST}:{port}"

    def problem() -> str:  # a new one has no bucket yet
        return _problem("PUT", f"{address}/{BUCKET}", accepted=(200, 409))

    return Part(
        name="s3",
        address=address,
        port=port,
        about=LOSES,
        command=[sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)],
        environment={"AWS_DEFAULT_REGION": "us-east-1"},
        problem=problem,
    )


def mlflow(folder: Path, port: int, database_port: int, passwords: dict[str, str]) -> Part:
    """MLflow, which keeps files in a folder of its own: no end of the S3 endpoint loses them."""
    address, files = f"http://{HOST}:{port}", folder / "mlflow"
    login = (ADMINISTRATOR, passwords["mlflow"])

    def problem() -> str:
        url = f"{address}/api/2.0/mlflow/experiments/search"
        return _problem("POST", url, json={"max_results": 1}, auth=login)

    return Part(
        name="mlflow",
        address=address,
        port=port,
        about="files of runs and models",
        command=[
            *(sys.executable, "-m", "mlflow", "server"),
            *(f"--host={HOST}", f"--port={port}", "--workers=1", "--app-name=basic-auth"),
            f"--allowed-hosts={HOST}:{port},localhost:{port}",
            "--backend-store-uri=postgresql+psycopg2:///mlflow",
            f"--artifacts-destination={files}",
        ],
        environment={
            "PGHOST": HOST,
            "PGPORT": str(database_port),
            "PGUSER": "mlflow",
            "PGPASSWORD": passwords["postgresql"],
            "MLFLOW_AUTH_CONFIG_PATH": str(AUTHENTICATION),
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMINISTRATOR,
            "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["mlflow"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": passwords["mlflow_session"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        },
        problem=problem,
        data=files,
        patience_seconds=300,
    )


def answers(endpoint: str) -> bool:
    """Whether a server, any, answers at an address."""
    return not _problem("GET", endpoint, accepted=range(200, 500))


def _problem(method: str, url: str, *, accepted: Any = (200,), **options: Any) -> str:
    with requests.Session() as session:
        session.trust_env = False  # no proxy, and no .netrc
        try:
            status = session.request(method, url, timeout=ANSWER_SECONDS, **options).status_code
        except requests.RequestException:
            return NO_ANSWER
    if status == 401:
        return "does not take the password of .stack/settings.json: write there what it is now"
    return "" if status in accepted else NO_ANSWER


def _programs() -> Path:
    """The folder of PostgreSQL's programs; raises UserError."""
    in_path = shutil.which("postgres")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version)
    places = [Path(in_path).resolve().parent] if in_path else []
    for place in [*places, *reversed(installed)]:
        if all((place / name).exists() for name in ("initdb", "pg_isready", "postgres")):
            return place
    raise UserError(
        "PostgreSQL is neither in PATH nor in /usr/lib/postgresql: install it (Debian and Ubuntu: "
        "`apt install postgresql`, Fedora: `dnf install postgresql-server`)"
    )


def _version(programs: Path) -> int:
    number = programs.parent.name
    return int(number) if number.isdecimal() else 0


def _user_of_postgresql(folder: Path) -> str | None:
    """The user that PostgreSQL runs as, which refuses to be root; None is this one."""
    if os.geteuid() != 0:
        return None
    user = "postgres"
    try:
        code = subprocess.call(["test", "-x", folder], **daemons.as_user(user))
    except (LookupError, ValueError):
        code = -1
    if code != 0:
        raise UserError(
            f"PostgreSQL does not run as root, and the user {user} "
            + ("does not exist" if code < 0 else f"cannot reach {folder}")
            + ": run `make up` as another user than root"
        )
    return user


def _create(data: Path, password: str) -> None:
    """A new cluster of databases, which appears whole."""
    programs, user = _programs(), _user_of_postgresql(data.parent)
    temporary = data.with_name(".postgresql.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(mode=0o700)
    secret = temporary / "password"
    secret.write_text(password, encoding="utf-8")
    if user:
        for path in (temporary, secret):
            shutil.chown(path, user, user)
    new = temporary / "data"
    as_user: Any = {"cwd": temporary, "check": True, "capture_output": True, "text": True}
    as_user |= daemons.as_user(user)
    create = ["--auth=scram-sha-256", "--username=mlflow", f"--pwfile={secret}"]
    create += ["--encoding=UTF8", "--locale=C"]
    single = [str(programs / "postgres"), "--single", "-D", str(new), "postgres"]
    try:
        subprocess.run([str(programs / "initdb"), *create, str(new)], **as_user)
        subprocess.run(single, input="CREATE DATABASE mlflow\n", **as_user)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"PostgreSQL cannot make its data in {data}: {reason}") from None
    new.rename(data)
    shutil.rmtree(temporary)


def _forget_stranger(file: Path) -> None:
    """Remove PostgreSQL's note of its process where that number is another program's by now.

    After a restart of the machine, say: PostgreSQL itself would wait for that program for ever.
    """
    with suppress(OSError, ValueError, IndexError, psutil.Error):
        number = int(file.read_text(encoding="utf-8").split()[0])
        if psutil.Process(number).name() not in ("postgres", "postmaster"):
            file.unlink()
