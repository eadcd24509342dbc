"""The parts of a retraining that need no training: ledger, look, lease, messages, worktree."""

import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest
from dvc.config import Config

from aegan.config import DataConfig, RegisterConfig, RetrainConfig
from aegan.training.loop import COLLAPSED
from pipelines import retrain
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.bucket import storage
from pipelines.project import old_versions
from pipelines.registry import mlflow_store, reference
from pipelines.retraining import lease, messages, steps, workplace
from pipelines.retraining.ledger import Bucket, Entry, Folder, Ledger, Place, Step, new_entry
from pipelines.retraining.look import files_seen, look
from tests.compose import wait_until
from tests.disks import largest_file
from tests.s3 import s3_server
from tests.shards import write_shards

pytestmark = pytest.mark.integration
DATA = DataConfig(
    source="pictures", in_place=False, manifold_images=10, manifold_size=16, manifold_seed=0
)
FACTS = {"seen": "a", "source": "pictures", "settings": "b", "champion": ""}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def endpoint_without_conditions() -> Iterator[str]:
    with s3_server(conditional_writes=False) as address:
        yield address


@pytest.fixture(params=["conditional writes", "none"])
def any_bucket(bucket: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a server may ignore under which conditions something is to be written."""
    if request.param == "none":
        address = request.getfixturevalue("endpoint_without_conditions")
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        storage._client.cache_clear()
        storage.write_object(f"{bucket}/any", b"1")
        assert storage.replace_object(f"{bucket}/any", b"2", etag="another")
    return bucket


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    storage._client.cache_clear()
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}/project"


@pytest.fixture(params=["folder", "bucket"])
def place(request: Any, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Folder(tmp_path / "retraining")
    return Bucket(request.getfixturevalue("bucket"))


def test_what_is_saved_is_found_again_and_listed_by_age(place: Place) -> None:
    ledger = Ledger(place)
    assert ledger.entries() == []
    second, first = new_entry(**FACTS), new_entry(**{**FACTS, "seen": "c"})
    first.begun, second.begun = 1.0, 2.0
    second.steps["fetch"] = Step("input", begun=1.5, output="output", result={"files": 3})
    for entry in (second, first):
        ledger.save(entry)
    assert ledger.entries() == [first, second]
    assert ledger.find(second.id) == second
    assert ledger.find("0" * 12) is None


def test_the_same_facts_have_the_same_id_and_any_other_another() -> None:
    known = new_entry(**FACTS)
    assert new_entry(**FACTS).id == known.id
    others = {new_entry(**{**FACTS, key: "other"}).id for key in FACTS}
    assert len(others - {known.id}) == len(FACTS)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"id": "other"}'])
def test_a_damaged_entry_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    entry = new_entry(**FACTS)
    (tmp_path / f"{entry.id}.json").write_bytes(content)
    with pytest.raises(UserError, match=entry.id):
        Ledger(Folder(tmp_path)).find(entry.id)


def test_an_entry_of_another_retraining_is_refused(tmp_path: Path) -> None:
    entry = new_entry(**FACTS)
    Ledger(Folder(tmp_path)).save(entry)
    (tmp_path / f"{entry.id}.json").rename(tmp_path / f"{'0' * 12}.json")
    with pytest.raises(UserError, match="another retraining"):
        Ledger(Folder(tmp_path)).find("0" * 12)


def test_a_folder_looks_the_same_until_a_file_comes_goes_or_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures/of/cats"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"a")
    seen = [look(DATA)]
    assert look(DATA) == seen[0]
    for change in (
        lambda: (folder / "b.png").write_bytes(b"b"),
        lambda: (folder / "b.png").write_bytes(b"bb"),
        lambda: (folder / "b.png").rename(folder / "c.png"),
        lambda: (folder / "c.png").unlink(),
    ):
        change()
        seen.append(look(DATA))
    assert {source for source, _ in seen} == {"pictures"}
    assert len({state for _, state in seen}) == 4  # the last is the first again


def test_a_folder_with_links_in_a_circle_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"a")
    before = look(DATA)
    (tmp_path / "pictures/again").symlink_to(tmp_path / "pictures")
    assert look(DATA) == look(DATA) != before
    lines = list(files_seen(tmp_path / "pictures"))
    assert len(lines) == 2  # the picture, and the link that is not followed


def test_a_prefix_looks_the_same_until_an_object_changes(bucket: str) -> None:
    config = replace(DATA, source=bucket)
    storage.write_object(f"{bucket}/a.png", b"a")
    before = look(config)
    assert look(config) == before
    storage.write_object(f"{bucket}/a.png", b"A")
    assert look(config) != before


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """An HTTP server: its address, and what it answers and has heard."""
    state: dict[str, Any] = {"heard": [], "status": [200], "ETag": '"1"'}

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name in ("ETag", "Last-Modified"):
                if name in state:
                    self.send_header(name, state[name])
            self.send_header("Content-Length", "1000000")  # which nobody reads
            self.end_headers()

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            state["heard"].append((dict(self.headers), content))
            status = state["status"]
            self.send_response(status.pop(0) if len(status) > 1 else status[0])
            for name in ("Location", "Retry-After"):
                if name in state:
                    self.send_header(name, state[name])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answering) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", state
        running.shutdown()
        thread.join()


def test_an_address_looks_the_same_until_its_etag_or_time_changes(
    server: tuple[str, dict[str, Any]],
) -> None:
    address, state = server
    config = replace(DATA, source=f"{address}/set.zip")
    before = look(config)
    assert look(config) == before
    state["ETag"] = '"2"'
    assert look(config) != before
    del state["ETag"]
    assert look(config) != look(config)  # nobody knows: it is fetched


def test_a_message_is_signed_sent_again_and_kept_for_later(
    server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    address, state = server
    monkeypatch.setenv(messages.ADDRESS, f"{address}/hook?token=hidden")
    monkeypatch.setenv(messages.SECRET, "key")
    state["status"] = [503, 200]
    assert messages.send({"id": "1"})
    (headers, content), again = state["heard"]
    assert again[1] == content == b'{"id": "1"}'
    digest = hmac.new(b"key", content, hashlib.sha256).hexdigest()
    assert headers[messages.SIGNATURE] == f"sha256={digest}"
    state["status"] = [500]
    assert not messages.send({"id": "1"})
    assert "500" in caplog.text
    assert "hidden" not in caplog.text


def test_who_redirects_a_message_or_asks_for_patience_has_not_taken_it(
    server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    address, state = server
    monkeypatch.setenv(messages.ADDRESS, f"{address}/hook")
    state |= {"status": [302], "Location": f"{address}/elsewhere"}
    assert not messages.send({"id": "1"})
    assert "302" in caplog.text
    assert len(state["heard"]) == 1
    state |= {"status": [429], "Retry-After": "20"}
    start = time.monotonic()
    assert not messages.send({"id": "1"})
    assert time.monotonic() - start < 15


@pytest.mark.usefixtures("pictures")
def test_the_id_of_a_message_stays_when_it_is_sent_again_and_differs_for_another_end(
    server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, state = server
    monkeypatch.setenv(messages.ADDRESS, f"{address}/hook")
    end = {steps.OUTCOME: "refused", steps.REASONS: ["as it was found"]}
    monkeypatch.setitem(retrain.STEPS, "fetch", lambda retraining: dict(end))
    state["status"] = [500, 200]
    retrain.main(retrain.Options())  # of whose end nobody takes the message
    retrain.main(retrain.Options())  # which sends it again
    retrain.main(retrain.Options(force="fetch", reason="look again"))
    first, again, other = [json.loads(content) for _, content in state["heard"]]
    assert first == again
    assert other["id"] != first["id"]
    same = ("retraining", "outcome", "champion")
    assert [other[key] for key in same] == [first[key] for key in same]


def test_a_message_goes_nowhere_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert messages.send({"id": "1"})  # to nobody
    monkeypatch.setenv(messages.ADDRESS, "http://example.org/hook?token=hidden")
    with pytest.raises(UserError, match="no https") as error:
        messages.send({"id": "1"})
    assert "hidden" not in str(error.value)


def test_people_are_told_in_words_and_again_if_not_all_could_be(
    server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    address, state = server
    monkeypatch.delenv(messages.ADDRESS, raising=False)
    host = address.removeprefix("http://")
    monkeypatch.setenv(messages.PEOPLE, f"json://me:hidden@{host}/one json://{host}/two")
    message = {"retraining": "abc", "outcome": "refused", "reasons": ["a", "b"], "champion": "1"}
    state["status"] = [200, 200]
    messages.check()
    assert messages.send(message)
    said = [json.loads(content) for _, content in state["heard"]]
    assert [one["title"] for one in said] == ["Retraining abc: refused"] * 2
    assert [one["message"] for one in said] == ["a\nb\nThe champion is version 1."] * 2
    state["status"] = [200, 500]
    assert not messages.send(message)
    assert "told next time" in caplog.text
    monkeypatch.setenv(messages.PEOPLE, f"json://{host} carrier-pigeon://me:hidden@roof")
    with pytest.raises(UserError, match="address 2 of 2 is none that Apprise knows") as error:
        messages.check()
    assert "hidden" not in caplog.text + str(error.value)


def test_one_holds_the_lease_and_the_next_has_a_higher_number(
    any_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "one", tmp_path / "other"  # two machines: their file locks differ
    for folder in (first, second):
        folder.mkdir()
    monkeypatch.chdir(first)
    with lease.hold(Bucket(any_bucket), seconds=12.0) as held:
        monkeypatch.chdir(second)
        with (
            pytest.raises(lease.BusyError, match="at work"),
            lease.hold(Bucket(any_bucket), seconds=12.0),
        ):
            pass
        held.check()
    with lease.hold(Bucket(any_bucket), seconds=12.0) as held:
        held.check()
    assert json.loads(storage.read_object(f"{any_bucket}/lease"))["number"] == 2


def test_a_lease_is_put_off_while_its_holder_works(any_bucket: str, tmp_path: Path) -> None:
    with lease.hold(Bucket(any_bucket), seconds=1.0) as held:
        time.sleep(2.0)
        held.check()
        with pytest.raises(lease.BusyError), lease.hold(Bucket(any_bucket)):
            pass


def test_who_was_paused_past_its_end_is_told_and_does_not_take_it_back(
    any_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(lease._BucketLease, "_beat", lambda self: None)  # it is paused
    with lease.hold(Bucket(any_bucket), seconds=0.1) as paused:
        time.sleep(0.2)
        monkeypatch.chdir(tmp_path / "other")
        with lease.hold(Bucket(any_bucket), seconds=12.0) as held:
            with pytest.raises(lease.LostError, match="nothing was published"):
                paused.check()
            held.check()


def test_of_many_who_take_a_lease_at_once_one_has_it(any_bucket: str, tmp_path: Path) -> None:
    taken, refused = [], []
    barrier = threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        try:
            taken.append(lease._BucketLease(any_bucket, 12.0))
        except lease.BusyError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()


def test_two_on_one_machine_exclude_each_other_without_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with lease.hold(Folder(tmp_path)) as held:
        held.check()
        with pytest.raises(lease.BusyError), lease.hold(Folder(tmp_path)):
            pass


def test_a_full_disk_is_not_taken_for_another_retraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UserError, match="no space left") as error,
        largest_file(0),
        lease.hold(Folder(tmp_path)),
    ):
        pass
    assert not isinstance(error.value, lease.BusyError)


def test_runs_of_versions_that_go_leave_the_bucket_and_nothing_else_does(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(Path(__file__).parents[2] / "params.yaml", "params.yaml")
    params.change({"compute": {"storage": bucket}}, said_by="test")
    client = mlflow_store.open_store().MlflowClient()
    client.create_registered_model("aegan")
    objects = ["checkpoints/step-00000002/state.json", "run.json", "notes.txt"]
    for number in range(4):
        run = client.create_run("0").info
        client.log_text(run.run_id, "report", "report.txt")
        client.set_terminated(run.run_id)
        run_name = f"aegan-{number // 2}"  # one training, twice registered
        client.create_model_version(
            "aegan", run.artifact_uri, run.run_id, tags={"run_name": run_name}
        )
        for name in objects:
            storage.write_object(f"{bucket}/runs/{run_name}/{name}", b"{}")
    with lease.hold(Bucket(f"{bucket}/retraining")), pytest.raises(lease.BusyError):
        old_versions.clean(1, used=set(), remove=True)
    assert old_versions.clean(1, used={"aegan-0"}, remove=False) == set()  # still wanted here
    assert old_versions.clean(1, used=set(), remove=True) == {"aegan-0"}
    assert [found.version for found in client.search_model_versions("name = 'aegan'")] == [4]
    assert len(list(tmp_path.glob("mlruns/**/report.txt"))) == 1
    left = [url.partition("/runs/")[2] for url, _ in storage.list_objects(f"{bucket}/runs/")]
    assert left == ["aegan-0/notes.txt", *(f"aegan-1/{name}" for name in sorted(objects))]


def git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=os.environ | workplace.ROBOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with our parameters under git, and in it as the working folder."""
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    root = Path(__file__).parents[2]
    (folder / "params.yaml").write_text((root / "params.yaml").read_text())
    (folder / ".dvc/config").write_text("[core]\n    remote = far\n")
    (folder / ".gitignore").write_text("/retraining/\nconfig.local\n")
    git("init", "--quiet", "--initial-branch=main", folder=folder)
    git("add", "--all", folder=folder)
    git("commit", "--quiet", "--message=first", folder=folder)
    monkeypatch.chdir(folder)
    return folder


def test_what_is_not_committed_is_named(project: Path) -> None:
    assert workplace.last_commit() == git("rev-parse", "HEAD", folder=project)
    (project / "new.txt").write_text("git does not know it")
    (project / "params.yaml").write_text("changed")
    with pytest.raises(UserError, match=r"params\.yaml: changed and not committed"):
        workplace.last_commit()


def test_a_folder_without_git_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="git init"):
        workplace.last_commit()


