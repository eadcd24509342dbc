"""What is shipped with a job, what names it, and what is said before anything is submitted."""

import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipelines import job, ray_jobs, shipment, submit
from pipelines.errors import UserError

PARAMS = Path(__file__).parent.parent.parent / "params.yaml"
LOCK = PARAMS.with_name("requirements.lock")


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository as the working folder: code, parameters, and much that is nobody's business."""
    monkeypatch.chdir(tmp_path)
    files = {
        "aegan/losses.py": "a = 1\n",
        "params.yaml": PARAMS.read_text(),
        "dvc.yaml": "stages: {}\n",
        "presets/small.yaml": "training: {}\n",
        "README.md": "read me\n",
        "docs/method.md": "method\n",
        "tests/test_losses.py": "assert True\n",
        ".env": "PASSWORD=1\n",
        "infra/.env.production": "PASSWORD=2\n",
        "aegan/.env": "PASSWORD=3\n",
        "server.pem": "key\n",
        "artifacts/raw/images.bin": "images\n",
        "runs/aegan-1/metrics.jsonl": "{}\n",
        ".venv/bin/python": "python\n",
    }
    for name, content in files.items():
        write(name, content)
    git("init", "--quiet")
    git("add", "--force", ".")
    return tmp_path


def write(name: str, content: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(content)


def name_of_job() -> str:
    return job.content_id(shipment.hash_files(shipment.shipped_files()), shipment.read_lock())


def test_code_and_parameters_are_shipped_but_no_secrets_data_or_documents(project):
    expected = {"aegan/losses.py", "dvc.yaml", "params.yaml", "presets/small.yaml"}
    assert shipment.shipped_files().keys() == expected


def test_files_are_shipped_as_they_are_now_not_as_they_were_committed(project):
    write("aegan/losses.py", "a = 2\n")
    Path("presets/small.yaml").unlink()
    write("dvc.lock", "schema: '2.0'\n")  # which git may not know yet
    files = shipment.shipped_files()
    assert files["aegan/losses.py"] == b"a = 2\n"
    assert files["dvc.lock"] == b"schema: '2.0'\n"
    assert "presets/small.yaml" not in files


def test_new_files_stay_here_until_git_knows_them_and_are_named(project):
    write("aegan/new.py", "b = 1\n")
    write("tests/test_new.py", "b = 1\n")
    write(".gitignore", "*.log\n")
    write("output.log", "words\n")
    git("add", ".gitignore")
    assert shipment.unknown_files() == ["aegan/new.py"]
    assert "aegan/new.py" not in shipment.shipped_files()
    git("add", "aegan/new.py")
    assert shipment.unknown_files() == []
    assert "aegan/new.py" in shipment.shipped_files()


@pytest.mark.parametrize("name", ["aegan/losses.py", "params.yaml", "dvc.lock", "aegan/added.py"])
def test_a_jobs_name_changes_with_code_parameters_and_data(project, name):
    before = name_of_job()
    write(name, "c = 3\n")
    git("add", name)
    assert name_of_job() != before


def test_a_renamed_file_is_another_job(project):
    before = name_of_job()
    Path("aegan/losses.py").rename("aegan/terms.py")
    git("add", "aegan")
    assert name_of_job() != before


def test_a_jobs_name_does_not_change_with_anything_else(project, monkeypatch):
    before = name_of_job()
    write("README.md", "another text\n")
    write("artifacts/raw/images.bin", "other images\n")
    write(".env", "PASSWORD=changed\n")
    os.utime("aegan/losses.py", (0, 0))
    monkeypatch.setenv("RAY_ADDRESS", "http://another:8265")
    git("-c", "user.name=A", "-c", "user.email=a@localhost", "commit", "--message", "Start")
    assert name_of_job() == before


def test_the_results_of_a_job_lead_to_a_name_with_the_same_files(project):
    files = shipment.shipped_files()
    write("dvc.lock", "schema: '2.0'\n")
    assert shipment.hash_files(shipment.shipped_files()) == shipment.hash_files(files)


def test_equal_files_make_equal_packages_that_unpack_to_them(project, tmp_path):
    files = shipment.shipped_files()
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    shipment.write_package(files, first)
    shipment.write_package(dict(reversed(files.items())), second)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files


def test_too_much_to_ship_names_the_largest_file(project, monkeypatch):
    monkeypatch.setattr(shipment, "MAX_SHIPPED_BYTES", 100)
    with pytest.raises(UserError, match=r"the largest file is params\.yaml: data belongs into"):
        shipment.shipped_files()


def test_a_folder_without_git_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match=r"git cannot list the files to ship: .*not a git repo"):
        shipment.shipped_files()


