"""The whole pipeline under DVC, as `make run` starts it: once through, then only what changed."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from contextlib import chdir, closing
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from aegan.data import designed_faces
from pipelines.base import locks, outputs
from pipelines.bucket import finished_run
from pipelines.registry import mlflow_files
from tests.projects import make_project
from tests.tiny import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
STAGES = [
    *("download", "preprocess", "train", "evaluate", "interpolate", "explore", "report"),
    "register",
]
SMALL_PARAMETERS = {
    "data": {"manifold_images": 200, "manifold_size": 16},
    "preprocess": {"image_size": 16},
    "model": {"latent_dim": 4, "base_channels": 4},
    "training": SMALL | {"num_steps": 4},
    "compute": {"num_workers": 1, "threads_per_worker": 1},
    "evaluate": {"num_samples": 20},
    "interpolate": {"num_pairs": 2, "num_frames": 3},
}


def run(folder: Path, *command: str, expected: int = 0) -> str:
    """What a command prints, run in a folder under a bare environment and an empty home."""
    home = next(above / "home" for above in folder.parents if (above / "home").exists())
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(home.parent / "matplotlib"),  # as `make` sets it in .venv
        "DVC_SITE_CACHE_DIR": str(home.parent / "dvc"),  # else DVC writes to /var/tmp
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + (done.stderr if expected else "")


def dvc(project: Path, *arguments: str, folder: str = ".", expected: int = 0) -> str:
    """What `.venv/bin/dvc` prints, as `make` installs it."""
    python = project / ".venv/bin/python"
    return run(
        project / folder,
        str(python),
        "-m",
        "pipelines.project.dvc_command",
        *arguments,
        expected=expected,
    )


def stages_run(output: str) -> list[str]:
    """The stages whose commands ran, by what `dvc repro` printed."""
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the project's own files and small parameters, run through once.

    In a folder whose name has a space, and on a machine where git knows no author.
    """
    folder = tmp_path_factory.mktemp("pipeline") / "my project"
    (folder.parent / "home").mkdir()
    make_project(folder, SMALL_PARAMETERS)
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", ".")
    author = ("-c", "user.name=A Tester", "-c", "user.email=tester@localhost")
    run(folder, "git", *author, "commit", "--quiet", "--message", "Start")
    assert stages_run(dvc(folder, "repro")) == STAGES
    return folder


def test_images_become_a_report_and_a_registered_model(project):
    assert "</html>" in (project / "report/index.html").read_text()
    registered = json.loads((project / "artifacts/register/registration.json").read_text())
    assert registered["version"] == "1"


def test_dvc_shows_the_metrics_of_the_evaluation(project):
    """The few that people choose by; the others are in the file they come from."""
    shown = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"]
    figures = shown.pop("artifacts/evaluate/summary.json")["data"]
    assert shown == {}
    assert {"frechet_distance", "reconstruction_mae"} <= figures.keys()
    assert len(figures) <= 11
    every = json.loads((project / "artifacts/evaluate/metrics.json").read_text())
    assert figures["frechet_distance"] == every["frechet_distance"]["ema"]


def test_dvc_draws_the_losses_by_network_and_pictures(project):
    shown = json.loads(dvc(project, "plots", "show", "--json"))["data"]
    for name, columns in drawn_columns().items():
        rows = shown[name][0]["content"]["data"]["values"]
        column = "dvc_inferred_y_value" if len(columns) > 1 else columns[0]
        assert {row["field"] for row in rows} == set(columns) if len(columns) > 1 else rows
        assert all(row[column] for row in rows)  # DVC draws an empty one as 0
        assert len(rows) == len(columns) * 2  # two log intervals
    dvc(project, "plots", "show")
    assert "latent.png" in (project / "dvc_plots/index.html").read_text()


def drawn_columns() -> dict[str, list[str]]:
    """The pictures of dvc.yaml and the columns of curves.csv in each."""
    plots = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["plots"]
    drawn = {name: plot[name]["y"]["artifacts/train/curves.csv"] for plot in plots for name in plot}
    return {name: [y] if isinstance(y, str) else y for name, y in drawn.items()}


def test_dvc_draws_no_column_that_an_arm_may_lack():
    drawn = [column for columns in drawn_columns().values() for column in columns]
    assert sorted(drawn) == sorted(finished_run.CURVES)


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
    header, *rows = dvc(project, "exp", "show", "--csv").splitlines()
    columns = header.split(",")
    assert len(columns) <= 20
    assert {"frechet_distance", "interpolate.num_frames"} <= set(columns)
    assert any(row.startswith(f"{name},") for row in rows)


def test_stages_write_no_file_that_would_be_taken_for_a_source_of_the_users(project):
    for folder, written in outputs.FOLDERS.items():
        assert list(outputs.find_foreign(project / folder, written)) == []


