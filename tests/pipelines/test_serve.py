"""`make serve` as a real process on loopback, asked and attacked over its socket."""

import base64
import http.client
import importlib.util
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import aegan
from pipelines.base import defaults
from pipelines.serving import endpoint
from tests.latents import add_density, small_density
from tests.trained import write_model

ROOT = Path(__file__).parent.parent.parent
LATENT_DIM = 8
ZEROS = [0.0] * LATENT_DIM
START_SECONDS = 120
LEAK = re.compile(r"/\w+/\w+|\.py\b|Traceback|line \d|0x[0-9a-f]{6}|<[a-z]")  # paths, traces, reprs

pytestmark = [pytest.mark.slow, pytest.mark.fault("served requests")]


class Server:
    """A running server's process, port and log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log
        give_up = time.monotonic() + START_SECONDS
        while not (found := re.search(r"http://[\d.:\[\]]+:(\d+)/invocations", self.log)):
            assert process.poll() is None, self.log
            assert time.monotonic() < give_up, self.log
            time.sleep(0.1)
        self.port = int(found[1])

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(
        self, body: bytes, path: str = "/invocations", method: str = "POST", **headers: str
    ) -> tuple[int, Any]:
        """One request on a connection of its own => status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} | names)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()

    def ask_for(self, operation: str, rows: list[Any], **params: Any) -> tuple[int, Any]:
        request = {"dataframe_records": rows, "params": {"operation": operation, **params}}
        return self.ask(json.dumps(request).encode())

    def raw(self, content: bytes) -> bytes:
        """What comes back for bytes as they are, until the server is silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            with suppress(OSError):  # it need not read to the end
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
            found = b""
            with suppress(ConnectionResetError):
                while piece := connection.recv(1 << 16):
                    found += piece
        return found


@contextmanager
def serving(
    model: Path, folder: Path, code: str = "", *, arguments: tuple[str, ...] = ()
) -> Iterator[Server]:
    """The server as its command starts it; `code` runs first, to make limits short."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    start = f"{code}\nfrom pipelines.base.command import run_command\nrun_command('serve')"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", start, "--model", str(model), "--port", "0", *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("served") / "model")
    return add_density(folder, small_density(LATENT_DIM))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, folder.parent) as running:
        yield running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def impatient(folder: Path) -> Iterator[Server]:
    """A server whose clocks run thirty times as fast, and where few may wait."""
    code = "from pipelines.serving import endpoint as e\ne.BODY_SECONDS, e.IDLE_SECONDS = 1, 2"
    code += "\ne.MAX_WAITING = 8"
    with serving(folder, folder.parent, code) as running:
        yield running


def pixels(records: list[dict[str, Any]]) -> torch.Tensor:
    files = [io.BytesIO(base64.b64decode(record["image"])) for record in records]
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))


def check_refusal(status: int, answer: Any, expected: int = 400) -> None:
    """One sentence, without anything of the server's own."""
    assert status == expected
    assert answer.keys() == {"error_code", "message"}
    message = answer["message"]
    assert 0 < len(message) < 300
    assert "\n" not in message
    assert not LEAK.search(message), message


def test_all_operations_are_answered_as_the_library_does(server: Server, folder: Path) -> None:
    model = aegan.load(folder)
    status, answer = server.ask_for("generate", [], count=3, seed=7)
    generated = answer["predictions"]
    assert status == 200
    assert torch.equal(pixels(generated), aegan.sample(model, 3, seed=7))
    options = {"latents": "fitted", "temperature": 0.5}
    _, fitted = server.ask_for("generate", [], count=3, seed=7, **options)
    expected = aegan.sample(model, 3, seed=7, latents="fitted", temperature=0.5)
    assert torch.equal(pixels(fitted["predictions"]), expected)
    latents = [{"latent": record["latent"]} for record in generated]
    assert server.ask_for("generate", latents) == (200, answer)
    images = [{"image": record["image"]} for record in generated]
    _, encoded = server.ask_for("encode", images)
    found = torch.tensor([record["latent"] for record in encoded["predictions"]])
    torch.testing.assert_close(found, aegan.encode(model, pixels(generated)))
    _, rebuilt = server.ask_for("reconstruct", images)
    assert len(rebuilt["predictions"]) == 3
    _, frames = server.ask_for("interpolate", images, num_frames=4, path="linear")
    expected = aegan.interpolate(model, found[:-1], found[1:], num_frames=4, path="linear")
    difference = pixels(frames["predictions"]).int() - expected.flatten(0, 1).int()
    assert difference.abs().max() <= 1


