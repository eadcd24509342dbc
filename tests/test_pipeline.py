"""The whole pipeline under DVC, as `make run` starts it: once through, then only what changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines import params
from tests.tiny import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
STAGES = ["download", "preprocess", "train", "evaluate", "interpolate", "report", "register"]
COPIED = [".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"]
SMALL_PARAMETERS = {
    "data": {"manifold_images": 200, "manifold_size": 16},
    "preprocess": {"image_size": 16},
    "model": {"latent_dim": 4, "base_channels": 4},
    "training": SMALL | {"num_steps": 4},
    "compute": {"num_workers": 1, "threads_per_worker": 1},
    "evaluate": {"num_samples": 20},
    "interpolate": {"num_pairs": 2, "num_frames": 3},
}


def run(project: Path, *command: str) -> str:
    """What a command prints, run in the project under a bare environment and an empty home."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(project.parent / "home"),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(project / ".venv/matplotlib"),  # as the Makefile's environment has it
        "DVC_SITE_CACHE_DIR": str(project / ".dvc/tmp"),  # else DVC writes to /var/tmp
    }
    done = subprocess.run(
        command, cwd=project, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(project: Path, *arguments: str) -> str:
    return run(project, sys.executable, "-m", "dvc", *arguments)


def stages_run(output: str) -> list[str]:
    """The stages whose commands ran, by what `dvc repro` printed."""
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the project's own files and small parameters, run through once."""
    folder = tmp_path_factory.mktemp("pipeline") / "project"
    (folder.parent / "home").mkdir()
    for name in ("aegan", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for file in COPIED:
        shutil.copy(ROOT / file, folder / file)
    with (folder.parent / "small.yaml").open("w") as overlay:
        YAML().dump(SMALL_PARAMETERS, overlay)
    params.apply_overlay(folder.parent / "small.yaml", folder / "params.yaml")

    run(folder, "git", "init", "--quiet")
    run(folder, "git", "config", "user.name", "A Tester")
    run(folder, "git", "config", "user.email", "tester@localhost")
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "--quiet", "--message", "Start")
    assert stages_run(dvc(folder, "repro")) == STAGES
    return folder


def test_images_become_a_report_and_a_registered_model(project):
    assert "</html>" in (project / "report/index.html").read_text()
    registered = json.loads((project / "artifacts/register/registration.json").read_text())
    assert registered["version"] == "1"


def test_dvc_shows_the_metrics_of_the_evaluation(project):
    shown = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"]
    figures = shown["artifacts/evaluate/metrics.json"]["data"]
    assert {"ema", "raw", "floor"} <= figures["frechet_distance"].keys()
    assert {"ema", "raw", "floor"} <= figures["reconstruction_mae"].keys()


def test_dvc_draws_curves_and_pictures(project):
    dvc(project, "plots", "show")
    page = (project / "dvc_plots/index.html").read_text()
    assert "curves.csv" in page
    assert "latent.png" in page


def test_without_a_change_no_stage_runs_again(project):
    output = dvc(project, "repro")
    assert stages_run(output) == []
    assert "up to date" in output
    assert json.loads(dvc(project, "status", "--json")) == {}


def test_a_changed_weight_of_the_loss_concerns_training_but_not_the_data(project):
    parameters = project / "params.yaml"
    before = parameters.read_text()
    text, count = re.subn(r"(?m)^(  lambda_image_reconstruction:) \S+", r"\1 7.0", before)
    parameters.write_text(text)
    changed = json.loads(dvc(project, "status", "--json"))
    parameters.write_text(before)
    assert count == 1
    assert list(changed) == ["train"]


def test_an_experiment_runs_only_what_its_parameter_concerns_and_is_listed(project):
    name = "five-frames"
    output = dvc(project, "exp", "run", "--name", name, "--set-param", "interpolate.num_frames=5")
    assert stages_run(output) == ["interpolate", "report", "register"]
    listed = json.loads(dvc(project, "exp", "show", "--json"))
    experiments = [row["name"] for base in listed for row in base["experiments"] or []]
    assert experiments == [name]


def test_nothing_is_written_into_the_home_folder_or_among_the_files_of_git(project):
    assert list((project.parent / "home").iterdir()) == []
    untracked = run(project, "git", "ls-files", "--others", "--exclude-standard").split()
    assert set(untracked) <= {"dvc.lock"}  # an experiment adds it
