"""A Ray cluster of several nodes on the loopback interface, with token authentication."""

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RAY = Path(sys.executable).parent / "ray"
SECONDS_TO_START = 60.0


class Node:
    """One node: `ray start --block` and all that it starts."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.process = subprocess.Popen(
            [
                str(RAY),
                "start",
                "--block",
                "--node-ip-address=127.0.0.1",
                "--object-store-memory=80000000",
                "--disable-usage-stats",
                "--dashboard-agent-listen-port=0",  # nodes of one machine must not collide
                "--min-worker-port=0",
                "--max-worker-port=0",
                *arguments,
            ],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while "Ray runtime started" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        try:
            tree = psutil.Process(self.process.pid)
            return [tree, *tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def lose(self) -> None:
        """What a power cut does."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class RayCluster:
    """A head without CPUs, and nodes with one CPU each."""

    def __init__(self, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts sockets below it
        (self.folder / "disk").mkdir()
        self.token = secrets.token_hex(32)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.environment = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        self._environment = {
            **{name: os.environ[name] for name in os.environ if not name.startswith("RAY_")},
            **self.environment,
            "PYTHONPATH": "",  # nodes know nothing of our code
            "TMPDIR": str(self.folder / "disk"),
            "RAY_TMPDIR": str(self.folder),
            **environment,
        }
        del self._environment["RAY_ADDRESS"]
        port = self.address.split(":")[1]
        self.head = Node(
            ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
             f"--temp-dir={self.folder}"],
            self._environment,
            self.folder / "head.log",
        )  # fmt: skip
        self.nodes: list[Node] = []
        self._numbers = itertools.count()

    def add_node(self) -> Node:
        log = self.folder / f"node-{next(self._numbers)}.log"
        node = Node([f"--address={self.address}", "--num-cpus=1"], self._environment, log)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        tree = [process for node in (*self.nodes, self.head) for process in node.processes()]
        for process in tree:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        for node in (*self.nodes, self.head):
            node.process.wait()
        psutil.wait_procs(tree, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[RayCluster]:
    """A cluster of two nodes that may use the tests' bucket; it ends with the block."""
    cluster = RayCluster(
        AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", OMP_NUM_THREADS="1"
    )
    try:
        for _ in range(2):
            cluster.add_node()
        yield cluster
    finally:
        cluster.close()