def test_version_says_what_is_served_and_nothing_of_the_machine(
    server: Server, folder: Path
) -> None:
    status, answer = server.ask(b"", "/version", "GET")
    assert status == 200
    assert answer["model"] == "model"
    assert answer["latent_dim"] == LATENT_DIM
    assert set(answer["sha256"]) == {"config.json", "ema.safetensors", "latents.safetensors"}
    assert answer["has_fitted_latents"] is True
    assert str(folder.parent) not in json.dumps(answer)
    assert server.ask(b"", "/ping", "GET") == (200, {"status": "ok"})
    assert server.ask(b"", "/health", "GET") == (200, {"status": "ok"})


# What hypothesis sends: requests that are nearly right, and anything else.
NAMES = st.sampled_from(["image", "latent", "latents", "operation", "params", "inputs", "x"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)
LATENTS = st.lists(st.floats(-3, 3) | st.integers(-3, 3), min_size=8, max_size=8)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["latent"]) | NAMES, LATENTS | ANYTHING, max_size=2), max_size=3
)
PARAMS = st.fixed_dictionaries(
    {"operation": st.sampled_from(["generate", "encode", "interpolate", "reconstruct"]) | ANYTHING},
    optional={
        "count": st.integers(1, 4) | ANYTHING,
        "seed": st.integers(0, 9) | ANYTHING,
        "num_frames": st.integers(2, 4) | ANYTHING,
        "path": st.sampled_from(["slerp", "linear"]) | ANYTHING,
        "cuont": ANYTHING,
    },
)
BODIES = st.one_of(
    st.fixed_dictionaries({"dataframe_records": ROWS | ANYTHING, "params": PARAMS | ANYTHING}).map(
        lambda request: json.dumps(request).encode()
    ),
    st.dictionaries(
        st.sampled_from(["dataframe_records", "dataframe_split", "inputs", "instances", "params"]),
        ANYTHING,
    ).map(lambda request: json.dumps(request).encode()),
    st.binary(max_size=40),
)


def test_any_body_is_answered_as_asked_or_refused_in_one_sentence(
    server: Server, record_property: Any
) -> None:
    statuses = []

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(body=BODIES)
    def ask(body: bytes) -> None:
        status, answer = server.ask(body)
        statuses.append(status)
        if status != 200:
            check_refusal(status, answer)
            return
        request = json.loads(body)  # what was answered is what was asked
        rows, params = request["dataframe_records"], request["params"]
        assert params["operation"] in ("generate", "interpolate")
        if params["operation"] == "generate":
            assert len(answer["predictions"]) == (len(rows) or params.get("count", 1))
        assert all(set(row) - {"latent"} <= {"image"} for row in rows)
        assert "cuont" not in params

    ask()
    assert {200, 400} <= set(statuses)
    record_property("faults", len(statuses))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 500_000, "more values"),
        (b"[" * 9_000, "nested too deeply"),
        (b'{"dataframe_records": [{"latent": [1e999, 0, 0, 0, 0, 0, 0, 0]}], "params": '
         b'{"operation": "generate"}}', "finite"),
        (b'{"dataframe_records": [{"latent": [NaN]}]}', "NaN is no JSON number"),
        (b'{"dataframe_records": [], "params": {"operation": "generate", "count": null}}',
         "params.count is null"),
        (b'{"dataframe_records": [{"latents": [1]}], "params": {"operation": "generate"}}',
         r"latents\" is unknown"),
        (b'{"instances": [{"latent": [1]}], "params": {"operation": "generate"}}', "instances"),
        (b'{"inputs": {"latent": [[1]]}, "params": {"operation": "generate"}}', "inputs"),
        (b'{"dataframe_records": [], "params": {"operation": "\\ud800\\u202e"}}', "operation is"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_a_400_with_its_reason(
    server: Server, body: bytes, message: str
) -> None:
    status, answer = server.ask(body)
    check_refusal(status, answer)
    assert re.search(message, answer["message"])


def test_whole_number_latents_are_answered(server: Server) -> None:
    whole = server.ask_for("generate", [{"latent": [1] * LATENT_DIM}])
    assert whole[0] == 200
    assert whole == server.ask_for("generate", [{"latent": [1.0] * LATENT_DIM}])


def test_hostile_pictures_cost_no_more_than_a_request_may(server: Server) -> None:
    file = io.BytesIO()
    Image.new("L", (4096, 4096)).save(file, "JPEG", progressive=True)
    head, _, scan = file.getvalue()[:-2].rpartition(b"\xff\xda")
    jpeg = head + (b"\xff\xda" + scan) * 90 + b"\xff\xd9"  # 45 kB that cost seconds each
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "PNG")
    for content in (jpeg, jpeg[:-2], file.getvalue()):
        rows = [{"image": base64.b64encode(content).decode()}] * 200
        started = time.monotonic()
        status, answer = server.ask_for("encode", rows)
        check_refusal(status, answer)
        assert "pixels to read" in answer["message"]
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5001", "127.0.0.1.evil.example", "127.1", "0.0.0.0", ""]
)
def test_a_name_that_leads_here_by_dns_rebinding_is_refused(server: Server, host: str) -> None:
    for path, method in (("/invocations", "POST"), ("/version", "GET")):
        status, answer = server.ask(b"{}", path, method, Host=host)
        check_refusal(status, answer, expected=403)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:5001", "LOCALHOST", "[::1]:5001"])
