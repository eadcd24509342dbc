import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

import pytest

from pipelines.base.errors import UserError
from pipelines.ingest import https
from pipelines.ingest.https import fetch, without_secrets
from tests.pipelines import redirects

pytestmark = pytest.mark.integration

CONTENT = bytes(range(256)) * 10_000
PACKED = gzip.compress(bytes(32 * 1024**2))  # a thousandth of what it becomes


class Handler(BaseHTTPRequestHandler):
    """Answers well at /good, late at /flaky, elsewhere at /moved, and badly everywhere else."""

    failures = 0
    is_over: ClassVar[threading.Event] = threading.Event()
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
        elif path == "/asks-to-wait" and not Handler.failures:
            Handler.failures += 1
            self.answer(429, **{"Retry-After": unquote(self.path.partition("?")[2])})
        elif path.startswith("/packed"):
            self.answer(200, **{"Content-Encoding": "gzip"})
            self.wfile.write(PACKED)
        elif path.startswith("/drip"):
            self.drip(path.removeprefix("/drip-"))
        elif path == "/flaky" and not Handler.failures:
            Handler.failures += 1
            self.answer(503)
        elif path == "/unsized":
            self.answer(200, **{"Content-Length": "9" * 5000})
            self.wfile.write(CONTENT)
        elif path in ("/good", "/short", "/flaky", "/asks-to-wait"):
            self.answer(200, **{"Content-Length": str(len(CONTENT))})
            self.wfile.write(CONTENT[: 1000 if path == "/short" else None])
        else:
            self.answer(404)

    def answer(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def drip(self, where: str) -> None:
        """A byte now and then, for ever, so that no single read waits long."""
        starts = {
            "line": b"",
            "header": b"HTTP/1.1 200 OK\r\nX: ",
            "body": b"HTTP/1.1 200 OK\r\n\r\n",
            "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        }
        with contextlib.suppress(OSError):
            self.wfile.write(starts[where])
            while not Handler.is_over.wait(0.05):
                self.wfile.write(b"1")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.is_over.set()
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
        ("short", r"cannot be fetched \(ProtocolError\)"),
        ("insecure", r"http://0.0.0.0:\d+/good is not encrypted: use https://"),
        ("nowhere", r"cannot be fetched \(ValueError\)"),
        ("circle", r"cannot be fetched \(TooManyRedirects\)"),
    ],
)
def test_anything_else_is_one_clear_error(address, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        fetch(f"{address}/{path}", tmp_path / "file")


@pytest.mark.fault("sources")
def test_a_redirect_never_leads_from_elsewhere_to_this_machine_or_a_private_network(
    tmp_path, record_property
):
    names = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    names += ["-nodes", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    names += ["-subj", "/CN=everybody", "-addext", f"subjectAltName={redirects.names()}"]
    alone = ["unshare", "--net", "--mount"]
    for needed in (names, [*alone, "ip", "link"]):
        if not shutil.which(needed[0]) or subprocess.run(needed, capture_output=True).returncode:
            pytest.skip("needs openssl, and root for a network of its own")
    environment = os.environ | {
        "REQUESTS_CA_BUNDLE": str(tmp_path / "certificate"),
        "PYTHONPATH": str(Path.cwd()),
        "NO_PROXY": "*",
    }
    command = [*alone, sys.executable, redirects.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout)
    assert len(tried) == len(redirects.ROUTES)
    record_property("faults", sum(not is_followed for _, _, is_followed, _, _ in tried))
    for start, place, is_followed, result, asked in tried:
        if is_followed:
            assert (result, len(asked)) == ("followed", 1), (start, place)
        else:
            assert result.startswith("a redirect leads to "), (start, place, result)
            assert asked == [], (start, place)


@pytest.mark.fault("sources")
@pytest.mark.parametrize("where", ["line", "header", "body", "chunk"])
def test_a_source_that_drips_is_given_up_and_says_so(address, tmp_path, monkeypatch, where):
    monkeypatch.setattr(https, "WINDOW_SECONDS", 0.5)
    with pytest.raises(UserError, match=rf"/drip-{where} cannot be fetched: \d+ bytes in "):
        fetch(f"{address}/drip-{where}", tmp_path / "file")


@pytest.mark.fault("sources")
def test_an_encoding_that_was_not_asked_for_is_not_unpacked(address, tmp_path):
    message = "is sent in the encoding gzip, which was not asked for and could unpack to any size"
    with pytest.raises(UserError, match=message):
        fetch(f"{address}/packed.zip", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    fetch(f"{address}/packed.tar.gz", tmp_path / "file")  # the file's own compression
    assert (tmp_path / "file").read_bytes() == PACKED


@pytest.mark.fault("sources")
def test_a_server_that_asks_to_wait_is_waited_for_and_that_is_said(
    address, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(Handler, "failures", 0)
    fetch(f"{address}/asks-to-wait?1", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert caplog.messages == [
        f"{address}/asks-to-wait answers 429 Too Many Requests and asks to wait 1 s: "
        "try 2 of 4 in 1.0 s"
    ]


@pytest.mark.fault("sources")
@pytest.mark.parametrize("wait", ["3600", "9" * 100, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_that_asks_to_wait_for_long_is_not_waited_for(
    address, tmp_path, monkeypatch, wait
):
    monkeypatch.setattr(Handler, "failures", 0)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"Requests and asks to wait \d+ s: .*run the same command"):
        fetch(f"{address}/asks-to-wait?{quote(wait)}", tmp_path / "file")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("wait", ["soon", "-5", "9" * 5000, "Fri, 31 Dec 99999999 23:59:59 GMT"])
def test_nonsense_instead_of_a_time_to_wait_is_no_reason_to_wait(
    address, tmp_path, monkeypatch, wait
):
    monkeypatch.setattr(Handler, "failures", 0)
    fetch(f"{address}/asks-to-wait?{quote(wait)}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_proxy_that_the_environment_names_is_used(address, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", address)  # for this server any path will do
    monkeypatch.setenv("NO_PROXY", "")
    Handler.requests.clear()
    with pytest.raises(UserError, match="answers 404"):
        fetch("http://localhost:9/good", tmp_path / "file")
    assert Handler.requests == ["localhost http://localhost:9/good"]


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
    monkeypatch.setattr(https, "MAX_BYTES", 2 * https.CHUNK_BYTES)
    with pytest.raises(UserError, match=r"/good is larger than 2097152 bytes: fetch it yourself"):
        fetch(f"{address}/good?token=secret", tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= https.MAX_BYTES


def test_a_refused_connection_is_one_clear_error_without_the_secrets_of_the_address(tmp_path):
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        fetch("http://user:word@127.0.0.1:9/set.zip?token=secret", tmp_path / "file")
    assert "word" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_messages_and_manifests_show_an_address_without_its_secrets():
    assert without_secrets("https://me:pw@host:8443/a/b.zip?X=1#f") == "https://host:8443/a/b.zip"
