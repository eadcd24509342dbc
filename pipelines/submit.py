"""Run the pipeline on a Ray cluster as a job, follow it, and make its results those of this folder.

    aegan submit              the job of these files: started, or followed if it runs, or fetched
    aegan submit --stop       end it; training saves a checkpoint first

RAY_ADDRESS names the cluster's dashboard (http://host:8265), RAY_AUTH_MODE=token and RAY_AUTH_TOKEN
give its token, `compute.storage` in params.yaml the bucket. See docs/submitting.md.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from aegan.config import ComputeConfig
from pipelines import params, storage
from pipelines.errors import UserError, run_stage
from pipelines.files import new_file
from pipelines.job import DVC_LOCK, DVC_REMOTE, content_id, remote_url, result_url

NOT_SHIPPED = (  # of the files that git knows, as git's patterns: a job does not depend on them
    *("benchmarks", "docs", "infra", "tests", ".ci", ".github", "*.md", "LICENSE", "Makefile"),
    *("artifacts", "data", "report", "runs", ".venv"),
    *(".env*", "**/.env*", "*.key", "*.pem", ".dvc/config.local"),
)
MAX_SHIPPED_BYTES = 100 * 2**20  # Ray keeps the package in its head's memory
PASSED_ON = ("AWS_", "MLFLOW_")  # beginnings of the variables that --pass-env gives to the job
STOP_SECONDS = 120  # for a checkpoint, before Ray kills a stopped job
CONNECT_SECONDS, ANSWER_SECONDS = 10, 120
RECONNECT_SECONDS = 5
SILENCE_SECONDS = 60  # of the log, after which the connection may be a dead one
LOST_SECONDS = 600  # without an answer from the cluster, after which nobody waits any longer
LOST = (OSError, RuntimeError, aiohttp.ClientError, TimeoutError)  # how a connection ends

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    address = params.load(ComputeConfig).storage
    if not address.startswith("s3://"):
        raise UserError(
            f"compute.storage is {address!r}: a job needs a bucket that this machine and the "
            "cluster both reach; set `storage: s3://bucket/prefix` under compute in params.yaml"
        )
    files = shipped_files()
    files_sha256 = hash_files(files)
    content = without_attempt(options.job) or content_id(files_sha256, read_lock())
    if options.stop:
        stop(connect(), content)
        return
    if (result := read_result(address, content)) is not None:
        log.info("job %s has succeeded already", result["job"])
    else:
        client = connect()
        job, status = newest_attempt(client, content)
        if status in (JobStatus.PENDING, JobStatus.RUNNING):
            log.info("job %s is there already: following it", job)
        elif options.job:
            raise UserError(describe_missing(options.job, status))
        else:
            push_data(address)
            job = submit(client, files, files_sha256, content, options=options)
        follow_to_the_end(client, job)
        result = read_result(address, content)
        if result is None:
            raise UserError(f"job {job} succeeded, but left no {result_url(address, content)}")
    fetch(result, address)
    if hash_files(shipped_files()) != result["files_sha256"]:
        log.info("the job had other files than are here now: `dvc status` shows what differs")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aegan submit", description="Run the pipeline on the cluster that RAY_ADDRESS names."
    )
    parser.add_argument("--stop", action="store_true", help="end the running job")
    parser.add_argument("--job", metavar="ID", help="follow, fetch or stop this job instead")
    parser.add_argument(
        "--install",
        action="store_true",
        help="let Ray install requirements.lock, where the cluster's image does not have it",
    )
    parser.add_argument(
        "--pass-env",
        action="store_true",
        help="give this machine's AWS_* and MLFLOW_* variables to the job; whoever may use the "
        "cluster can read them there",
    )
    return parser


# What is shipped, and the name it gives the job


def shipped_files() -> dict[str, bytes]:
    """Names and contents of the files that git knows and the stages may use, and of dvc.lock."""
    names = sorted(_git_files("--cached") | {str(DVC_LOCK)})
    files = {name: Path(name).read_bytes() for name in names if Path(name).is_file()}
    if sum(map(len, files.values())) > MAX_SHIPPED_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise UserError(
            f"git knows more than {MAX_SHIPPED_BYTES >> 20} MiB here, too much to ship with a job; "
            f"the largest file is {largest}: data belongs into data.source"
        )
    return files


def unknown_files() -> list[str]:
    """New files that would be shipped if git knew them."""
    return sorted(_git_files("--others", "--exclude-standard") - {str(DVC_LOCK)})


def _git_files(*which: str) -> set[str]:
    patterns = [f":(exclude){pattern}" for pattern in NOT_SHIPPED]
    command = ["git", "ls-files", "-z", *which, "--", ".", *patterns]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError("git not found: a job is made of the files that git knows") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"git cannot list the files to ship: {error.stderr.strip()}") from None
    return set(done.stdout.split("\0")) - {""}


def hash_files(files: Mapping[str, bytes]) -> str:
    """Hash over names and contents, but for dvc.lock, which a job's results change."""
    lines = (
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n"
        for name, content in sorted(files.items())
        if name != str(DVC_LOCK)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_lock() -> bytes:
    """dvc.lock, which says what data the job starts from; empty before the first run."""
    return DVC_LOCK.read_bytes() if DVC_LOCK.exists() else b""


def write_package(files: Mapping[str, bytes], path: Path) -> None:
    """A zip archive that depends on names and contents only: Ray uploads the same one once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


# The cluster


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which by itself waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        timeout = (CONNECT_SECONDS, ANSWER_SECONDS)
        return super()._do_request(method, endpoint, timeout=timeout, **options)


def connect() -> JobSubmissionClient:
    """A client of the cluster that RAY_ADDRESS names; raises UserError."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS is {address!r}: expected the address of the cluster's dashboard, "
            "for example RAY_ADDRESS=http://host:8265"
        )
    for chatty in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.WARNING)
    with clear_errors():
        return _Client(address)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what can go wrong on the way to the cluster into a UserError that names the cure."""
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        yield
    except AuthenticationError as error:
        if "Authentication required" in error.message:
            raise UserError(
                f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN"
            ) from None
        raise UserError(
            f"the cluster at {address} does not accept this token: check RAY_AUTH_TOKEN"
        ) from None
    except OSError:  # of which requests' errors are a kind
        raise UserError(
            f"the cluster at {address} cannot be reached: check RAY_ADDRESS, the network (a "
            "tunnel, `kubectl port-forward`) and that the cluster runs"
        ) from None
    except RuntimeError as error:  # what the client makes of any other answer
        raise UserError(
            f"what answers at {address} is not a Ray dashboard that takes jobs: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None


def attempt_id(content: str, number: int) -> str:
    """Ray takes each submission id once, so later attempts carry a number."""
    return content if number == 1 else f"{content}-{number}"


def without_attempt(job: str | None) -> str | None:
    """The content id in a submission id; raises UserError for ids of other jobs."""
    if job is None:
        return None
    match = re.fullmatch(r"(aegan-[0-9a-f]{12})(-\d+)?", job)
    if match is None:
        raise UserError(f"--job {job}: expected the id of a job of `aegan submit`, aegan-...")
    return match[1]


def newest_attempt(client: JobSubmissionClient, content: str) -> tuple[str, JobStatus | None]:
    """Submission id and status of the last attempt; where there is none, its id to be and None."""
    with clear_errors():
        jobs = {job.submission_id: job.status for job in client.list_jobs()}
    job, status = content, None
    for number in itertools.count(1):
        if attempt_id(content, number) not in jobs:
            return job, status
        job = attempt_id(content, number)
        status = jobs[job]
    raise AssertionError("unreachable")


def describe_missing(job: str, status: JobStatus | None) -> str:
    """Why there is nothing to follow or fetch."""
    found = "is not known to this cluster" if status is None else f"has {status.lower()}"
    return f"job {job} {found} and left no results"


def submit(
    client: JobSubmissionClient,
    files: Mapping[str, bytes],
    files_sha256: str,
    content: str,
    *,
    options: argparse.Namespace,
) -> str:
    """Start the next attempt and return its submission id."""
    last, status = newest_attempt(client, content)
    job = content
    if status is not None:
        number = int(last.removeprefix(content).lstrip("-") or 1) + 1
        job = attempt_id(content, number)
        log.info("job %s has %s: starting attempt %d", last, status.lower(), number)
    if unknown := unknown_files():
        log.info("not shipped, since git does not know them (git add): %s", ", ".join(unknown))
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "AEGAN_GIT_COMMIT": git_commit()}
    if options.pass_env:
        environment |= {
            name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)
        }
    with tempfile.TemporaryDirectory() as folder, clear_errors():
        package = Path(folder) / "files.zip"
        write_package(files, package)
        runtime_env: dict[str, Any] = {"working_dir": str(package), "env_vars": environment}
        if options.install:
            lines = files["requirements.lock"].decode().splitlines()
            runtime_env["pip"] = [line for line in lines if "==" in line]
        try:
            client.submit_job(
                entrypoint=f"python -m pipelines.job {content} {files_sha256}",
                submission_id=job,
                runtime_env=runtime_env,
                metadata={"git_commit": environment["AEGAN_GIT_COMMIT"]},
            )
            log.info("job %s: submitted %d files", job, len(files))
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            log.info("job %s: another has just submitted it; following", job)
    return job


def git_commit() -> str:
    """The commit and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def follow_to_the_end(client: JobSubmissionClient, job: str) -> None:
    """Show the job's log until it ends; UserError unless it succeeded. Ctrl-C leaves it running."""
    try:
        details = follow(client, job)
    except KeyboardInterrupt:
        log.info(
            "\ndetached: job %s goes on. The same command follows it again; it ends with\n"
            "    aegan submit --stop --job %s",
            *(job, job),
        )
        raise
    if details.status != JobStatus.SUCCEEDED:
        lines = (details.message or "it did not say why").strip().splitlines()
        reason = lines[-1].removeprefix("error: ")
        raise UserError(f"job {job} has {details.status.lower()}: {reason}")


def follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Write the job's log to standard output until it ends; a broken connection is made again."""
    shown = 0
    answered = time.monotonic()
    while True:
        try:
            shown = asyncio.run(_show_log(client, job, shown=shown))
            details = client.get_job_info(job)
            answered = time.monotonic()
            if details.status.is_terminal():
                with suppress(*LOST):  # the machine with the log may be gone
                    sys.stdout.write(client.get_job_logs(job)[shown:])
                return details
            time.sleep(1)
        except AuthenticationError:
            with clear_errors():
                raise
        except LOST as error:
            if "does not exist" in str(error):
                raise UserError(
                    f"job {job} is gone, the cluster must have been started anew: "
                    "the same command submits it again"
                ) from None
            if time.monotonic() - answered > LOST_SECONDS:
                raise UserError(
                    f"the cluster has not answered for {LOST_SECONDS // 60} minutes ({error}); "
                    f"job {job} may go on: the same command follows it again"
                ) from None
            time.sleep(RECONNECT_SECONDS)


async def _show_log(client: JobSubmissionClient, job: str, *, shown: int) -> int:
    """Write what follows the first `shown` characters of the log; returns how many those are then.

    Every connection starts at the log's beginning. One that is silent for long may be dead.
    """
    position = 0
    chunks = client.tail_job_logs(job)
    with suppress(StopAsyncIteration, *LOST):
        while True:
            text = await asyncio.wait_for(anext(chunks), SILENCE_SECONDS)
            sys.stdout.write(text[max(shown - position, 0) :])
            sys.stdout.flush()
            position += len(text)
            shown = max(shown, position)
    return shown


