"""What someone who can write the bucket that is a DVC remote may put there: real DVC, real S3."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from ruamel.yaml import YAML

from pipelines import submit
from pipelines.base.errors import UserError
from pipelines.bucket import storage
from pipelines.jobs import job_result
from pipelines.jobs.job_result import JobResult
from tests.s3 import s3_server

pytestmark = [pytest.mark.integration, pytest.mark.fault("names from outside")]
ROOT = Path(__file__).parent.parent.parent
CONFIG = (
    "[core]\n    no_scm = true\n    remote = storage\n    analytics = false\n"
    "['remote \"storage\"']\n    url = s3://remote/dvc\n"
)
STAGE = (
    "stages:\n  make:\n    cmd: mkdir -p out && echo made > out/a.txt && echo made > b.txt\n"
    "    deps: [in.txt]\n    outs: [out, b.txt]\n"
)
EVIL = b"evil"


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Remote:
    """A DVC remote that an attacker writes; what he has changed is put back at the end."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket="remote")
        self.lock = ""
        self.before: dict[str, bytes] = {}

    def list(self) -> Sequence[str]:
        found = self._client.list_objects_v2(Bucket="remote").get("Contents", [])
        return [item["Key"] for item in found]

    def read(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket="remote", Key=key)["Body"].read()
        return content

    def write(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket="remote", Key=key, Body=content)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket="remote", Key=key)

    def add(self, content: bytes, end: str = "") -> str:
        """An object under its own hash."""
        name = md5(content)
        self.write(f"dvc/files/md5/{name[:2]}/{name[2:]}{end}", content)
        return f"{name}{end}"

    def add_list(self, *entries: Any) -> str:
        return self.add(json.dumps(entries).encode(), ".dir")

    def restore(self) -> None:
        for key in set(self.list()) - self.before.keys():
            self.delete(key)
        for key, content in self.before.items():
            self.write(key, content)


def make_project(folder: Path, lock: str = "") -> Path:
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text(CONFIG)
    (folder / "dvc.yaml").write_text(STAGE)
    (folder / "in.txt").write_text("in")
    if lock:
        (folder / "dvc.lock").write_text(lock)
    return folder


def dvc(folder: Path, remote: Remote, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.project.dvc_command", *arguments],
        cwd=folder,
        env=remote.environment | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """A remote that holds what one stage made, and its entry of the run cache."""
    with s3_server() as address:
        remote = Remote(
            {
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path_factory.mktemp("home")),
                "DVC_SITE_CACHE_DIR": str(tmp_path_factory.mktemp("site")),
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        )
        project = make_project(tmp_path_factory.mktemp("honest") / "project")
        for command in (["repro"], ["push", "--run-cache"]):
            code, output = dvc(project, remote, *command)
            assert code == 0, output
        remote.lock = (project / "dvc.lock").read_text()
        remote.before = {key: remote.read(key) for key in remote.list()}
        yield remote


@pytest.fixture
def remote(honest: Remote) -> Iterator[Remote]:
    yield honest
    honest.restore()


def hash_of(path: str, lock: str) -> str:
    outputs = YAML(typ="safe").load(lock)["stages"]["make"]["outs"]
    return str(next(item["md5"] for item in outputs if item["path"] == path))


def below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if ".dvc" not in path.parts}


def test_what_is_honest_in_a_bucket_is_pulled(remote, tmp_path):
    project = make_project(tmp_path / "project", remote.lock)
    assert dvc(project, remote, "pull")[0] == 0
    assert (project / "out/a.txt").read_text() == (project / "b.txt").read_text() == "made\n"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"relpath": "../../escaped.txt"}, "names ../../escaped.txt, which is none of its files"),
        (
            {"relpath": "b.txt", "md5": "../../../../../escaped"},
            "is no hash: find out who wrote it",
        ),
    ],
)
def test_a_list_of_files_in_a_bucket_writes_nothing_outside_its_folder(
    remote, tmp_path, entry, reason
):
    """The `.dir` object that dvc.lock names is what its hash says, and hostile."""
    evil = remote.add(EVIL)
    listed = remote.add_list({"md5": evil, "relpath": "a.txt"}, {"md5": evil} | entry)
    lock = remote.lock.replace(hash_of("out", remote.lock), listed)
    project = make_project(tmp_path / "a" / "b" / "project", lock)
    code, output = dvc(project, remote, "pull")
    assert code != 0
    assert reason in output
    assert below(tmp_path) == {f"a/b/project/{name}" for name in ("dvc.yaml", "dvc.lock", "in.txt")}


