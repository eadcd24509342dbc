"""How a session of Ray begins and ends: addresses where no cluster is, Ctrl-C, a private folder."""

import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import psutil
import pytest
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.context import TrainContext

from pipelines.base.errors import UserError
from pipelines.cluster import ray_address, ray_private
from pipelines.cluster.session import PRIVATE_FOLDER, ray_session

SESSION = """
import sys
from pipelines.cluster.session import ray_session
print("begins", flush=True)
try:
    with ray_session():
        import ray
        print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
        sys.stdin.readline()
except KeyboardInterrupt:
    print("interrupted")
"""


# Before it: Ray's first process has no time at all, and this much at the second start.
SLOW = """
import logging, os
class Tried(logging.Handler):
    def emit(self, record):
        os.environ["RAY_gcs_server_port_wait_time_s"] = "{}"
logging.getLogger("pipelines.cluster.session").addHandler(Tried())
logging.getLogger("pipelines.cluster.session").addHandler(logging.StreamHandler())
os.environ["RAY_gcs_server_port_wait_time_s"] = "0"
"""


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """host:port of a server that does this with every connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    answer(kept[-1])
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed_port() -> Iterator[str]:
    """host:port that refuses connections, and that nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def http_server() -> Iterator[str]:
    """host:port of something like a dashboard."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refusal(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """The one line that a training at this address ends with, in seconds."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    before = time.monotonic()
    with pytest.raises(UserError) as error, ray_session():
        pass
    assert time.monotonic() - before < 30
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.fault("ray addresses")
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda connection: connection.close(), id="closes"),
        pytest.param(lambda connection: connection.sendall(b"SSH-2.0-x\r\n"), id="speaks first"),
    ],
)
def test_a_port_where_something_else_listens_is_named_with_the_right_form(monkeypatch, answer):
    with listening(answer) as address:
        said = refusal(monkeypatch, address)
    assert f"no Ray cluster answers at RAY_ADDRESS={address} (something else listens there)" in said
    assert "expected RAY_ADDRESS=host:6379 on a node of the cluster" in said
    assert "`RAY_ADDRESS=http://host:8265 make submit`" in said


@pytest.mark.fault("ray addresses")
@pytest.mark.timeout(60)
def test_the_dashboards_port_without_http_is_named_with_the_right_form(monkeypatch):
    with http_server() as address:
        said = refusal(monkeypatch, address)
    assert "(something else listens there): expected RAY_ADDRESS=host:6379" in said


@pytest.mark.fault("ray addresses")
@pytest.mark.timeout(60)
def test_a_port_that_never_answers_is_given_up_in_time(monkeypatch):
    assert ray_address.ANSWER_SECONDS + ray_address.NODE_SECONDS <= 30
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 1.0)
    with listening(lambda connection: None) as address:
        assert "(no answer in 1 s): expected" in refusal(monkeypatch, address)


def test_what_is_used_of_ray_beside_its_public_names_is_there():
    services = ray_private.services()
    for name in ("get_ray_address_from_environment", "get_node_to_connect_for_driver", "GcsClient"):
        assert callable(getattr(services, name))
    with closed_port() as address, pytest.raises(grpc.RpcError):
        ray_private.ask_gcs(address, timeout=1.0)
    with pytest.raises(RuntimeError, match="TrainContext has not been initialized"):
        ray_private.preemption()
    assert "preemption_context" in {field.name for field in fields(TrainContext)}
    whole, local = (
        {type(callback).__name__ for callback in trainer(print)._create_default_callbacks()}
        for trainer in (TorchTrainer, ray_private.local_trainer())
    )
    assert whole - local == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert local < whole


@pytest.mark.fault("ray addresses")
@pytest.mark.timeout(60)
def test_a_closed_port_is_one_line(monkeypatch):
    with closed_port() as address:
        assert "(Connection refused): expected RAY_ADDRESS=" in refusal(monkeypatch, address)


