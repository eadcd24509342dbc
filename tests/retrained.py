"""A project whose `aegan retrain` is run day after day, and who is told of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from aegan.data import designed_faces
from tests.projects import make_project
from tests.tiny import SMALL

PARAMETERS: dict[str, dict[str, Any]] = {
    "data": {"source": "data/faces"},
    "preprocess": {"image_size": 16},
    "model": {"latent_dim": 8, "base_channels": 8},
    "training": SMALL | {"num_steps": 200, "batch_size": 16, "checkpoint_interval_steps": 50},
    "compute": {"num_workers": 1, "threads_per_worker": 1, "live_tracking": False},
    "evaluate": {"num_samples": 20},
    "interpolate": {"num_pairs": 2, "num_frames": 3},
    "retrain": {"min_new_images": 20},
}


class Project:
    """Its folder has a commit; `aegan` sees these variables and no others."""

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, Mapping[str, Any]],
        environment: Mapping[str, str],
        *,
        dvc: str = "",  # .dvc/config.local
    ) -> None:
        folder.mkdir()
        make_project(folder, parameters)
        (folder / ".dvc/config.local").write_text(dvc)
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder.parent),
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(folder.parent / "matplotlib"),
            "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc"),
            **environment,
        }
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "Start")

    def start(
        self, *arguments: str, output: int = subprocess.PIPE, folder: Path | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=folder or self.folder,
            env=self.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, expected: int = 0, folder: Path | None = None) -> str:
        process = self.start(*arguments, folder=folder)
        output, _ = process.communicate()
        assert process.returncode == expected, output
        return output

    def champion(self) -> str:
        rows = json.loads(self.run("history", "--json"))
        promoted = [row for row in rows if row["counts"] and row["kind"] != "refusal"]
        return promoted[-1]["to"] if promoted else ""

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=A", "-c", "user.email=a@localhost", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout


def faces(first: int, count: int) -> np.ndarray:
    """Designed faces of 16x16."""
    return designed_faces.generate(first, count, seed=0, image_size=16)[0]


@contextmanager
def webhook(port: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of one, and the messages that it has taken."""
    messages: list[dict[str, Any]] = []

    class Listening(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", port), Listening) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", messages
        server.shutdown()
