"""Start a private Ray on this machine, or join the cluster that RAY_ADDRESS names."""

import logging
import os
import secrets
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from aegan.config import ComputeConfig
from pipelines.base.errors import UserError
from pipelines.cluster import ray_address

ORPHAN_WAIT_SECONDS = 60  # until the worker of a driver that was killed has ended
LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # training sends nothing through Ray's object store
PRIVATE_FOLDER = "aegan-ray-"  # beginning of its name
# Of the folder that it is made in: a socket's path has at most 107 bytes, and Ray adds much.
MAX_PLACE_BYTES = 107 - len(
    "/aegan-ray-12345678/r/session_2026-11-28_19-08-38_431994_1234567/sockets/plasma_store"
)
CODE = Path(__file__).parents[2]
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

log = logging.getLogger(__name__)


def show_ray_logs() -> bool:
    """Ray's own output is hidden unless AEGAN_RAY_LOGS=1 asks for it."""
    return os.environ.get("AEGAN_RAY_LOGS") == "1"


def uses_gpu(compute: ComputeConfig, present: Mapping[str, float]) -> bool:
    """Whether to compute on a GPU, given the cluster's resources."""
    return compute.device == "cuda" or (compute.device == "auto" and present.get("GPU", 0) > 0)


def wanted(compute: ComputeConfig, present: Mapping[str, float]) -> tuple[str, float]:
    """What the workers compute on, GPU or CPU, and how much of it the fewest of them take."""
    least = compute.min_workers or compute.num_workers
    return (
        ("GPU", least * compute.gpus_per_worker) if uses_gpu(compute, present) else ("CPU", least)
    )


def machine(*, gpus: bool = True) -> dict[str, int]:
    """The cores that this process may use, and the GPUs that PyTorch sees: a private Ray's.

    Without `gpus` none are counted, and PyTorch is not loaded for it.
    """
    import joblib

    found = {"CPU": joblib.cpu_count(), "GPU": 0}
    if gpus:
        import torch

        found["GPU"] = torch.cuda.device_count()
    return found


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
def ray_session(*, dashboard: bool = False, gpus: bool = True) -> Iterator[bool]:
    """Connected to Ray inside; yields whether it is a private one on this machine.

    A private one has a dashboard on request: Ray Tune waits for it forever when it stops a trial.
    Without `gpus` it has none of them: for work that PyTorch has no part in.
    """
    with _plain_executable(), _connection(dashboard, gpus) as local:
        yield local


@contextmanager
def _connection(dashboard: bool, gpus: bool) -> Iterator[bool]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning
    address = os.environ.get("RAY_ADDRESS", "")
    local = not address
    if local and "RAY_AUTH_MODE" not in os.environ:
        if "ray" in sys.modules:
            raise RuntimeError("ray was imported before the session, so it would ask for no token")
        # A token for this process tree only: Ray would write one into the home folder.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if local:
        # Ray's switch for laptops: everything listens on 127.0.0.1 instead of all interfaces.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # One process less: it waits for notices of nodes that will be taken away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray  # after the environment is set, which importing it reads

    with _private_folder() if local else nullcontext() as folder:
        if folder is None:
            ray_address.check(address)
            _join(address)
        else:
            _start(folder, dashboard=dashboard, gpus=gpus)
        try:
            yield local
        finally:
            ray.shutdown()


def _start(folder: str, *, dashboard: bool, gpus: bool) -> None:
    """Start a private Ray whose files are in this folder; one that is cut off leaves nothing.

    Ray gives its own processes some 20 s to answer, which a machine that is busy may not keep: then
    it is tried again, once. Raises UserError.
    """
    for is_last in (False, True):
        try:
            _start_once(folder, dashboard=dashboard, gpus=gpus)
        except Exception as error:  # as bare as Ray raises it
            reason = str(error).strip().partition("\n")[0]
            if is_last:
                raise UserError(
                    f"Ray did not start on this machine, twice ({reason}): it needs some 2 GB of "
                    "memory, free space in /tmp and a machine that is not too busy; free some, "
                    "then run the same command again"
                ) from error
            log.warning("Ray did not start (%s): tried again", reason)
        else:
            return


