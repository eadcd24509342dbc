"""Registrations at a real MLflow server: at once, cut off, and one that wants to do harm."""

import re
import shutil
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from aegan.config import RegisterConfig
from aegan.training.run_folder import RunFolder
from pipelines import register
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.project import tidy
from pipelines.registry import champions, decisions, mlflow_store, tracking
from pipelines.registry.live_run import send_rest
from pipelines.retraining.ledger import Ledger, Step, new_entry, place_of
from tests.compose import wait_until
from tests.registrations import Registrations, registrations
from tests.servers import SQLiteServer
from tests.trained import RUN_NAME, write_project

pytestmark = [pytest.mark.integration, pytest.mark.fault("registry")]


class Registry(SQLiteServer):
    """And what is registered there."""

    def versions(self) -> list[int]:
        return self.column(
            "SELECT version FROM model_versions WHERE current_stage <> 'Deleted_Internal'"
        )

    def check_each_is_there(self, times: int) -> None:
        """So many contents are registered: each once, nothing else, and the last has the alias."""
        assert (self.runs("FINISHED"), self.runs("RUNNING"), self.runs("FAILED")) == (times, 0, 0)
        models = "SELECT count(*) FROM logged_models WHERE lifecycle_stage = 'active'"
        assert self.column(models) == [times]
        assert len(self.versions()) == times
        assert self.column("SELECT version FROM registered_model_aliases") == self.versions()[-1:]


