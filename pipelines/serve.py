"""`aegan serve` and `make serve`: our own code answers HTTP requests with a model's weights.

`pipelines/serving/endpoint.py` is what listens, `served.py` what it serves (docs/serving.md).
"""

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import uvicorn

from pipelines.base.command import run_command
from pipelines.base.errors import UserError
from pipelines.ingest.decode import available_cores
from pipelines.registry import tracking

MAX_CONNECTIONS = 256
PASSIVE = socket.AI_PASSIVE  # without a host: all addresses
END_SECONDS = 30  # that requests at work have when the server is asked to end

log = logging.getLogger(__name__)


def main(
    *,
    model: str,
    host: str,
    port: int,
    names: Sequence[str],
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """The command; its options are explained in `pipelines/cli.py`. Raises UserError.

    `ready` is told where what is served.
    """
    with _listen(host, port) as listener:
        # Slow to import: a taken port is said before.
        from pipelines.serving import endpoint, served

        address, why = (model, "") if model else served.registered_model()
        torch.set_num_threads(max(1, available_cores() // 2))  # the others read, write pictures
        first = served.load(address)
        served.warm_up(first.model)
        application = endpoint.Application(first, names=tuple(names))
        if tracking.is_alias(address):
            served.follow(
                address,
                first.about["model"],
                replace=application.replace,
                report=application.report,
            )
        config = uvicorn.Config(
            application,
            http=endpoint.Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=END_SECONDS,
        )
        number, bound = listener.getsockname()[:2]
        at = f"[{number}]:{bound}" if ":" in number else f"{number}:{bound}"
        meant = f"{address} ({why})" if why else address
        log.info("%s answers at http://%s/invocations; Ctrl-C ends it", meant, at)
        ready({"address": f"http://{at}", "model": address, "version": first.about["model"]})
        with suppress(KeyboardInterrupt):  # Ctrl-C or SIGTERM, once the last answer is sent
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises UserError."""
    try:
        kinds = [kind for kind, *_ in socket.getaddrinfo(host or None, port, flags=PASSIVE)]
        family = socket.AF_INET if socket.AF_INET in kinds else kinds[0]
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(f"host {host}", error, "--host 127.0.0.1") from None
    try:
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        other = "--port 5002, make serve PORT=5002" if is_port else "--host 127.0.0.1"
        raise _cannot_listen(f"port {port} of {host}", error, other) from None


def _cannot_listen(where: str, error: Exception, other: str) -> UserError:
    why = getattr(error, "strerror", None) or "no name of a machine"
    return UserError(f"{where}: {why}; choose another: {other}")


if __name__ == "__main__":
    run_command("serve")
