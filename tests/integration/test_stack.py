"""`make up`, `make status`, `make down`: real servers, killed and brought back."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import requests

from pipelines.base import package
from pipelines.base.errors import UserError
from pipelines.jobs import shipment
from pipelines.project import daemons, stack, stack_parts
from pipelines.registry import signing
from tests.compose import free_port
from tests.trained import ROOT, write_project

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(  # in CI its absence is a failure
        not shutil.which("initdb") and not os.environ.get("CI"), reason="needs PostgreSQL"
    ),
]
PARTS = ("postgresql", "s3", "mlflow")


class Stack:
    """The servers of one project folder, whose commands run as a user runs them."""

    def __init__(self, project: Path) -> None:
        self.project, self.folder = project, project / ".stack"
        self.ports = {part: free_port() for part in PARTS}

    def run(self, *arguments: str, expected: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.project.stack", *arguments],
            cwd=self.project,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expected, done
        return done.stdout + done.stderr

    def up(self, **ports: int) -> str:
        options = (f"--{part}-port={port}" for part, port in (self.ports | ports).items())
        return self.run("up", *options)

    def processes(self, part: str) -> list[psutil.Process]:
        return daemons.find(str(self.folder / part))

    def all_processes(self) -> set[int]:
        return {process.pid for part in PARTS for process in self.processes(part)}

    def kill(self, part: str, *, all_of_it: bool = False) -> None:
        """kill -9 of the process that `make status` names, or of those that it started, too."""
        killed = self.processes(part)
        if not all_of_it:
            killed = [daemons.leader(str(self.folder / part))]
        for process in killed:
            process.send_signal(signal.SIGKILL)

    def environment(self) -> dict[str, str]:
        """What a shell has after `. .stack/env`."""
        script = ". .stack/env && exec env -0"
        shell = subprocess.run(
            ["sh", "-c", script], cwd=self.project, env={}, capture_output=True, check=True
        )
        return dict(line.split("=", 1) for line in shell.stdout.decode().split("\0") if "=" in line)

    def search(self, *login: str, **options: Any) -> int:
        address = f"http://127.0.0.1:{self.ports['mlflow']}/api/2.0/mlflow/experiments/search"
        options["auth"] = login or None
        return requests.post(address, json={"max_results": 1}, timeout=60, **options).status_code


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    """A stack that is up, in a folder that PostgreSQL's user can reach."""
    project = Path(tempfile.mkdtemp(prefix="stack "))
    project.chmod(0o755)
    made = Stack(write_project(project / "project"))
    try:
        made.up()
        yield made
    finally:
        made.run("down")
        shutil.rmtree(project)


def test_passwords_are_random_and_their_owners_alone(running: Stack) -> None:
    passwords = json.loads((running.folder / "settings.json").read_text())["passwords"]
    assert {len(password) for password in passwords.values()} == {64}
    assert len(set(passwords.values())) == 3
    for name in ("settings.json", "env", "mlflow.log", "postgresql.log"):
        assert (running.folder / name).stat().st_mode & 0o777 == 0o600
    assert running.folder.stat().st_mode & 0o066 == 0  # nobody else lists it
    for process in psutil.process_iter(["cmdline"]):  # which every user may read
        assert not [word for word in process.info["cmdline"] or () if word in passwords.values()]


def test_what_it_keeps_is_neither_committed_nor_submitted() -> None:
    ignored = ["git", "check-ignore", "--quiet", ".stack/env"]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0
    assert ".stack" in (ROOT / ".dvcignore").read_text().split()
    assert shipment.is_secret_name(".stack/settings.json")