def _start_once(folder: str, *, dashboard: bool, gpus: bool) -> None:
    import ray

    here, earlier = machine(gpus=gpus), set(psutil.Process().children())
    try:
        _init(
            address="local",
            num_cpus=here["CPU"],
            num_gpus=here["GPU"],
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            _temp_dir=folder,
        )
    except BaseException:
        started = set(psutil.Process().children()) - earlier
        tree = [process for top in started for process in (top, *top.children(recursive=True))]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=5)
        ray.shutdown()  # what it knows of the half-started one
        raise


def _join(address: str) -> None:
    """Join the cluster that RAY_ADDRESS names."""
    import ray

    try:
        # Nodes of a cluster need this code; a job's working directory may not be ours.
        _init(runtime_env={"py_modules": [str(CODE / package) for package in PACKAGES]})
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"RAY_ADDRESS={address} refused the connection ({reason}): RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN must be those of the cluster, and this machine one of its nodes (else: "
            "make submit)"
        ) from None


def _init(**options: Any) -> None:
    import ray

    with _children_deaf_to_interrupts():
        ray.init(
            logging_level=logging.INFO if show_ray_logs() else logging.ERROR,
            log_to_driver=show_ray_logs(),
            **options,
        )


@contextmanager
def _children_deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside never get a Ctrl-C, which a terminal sends to them too.

    This one does, at once: Ray's processes are ended by it, once the workers have saved.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    over = threading.Event()
    # A signal goes to any thread that does not block it, and Python then runs its handler in the
    # main thread. So one thread that blocks nothing waits; what is blocked here, children inherit.
    threading.Thread(target=over.wait, daemon=True).start()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there


@contextmanager
def _private_folder() -> Iterator[str]:
    """Where a private Ray has its sockets and logs: nobody else on this machine may look inside.

    Ray opens its own folder to all (0777), so that one lies in another, which only this user may
    enter.
    """
    with TemporaryDirectory(
        prefix=PRIVATE_FOLDER, dir=private_place(), ignore_cleanup_errors=True
    ) as folder:
        yield f"{folder}/r"


def private_place() -> str:
    """The folder that a private Ray's own is made in; raises UserError.

    A socket's path is short: a TMPDIR that is too long gives way to /tmp.
    """
    places = [os.environ.get("RAY_TMPDIR", ""), tempfile.gettempdir(), "/tmp"]
    for place in map(os.path.abspath, filter(None, places)):
        if len(os.fsencode(place)) <= MAX_PLACE_BYTES and os.access(place, os.W_OK | os.X_OK):
            return place
    raise UserError(
        f"Ray needs a folder for its sockets whose path has at most {MAX_PLACE_BYTES} bytes and "
        "where this user may write: set RAY_TMPDIR to one"
    )


def shipped_environment() -> dict[str, str]:
    """What workers on other nodes need of this process's environment to find the bucket."""
    return {name: os.environ[name] for name in SHIPPED_ENVIRONMENT if name in os.environ}


def resources() -> tuple[dict[str, float], dict[str, float]]:
    """(all, free) of the cluster: CPUs, GPUs, ..."""
    import ray

    return ray.cluster_resources(), ray.available_resources()


def nodes() -> dict[str, str]:
    """The living nodes: id => address."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def on_each_node(action: Callable[[], Any], *, seconds: float) -> Iterator[tuple[str, Any]]:
    """(address, what the action returns in a process there, or the error that it ends with)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
    def run() -> Any:
        return action()

    here = nodes()
    started = [
        run.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in here
    ]
    ray.wait(started, num_returns=len(started), timeout=seconds)
    for address, result in zip(here.values(), started, strict=True):
        try:
            yield address, ray.get(result, timeout=0)
        except ray.exceptions.RayError as error:
            yield address, error


def cpus_of_this_node() -> int:
    """The CPUs that the node of this worker gives to Ray."""
    import ray

    this = ray.get_runtime_context().get_node_id()
    cpus = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == this]
    return max(int(cpus[0]), 1) if cpus else 1
