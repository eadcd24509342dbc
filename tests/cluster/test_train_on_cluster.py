"""The train stage on a Ray cluster of several nodes with its run in a bucket."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import psutil
import pytest
import torch

from aegan.training import checkpoint
from aegan.training.run_folder import step_name
from tests.cluster.nodes import RayCluster, two_nodes
from tests.project import finish, make_project, run_folder, start, train_workers

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
NUM_STEPS = 300
TRAINING = {
    "training__num_steps": NUM_STEPS,
    "training__log_interval_steps": 10,
    "training__checkpoint_interval_steps": 20,
    "training__sample_interval_steps": 100,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture
def make(cluster, shards, bucket, tmp_path) -> Callable[..., Path]:
    """A project whose training runs on the cluster, with its run in the test's bucket."""

    def make(name: str, **overrides: object) -> Path:
        compute = {"compute__num_workers": 2, "compute__storage": f"{bucket}/prefix"}
        return make_project(tmp_path / name, shards, **(TRAINING | compute | overrides))

    return make


@pytest.fixture
def drive(cluster) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the train stage as a driver on the cluster; none outlives the test."""
    drivers = []

    def drive(project: Path, **environment: str) -> subprocess.Popen[str]:
        drivers.append(start(project, **(cluster.environment | environment)))
        return drivers[-1]

    yield drive
    for driver in drivers:
        with driver:
            driver.kill()


@pytest.fixture(scope="module")
def undisturbed(cluster, shards, s3, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights after a run of two workers on two nodes in which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=s3,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket="undisturbed")
    project = make_project(
        folder / "project",
        shards,
        **TRAINING,
        compute__num_workers=2,
        compute__storage="s3://undisturbed",
    )
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    output = finish(start(project, **cluster.environment, **credentials, AWS_ENDPOINT_URL=s3))
    assert "uploading 3 shards" in output
    assert (project / "artifacts/train/model/ema.safetensors").exists()
    rows = [json.loads(line) for line in (run_folder(project) / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(10, NUM_STEPS + 1, 10))
    return weights(project)


def weights(project: Path) -> dict[str, torch.Tensor]:
    folder = run_folder(project) / "checkpoints"
    return checkpoint.load(folder / step_name(NUM_STEPS))[0]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture
def wait_for_checkpoint(s3, bucket) -> Callable[[int], int]:
    """Wait until the bucket has a whole checkpoint of a step or a later one; returns which."""
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3)

    def wait(step: int) -> int:
        deadline = time.monotonic() + 480
        while time.monotonic() < deadline:
            found = client.list_objects_v2(Bucket=bucket.removeprefix("s3://")).get("Contents", [])
            names = [re.search(r"step-(\d+)/state.json$", item["Key"]) for item in found]
            steps = [int(name[1]) for name in names if name]
            if max(steps, default=-1) >= step:
                return max(steps)
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint of step {step} or later")

    return wait


def workers_on(cluster: RayCluster) -> list[psutil.Process]:
    return train_workers([process for node in cluster.nodes for process in node.processes()])


def test_a_run_that_loses_worker_node_driver_and_bucket_ends_with_the_same_weights(
    cluster, make, drive, proxy, wait_for_checkpoint, undisturbed
):
    project = make("disturbed")
    driver = drive(project)
    step = wait_for_checkpoint(20)
    workers = workers_on(cluster)
    assert len(workers) == 2
    workers[0].kill()
    step = wait_for_checkpoint(step + 40)
    cluster.nodes.pop(0).lose()
    cluster.add_node()
    step = wait_for_checkpoint(step + 40)
    workers_on(cluster)[0].terminate()  # asked to stop: saves, and the run goes on
    step = wait_for_checkpoint(step + 21)
    assert step < NUM_STEPS
    driver.kill()
    driver = drive(project)
    step = wait_for_checkpoint(step + 21)
    proxy.during(30.0, 503)
    output = finish(driver)
    assert re.search(r"resuming at step \d+", output)
    assert proxy.refused > 0
    assert step < NUM_STEPS
    assert_same(weights(project), undisturbed)


def test_a_run_that_loses_a_node_for_good_goes_on_with_the_others(
    cluster, make, drive, wait_for_checkpoint, undisturbed
):
    project = make("elastic", compute__min_workers=1)
    driver = drive(project, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="15")  # a minute otherwise
    wait_for_checkpoint(20)
    assert len(workers_on(cluster)) == 2
    cluster.nodes.pop(0).lose()
    try:
        output = finish(driver)
    finally:
        cluster.add_node()
    found = weights(project)
    distance = max(float((found[name] - undisturbed[name]).abs().max()) for name in found)
    print(f"largest difference of a weight to two workers all the way: {distance:.3g}")
    assert f"trained {NUM_STEPS} steps" in output
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_a_bucket_without_permission_is_one_line_before_anything_starts(make, drive, proxy):
    proxy.fault = lambda method, path: 403 if method == "PUT" else None
    project = make("forbidden")
    output = finish(drive(project), expected=1)
    message = r"error: s3://.* cannot be written \(AccessDenied\): check the credentials"
    assert re.search(f"^{message}", output, re.MULTILINE), output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RAY_AUTH_TOKEN": "f" * 64},
            "error: RAY_ADDRESS=.* refused this token: RAY_AUTH_MODE and RAY_AUTH_TOKEN must be",
        ),
        (
            {"RAY_ADDRESS": "127.0.0.1:9"},
            "error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9",
        ),
        ({"RAY_ADDRESS": "ray://127.0.0.1:9"}, "error: RAY_ADDRESS is ray://.*make submit"),
    ],
    ids=["wrong token", "unreachable", "from outside"],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(make, drive, environment, message):
    process = drive(make("outside"), **environment)
    output = finish(process, expected=1)
    assert re.search(f"^{message}", output, re.MULTILINE), output
    assert "Traceback" not in output