def stop(client: JobSubmissionClient, content: str) -> None:
    """End the running attempt and wait until it has ended."""
    job, status = newest_attempt(client, content)
    if status not in (JobStatus.PENDING, JobStatus.RUNNING):
        raise UserError(
            f"job {job} does not run" + (f": it has {status.lower()}" if status else "")
        )
    with clear_errors():
        client.stop_job(job)
        log.info("stopping job %s: training saves a checkpoint first", job)
        while not client.get_job_info(job).status.is_terminal():
            time.sleep(1)
    log.info("job %s has ended", job)


# Data and results


def push_data(address: str) -> None:
    """Give the job the data that dvc.lock names and this machine has."""
    set_remote(address)
    if DVC_LOCK.exists():
        _dvc("push", "--remote", DVC_REMOTE)


def read_result(address: str, content: str) -> dict[str, Any] | None:
    """What a job left that succeeded; None while there is none."""
    url = result_url(address, content)
    if url not in dict(storage.list_objects(url)):
        return None
    result: dict[str, Any] = json.loads(storage.read_object(url))
    return result


def fetch(result: Mapping[str, Any], address: str) -> None:
    """Make the job's dvc.lock, outputs and metrics those of this folder."""
    set_remote(address)
    for name, text in {str(DVC_LOCK): result["dvc_lock"], **result["files"]}.items():
        with new_file(Path(name)) as aside:
            aside.write_text(text, encoding="utf-8")
    _dvc("pull", "--force", "--remote", DVC_REMOTE, *result["outputs"])
    log.info("fetched: dvc.lock and %d outputs; `dvc metrics show`", len(result["outputs"]))


def set_remote(address: str) -> None:
    """Name the bucket's DVC remote in .dvc/config.local, which git ignores."""
    _dvc("config", "--local", f"remote.{DVC_REMOTE}.url", remote_url(address))


def _dvc(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "dvc", *arguments], check=False).returncode != 0:
        raise UserError(f"dvc {arguments[0]} failed; what it says stands above")


if __name__ == "__main__":
    run_stage(main)
