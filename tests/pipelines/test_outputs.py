import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aegan import model_folder, onnx_export
from pipelines.base import locks, outputs
from pipelines.base.errors import UserError
from pipelines.base.files import new_folder, project_folder
from pipelines.base.outputs import EXPLORE, FOLDERS, RAW, TRAIN
from pipelines.project import clean

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder is a project's, with one file of every stage in every output."""
    monkeypatch.chdir(tmp_path)
    for folder, patterns in FOLDERS.items():
        for pattern in patterns:
            _write(folder / pattern.replace("[0-9]*", "00000"))
    return tmp_path


def _write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("content")
    return path


def test_what_the_stages_write_is_not_taken_for_a_source_of_the_users(project):
    outputs.check_folders()


def test_all_files_of_a_model_and_all_networks_are_known_as_what_stages_write():
    files = [model_folder.CONFIG, *model_folder.FILES.values(), *model_folder.OPTIONAL]
    for name in files:
        assert outputs.is_written(f"{TRAIN}/model/{name}")
    for name in onnx_export.NETWORKS:
        assert outputs.is_written(f"{EXPLORE}/{name}.onnx")


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("name", ["a.png", "faces/b.jpg", ".hidden.png"])
def test_a_picture_in_an_output_folder_stops_every_run_and_stays_as_a_source(project, folder, name):
    picture = _write(folder / name)
    with pytest.raises(UserError, match=f"{folder} is an output, .* holds files of yours: {name};"):
        outputs.check_folders()
    with (
        pytest.raises(UserError, match="holds files of yours"),
        new_folder(folder, written=FOLDERS[folder]) as temporary,
    ):
        _write(temporary / "manifest.json")
    assert picture.read_text() == "content"


def test_a_link_in_an_output_folder_counts_as_the_users_source(project):
    (RAW / "pictures").symlink_to(project)
    with pytest.raises(UserError, match="holds files of yours: pictures;"):
        outputs.check_folders()


def test_a_picture_that_came_while_a_stage_ran_is_not_replaced(project):
    def work() -> None:
        with new_folder(RAW, written=FOLDERS[RAW]) as temporary:
            _write(temporary / "manifest.json")
            _write(RAW / "late.png")

    with pytest.raises(UserError, match=r"holds files of yours: late\.png;"):
        work()
    assert (RAW / "late.png").exists()


def test_many_names_of_a_source_are_listed_in_short():
    assert outputs.listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


@pytest.mark.fault("killed processes")
def test_what_a_killed_process_left_aside_goes_with_the_next_folder(project):
    left_over = _write(Path("artifacts/.raw.999999999.tmp/files-00000.parquet"))
    with new_folder(RAW, written=FOLDERS[RAW]) as temporary:
        _write(temporary / "manifest.json")
    assert not left_over.exists()


def test_clean_removes_what_runs_wrote_and_never_a_picture(project, capsys):
    mine = [
        *(
            _write(Path(name))
            for name in ("data/my_faces/a.png", "data/raw/b.png", "artifacts/c.png")
        ),
        *(_write(Path(name)) for name in ("artifacts/raw/d.png", "runs/e.png", "report/notes.txt")),
        *(
            _write(Path(name))
            for name in ("runs/aegan-0123456789ab/f.png", "mlflow.db", "my/dvc.lock")
        ),
    ]
    theirs = [
        *(_write(Path("runs/aegan-0123456789ab") / name) for name in (
            "run.json", "metrics.jsonl", "checkpoints/step-00000002/state.safetensors",
            "samples/step-00000002-samples.png", "driver.lock",
        )),
        *(_write(Path(name)) for name in ("dvc.lock", "report/index.html", "tune/dvc.lock")),
        _write(Path("runs/preprocess-0123456789abcdef/part-000000.parquet")),
    ]  # fmt: skip
    clean.main()
    assert [file for file in mine if not file.exists()] == []
    assert [file for file in theirs if file.exists()] == []
    left = {file for file in project.rglob("*") if file.is_file()}
    assert left == {project / file for file in mine}
    said = capsys.readouterr().out
    assert "removed from artifacts/raw: files-00000.parquet, manifest.json" in said
    assert "kept in artifacts, for no run has written it: c.png, raw/d.png" in said
    assert "kept in runs, for no run has written it: aegan-0123456789ab/f.png, e.png" in said


def test_make_clean_needs_no_environment_and_keeps_the_source(tmp_path):
    for name in ("aegan", "pipelines", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    picture = _write(tmp_path / "data/my_faces/a.png")
    _write(tmp_path / "artifacts/raw/manifest.json")
    base = f"PYTHON={Path(sys.base_prefix) / 'bin/python3'} -S"  # without any package
    done = subprocess.run(
        ["make", "clean", base], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert picture.exists()
    assert not (tmp_path / "artifacts").exists()


def test_the_source_of_a_run_in_a_copy_of_dvcs_is_looked_for_in_the_original(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmp123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert project_folder() == tmp_path
    monkeypatch.chdir(tmp_path)
    assert project_folder() == tmp_path


HOLDER = """
import sys
from pipelines.base import locks
with locks.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Starts a process that holds a lock of the project."""
    monkeypatch.chdir(tmp_path)
    processes = []

    def start(name: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, name],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_and_told_which_process_is_at_work_with_the_source(holder):
    first = holder(locks.PIPELINE)
    with (
        pytest.raises(
            UserError, match=rf"another run is at work .*: process {first.pid} on .*since"
        ),
        locks.hold(locks.PIPELINE),
    ):
        pass


def test_locks_need_nothing_that_nfs_refuses(tmp_path, monkeypatch):
    def as_on_nfs(descriptor: int, how: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # for an exclusive lock
        local(descriptor, how)

    local = fcntl.flock
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with locks.hold("train"):
        pass
    locks.check_stages()
    with locks.hold("train"), pytest.raises(locks.HeldError, match="stage train"):
        locks.check_stages()


@pytest.mark.fault("killed processes")
def test_a_stage_whose_dvc_was_killed_keeps_others_from_its_source(holder):
    orphan = holder("preprocess")
    with pytest.raises(
        UserError, match=f"process of the stage preprocess .*: process {orphan.pid}"
    ):
        locks.check_stages()
    orphan.kill()
    orphan.wait()
    locks.check_stages()  # a lock ends with its process
    with locks.hold("preprocess"):
        pass
