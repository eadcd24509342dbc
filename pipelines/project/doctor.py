"""`aegan doctor`: whether a run would find what it needs, here and on the cluster.

One line for each thing, ok, warn or fail, with its cure; the exit status is 1 if any fails. The
cluster's part runs there as a small job (`--nodes`), or here (RAY_ADDRESS=host:port).
"""

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aegan import config
from pipelines.base import params
from pipelines.base.command import run_command
from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.bucket import storage
from pipelines.cluster import checks, session
from pipelines.cluster.checks import Finding, attempt
from pipelines.jobs import job

NODE_SECONDS = 90.0  # for the checks of one node, of which the bucket's may take a while
JOB_SECONDS = 180.0  # for the job to start and end
MARK = "aegan-doctor: "  # before each finding in the job's log


def main() -> list[Finding]:
    """Print what is found, as it is found."""
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.status:5} {finding.subject}: {shown(finding.found)}", flush=True)
        if finding.cure:
            print(f"      {shown(finding.cure)}")
    return findings


def print_nodes() -> None:
    """Print what is found on the cluster that this process is a job of, for `_by_job` to read."""
    for finding in _of_nodes():
        print(MARK + json.dumps(asdict(finding)), flush=True)


def examine() -> Iterator[Finding]:
    """Everything, the cheap things first."""
    try:
        compute = params.load(config.ComputeConfig)
    except UserError as error:
        yield Finding("fail", "params.yaml", str(error))
        return
    yield Finding("ok", "params.yaml", "every key is there and within its bounds")
    yield _packages(job.locked_versions(job.REQUIREMENTS), "make run (it installs them)")
    address = os.environ.get("RAY_ADDRESS", "")
    yield from checks.of_this_machine()
    if not address:
        yield checks.places(compute, session.machine())
        yield checks.gpus()
    yield _bucket(compute.storage, "bucket, from here")
    yield _mlflow()
    yield from _cluster(address)


def _packages(locked: Mapping[str, str], cure: str) -> Finding:
    """Whether the packages that decide what comes out are those of requirements.lock."""
    if different := job.different_versions(locked):
        return Finding("fail", "packages", ", ".join(different), cure)
    return Finding("ok", "packages", ", ".join(f"{name} {value}" for name, value in locked.items()))


def _bucket(address: str, subject: str) -> Finding:
    """Whether objects below this address can be written, listed, read and deleted."""
    if not storage.is_s3(address):
        return Finding("ok", subject, "none is set (compute.storage)")
    url = f"{address.rstrip('/')}/doctor/{uuid.uuid4().hex}"

    def try_all() -> str:
        storage.write_object(url, b"x")
        try:
            if [found for found, _ in storage.list_objects(url)] != [url]:
                raise UserError(f"{url} was written, but is not listed: check AWS_ENDPOINT_URL")
            storage.read_object(url)
        finally:
            storage.delete_object(url)
        return f"{address} can be written, listed, read and deleted from"

    return attempt(subject, try_all)


def _mlflow() -> Finding:
    """Whether the registry answers and lets this user in."""
    from pipelines.registry import mlflow_store, tracking

    file = mlflow_store.database_file()
    if file and not file.exists():
        uri = mlflow_store.tracking_uri()
        return Finding("ok", "MLflow", f"{uri} is made by the first `register`")
    return attempt("MLflow", tracking.check_store)


def _cluster(address: str) -> Iterator[Finding]:
    """The cluster that RAY_ADDRESS names, and each of its nodes."""
    if not address:
        yield Finding("ok", "Ray", "RAY_ADDRESS is not set: a private Ray on this machine")
    elif address.startswith(("http://", "https://")):
        yield from _by_job(address)
    else:
        yield from _of_nodes()


def _by_job(address: str) -> Iterator[Finding]:
    """What a job there finds."""
    from pipelines.jobs import ray_jobs, shipment

    try:
        client = ray_jobs.connect()
        files = shipment.shipped_files()
        yield Finding("ok", "Ray", f"{address} answers and takes this token")
        name = f"aegan-doctor-{uuid.uuid4().hex[:12]}"
        ray_jobs.start(
            client,
            name,
            command="python -m pipelines.project.doctor --nodes",
            files=files,
            variables={},
            packages=[],
        )
        status, output = ray_jobs.wait(client, name, seconds=JOB_SECONDS)
    except UserError as error:
        yield Finding("fail", "Ray", str(error))
        return
    lines = [line.partition(MARK)[2] for line in output.splitlines() if MARK in line]
    yield from (Finding(**json.loads(line)) for line in lines)
    if not lines or status != "SUCCEEDED":
        last = (output.strip().splitlines() or ["it did not say why"])[-1]
        cure = "build the cluster's image from this checkout (infra/Dockerfile)"
        yield Finding("fail", "a job on the cluster", f"it has {status.lower()}: {last}", cure)


def _of_nodes() -> Iterator[Finding]:
    """From a node of the cluster: what it has free, and what a process on each node finds."""
    compute = params.load(config.ComputeConfig)
    versions = job.locked_versions(job.REQUIREMENTS)
    try:
        with session.ray_session():
            yield Finding("ok", "Ray", f"joined; {len(session.nodes())} nodes")
            yield _free(compute, *session.resources())
            check = _NodeCheck(versions, compute.storage)
            for node, result in session.on_each_node(check, seconds=NODE_SECONDS):
                if isinstance(result, Exception):
                    reason = str(result).strip().splitlines()[-1]
                    cure = "give the node the packages of requirements.lock (infra/Dockerfile)"
                    yield Finding("fail", f"node {node}", reason, cure)
                    continue
                for finding in result:
                    yield Finding(**{**finding, "subject": f"node {node}, {finding['subject']}"})
    except UserError as error:
        yield Finding("fail", "Ray", str(error))


def _free(
    compute: config.ComputeConfig, total: dict[str, float], free: dict[str, float]
) -> Finding:
    """Whether the workers that are asked for find their places."""
    kind, wanted = session.wanted(compute, total)
    found = ", ".join(
        f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("CPU", "GPU")
    )
    found += f"; wanted: {wanted:g} {kind}s"
    if total.get(kind, 0) < wanted:
        cure = "add nodes, or lower compute.num_workers; training waits until there are so many"
        return Finding("warn", "cores and GPUs", found, cure)
    if free.get(kind, 0) < wanted:
        cure = "training waits until other jobs have ended"
        return Finding("warn", "cores and GPUs", found, cure)
    return Finding("ok", "cores and GPUs", found)


class _NodeCheck:
    """Runs on a node, in a process of Ray; its findings travel as plain dictionaries."""

    def __init__(self, versions: dict[str, str], address: str) -> None:
        self._versions, self._address = versions, address

    def __call__(self) -> list[dict[str, Any]]:
        here: list[Callable[[], Finding]] = [
            lambda: _packages(self._versions, "build the node's image anew (infra/Dockerfile)"),
            checks.memory,
            lambda: checks.disk(Path(tempfile.gettempdir())),
            checks.shared_memory,
            lambda: _bucket(self._address, "bucket"),
        ]
        return [asdict(check()) for check in here]


if __name__ == "__main__":
    run_command("doctor")
