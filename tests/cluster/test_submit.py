"""`aegan submit` against a running Ray cluster with token authentication, and a bucket."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psutil
import pytest
import requests
from ruamel.yaml import YAML

from pipelines.base import params
from tests.compose import free_port
from tests.pictures import blocks, write_folder
from tests.s3 import s3_server
from tests.tiny import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TOKEN = "token-of-the-test-cluster"
SECRET = "secret-of-the-test-bucket"
MY_SECRET = "secret-of-this-user-alone"
COPIED = [".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"]
COPIED += ["requirements.lock"]
SMALL_PARAMETERS = {
    "data": {"manifold_images": 200, "manifold_size": 16},
    "preprocess": {"image_size": 16},
    "model": {"latent_dim": 4, "base_channels": 4},
    "training": SMALL | {"num_steps": 4},
    "compute": {"num_workers": 1, "threads_per_worker": 1, "storage": "s3://bucket/project"},
    "evaluate": {"num_samples": 20},
    "interpolate": {"num_pairs": 2, "num_frames": 3},
}


def storage_client(environment: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A bare environment with a bucket, for the cluster and its users; the home folder is empty."""
    with s3_server() as address:
        home = tmp_path_factory.mktemp("home")
        settings = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(tmp_path_factory.mktemp("matplotlib")),
            "DVC_SITE_CACHE_DIR": str(tmp_path_factory.mktemp("dvc")),
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        storage_client(settings).create_bucket(Bucket="bucket")
        yield settings
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of someone who may use a running cluster."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # socket paths are short
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={free_port()}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"),
            *(f"--ray-client-server-port={free_port()}", f"--object-store-memory={150 * 2**20}"),
        ]
        output = Path(folder) / "start.txt"
        with output.open("w") as file:
            head = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=file)
        try:
            wait_for_port(port, head, output)
            yield {**environment, "RAY_ADDRESS": address, "RAY_FOLDER": folder}
        finally:
            tree = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
            head.terminate()
            _, alive = psutil.wait_procs(tree, timeout=5)
            for process in alive:
                process.kill()


