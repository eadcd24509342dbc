"""Decisions at real MLflow servers, one on PostgreSQL with passwords: at once, cut off."""

import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from aegan.config import RegisterConfig
from pipelines import register
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.registry import decisions, mlflow_store
from pipelines.registry.decision_log import succession
from tests import servers
from tests.deciding import Outcome, decide, make_versions
from tests.servers import needs_postgres
from tests.trained import write_project

pytestmark = [pytest.mark.integration, pytest.mark.fault("registry")]
PASSWORD = "of-the-administrator"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("AEGAN_BY", "me")
    return monkeypatch


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.MLflowServer]:
    running = servers.MLflowServer(tmp_path_factory.mktemp("server"))
    yield running
    running.kill()


@pytest.fixture
def client(server: servers.MLflowServer, free: pytest.MonkeyPatch, request: Any) -> Any:
    """Of a server that has ten versions of a model named like the test."""
    free.setenv("MLFLOW_TRACKING_URI", server.address)
    found = mlflow_store.open_store().MlflowClient()
    make_versions(found, 10, model_name=request.node.name)
    return found


def promotion(start: str | None, to: str, **options: Any) -> dict[str, Any]:
    return {"kind": "promotion", "start": start, "to": to, "reasons": ["x"], **options}


def aliases(client: Any, model_name: str) -> dict[str, str]:
    found = client.get_registered_model(model_name).aliases
    return {alias: str(number) for alias, number in found.items()}


def check_one_won(outcomes: list[Outcome], model_name: str, client: Any) -> None:
    """One of these decisions counts, each other was told whose, and the log lost none of them."""
    entries = decisions.history(model_name)
    winner = [entry for entry in entries if entry.counts][-1]
    assert sorted(outcome.code for outcome in outcomes) == [0] + [1] * (len(outcomes) - 1)
    for outcome in outcomes:
        assert outcome.code == 0 or f"version {winner.to}" in outcome.error, outcome.error
        assert outcome.code == 0 or f" by {winner.by}, " in outcome.error, outcome.error
    assert [entry.number for entry in entries] == [*range(1, len(entries) + 1)]
    assert aliases(client, model_name)["champion"] == winner.to


def test_of_two_and_of_eight_who_promote_at_once_one_does_and_the_others_are_told_who(
    server: servers.MLflowServer, client: Any, request: Any, record_property: Any
) -> None:
    name, store = request.node.name, {"MLFLOW_TRACKING_URI": server.address}
    champion = None
    for versions in (range(1, 3), range(3, 11)):
        calls = [promotion(champion, str(to), by=f"number {to}") for to in versions]
        check_one_won(decide(*calls, model_name=name, environment=store), name, client)
        champion = decisions.champion(name)
    record_property("faults", 10)


def test_a_promotion_killed_before_any_request_that_writes_is_put_right_by_the_next_command(
    server: servers.MLflowServer, client: Any, request: Any, record_property: Any
) -> None:
    """Among them: between the log and the first alias, and between the two aliases."""
    name, store = request.node.name, {"MLFLOW_TRACKING_URI": server.address}
    whole = [
        decide(promotion(start, to), model_name=name, environment=store)[0]
        for start, to in ((None, "1"), ("1", "2"))
    ]
    assert [outcome.code for outcome in whole] == [0, 0], whole
    states = []
    champion, other = "2", "1"
    for point in range(1, whole[1].writes + 1):
        call = promotion(champion, other)
        [killed] = decide(call, model_name=name, environment=store, kill_at=point)
        assert killed.code == -signal.SIGKILL
        states.append(aliases(client, name) == {"champion": champion, "previous": other})
        entries = decisions.history(name)
        line = [entry.to for entry in succession(entries)]
        assert aliases(client, name) == {"champion": line[-1], "previous": line[-2]}
        [again] = decide(call, model_name=name, environment=store)
        assert again.code == 0, again.error
        champion, other = other, champion
        assert aliases(client, name) == {"champion": champion, "previous": other}
    counts = [entry.counts for entry in decisions.history(name)]
    assert counts == [True] * (2 + whole[1].writes)
    assert True in states  # killed with the log written or not, but no alias
    assert False in states  # killed with an alias moved
    record_property("faults", whole[1].writes)


