"""The train stage on a real Ray: killed, stopped and resumed like a user's would be."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from aegan.training import checkpoint
from aegan.training.run_folder import RunFolder, step_name
from tests.compose import wait_until
from tests.disks import small_disk
from tests.project import finish, make_project, run_folder, start, train_workers
from tests.tiny import tiny_shards

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(600)]
NUM_STEPS = 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def project(tmp_path, shards) -> Path:
    return make(tmp_path / "project", shards)


def make(folder: Path, shards: Path, **overrides: object) -> Path:
    return make_project(folder, shards, **({"training__num_steps": NUM_STEPS} | overrides))


def wait_for_step(project: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        logs = list(project.glob("runs/*/metrics.jsonl"))
        lines = logs[0].read_text().splitlines() if logs else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never reached")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return train_workers(psutil.Process(process.pid).children(recursive=True))


def left_behind(tree: list[psutil.Process], *, within_seconds: float) -> list[psutil.Process]:
    """Those processes that are still there after a while."""
    _, alive = psutil.wait_procs(tree, timeout=within_seconds)
    return [child for child in alive if child.is_running()]


def weights(project: Path) -> dict[str, torch.Tensor]:
    folder = run_folder(project) / "checkpoints"
    return checkpoint.load(folder / step_name(NUM_STEPS))[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards) -> Iterator[dict[str, torch.Tensor]]:
    project = make(tmp_path_factory.mktemp("undisturbed") / "project", shards)
    output = finish(start(project))
    assert "ray" not in output.lower(), output  # its chatter stays out of sight
    assert (project / "artifacts/train/model/ema.safetensors").exists()
    return weights(project)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_killed_worker_is_replaced_and_the_weights_end_the_same(project, undisturbed):
    process = start(project)
    for step in (60, 230):
        wait_for_step(project, step)
        workers = workers_of(process)
        assert workers
        for worker in workers:
            worker.kill()
    finish(process)
    assert_same(weights(project), undisturbed)


@pytest.mark.fault("killed processes")
def test_a_killed_driver_leaves_nothing_running_and_the_same_command_goes_on(project, undisturbed):
    process = start(project)
    wait_for_step(project, 120)
    tree = psutil.Process(process.pid).children(recursive=True)
    assert tree
    process.kill()
    process.communicate()
    assert left_behind(tree, within_seconds=90) == []  # two idle agents of Ray wait for a minute
    assert checkpoint.steps(run_folder(project) / "checkpoints")
    output = finish(start(project))
    assert "resuming at step" in output
    assert_same(weights(project), undisturbed)


def listening_addresses(process: subprocess.Popen[str]) -> set[str]:
    found = set()
    for child in [
        psutil.Process(process.pid),
        *psutil.Process(process.pid).children(recursive=True),
    ]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in child.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip)
    return found


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_a_checkpoint_and_leaves_nothing_running(
    project, undisturbed, interrupt
):
    process = start(project)
    wait_for_step(project, 60)
    listening = listening_addresses(process)
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    tree = psutil.Process(process.pid).children(recursive=True)
    if interrupt == signal.SIGINT:
        os.killpg(process.pid, interrupt)  # as a terminal does: to the whole group
    else:
        os.kill(process.pid, interrupt)  # as a scheduler does
    output = finish(process, expected=130)
    assert "Traceback" not in output
    assert left_behind(tree, within_seconds=30) == []
    stopped_at = checkpoint.steps(run_folder(project) / "checkpoints")[-1]
    assert 60 <= stopped_at < NUM_STEPS
    assert f"resuming at step {stopped_at}" in finish(start(project))
    assert_same(weights(project), undisturbed)


def test_a_second_training_of_the_same_run_is_refused_while_the_first_works(project):
    first = start(project)
    wait_for_step(project, 20)
    output = finish(start(project), expected=1)
    assert (
        f"error: another process of the stage train is at work in this folder: process {first.pid}"
        in output
    )
    os.kill(first.pid, signal.SIGTERM)
    finish(first, expected=130)


def set_num_steps(project: Path, before: int, after: int) -> None:
    parameters = project / "params.yaml"
    text, count = re.subn(rf"num_steps: {before}\b", f"num_steps: {after}", parameters.read_text())
    assert count == 1
    parameters.write_text(text)


def test_a_finished_run_is_not_run_again_but_a_longer_one_is_its_resume(project):
    set_num_steps(project, NUM_STEPS, 4)
    finish(start(project))
    (project / "artifacts/train/metrics.json").unlink()
    assert "is complete already" in finish(start(project))
    assert (project / "artifacts/train/metrics.json").exists()
    set_num_steps(project, 4, 8)
    assert "resuming at step 4" in finish(start(project))
    assert json.loads((project / "artifacts/train/metrics.json").read_text())["step"] == 8
    set_num_steps(project, 8, 6)
    assert "error: training.num_steps is 6, but " in finish(start(project), expected=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_without_a_retry_and_the_same_command_a_resume(
    tmp_path, shards, workers
):
    project = make(
        tmp_path / "project",
        shards,
        training__num_steps=8,
        training__checkpoint_interval_steps=2,
        compute__num_workers=workers,
    )
    disk = project / "runs"

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)

    with small_disk(disk, 400_000):
        process = start(project)
        wait_until(lambda: any(disk.glob("aegan-*")), seconds=60, what="the folder of the run")
        resize(2_000)  # a checkpoint or two; before the start it would have been refused
        output = finish(process, expected=1)
        assert re.search(r"^error: no space left for .*/runs/aegan-", output, re.MULTILINE), output
        assert "Traceback" not in output
        saved = checkpoint.steps(run_folder(project) / "checkpoints")
        assert saved
        resize(400_000)
        finish(start(project))
        assert checkpoint.steps(run_folder(project) / "checkpoints")[-1] == 8


def test_two_workers_end_with_the_weights_of_one(tmp_path, shards):
    found = {}
    for workers in (1, 2):
        project = make(
            tmp_path / str(workers), shards, training__num_steps=4, compute__num_workers=workers
        )
        finish(start(project))
        found[workers] = checkpoint.load(RunFolder(run_folder(project)).checkpoint(4))[0]
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[2][name], tensor, rtol=1e-3, atol=5e-5, msg=name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"compute__num_workers": 64}, r"compute.num_workers is 64, but there are \d+ CPUs"),
        ({"compute__device": "cuda"}, "compute.num_workers is 1, but there are 0 GPUs"),
        ({"training__batch_size": 64}, "batch_size is 64, but .* only 40 training images"),
        ({"training__checkpoints_kept": 0}, "checkpoints_kept is 0; it must be 1 or more"),
        ({"training__learning_rate": 1e12}, "diverged at step .*learning_rate"),
    ],
)
def test_what_a_user_can_cure_is_one_line(tmp_path, shards, override, message):
    if "compute__device" in override and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    output = finish(start(make(tmp_path / "project", shards, **override)), expected=1)
    assert re.search(f"^error: .*{message}", output, re.MULTILINE), output
    assert "Traceback" not in output
