"""What runs leave behind has an end, and nothing that something names is touched."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.base import locks
from pipelines.base.errors import UserError
from pipelines.project import tidy
from pipelines.registry import mlflow_leftovers, mlflow_store

DAY = 86400.0


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository with DVC, and no Ray session, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A Tester")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "tester@localhost")
    monkeypatch.setattr(tidy, "SYSTEM_TEMPORARY", tmp_path / "tmp")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    Path("temporary").mkdir()
    Path(".dvc").mkdir()
    Path(".dvc/config").touch()
    git("init", "--quiet")
    return tmp_path


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def make_run(name: str, *, days: float = 30) -> Path:
    """A run's folder that was last written to so many days ago."""
    folder = Path("runs") / name
    for file in ("run.json", "driver.lock", "checkpoints/step-00000002/state.safetensors"):
        write(folder / file, "x" * 1000)
    make_older(folder, days)
    return folder


def make_older(folder: Path, days: float) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - days * DAY,) * 2)


def write(path: Path, text: str = "content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def name_in_lock(name: str, *, md5: str) -> None:
    """dvc.lock as it stands after a training of that name, whose run.json is in DVC's cache."""
    write(Path(".dvc/cache/files/md5") / md5[:2] / md5[2:], json.dumps({"run_name": name}))
    outs = f"    - path: artifacts/train/run.json\n      hash: md5\n      md5: {md5}\n"
    write(Path("dvc.lock"), f"schema: '2.0'\nstages:\n  train:\n    cmd: x\n    outs:\n{outs}")


@pytest.mark.fault("left behind")
def test_an_old_run_goes_unless_the_folder_a_commit_or_an_experiment_names_it(project, capsys):
    names = {
        reason: f"aegan-{number:012x}"
        for number, reason in enumerate(
            ["published", "in a commit of long ago", "experiment", "young", "at work", "unnamed"]
        )
    }
    folders = {reason: make_run(name) for reason, name in names.items()}
    write(Path("artifacts/train/run.json"), json.dumps({"run_name": names["published"]}))
    for number, reason in enumerate(("in a commit of long ago", "experiment", "published")):
        name_in_lock(names[reason], md5=f"{number:032x}")
        git("add", "--force", "dvc.lock")
        git("commit", "--quiet", "--message", reason)
        if reason == "experiment":
            git("update-ref", "refs/exps/ab/cdef/mine", "HEAD")
            git("reset", "--quiet", "--hard", "HEAD^")
    make_run(names["young"], days=3)
    mine = write(folders["unnamed"] / "notes.txt")
    make_older(folders["unnamed"], 30)
    other = write(Path("runs/my experiments/a.png"))

    with FileLock(folders["at work"] / "driver.lock"):
        sizes = tidy.main()
        said = capsys.readouterr().out
        assert [*sizes["places"]["runs"]["unnamed"]] == [str(folders["unnamed"])]
        assert f"runs/{names['unnamed']}, 30 days old" in said
        assert [reason for reason, name in names.items() if f"/{name}," in said] == ["unnamed"]
        assert (folders["unnamed"] / "run.json").exists()  # it only shows

        tidy.main(yes=True)
    gone = [reason for reason, f in folders.items() if not (f / "run.json").exists()]
    assert gone == ["unnamed"]
    assert [file for file in folders["unnamed"].rglob("*") if file.is_file()] == [mine]
    assert other.exists()

    tidy.main(yes=True, days=1)
    assert not folders["young"].exists()


@pytest.mark.fault("left behind")
@pytest.mark.slow
def test_what_no_dvc_lock_names_leaves_the_cache_with_its_records_and_the_rest_can_be_restored(
    project,
):
    stage = {"cmd": "cp in out", "deps": ["in"], "outs": ["out"]}
    write(Path("dvc.yaml"), json.dumps({"stages": {"copy": stage}}))
    for content in ("committed", "forgotten", "of the folder"):
        write(Path("in"), content)
        subprocess.run([sys.executable, "-m", "dvc", "repro"], check=True, capture_output=True)
        if content == "committed":
            git("add", "--force", "dvc.lock", "dvc.yaml", "in")
            git("commit", "--quiet", "--message", "one")
    assert contents_of_cache() == {"committed", "forgotten", "of the folder"}

    tidy.main()
    assert contents_of_cache() == {"committed", "forgotten", "of the folder"}
    tidy.main(yes=True)
    assert contents_of_cache() == {"committed", "of the folder"}
    assert len(list(Path(".dvc/cache/runs").glob("*/*/*"))) == 2
    git("stash", "--quiet")
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "--force"], check=True)
    assert Path("out").read_text() == "committed"


