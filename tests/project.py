"""A project folder with a tiny training, and the train stage run in it as a user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from tests.tiny import PARAMS, SMALL

ROOT = PARAMS.parent


def make_project(folder: Path, shards: Path, **overrides: object) -> Path:
    """A folder with the project's parameters, shrunk, and shards; overrides: section__key=value."""
    folder.mkdir()
    parameters = YAML(typ="safe").load(PARAMS.read_text())
    parameters["model"] |= {"latent_dim": 4, "base_channels": 4}
    parameters["training"] |= SMALL | {
        "checkpoint_interval_steps": 50,
        "sample_interval_steps": 200,
    }
    parameters["compute"] |= {"threads_per_worker": 1, "live_tracking": False}
    for key, value in overrides.items():
        section, name = key.split("__")
        parameters[section][name] = value
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(parameters, file)
    shutil.copytree(shards, folder / "artifacts" / "shards")
    return folder


def start(project: Path, stage: str = "train", **environment: str) -> subprocess.Popen[str]:
    """A stage in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"pipelines.{stage}"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, expected: int = 0) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == expected, output
    return output


def run_folder(project: Path) -> Path:
    (folder,) = (project / "runs").iterdir()
    return folder


def train_workers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are workers of Ray Train."""
    found = []
    for process in processes:
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
