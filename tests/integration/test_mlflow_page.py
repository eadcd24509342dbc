"""`make mlflow` and the other users of the machine."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.compose import free_port, wait_until
from tests.registrations import ROOT, registrations
from tests.trained import write_project

pytestmark = pytest.mark.integration
ALIAS = "/api/2.0/mlflow/registered-models/alias"
MOVE = {"name": "aegan", "alias": "candidate", "version": "1"}
IDS = re.compile(r"<[^>]*>|\{[^}]*\}")  # in MLflow's routes


@contextmanager
def page(project: Path, **variables: str) -> Iterator[tuple[str, str, int]]:
    """Address, password and process of a page that is started as `make mlflow` starts it."""
    port, output = free_port(), project / "page.txt"
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.serving.mlflow_page", str(port)],
            cwd=project,
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **variables},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: "password" in output.read_text(), seconds=120, what="the page is there")
        text = output.read_text()
        [password] = re.findall("password: (.*)", text)
        [address] = re.findall("MLflow page: (.*)", text)
        yield address, password, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    assert "Traceback" not in output.read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_project(tmp_path_factory.mktemp("page") / "project")
    with registrations() as registering:
        [outcome] = registering.run(folder)
    assert outcome.code == 0, outcome.errors
    return folder


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[tuple[str, str, int]]:
    with page(project) as running:
        yield running


@pytest.mark.fault("other users")
def test_without_the_password_nothing_of_mlflow_answers(
    served: tuple[str, str, int], record_property: Any
) -> None:
    address, password, _ = served
    from mlflow.server import app as flask_app
    from mlflow.server.fastapi_app import app

    routes = {(route.path, "GET") for route in app.routes if hasattr(route, "path")}
    rules = list(flask_app.url_map.iter_rules())
    routes |= {(rule.rule, method) for rule in rules for method in rule.methods or ()}
    routes = {(path, method) for path, method in routes if method not in ("HEAD", "OPTIONS")}
    assert len(routes) > 200
    assert any("ajax-api" in path for path, _ in routes)
    wrong = [None, ("aegan", ""), ("admin", "password1234"), ("aegan", password[:-1])]
    with requests.Session() as session:
        session.trust_env = False
        for path, method in sorted(routes):
            url = address + IDS.sub("1", path)
            answer = session.request(method, url, auth=wrong[len(path) % 4], timeout=20)
            assert answer.status_code == 401, (method, path)
        assert session.get(f"{address}/nothing/../get-artifact", timeout=20).status_code == 401
    record_property("faults", len(wrong))


@pytest.mark.fault("other users")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_another_user_moves_no_alias_and_reads_neither_store_nor_password(
    served: tuple[str, str, int], project: Path, record_property: Any
) -> None:
    address, password, pid = served
    body = '{"name": "aegan", "alias": "candidate", "version": "1"}'

    def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, user="nobody", cwd="/", capture_output=True, text=True, check=False
        )

    code = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]
    moved = as_nobody(*code, f"{address}{ALIAS}", "--json", body)
    assert moved.stdout == "401", moved
    processes = as_nobody("cat", f"/proc/{pid}/cmdline").stdout
    assert "mlflow_page" in processes
    assert password not in processes
    assert as_nobody("cat", f"/proc/{pid}/environ").returncode != 0
    shared = Path(tempfile.gettempdir())
    folders = [project, *(parent for parent in project.parents if shared in parent.parents)]
    modes = [folder.stat().st_mode for folder in folders]
    try:
        for folder in folders:  # as a home folder may be
            folder.chmod(0o755)
        assert as_nobody("ls", str(project)).returncode == 0
        for name in ("mlflow.db", "mlruns"):
            assert as_nobody("ls", "-l", f"{project / name}/.").returncode != 0
            assert as_nobody("head", "-c1", str(project / name)).returncode != 0
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)
    record_property("faults", 6)


@pytest.mark.fault("other users")
def test_another_sites_page_gets_nothing_done_with_the_browsers_password(
    served: tuple[str, str, int], record_property: Any
) -> None:
    address, password, _ = served
    tricks = [
        {"Host": "evil.example.com"},  # a name that leads to 127.0.0.1 (DNS rebinding)
        {"Host": "127.0.0.1.evil.example.com:5000"},
        {"Host": "["},
        {"Origin": "https://evil.example.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # another user's page
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},  # a form
    ]
    login = ("aegan", password)
    for headers in tricks:
        answer = requests.post(
            f"{address}{ALIAS}", json=MOVE, auth=login, headers=headers, timeout=20
        )
        assert answer.status_code == 403, headers
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert requests.get(address, auth=login, headers=link, timeout=20).status_code == 200
    record_property("faults", len(tricks))


def test_with_the_password_page_and_registry_work(
    served: tuple[str, str, int], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.registry import tracking

    address, password, _ = served
    login = ("aegan", password)
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    moved = requests.post(f"{address}{ALIAS}", json=MOVE, auth=login, headers=own, timeout=20)
    assert moved.status_code == 200, moved.text
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "aegan")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    assert tracking.load_model("models:/aegan@candidate").latent_dim == 8
    run = requests.post(
        f"{address}/ajax-api/2.0/mlflow/runs/search",
        json={"experiment_ids": ["1"]},
        auth=login,
        timeout=20,
    ).json()["runs"][0]["info"]["run_id"]
    report = f"{address}/get-artifact?run_id={run}&path=report/index.html"
    assert requests.get(report, auth=login, timeout=20).text == "<html>report</html>"


def test_make_mlflow_starts_this_page() -> None:
    done = subprocess.run(  # as also where `make test` runs this test
        ["make", "--no-print-directory", "--dry-run", "mlflow", "PORT=5055"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        done.stdout.splitlines()[-1] == '.venv/bin/python -m pipelines.serving.mlflow_page "$PORT"'
    )


def run_page(project: Path, port: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.serving.mlflow_page", port],
        cwd=project,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_server_of_the_users_is_named_instead_of_a_page_of_another_store(tmp_path: Path) -> None:
    done = run_page(tmp_path, "5000", MLFLOW_TRACKING_URI="https://me:s3cret@mlflow.example.com")
    assert done.stdout == "MLflow page: https://mlflow.example.com (MLFLOW_TRACKING_URI)\n"
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.fault("other users")
def test_a_port_that_is_taken_or_none_is_one_line(
    served: tuple[str, str, int], tmp_path: Path, record_property: Any
) -> None:
    taken = served[0].rpartition(":")[2]
    for port, words in ((taken, "is taken"), ("70000", "expected 1024"), ("x", "PORT is x")):
        done = run_page(tmp_path, port)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert words in line
        assert list(tmp_path.iterdir()) == []
    record_property("faults", 3)