def wait_for_port(port: int, head: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, output.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(output.read_text())


def make_project(folder: Path, environment: dict[str, str], **sections: dict[str, object]) -> Path:
    """A repository with the project's own files and small parameters."""
    for name in ("aegan", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for file in COPIED:
        shutil.copy(ROOT / file, folder / file)
    with (folder.parent / "small.yaml").open("w") as overlay:
        YAML().dump(SMALL_PARAMETERS | sections, overlay)
    params.apply_overlay(folder.parent / "small.yaml", folder / "params.yaml")
    author = ["-c", "user.name=A Tester", "-c", "user.email=tester@localhost"]
    commit = [*author, "commit", "--quiet", "--message", "Start"]
    for command in (["init", "--quiet"], ["add", "."], commit):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return folder


def start(project: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.submit", *options],
        cwd=project,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def submit(project: Path, environment: dict[str, str], *options: str, expected: int = 0) -> str:
    process = start(project, environment, *options)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == expected, output
    return output


class Proxy:
    """A network between a user and the cluster whose connections can be cut."""

    def __init__(self, address: str) -> None:
        self._target = urlsplit(address)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._target.hostname, self._target.port))
                self._connections += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        self._end(source, sink)

    def _end(self, *connections: socket.socket) -> None:
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._end(*self._connections)
        self._connections.clear()

    def close(self) -> None:
        self._end(self._listener)
        self._listener.close()
        self.cut()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a client has written up to the line with this text."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if text in line:
            return output
    raise AssertionError(output)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def job_of(output: str) -> str:
    """The submission id that a client names first."""
    found = re.search(r"aegan-[0-9a-f]{12}(-\d+)?", output)
    assert found, output
    return found[0]


def jobs(cluster: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the cluster says of the jobs that were submitted to it."""
    header = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.get(f"{cluster['RAY_ADDRESS']}/api/jobs/", headers=header, timeout=30)
    return {job["submission_id"]: job for job in answer.json()}


def git_commit(project: Path, environment: dict[str, str]) -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        command, cwd=project, env=environment, text=True, capture_output=True, check=True
    ).stdout.strip()


def dvc(project: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(
        command, cwd=project, env=environment, text=True, capture_output=True, check=True
    ).stdout


@dataclass
class Finished:
    """A job that one client submitted and another one followed to its end."""

    project: Path
    job: str
    output: str  # of the second client
    result: dict[str, Any]


@pytest.fixture(scope="module")
def finished(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    project = make_project(tmp_path_factory.mktemp("finished") / "project", cluster)
    first = start(project, cluster)
    job = job_of(read_until(first, "Running stage 'download'"))
    first.kill()
    first.communicate()

    proxy = Proxy(cluster["RAY_ADDRESS"])
    second = start(project, {**cluster, "RAY_ADDRESS": proxy.address})
    output = read_until(second, "Running stage 'preprocess'")
    proxy.cut()
    rest, _ = second.communicate(timeout=400)
    proxy.close()
    output += rest
    assert second.returncode == 0, output
    content = storage_client(cluster).get_object(Bucket="bucket", Key=f"project/jobs/{job}.json")
    return Finished(project, job, output, json.loads(content["Body"].read()))


def test_a_second_client_follows_the_job_of_a_killed_one_from_its_first_line(finished, cluster):
    assert f"job {finished.job} is there already: following it" in finished.output
    assert "Running entrypoint for job" in finished.output
    assert list(jobs(cluster)) == [finished.job]


def test_a_broken_connection_is_made_again_and_no_line_is_missing_or_shown_twice(finished):
    stages = re.findall(r"^Running stage '(\w+)'", finished.output, re.MULTILINE)
    *others, last = stages
    assert others == ["download", "preprocess", "train", "evaluate", "interpolate", "explore"]
    assert last == "report"


def test_lock_outputs_and_metrics_are_those_of_the_job(finished, cluster):
    project = finished.project
    assert (project / "dvc.lock").read_text() == finished.result["dvc_lock"]
    shown = json.loads(dvc(project, cluster, "metrics", "show", "--json"))[""]["data"]
    assert {file: metrics["data"] for file, metrics in shown.items()} == finished.result["metrics"]
    assert "artifacts/evaluate/summary.json" in shown
    assert (project / "artifacts/train/model/ema.safetensors").exists()
    assert "</html>" in (project / "report/index.html").read_text()
    # Without an MLflow server on the cluster, registering is left to this machine.
    assert list(json.loads(dvc(project, cluster, "status", "--json"))) == ["register"]


def test_the_job_trained_on_the_cluster_with_the_code_that_was_shipped(finished, cluster):
    assert jobs(cluster)[finished.job]["driver_info"]  # a stage has connected to the cluster's Ray
    run = json.loads((finished.project / "artifacts/train/run.json").read_text())
    assert run["params"]["compute"]["storage"] == "s3://bucket/project"
    assert run["git_commit"] == git_commit(finished.project, cluster)


def test_what_has_succeeded_is_only_fetched_again_also_without_the_cluster(finished, cluster):
    shutil.rmtree(finished.project / "artifacts")
    output = submit(finished.project, {**cluster, "RAY_ADDRESS": "http://127.0.0.1:9"})
    assert f"job {finished.job} has succeeded already" in output
    assert (finished.project / "artifacts/train/model/ema.safetensors").exists()


def test_another_clone_with_the_same_files_gets_the_same_results(finished, cluster, tmp_path):
    clone = make_project(tmp_path / "project", cluster)
    output = submit(clone, {**cluster, "RAY_ADDRESS": "http://127.0.0.1:9"})
    assert f"job {finished.job} has succeeded already" in output
    assert (clone / "dvc.lock").read_text() == finished.result["dvc_lock"]
    figures = "artifacts/evaluate/metrics.json"
    assert (clone / figures).read_text() == (finished.project / figures).read_text()


def test_a_failing_job_ends_with_1_and_its_reason_and_the_next_is_a_new_attempt(cluster, tmp_path):
    project = make_project(tmp_path / "project", cluster, data={"source": "/no/such/folder"})
    output = submit(project, cluster, expected=1)
    job = job_of(output)
    failed = f"error: job {job} has failed: dvc repro failed: data.source /no/such/folder not found"
    assert last_line(output).startswith(failed)

    mine = {**cluster, "MY_SETTING": "a value", "AWS_SECRET_ACCESS_KEY": MY_SECRET}
    refused = submit(project, mine, "--pass-env", "AWS_SECRET_ACCESS_KEY", expected=1)
    assert refused.startswith("error: --pass-env AWS_SECRET_ACCESS_KEY: it holds a secret")
    output = submit(project, mine, "--pass-env", "MY_SETTING", expected=1)
    assert f"job {job} has failed: starting attempt 2" in output
    assert f"error: job {job}-2 has failed: dvc repro failed" in output
    passed = {name: info["runtime_env"]["env_vars"] for name, info in jobs(cluster).items()}
    assert "MY_SETTING" not in passed[job]
    assert passed[f"{job}-2"]["MY_SETTING"] == "a value"
    for secret in (MY_SECRET, SECRET, TOKEN):
        assert secret not in output
        assert secret not in json.dumps(jobs(cluster))


def test_no_secret_stands_in_arguments_or_logs_on_the_clusters_machine(finished, cluster):
    secrets = [text.encode() for text in (SECRET, TOKEN)]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert not any(s in " ".join(process.cmdline()).encode() for s in secrets), process
    logs = [file for file in Path(cluster["RAY_FOLDER"]).rglob("*") if file.is_file()]
    assert any(file.name.startswith("raylet") for file in logs)
    assert [file for file in logs if any(s in file.read_bytes() for s in secrets)] == []


def doctor(project: Path, environment: dict[str, str], *, expected: int) -> str:
    command = [sys.executable, "-m", "pipelines.cli", "doctor"]
    done = subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def test_the_doctor_looks_at_the_cluster_and_at_the_bucket_from_its_nodes(finished, cluster):
    said = doctor(finished.project, cluster, expected=0)
    for found in (
        r"^ok    bucket, from here: s3://bucket/project can be written, listed, read and deleted",
        r"^ok    Ray: http://127\.0\.0\.1:\d+ answers and takes this token$",
        r"^ok    Ray: joined; 1 nodes$",
        r"^(ok|warn)  +cores and GPUs: [\d.]+ of 2 CPUs free, 0 of 0 GPUs free; wanted: 1 CPUs$",
        r"^ok    node [\d.]+, packages: torch",
        r"^ok    node [\d.]+, bucket: s3://bucket/project can be written",
    ):
        assert re.search(found, said, re.MULTILINE), said


def test_the_doctor_names_a_wrong_token(finished, cluster):
    said = doctor(finished.project, {**cluster, "RAY_AUTH_TOKEN": "wrong"}, expected=1)
    assert "does not accept this token: check RAY_AUTH_TOKEN" in said


def test_a_cluster_with_other_packages_than_the_locks_is_one_clear_error(cluster, tmp_path):
    project = make_project(tmp_path / "project", cluster)
    lock = project / "requirements.lock"
    lock.write_text(re.sub(r"^torch==.*$", "torch==9.9.9", lock.read_text(), flags=re.MULTILINE))
    output = submit(project, cluster, expected=1)
    assert re.search(r"error: job .* has failed: .* torch \S+ \(locked: 9.9.9\)", last_line(output))
    assert "Running stage" not in output


@dataclass
class Detached:
    """A long job on data of this machine, whose client was ended by Ctrl-C."""

    project: Path
    job: str
    output: str  # until the training started
    farewell: str
    status: str


@pytest.fixture(scope="module")
def detached(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Detached:
    folder = tmp_path_factory.mktemp("detached")
    pictures = write_folder(folder / "pictures", blocks(60))
    sections = {
        "data": {"source": str(pictures)},
        "training": SMALL | {"num_steps": 100_000},
        "preprocess": {"image_size": 16, "near_duplicate_distance": 0.0},
    }
    project = make_project(folder / "project", cluster, **sections)
    dvc(project, cluster, "repro", "preprocess")
    shutil.rmtree(pictures)  # the cluster has no such folder
    client = start(project, cluster)
    output = read_until(client, "starting run")
    job = job_of(output)
    client.send_signal(signal.SIGINT)
    farewell, _ = client.communicate(timeout=180)
    assert client.returncode == 130, farewell
    return Detached(project, job, output, farewell, jobs(cluster)[job]["status"])


def test_data_of_this_machine_go_along_with_the_job(detached):
    assert re.findall(r"Running stage '(\w+)'", detached.output) == ["train"]


def test_ctrl_c_leaves_the_job_running_and_stop_ends_it(detached, cluster):
    assert f"detached: job {detached.job} goes on" in detached.farewell
    assert f"aegan submit --stop --job {detached.job}" in detached.farewell
    assert detached.status == "RUNNING"

    assert f"job {detached.job} has ended" in submit(detached.project, cluster, "--stop")
    assert jobs(cluster)[detached.job]["status"] == "STOPPED"
    refused = submit(detached.project, cluster, "--stop", expected=1)
    assert refused == f"error: job {detached.job} does not run: it has stopped\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "does not accept this token: check RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "disabled"}, "requires a token: set RAY_AUTH_MODE=token and"),
        ({"RAY_ADDRESS": "http://127.0.0.1:9"}, "cannot be reached: check RAY_ADDRESS"),
        ({"RAY_ADDRESS": ""}, "RAY_ADDRESS is '': expected the address"),
        ({"RAY_ADDRESS": "AWS_ENDPOINT_URL"}, "does not accept jobs; is it a Ray dashboard?"),
    ],
)
def test_a_wrong_token_or_address_is_one_clear_line(cluster, tmp_path, change, message):
    project = make_project(tmp_path / "project", cluster, data={"manifold_seed": 1})
    change = {name: cluster.get(value, value) for name, value in change.items()}
    output = submit(project, {**cluster, **change}, expected=1)
    assert output.count("\n") == 1, output
    assert output.startswith("error: ")
    assert message in output