@pytest.mark.fault("left behind")
@pytest.mark.parametrize(
    ("refusal", "cure"),
    [
        ("another user's folder", "ownership .*not known.*; .*safe.directory"),
        ("a damaged branch", "not known.*; `git log --all` must"),
        ("no git", "not known.*; install git"),
    ],
)
def test_while_git_does_not_answer_nothing_is_taken_for_unnamed(
    project, monkeypatch, refusal, cure
):
    name_in_lock("aegan-0123456789ab", md5="0" * 32)
    git("add", "--force", "dvc.lock")
    git("commit", "--quiet", "--message", "one")
    branch = project / ".git" / git("symbolic-ref", "HEAD").strip()
    Path("dvc.lock").unlink()
    run = make_run("aegan-0123456789ab")
    if refusal == "another user's folder":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to test it
    elif refusal == "a damaged branch":
        branch.write_text("")
    else:
        monkeypatch.setenv("PATH", str(project))

    for folder in (run, project / "elsewhere"):  # with runs and without
        with pytest.raises(UserError, match=cure):
            tidy.main(yes=True)
        assert (run / "run.json").exists()
        if folder == run:
            run = run.rename(project / "elsewhere")
    assert len(contents_of_cache()) == 1


@pytest.mark.fault("left behind")
def test_without_a_repository_what_this_folder_names_stays(project):
    name_in_lock("aegan-0123456789ab", md5="0" * 32)
    (project / ".git").rename(project / "no repository")
    Path(".dvc/config").write_text("[core]\n    no_scm = true\n")
    named, unnamed = make_run("aegan-0123456789ab"), make_run("aegan-0123456789cd")
    tidy.main(yes=True)
    assert (named.exists(), unnamed.exists()) == (True, False)


@pytest.mark.fault("left behind")
def test_a_run_that_a_merge_passed_over_is_named_all_the_same(project):
    for name, branch in (("aegan-0123456789ab", "one"), ("aegan-0123456789cd", "other")):
        git("checkout", "--quiet", "--orphan", branch)
        name_in_lock(name, md5=name[-2:] * 16)
        git("add", "--force", "dvc.lock")
        git("commit", "--quiet", "--message", branch)
    git("merge", "--quiet", "--strategy=ours", "--allow-unrelated-histories", "one")
    git("branch", "--quiet", "-D", "one")
    run = make_run("aegan-0123456789ab")
    tidy.main(yes=True)
    assert run.exists()


@pytest.mark.fault("left behind")
def test_a_run_stays_that_is_named_in_a_cache_elsewhere(project):
    name_in_lock("aegan-0123456789ab", md5="0" * 32)
    Path(".dvc/cache").rename("elsewhere")
    Path(".dvc/config").write_text("[cache]\n    dir = ../elsewhere\n")
    run = make_run("aegan-0123456789ab")
    tidy.main(yes=True)
    assert (run / "run.json").exists()


def contents_of_cache() -> set[str]:
    return {file.read_text() for file in Path(".dvc/cache/files").rglob("*") if file.is_file()}