def test_a_folder_of_another_users_is_told_why_git_refuses_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to test it
    cure = f"`git config --global --add safe.directory {project}`"
    with pytest.raises(UserError, match=rf"dubious ownership .*committed; .*{cure}") as error:
        workplace.last_commit()
    assert "git init" not in str(error.value)


def test_settings_of_dvc_that_cannot_be_read_are_one_line(project: Path) -> None:
    with (project / ".dvc/config").open("a") as file:
        file.write("[core]\n[core]\n")
    with pytest.raises(UserError, match=r"DVC's settings: .*\.dvc/config.*`dvc config --list`"):
        workplace.Workplace().has_remote()


def test_the_worktree_has_the_commit_and_the_users_folder_stays_as_it_is(project: Path) -> None:
    work = workplace.Workplace()
    before = (project / "params.yaml").read_text()
    work.prepare(workplace.last_commit(), {"training": {"start_from": "models:/aegan/3"}})
    assert params.read(work.folder / "params.yaml")["training"]["start_from"] == "models:/aegan/3"
    assert work.has_remote()
    (work.folder / "dvc.lock").write_text("locked")
    work.prepare(workplace.last_commit(), {})
    assert (work.folder / "params.yaml").read_text() == before
    assert (work.folder / "dvc.lock").read_text() == "locked"
    assert str(project / ".dvc/cache") in (work.folder / ".dvc/config.local").read_text()
    assert (project / "params.yaml").read_text() == before
    assert git("status", "--porcelain", folder=project) == ""
    assert git("rev-parse", "--abbrev-ref", "HEAD", folder=project) == "main"


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_project_that_was_copied_or_moved_works_in_a_worktree_of_its_own(
    project: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, lock = workplace.last_commit(), "locked"
    work = workplace.Workplace()
    work.prepare(commit, {})
    (work.folder / "dvc.lock").write_text(lock)
    mark = work.mark()  # files that git does not know
    other = project.with_name("other")
    shutil.copytree(project, other) if how == "copied" else project.rename(other)
    monkeypatch.chdir(other)
    elsewhere = workplace.Workplace()
    assert not elsewhere.holds(mark)  # it is fetched again, with what lies there
    elsewhere.prepare(commit, {"training": {"start_from": "models:/aegan/3"}}, anew=False)
    assert elsewhere.holds(mark)
    assert (elsewhere.folder / "dvc.lock").read_text() == lock
    assert git("status", "--porcelain", "params.yaml", folder=elsewhere.folder) == "M params.yaml"
    made = elsewhere.commit("0123", "retraining 0123")
    assert git("rev-parse", "retrain/0123", folder=other) == made
    assert made in git("worktree", "list", "--porcelain", folder=other)
    elsewhere.prepare(commit, {})
    assert git("rev-parse", "HEAD", folder=elsewhere.folder) == commit
    assert git("rev-parse", "--abbrev-ref", "HEAD", folder=other) == "main"
    assert not list(other.glob("retraining/work?*"))
    if how == "copied":
        monkeypatch.chdir(project)
        assert work.holds(mark)
        assert git("rev-parse", "HEAD", folder=work.folder) == commit
        assert git("tag", "--list", folder=project) == ""


def test_a_retraining_is_committed_once_on_a_branch_of_its_own(project: Path) -> None:
    work = workplace.Workplace()
    work.prepare(workplace.last_commit(), {"training": {"start_from": "models:/aegan/3"}})
    (work.folder / "dvc.lock").write_text("locked")
    commit = work.commit("0123", "retraining 0123")
    assert work.commit("0123", "retraining 0123") == commit
    assert git("rev-parse", "retrain/0123", folder=project) == commit
    assert git("cat-file", "-t", "retrained/0123", folder=project) == "tag"
    changed = git("show", "--name-only", "--format=", commit, folder=project).splitlines()
    assert changed == ["dvc.lock", "params.yaml"]
    assert git("log", "--oneline", "main", folder=project).count("\n") == 0
    work.prepare(workplace.last_commit(), {})  # done again, as somebody has told it to
    (work.folder / "dvc.lock").write_text("another")
    again = work.commit("0123", "retraining 0123")
    assert git("show", "retrained/0123^{commit}:dvc.lock", folder=project) == "another"
    assert git("rev-parse", "retrain/0123", folder=project) == again != commit


def test_paths_in_dvcs_settings_mean_the_same_in_the_worktree(project: Path) -> None:
    """Of the committed ones and the user's own, as DVC itself reads them."""
    (project / ".dvc/config").write_text(
        "[core]\n    remote = far\n    analytics = false\n"
        "['remote \"far\"']\n    url = ../../nas # in the cellar\n"
        '[\'remote "login"\']\n    url = ssh://host/path\n    keyfile = "../my key"\n'
        "['remote \"bucket\"']\n    url = s3://bucket/path\n"
        "    credentialpath = ~/secret\n    configpath = /etc/aws\n"
    )
    (project / ".dvc/config.local").write_text("[cache]\n    dir = ../../cache\n")
    git("commit", "--quiet", "--all", "--message=settings", folder=project)
    work = workplace.Workplace()
    work.prepare(workplace.last_commit(), {})
    seen = [Config(str(folder / ".dvc"), validate=False) for folder in (project, work.folder)]
    for section in ("remote", "cache"):
        assert seen[1][section] == seen[0][section]
    assert seen[1]["remote"]["far"]["url"] == str(project.parent / "nas")
    assert seen[1]["remote"]["login"]["keyfile"] == str(project / "my key")
    assert seen[1]["cache"]["dir"] == str(project.parent / "cache")


def test_cache_and_remote_of_dvcs_global_settings_are_those_of_the_worktree_too(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".dvc/config").write_text("")
    git("commit", "--quiet", "--all", "--message=no settings", folder=project)
    work = workplace.Workplace()
    outer = project.parent / "settings"
    outer.mkdir()
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(outer))
    assert not work.has_remote()
    (outer / "config").write_text(
        "[core]\n    remote = far\n['remote \"far\"']\n    url = nas\n"
        "[cache]\n    dir = shared cache\n"
    )
    work.prepare(workplace.last_commit(), {})
    seen = [Config(str(folder / ".dvc"), validate=False) for folder in (project, work.folder)]
    for section in ("remote", "cache"):
        assert seen[1][section] == seen[0][section]
    assert seen[1]["cache"]["dir"] == str(outer / "shared cache")
    assert work.has_remote()
    (project / ".dvc/config").write_text("[cache]\n    dir = own\n")  # goes before
    git("commit", "--quiet", "--all", "--message=own cache", folder=project)
    work.prepare(workplace.last_commit(), {})
    seen = [Config(str(folder / ".dvc"), validate=False) for folder in (project, work.folder)]
    assert seen[1]["cache"]["dir"] == seen[0]["cache"]["dir"] == str(project / ".dvc/own")
    (outer / "config").write_text("[core]\n[core]\n")
    with pytest.raises(UserError, match=r"DVC's global settings: .*`dvc config --global --list`"):
        work.has_remote()