@pytest.mark.fault("bucket")
def test_an_object_in_a_bucket_that_is_not_what_its_name_says_is_not_taken(remote, tmp_path):
    for number, path in enumerate(("b.txt", "out")):
        name = hash_of(path, remote.lock)
        evil = json.dumps([{"md5": remote.add(EVIL), "relpath": "a.txt"}]).encode()
        remote.write(f"dvc/files/md5/{name[:2]}/{name[2:]}", evil)
        project = make_project(tmp_path / str(number), remote.lock)
        code, output = dvc(project, remote, "pull")
        assert code != 0
        assert "is not what its name says" in output
        assert EVIL not in {file.read_bytes() for file in project.rglob("*.txt")}
        assert not (project / path).exists()
        remote.restore()


@pytest.mark.parametrize("path", ["code.py", "../stolen.txt"])
def test_the_run_cache_in_a_bucket_writes_no_file_that_is_no_output(remote, tmp_path, path):
    """`dvc repro --pull`, which every job on a cluster runs."""
    (entry,) = (key for key in remote.list() if key.startswith("dvc/runs/"))
    more = f"- path: {path}\n  hash: md5\n  md5: {remote.add(EVIL)}\n  size: 4\n"
    remote.write(entry, remote.read(entry) + more.encode())
    project = make_project(tmp_path / "project")
    code, output = dvc(project, remote, "repro", "--pull")
    assert code == 0, output
    assert "the stage runs instead" in output
    assert (project / "out/a.txt").read_text() == "made\n"
    assert EVIL not in {file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}


def test_a_name_in_the_run_cache_in_a_bucket_writes_no_file(remote, tmp_path):
    remote.write("dvc/runs/ab/../../../../../escaped.txt", EVIL)
    remote.write(f"dvc/runs/ab/{'a' * 64}/../../../../../../escaped.txt", EVIL)
    remote.write("dvc/runs/ab/x", EVIL)
    project = make_project(tmp_path / "a" / "b" / "project")
    code, output = dvc(project, remote, "repro", "--pull")
    assert code == 0, output
    assert output.count("is no entry of the run cache: left out") == 3
    assert "Stage 'make' is cached - skipping run" in output  # the honest entry serves
    assert {path.name for path in tmp_path.rglob("escaped*")} == set()
    assert not list(project.rglob(".dvc/cache/runs/ab"))


# A job's result: dvc.lock, outputs and small files of this project's own stages.

FOLDERS = {
    "artifacts/raw": ["manifest.json", "files-00000.parquet"],
    "artifacts/shards": ["manifest.json", "train-00000.parquet"],
    "artifacts/train/model": ["config.json", "ema.safetensors", "weights.safetensors"],
    "artifacts/train/samples": ["step-00000008-samples.png"],
    "artifacts/interpolate": ["index.json"],
    "artifacts/explore": ["generator.onnx"],
}
REGISTRATION = "artifacts/register/registration.json"


def honest_result(remote: Remote, **folders: list[str]) -> JobResult:
    """A job's result whose outputs, all tiny, are in the remote."""
    stages = {}
    for stage, outputs in job_result._stages().items():
        items = []
        for path, _ in outputs:
            names = folders.get(path, FOLDERS.get(path))
            name = (
                remote.add_list(*({"md5": remote.add(b"text"), "relpath": name} for name in names))
                if names
                else remote.add(path.encode())
            )
            items.append({"path": path, "hash": "md5", "md5": name})
        stages[stage] = {"cmd": "x", "deps": [{"path": "aegan", "md5": "0" * 32}], "outs": items}
    return JobResult(
        job="aegan-0123456789ab",
        files_sha256="0" * 64,
        dvc_lock=json.dumps({"schema": "2.0", "stages": stages}),
        outputs=[
            path
            for outputs in job_result._stages().values()
            for path, in_remote in outputs
            if in_remote
        ],
        files={REGISTRATION: "{}"},
    )


