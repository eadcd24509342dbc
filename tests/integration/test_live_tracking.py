"""Trainings that MLflow shows while they run, at a real server: killed, cut off, refused, slow."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from aegan.config import ComputeConfig
from aegan.training import checkpoint, loop
from aegan.training.run_folder import RunFolder
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.cluster.worker import train_here
from pipelines.registry import sender, sync
from pipelines.registry.live_run import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    LiveRun,
    recorded_end,
    send_rest,
)
from pipelines.train import train
from tests.compose import free_port, wait_until
from tests.live_runs import GrowingRun, points_in, runs_in, tags_in
from tests.servers import SQLiteServer
from tests.tiny import PARAMS, tiny_config, tiny_shards

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault("live tracking"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.timeout(600),
]
COMPUTE = replace(params.load(ComputeConfig, PARAMS), live_tracking=True)
CONFIG = tiny_config(num_steps=12, checkpoint_interval_steps=3)
KILLS = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQLiteServer]:
    running = SQLiteServer(tmp_path_factory.mktemp("server"))
    yield running
    running.kill()


@pytest.fixture
def database(server: SQLiteServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's, which `MLFLOW_TRACKING_URI` names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    return server.folder / "mlflow.db"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def growing(tmp_path: Path) -> GrowingRun:
    return GrowingRun(tmp_path / "runs/aegan-0123456789ab")


def runs_of(database: Path, folder: RunFolder) -> list[tuple[str, str]]:
    """Id and status of the runs in MLflow that have the name of the run folder."""
    return [
        (run_id, status)
        for run_id, status in runs_in(database).items()
        if tags_in(database, run_id)["mlflow.runName"] == folder.path.name
    ]


def only_run(database: Path, folder: RunFolder) -> tuple[str, str]:
    """The one there is."""
    [found] = runs_of(database, folder)
    return found


def check_has_all(database: Path, run: GrowingRun, status: str) -> str:
    """One run, with every point once and this status; returns its id."""
    run_id, found = only_run(database, run.folder)
    assert found == status
    points = points_in(database, run_id)
    assert len(points) == len(set(points))
    assert set(points) == run.points()
    return run_id


def named(tmp_path: Path, name: str) -> GrowingRun:
    return GrowingRun(tmp_path / "runs" / name, name)


def test_a_run_is_opened_filled_and_ended_and_says_what_it_is_of(
    database: Path, tmp_path: Path
) -> None:
    run = named(tmp_path, "aegan-000000000001")
    live = LiveRun(run.folder, "live")
    live.send(RUNNING)
    check_has_all(database, run, "RUNNING")  # before the first step
    for _ in range(3):
        run.grow()
        live.send(RUNNING)
        run_id = check_has_all(database, run, "RUNNING")
    live.send(FINISHED)
    assert check_has_all(database, run, "FINISHED") == run_id
    tags = tags_in(database, run_id)
    assert tags["mlflow.source.git.commit"] == "f" * 40
    assert tags["mlflow.source.git.dirty"] == "true"
    assert tags["ray_job"] == "aegan-job"


@pytest.mark.parametrize(
    ("error", "status"), [(None, FINISHED), (UserError, FAILED), (KeyboardInterrupt, KILLED)]
)
def test_the_status_is_how_the_training_ended_and_a_resume_goes_on_in_the_same_run(
    database: Path, tmp_path: Path, error: type[BaseException] | None, status: str
) -> None:
    run = named(tmp_path, f"aegan-{status.lower()}")
    run.grow()
    try:
        with recorded_end(run.folder):
            if error:
                raise error
    except (UserError, KeyboardInterrupt):
        pass
    send_rest(run.folder, "live")
    run_id = check_has_all(database, run, status)
    run.folder.status.unlink()
    run.grow()
    resumed = LiveRun(run.folder, "live")
    resumed.send(RUNNING)
    assert check_has_all(database, run, "RUNNING") == run_id
    send_rest(run.folder, "live")  # of a driver that was killed: nothing says how it ended
    check_has_all(database, run, "KILLED")


def killed_at(request: int, after: bool, send: Callable[[], Any]) -> bool:
    """Do this in a process that is killed before or after its n-th request; whether it was."""
    child = os.fork()
    if child == 0:
        plain, asked = requests.Session.send, 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == request and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = plain(*arguments, **options)
            if asked == request:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        requests.Session.send = counted  # type: ignore[method-assign]
        try:
            send()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_wherever_a_sender_is_killed_the_next_one_doubles_and_loses_nothing(
    database: Path, tmp_path: Path, record_property: Any
) -> None:
    run, draw, kills = named(tmp_path, "aegan-000000000002"), random.Random(0), 0
    import mlflow  # noqa: F401 # once for all children

    def send() -> None:
        LiveRun(run.folder, "live").send(RUNNING)

    for request in [*range(1, 7), *(draw.randint(1, 3) for _ in range(KILLS))]:
        kills += killed_at(request, after=draw.random() < 0.7, send=send)
        run.grow()
    assert kills > KILLS
    send_rest(run.folder, "live")
    check_has_all(database, run, "KILLED")
    record_property("faults", kills)


def test_a_server_that_is_killed_and_comes_back_gets_the_rest_by_sync_and_nothing_twice(
    server: SQLiteServer, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    shutil.copy(PARAMS, tmp_path)
    run, late = named(tmp_path, "aegan-000000000003"), named(tmp_path, "aegan-000000000004")
    live = LiveRun(run.folder, "aegan")
    live.send(RUNNING)
    server.kill()
    for one in (run, late):
        one.grow()
        with pytest.raises(UserError, match="is MLFLOW_TRACKING_URI right"):
            LiveRun(one.folder, "aegan").send(RUNNING)
        with pytest.raises(UserError, match="is MLFLOW_TRACKING_URI right"):
            live.send(RUNNING)
        one.folder.status.write_text(FINISHED)
    server.start()
    for _ in range(2):
        sync.main([])
        for one in (run, late):
            check_has_all(database, one, "FINISHED")


# -- a whole training -----------------------------------------------------------------------------


def run_training(
    folder: Path, shards: Path, *, experiment: str, at: Callable[[int], None] = lambda step: None
) -> RunFolder:
    """What the command does, by a worker in this process; `at` is called before each step."""

    def run_workers(config: Any, *_: Any, **keywords: Any) -> dict[str, Any]:
        run_folder = keywords["folder"]
        steps = iter(range(1 + max(checkpoint.steps(run_folder.checkpoints), default=0), 1000))

        def at_step() -> bool:
            at(next(steps))
            return run_folder.stop.exists()

        return train_here(
            config,
            shards=keywords["shards"],
            run_folder=run_folder.path,
            device=torch.device("cpu"),
            should_stop=at_step,
        )

    return train(
        CONFIG,
        COMPUTE,
        shards=shards,
        runs=folder / "runs",
        experiment=experiment,
        run_workers=run_workers,
    )


@pytest.fixture(autouse=True)
def _ask_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STOP_INTERVAL_STEPS", 1)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> bytes:
    """The weights of a training that nobody looks at."""
    torch.set_num_threads(1)
    return weights(run_training(tmp_path_factory.mktemp("untracked"), shards, experiment=""))


def weights(folder: RunFolder) -> bytes:
    return (folder.checkpoint(12) / checkpoint.TENSORS).read_bytes()


def curve_of(database: Path, run_id: str) -> list[int]:
    name = "train/image_reconstruction"
    return sorted(step for key, _, step, _ in points_in(database, run_id) if key == name)


def is_shown(database: Path, folder: RunFolder, step: int) -> bool:
    """Whether the training is at work by MLflow's word, and its curve has come to this step."""
    runs = runs_of(database, folder)
    return [(curve_of(database, run_id)[-1:], status) for run_id, status in runs] == [
        ([step], "RUNNING")
    ]


