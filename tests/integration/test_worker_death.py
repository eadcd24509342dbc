"""A training whose worker dies for good ends with one line in our words, on a real Ray."""

import re
import time

import psutil
import pytest

from tests.project import finish, make_project, start, train_workers
from tests.tiny import tiny_shards

pytestmark = [pytest.mark.integration, pytest.mark.ray]
CURES = ("training.batch_size", "compute.micro_batch_size", "training.reader: streamed")


def make(tmp_path):
    shards = tiny_shards(tmp_path / "shards")
    return make_project(
        tmp_path / "project", shards, training__num_steps=100_000, compute__max_failures=0
    )


def check_last_line(output: str, seen: str, reason: str) -> None:
    last = output.strip().splitlines()[-1]
    assert re.match(rf"error: training failed \({seen}\): {re.escape(reason)}", last), output
    assert all(cure in last for cure in CURES)
    assert "Traceback" not in output
    assert "Object store memory usage" not in output


@pytest.mark.fault("killed processes")
def test_a_worker_that_rays_memory_monitor_ends_is_one_line_with_what_to_lower(tmp_path):
    # The monitor takes the machine for full from the start, so the first process of the training is
    # ended as soon as it is there.
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    output = finish(start(make(tmp_path), **limits), expected=1)
    check_last_line(output, "no step was logged", "the machine ran out of memory (")


def test_a_worker_that_is_killed_for_good_is_one_line_with_what_to_lower(tmp_path):
    project = make(tmp_path)
    process = start(project)
    deadline = time.monotonic() + 120
    # One that has not begun is started anew.
    while not any(log.stat().st_size for log in project.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (worker,) = train_workers(psutil.Process(process.pid).children(recursive=True))
    worker.kill()
    output = finish(process, expected=1)
    check_last_line(output, r"last seen at step \d+", "a worker's process was killed from outside")
