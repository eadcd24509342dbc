import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from pipelines import web
from pipelines.errors import UserError
from pipelines.web import fetch, without_secrets

pytestmark = pytest.mark.integration

CONTENT = bytes(range(256)) * 10_000


class Handler(BaseHTTPRequestHandler):
    """Answers well at /good, late at /flaky, elsewhere at /moved, and badly everywhere else."""

    failures = 0
    requests: ClassVar[list[str]] = []  # "host path" of each

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Handler.requests.append(f"{self.headers['Host'].partition(':')[0]} {path}")
        if path == "/moved":
            self.answer(302, Location="/good")
        elif path == "/moved-with-a-long-body":
            self.answer(302, Location="/good")
            with contextlib.suppress(ConnectionError):
                for _ in range(64):
                    self.wfile.write(bytes(1024**2))
                Handler.requests.append("the whole body was read")
        elif path == "/nowhere":
            self.answer(302, Location="https://[nowhere")
        elif path == "/circle":
            self.answer(302, Location="/circle")
        elif path == "/insecure":
            self.answer(302, Location=f"http://0.0.0.0:{self.server.server_port}/good")
        elif path == "/flaky" and not Handler.failures:
            Handler.failures += 1
            self.answer(503)
        elif path == "/unsized":
            self.answer(200, **{"Content-Length": "9" * 5000})
            self.wfile.write(CONTENT)
        elif path in ("/good", "/short", "/flaky"):
            self.answer(200, **{"Content-Length": str(len(CONTENT))})
            self.wfile.write(CONTENT[: 1000 if path == "/short" else None])
        else:
            self.answer(404)

    def answer(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["good", "moved", "flaky", "unsized"])
def test_a_file_arrives_whole_also_after_a_redirect_or_a_failure(address, tmp_path, path):
    fetch(f"{address}/{path}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answers 404 Not Found: check the address"),
        ("short", r"cannot be fetched \(ChunkedEncodingError\)"),
        ("insecure", r"http://0.0.0.0:\d+/good is not encrypted: use https://"),
        ("nowhere", r"cannot be fetched \(ValueError\)"),
        ("circle", r"cannot be fetched \(TooManyRedirects\)"),
    ],
)
def test_anything_else_is_one_clear_error(address, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        fetch(f"{address}/{path}", tmp_path / "file")


def test_an_unsafe_redirect_is_never_requested(address, tmp_path):
    Handler.requests.clear()
    with pytest.raises(UserError, match="is not encrypted"):
        fetch(f"{address}/insecure", tmp_path / "file")
    assert Handler.requests == ["127.0.0.1 /insecure"]


def test_redirects_are_followed_five_times_at_most(address, tmp_path):
    Handler.requests.clear()
    with pytest.raises(UserError):
        fetch(f"{address}/circle", tmp_path / "file")
    assert len(Handler.requests) == 1 + 5


def test_the_body_of_a_redirect_is_not_read(address, tmp_path):
    Handler.requests.clear()
    fetch(f"{address}/moved-with-a-long-body", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert Handler.requests == ["127.0.0.1 /moved-with-a-long-body", "127.0.0.1 /good"]


def test_more_than_the_limit_is_not_written(address, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "MAX_BYTES", 2 * web.CHUNK_BYTES)
    with pytest.raises(UserError, match=r"/good is larger than 2097152 bytes: fetch it yourself"):
        fetch(f"{address}/good?token=secret", tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= web.MAX_BYTES


def test_a_refused_connection_is_one_clear_error_without_the_secrets_of_the_address(tmp_path):
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        fetch("http://user:word@127.0.0.1:9/set.zip?token=secret", tmp_path / "file")
    assert "word" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_messages_and_manifests_show_an_address_without_its_secrets():
    assert without_secrets("https://me:pw@host:8443/a/b.zip?X=1#f") == "https://host:8443/a/b.zip"
