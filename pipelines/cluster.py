"""Start a private Ray on this machine, or join the cluster that RAY_ADDRESS names."""

import logging
import os
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aegan.config import ComputeConfig
from pipelines.errors import UserError

ORPHAN_WAIT_SECONDS = 60  # until the worker of a driver that was killed has ended
LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # training sends nothing through Ray's object store
CONNECT_SECONDS = 10.0
CODE = Path(__file__).parent.parent
PACKAGES = ("aegan", "pipelines")
SHIPPED_ENVIRONMENT = (  # where the bucket is; never who may use it: nodes have their own rights
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_REQUEST_PAYER",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)


def show_ray_logs() -> bool:
    """Ray's own output is hidden unless AEGAN_RAY_LOGS=1 asks for it."""
    return os.environ.get("AEGAN_RAY_LOGS") == "1"


def uses_gpu(compute: ComputeConfig, present: Mapping[str, float]) -> bool:
    """Whether to compute on a GPU, given the cluster's resources."""
    return compute.device == "cuda" or (compute.device == "auto" and present.get("GPU", 0) > 0)


def execution(compute: ComputeConfig) -> dict[str, Any]:
    """The training loop's keywords that say how it computes."""
    return {
        "micro_batch_size": compute.micro_batch_size,
        "compile_networks": compute.compile,
        "cuda_graphs": compute.cuda_graphs,
    }


@contextmanager
def _plain_executable() -> Iterator[None]:
    """Ray hands the path of Python to a shell as it is: one with a space gets another name."""
    before = sys.executable
    python, project = Path(before).absolute(), Path(sys.prefix).absolute().parent
    with TemporaryDirectory(prefix="aegan-") as folder:
        if shlex.quote(str(python)) != str(python) and python.is_relative_to(project):
            (Path(folder) / "project").symlink_to(project)
            sys.executable = str(Path(folder) / "project" / python.relative_to(project))
        try:
            yield
        finally:
            sys.executable = before


@contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[bool]:
    """Connected to Ray inside; yields whether it is a private one on this machine.

    A private one has a dashboard on request: Ray Tune waits for it forever when it stops a trial.
    """
    with _plain_executable(), _connection(dashboard) as local:
        yield local


@contextmanager
def _connection(dashboard: bool) -> Iterator[bool]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning
    address = os.environ.get("RAY_ADDRESS", "")
    local = not address
    if local and "RAY_AUTH_MODE" not in os.environ:
        # A token for this process tree only: Ray would write one into the home folder.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if local:
        # Ray's switch for laptops: everything listens on 127.0.0.1 instead of all interfaces.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    else:
        _check_address(address)
    import ray  # after the environment is set, which importing it reads

    # Ray's processes inherit that they ignore Ctrl-C, which a terminal sends to them too: the
    # driver ends them once the workers have saved.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_terminate = signal.getsignal(signal.SIGTERM)
    private: dict[str, Any] = {
        "address": "local",
        "include_dashboard": dashboard,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
    }
    # Nodes of a cluster need this code; a job's working directory may not be ours.
    joined = {"runtime_env": {"py_modules": [str(CODE / package) for package in PACKAGES]}}
    try:
        ray.init(
            logging_level=logging.INFO if show_ray_logs() else logging.ERROR,
            log_to_driver=show_ray_logs(),
            **(private if local else joined),
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if local:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"RAY_ADDRESS={address} lets nobody in ({reason}): RAY_AUTH_MODE and RAY_AUTH_TOKEN "
            "must be those of the cluster, and this machine one of its nodes (else: make submit)"
        ) from None
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
    try:
        yield local
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse at once what Ray would try for minutes."""
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS is {address}, but training is driven from a node of the cluster: set "
            "host:port there, or submit it with `make submit`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # `auto`, and the like
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): check host and port"
        ) from None


def shipped_environment() -> dict[str, str]:
    """What workers on other nodes need of this process's environment to find the bucket."""
    return {name: os.environ[name] for name in SHIPPED_ENVIRONMENT if name in os.environ}


def cpus_of_this_node() -> int:
    """The CPUs that the node of this worker gives to Ray."""
    import ray

    this = ray.get_runtime_context().get_node_id()
    cpus = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == this]
    return max(int(cpus[0]), 1) if cpus else 1
