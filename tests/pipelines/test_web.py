import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.errors import UserError
from pipelines.web import fetch, without_secrets

pytestmark = pytest.mark.integration

CONTENT = bytes(range(256)) * 10_000


class Handler(BaseHTTPRequestHandler):
    """Answers well at /good, late at /flaky, elsewhere at /moved, and badly everywhere else."""

    failures = 0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/moved":
            self.answer(302, Location="/good")
        elif path == "/insecure":
            self.answer(302, Location=f"http://0.0.0.0:{self.server.server_port}/good")
        elif path == "/flaky" and not Handler.failures:
            Handler.failures += 1
            self.answer(503)
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


@pytest.mark.parametrize("path", ["good", "moved", "flaky"])
def test_a_file_arrives_whole_also_after_a_redirect_or_a_failure(address, tmp_path, path):
    fetch(f"{address}/{path}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answers 404 Not Found: check the address"),
        ("short", r"cannot be fetched \(ChunkedEncodingError\)"),
        ("insecure", "is not encrypted: use https://"),
    ],
)
def test_anything_else_is_one_clear_error(address, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        fetch(f"{address}/{path}", tmp_path / "file")


def test_a_refused_connection_is_one_clear_error_without_the_secrets_of_the_address(tmp_path):
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        fetch("http://user:word@127.0.0.1:9/set.zip?token=secret", tmp_path / "file")
    assert "word" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_messages_and_manifests_show_an_address_without_its_secrets():
    assert without_secrets("https://me:pw@host:8443/a/b.zip?X=1#f") == "https://host:8443/a/b.zip"
