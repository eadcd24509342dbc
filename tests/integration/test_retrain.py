"""Days of a project that is retrained by itself: real trainings, a real registry, real git."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import numpy as np
import pytest

from aegan.data import designed_faces
from pipelines.retraining.steps import STEPS
from tests import killed_retraining
from tests.compose import wait_until
from tests.killed_retraining import Moment
from tests.pictures import write_folder
from tests.projects import make_project
from tests.tiny import SMALL

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
PARAMETERS = {
    "data": {"source": "data/faces"},
    "preprocess": {"image_size": 16},
    "model": {"latent_dim": 8, "base_channels": 8},
    "training": SMALL | {"num_steps": 200, "batch_size": 16, "checkpoint_interval_steps": 50},
    "compute": {"num_workers": 1, "threads_per_worker": 1, "live_tracking": False},
    "evaluate": {"num_samples": 20},
    "interpolate": {"num_pairs": 2, "num_frames": 3},
    "retrain": {"min_new_images": 20},
}
TRAININGS = 200, 400  # images of the first day, and of the second one


class Project:
    """A project whose `aegan retrain` is run day after day."""

    def __init__(self, folder: Path, webhook: str) -> None:
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder.parent),
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(folder.parent / "matplotlib"),
            "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc"),
            "AEGAN_WEBHOOK": webhook,
            "AEGAN_WEBHOOK_SECRET": "key",
        }

    def start(self, *arguments: str, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, expected: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate()
        assert process.returncode == expected, output
        return output

    def add(self, name: str, images: np.ndarray) -> None:
        faces = self.folder / "data/faces"
        write_folder(faces / name, images)

    def champion(self) -> str:
        rows = json.loads(self.run("history", "--json"))
        promoted = [row for row in rows if row["counts"] and row["kind"] != "refusal"]
        return promoted[-1]["to"] if promoted else ""

    def ids(self) -> set[str]:
        return {path.stem for path in (self.folder / "retraining").glob("*.json")}

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
    return designed_faces.generate(first, count, seed=0, image_size=16)[0]


@pytest.fixture(scope="module")
def heard() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook: its address, and the messages it has taken."""
    messages: list[dict[str, Any]] = []

    class Listening(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Listening) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", messages
        server.shutdown()


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, heard: tuple[str, list[dict[str, Any]]]
) -> Project:
    """After its first day, on which a training was killed and the command run again."""
    folder = tmp_path_factory.mktemp("retraining") / "project"
    folder.mkdir()
    make_project(folder, PARAMETERS)
    made = Project(folder, heard[0])
    made.git("init", "--quiet")
    made.git("add", ".")
    made.git("commit", "--quiet", "--message", "Start")
    made.add("first", faces(0, TRAININGS[0]))
    killed = made.start("retrain", output=subprocess.DEVNULL)
    runs = folder / "retraining/work/runs"
    wait_until(lambda: any(runs.glob("*/checkpoints/*")), seconds=300, what="a checkpoint")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    _wait_for_end_of_training(made)
    output = made.run("retrain")
    assert "promoted" in output
    assert "Running stage 'download'" not in output  # the first steps were whole
    assert re.search(r"resuming at step \d+ of run|run \S+ is complete already", output), output
    return made


def _wait_for_end_of_training(project: Project) -> None:
    """What a killed command had started ends by itself, or is told to: its lock says when."""
    lock = project.folder / "retraining/work/artifacts/.locks/pipeline"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        held = subprocess.run(["flock", "--nonblock", str(lock), "true"], check=False).returncode
        if held == 0:
            return
        time.sleep(0.5)


def test_the_first_model_becomes_champion_by_floors_and_is_published(
    project: Project, heard: tuple[str, list[dict[str, Any]]]
) -> None:
    assert project.champion() == "1"
    [name] = project.ids()
    assert project.git("tag", "--list").split() == [f"retrained/{name}"]
    assert "dvc.lock" in project.git("show", "--name-only", "--format=", f"retrain/{name}")
    assert [(message["outcome"], message["champion"]) for message in heard[1]] == [
        ("promoted", "1")
    ]


def test_the_page_shows_what_the_version_draws_and_how_it_ended(project: Project) -> None:
    page = (project.folder / "retraining/index.html").read_text()
    assert "Samples and reconstructions of version 1" in page
    assert "only absolute floors were held" in page
    assert "http://" not in page  # one file, without network


def test_nothing_new_is_nothing_done(project: Project) -> None:
    before = project.ids()
    facts = json.loads(project.run("retrain", "--json").splitlines()[-1])
    assert (facts["nothing_new"], facts["outcome"], facts["champion"]) == (True, "promoted", "1")
    assert {facts["id"]} == before
    assert "nothing new" in project.run("retrain", "--dry-run")
    assert project.ids() == before
    assert project.champion() == "1"


