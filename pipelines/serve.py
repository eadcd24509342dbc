"""`aegan serve` and `make serve`: our own code answers HTTP requests with a model's weights.

`pipelines/serving/endpoint.py` is what listens, `served.py` what it serves (docs/serving.md).
"""

import argparse
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress

import torch
import uvicorn

from pipelines.base.errors import UserError, run_stage
from pipelines.ingest.decode import available_cores
from pipelines.registry import tracking

HOST, PORT = "127.0.0.1", 5001
MAX_CONNECTIONS = 256
END_SECONDS = 30  # that requests at work have when the server is asked to end

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Of the command's options."""
    options = argparse.ArgumentParser(prog="aegan serve", description=__doc__)
    options.add_argument(
        "--model",
        default="",
        help="models:/NAME@ALIAS, which is followed; models:/NAME/3; a folder",
    )
    options.add_argument("--port", default=str(PORT), help="0 takes a free one")
    options.add_argument(
        "--host", default=HOST, help="the address to listen on; another than 127.0.0.1 lets in all"
    )
    options.add_argument(
        "--name", action="append", default=[], help="a host name that requests may use, too"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    with _listen(given.host, given.port) as listener:
        # Slow to import: a taken port is said before.
        from pipelines.serving import endpoint, served

        address = given.model or served.registered_model()
        torch.set_num_threads(max(1, available_cores() // 2))  # the others read, write pictures
        model = served.load(address)
        served.warm_up(model.model)
        application = endpoint.Application(model, names=tuple(given.name))
        if tracking.is_alias(address):
            served.follow(
                address,
                model.about["model"],
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
        host, port = listener.getsockname()[:2]
        log.info("%s answers at http://%s:%d/invocations; Ctrl-C ends it", address, host, port)
        with suppress(KeyboardInterrupt):  # Ctrl-C or SIGTERM, once the last answer is sent
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: str) -> socket.socket:
    """A socket that listens; raises UserError."""
    cure = "choose another: make serve PORT=5002"
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"the port must be a number from 0 to 65535; {cure}")
    try:
        return socket.create_server((host, int(port)), backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise UserError(f"port {port} of {host}: {error.strerror}; {cure}") from None


if __name__ == "__main__":
    run_stage(main)