def with_stage(project: Path, script: str) -> None:
    """A pipeline of one stage, which runs a script with what the tests run with."""
    stage = f"{sys.executable} stage.py"
    (project / "stage.py").write_text(script)
    (project / "dvc.yaml").write_text(json.dumps({"stages": {"train": {"cmd": stage}}}))
    git("add", "--all", folder=project)
    git("commit", "--quiet", "--message=stage", folder=project)


@pytest.fixture
def code_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that work in another folder find the packages."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))


# Its stage hears a Ctrl-C, as a training does, which then saves its checkpoint.
HEARS = (
    "import os, signal, sys, time\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "open('pid', 'w').write(str(os.getpid()))\n"
    "try:\n    time.sleep(600)\n"
    "except KeyboardInterrupt:\n    open('saved', 'w')\n    sys.exit(1)\n"
)


@pytest.mark.usefixtures("code_of_ours")
def test_when_the_budget_is_over_what_dvc_runs_is_told_to_end(project: Path) -> None:
    with_stage(project, HEARS)
    work = workplace.Workplace()
    work.prepare(workplace.last_commit(), {})
    with pytest.raises(workplace.BudgetError, match=r"retrain.max_hours is over: .* go on from"):
        work.dvc("repro", deadline=time.time())
    assert not any("dvc_command" in " ".join(c.cmdline()) for c in psutil.Process().children())