def test_names_of_this_machine_are_answered(server: Server, host: str) -> None:
    assert server.ask(b"", "/ping", "GET", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (403, {"Origin": "https://evil.example"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "http://localhost:3000"}),
        (403, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"Sec_Fetch_Site": "same-site"}),
        (415, {"Content_Type": "application/x-www-form-urlencoded"}),
        (415, {"Content_Type": "text/plain"}),
        (415, {"Content_Type": "multipart/form-data; boundary=x"}),
        (415, {"Content_Type": "application/json; charset=utf-16"}),
        (415, {"Content_Type": ""}),
        (415, {"Content_Encoding": "gzip"}),
    ],
)
def test_a_web_page_in_a_browser_here_cannot_ask(
    server: Server, status: int, headers: dict[str, str]
) -> None:
    body = json.dumps({"dataframe_records": [], "params": {"operation": "generate"}}).encode()
    assert server.ask(body)[0] == 200
    check_refusal(*server.ask(body, **headers), expected=status)


def test_no_answer_allows_another_origin_to_read_it(server: Server) -> None:
    request = b"OPTIONS /invocations HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
    request += b"Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n"
    answer = server.raw(request).lower()
    assert b" 403 " in answer.splitlines()[0]
    assert b"access-control" not in answer


def test_other_addresses_and_methods_are_refused_in_one_sentence(server: Server) -> None:
    check_refusal(*server.ask(b"", "/", "GET"), expected=404)
    check_refusal(*server.ask(b"", "/../../etc/passwd", "GET"), expected=404)
    check_refusal(*server.ask(b"{}", "/invocations", "GET"), expected=405)
    check_refusal(*server.ask(b"{}", "/version", "POST"), expected=405)


@pytest.mark.parametrize(
    "head", [b"Content-Length: 99999999999999999999", b"Content-Length: 33554433"]
)
def test_a_body_that_says_it_is_huge_is_refused_before_it_is_read(
    server: Server, head: bytes
) -> None:
    request = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in server.raw(request + head + b"\r\n\r\n{").splitlines()[0]


def test_a_body_in_chunks_is_cut_at_the_limit(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 20)

    connection = http.client.HTTPConnection("localhost", server.port, timeout=60)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/invocations", chunks(), kind, encode_chunked=True)
    response = connection.getresponse()
    check_refusal(response.status, json.loads(response.read()), expected=413)
    connection.close()


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\n{}",
        b"GET /ping HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /ping HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_forgotten(server: Server, content: bytes) -> None:
    answer = server.raw(content)
    assert not answer or re.match(rb"HTTP/1.1 40[03] ", answer)
    assert server.ask(b"", "/ping", "GET")[0] == 200


def test_a_slow_body_is_told_so_and_cut(impatient: Server) -> None:
    request = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as connection:
        connection.sendall(request + b"Content-Length: 1000\r\n\r\n")
        started = time.monotonic()
        with suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - started < 20:
                connection.sendall(b" ")
                time.sleep(0.1)
        assert 1 < time.monotonic() - started < 10
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as connection:
        connection.sendall(request + b"Content-Length: 1000\r\n\r\n")
        assert b" 408 " in connection.recv(1 << 16).splitlines()[0]


