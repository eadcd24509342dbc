"""The reference split: cut once, kept under its hash, whatever becomes of the data."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aegan.data import dataset
from aegan.files import sha256_of
from pipelines.base.errors import UserError
from pipelines.registry import reference
from tests.shards import write_shards
from tests.trained import ROOT

SHARDS = Path("artifacts/shards")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(test=20)
    return tmp_path


def write(*, test: int, validation: int = 4, size: int = 16, channels: int = 3) -> None:
    """Shards of random images, the first of which are the same for all numbers."""
    random = np.random.default_rng(0)
    counts = {"test": test, "validation": validation, "train": 4}
    shape = (size, size, channels)
    images = {
        split: random.integers(0, 256, (rows, *shape), np.uint8) for split, rows in counts.items()
    }
    shutil.rmtree(SHARDS, ignore_errors=True)
    write_shards(SHARDS, images)


def test_it_holds_the_test_images_and_stays_when_data_grows() -> None:
    first = reference.current_or_first(SHARDS)
    assert first.sha256 == sha256_of(Path("reference") / f"{first.sha256}.parquet")
    ids = dataset.load_columns(SHARDS, "test", ["image_id"])["image_id"]
    images = dataset.load_images(SHARDS, "test")[np.argsort(ids)]
    np.testing.assert_array_equal(first.images.numpy(), images)
    write(test=30)
    later = reference.current_or_first(SHARDS)
    assert (later.sha256, len(later.images)) == (first.sha256, 20)
    assert later.facts == first.facts


def test_another_one_is_cut_for_a_reason_and_the_old_one_stays() -> None:
    first = reference.current_or_first(SHARDS)
    reference.keep_noise(first, {"shares": {"x": 0.1}, "seeds": [1], "steps": 2})
    write(test=30)
    second = reference.cut(SHARDS, reason="more kinds of faces")
    assert second.facts["reason"] == "more kinds of faces"
    assert second.noise == {}
    assert len(list(Path("reference").glob("*.parquet"))) == 2
    write(test=20)  # cut again, the first one is itself, with what is known of it
    again = reference.cut(SHARDS, reason="back")
    assert (again.sha256, again.facts["reason"]) == (first.sha256, "the first one")
    assert again.noise["shares"] == {"x": 0.1}


@pytest.mark.parametrize("missing", ["json", "parquet"])
def test_one_that_was_cut_off_between_its_two_files_is_cut_again(missing: str) -> None:
    first = reference.current_or_first(SHARDS)
    reference.keep_noise(first, {"shares": {"x": 0.1}, "seeds": [1], "steps": 2})
    Path(f"reference/{first.sha256}.{missing}").unlink()
    with pytest.raises(UserError, match="reference new"):
        reference.current()
    Path("reference/current.json").unlink()
    again = reference.current_or_first(SHARDS)
    assert again.sha256 == first.sha256
    assert again.facts["reason"] == reference.FIRST
    assert bool(again.noise) == (missing == "parquet")


def test_an_altered_one_is_put_right_by_cutting_it_again() -> None:
    first = reference.current_or_first(SHARDS)
    Path(f"reference/{first.sha256}.parquet").write_bytes(b"altered")
    assert reference.cut(SHARDS, reason="again").sha256 == first.sha256
    assert reference.current_or_first(SHARDS).facts == first.facts


def test_it_does_not_depend_on_the_order_of_the_images() -> None:
    first = reference.cut(SHARDS, reason="one")
    images = dataset.load_images(SHARDS, "test")[::-1]
    write_shards(SHARDS, {"test": images, "train": images[:4]})
    assert reference.cut(SHARDS, reason="two").sha256 == first.sha256


def test_it_is_of_no_more_images_and_bytes_than_a_gate_can_bear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "MAX_IMAGES", 12)
    assert len(reference.cut(SHARDS, reason="x").images) == 12
    monkeypatch.setattr(reference, "MAX_BYTES", 9 * 16 * 16 * 3)
    assert len(reference.cut(SHARDS, reason="x").images) == 9


def test_gray_images_and_validation_images_will_do_and_a_handful_will_not() -> None:
    write(test=1, validation=9, channels=1)
    found = reference.current_or_first(SHARDS)
    assert (found.images.shape, found.facts["split"]) == ((9, 16, 16, 1), "validation")
    write(test=7, validation=9)
    with pytest.raises(UserError, match=r"fewer than 8 test images.*raise preprocess.test_frac"):
        reference.cut(SHARDS, reason="x")


@pytest.mark.fault("damaged files")
def test_an_altered_file_is_refused(record_property: object) -> None:
    found = reference.current_or_first(SHARDS)
    file = Path("reference") / f"{found.sha256}.parquet"
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (bytes(flipped), content[:-1], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"not what its name says.*dvc checkout reference.dvc"):
            reference.current()
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        reference.current()
    for name in ('{"sha256": "../../x"}', "{", "[]", '{"sha256": 3}'):
        Path("reference/current.json").write_text(name)
        with pytest.raises(UserError, match=r"names no reference|is damaged"):
            reference.current()


def test_a_file_with_the_right_name_that_holds_no_images_is_refused() -> None:
    reference.current_or_first(SHARDS)

    content = b"no Parquet"
    name = hashlib.sha256(content).hexdigest()
    (Path("reference") / f"{name}.parquet").write_bytes(content)
    Path("reference/current.json").write_text(f'{{"sha256": "{name}"}}')
    with pytest.raises(UserError, match="holds no images"):
        reference.current()


@pytest.fixture
def dvc(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as a repository of git and DVC with a remote."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(project / "site"))
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
    shutil.copy(ROOT / ".gitignore", ".gitignore")
    subprocess.run(["git", "init", "--quiet"], check=True)
    remote = f"    remote = there\n['remote \"there\"']\n    url = {project / 'there'}\n"
    with Path(".dvc/config").open("a") as config:  # whose last section is `core`
        config.write(remote)
    return project


def run_dvc(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pipelines.project.dvc_command", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_clone_gets_it_from_dvc_and_never_cuts_its_own(
    dvc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = Path(".gitignore").read_text()
    first = reference.current_or_first(SHARDS)
    assert Path(".gitignore").read_text() == ignored  # DVC has nothing to add
    status = subprocess.run(
        ["git", "status", "--short"], capture_output=True, text=True, check=True
    )
    assert "reference.dvc" in status.stdout
    assert "reference/" not in status.stdout
    run_dvc("push", cwd=dvc)
    clone = tmp_path / "clone"
    shutil.copytree(dvc, clone, ignore=shutil.ignore_patterns("reference", "cache", "clone"))
    monkeypatch.chdir(clone)
    with pytest.raises(UserError, match=r"dvc pull reference.dvc"):
        reference.current_or_first(SHARDS)
    with pytest.raises(UserError, match=r"dvc pull reference.dvc"):
        reference.cut(SHARDS, reason="without the old ones")
    run_dvc("pull", cwd=clone)
    assert reference.current_or_first(SHARDS).sha256 == first.sha256