@pytest.mark.fault("ray addresses")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("address", ["10.0.0.1", "local", "host:port", ":6379", "a b:6379", "::1"])
def test_an_address_of_another_form_is_told_the_right_one(monkeypatch, address):
    assert f"RAY_ADDRESS is {address}: expected RAY_ADDRESS=host:6379" in refusal(
        monkeypatch, address
    )


@pytest.mark.fault("ray addresses")
@pytest.mark.timeout(60)
def test_auto_where_the_last_cluster_has_ended_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with closed_port() as address:
        (tmp_path / "ray/ray_current_cluster").write_text(f"{address}\n")
        # A Ray that runs here beside the tests comes first; this user cannot join that one either.
        assert "the cluster that RAY_ADDRESS=auto has found, " in refusal(monkeypatch, "auto")


@contextmanager
def session(tmpdir: str, begin: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process group that opens a session with a private Ray, as a terminal's command does."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", begin + SESSION],
        env={**environment, "TMPDIR": tmpdir, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def in_group(group: int) -> list[str]:
    """The living processes of a session, and what is in it."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def log_folders(pid: int) -> list[str]:
    """Those that Ray's processes were told; one that has just begun knows no arguments yet."""
    return [
        argument.removeprefix("--log_dir=").split("/r/")[0]
        for child in psutil.Process(pid).children()
        for argument in child.cmdline()
        if argument.startswith("--log_dir=")
    ]


@pytest.mark.fault("ray addresses")
@pytest.mark.integration
@pytest.mark.ray
@pytest.mark.parametrize("begun", ["gcs_server", "raylet"])
def test_ctrl_c_while_ray_starts_takes_effect_at_once_and_leaves_nothing(begun):
    with session("/tmp") as process:
        wait_until(lambda: begun in in_group(process.pid) and log_folders(process.pid))
        folders = log_folders(process.pid)
        before = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=30)
        assert time.monotonic() - before < 10
        assert said == "interrupted\n", errors
        wait_until(lambda: in_group(process.pid) == [])
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.fault("ray addresses")
@pytest.mark.integration
@pytest.mark.ray
@pytest.mark.parametrize("patience", ["0", "60"])
def test_a_private_ray_that_is_too_slow_is_started_once_more_then_given_up(patience):
    with session("/tmp", begin=SLOW.format(patience)) as process:
        said, errors = process.communicate("\n", timeout=120)
        assert "Ray did not start (Timed out" in errors
        gave_up = "UserError: Ray did not start on this machine, twice (Timed out" in errors
        assert (process.returncode == 0) == ("session_" in said) == (not gave_up), errors
        assert gave_up == (patience == "0")
        wait_until(lambda: in_group(process.pid) == [])


def test_a_private_ray_without_a_token_is_no_session():
    done = subprocess.run(
        [sys.executable, "-c", f"import ray\n{SESSION}"],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "imported before the session, so it would ask for no token" in done.stderr


@pytest.mark.fault("other users")
@pytest.mark.integration
@pytest.mark.ray
def test_nobody_else_may_look_into_the_folder_of_a_private_ray_also_with_a_long_tmpdir(tmp_path):
    long = tmp_path / ("long-" * 30)
    long.mkdir()
    with session(str(long)) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        place = Path(process.stdout.readline().strip())
        private = place.parent.parent
        assert private.name.startswith(PRIVATE_FOLDER)
        assert private.stat().st_mode & 0o777 == 0o700
        assert private.stat().st_uid == os.getuid()
        if os.getuid() == 0:
            assert as_another_user(f"ls {place}/logs") != 0
            assert as_another_user(f"cat {place}/sockets/raylet") != 0
            assert as_another_user("ls /tmp") == 0
        # Ctrl-C in a terminal reaches all of Ray's processes: they must leave that to the driver.
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        assert said == "interrupted\n", errors
    assert not private.exists()


def as_another_user(command: str) -> int:
    nobody = pwd.getpwnam("nobody")
    done = subprocess.run(
        ["sh", "-c", command],
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        check=False,
    )
    return done.returncode
