"""Days of a project that lives on servers: images, runs, ledger and DVC's remote in a bucket, the
registry on PostgreSQL behind a login. Each of them dies at each step."""

import json
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import psutil
import pytest

from pipelines.bucket import storage
from pipelines.retraining import lease
from pipelines.retraining.ledger import Entry, Ledger, place_of
from pipelines.retraining.steps import STEPS
from tests import interrupted_retraining, servers
from tests.compose import free_port, wait_until
from tests.pictures import encode
from tests.retrained import PARAMETERS, Project, faces, webhook
from tests.s3 import S3Server
from tests.servers import needs_postgres

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    needs_postgres,
]
SECRETS = {"database": "of-the-database", "registry": "of-the-registry", "webhook": "of-the-hook"}
STORAGE = "s3://project/runs"
PLACE = place_of(STORAGE)  # of the ledger, with the lease
REMOTE = "[core]\n    remote = bucket\n['remote \"bucket\"']\n    url = s3://project/dvc\n"


class World(NamedTuple):
    """The project, and what it lives on."""

    project: Project
    mortals: dict[str, Any]
    client: Any  # boto3's
    webhook_port: int

    def add(self, name: str, contents: list[bytes]) -> None:
        for number, content in enumerate(contents):
            key = f"{name}/{number:04d}.png"
            self.client.put_object(Bucket="images", Key=key, Body=content)

    def remove(self, name: str) -> None:
        for key in self.objects("images", f"{name}/"):
            self.client.delete_object(Bucket="images", Key=key)

    def objects(self, bucket: str, prefix: str) -> dict[str, str]:
        """Keys and etags."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", [])}

    def entries(self) -> list[Entry]:
        return Ledger(PLACE).entries()

    def is_done(self, step: str) -> bool:
        """Of the newest retraining."""
        found = self.entries()[-1].steps.get(step)
        return found is not None and bool(found.output)

    def champion(self) -> str:
        """The version with this alias."""
        [version] = [row["version"] for row in self.models() if "champion" in row["aliases"]]
        return str(version)

    def models(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.project.run("models", "--json"))
        return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """After its first day, on which nobody listened to the webhook."""
    folder, bucket, port = tmp_path_factory.mktemp("servers"), S3Server(), free_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    access = {"AWS_ENDPOINT_URL": bucket.address, "AWS_DEFAULT_REGION": "us-east-1", **keys}
    with (
        servers.postgres(SECRETS["database"]) as database,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in access.items():
            patch.setenv(name, value)
        storage._client.cache_clear()
        client = boto3.client("s3")
        for name in ("images", "project"):
            client.create_bucket(Bucket=name)
        (folder / "mlflow").mkdir()
        registry = servers.GuardedServer(folder / "mlflow", database, password=SECRETS["registry"])
        project = Project(
            folder / "project",
            PARAMETERS
            | {"data": {"source": "s3://images"}}
            | {"compute": PARAMETERS["compute"] | {"storage": STORAGE}},
            access
            | registry.variables
            | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
            | {"AEGAN_WEBHOOK": f"http://127.0.0.1:{port}/hook"}
            | {"AEGAN_WEBHOOK_SECRET": SECRETS["webhook"]},
            dvc=REMOTE,
        )
        mortals = {"bucket": bucket, "registry": registry, "database": database}
        made = World(project, mortals, client, port)
        made.add("first", [encode(image) for image in faces(0, 200)])
        try:
            _spend_first_day(made)
            yield made
        finally:
            registry.kill()
            bucket.kill()


def _spend_first_day(world: World) -> None:
    """While one machine trains, another one is told to wait."""
    project, other = world.project, world.project.folder.with_name("other")
    project.git("clone", "--quiet", ".", str(other))
    (other / ".venv").symlink_to((project.folder / ".venv").resolve())
    first = project.start("retrain")
    wait_until(lambda: PLACE.read(lease.LEASE) is not None, seconds=120, what="a lease")
    assert "another retraining is at work" in project.run("retrain", expected=4, folder=other)
    output, _ = first.communicate()
    assert first.returncode == 0, output
    assert "does not take messages" in output


def test_the_first_day_is_published_in_bucket_registry_and_git(world: World) -> None:
    [entry] = world.entries()
    assert (entry.outcome, entry.champion_after) == ("promoted", "1")
    assert entry.steps["publish"].result["pushed"]
    assert world.objects("project", "dvc/files/")
    assert world.champion() == "1"
    assert world.project.git("tag", "--list").split() == [f"retrained/{entry.id}"]


def test_nothing_new_writes_nothing_and_the_message_of_yesterday_is_delivered_once(
    world: World,
) -> None:
    looked = ("runs/retraining/lease", "runs/retraining/looked")
    with webhook(world.webhook_port) as (_, messages):
        assert "nothing new" in world.project.run("retrain")
        before = world.objects("project", "")
        assert "nothing new" in world.project.run("retrain")
        after = world.objects("project", "")
    assert {key for key in after if after[key] != before.get(key)} <= set(looked)
    assert after.keys() == before.keys()
    [entry] = world.entries()
    assert [(one["retraining"], one["outcome"]) for one in messages] == [(entry.id, "promoted")]


def test_corrupt_files_are_refused_and_the_champion_stays(world: World) -> None:
    good = [encode(image) for image in faces(3000, 60)]
    world.add("corrupt", [*good[:35], *(content[:50] for content in good[35:])])
    assert "refused" in world.project.run("retrain", expected=3)
    assert world.entries()[-1].outcome == "refused"
    assert world.champion() == "1"
    world.remove("corrupt")


@pytest.mark.fault("retraining")
def test_what_dies_before_a_step_is_waited_for_or_ends_it_in_one_line(
    world: World, record_property: Any, thorough: bool
) -> None:
    world.add("second", [encode(image) for image in faces(200, 200)])
    endings = _through_deaths(world, [*STEPS][:-2], thorough)
    record_property("faults", len(endings))
    assert {"waited", "one line"} <= set(endings)
    entry = world.entries()[-1]
    assert list(entry.steps) == [*STEPS][:-2]
    assert not entry.outcome
    assert [model["version"] for model in world.models()] == ["1", "2"]


@pytest.mark.fault("retraining")
def test_one_that_was_paused_until_another_had_the_lease_publishes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = world.project.git("tag", "--list"), world.objects("project", "dvc/")
    log = tmp_path / "log"
    pause = partial(interrupted_retraining.end_by, signal.SIGSTOP)
    paused = interrupted_retraining.start(
        *(world.project.folder, world.project.environment, "publish", pause),
        output=str(log),
        lease_seconds=10.0,
    )
    process = psutil.Process(paused.pid)
    wait_until(lambda: process.status() == "stopped", seconds=120, what="a pause")
    monkeypatch.chdir(tmp_path)  # another machine
    for number in range(200):
        try:
            with lease.hold(PLACE, seconds=5.0):
                process.resume()
                paused.join()
            break
        except lease.BusyError:
            assert number < 199
            time.sleep(1)
    assert paused.exitcode == 1
    _check_one_line(log.read_text(), "this process was paused too long")
    assert (world.project.git("tag", "--list"), world.objects("project", "dvc/")) == before
    assert world.champion() == "1"


@pytest.mark.fault("retraining")
def test_after_all_deaths_the_end_is_as_without_them(
    world: World, record_property: Any, thorough: bool
) -> None:
    endings = _through_deaths(world, [*STEPS][-2:], thorough)
    record_property("faults", len(endings))
    world.project.start("retrain").communicate()
    entry = world.entries()[-1]
    assert entry.outcome in ("promoted", "refused")
    assert all(step.output for step in entry.steps.values())
    champion = "2" if entry.outcome == "promoted" else "1"
    assert world.champion() == champion
    assert [model["version"] for model in world.models()] == ["1", "2"]
    tags = world.project.git("tag", "--list").split()
    assert tags.count(f"retrained/{entry.id}") == 1
    assert len(tags) == 2


def test_no_secret_is_written_down(world: World) -> None:
    kept = [PLACE.read(name) or b"" for name in PLACE.names()]
    pages = [*(world.project.folder / "retraining").glob("*.html")]
    assert kept
    assert pages
    for content in [*kept, *(page.read_bytes() for page in pages)]:
        assert not [secret for secret in SECRETS.values() if secret.encode() in content]


def _through_deaths(world: World, steps: list[str], thorough: bool) -> list[str]:
    """How a server's death before each step ended, or each server's; afterwards steps are whole."""
    endings = []
    for step in steps:
        in_turn = [*world.mortals][[*STEPS].index(step) % len(world.mortals)]
        for name in world.mortals if thorough else [in_turn]:
            again = ["--force", step, "--reason", f"{name} dies"] if world.is_done(step) else []
            endings.append(_through_death(world, step, name, *again))
        if not world.is_done(step):
            world.project.run("retrain", "--until", step)
    return endings


def _through_death(world: World, step: str, name: str, *arguments: str) -> str:
    """How it ended: in "one line", or "waited" until the server was there again, or not needed."""
    folder = world.project.folder.parent
    log, request = folder / f"{step}-{name}.log", folder / "request"
    process = interrupted_retraining.start(
        *(world.project.folder, world.project.environment, step),
        partial(interrupted_retraining.ask, request),
        *("--until", step, *arguments),
        output=str(log),
    )
    mortal = world.mortals[name]
    wait_until(request.exists, seconds=120, what=f"the step {step}")
    mortal.kill()
    request.unlink()
    give_up = time.monotonic() + 600
    while process.is_alive() and "trying again" not in log.read_text():
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.1)
    waited = process.is_alive()
    mortal.start()
    process.join()
    said = log.read_text()
    if process.exitcode == 0 or (step == "gate" and process.exitcode == 3):
        return "waited" if waited else "not needed"
    assert process.exitcode == 1, said
    _check_one_line(said)
    return "one line"


def _check_one_line(said: str, expected: str = "") -> None:
    assert "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith("error: "), said
    assert expected in last
