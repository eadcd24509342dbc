"""`make up`, `make status`, `make down`: the servers of a team on one machine, without containers.

All listen on 127.0.0.1 and keep their data in `.stack/`; `. .stack/env` points a shell at them.
"""

import json
import logging
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from aegan.files import new_file
from pipelines.base.command import run_command
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, project_folder
from pipelines.project import daemons, stack_parts
from pipelines.project.stack_parts import Part

FOLDER = Path(".stack")
PORTS = {"postgresql": 5434, "s3": 3900, "mlflow": 5000}
PATIENCE_SECONDS = 600  # with another `make up`
NOT_ALL_UP = 3  # exit code of `status`, as systemctl's

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is kept in settings.json."""

    ports: dict[str, int]
    passwords: dict[str, str]
    s3_endpoint: str  # empty: moto's


def folder_here() -> Path:
    """Where this project's servers keep their data."""
    return project_folder().resolve() / FOLDER


def up(folder: Path, ports: dict[str, int], s3_endpoint: str | None) -> dict[str, Any]:
    """Start the parts that do not run as they should => where they answer; raises UserError."""
    with _alone(folder):
        settings = _settings(folder, ports, s3_endpoint)
        stack_parts.prepare(folder, settings.passwords)
        parts = _parts(folder, settings)
        if settings.s3_endpoint:
            _end(folder, "s3")
        for part in parts:  # one after the other: MLflow answers once PostgreSQL does
            if _runs(part, folder):
                log.info("%s: runs at %s already", part.name, part.address)
                continue
            before = _end(folder, part.name)
            _check_port(part)
            log.info("%s: starting it%s", part.name, " again" * before)
            _start(part, folder)
            log.info("%s: answers at %s", part.name, part.address)
        _write(folder / "env", _environment(settings))
    page = f"http://{stack_parts.HOST}:{settings.ports['mlflow']}"
    log.info("MLflow page: %s, user %s, password in .stack/env", page, stack_parts.ADMINISTRATOR)
    log.info("this shell uses them after: . .stack/env")
    return {"env": str(folder / "env"), "services": {part.name: part.address for part in parts}}


def down(folder: Path) -> dict[str, list[str]]:
    """End all parts, what uses another one first => which ran; raises UserError."""
    ended: list[str] = []
    if not folder.exists():
        log.info("nothing was started here")
        return {"ended": ended}
    with _alone(folder):
        for name in stack_parts.STOPS:
            if _end(folder, name):
                ended.append(name)
            log.info("%s: %s", name, "ended" if name in ended else "did not run")
    return {"ended": ended}