def test_a_server_that_dies_while_somebody_promotes_loses_and_doubles_nothing(
    server: servers.MLflowServer, client: Any, request: Any, record_property: Any
) -> None:
    store = {"MLFLOW_TRACKING_URI": server.address, "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
    said = check_a_death_loses_nothing(server, store, client, request.node.name)
    assert "is MLFLOW_TRACKING_URI right, and an MLflow server running there?" in said
    record_property("faults", 2)


def check_a_death_loses_nothing(
    mortal: servers.MLflowServer | servers.Postgres,
    store: dict[str, str],
    client: Any,
    model_name: str,
) -> str:
    """It is killed before a promotion is logged, and before an alias is moved; what is said then.

    The model has two versions at least, and no champion.
    """
    impatient = {**store, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    champion = None
    for to, point in (("1", 2), ("2", 3)):
        call = promotion(champion, to)
        [outcome] = decide(
            call,
            model_name=model_name,
            environment=impatient,
            kill_at=point,
            victims=mortal.processes(),
        )
        assert outcome.code == 1
        assert "\n" not in outcome.error
        mortal.wait()
        mortal.start()
        [again] = decide(call, model_name=model_name, environment=store)
        assert again.code == 0, again.error
        champion = to
    counted = [(entry.to, entry.counts) for entry in decisions.history(model_name)]
    assert counted == [("1", True), ("2", True)]
    assert aliases(client, model_name) == {"champion": "2", "previous": "1"}
    return outcome.error


@pytest.fixture(scope="module")
def database() -> Iterator[servers.Postgres]:
    with servers.postgres("of-postgres") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(
    database: servers.Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.GuardedServer]:
    running = servers.GuardedServer(tmp_path_factory.mktemp("guarded"), database, password=PASSWORD)
    yield running
    running.kill()


@pytest.fixture
def administrator(guarded: servers.GuardedServer, free: pytest.MonkeyPatch) -> Any:
    for name, value in guarded.variables.items():
        free.setenv(name, value)
    return mlflow_store.open_store().MlflowClient()


@needs_postgres
def test_on_postgresql_of_eight_who_promote_at_once_one_does(
    guarded: servers.GuardedServer, administrator: Any, record_property: Any
) -> None:
    make_versions(administrator, 8, model_name="many")
    calls = [promotion(None, str(to), by=f"number {to}") for to in range(1, 9)]
    outcomes = decide(*calls, model_name="many", environment=guarded.variables)
    check_one_won(outcomes, "many", administrator)
    record_property("faults", 8)


@needs_postgres
def test_a_database_that_is_killed_while_somebody_promotes_loses_and_doubles_nothing(
    database: servers.Postgres,
    guarded: servers.GuardedServer,
    administrator: Any,
    record_property: Any,
) -> None:
    make_versions(administrator, 2, model_name="database")
    said = check_a_death_loses_nothing(database, guarded.variables, administrator, "database")
    assert "the server answers 503; its log says why; is its database running?" in said
    record_property("faults", 2)


@needs_postgres
def test_a_database_that_is_killed_while_somebody_registers_is_one_line_and_the_same_goes_on(
    database: servers.Postgres,
    administrator: Any,
    free: pytest.MonkeyPatch,
    tmp_path: Path,
    record_property: Any,
) -> None:
    free.chdir(write_project(tmp_path / "project"))
    config = replace(params.load(RegisterConfig), model_name="killed", experiment="killed")
    make = type(administrator).create_model_version

    def make_without_database(*arguments: Any, **options: Any) -> Any:
        database.kill()
        return make(*arguments, **options)

    with free.context() as now:
        now.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        now.setattr(type(administrator), "create_model_version", make_without_database)
        with pytest.raises(UserError) as refused:
            register.register(config)
        assert "\n" not in str(refused.value)
    database.start()
    version = register.register(config)
    assert not version.reused
    [found] = administrator.search_model_versions("name = 'killed'")
    assert found.version == version.number
    experiment = administrator.get_experiment_by_name("killed").experiment_id
    assert [run.info.status for run in administrator.search_runs([experiment])] == ["FINISHED"]
    assert aliases(administrator, "killed") == {config.alias: version.number}
    record_property("faults", 1)


@needs_postgres
def test_who_is_not_let_in_is_told_so_in_one_line(
    guarded: servers.MLflowServer,
    administrator: Any,
    free: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_property: Any,
) -> None:
    make_versions(administrator, 2)
    decisions.decide("aegan", **promotion(None, "1"))
    requests.post(
        f"{guarded.address}/api/2.0/mlflow/users/create",
        json={"username": "reader", "password": "of-the-reader"},
        auth=("admin", PASSWORD),
        timeout=60,
    ).raise_for_status()
    for model in ("aegan", "aegan.decisions"):
        requests.post(
            f"{guarded.address}/api/3.0/mlflow/users/permissions/grant",
            json={
                "username": "reader",
                "resource_type": "registered_model",
                "resource_id": model,
                "permission": "READ",
            },
            auth=("admin", PASSWORD),
            timeout=60,
        ).raise_for_status()
    administrator.set_registered_model_alias("aegan", "champion", "2")

    free.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    free.setenv("MLFLOW_TRACKING_PASSWORD", "of-the-reader")
    with caplog.at_level(logging.WARNING):
        assert decisions.champion("aegan") == "1"
    assert "cannot be put right: MLflow at" in caplog.messages[-1]
    for password, address, words in (
        ("of-the-reader", guarded.address, "error code 403|Permission denied|PERMISSION"),
        ("wrong", guarded.address, "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("of-the-reader", guarded.address.replace("127.0.0.1", "localhost"), "allowed-hosts"),
    ):
        free.setenv("MLFLOW_TRACKING_PASSWORD", password)
        free.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(UserError, match=words) as refused:
            decisions.decide("aegan", **promotion("1", "2"))
        assert "\n" not in str(refused.value)
        assert password not in str(refused.value)
    record_property("faults", 4)
