"""What a RayJob runs, run in what the image has, with a bucket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from ruamel.yaml import YAML

from pipelines.base import params
from tests.s3 import s3_server
from tests.test_pipeline import SMALL_PARAMETERS, STAGES, stages_run

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """Address of an empty bucket on a server of this test."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        boto3.client("s3").create_bucket(Bucket="results")
        yield "s3://results/dvc"


def run_job(image: Path, bucket: str) -> str:
    """What a RayJob prints, run as in a container that has nothing but the image."""
    environment = {
        **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(image.parent / "home"),
        "PYTHONPATH": str(image),
        "OMP_NUM_THREADS": "1",
        "DVC_SITE_CACHE_DIR": str(image / ".dvc/tmp"),
        "DVC_REMOTE_URL": bucket,
    }
    rayjob = YAML(typ="safe").load((ROOT / "infra/kubernetes/job/rayjob.yaml").read_text())
    command = rayjob["spec"]["entrypoint"].split()
    done = subprocess.run(
        command, cwd="/", env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_leaves_its_results_in_the_bucket_and_a_second_one_takes_them(image, bucket):
    overlay = image.parent / "small.yaml"
    with overlay.open("w") as file:
        YAML().dump(SMALL_PARAMETERS, file)
    params.apply_overlay(overlay, image / "params.yaml")
    no_scm = [sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"]
    subprocess.run(no_scm, cwd=image, check=True)  # as the Dockerfile does
    second = image.parent / "second"
    subprocess.run(["cp", "-r", image, second], check=True)

    assert stages_run(run_job(image, bucket)) == STAGES
    # A version in the registry at run time is no file that could be fetched (`cache: false`).
    assert stages_run(run_job(second, bucket)) == ["register"]
    report = (image / "report/index.html").read_bytes()
    assert (second / "report/index.html").read_bytes() == report