def test_without_a_bucket_the_error_says_what_is_needed(project):
    with pytest.raises(UserError, match=r"needs a bucket .* set `storage: s3://bucket/prefix`"):
        submit.main([])


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_an_address_that_is_no_dashboards_is_one_clear_error(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is '{address}': expected .*http://host"):
        ray_jobs.connect()


def test_attempts_of_a_job_are_numbered_and_lead_back_to_it():
    content = "aegan-0123456789ab"
    names = [ray_jobs.attempt_id(content, number) for number in (1, 2, 11)]
    assert names == [content, f"{content}-2", f"{content}-11"]
    assert {ray_jobs.without_attempt(name) for name in names} == {content}
    for other in ("raysubmit_4LamXRuQpYdSMg7J", "aegan-0123456789ab-", "aegan-12"):
        with pytest.raises(UserError, match="expected the id of a job"):
            ray_jobs.without_attempt(other)


def test_the_installed_packages_are_those_of_the_lock_whatever_their_build():
    job.check_versions(LOCK)


def test_other_versions_than_the_locks_are_named_with_the_cure(tmp_path):
    other = re.sub(r"^(torch|ray)==.*$", r"\1==9.9.9", LOCK.read_text(), flags=re.MULTILINE)
    (tmp_path / "other.lock").write_text(other)
    with pytest.raises(UserError) as error:
        job.check_versions(tmp_path / "other.lock")
    assert re.search(
        r"torch [\d.]+ \(locked: 9.9.9\), ray [\d.]+ \(locked: 9.9.9\);", str(error.value)
    )
    assert "aegan submit --install" in str(error.value)
    assert job.installed_version("a-package-that-nobody-has") == ""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without git as a job has it: three outputs, of which DVC does not store one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(PARAMS.parent))  # a job's folder holds the code
    pipeline = {
        "good": {
            "cmd": "echo '{\"score\": 0.5}' > scores.json; echo 7 > version.txt; mkdir images",
            "outs": ["images", {"version.txt": {"cache": False}}],
            "metrics": ["scores.json"],
        },
        "bad": {"cmd": "echo 'error: no images in set/'; exit 3"},
    }
    write("dvc.yaml", json.dumps({"stages": pipeline}))
    Path(".dvc").mkdir()
    write(".dvc/config.local", job.dvc_config(str(tmp_path / "bucket")))
    return tmp_path


def test_a_result_holds_lock_metrics_and_what_dvc_does_not_store(stages):
    job.run_dvc("repro", "good")
    assert job.collect_result() == {
        "dvc_lock": Path("dvc.lock").read_text(),
        "outputs": ["images", "scores.json"],
        "files": {"version.txt": "7\n"},
        "metrics": {"scores.json": {"score": 0.5}},
    }


def test_a_failed_stages_own_words_are_the_reason(stages, capfd):
    with pytest.raises(UserError, match=r"^dvc repro failed: no images in set/$"):
        job.run_dvc("repro", "bad")
    assert "Running stage 'bad'" in capfd.readouterr().out


def test_where_no_stage_speaks_the_reason_is_dvcs(stages):
    Path("dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"^dvc repro failed: 'dvc\.yaml' does not exist$"):
        job.run_dvc("repro", "good")
