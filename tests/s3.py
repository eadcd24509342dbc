"""An S3 server on the loopback interface."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer

from tests.compose import free_port


class S3Server:
    """All of one process hold the same buckets, which outlive them."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def kill(self) -> None:
        self._server.stop()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of one that ends with the block."""
    server = S3Server()
    try:
        yield server.address
    finally:
        server.kill()