@pytest.mark.fault("left behind")
@pytest.mark.slow
def test_files_of_runs_deleted_in_mlflow_go_and_those_of_versions_stay(project):
    mlflow = mlflow_store.open_store()
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("aegan")
    runs = {}
    for kind in ("active", "deleted", "of a version"):
        run = client.create_run(experiment, tags={"run_name": f"aegan-{len(runs):012x}"})
        runs[kind] = Path("mlruns") / experiment / run.info.run_id
        client.log_text(run.info.run_id, kind, "report.txt")
    client.create_registered_model("aegan")
    client.create_model_version("aegan", "file:model", runs["of a version"].name)
    for kind in ("deleted", "of a version"):
        client.delete_run(runs[kind].name)
    unnamed = write(Path("mlruns") / experiment / ("0" * 32) / "artifacts/report.txt").parent.parent
    mine = write(Path("mlruns/notes/mine.txt"))
    old = make_run("aegan-000000000000")  # MLflow names it

    tidy.main()
    assert unnamed.exists()
    assert all(folder.exists() for folder in runs.values())
    tidy.main(yes=True)
    assert not unnamed.exists()
    assert [kind for kind, folder in runs.items() if not folder.exists()] == ["deleted"]
    assert mine.exists()
    assert (old / "run.json").exists()
    assert mlflow_leftovers.deleted(Path("mlflow.db")) == {}


@pytest.mark.fault("damaged files")
def test_a_damaged_mlflow_database_ends_tidying_before_anything_is_removed(project):
    old, damaged = make_run("aegan-0123456789ab"), write(Path("mlflow.db"), "no database" * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db: file is not a database"):
        tidy.main(yes=True)
    old.rename("elsewhere")
    with pytest.raises(UserError, match=r"mlflow\.db: file is not a database"):
        tidy.main(yes=True)
    assert Path("elsewhere/run.json").exists()
    assert damaged.exists()


@pytest.mark.fault("left behind")
def test_what_killed_processes_left_goes_and_what_a_living_one_uses_stays(project):
    names = ("ray/session_2026-01-01_10-00-00_1_2", "aegan-ray-a1b2", "aegan-ray-c3d4")
    dead, private, living = (project / "tmp" / name for name in names)
    left = [
        write(Path(name)).parent if name.endswith("/f") else write(Path(name))
        for name in (
            "artifacts/.raw.999999999.tmp/f",
            "report/.index.html.999999999.tmp",
            ".dvc/tmp/exps/standalone/tmp1a2b3c4d/f",
        )
    ]
    shards = write(project / f"temporary/aegan-{os.getuid()}/shards/abc/manifest.json").parent
    kept = [write(Path(name)) for name in (".dvc/tmp/exps/run/a", "artifacts/raw/manifest.json")]
    kept.append(write(Path(f"artifacts/.raw.{os.getpid()}.tmp")))
    for folder in (dead, private, living, shards):
        write(folder / "logs/raylet.out")
        make_older(folder, 20)
    user = subprocess.Popen(
        [sys.executable, "-c", "input()", f"--dir={living}/r/session_1"], stdin=-1
    )
    try:
        tidy.main()
        assert all(path.exists() for path in (*left, dead, private, shards))
        tidy.main(yes=True)
    finally:
        user.kill()
        user.wait()
    assert [path for path in (*left, dead, private) if path.exists()] == []
    assert [path for path in (*kept, living) if not path.exists()] == []
    if not tidy.ray_is_at_work():  # of another project on this machine
        assert not shards.exists()


@pytest.mark.fault("left behind")
@pytest.mark.parametrize("at_work", ["a pipeline", "a stage", "an experiment of the queue"])
def test_nothing_is_tidied_away_under_a_run(project, at_work):
    old = make_run("aegan-0123456789ab")
    copy = project / ".dvc/tmp/exps/tmp1a2b3c4d"
    copy.mkdir(parents=True)
    code = (
        "from pipelines.base import locks\nwith locks.hold('%s'):\n print(1, flush=True)\n input()"
    )
    works = {
        "a pipeline": code % locks.PIPELINE,
        "a stage": code % "train",
        "an experiment of the queue": "print(1, flush=True); input()",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", works[at_work]],
        cwd=copy if "queue" in at_work else project,
        env={**os.environ, "PYTHONPATH": str(Path(tidy.__file__).parents[2])},
        stdin=-1,
        stdout=-1,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=f"is at work .*process {process.pid}"):
            tidy.main(yes=True)
    finally:
        process.kill()
        process.communicate()
    assert (old / "run.json").exists()
    assert copy.exists()