def status(folder: Path) -> list[dict[str, str]]:
    """Show each part => their states; none if nothing was started here."""
    if not (folder / "settings.json").exists():
        print("nothing was started here: make up")
        return []
    settings, found = _read_settings(folder), []
    for part in _parts(folder, settings):
        first = daemons.leader(_mark(folder, part.name))
        problem = part.problem() if first else "does not run"
        state, since = "down", f"{problem}: make up; its last words: {FOLDER}/{part.name}.log"
        if first and not problem:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.create_time()))
            state, since = "up", f"since {started}, process {first.pid}"
        found.append({"service": part.name, "state": state, "address": part.address})
        print(f"{part.name:11} {state:5} {part.address:22} {since}")
        size = f"{_bytes(part.data) / 1e6:.1f} MB in {FOLDER}/{part.name}: " if part.data else ""
        print(f"{'':18}{size}{part.about}")
    if settings.s3_endpoint:
        state = "up" if stack_parts.answers(settings.s3_endpoint) else "down"
        found.append({"service": "s3", "state": state, "address": settings.s3_endpoint})
        print(f"{'s3':11} {state:5} {settings.s3_endpoint:22} not ours")
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One `make up` or `make down` at a time; raises UserError."""
    with clear_disk_errors(folder):
        if not folder.exists():
            folder.mkdir()
            # PostgreSQL's user must come through, where root starts it.
            folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
        try:
            with FileLock(folder / "lock", timeout=PATIENCE_SECONDS):
                yield
        except Timeout:
            raise UserError(f"another `make up` is at work in {folder}: wait for it") from None


def _settings(folder: Path, ports: dict[str, int], s3_endpoint: str | None) -> Settings:
    """Those kept, with what is given now; new ones have random passwords."""
    if (folder / "settings.json").exists():
        settings = _read_settings(folder)
    elif (folder / "postgresql").exists():
        raise UserError(
            f"{folder}/settings.json is gone, and with it the passwords of the data beside it: put "
            f"a copy of it there, or move {folder} away to start afresh"
        )
    else:
        names = ("postgresql", "mlflow", "mlflow_session")
        passwords = {name: secrets.token_hex(32) for name in names}
        settings = Settings(ports=PORTS, passwords=passwords, s3_endpoint="")
    endpoint = settings.s3_endpoint if s3_endpoint is None else _endpoint(s3_endpoint)
    settings = Settings(
        ports=settings.ports | ports, passwords=settings.passwords, s3_endpoint=endpoint
    )
    if len(set(settings.ports.values())) < len(PORTS):
        raise UserError(f"two of these ports are the same: {settings.ports}")
    _write(folder / "settings.json", json.dumps(asdict(settings), indent=1) + "\n")
    return settings


def _read_settings(folder: Path) -> Settings:
    file = folder / "settings.json"
    try:
        settings = Settings(**json.loads(file.read_text(encoding="utf-8")))
        if settings.ports.keys() == PORTS.keys():
            return settings
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"{file} is damaged: put a copy of it there, or move {folder} away")


def _endpoint(address: str) -> str:
    if address == "moto":
        return ""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise UserError(
            f"S3 endpoint {address!r}: expected http(s)://host:port without a password, or moto"
        )
    return address


def _parts(folder: Path, settings: Settings) -> list[Part]:
    """In the order in which they are started."""
    ports, passwords = settings.ports, settings.passwords
    return [
        stack_parts.postgresql(folder, ports["postgresql"]),
        *([] if settings.s3_endpoint else [stack_parts.moto(ports["s3"])]),
        stack_parts.mlflow(folder, ports["mlflow"], ports["postgresql"], passwords),
    ]


def _mark(folder: Path, name: str) -> str:
    return str(folder / name)


def _end(folder: Path, name: str) -> bool:
    """End a part, whatever is left of it; whether anything was."""
    return daemons.end(_mark(folder, name), stack_parts.STOPS[name])


def _runs(part: Part, folder: Path) -> bool:
    """Whether a part is whole, started as it would be now, and answers or will soon."""
    first = daemons.leader(_mark(folder, part.name))
    if not first or first.cmdline() != part.command:
        return False
    return daemons.wait_until(lambda: part.problem() != stack_parts.NO_ANSWER, seconds=20)


def _start(part: Part, folder: Path) -> None:
    """Start a part and wait for its answer; raises UserError."""
    mark, output = _mark(folder, part.name), folder / f"{part.name}.log"
    for patience in (1, 2, 4, 0):  # PostgreSQL waits until nothing is left of one that was killed
        daemons.start(part.command, mark, environment=part.environment, log=output, user=part.user)
        daemons.wait_until(
            lambda: part.problem() != stack_parts.NO_ANSWER or not daemons.find(mark),
            part.patience_seconds,
        )
        if daemons.find(mark):
            break
        time.sleep(patience)
    problem = part.problem() if daemons.find(mark) else "ended at once"
    if problem:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        raise UserError(f"{part.name} {problem}; the end of {output}: {said[-1][:300]}")


def _check_port(part: Part) -> None:
    try:
        socket.create_server((stack_parts.HOST, part.port)).close()
    except OSError:
        raise UserError(
            f"port {part.port} of {stack_parts.HOST}, which {part.name} is to listen on, is taken "
            f"by {daemons.listener(part.port)}: end that, or choose another, "
            f"make up {part.name.upper()}_PORT={part.port + 1}"
        ) from None


def _environment(settings: Settings) -> str:
    """Shell commands that point MLflow's and S3's clients at the stack."""
    values = {
        "MLFLOW_TRACKING_URI": f"http://{stack_parts.HOST}:{settings.ports['mlflow']}",
        "MLFLOW_TRACKING_USERNAME": stack_parts.ADMINISTRATOR,
        "MLFLOW_TRACKING_PASSWORD": settings.passwords["mlflow"],
        "AWS_ENDPOINT_URL": settings.s3_endpoint,
    }
    lines = ["# For a shell: `. .stack/env`"]
    if not settings.s3_endpoint:
        values["AWS_ENDPOINT_URL"] = f"http://{stack_parts.HOST}:{settings.ports['s3']}"
        values |= {"AWS_ACCESS_KEY_ID": "moto", "AWS_SECRET_ACCESS_KEY": "moto"}
        values["AWS_DEFAULT_REGION"] = "us-east-1"
        lines.append("unset AWS_PROFILE AWS_SESSION_TOKEN")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _write(file: Path, text: str) -> None:
    """A file for its owner's eyes only."""
    with new_file(file) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as content:
            content.write(text)


def _bytes(folder: Path) -> int:
    return sum(
        (Path(where) / name).lstat().st_size
        for where, _, names in os.walk(folder)
        for name in names
        if os.path.lexists(Path(where) / name)
    )


if __name__ == "__main__":
    run_command("stack")