@pytest.mark.fault("retraining")
@pytest.mark.usefixtures("code_of_ours")
def test_after_kill_9_what_dvc_runs_is_told_to_end_and_does(project: Path) -> None:
    with_stage(project, HEARS)
    code = (
        "from pipelines.retraining import workplace\n"
        "work = workplace.Workplace()\n"
        "work.prepare(workplace.last_commit(), {})\n"
        "work.dvc('repro')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    work = project / "retraining/work"
    wait_until(lambda: (work / "pid").exists(), seconds=120, what="a stage")
    stage = psutil.Process(int((work / "pid").read_text()))
    dvc = stage.parent()
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([stage, *([dvc] if dvc else [])], timeout=60)[1] == []
    assert (work / "saved").exists()


def retraining_of(entry: Entry) -> steps.Retraining:
    """One of the project that is the working folder, at its last commit."""
    return steps.Retraining(
        entry=entry,
        commit=workplace.last_commit(),
        config=params.load(RetrainConfig),
        registry=params.load(RegisterConfig),
        work=workplace.Workplace(),
        lease=lease.Lease(),
        deadline=float("inf"),
    )


# Stages that count the files in the source, and write as many facts as the steps read.
COUNTS = (
    "import json, os, sys\n"
    "stage, raw, shards = sys.argv[1], 'artifacts/raw', 'artifacts/shards'\n"
    "out = raw if stage == 'download' else shards\n"
    "os.makedirs(out, exist_ok=True)\n"
    "files = (len(os.listdir('../../pictures')) if stage == 'download'\n"
    "    else json.load(open(f'{raw}/manifest.json'))['files'])\n"
    "facts = dict(files=files, source_sha256='', bytes=0, dataset_sha256=f'{files} images')\n"
    "json.dump(facts, open(f'{out}/manifest.json', 'w'))\n"
)


@pytest.fixture
def pictures(project: Path, code_of_ours: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a project whose images are only counted; nothing of it is committed."""
    run = f"{sys.executable} stage.py"
    raw, shards = "artifacts/raw", "artifacts/shards"
    stages = {
        "download": {"cmd": f"{run} download", "outs": [raw]},
        "preprocess": {"cmd": f"{run} preprocess", "deps": [raw], "outs": [shards]},
    }
    params.change({"data": {"source": "pictures"}}, said_by="test")
    (project / "stage.py").write_text(COUNTS)
    (project / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    with (project / ".gitignore").open("a") as file:
        file.write("/pictures/\n/artifacts/\n")
    git("add", "--all", folder=project)
    git("commit", "--quiet", "--message=stages", folder=project)
    (project / "pictures").mkdir()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for number in range(3):
        (project / f"pictures/{number}").touch()
    return project / "pictures"


def test_what_was_fetched_is_what_is_checked_also_where_git_has_an_older_lock(
    project: Path, pictures: Path
) -> None:
    first = retraining_of(new_entry(**FACTS))
    assert steps.fetch(first)["files"] == 3
    assert steps.check_images(first)["dataset_sha256"] == "3 images"
    shutil.copy(first.work.folder / "dvc.lock", project)
    git("add", "--force", "dvc.lock", folder=project)
    git("commit", "--quiet", "--message=lock", folder=project)
    (pictures / "3").touch()
    second = retraining_of(new_entry(**{**FACTS, "seen": "more"}))
    assert steps.fetch(second)["files"] == 4
    (pictures / "4").touch()  # too late; and DVC, which knows one run of the stage or another
    shutil.rmtree(project / ".dvc/cache/runs")  # with the same input, has to run it if it doubts
    (project / "README").touch()
    git("add", "README", folder=project)
    git("commit", "--quiet", "--message=more", folder=project)
    resumed = replace(second, commit=workplace.last_commit())  # with the same stages
    assert steps.check_images(resumed)["dataset_sha256"] == "4 images"
    assert (resumed.work.folder / "README").exists()
    assert git("rev-parse", "HEAD", folder=resumed.work.folder) == resumed.commit
    resumed.prepare(anew=True)
    assert (resumed.work.folder / "dvc.lock").read_text() == (project / "dvc.lock").read_text()


@pytest.mark.slow
def test_a_new_clone_fetches_the_reference_by_itself_or_says_why_it_cannot(
    project: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = project.parent / "remote"
    settings = f"[core]\n    remote = far\n['remote \"far\"']\n    url = {remote}\n"
    (project / ".dvc/config").write_text(settings)
    (project / ".dvc/.gitignore").write_text("/cache\n/tmp\n")
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    shards = write_shards(project / "artifacts/shards", {"test": images})
    frozen = reference.cut(shards, reason="the first one")
    git("add", "--all", folder=project)
    git("commit", "--quiet", "--message=reference", folder=project)
    clone = project.with_name("clone")
    git("clone", "--quiet", str(project), str(clone), folder=project)
    shutil.copytree(pictures, clone / "pictures")
    monkeypatch.chdir(clone)
    cure = (
        r"^reference\.dvc names .* not here \(dvc pull failed: .*`.venv/bin/dvc push reference.dvc`"
    )
    with pytest.raises(UserError, match=cure):
        steps.fetch(retraining_of(new_entry(**FACTS)))
    subprocess.run([sys.executable, "-m", "dvc", "push", "--quiet"], cwd=project, check=True)
    assert steps.fetch(retraining_of(new_entry(**FACTS)))["files"] == 3
    assert reference.current_or_first(shards).sha256 == frozen.sha256
    keep_out = params.read(clone / "retraining/work/params.yaml")["preprocess"]["keep_out"]
    assert keep_out == f"reference/{frozen.sha256}.parquet"
    assert git("status", "--porcelain", "--untracked-files=no", folder=clone) == ""


def retrain_until(step: str, **options: Any) -> Entry:
    """What the ledger says after that step of `aegan retrain`, which has not ended then."""
    facts, code = retrain.main(retrain.Options(until=step, **options))
    assert (facts["outcome"], code) == ("", 0)
    entry = Ledger(Folder(Path("retraining"))).find(facts["id"])
    assert entry
    return entry


def ended(entry: Entry, step: str, outcome: str) -> Entry:
    """Save it as one that has ended at a step, whose reasons everybody was told."""
    kept = list(steps.STEPS)[: list(steps.STEPS).index(step) + 1]
    entry.steps = {name: entry.steps[name] for name in kept}
    entry.steps[step].result = {steps.OUTCOME: outcome, steps.REASONS: ["as it was found"]}
    entry.outcome, entry.reasons, entry.told = outcome, ["as it was found"], True
    Ledger(Folder(Path("retraining"))).save(entry)
    return entry


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_who_accepts_a_drift_takes_back_the_question_alone_and_hears_of_the_end() -> None:
    asking = ended(retrain_until("decide"), "decide", "asks")
    accepted = retrain_until("decide", accept_drift=asking.id, reason="the new camera")
    assert (accepted.accepted, accepted.reasons, accepted.told) == ("the new camera", [], False)
    for step in ("fetch", "check"):
        assert accepted.steps[step] == asking.steps[step]
    assert accepted.steps["decide"].result == {"start": ""}


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_a_step_that_a_retraining_has_not_come_to_cannot_be_forced() -> None:
    before = ended(retrain_until("check"), "check", "nothing new")
    for step in ("decide", "train", "publish", "gate"):
        expected = rf"--force {step}: .* ended at the step check .*`--force check`"
        with pytest.raises(UserError, match=expected):
            retrain.main(retrain.Options(force=step, reason="why not"))
    assert Ledger(Folder(Path("retraining"))).entries() == [before]


@pytest.mark.slow
def test_a_retraining_goes_on_with_what_it_has_fetched_itself_and_nothing_else(
    project: Path, pictures: Path
) -> None:
    raw = project / "retraining/work/artifacts/raw/manifest.json"
    first = retrain_until("fetch")
    (pictures / "3").touch()
    assert retrain_until("fetch").id != first.id
    (pictures / "3").unlink()
    again = retrain_until("fetch")  # in a worktree that another has fetched into
    assert again.id == first.id
    assert again.steps["fetch"].begun > first.steps["fetch"].begun
    assert json.loads(raw.read_text())["files"] == 3
    assert retrain_until("fetch").steps == again.steps
    shutil.rmtree(project / "retraining/work")  # on another machine: its ledger is shared
    elsewhere = retrain_until("fetch")
    assert elsewhere.steps["fetch"].begun > again.steps["fetch"].begun
    assert json.loads(raw.read_text())["files"] == 3


def test_a_fetch_of_an_earlier_version_left_no_mark_and_lies_where_there_is_a_worktree(
    project: Path,
) -> None:
    work = workplace.Workplace()
    assert not work.holds(None)
    work.prepare(workplace.last_commit(), {})
    assert work.holds(None)
    assert not work.holds("another")
    mark = work.mark()
    work.prepare(workplace.last_commit(), {})
    assert work.holds(mark)


@pytest.mark.usefixtures("project")
def test_a_worktree_that_is_gone_is_named() -> None:
    with pytest.raises(UserError, match=r"retraining/work not found"):
        workplace.Workplace().commit("0123", "retraining 0123")


@pytest.mark.usefixtures("code_of_ours")
def test_a_training_that_collapsed_is_refused_with_its_reason(project: Path) -> None:
    with_stage(project, f"raise SystemExit('error: {COLLAPSED}: all samples are alike')")
    entry = new_entry(**FACTS)
    entry.steps["decide"] = Step("", 0.0, "whole", result={"start": "models:/aegan/3"})
    retraining = retraining_of(entry)
    result = steps.train(retraining)
    assert result["outcome"] == "refused"
    assert result["reasons"] == [f"dvc repro failed: {COLLAPSED}: all samples are alike"]
    training = params.read(retraining.work.folder / "params.yaml")["training"]
    assert (training["stop_on_collapse"], training["start_from"]) == (True, "models:/aegan/3")
    with_stage(project, "raise SystemExit('error: the disk is full')")
    with pytest.raises(UserError, match="the disk is full"):
        steps.train(replace(retraining, commit=workplace.last_commit()))