@pytest.mark.parametrize("command", [("repro",), ("exp", "run"), ("checkout",)])
def test_a_picture_put_into_an_output_stops_dvc_before_it_deletes_a_source(project, command):
    picture = project / "artifacts/shards/mine.png"
    picture.touch()
    said = dvc(project, *command, expected=1)
    assert "error: artifacts/shards is an output" in said
    assert "mine.png" in said
    picture.unlink()


def test_a_source_among_the_outputs_is_refused_before_dvc_starts(project):
    before = (project / "params.yaml").read_bytes(), (project / "dvc.lock").read_bytes()
    for source in ("artifacts/raw", ".", "", "https://me:secret@localhost/set.zip"):
        said = dvc(project, "exp", "run", "-S", f"data.source={source}", expected=1)
        assert "error: data.source" in said
        assert "secret" not in said
    assert ((project / "params.yaml").read_bytes(), (project / "dvc.lock").read_bytes()) == before
    assert (project / "artifacts/raw/manifest.json").exists()


def test_a_second_run_touches_nothing_while_one_is_at_work_on_the_source(project):
    before = (project / "params.yaml").read_bytes()
    with chdir(project), locks.hold(locks.PIPELINE):
        said = dvc(project, "exp", "run", "-S", "training.seed=1", expected=1)
    assert f"another run is at work in this folder: process {os.getpid()}" in said
    with chdir(project), locks.hold("train"):  # its DVC was killed
        said = dvc(project, "repro", expected=1)
    assert f"process of the stage train is at work in this folder: process {os.getpid()}" in said
    assert (project / "params.yaml").read_bytes() == before


def test_a_run_in_a_copy_reads_the_source_of_the_project_and_registers_in_its_store(project):
    """Also from a sub-folder, and with a relative path."""
    pictures = project / "data/my faces"
    pictures.mkdir(parents=True)
    images, _ = designed_faces.generate(0, 60, seed=1, image_size=16)
    for number, image in enumerate(images):
        Image.fromarray(image).save(pictures / f"{number}.png")
    setting = ("-S", "data.source='data/my faces'", "-S", "training.batch_size=8")
    output = dvc(project, "exp", "run", "--temp", *setting, folder="docs")
    assert f"in sqlite:///{project}/mlflow.db" in output
    assert "registered: aegan version" in output
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        places = [row[0] for row in database.execute("SELECT artifact_uri FROM runs")]
    assert len(places) > 1
    assert [place for place in places if not Path(place).is_relative_to(project / "mlruns")] == []
    assert [place for place in places if not Path(place).exists()] == []


def test_a_queued_run_registers_in_the_store_of_the_project_as_its_source(project):
    """DVC's worker runs it in a copy, after the command has ended."""
    versions = "SELECT count(*) FROM model_versions"
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        before = database.execute(versions).fetchone()
    dvc(project, "exp", "run", "--queue", "--name", "queued", "-S", "training.seed=1")
    dvc(project, "queue", "start")
    give_up = time.monotonic() + 200
    while "Success" not in (status := dvc(project, "queue", "status")):
        assert "Failed" not in status, dvc(project, "queue", "logs", "queued")
        assert time.monotonic() < give_up, status
        time.sleep(2)
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute(versions).fetchone() > before
    log = dvc(project, "queue", "logs", "queued")
    assert f"in sqlite:///{project}/mlflow.db" in log


def test_nothing_is_written_into_the_home_folder_or_among_the_files_of_git(project):
    assert list((project.parent / "home").iterdir()) == []
    untracked = run(project, "git", "ls-files", "--others", "--exclude-standard").split()
    assert set(untracked) <= {"dvc.lock"}  # an experiment adds it


def test_a_moved_project_registers_in_its_own_folder_and_finds_what_it_has(project, tmp_path):
    """Last: the project is elsewhere afterwards."""
    moved = tmp_path / "moved elsewhere"
    (tmp_path / "home").mkdir()
    shutil.copytree(project, moved, symlinks=True)
    python = str(moved / ".venv/bin/python")
    run(moved, python, "-m", "pipelines.register")
    with closing(sqlite3.connect(moved / "mlflow.db")) as database:
        for table, column in mlflow_files.PLACES:
            for (place,) in database.execute(f"SELECT {column} FROM {table}"):
                assert Path(place).is_relative_to(moved / "mlruns"), (table, place)
    shutil.rmtree(project)
    load = "from pipelines.registry.tracking import load_model as load"
    said = run(moved, python, "-c", f"{load}; print(load('models:/aegan@candidate'))")
    assert "Generator" in said
    assert stages_run(dvc(moved, "repro")) == []