def test_slow_headers_and_silence_are_cut(impatient: Server) -> None:
    for said in (b"", b"GET /ping HTTP/1.1\r\nHost: local"):
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as connection:
            connection.sendall(said)
            started = time.monotonic()
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            assert time.monotonic() - started < 10


def test_an_answer_that_nobody_takes_is_dropped(impatient: Server) -> None:
    body = json.dumps(
        {"dataframe_records": [], "params": {"operation": "generate", "count": 1024}}
    ).encode()
    request = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with connection:
        connection.connect(("127.0.0.1", impatient.port))
        length = f"Content-Length: {len(body)}\r\n\r\n".encode()
        for _ in range(8):  # more answers than buffers of the system hold
            connection.sendall(request + length + body)
        cut = select.poll()
        cut.register(connection, 0)  # a reset, and nothing else
        assert cut.poll(60_000)
    assert "an answer was not taken" in impatient.log
    assert impatient.ask(b"", "/ping", "GET")[0] == 200


def at_once(clients: int, ask: Callable[[int], Any]) -> list[Any]:
    """What so many clients are answered."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, range(clients)))


def test_more_requests_at_once_than_may_wait_are_told_to_come_back(impatient: Server) -> None:
    answers = at_once(24, lambda _: impatient.ask_for("generate", [], count=400))
    assert {status for status, _ in answers} == {200, 503}
    assert impatient.ask_for("generate", [])[0] == 200


def test_a_fault_of_the_server_s_own_is_a_500_without_a_word_of_its_inside(
    folder: Path, tmp_path: Path
) -> None:
    code = "import aegan.operations as s\ns.to_records = lambda **_: 1 / 0"  # a bug
    with serving(folder, tmp_path, code) as broken:
        status, answer = broken.ask_for("generate", [])
        check_refusal(status, answer, expected=500)
        assert "ZeroDivisionError" in broken.log
        assert broken.ask(b"", "/ping", "GET")[0] == 200


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_with_the_last_answer_and_without_a_trace(
    folder: Path, tmp_path: Path, end: signal.Signals
) -> None:
    with serving(folder, tmp_path, arguments=("--json",)) as running:
        answers: list[int] = []
        asked = threading.Thread(
            target=lambda: answers.append(running.ask_for("generate", [], count=1024)[0])
        )
        asked.start()
        time.sleep(0.15)
        running.process.send_signal(end)
        asked.join()
        assert running.process.wait(timeout=30) == 0
        assert answers == [200]
        words, facts = running.log.splitlines()
        address = f"http://127.0.0.1:{running.port}"
        assert f"{address}/invocations; Ctrl-C ends it" in words
        known = {"address": address, "model": str(folder), "version": folder.name}
        assert json.loads(facts) == known


def jpeg(size: tuple[int, int], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize(size).save(file, "JPEG", **options)
    return file.getvalue()


def send(server: Server, content: bytes, query: str = "", **headers: str) -> tuple[int, str, bytes]:
    """An image file as it is => status, kind and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(
        "POST", f"/invocations{query}", content, {"Content-Type": "image/jpeg"} | names
    )
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers["Content-Type"], body


def test_an_image_file_comes_back_as_its_reconstruction(server: Server, folder: Path) -> None:
    model, photo = aegan.load(folder), jpeg((60, 40))
    status, kind, body = send(server, photo, Accept="image/png")
    assert (status, kind) == (200, "image/png")
    image = {"image": base64.b64encode(photo).decode()}
    [record] = server.ask_for("reconstruct", [image])[1]["predictions"]
    assert base64.b64decode(record["image"]) == body
    assert json.loads(send(server, photo)[2]) == {"predictions": [record]}
    [encoded] = json.loads(send(server, photo, "?operation=encode")[2])["predictions"]
    assert len(encoded["latent"]) == model.latent_dim


def test_a_picture_is_given_only_where_the_answer_is_one(server: Server) -> None:
    png = {"Accept": "image/png"}
    request = {"dataframe_records": [], "params": {"operation": "generate", "count": 2}}
    check_refusal(*server.ask(json.dumps(request).encode(), **png), expected=406)
    status, _, body = send(server, jpeg((20, 20)), "?operation=encode", **png)
    check_refusal(status, json.loads(body), expected=406)


