"""An S3 server on the loopback interface."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import ThreadedMotoServer

from tests.compose import free_port


class S3Server:
    """All of one process hold the same buckets, which outlive them."""

    def __init__(self, *, conditional_writes: bool = True) -> None:
        """Without conditional writes it is as some servers are: it writes whatever is asked."""
        self._conditional_writes = conditional_writes
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()
        if not self._conditional_writes:
            http_server: Any = self._server._server
            http_server.app = _without_conditions(http_server.app)

    def kill(self) -> None:
        self._server.stop()


def _without_conditions(application: Any) -> Any:
    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        for header in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
            environ.pop(header, None)
        return application(environ, start_response)

    return answer


@contextmanager
def s3_server(*, conditional_writes: bool = True) -> Iterator[str]:
    """The address of one that ends with the block."""
    server = S3Server(conditional_writes=conditional_writes)
    try:
        yield server.address
    finally:
        server.kill()
