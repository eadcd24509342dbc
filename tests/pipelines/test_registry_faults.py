"""Registrations that are cut off, meet each other, or meet a store that is not as it should be."""

import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest

from pipelines import register
from pipelines.base.errors import UserError
from pipelines.base.files import hash_files
from pipelines.registry import mlflow_files, sync, tracking
from tests.registrations import ROOT, Outcome, Registrations, registrations
from tests.s3 import s3_server
from tests.trained import REGISTER, write_model, write_project

KILLS_WHILE_NEW, KILLS_LATER, STEPS_OF_A_NEW_STORE = 4, 8, 80


@pytest.fixture(scope="module")
def registering() -> Iterator[Registrations]:
    with registrations() as running:
        yield running


@pytest.fixture(scope="module")
def filled(registering: Registrations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose model is registered in its own store; tests copy it."""
    project = write_project(tmp_path_factory.mktemp("filled") / "project")
    [outcome] = registering.run(project)
    assert outcome.code == 0, outcome.errors
    return project


class Census(NamedTuple):
    runs: list[str]  # status of each that is not deleted
    versions: int
    models: int  # logged and not deleted
    folders: int  # of runs and of models

    @classmethod
    def of(cls, project: Path) -> "Census":
        with closing(sqlite3.connect(project / "mlflow.db")) as database:

            def column(query: str) -> list[Any]:
                return [value for (value,) in database.execute(query)]

            home = project / "mlruns/1"
            return cls(
                column("SELECT status FROM runs WHERE lifecycle_stage = 'active'"),
                *column(
                    "SELECT count(*) FROM model_versions WHERE current_stage <> 'Deleted_Internal'"
                ),
                *column("SELECT count(*) FROM logged_models WHERE lifecycle_stage = 'active'"),
                len([*home.glob("[0-9a-f]*"), *home.glob("models/m-*")]),
            )


ONE = Census(["FINISHED"], 1, 1, 2)


def change_content(project: Path, value: float) -> None:
    scores = json.dumps({"frechet_distance": {"ema": value}})
    (project / "artifacts/evaluate/metrics.json").write_text(scores)


def check_one_line(outcome: Outcome, *words: str) -> None:
    """A registration that failed said why, in one line that has the words."""
    assert outcome.code == 1, outcome
    [line] = outcome.errors.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


@pytest.mark.slow
@pytest.mark.fault("killed processes")
@pytest.mark.parametrize("tracked", [False, True])
def test_a_registration_killed_anywhere_leaves_nothing_behind_once_it_ran_again(
    registering: Registrations, filled: Path, tmp_path: Path, record_property: Any, tracked: bool
) -> None:
    """Whether it makes the run or adopts the training's."""
    measured = shutil.copytree(filled, tmp_path / "measured")
    change_content(measured, 0.0)
    [whole] = registering.run(measured)
    draw = random.Random(0)
    points = [draw.randint(1, whole.steps + STEPS_OF_A_NEW_STORE) for _ in range(KILLS_WHILE_NEW)]
    points += [draw.randint(1, whole.steps) for _ in range(KILLS_LATER)]
    project, contents = write_project(tmp_path / "project", tracked=tracked), 1
    for point in points:
        [killed] = registering.run(project, kill_at=point)
        assert killed.code in (-9, 0), killed
        if killed.code == 0:  # the one before was cut off so late that fewer steps were left
            contents += 1
            change_content(project, contents)
        if (project / "mlflow.db").exists():
            runs, versions, models, folders = Census.of(project)
            assert len(runs) - runs.count("FINISHED") <= 1
            assert versions <= len(runs)
            assert models <= len(runs)
            assert folders <= 2 * len(runs)
    [outcome] = registering.run(project)
    assert (outcome.code, outcome.errors) == (0, "")
    every = ["FINISHED"] * contents
    assert Census.of(project) == Census(every, contents, contents, 2 * contents)
    assert not list(project.glob(".mlflow*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(project)
        sync.main([])  # which finds nothing that MLflow lacks
    assert Census.of(project) == Census(every, contents, contents, 2 * contents)
    record_property("faults", len(points))


@pytest.mark.fault("registry")
def test_other_content_takes_away_what_was_cut_off_before(
    registering: Registrations, filled: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(filled, tmp_path / "project")
    change_content(project, 1.0)
    [killed] = registering.run(project, kill_at=200)
    assert killed.code == -9
    assert "RUNNING" in Census.of(project).runs
    change_content(project, 2.0)
    [outcome] = registering.run(project)
    assert outcome.code == 0
    assert Census.of(project) == Census(["FINISHED"] * 2, 2, 2, 4)


@pytest.mark.fault("registry")
def test_three_at_once_on_a_new_store_register_one_content_once(
    registering: Registrations, tmp_path: Path, record_property: Any
) -> None:
    projects = [write_project(tmp_path / name) for name in "abc"]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'a/mlflow.db'}"}
    outcomes = registering.run(*projects, environment=store)
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert sorted(outcome.output.split()[0] for outcome in outcomes) == [
        "registered:",
        "this",
        "this",
    ]
    assert Census.of(tmp_path / "a") == ONE
    record_property("faults", 3)


@pytest.mark.fault("registry")
def test_a_new_store_is_its_owners_alone(registering: Registrations, tmp_path: Path) -> None:
    before = os.umask(0)  # as careless as can be
    try:
        project = write_project(tmp_path / "project")
        [outcome] = registering.run(project)
    finally:
        os.umask(before)
    assert outcome.code == 0
    for name in ("mlflow.db", "mlruns"):
        assert (project / name).stat().st_mode & 0o077 == 0, name


def lock(file: Path) -> Any:
    code = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.execute('BEGIN EXCLUSIVE')"
    holder = subprocess.Popen(  # a lock in this process would end when it reads the file
        [sys.executable, "-c", f"{code}; print('held', flush=True); input()", file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout
    holder.stdout.readline()
    return lambda: holder.communicate(b"\n")


def damage(file: Path) -> Any:
    content = bytearray(file.read_bytes())
    content[4096 * 20 : 4096 * 40] = b"\xff" * 4096 * 20
    return restore_after(file, bytes(content))


def cut_off(file: Path) -> Any:
    return restore_after(file, file.read_bytes()[:100_000])


def no_database(file: Path) -> Any:
    return restore_after(file, b"this is no database" * 1000)


def of_another_program(file: Path) -> Any:
    restore = restore_after(file, b"")
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE songs (title TEXT)")
    return restore


def older(file: Path) -> Any:
    """As MLflow 3.0 or so left it: an earlier version, fewer tables."""
    restore = restore_after(file, file.read_bytes())
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    revisions = list(ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions())
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revisions[5].revision,))
        database.execute("DROP TABLE jobs")
    return restore


def newer(file: Path) -> Any:
    restore = restore_after(file, file.read_bytes())
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    return restore


def for_everybody(file: Path) -> Any:
    file.chmod(0o666)
    return lambda: file.chmod(0o600)


def restore_after(file: Path, content: bytes) -> Any:
    whole = file.read_bytes()
    file.write_bytes(content)
    return lambda: file.write_bytes(whole)


@pytest.mark.fault("registry")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lock, ["is locked; close the program that uses it, then run the same command again"]),
        (damage, ["malformed", "put a copy of yours in its place"]),
        (cut_off, ["malformed", "put a copy of yours in its place"]),
        (no_database, ["file is not a database", "put a copy of yours in its place"]),
        (of_another_program, ["no database of MLflow", "move it away"]),
        (
            older,
            ["written by an older MLflow", "make a copy of it", "mlflow db upgrade sqlite:///"],
        ),
        (newer, ["no database of MLflow", "ffffffffffff", "use the MLflow that wrote it"]),
        (for_everybody, ["every user of this machine may change it", "chmod o-w"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_store_that_cannot_be_used_is_one_line_and_stays_as_it_is(
    registering: Registrations, filled: Path, tmp_path: Path, fault: Any, words: list[str]
) -> None:
    project = shutil.copytree(filled, tmp_path / "project")
    file = project / "mlflow.db"
    registering.run(project)  # the copy's paths
    change_content(project, 1.0)
    undo = fault(file)
    before = hash_files([file, project / "mlruns"])
    [outcome] = registering.run(project)
    check_one_line(outcome, "mlflow.db", *words)
    assert hash_files([file, project / "mlruns"]) == before
    undo()
    [outcome] = registering.run(project)
    assert (outcome.code, outcome.errors) == (0, "")
    assert Census.of(project) == Census(["FINISHED"] * 2, 2, 2, 4)


@pytest.mark.slow
@pytest.mark.fault("registry")
def test_a_store_that_may_only_be_read_is_one_line_and_can_be_read(
    filled: Path, record_property: Any
) -> None:
    for path, mode in ((filled, 0o500), (filled / "mlflow.db", 0o400)):
        before = path.stat().st_mode
        path.chmod(mode)
        try:
            done = run_unprivileged(filled, "-m", "pipelines.register")
            outcome = Outcome(done.returncode, done.stdout, done.stderr, 0)
            check_one_line(outcome, "mlflow.db", "check the owner and mode")
            if path.is_file():
                read = "from pipelines.registry.tracking import load_model as read"
                read = f"{read}; read('models:/aegan/1')"
                assert run_unprivileged(filled, "-c", read).returncode == 0
        finally:
            path.chmod(before)
    record_property("faults", 2)


def run_unprivileged(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python that modes of files hold for, also where the tests run as root."""
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*bare, sys.executable, *arguments],
        cwd=project,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def own(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the filled project, entered; its model's files in the store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(shutil.copytree(filled, tmp_path / "project"))
    tracking.load_model("models:/aegan@candidate")  # the copy's paths
    [model] = Path("mlruns").glob("1/models/m-*/artifacts/artifacts/model")
    return model


@pytest.mark.fault("registry")
def test_other_weights_than_those_registered_are_refused(own: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", seed=1)
    shutil.copytree(tmp_path / "other", own, dirs_exist_ok=True)
    with pytest.raises(UserError, match="not those that were registered"):
        tracking.load_model("models:/aegan@candidate")


@pytest.mark.fault("registry")
def test_only_the_files_of_a_model_are_fetched_and_none_without_end(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "sitecustomize.py").write_text("raise SystemExit")
    fetched = tracking.fetch_model("models:/aegan@candidate", tmp_path)
    names = ["config.json", "ema.safetensors", "weights.safetensors"]
    assert sorted(path.name for path in fetched.iterdir()) == names
    monkeypatch.setattr(tracking, "MAX_FILE_BYTES", 2**20)
    with (own / "ema.safetensors").open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match="File too large"):
        tracking.load_model("models:/aegan@candidate")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    assert limit == resource.RLIM_INFINITY or limit > 2**20


def test_a_store_whose_files_were_copied_to_a_bucket_goes_on_there(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"AWS_{name}", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket = boto3.resource("s3").create_bucket(Bucket="models")
        for file in Path("mlruns").rglob("*"):
            if file.is_file():
                bucket.upload_file(str(file), f"of/mlruns/{file.relative_to('mlruns')}")
        mlflow_files.move(Path.cwd() / "mlflow.db", "s3://models/of/mlruns")
        shutil.rmtree("mlruns")
        assert tracking.load_model("models:/aegan@candidate").latent_dim == 8
        assert register.register(REGISTER).reused
        change_content(Path.cwd(), 3.0)
        assert register.register(REGISTER).number == "2"
        assert not Path("mlruns").exists()


@pytest.mark.fault("names from outside")
def test_names_with_quotes_are_found_again(own: Path, record_property: Any) -> None:
    for name in ("a'b", 'a"b', "a`b %_", "x' OR name != 'y", "-- a; b"):
        config = replace(REGISTER, experiment=f"of {name}", model_name=name)
        assert not register.register(config).reused
        assert register.register(config).reused
    record_property("faults", 5)