@pytest.mark.parametrize(
    ("content", "query", "message"),
    [
        (b"no image", "", "not an image"),
        (b"", "", "empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "", "HEIC .* pillow-heif"),
        (jpeg((20, 20))[:-400], "", "ends too early"),
        (jpeg((20, 20)), "?seed=1", "params.seed belongs to generate"),
        (jpeg((20, 20)), "?size=1", "param .*size.* is unknown"),
    ],
)
def test_a_file_that_is_no_usable_image_is_a_400_with_its_reason(
    server: Server, content: bytes, query: str, message: str
) -> None:
    if "HEIC" in message and importlib.util.find_spec("pillow_heif"):
        pytest.skip("HEIC can be read here")
    status, _, body = send(server, content, query)
    assert status == 400
    assert re.search(message, json.loads(body)["message"])


def test_a_picture_of_48_megapixels_is_answered(server: Server) -> None:
    assert send(server, jpeg((8000, 6000), quality=60), Accept="image/png")[0] == 200


def test_a_gray_model_and_one_without_encoder_say_what_they_do(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "gan", encoder=False)
    with serving(folder, tmp_path) as gan:
        status, _, body = send(gan, jpeg((20, 20)))
        check_refusal(status, json.loads(body))
        assert "no encoder" in json.loads(body)["message"]
        assert gan.ask_for("generate", [])[0] == 200
    with serving(write_model(tmp_path / "gray", channels=1), tmp_path) as gray:
        _, _, body = send(gray, jpeg((20, 20)), Accept="image/png")
        assert Image.open(io.BytesIO(body)).mode == "L"


def test_requests_at_once_share_passes_and_are_answered_as_alone(
    server: Server, folder: Path
) -> None:
    images = [base64.b64encode(jpeg((20 + n, 20))).decode() for n in range(40)]

    def ask(number: int) -> tuple[int, Any]:
        if number % 10 == 3:
            return server.ask_for("encode", [{"image": "AAAA"}])
        operation = "encode" if number % 2 else "reconstruct"
        return server.ask_for(operation, [{"image": images[number]}])

    alone = [ask(number) for number in range(40)]
    passes = metric(server, "aegan_batch_rows_count")
    together = at_once(40, ask)
    assert metric(server, "aegan_batch_rows_count") - passes < 40  # 54 without batches
    for (status, one), (again, other) in zip(alone, together, strict=True):
        assert status == again
        if status != 200:
            assert one == other  # and it spoils no other's answer
        elif "latent" in one["predictions"][0]:
            expected, found = (torch.tensor(a["predictions"][0]["latent"]) for a in (one, other))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        else:
            difference = pixels(one["predictions"]).int() - pixels(other["predictions"]).int()
            assert difference.abs().max() <= 1


def metric(server: Server, name: str) -> float:
    """The sum of a series of /metrics over its labels."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = [line for line in lines if re.match(rf"{name}(\{{.*\}})? ", line)]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_small_requests_go_between_the_passes_of_a_large_one(server: Server) -> None:
    large = threading.Thread(target=server.ask_for, args=("generate", []), kwargs={"count": 1024})
    large.start()
    time.sleep(0.05)
    assert server.ask_for("generate", [])[0] == 200
    assert large.is_alive()
    large.join()


def test_a_pass_that_fails_with_one_request_is_answered_for_the_others(
    folder: Path, tmp_path: Path
) -> None:
    code = "from pipelines.serving import batching as b\nrun = b.run\n"
    code += "b.run = lambda m, n, x: 1 / 0 if (x.abs() > 9).any() else run(m, n, x)"  # a bug
    with serving(folder, tmp_path, code) as server:
        rows = [[{"latent": [9.5 if n == 5 else 0.1 * n] * LATENT_DIM}] for n in range(12)]
        answers = at_once(12, lambda n: server.ask_for("generate", rows[n]))
        assert [status for status, _ in answers] == [200] * 5 + [500] + [200] * 6


def test_who_goes_away_takes_no_place(server: Server) -> None:
    body = json.dumps(
        {"dataframe_records": [], "params": {"operation": "generate", "count": 1024}}
    ).encode()
    head = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    give_up = time.monotonic() + 20
    while metric(server, 'aegan_requests_total{address="/invocations",status="gone"}') < 20:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert metric(server, "aegan_requests_at_work") == 0
    assert server.ask_for("generate", [])[0] == 200


def test_many_requests_with_malformed_ones_among_them_leave_no_trace(server: Server) -> None:
    image = {"image": base64.b64encode(jpeg((30, 30))).decode()}

    def ask(client: int) -> list[int]:
        malformed = b'{"dataframe_records": [{"image": "AAAA"}], "params": {"operation": "encode"}}'
        return [
            server.ask(malformed)[0]
            if number % 10 == client % 10
            else server.ask_for("reconstruct", [image])[0]
            for number in range(20)
        ]

    before = metric(server, "process_resident_memory_bytes")
    statuses = [status for found in at_once(32, ask) for status in found]
    assert (statuses.count(200), statuses.count(400)) == (576, 64)
    assert metric(server, "process_resident_memory_bytes") - before < 64 * 2**20


def test_what_is_counted_has_few_names(server: Server) -> None:
    for number in range(20):
        server.ask(b"", f"/unknown-{number}", "GET")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert 'address="other",status="404"' in text
    assert "unknown" not in text
    assert 'aegan_model_info{version="model"} 1.0' in text
    assert len(text.splitlines()) < 400


def test_the_description_is_openapi_and_the_page_needs_no_network(server: Server) -> None:
    _, document = server.ask(b"", "/openapi.json", "GET")
    assert document["openapi"].startswith("3.1")
    assert {*document["paths"]} <= {*endpoint.METHODS}
    for path, methods in document["paths"].items():
        assert {method.upper() for method in methods} <= {*endpoint.METHODS[path]}
    params = document["paths"]["/invocations"]["post"]["requestBody"]["content"]
    example = params["application/json"]["schema"]["example"]
    assert server.ask(json.dumps(example).encode())[0] == 200
    page = server.raw(b"GET /docs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b"text/html" in page
    assert not re.search(rb"""(src|href)=.?(https?:)?//""", page)
    assert b"default-src 'none'" in page


def test_its_own_number_and_the_names_it_was_told_are_answered(
    folder: Path, tmp_path: Path
) -> None:
    with serving(folder, tmp_path, arguments=("--name", "aegan.example")) as named:
        for host, status in (("aegan.example", 200), ("AEGAN.example:80", 200), ("other", 403)):
            assert named.ask(b"", "/readyz", "GET", Host=host)[0] == status
    ready = {"status": "ready", "model": "model", "problem": ""}
    with serving(folder, tmp_path, arguments=("--host", "127.0.0.2")) as elsewhere:
        connection = http.client.HTTPConnection("127.0.0.2", elsewhere.port, timeout=60)
        connection.request("GET", "/readyz")
        assert json.loads(connection.getresponse().read()) == ready
        connection.close()


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="a machine without IPv6")
def test_it_listens_on_an_address_of_ipv6(folder: Path, tmp_path: Path) -> None:
    with serving(folder, tmp_path, arguments=("--host", "::1")) as server:
        assert f"http://[::1]:{server.port}/invocations" in server.log
        connection = http.client.HTTPConnection("::1", server.port, timeout=60)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()