@pytest.fixture
def project(remote, tmp_path, monkeypatch) -> Path:
    """A copy of this project's own stages, with a dvc.lock of before."""
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvcignore", "dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    with (folder / ".dvc/config").open("a") as config:
        config.write("    no_scm = true\n")
    for name in ("aegan", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    monkeypatch.chdir(folder)
    for name, value in remote.environment.items():
        monkeypatch.setenv(name, value)
    return folder


def fetch(result: JobResult) -> None:
    content = json.dumps(vars(result)).encode()
    submit.fetch(job_result.parse(content, origin="it"), "s3://remote", files_sha256="")


def test_the_result_of_a_job_in_a_bucket_is_fetched_if_it_is_honest(remote, project):
    result = honest_result(remote)
    fetch(result)
    assert (project / "dvc.lock").read_text() == result.dvc_lock
    assert (project / REGISTRATION).read_text() == "{}"
    expected = {f"{folder}/{name}" for folder, names in FOLDERS.items() for name in names}
    files = {path.relative_to(project).as_posix() for path in project.glob("artifacts/**/*.*")}
    assert expected <= files
    assert (project / "report/index.html").read_text() == "report/index.html"


def test_a_folder_of_a_job_in_a_bucket_holds_what_stages_write_and_no_more(remote, project):
    before, result = below(project), honest_result(remote)
    (stored,) = (o["md5"] for o in outputs_of(json.loads(result.dvc_lock), "download"))
    remote.delete(f"dvc/files/md5/{stored[:2]}/{stored[2:]}")
    with pytest.raises(UserError, match=r"artifacts/raw that is not in the bucket: delete|failed"):
        fetch(result)
    names = ["config.json", "sitecustomize.py"]
    with pytest.raises(UserError, match=r"names .*/sitecustomize.py, which no stage writes"):
        fetch(honest_result(remote, **{"artifacts/train/model": names}))
    assert below(project) == before
    assert "stages: {}" in (project / "dvc.lock").read_text()  # as it was


def with_lock(result: JobResult, change: Any) -> dict[str, Any]:
    lock = json.loads(result.dvc_lock)
    change(lock)
    return {"dvc_lock": json.dumps(lock)}


def outputs_of(lock: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = lock["stages"][stage]["outs"]
    return outputs


HOSTILE: dict[str, Any] = {
    "a file beside the outputs": lambda r: {"files": {"artifacts/train/run.json": "{}"}},
    "a file above": lambda r: {"files": {"../x": "{}"}},
    "an absolute file": lambda r: {"files": {"/tmp/x": "{}"}},
    "a file below artifacts": lambda r: {"files": {"artifacts/../pipelines/jobs/job.py": "{}"}},
    "code": lambda r: {"files": {"pipelines/jobs/job.py": "{}"}},
    "no text": lambda r: {"files": {REGISTRATION: ["x"]}},
    "no files": lambda r: {"files": None},
    "a huge file": lambda r: {"files": {REGISTRATION: "x" * 2**21}},
    "an option": lambda r: {"outputs": ["--help"]},
    "another output": lambda r: {"outputs": ["pipelines/jobs/job.py"]},
    "no outputs": lambda r: {"outputs": []},
    "outputs twice": lambda r: {"outputs": r.outputs * 2},
    "numbers": lambda r: {"outputs": [1]},
    "no lock": lambda r: {"dvc_lock": "{"},
    "a lock of aliases": lambda r: {"dvc_lock": "a: &a [*a]\n"},
    "a list": lambda r: {"dvc_lock": "[]"},
    "another stage": lambda r: with_lock(
        r, lambda k: k["stages"].update(evil=k["stages"]["train"])
    ),
    "data sets": lambda r: with_lock(r, lambda k: k.update(datasets=[{"name": "x"}])),
    "one output more": lambda r: with_lock(
        r, lambda k: outputs_of(k, "train").append({"path": "x.py", "md5": "0" * 32})
    ),
    "one output less": lambda r: with_lock(r, lambda k: outputs_of(k, "train").pop()),
    "an output elsewhere": lambda r: with_lock(
        r, lambda k: outputs_of(k, "train")[0].update(path="../../x")
    ),
    "a list in the lock": lambda r: with_lock(
        r, lambda k: outputs_of(k, "train")[0].update(files=[{"relpath": "../x", "md5": "0" * 32}])
    ),
    "a hash that is a path": lambda r: with_lock(
        r, lambda k: outputs_of(k, "train")[0].update(md5="../../../../x.dir")
    ),
    "another remote": lambda r: with_lock(
        r, lambda k: outputs_of(k, "train")[0].update(cloud={"evil": {"etag": "x"}})
    ),
    "a dependency elsewhere": lambda r: with_lock(
        r, lambda k: k["stages"]["train"]["deps"][0].update(path="/etc/passwd")
    ),
    "no outs": lambda r: with_lock(r, lambda k: k["stages"]["train"].pop("outs")),
    "no job": lambda r: {"job": 1},
}


def test_a_result_in_a_bucket_that_is_not_about_the_stages_here_changes_nothing(
    remote, project, record_property
):
    record_property("faults", len(HOSTILE))
    result, before = honest_result(remote), below(project)
    for name, change in HOSTILE.items():
        with pytest.raises(UserError) as error:
            fetch(JobResult(**{**vars(result), **change(result)}))
        assert "\n" not in str(error.value), name
        assert below(project) == before, name
        assert "stages: {}" in (project / "dvc.lock").read_text(), name
    for content in (b"", b"[]", b"null", b'{"job": 1}', b"\xff", b"[" * 10**5):
        with pytest.raises(UserError, match="is no job's result"):
            job_result.parse(content, origin="it")
    storage._client.cache_clear()
