"""DVC's locks, which name a process by its number, after that process has died."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.project import dvc_locks

ROOT = Path(__file__).parents[2]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STARTED = 100.0  # seconds that a process of a test is made to look older than it is


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of ours with one stage."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    folder = tmp_path / "project"
    (folder / ".dvc/tmp/exps").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / "params.yaml").symlink_to(ROOT / "params.yaml")
    (folder / "dvc.yaml").write_text(
        json.dumps({"stages": {"make": {"cmd": "sleep ${seconds}; echo 1 > out", "outs": ["out"]}},
                    "vars": [{"seconds": 0}]})
    )  # fmt: skip
    return folder


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    processes = []

    def run(*command: str, **options: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
        processes.append(process)
        return process

    yield run
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lock(project: Path, pid: int, command: str = "/old/.venv/bin/dvc repro") -> Path:
    """DVC's lock as a process leaves it that writes `out`, in the way of every other one."""
    file = project / ".dvc/tmp/rwlock"
    entry = {"pid": pid, "cmd": command}
    file.write_text(
        json.dumps({"write": {str(project / "out"): entry}, "read": {str(project / "in"): [entry]}})
    )
    return file


def repro(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.project.dvc_command", "repro"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.mark.fault("killed processes")
def test_after_a_restart_another_program_has_the_number_of_a_killed_dvc_and_runs_go_on(
    project, start
):
    file = lock(project, start(*SLEEP).pid)
    before = time.time() - STARTED
    os.utime(file, (before, before))  # the program began after DVC had written it
    done = repro(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: released locks of a DVC that was killed" in done.stderr
    assert (project / "out").exists()


@pytest.mark.fault("killed processes")
@pytest.mark.parametrize("holder", ["another program", "this process", "a zombie", "nobody"])
def test_a_lock_that_its_process_cannot_hold_any_more_is_released(project, start, holder):
    process = start("sleep", "0" if holder == "a zombie" else "60")
    if holder == "a zombie":
        time.sleep(0.3)  # ended, and not asked for
    if holder == "nobody":
        process.kill()
        process.wait()
    file = lock(project, os.getpid() if holder == "this process" else process.pid)
    dvc_locks.release_stale(project)
    assert json.loads(file.read_text()) == {"write": {}, "read": {}}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("content", ["", '{"write": {"/a": {"pid', "[]", '{"write": {"/a": 7}}'])
def test_a_lock_file_that_was_cut_off_in_the_middle_of_writing_does_not_stop_dvc(project, content):
    file = project / ".dvc/tmp/exps/rwlock"
    file.write_text(content)
    dvc_locks.release_stale(project)
    assert not file.exists()


def test_the_lock_of_a_dvc_that_is_at_work_without_our_guard_stays(project, start):
    """`python -m dvc` takes no lock of ours."""
    (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text().replace(": 0}", ": 60}"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start(sys.executable, "-m", "dvc", "repro", cwd=project, **quiet)
    file = project / ".dvc/tmp/rwlock"
    give_up = time.monotonic() + 30
    while not file.exists() or not all(kind in file.read_text() for kind in ("write", "read")):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    held = file.read_text()
    done = repro(project)
    assert done.returncode != 0
    assert "is busy, it is being blocked by" in done.stderr
    assert file.read_text() == held
