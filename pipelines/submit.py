"""Run the pipeline on a Ray cluster as a job, follow it, and make its results those of this folder.

    aegan submit              the job of these files: started, or followed if it runs, or fetched
    aegan submit --stop       end it; training saves a checkpoint first
    aegan submit --dry-run    only say what would go there

RAY_ADDRESS names the cluster's dashboard (http://host:8265), RAY_AUTH_MODE=token and RAY_AUTH_TOKEN
give its token, `compute.storage` in params.yaml the bucket. See docs/submitting.md.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aegan.config import ComputeConfig
from aegan.files import write_text
from pipelines.base import params
from pipelines.base.command import run_command
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.names import shown
from pipelines.base.outputs import REFERENCE_DVC
from pipelines.base.outside import path_inside
from pipelines.bucket import storage
from pipelines.jobs import job_result, ray_jobs, shipment
from pipelines.jobs.job import (
    DVC_LOCK,
    DVC_REMOTE,
    REQUIREMENTS,
    content_id,
    remote_url,
    result_url,
)
from pipelines.jobs.job_result import JobResult

# Names of variables that hold secrets, but for those that say where something is.
SECRET_VARIABLE = re.compile(
    r"(?!.*_(FILE|PATH|DIR|URL|URI|MODE)$)"
    r".*(SECRET|TOKEN|PASS(WORD|WD|PHRASE)|PRIVATE|CREDENTIAL|(^|_|API)KEY(_|$))",
    re.IGNORECASE,
)

STDERR = 2  # the file descriptor
COMMIT = "AEGAN_GIT_COMMIT"  # the variable that every job gets

log = logging.getLogger(__name__)


def main(
    *,
    stop: bool = False,
    job: str = "",
    install: bool = False,
    pass_env: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """The command => what came of it; its options are explained in `pipelines/cli.py`.

    Raises UserError, also where the job has failed.
    """
    variables = passed_variables(pass_env)
    if dry_run:
        return preview(variables)
    address = params.load(ComputeConfig).storage
    if not storage.is_s3(address):
        raise UserError(
            f"compute.storage is {address!r}: a job needs a bucket that this machine and the "
            "cluster both reach; set `storage: s3://bucket/prefix` under compute in params.yaml"
        )
    files = shipment.shipped_files()
    files_sha256 = shipment.hash_files(files)
    if job:
        content = ray_jobs.without_attempt(job)
    else:
        content = content_id(files_sha256, shipment.read_lock())

    if not stop and (result := read_result(address, content)) is not None:
        log.info("job %s has succeeded already", result.job)
        fetch(result, address, files_sha256=files_sha256)
        return {"job": result.job, "outcome": "succeeded"}

    client = ray_jobs.connect()
    known = ray_jobs.attempts(client, content)
    attempt = ray_jobs.attempt_id(content, max(len(known), 1))
    runs = bool(known) and not known[-1].is_terminal()
    state = f"has {known[-1].lower()}" if known else "is not known to this cluster"
    if stop:
        if not runs:
            raise UserError(f"job {attempt} does not run: it {state}")
        ray_jobs.stop(client, attempt)
        return {"job": attempt, "outcome": "stopped"}
    if runs:
        log.info("job %s is there already: following it", attempt)
    elif job:
        raise UserError(f"job {attempt} {state} and left no results")
    else:
        if known:
            log.info("job %s %s: starting attempt %d", attempt, state, len(known) + 1)
        attempt = ray_jobs.attempt_id(content, len(known) + 1)
        push_data(address)
        submit(
            client,
            attempt,
            files,
            command=f"python -m pipelines.jobs.job {content} {files_sha256}",
            variables=variables,
            install=install,
        )
    ray_jobs.follow_to_the_end(client, attempt)
    result = read_result(address, content)
    if result is None:
        raise UserError(f"job {attempt} succeeded, but left no {result_url(address, content)}")
    fetch(result, address, files_sha256=files_sha256)
    return {"job": attempt, "outcome": "succeeded"}


def passed_variables(names: Sequence[str]) -> dict[str, str]:
    """The variables of --pass-env; UserError for a secret: Ray keeps them where others read them.

    That is the job's record, arguments of processes and logs on the cluster's machines.
    """
    for name in names:
        if name not in os.environ:
            raise UserError(f"--pass-env {shown(name)}: there is no such variable here")
        if SECRET_VARIABLE.match(name) or any(shipment.find_secrets(name, os.environ[name])):
            raise UserError(
                f"--pass-env {shown(name)}: it holds a secret, which everyone who may use the "
                "cluster, or its machines, could read there; give the cluster's machines rights of "
                "their own (an instance role, a Kubernetes secret: docs/submitting.md)"
            )
    return {name: os.environ[name] for name in names}


def preview(variables: Mapping[str, str]) -> dict[str, Any]:
    """Say what a job would be made of and what stays here => the same; raises UserError for what
    is refused.
    """
    found = shipment.collect()
    size = sum(map(len, found.files.values()))
    print(f"would be shipped: {len(found.files)} files, {size:,} bytes")
    for name, content in found.files.items():
        print(f"{len(content):>12,}  {shown(name)}")
    kept = {
        "since their names are those of secrets": found.secret,
        "since they are folders to git (links, other repositories)": found.folders,
        "since git does not know them (git add)": shipment.unknown_files(),
        "since no job needs them": list(shipment.NOT_NEEDED),
    }
    for reason, names in kept.items():
        if names:
            print(f"stays here, {reason}: {', '.join(map(shown, names))}")
    print(f"variables of the job: {', '.join([COMMIT, *variables])}")
    storage_address = params.load(ComputeConfig).storage
    if not storage.is_s3(storage_address):
        print(f"before a job: compute.storage is {storage_address}; it must be s3://bucket/prefix")
    if found.refused:
        raise UserError("would be refused: " + "; ".join(found.refused))
    sizes = {name: len(content) for name, content in found.files.items()}
    return {"files": sizes, "stays": kept, "variables": [COMMIT, *variables]}


def submit(
    client: ray_jobs.Client,
    job: str,
    files: Mapping[str, bytes],
    *,
    command: str,
    variables: Mapping[str, str],
    install: bool,
) -> None:
    """Start a job on these files."""
    if unknown := shipment.unknown_files():
        log.info("not shipped, since git does not know them (git add): %s", ", ".join(unknown))
    lock = files[str(REQUIREMENTS)].decode().splitlines() if install else []
    ray_jobs.start(
        client,
        job,
        command=command,
        files=files,
        variables={COMMIT: shipment.git_commit(), **variables},
        packages=[line for line in lock if "==" in line],
    )


def push_data(address: str) -> None:
    """Give the job the data that dvc.lock and reference.dvc name and this machine has."""
    set_remote(address)
    if DVC_LOCK.exists() or REFERENCE_DVC.exists():
        _dvc("push", "--remote", DVC_REMOTE)


def read_result(address: str, content: str) -> JobResult | None:
    """What a job left that succeeded; None while there is none."""
    url = result_url(address, content)
    written = storage.read_object_if_any(url)
    return None if written is None else job_result.parse(written, origin=url)


def fetch(result: JobResult, address: str, *, files_sha256: str) -> None:
    """Make the job's dvc.lock, outputs and metrics those of this folder; all checked before."""
    origin = f"the result of job {result.job}"
    hashes = job_result.check(result, origin=origin)
    set_remote(address)
    before = DVC_LOCK.read_text(encoding="utf-8") if DVC_LOCK.exists() else None
    try:
        _write(DVC_LOCK, result.dvc_lock)
        _dvc("fetch", "--remote", DVC_REMOTE, "--", *hashes)
        job_result.check_folders(hashes, origin=origin)
        _dvc("checkout", "--force", "--", *hashes)
    except BaseException:  # Ctrl-C too: a lock without its outputs is of no use
        DVC_LOCK.unlink()
        if before is not None:
            _write(DVC_LOCK, before)
        raise
    for name, text in result.files.items():
        _write(path_inside(Path(), name, origin=origin), text)
    log.info("fetched: dvc.lock and %d outputs; `dvc metrics show`", len(hashes))
    if files_sha256 != result.files_sha256:
        log.info("the job had other files than are here: `dvc status` shows what differs")


def _write(file: Path, text: str) -> None:
    with clear_disk_errors(file):
        write_text(file, text)


def set_remote(address: str) -> None:
    """Name the bucket's DVC remote in .dvc/config.local, which git ignores."""
    _dvc("config", "--local", f"remote.{DVC_REMOTE}.url", remote_url(address))


def _dvc(*arguments: str) -> None:
    # Not DVC itself: what it does is checked and locked.
    command = [sys.executable, "-m", "pipelines.project.dvc_command", *arguments]
    if subprocess.run(command, stdout=STDERR, check=False).returncode != 0:
        raise UserError(f"dvc {arguments[0]} failed; what it says stands above")


if __name__ == "__main__":
    run_command("submit")
