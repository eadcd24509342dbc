"""A proxy before an S3 server that misbehaves as told: errors, silence, refusals."""

import threading
import time
from collections.abc import Callable
from email.message import Message
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = Callable[[str, str], int | float | None]
"""(method, path) => an HTTP status to answer instead, seconds (float) to wait before, or None."""

CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class FaultyProxy:
    """Passes requests on to an S3 endpoint, but for those that `fault` takes."""

    def __init__(self, endpoint: str) -> None:
        self.fault: Fault = lambda method, path: None
        self.refuses: Callable[[Message], int | None] = lambda headers: None  # status, by headers
        self.refused = 0  # requests answered with an error so far
        self.delayed = 0
        self.requests: list[tuple[str, str]] = []
        target = urlsplit(endpoint).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.read_body()
                proxy.requests.append((self.command, self.path))
                fault = proxy.refuses(self.headers) or proxy.fault(self.command, self.path)
                if isinstance(fault, float):
                    proxy.delayed += 1
                    time.sleep(fault)
                elif fault is not None:
                    proxy.refused += 1
                    xml = f"<Error><Code>{CODES[fault]}</Code><Message>as told</Message></Error>"
                    self.answer(fault, [("Content-Type", "application/xml")], xml.encode())
                    return
                upstream = HTTPConnection(target)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
                if body or self.command in ("PUT", "POST"):
                    headers["Content-Length"] = str(len(body))
                upstream.request(self.command, self.path, body or None, headers)
                response = upstream.getresponse()
                content = response.read()
                self.answer(response.status, response.getheaders(), content)
                upstream.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def read_body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    pass  # BaseHTTPRequestHandler has answered it
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass  # trailers
                return b"".join(parts)

            def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                self.send_response_only(status)
                length = str(len(content))
                for name, value in headers:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = value
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def during(self, seconds: float, answer: int | float) -> None:
        """Misbehave so for some time from now on."""
        end = time.monotonic() + seconds
        self.fault = lambda method, path: answer if time.monotonic() < end else None