@pytest.fixture(scope="module")
def registering() -> Iterator[Registrations]:
    with registrations() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One for all tests, which register contents of their own: it takes seconds to start."""
    running = Registry(tmp_path_factory.mktemp("server"))
    yield running
    running.kill()


@pytest.fixture
def before(server: Registry) -> int:
    """How many contents are registered."""
    return len(server.versions()) if (server.folder / "mlflow.db").exists() else 0


def test_three_at_once_register_one_content_once(
    registering: Registrations, server: Registry, before: int, tmp_path: Path, record_property: Any
) -> None:
    projects = [write_project(tmp_path / name, seed=1) for name in "abc"]
    outcomes = registering.run(*projects, environment={"MLFLOW_TRACKING_URI": server.address})
    assert [(outcome.code, outcome.errors) for outcome in outcomes] == [(0, "")] * 3
    server.check_each_is_there(before + 1)
    record_property("faults", 3)


def test_one_whose_version_comes_too_late_leaves_the_version_of_the_first(
    registering: Registrations,
    server: Registry,
    before: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    """The first takes the late one's run away; the server answers it with an error, late version
    made.
    """
    from mlflow import MlflowClient

    ours, theirs = (write_project(tmp_path / name, seed=3) for name in "ab")
    environment = {"MLFLOW_TRACKING_URI": server.address}
    make = MlflowClient.create_model_version

    def make_late(*arguments: Any, **options: Any) -> Any:
        [outcome] = registering.run(theirs, environment=environment)
        assert (outcome.code, outcome.errors) == (0, "")
        return make(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "create_model_version", make_late)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.chdir(ours)
    version = register.register(params.load(RegisterConfig))
    assert (version.number, version.reused) == (str(server.versions()[-1]), True)
    server.check_each_is_there(before + 1)
    record_property("faults", 1)


def test_a_server_that_dies_meanwhile_is_one_line_and_the_same_command_goes_on(
    registering: Registrations, server: Registry, before: int, tmp_path: Path, record_property: Any
) -> None:
    project = write_project(tmp_path / "project", seed=2)
    environment = {"MLFLOW_TRACKING_URI": server.address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    registering.start(project, environment=environment)
    wait_until(lambda: server.runs("RUNNING") > 0, seconds=60, what="a run that is being written")
    server.kill()
    [outcome] = registering.wait()
    assert outcome.code == 1, outcome
    [line] = outcome.errors.splitlines()
    assert "is MLFLOW_TRACKING_URI right, and an MLflow server running there?" in line
    server.start()
    assert server.runs("RUNNING") == 1
    assert len(server.versions()) == before
    [killed] = registering.run(project, environment=environment, kill_at=60)
    assert killed.code == -signal.SIGKILL  # now it is the client
    [outcome] = registering.run(project, environment=environment)
    assert (outcome.code, outcome.errors) == (0, "")
    server.check_each_is_there(before + 1)
    record_property("faults", 2)


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """Another server: its host and port, and what it was sent."""
    heard: list[str] = []

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(f"{self.path} {self.headers['Authorization']}")
            self.send_error(404)

        do_PUT = do_POST = do_GET  # noqa: N815 # as http.server calls them

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listening) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{other.server_port}", heard
        other.shutdown()


def test_old_versions_go_with_their_files_and_what_anything_names_stays(
    registering: Registrations,
    server: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    name, project = "cleaned", write_project(tmp_path / "project", seed=20)
    params.change({"register": {"model_name": name}}, project / "params.yaml", said_by="test")
    [first] = registering.run(project, environment={"MLFLOW_TRACKING_URI": server.address})
    assert first.code == 0, first.errors
    monkeypatch.chdir(project)
    client = mlflow_store.open_store().MlflowClient()
    runs = {}
    for number in "23456789":
        start = {"start_from": f"models:/{name}/7"} if number == "6" else {}
        run = client.create_run("0", tags=start, run_name=f"run {number}").info
        client.log_text(run.run_id, "of the version", "report.txt")
        if number != "6":
            client.set_terminated(run.run_id)
        tags = {"run_name": f"aegan-{int(number):012x}"}
        client.create_model_version(name, run.artifact_uri, run.run_id, tags=tags)
        runs[number] = run.run_id
        (Path("runs") / tags["run_name"]).mkdir()
        (Path("runs") / tags["run_name"] / "metrics.jsonl").touch()
    champion = None
    for number in ("2", "1", "3"):
        decisions.decide(name, kind="promotion", start=champion, to=number, reasons=["better"])
        champion = number
    client.set_registered_model_tag(name, "shown", f"models:/{name}/4")
    client.set_registered_model_alias(name, "candidate", "8")
    entry = new_entry(seen="a", source="b", settings="c", champion="3")
    entry.steps["train"] = Step("d", 0.0, "e", result={"version": "5"})
    Ledger(place_of("")).save(entry)

    def with_files() -> list[str]:
        found = {file.parts[-3] for file in (server.folder / "files").rglob("report.txt")}
        return [number for number, run_id in runs.items() if run_id in found]

    tidy.main(keep=1)
    said = capsys.readouterr().out
    assert f"versions of {name}: 9, of which 1 may go" in said
    for number, reason in {
        "1": "the alias previous",
        "3": f"retraining {entry.id} is not at its end",
        "4": "the tag shown names it",
        "5": f"retraining {entry.id} is not at its end",
        "6": "its run is at work",
        "7": "the run run 6 begins with it",
        "8": "the alias candidate",
        "9": "one of the newest 1",
    }.items():
        assert re.search(rf"version {number} of .*: stays, {reason}", said), said
    assert with_files() == [*"23456789"]

    tidy.main(keep=1, yes=True)
    assert [*decisions.versions(client, name)] == [*"13456789"]
    assert with_files() == [*"3456789"]
    assert {path.name[-1] for path in Path("runs").glob("aegan-*")} == {*"3456789"}
    assert client.get_run(runs["2"]).info.lifecycle_stage == "deleted"
    assert "rollback to version 1 from version 3" in champions.rollback(name)
    assert decisions.champion(name) == "1"
    capsys.readouterr()
    tidy.main(keep=1)
    assert f"versions of {name}: 8, of which 0 may go" in capsys.readouterr().out
    with pytest.raises(UserError, match="--keep 0: expected"):
        tidy.main(keep=0)
    client.set_terminated(runs["6"])


OTHER_PLACES = {  # what the registry's database may say of what registering reads and writes
    "a version of the same content": (
        "UPDATE model_versions SET storage_location = '{place}' RETURNING 1"
    ),
    "the run of the training": "UPDATE runs SET artifact_uri = '{place}' RETURNING 1",
    "a new model": (
        "CREATE TRIGGER elsewhere AFTER INSERT ON logged_models BEGIN UPDATE logged_models"
        " SET artifact_location = '{place}' WHERE model_id = NEW.model_id; END"
    ),
}


@pytest.mark.parametrize("what", OTHER_PLACES)
def test_registering_sends_no_password_to_another_server(
    registering: Registrations,
    server: Registry,
    listener: tuple[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    host, heard = listener
    seed = 30 + [*OTHER_PLACES].index(what)
    tracked = what == "the run of the training"
    project = write_project(tmp_path / "project", seed=seed, tracked=tracked)
    environment = {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "s3cret",
    }
    if what == "a version of the same content":
        [outcome] = registering.run(project, environment=environment)
        assert outcome.code == 0, outcome
    if tracked:
        monkeypatch.chdir(project)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        assert send_rest(RunFolder(project / "runs" / RUN_NAME), "aegan")
    place = f"http://{host}/api/2.0/mlflow-artifacts/artifacts/x"
    server.column(OTHER_PLACES[what].format(place=place))
    try:
        [outcome] = registering.run(project, environment=environment)
    finally:
        server.column("DROP TRIGGER IF EXISTS elsewhere")
    assert heard == []
    assert outcome.code == 1
    assert "none of the places of the registry" in outcome.errors


def test_a_registry_sends_us_to_no_other_server_and_into_no_folder(
    registering: Registrations,
    server: Registry,
    listener: tuple[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    host, heard = listener
    project = write_project(tmp_path / "project", seed=40)
    [outcome] = registering.run(project, environment={"MLFLOW_TRACKING_URI": server.address})
    assert outcome.code == 0, outcome
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    assert tracking.load_model("models:/aegan@candidate").latent_dim == 8
    elsewhere = shutil.copytree("artifacts/train", tmp_path / "elsewhere/artifacts").parent
    places = [
        f"mlflow-artifacts://{host}/x",
        f"http://{host}/api/2.0/mlflow-artifacts/artifacts/x",
        f"ftp://{host}/x",
        f"dbfs://{host}/x",
        str(elsewhere),
        elsewhere.as_uri(),
        f"mlruns/../../{elsewhere.name}",
        f"file:{project}/mlruns/../{elsewhere}",
    ]
    for place in places:
        server.column(f"UPDATE model_versions SET storage_location = '{place}' RETURNING 1")
        with pytest.raises(UserError, match="none of the places of the registry"):
            tracking.load_model("models:/aegan@candidate")
    server.column(f"UPDATE experiments SET artifact_location = '{elsewhere}' RETURNING 1")
    files = sorted(elsewhere.rglob("*"))
    Path("artifacts/evaluate/metrics.json").write_text('{"frechet_distance": {"ema": 1.0}}')
    [outcome] = registering.run(project, environment={"MLFLOW_TRACKING_URI": server.address})
    assert outcome.code == 1
    assert "none of the places of the registry" in outcome.errors
    assert sorted(elsewhere.rglob("*")) == files
    assert heard == []
    record_property("faults", len(places) + 1)