def test_curves_appear_meanwhile_and_a_killed_driver_is_told_and_resumed_in_the_same_run(
    database: Path, shards: Path, tmp_path: Path, untracked: bytes
) -> None:
    seen = tmp_path / "seen"

    def until_shown(step: int) -> None:
        if step == 8:
            (run_folder,) = (tmp_path / "runs").iterdir()
            mine = RunFolder(run_folder)
            wait_until(lambda: is_shown(database, mine, 6), seconds=300, what="a curve")
            if not seen.exists():
                seen.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            run_training(tmp_path, shards, experiment="live", at=until_shown)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (path,) = (tmp_path / "runs").iterdir()
    folder = RunFolder(path)
    wait_until(lambda: only_run(database, folder)[1] == "KILLED", seconds=60, what="the status")
    before = only_run(database, folder)[0]
    assert run_training(tmp_path, shards, experiment="live", at=until_shown).path == folder.path
    assert only_run(database, folder) == (before, "FINISHED")
    steps = [int(row["step"]) for row in folder.rows()]
    assert curve_of(database, before) == steps
    assert weights(folder) == untracked


class Fault:
    """A server that answers each request as it is told, or not at all."""

    def __init__(self) -> None:
        self.says: int | None = 500  # None: it lets everybody wait
        self.heard = 0
        self.over = threading.Event()
        fault = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                fault.heard += 1
                if fault.says is None:
                    fault.over.wait(60)
                self.send_error(fault.says or 500)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    found = Fault()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{found.server.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield found
    found.over.set()
    found.server.shutdown()
    found.server.server_close()


def test_whatever_a_server_does_the_weights_are_the_same_and_the_log_has_one_line_more(
    fault: Fault,
    shards: Path,
    tmp_path: Path,
    untracked: bytes,
    capfd: pytest.CaptureFixture[str],
    record_property: Any,
) -> None:
    answers = {4: 500, 7: 401, 10: 403}  # after each checkpoint another one

    def meet(step: int) -> None:
        if step in answers:
            before, fault.says = fault.heard, answers[step]
            wait_until(lambda: fault.heard > before, seconds=300, what="a request")
        if step == 11:
            fault.says = None  # it lets the end wait

    folder = run_training(tmp_path, shards, experiment="live", at=meet)
    assert weights(folder) == untracked
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("MLflow at http://127.0.0.1")
    assert line.endswith("(training is not affected; `aegan sync` sends what is missing)")
    assert folder.status.read_text() == FINISHED
    record_property("faults", len(answers) + 1)


def test_a_server_that_hangs_or_is_not_there_delays_the_end_by_the_stated_seconds_at_most(
    fault: Fault,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = named(tmp_path, "aegan-000000000005")
    fault.says = None
    with sender.sending(run.folder, "live"):
        wait_until(lambda: fault.heard > 0, seconds=300, what="a request")
        before = time.monotonic()
    assert time.monotonic() - before <= sender.END_SECONDS + 1
    assert "`aegan sync` sends what is missing" in capfd.readouterr().err
    fault.over.set()
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return nobody.removeprefix("http://") in said

    with sender.sending(run.folder, "live"):
        wait_until(is_said, seconds=300, what="a line")
        before = time.monotonic()
    assert time.monotonic() - before <= sender.END_SECONDS + 1
