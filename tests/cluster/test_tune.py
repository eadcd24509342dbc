"""The stage tune on a real Ray: killed in the middle, moved, restored by the same command, used."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ruamel.yaml import YAML

from aegan.config import SPLITS
from aegan.data import designed_faces
from aegan.training import checkpoint
from aegan.training.run_folder import RunFolder
from pipelines.base import params
from tests.project import finish, start
from tests.shards import write_shards
from tests.tiny import PARAMS, SMALL

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = PARAMS.parent
NUM_TRIALS, NUM_STEPS, GRACE_STEPS = 12, 36, 12
SMALL_PARAMETERS: dict[str, dict[str, Any]] = {
    "model": {"latent_dim": 4, "base_channels": 4},
    "training": SMALL | {"num_steps": 10},
    "compute": {"threads_per_worker": 1},
    "tune": {
        "num_trials": NUM_TRIALS,
        "num_steps": NUM_STEPS,
        "grace_steps": GRACE_STEPS,
        "concurrent_trials": 2,
        "num_finalists": 1,
        "seeds_per_finalist": 1,
        "seeds_of_comparison": 2,
    },
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small parameters and 16x16 images of the designed faces."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = dict(zip(SPLITS, (64, 24, 24), strict=True))
    factors = designed_faces.sample_factors(np.arange(sum(rows.values())), seed=0)
    images = designed_faces.render(factors, image_size=16)
    pieces = np.split(images, np.cumsum(list(rows.values()))[:-1])
    write_shards(tmp_path / "artifacts/shards", dict(zip(SPLITS, pieces, strict=True)))
    shutil.copy(PARAMS, tmp_path)
    change(tmp_path, SMALL_PARAMETERS)
    return tmp_path


def change(project: Path, parameters: dict[str, dict[str, Any]]) -> None:
    with (project / "overlay.yaml").open("w") as file:
        YAML().dump(parameters, file)
    params.apply_overlay(project / "overlay.yaml", project / "params.yaml")


def kill_in_the_middle(process: subprocess.Popen[str]) -> tuple[str, list[psutil.Process]]:
    """SIGKILL after a few trials have ended; returns what was printed, and the orphans."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if sum(line.startswith("trial ") for line in lines) == NUM_TRIALS // 3:
            break
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    return "".join(lines), tree


def wait_for_trials(orphans: list[psutil.Process]) -> None:
    """Until no trial's process writes any more; it ends when it misses its driver."""

    def is_trial(process: psutil.Process) -> bool:
        try:
            return process.name().startswith("ray::") and not process.name().endswith("Agent")
        except psutil.NoSuchProcess:
            return False

    _, alive = psutil.wait_procs(list(filter(is_trial, orphans)), timeout=60)
    assert not alive


def ended(output: str, how: str) -> set[int]:
    """Numbers of the trials that a log says ended that way."""
    words = [line.split() for line in output.splitlines() if line.startswith("trial ")]
    return {int(line[1]) for line in words if line[4] == how}


def trained_at(project: Path) -> dict[str, int]:
    """When each trial that was trained to the end wrote its last checkpoint."""
    found = {}
    for folder in project.glob("runs/tune-*/trials/*"):
        if checkpoint.steps(folder / "checkpoints")[-1:] == [NUM_STEPS]:
            last = RunFolder(folder).checkpoint(NUM_STEPS)
            found[folder.name] = last.stat().st_mtime_ns
    return found


@pytest.mark.fault("killed processes")
def test_a_search_that_was_killed_and_moved_goes_on_and_training_then_uses_its_winner(
    project: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("faults", 2)
    first, orphans = kill_in_the_middle(start(project, "tune"))
    wait_for_trials(orphans)
    old, project = project, project.rename(project.with_name("moved"))
    before = trained_at(project)
    assert before
    assert 0 < len(ended(first, "finished")) < NUM_TRIALS, first
    time.sleep(0.01)

    second = finish(start(project, "tune"))
    assert "going on with search" in second
    after = trained_at(project)
    assert {name: after[name] for name in before} == before  # not trained again
    with (project / "artifacts/tune/trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [int(trial["trial"]) for trial in trials] == list(range(NUM_TRIALS))
    assert {trial["ended"] for trial in trials} <= {"finished", "stopped", "diverged"}
    assert float(trials[0]["loss.gamma_image"]) == YAML().load(PARAMS)["loss"]["gamma_image"]
    for how in ("finished", "stopped"):  # the verdicts before the kill still stand
        assert ended(first, how) <= {int(row["trial"]) for row in trials if row["ended"] == how}
    assert "Traceback" not in first + second
    assert not old.exists()

    comparison = json.loads((project / "artifacts/tune/comparison.json").read_text())
    winner = comparison["winner"]
    finalists = {finalist["trial"]: finalist for finalist in comparison["finalists"]}
    assert {0, winner["trial"]} <= finalists.keys()
    means = {
        number: finalist["validation"]["frechet_distance"]["mean"]
        for number, finalist in finalists.items()
    }
    assert means[winner["trial"]] == min(means.values())

    overlay = project / "artifacts/tune/tuned.yaml"
    params.apply_overlay(overlay, project / "params.yaml")
    finish(start(project))
    run = json.loads((project / "artifacts/train/run.json").read_text())
    for name, value in winner["settings"].items():
        section, key = name.split(".")
        assert run["params"][section][key] == value
    _, alive = psutil.wait_procs(orphans, timeout=90)  # idle agents of Ray wait for a minute
    assert [child for child in alive if child.is_running()] == []


def test_an_interrupted_search_ends_at_once_and_leaves_nothing_running(project: Path) -> None:
    process = start(project, "tune")
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("trial "))
    tree = psutil.Process(process.pid).children(recursive=True)
    listening = {
        connection.laddr.ip
        for child in tree
        for connection in child.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    os.kill(process.pid, signal.SIGINT)
    output = finish(process, expected=130)
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert [child for child in alive if child.is_running()] == []


def test_settings_that_cannot_train_end_in_one_clear_line(project: Path) -> None:
    training = {"learning_rate": 1e12, "max_rollbacks": 0}
    search = {"loss.gamma_image": {"low": 0.05, "high": 10.0, "scale": "log"}}
    change(project, {"training": training, "tune": {"num_trials": 2, "search": search}})
    output = finish(start(project, "tune"), expected=1)
    assert "error: no trial was trained to the end: each of them diverged" in output
    assert "Traceback" not in output


def test_more_trials_at_once_than_cpus_is_one_clear_line(project: Path) -> None:
    change(project, {"tune": {"concurrent_trials": 10_000}, "compute": {"device": "cpu"}})
    output = finish(start(project, "tune"), expected=1)
    assert "error: tune.concurrent_trials is 10000, but there are" in output
    assert "Traceback" not in output
