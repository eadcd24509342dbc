"""What is said of a machine that is too small, and that it is said before a training."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aegan.config import ComputeConfig
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.cluster import checks
from tests.disks import small_disk
from tests.tiny import PARAMS

COMPUTE = params.load(ComputeConfig, PARAMS)


def control_group(folder: Path, **files: int | str) -> Path:
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    return folder


def within(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(checks, "_control_groups", lambda: iter([folder]))


GIB = 2**30


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(PARAMS, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)


@pytest.mark.fault("killed processes")
@pytest.mark.parametrize(
    "names",
    [
        ("memory__max", "memory__current", "inactive_file"),
        ("memory__limit_in_bytes", "memory__usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_memory_of_a_container_is_its_limit_without_the_cache_of_files(
    tmp_path, monkeypatch, names
):
    limit, used, cache = names
    folder = control_group(tmp_path / "group", **{limit: 2 * GIB, used: GIB})
    (folder / "memory.stat").write_text(f"anon 1\n{cache} {GIB // 2}\n")
    within(monkeypatch, folder)
    assert checks.memory_bounds() == (2 * GIB, 3 * GIB // 2)
    finding = checks.memory()
    assert (finding.status, finding.found) == ("warn", "1.5 GiB of 2.0 GiB free")
    assert "training.batch_size, compute.micro_batch_size (training.reader" in finding.cure


def test_groups_without_a_limit_leave_the_machines_memory(tmp_path, monkeypatch):
    total = checks.psutil.virtual_memory().total
    for name, no_limit in (("memory__max", "max"), ("memory__limit_in_bytes", 2**63 - 4096)):
        within(monkeypatch, control_group(tmp_path / name, **{name: no_limit}))
        assert checks.memory_bounds()[0] == total


def test_the_groups_of_this_process_are_found():
    assert all(folder.is_dir() for folder in checks._control_groups())


@pytest.mark.fault("killed processes")
def test_a_training_that_would_run_out_of_memory_does_not_begin(tmp_path, monkeypatch):
    within(
        monkeypatch,
        control_group(tmp_path / "group", memory__max=GIB, memory__current=GIB - 2**28),
    )
    with pytest.raises(UserError, match=r"^memory: 0\.2 GiB of 1\.0 GiB free; end other programs"):
        checks.before_training()


@pytest.mark.fault("disk full")
def test_a_training_on_a_full_disk_does_not_begin(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", kilobytes=64):
        shutil.copy(PARAMS, tmp_path / "disk")
        monkeypatch.chdir(tmp_path / "disk")
        with pytest.raises(UserError, match=r"^disk: 0\.0 GiB free in .*; free some, or link"):
            checks.before_training()


def test_a_small_disk_is_enough_if_what_runs_write_is_linked_to_a_larger_one(tmp_path, monkeypatch):
    larger = tmp_path / "larger"
    larger.mkdir()
    with small_disk(tmp_path / "disk", kilobytes=64):
        monkeypatch.chdir(tmp_path / "disk")
        Path(".dvc").mkdir()
        for folder in ("artifacts", "runs", ".dvc/cache"):  # DVC keeps a copy of all artifacts
            assert f"free in {tmp_path}/disk" in checks.disk(*checks.WRITTEN).found
            Path(folder).symlink_to(larger)
        assert checks.disk(*checks.WRITTEN).found.endswith(f"free in {larger}")
        assert checks.disk(*checks.WRITTEN).status != "fail"
        monkeypatch.chdir(tmp_path)


@pytest.mark.fault("disk full")
def test_a_small_shared_memory_is_a_warning_with_its_cure(tmp_path):
    with small_disk(tmp_path / "shm", kilobytes=64):
        finding = checks.shared_memory(tmp_path / "shm")
    assert finding.status == "warn"
    assert "docker run --shm-size=1g" in finding.cure
    assert checks.shared_memory(tmp_path / "none").found == "not there"


@pytest.mark.fault("ray addresses")
def test_where_no_folder_for_rays_sockets_is_short_enough_one_line_says_so(monkeypatch):
    monkeypatch.setattr("pipelines.cluster.session.MAX_PLACE_BYTES", 3)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"at most 3 bytes .*: set RAY_TMPDIR to one"):
        checks.before_training()


@pytest.mark.parametrize(
    ("changes", "gpus", "sentence"),
    [
        (
            {"num_workers": 3},
            0,
            "num_workers is 3, but there are 2 CPUs; lower compute.num_workers",
        ),
        (
            {"num_workers": 5, "min_workers": 3},
            0,
            "min_workers is 3, but there are 2 CPUs; lower compute.min_workers",
        ),
        (
            {"device": "cuda"},
            0,
            "num_workers is 1, but there are 0 GPUs; lower compute.num_workers or set "
            "compute.device: cpu",
        ),
        (
            {"num_workers": 2},
            1,
            "num_workers is 2, but there are 1 GPUs; lower compute.num_workers or set "
            "compute.device: cpu",
        ),
    ],
)
def test_workers_that_find_no_place_on_this_machine_are_named_with_the_cure(
    changes, gpus, sentence
):
    finding = checks.places(replace(COMPUTE, **changes), {"CPU": 2, "GPU": gpus})
    with pytest.raises(UserError, match=f"^cores and GPUs: compute.{sentence}$"):
        checks.require(finding)


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, 0),
        ({"num_workers": 2}, 0),
        ({"num_workers": 9, "min_workers": 2}, 0),
        ({"num_workers": 2, "device": "cpu"}, 1),
        ({"gpus_per_worker": 0.5}, 1),
    ],
)
def test_workers_that_find_a_place_each_are_let_through(changes, gpus):
    found = checks.places(replace(COMPUTE, **changes), {"CPU": 2, "GPU": gpus})
    assert found.status == "ok"
