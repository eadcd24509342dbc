"""`aegan doctor` without a cluster: each thing that a run needs is a line, with its cure."""

import json
import re
import shutil
from pathlib import Path

import boto3
import pytest

from pipelines.bucket import storage
from pipelines.cli import main as aegan
from pipelines.project import doctor
from tests.compose import free_port
from tests.s3 import s3_server
from tests.tiny import PARAMS

LOCK = PARAMS.with_name("requirements.lock")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's parameters on a machine without cluster, bucket and server."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(PARAMS, "params.yaml")
    shutil.copy(LOCK, "requirements.lock")
    return tmp_path


def change(file: str, pattern: str, value: str) -> None:
    text, count = re.subn(pattern, value, Path(file).read_text(), flags=re.MULTILINE)
    assert count == 1
    Path(file).write_text(text)


def examine(capsys: pytest.CaptureFixture[str], *, status: int) -> str:
    findings = doctor.main()
    said = capsys.readouterr().out
    assert any(finding.status == "fail" for finding in findings) == bool(status), said
    assert (re.search("^fail ", said, re.MULTILINE) is not None) == bool(status)
    return said


def line(said: str, subject: str) -> str:
    """The line about a thing, and its cure."""
    lines = said.splitlines()
    (number,) = [n for n, text in enumerate(lines) if text[6:].startswith(f"{subject}:")]
    cure = lines[number + 1] if lines[number + 1 : number + 2] else ""
    return lines[number] + (cure if cure.startswith("      ") else "")


def test_a_laptop_needs_no_cluster_no_bucket_and_no_server(project, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["aegan", "doctor", "--json"])
    with pytest.raises(SystemExit) as end:
        aegan()
    out, said = capsys.readouterr()
    assert end.value.code == 0, said
    assert {finding["subject"] for finding in json.loads(out)} > {"memory", "disk"}
    assert line(said, "Ray") == ("ok    Ray: RAY_ADDRESS is not set: a private Ray on this machine")
    assert line(said, "packages").startswith("ok    packages: torch 2.")
    for subject in (
        "params.yaml",
        "memory",
        "disk",
        "Ray's folder",
        "/dev/shm",
        "cores and GPUs",
        "GPUs",
    ):
        assert line(said, subject)
    assert not (project / "mlflow.db").exists()


@pytest.mark.fault("registry")
@pytest.mark.parametrize("alias", ["latest", "v3", "a b", ""])
def test_an_alias_that_the_registry_keeps_for_itself_is_named(project, capsys, alias):
    change("params.yaml", "^  alias: candidate", f"  alias: '{alias}'")
    assert f"register.alias is '{alias}'" in line(examine(capsys, status=1), "params.yaml")


def test_other_packages_than_the_locks_are_named_with_the_cure(project, capsys):
    change("requirements.lock", "^torch==.*$", "torch==9.9.9")
    said = line(examine(capsys, status=1), "packages")
    assert re.search(r"fail  packages: torch [\d.]+ \(locked: 9\.9\.9\) +make run", said)


@pytest.mark.fault("registry")
def test_a_registry_that_does_not_answer_is_named_with_the_cure(project, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    said = line(examine(capsys, status=1), "MLflow")
    assert "fail  MLflow: MLflow at http://127.0.0.1" in said


@pytest.mark.fault("ray addresses")
@pytest.mark.parametrize(
    ("scheme", "cure"),
    [("", "expected RAY_ADDRESS=host:6379"), ("http://", "cannot be reached: check RAY_ADDRESS")],
)
def test_an_address_where_no_cluster_is_is_named_with_the_cure(
    project, capsys, monkeypatch, scheme, cure
):
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{free_port()}")
    assert cure in line(examine(capsys, status=1), "Ray")


@pytest.mark.fault("bucket")
def test_rights_to_the_bucket_are_tried_and_nothing_is_left_there(project, capsys, monkeypatch):
    change("params.yaml", "^  storage: runs", "  storage: s3://doctors/prefix")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        storage._client.cache_clear()
        said = line(examine(capsys, status=1), "bucket, from here")
        assert "cannot be written (NoSuchBucket): check the bucket's name" in said
        client = boto3.client("s3", region_name="us-east-1", endpoint_url=address)
        client.create_bucket(Bucket="doctors")
        said = line(examine(capsys, status=0), "bucket, from here")
        assert "s3://doctors/prefix can be written, listed, read and deleted from" in said
        assert client.list_objects_v2(Bucket="doctors")["KeyCount"] == 0
    storage._client.cache_clear()