def test_the_users_own_folder_is_never_touched(project: Project) -> None:
    status = project.git("status", "--porcelain").splitlines()
    assert status == ["?? reference.dvc"]  # which the user may commit
    assert not (project.folder / "artifacts/train").exists()


def test_a_change_that_is_not_committed_is_named(project: Project) -> None:
    file = project.folder / "params.yaml"
    before = file.read_text()
    file.write_text(before.replace("num_steps: 200", "num_steps: 300"))
    assert "params.yaml: changed and not committed" in project.run("retrain", expected=1)
    file.write_text(before)


def test_images_of_another_kind_are_asked_about_and_taken_when_somebody_says_why(
    project: Project,
) -> None:
    before = project.champion()
    project.add("negative", 255 - faces(1000, 100))
    assert "of another kind" in project.run("retrain", expected=3)
    assert project.champion() == before
    [asking] = {name for name in project.ids() if _entry(project, name)["outcome"] == "asks"}
    assert (project.folder / f"retraining/{asking}-odd.png").exists()
    project.run("retrain", expected=3)  # it still asks
    assert "--reason" in project.run("retrain", "--accept-drift", asking, expected=1)
    output = project.run(
        "retrain", "--accept-drift", asking, "--reason", "negatives", "--until", "decide"
    )
    assert "ends after the step decide" in output
    entry = _entry(project, asking)
    assert (entry["accepted"], entry["steps"]["decide"]["result"]) == ("negatives", {"start": ""})
    for file in (project.folder / "data/faces/negative").iterdir():
        file.unlink()


def test_a_source_that_lost_most_of_its_images_is_refused(project: Project) -> None:
    before = project.champion()
    kept = project.folder / "data/kept"
    (project.folder / "data/faces").rename(kept)
    project.add("few", faces(5000, 100))
    assert "not there any more" in project.run("retrain", expected=3)
    assert project.champion() == before
    for file in (project.folder / "data/faces/few").iterdir():
        file.unlink()
    (project.folder / "data/faces/few").rmdir()
    (project.folder / "data/faces").rmdir()
    kept.rename(project.folder / "data/faces")


@pytest.mark.fault("retraining")
def test_more_images_go_on_from_the_champion_also_if_it_is_killed_at_each_end_of_every_step(
    project: Project, heard: tuple[str, list[dict[str, Any]]], record_property: Any
) -> None:
    """With `kill -9`, before a step and after its work, of which the ledger does not know then."""
    project.add("second", faces(TRAININGS[0], TRAININGS[1] - TRAININGS[0]))
    before = project.ids()
    plan = project.run("retrain", "--dry-run")
    assert "would do: fetch, check, decide, train, publish, gate" in plan
    assert project.ids() == before
    for step in STEPS:
        for moment in get_args(Moment):
            killed_retraining.retrain(project.folder, project.environment, step, moment)
            [name] = project.ids() - before
            assert not _entry(project, name)["outcome"]
    record_property("faults", 2 * len(STEPS))
    process = project.start("retrain")
    output, _ = process.communicate()
    assert process.returncode in (0, 3), output  # promoted, or refused with its reasons

    # All is as if nothing had happened.
    [name] = project.ids() - before
    entry = _entry(project, name)
    assert list(entry["steps"]) == [*STEPS]
    assert all(step["output"] for step in entry["steps"].values())
    assert entry["steps"]["decide"]["result"] == {"start": "models:/aegan/1"}
    assert entry["steps"]["train"]["result"]["version"] == "2"
    assert [model["version"] for model in json.loads(project.run("models", "--json"))] == ["1", "2"]
    assert project.git("tag", "--list").split().count(f"retrained/{name}") == 1
    assert len(project.git("tag", "--list").split()) == 2
    commit = entry["steps"]["publish"]["result"]["commit"]
    assert project.git("rev-parse", f"retrained/{name}^{{commit}}", f"retrain/{name}").split() == [
        commit,
        commit,
    ]
    [decision] = [row for row in json.loads(project.run("history", "--json")) if row["to"] == "2"]
    assert decision["kind"] == ("promotion" if process.returncode == 0 else "refusal")
    assert entry["outcome"] == ("promoted" if process.returncode == 0 else "refused")
    assert entry["reasons"] == decision["reasons"]
    assert any(reason.startswith("on the new images") for reason in entry["reasons"])
    assert project.champion() == ("2" if process.returncode == 0 else "1")
    assert [one["outcome"] for one in heard[1] if one["retraining"] == name] == [entry["outcome"]]


def test_health_is_good_after_a_look(project: Project) -> None:
    assert "ok: the last look" in project.run("health")


def _entry(project: Project, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((project.folder / f"retraining/{name}.json").read_text())
    return entry