def test_only_who_knows_the_password_comes_in_and_from_here_only(running: Stack) -> None:
    login = ("admin", running.environment()["MLFLOW_TRACKING_PASSWORD"])
    assert running.search() == 401
    assert running.search("admin", "password1234") == 401
    assert running.search(*login) == 200
    assert running.search(*login, headers={"Host": "evil.example.com"}) == 403
    for part in PARTS:
        listening = {
            connection.laddr.ip
            for process in running.processes(part)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1"}


def test_a_second_up_changes_nothing(running: Stack) -> None:
    before = running.all_processes()
    environment = (running.folder / "env").read_bytes()
    said = running.run("up")
    assert said.count("already") == 3
    assert running.all_processes() == before
    assert (running.folder / "env").read_bytes() == environment


@pytest.mark.fault("registry")
def test_each_part_is_killed_and_comes_back_with_its_data(
    running: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """A model that was registered with the one line of the docs loads after every part was lost."""
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stage = [sys.executable, "-m", "pipelines.register"]
    done = subprocess.run(stage, cwd=running.project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert signing.verify("models:/aegan@candidate").endswith("whole, not signed")
    bucket = boto3.client("s3")
    bucket.put_object(Bucket="aegan", Key="runs/x", Body=b"")
    assert running.run("status").count(" up ") == 3
    states = json.loads(running.run("status", "--json").splitlines()[0])
    assert {one["service"]: one["state"] for one in states} == dict.fromkeys(PARTS, "up")

    running.kill("postgresql")
    running.kill("s3", all_of_it=True)
    running.kill("mlflow")  # what it started listens still
    running.run("status", expected=3)
    said = running.run("up")
    assert said.count("starting it") == 3
    assert "already" not in said
    package.make_keys(tmp_path / "key")
    monkeypatch.setenv(package.SIGNING_KEY, str(tmp_path / "key"))
    monkeypatch.setenv(package.TRUSTED_KEYS, str(tmp_path / "key.pub"))
    signing.sign("models:/aegan@candidate")
    assert "signed with the trusted key" in signing.verify("models:/aegan/1")
    assert "Contents" not in bucket.list_objects_v2(Bucket="aegan")  # as `make status` says

    running.kill("postgresql")  # the others go on, and need nothing
    others = [process.pid for part in ("s3", "mlflow") for process in running.processes(part)]
    assert running.run("up").count("already") == 2
    assert [
        process.pid for part in ("s3", "mlflow") for process in running.processes(part)
    ] == others
    assert running.search("admin", os.environ["MLFLOW_TRACKING_PASSWORD"]) == 200
    record_property("faults", 4)


def test_a_port_that_is_taken_is_one_line_that_names_who_has_it(running: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port, before = other.getsockname()[1], running.all_processes()
        said = running.run("up", f"--s3-port={port}", expected=1)
        [line] = [line for line in said.splitlines() if line.startswith("error")]
        assert f"port {port} of 127.0.0.1, which s3 is to listen on, is taken by" in line
        assert f"process {os.getpid()} (" in line
        assert f"make up S3_PORT={port + 1}" in line
    assert before > running.all_processes()  # only the one that was to move has ended
    assert running.up().count("already") == 2


def test_an_endpoint_of_ones_own_takes_motos_place(running: Stack) -> None:
    address = f"http://127.0.0.1:{running.ports['s3']}"
    said = running.run("up", f"--s3-endpoint={address}")
    assert said.count("already") == 2
    assert running.environment()["AWS_ENDPOINT_URL"] == address
    assert "AWS_ACCESS_KEY_ID" not in running.environment()  # yours
    assert f"s3          down  {address}" in running.run("status", expected=3)
    assert running.run("up", "--s3-endpoint=moto").count("already") == 2


def test_a_number_that_is_another_programs_by_now_is_left_alone(tmp_path: Path) -> None:
    """PostgreSQL's own note of its process, after a restart of the machine."""
    with subprocess.Popen(["sleep", "60"]) as other:
        file = tmp_path / "postgresql" / "postmaster.pid"
        file.parent.mkdir()
        file.write_text(f"{other.pid}\n{file.parent}\n")
        stack_parts.prepare(tmp_path, {})
        assert not file.exists()
        assert not daemons.end(str(file.parent), signal.SIGKILL)
        assert other.poll() is None
        other.kill()


def test_what_ends_at_once_and_what_is_damaged_is_one_line(running: Stack, tmp_path: Path) -> None:
    settings = running.folder / "settings.json"
    content = settings.read_text()
    settings.rename(tmp_path / "settings.json")
    with pytest.raises(UserError, match=r"settings.json is gone, and with it the passwords"):
        stack.up(running.folder, {}, None)
    settings.write_text("{}")
    with pytest.raises(UserError, match=r"settings.json is damaged"):
        stack.up(running.folder, {}, None)
    settings.write_text(content)
    settings.chmod(0o600)
    with pytest.raises(UserError, match=r"expected http\(s\)://host:port"):
        stack.up(running.folder, {}, "ftp://host")
    with pytest.raises(UserError, match="two of these ports are the same"):
        stack.up(running.folder, {"s3": running.ports["mlflow"]}, None)
    assert "greater than or equal to 1024" in running.run("up", "--s3-port=80", expected=1)
    command = [sys.executable, "-c", "raise SystemExit('no room')"]
    part = stack_parts.Part(
        name="broken",
        address="",
        port=0,
        about="",
        command=command,
        environment={},
        problem=lambda: stack_parts.NO_ANSWER,
    )
    with pytest.raises(UserError, match=r"broken ended at once; .*broken.log: no room"):
        stack._start(part, tmp_path)


def test_down_leaves_nothing_running_also_after_a_kill(running: Stack) -> None:
    running.kill("mlflow")
    running.kill("postgresql")
    said = running.run("down")
    assert said.count(": ended") >= 2
    assert running.all_processes() == set()
    assert "did not run" in running.run("down")
    running.run("status", expected=3)
    assert (running.folder / "postgresql" / "PG_VERSION").exists()
