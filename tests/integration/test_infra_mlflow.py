"""The MLflow server of infra/compose.yaml with a real PostgreSQL and a bucket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import boto3
import psutil
import pytest
import requests

from tests import servers
from tests.compose import INFRA, command_of, environment_of, free_port, wait_until
from tests.s3 import s3_server

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(280),
    servers.needs_postgres,
]
SECRETS = {
    "POSTGRES_PASSWORD": "of-postgres",
    "MLFLOW_PASSWORD": "of-the-administrator",
    "MLFLOW_SECRET_KEY": "of-flask",
    "S3_ACCESS_KEY_ID": "test",
    "S3_SECRET_ACCESS_KEY": "test",
}
ADMINISTRATOR = ("admin", SECRETS["MLFLOW_PASSWORD"])


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """Port of a new PostgreSQL with the user and database of the compose file."""
    with servers.postgres(SECRETS["POSTGRES_PASSWORD"]) as database:
        yield database.port


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an S3 server with the bucket of the compose file."""
    with s3_server() as address:
        s3_client(address).create_bucket(Bucket="aegan")
        yield address


def s3_client(address: str):
    return boto3.client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@pytest.fixture(scope="module")
def server(postgres, bucket, tmp_path_factory) -> Iterator[str]:
    """Address of the server, started by the command that its container runs."""
    port = free_port()
    environment = environment_of("mlflow", SECRETS) | {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres),
        "AWS_ENDPOINT_URL": bucket,
        "MLFLOW_AUTH_CONFIG_PATH": str(INFRA / "mlflow_auth.ini"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path_factory.mktemp("home")),
    }
    command = command_of("mlflow", {"0.0.0.0": "127.0.0.1", "=5000": f"={port}"})
    command = [word.replace("127.0.0.1:5000", f"127.0.0.1:{port}") for word in command]
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack, (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        stack.callback(end, process)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(
                lambda: requests.get(f"{address}/health", timeout=10).status_code == 200,
                seconds=120,
                what="MLflow answers what its health check asks",
            )
        except AssertionError as error:
            raise AssertionError((folder / "log").read_text()[-4000:]) from error
        yield address


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    process.terminate()
    _, alive = psutil.wait_procs(family[:-1], timeout=30)
    for child in alive:
        child.kill()
    process.wait(30)


def search(server: str, **options) -> int:
    address = f"{server}/api/2.0/mlflow/experiments/search"
    return requests.post(address, json={"max_results": 1}, timeout=60, **options).status_code


def test_only_who_knows_the_password_comes_in(server):
    assert search(server) == 401
    assert search(server, auth=("admin", "password1234")) == 401
    assert search(server, auth=ADMINISTRATOR) == 200


def test_only_the_named_hosts_are_served(server):
    assert search(server, auth=ADMINISTRATOR, headers={"Host": "mlflow:5000"}) == 200
    assert search(server, auth=ADMINISTRATOR, headers={"Host": "evil.example.com"}) == 403


def test_files_of_a_run_go_through_the_server_into_the_bucket(server, bucket, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMINISTRATOR[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMINISTRATOR[1])
    client = mlflow.MlflowClient(tracking_uri=server)
    run = client.create_run(client.create_experiment("with a bucket"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.log_text(run.info.run_id, "a report", "report.txt")
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    stored = s3_client(bucket).list_objects_v2(Bucket="aegan")["Contents"]
    (key,) = (item["Key"] for item in stored)
    assert key.startswith("mlflow/")
    assert key.endswith("/report.txt")
