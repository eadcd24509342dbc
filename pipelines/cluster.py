"""Start a private Ray on this machine, or join the cluster that RAY_ADDRESS names."""

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # training sends nothing through Ray's object store


def show_ray_logs() -> bool:
    """Ray's own output is hidden unless AEGAN_RAY_LOGS=1 asks for it."""
    return os.environ.get("AEGAN_RAY_LOGS") == "1"


@contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[bool]:
    """Connected to Ray inside; yields whether it is a private one on this machine.

    A private one has a dashboard on request: Ray Tune waits for it forever when it stops a trial.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning
    local = "RAY_ADDRESS" not in os.environ
    if local and "RAY_AUTH_MODE" not in os.environ:
        # A token for this process tree only: Ray would write one into the home folder.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if local:
        # Ray's switch for laptops: everything listens on 127.0.0.1 instead of all interfaces.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray  # after the environment is set, which importing it reads

    private: dict[str, Any] = {
        "address": "local",
        "include_dashboard": dashboard,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
    }
    # Ray's processes inherit that they ignore Ctrl-C, which a terminal sends to them too: the
    # driver ends them once the workers have saved.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            logging_level=logging.INFO if show_ray_logs() else logging.ERROR,
            log_to_driver=show_ray_logs(),
            **(private if local else {}),
        )
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
    try:
        yield local
    finally:
        ray.shutdown()