def test_the_number_of_ipv6_that_a_request_came_by_is_a_name() -> None:
    scope = {"headers": [(b"host", b"[fd00::1]:5001")], "server": ("fd00::1", 5001)}
    endpoint.check_sender(scope, frozenset())
    with pytest.raises(endpoint.RefusalError, match="its own names only"):
        endpoint.check_sender(scope | {"server": ("fd00::2", 5001)}, frozenset())


@pytest.mark.parametrize("host", ["nowhere.invalid", "n" * 70, "192.0.2.1"])
def test_a_host_that_is_none_of_this_machine_is_one_line_with_the_cure(host: str) -> None:
    words = run("--host", host, "--port", "0")
    assert re.search(rf"{host}: .*; choose another: --host 127.0.0.1$", words)


def run(*arguments: str, **environment: str) -> str:
    """The last words of a server that cannot start."""
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.serve", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    return ended.stderr


def test_a_port_that_is_taken_is_one_line_with_the_cure(server: Server, folder: Path) -> None:
    words = run("--model", str(folder), "--port", str(server.port))
    assert f"port {server.port} of 127.0.0.1: Address already in use" in words
    assert "make serve PORT=5002" in words
    assert "'--port': Input should be less than or equal to 65535" in run(
        "--model", str(folder), "--port", "70000"
    )


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    assert "holds no trained model" in run("--model", str(tmp_path), "--port", "0")


def test_it_listens_on_loopback_only(server: Server) -> None:
    assert defaults.HOST == "127.0.0.1"
    ours = f"0100007F:{server.port:04X}"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert ours in listening
    assert f"00000000:{server.port:04X}" not in listening
