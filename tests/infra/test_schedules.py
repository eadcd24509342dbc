"""infra/schedules: read by what will run them, as far as it is here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "infra/schedules"


def test_github_takes_the_workflow() -> None:
    command = ["--builtin-schema", "vendor.github-workflows", str(FOLDER / "github.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_runs_of_the_workflow_wait_for_each_other_and_not_on_the_hour() -> None:
    workflow = YAML(typ="safe").load(FOLDER / "github.yaml")
    assert workflow["concurrency"] == {"group": "retrain", "cancel-in-progress": False}
    [schedule] = workflow["on"]["schedule"]
    assert schedule["cron"].split()[0] not in ("0", "*")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in ("aegan-retrain.service", "aegan-retrain.timer"):
        text = (FOLDER / unit).read_text()
        text = text.replace("%h/aegan/.venv/bin/aegan", sys.executable)  # which has to be there
        (tmp_path / unit).write_text(text)
    units = map(str, tmp_path.glob("*.*"))
    command = ["systemd-analyze", "--user", "verify", "--man=no", *units]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stderr


def test_every_schedule_runs_the_same_command() -> None:
    for name in ("aegan-retrain.service", "crontab", "github.yaml"):
        assert ".venv/bin/aegan retrain" in (FOLDER / name).read_text()
