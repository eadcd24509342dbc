"""Ray's job server: start a job, follow it through broken connections, stop it."""

import asyncio
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.jobs import shipment

STOP_SECONDS = 120  # for a checkpoint, before Ray kills a stopped job
CONNECT_SECONDS, ANSWER_SECONDS = 10, 120
FIRST_ANSWER_SECONDS = 20  # of an address that may be anything
STARTING_SECONDS = 120.0  # how long a cluster that says that it is still starting is asked again
RECONNECT_SECONDS = 5
SILENCE_SECONDS = 60  # of the log, after which the connection may be a dead one
LOST_SECONDS = 600  # without an answer from the cluster, after which we give up
LOST = (OSError, RuntimeError, aiohttp.ClientError, TimeoutError)  # how a connection ends

log = logging.getLogger(__name__)


class StartingError(RuntimeError):
    """A cluster that has said for long that it is still starting."""


class Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which by itself waits for an answer for ever, but never for the cluster."""

    _answered = False

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        timeout = (CONNECT_SECONDS, ANSWER_SECONDS if self._answered else FIRST_ANSWER_SECONDS)
        give_up = time.monotonic() + STARTING_SECONDS
        said = False
        while True:
            response = super()._do_request(method, endpoint, timeout=timeout, **options)
            self._answered = True
            if not _is_starting(response):
                return response
            if time.monotonic() > give_up:
                raise StartingError(f"{response.status_code}: {response.text[:200]}")
            if not said:
                log.info("the cluster is still starting: waiting for it")
                said = True
            time.sleep(RECONNECT_SECONDS)


def _is_starting(response: Any) -> bool:
    """Whether this is what a cluster answers, or a proxy before it, until it takes jobs."""
    starting: bool = response.status_code in (502, 503) or (
        response.status_code == 500 and "No available agent" in response.text
    )
    return starting


def connect() -> Client:
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
        return Client(address)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what can go wrong on the way to the cluster into a UserError that names the cure."""
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        yield
    except AuthenticationError as error:
        if "Authentication required" in error.message:
            raise UserError(
                f"the cluster at {address} requires a token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN"
            ) from None
        raise UserError(
            f"the cluster at {address} does not accept this token: check RAY_AUTH_TOKEN"
        ) from None
    except StartingError as error:
        raise UserError(
            f"the cluster at {address} is still starting ({shown(str(error))}): run the same "
            "command again in a minute; if it says so for long, ask `ray status` there"
        ) from None
    except OSError:  # of which requests' errors are a kind
        raise UserError(
            f"the cluster at {address} cannot be reached: check RAY_ADDRESS, the network (a "
            "tunnel, `kubectl port-forward`) and that the cluster runs"
        ) from None
    except RuntimeError as error:  # what the client makes of any other answer
        raise UserError(
            f"what answers at {address} does not accept jobs; is it a Ray dashboard? It says: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None


def attempt_id(content: str, number: int) -> str:
    """Ray takes each submission id once, so later attempts carry a number."""
    return content if number == 1 else f"{content}-{number}"


def without_attempt(job: str) -> str:
    """The content id in a submission id; raises UserError for ids of other jobs."""
    match = re.fullmatch(r"(aegan-[0-9a-f]{12})(-\d+)?", job)
    if match is None:
        raise UserError(f"--job {job}: expected the id of a job of `aegan submit`, aegan-...")
    return match[1]


def attempts(client: Client, content: str) -> list[JobStatus]:
    """The status of every attempt that the cluster knows, in their order."""
    with clear_errors():
        jobs = {job.submission_id: job.status for job in client.list_jobs()}
    ids = (attempt_id(content, number) for number in itertools.count(1))
    return [jobs[job] for job in itertools.takewhile(jobs.__contains__, ids)]


def start(
    client: Client,
    job: str,
    *,
    command: str,
    files: Mapping[str, bytes],
    variables: Mapping[str, str],
    packages: list[str],
) -> None:
    """Start a job on these files, after Ray has installed the given packages."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **variables}
    with TemporaryDirectory() as folder, clear_errors():
        package = Path(folder) / "files.zip"
        shipment.write_package(files, package)
        runtime_env: dict[str, Any] = {"working_dir": str(package), "env_vars": environment}
        if packages:
            runtime_env["pip"] = packages
        try:
            client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime_env)
            log.info("job %s: submitted", job)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            log.info("job %s: another one has just submitted it; following", job)


def follow_to_the_end(client: Client, job: str) -> None:
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


def wait(client: Client, job: str, *, seconds: float) -> tuple[str, str]:
    """(status, log) of a short job at its end; one that takes longer is stopped: UserError."""
    deadline = time.monotonic() + seconds
    with clear_errors():
        while not (details := client.get_job_info(job)).status.is_terminal():
            if time.monotonic() > deadline:
                client.stop_job(job)
                raise UserError(
                    f"a small job does not end in {seconds:.0f} s (it is {details.status.lower()})"
                    ": `ray status` on the cluster tells what it waits for"
                )
            time.sleep(0.5)
        log_lines = client.get_job_logs(job)
    return str(details.status), f"{log_lines}\n{details.message or ''}"


def follow(client: Client, job: str) -> JobDetails:
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


async def _show_log(client: Client, job: str, *, shown: int) -> int:
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


def stop(client: Client, job: str) -> None:
    """End a job and wait until it has ended."""
    with clear_errors():
        client.stop_job(job)
        log.info("stopping job %s: training saves a checkpoint first", job)
        while not client.get_job_info(job).status.is_terminal():
            time.sleep(1)
    log.info("job %s has ended", job)
