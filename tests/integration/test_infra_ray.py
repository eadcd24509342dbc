"""The Ray nodes of infra/compose.yaml, and the gauges that a worker exports there."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from tests.compose import INFRA, SERVICES, command_of, environment_of, free_port, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(280)]
ROOT = INFRA.parent
TOKEN = secrets.token_hex(32)
REPORT = {
    "step": 300.0,
    "images_per_second": 512.5,
    "image_reconstruction": 0.25,
    "validation_frechet_distance": 0.125,
}
WORKER = f"""
import sys, ray
from pipelines.cluster.prometheus import export

@ray.remote(num_cpus=1)
class Worker:
    def report(self):
        export({REPORT}, run="aegan-0123")

ray.init(log_to_driver=False)
worker = Worker.remote()
ray.get(worker.report.remote())
print("reported", flush=True)
sys.stdin.read()
"""


@dataclass
class Cluster:
    """Addresses on 127.0.0.1 of a head and one worker node."""

    gcs: int
    dashboard: int
    health: tuple[int, int]
    metrics: tuple[int, int]
    environment: dict[str, str]


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd="/")
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One head and one worker, started by the commands that their containers run."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets want a short path
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
        **environment_of(
            "ray-head",
            dict.fromkeys(("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "MLFLOW_PASSWORD"), "-")
            | {"RAY_TOKEN": TOKEN},
        ),
    }
    ports = [free_port() for _ in range(7)]
    gcs, dashboard, client, health1, health2, metrics1, metrics2 = ports
    head = command_of(
        "ray-head",
        {"6379": str(gcs), "0.0.0.0": "127.0.0.1", "export-port=8080": f"export-port={metrics1}"},
    )
    head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    worker = command_of(
        "ray-worker",
        {"ray-head:6379": f"127.0.0.1:{gcs}", "export-port=8080": f"export-port={metrics2}"},
    )
    worker += ["--num-cpus=1"]
    common = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    head += [*common, f"--dashboard-agent-listen-port={health1}", f"--temp-dir={folder}"]
    worker += [*common, f"--dashboard-agent-listen-port={health2}"]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(running(head, environment))
        wait_until(lambda: healthy(health1), seconds=60, what="the head answers")
        stack.enter_context(running(worker, environment))
        wait_until(lambda: healthy(health2), seconds=60, what="the worker answers")
        yield Cluster(gcs, dashboard, (health1, health2), (metrics1, metrics2), environment)


def healthy(port: int) -> bool:
    """What the containers' health check asks, without a token."""
    (address,) = {SERVICES[name]["healthcheck"]["test"][-1] for name in ("ray-head", "ray-worker")}
    return requests.get(address.replace("52365", str(port)), timeout=10).status_code == 200


def exported(port: int) -> dict[str, float]:
    """Name and labels that matter of every sample, and its value."""
    samples = {}
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)", text, re.MULTILINE):
        own = dict(re.findall(r'(run|term|score)="([^"]*)"', labels))
        samples[" ".join([name, *own.values()])] = float(value)
    return samples


def dashboard_metrics() -> set[str]:
    """Names of all metrics that the Grafana dashboard asks for."""
    text = (INFRA / "monitoring/grafana/aegan.json").read_text()
    asked = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    return set(re.findall(r"ray_\w+", " ".join(asked)))


def test_without_the_token_no_job_comes_in(cluster):
    address = f"http://127.0.0.1:{cluster.dashboard}/api/jobs/"
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    wrong = {"Authorization": f"Bearer {TOKEN[::-1]}"}
    assert requests.get(address, timeout=30).status_code == 401
    assert requests.get(address, headers=wrong, timeout=30).status_code == 403
    assert requests.get(address, headers=bearer, timeout=30).status_code == 200


def test_a_report_is_seen_on_the_node_of_its_worker_and_in_the_dashboard(cluster):
    driver = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.gcs}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "reported\n"
        port, samples = cluster.metrics[1], {}
        expected = {"ray_aegan_loss aegan-0123 image_reconstruction", "ray_node_mem_total"}

        def all_seen() -> bool:
            samples.update(exported(port))  # Ray forgets a report's values soon after a scrape
            return expected <= samples.keys()

        wait_until(all_seen, seconds=60, what="the gauges are exported")
    finally:
        driver.communicate()
    ours = {name: value for name, value in samples.items() if "aegan" in name}
    assert ours == {
        "ray_aegan_step aegan-0123": 300.0,
        "ray_aegan_images_per_second aegan-0123": 512.5,
        "ray_aegan_loss aegan-0123 image_reconstruction": 0.25,
        "ray_aegan_validation aegan-0123 frechet_distance": 0.125,
    }
    asked = dashboard_metrics()
    assert {name for name in asked if "aegan" in name} == {name.split()[0] for name in ours}
    of_the_node = {name for name in asked if "aegan" not in name}
    of_a_gpu = {name for name in of_the_node if "gpu" in name or "gram" in name}
    assert of_the_node - of_a_gpu <= {name.split()[0] for name in samples}
    assert {name.removeprefix("ray_") for name in of_a_gpu} <= METRICS_GAUGES.keys()
