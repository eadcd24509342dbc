"""The HTTP side of serving: who may ask, how much, how long; an ASGI application on uvicorn.

The server is for programs of this machine. A web page in a browser here must not be able to use it,
and whatever one request takes (bytes, time, a place in the queue) has an end. What is answered is
the business of `aegan/operations.py`, which works in steps: pictures are read and written in a few
threads, the networks run in one (`batching.py`), and the event loop does neither.
"""

import asyncio
import base64
import json
import logging
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from aegan import operations
from pipelines.ingest.decode import available_cores
from pipelines.serving import metrics, openapi
from pipelines.serving.batching import Batcher
from pipelines.serving.served import Served

MAX_BODY_BYTES = 32 * 1024**2
MAX_HELD_BYTES = 8 * MAX_BODY_BYTES  # of bodies and answers on their way, together
MAX_WAITING = 128  # requests that are read and not answered
BODY_SECONDS = 30  # for a body to arrive, and for an answer to be taken
IDLE_SECONDS = 2 * BODY_SECONDS  # for a connection to get to the point where work is ours
PIECE_BYTES = 1 << 20  # of an answer that are sent at once
RETRY_SECONDS = "5"
OUR_NAMES = ("127.0.0.1", "localhost", "[::1]")
LOOK = ("GET", "HEAD")
METHODS = {
    "/invocations": ("POST",),
    "/ping": LOOK,
    "/health": LOOK,
    "/healthz": LOOK,
    "/readyz": LOOK,
    "/version": LOOK,
    "/metrics": LOOK,
    "/openapi.json": LOOK,
    "/docs": LOOK,
}
JSON, PNG = "application/json", "image/png"
HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]+)(:\d{1,5})?")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

log = logging.getLogger(__name__)


class RefusalError(Exception):
    """An answer other than 200: its status, its code and one sentence."""

    def __init__(self, status: int, code: str, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.code, self.headers = status, code, headers

    @property
    def content(self) -> bytes:
        """The answer's body."""
        return json.dumps({"error_code": self.code, "message": str(self)}).encode()


class DisconnectedError(Exception):
    """The one who asked has gone."""


class Answer(NamedTuple):
    """The body of a 200, and what it is."""

    content: bytes
    kind: str = JSON


class Application:
    """What is served behind ASGI: `replace` exchanges it while requests go on.

    `names` are those of this machine that requests may call it by, besides localhost.
    """

    def __init__(self, served: Served, *, names: tuple[str, ...] = ()) -> None:
        self._names = frozenset(name.lower() for name in (*OUR_NAMES, *names))
        self._readers = ThreadPoolExecutor(available_cores(), "read")
        self._networks = ThreadPoolExecutor(1, "networks")
        self._large = asyncio.Lock()
        self._metrics = metrics.Metrics()
        self._problem = ""
        self._waiting = self._held_bytes = 0
        self.replace(served)

    def replace(self, served: Served) -> None:
        """Serve this from now on; what is at work is answered by what it began with."""
        batcher = Batcher(
            served.model,
            self._networks,
            expected=lambda: self._waiting,
            observe=lambda network, rows: self._metrics.batch_rows.labels(network).observe(rows),
        )
        self._current = served, batcher
        self._metrics.loads.inc()
        self._metrics.model.info({"version": served.about["model"]})

    def report(self, problem: str) -> None:
        """Say why the model is not the one that its alias means; "" if it is."""
        self._problem = problem
        self._metrics.stale.set(bool(problem))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        headers: dict[str, str] = {}
        try:
            status, answer = 200, await self._answer(scope, receive)
        except RefusalError as refusal:
            status, answer, headers = refusal.status, Answer(refusal.content), refusal.headers
        except DisconnectedError:
            self._count(scope, "gone", started)
            return
        except Exception:
            log.exception("a request could not be answered")
            failure = RefusalError(500, "INTERNAL_ERROR", "the server failed; its log says why")
            status, answer = failure.status, Answer(failure.content)
        with self._held() as hold:
            hold(len(answer.content))
            await _send(send, status, answer, headers)
        self._count(scope, str(status), started)

    def _count(self, scope: Scope, status: str, started: float) -> None:
        address = scope["path"] if scope["path"] in METHODS else "other"
        self._metrics.requests.labels(address, status).inc()
        self._metrics.seconds.labels(address).observe(time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        check_sender(scope, self._names)
        path, methods = scope["path"], METHODS.get(scope["path"])
        if methods is None:
            raise RefusalError(404, "NOT_FOUND", f"no such address; there are {', '.join(METHODS)}")
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise RefusalError(405, "BAD_METHOD", f"{path} is asked with {allowed}", allow=allowed)
        if path == "/invocations":
            return await self._invoke(scope, receive)
        return self._about(path)

    def _about(self, path: str) -> Answer:
        """Whatever is known without the model's work."""
        about = self._current[0].about
        match path:
            case "/version":
                return Answer(json.dumps(about).encode())
            case "/readyz":
                ready = {"status": "ready", "model": about["model"], "problem": self._problem}
                return Answer(json.dumps(ready).encode())
            case "/metrics":
                self._metrics.at_work.set(self._waiting)
                return Answer(self._metrics.text(), metrics.KIND)
            case "/openapi.json":
                return Answer(json.dumps(openapi.document()).encode())
            case "/docs":
                return Answer(openapi.page().encode(), "text/html; charset=utf-8")
            case _:
                return Answer(b'{"status": "ok"}')

    async def _invoke(self, scope: Scope, receive: Receive) -> Answer:
        is_picture = check_kind(scope)
        with self._held() as hold:
            body = await self._read_body(scope, receive, hold)
            served, batcher = self._current
            steps = _steps(served, body, scope, is_picture=is_picture)
            if self._waiting >= MAX_WAITING:
                raise _busy()
            self._waiting += 1
            try:
                return await _unless_gone(self._take(steps, batcher), receive)
            except operations.RequestError as error:
                raise RefusalError(400, "INVALID_PARAMETER_VALUE", str(error)) from None
            finally:
                self._waiting -= 1

    async def _take(self, steps: operations.Steps[Answer], batcher: Batcher) -> Answer:
        """Take the steps of one request: each in a thread, the networks' passes with others'.

        Of requests that fill whole batches one goes on at a time, so that what they hold of
        pictures and answers stays bounded; smaller ones go between its passes.
        """
        loop, outputs, is_large = asyncio.get_running_loop(), None, False
        try:
            while True:
                found = await loop.run_in_executor(self._readers, _step, steps, outputs)
                if isinstance(found, Answer):
                    return found
                network, inputs = found
                if len(inputs) >= operations.BATCH_SIZE and not is_large:
                    await self._large.acquire()
                    is_large = True
                outputs = await batcher(network, inputs)
        finally:
            if is_large:
                self._large.release()

    async def _read_body(
        self, scope: Scope, receive: Receive, hold: Callable[[int], None]
    ) -> bytes:
        """The whole body, if it is small enough and comes in time; what it says of itself counts
        only against it.
        """
        too_large = RefusalError(413, "TOO_LARGE", f"the body has more than {MAX_BODY_BYTES} bytes")
        if int(_header(scope, b"content-length") or 0) > MAX_BODY_BYTES:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise DisconnectedError
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    body += piece
                    hold(len(piece))
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large
                    if self._held_bytes > MAX_HELD_BYTES:
                        raise _busy()
        except TimeoutError:
            raise RefusalError(
                408, "TOO_SLOW", f"the body did not arrive within {BODY_SECONDS} seconds"
            ) from None
        return bytes(body)

    @contextmanager
    def _held(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that counts bytes as held until the block ends."""
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            mine += count
            self._held_bytes += count

        try:
            yield hold
        finally:
            self._held_bytes -= mine


def _steps(
    served: Served, body: bytes, scope: Scope, *, is_picture: bool
) -> operations.Steps[Answer]:
    """The work on one request, from its bytes to those of its answer."""
    if is_picture:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        rows: list[Any] = [{"image": base64.b64encode(body).decode("ascii")}]
        params: Any = {"operation": "reconstruct", **query}
    else:
        request = operations.parse(body, latent_dim=served.model.latent_dim)
        rows, params = operations.rows_and_params(request)
    records = yield from operations.steps(served.model, rows, params)
    if PNG not in _header(scope, b"accept"):
        return Answer(json.dumps({"predictions": records}).encode())
    if len(records) != 1 or "image" not in records[0]:
        raise RefusalError(
            406, "NOT_ACCEPTABLE", f"{PNG} is for answers of one image; accept {JSON} for others"
        )
    return Answer(base64.b64decode(records[0]["image"]), PNG)


def _step(
    steps: operations.Steps[Answer], outputs: Tensor | None
) -> tuple[operations.Network, Tensor] | Answer:
    """The next pass that a request needs, or its answer."""
    try:
        return next(steps) if outputs is None else steps.send(outputs)
    except StopIteration as end:  # which no future can hold
        answer: Answer = end.value
        return answer


async def _unless_gone(work: Coroutine[Any, Any, Answer], receive: Receive) -> Answer:
    """What comes of the work, which ends early if the one who asked goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DisconnectedError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def check_sender(scope: Scope, names: frozenset[str]) -> None:
    """Refuse what a browser sends for a web page: one of another origin, or of a name that leads
    here by DNS rebinding. The number that a connection leads to is no name.
    """
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    found = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    reached = scope["server"][0]  # IPv6 stands in brackets
    if not found or found[1].lower() not in names | {reached, f"[{reached}]"}:
        raise RefusalError(403, "FORBIDDEN", "this server answers to its own names only")
    origin, site = _header(scope, b"origin"), _header(scope, b"sec-fetch-site")
    if origin not in ("", f"http://{hosts[0]}") or site not in ("", "none", "same-origin"):
        raise RefusalError(403, "FORBIDDEN", "this server does not answer to web pages")


def check_kind(scope: Scope) -> bool:
    """Whether the body is a picture, and no JSON; refuse what is called neither.

    No form and no plain script of a web page can call it so.
    """
    kind = Message()
    kind["content-type"] = _header(scope, b"content-type") or "nothing"
    is_picture = kind.get_content_maintype() == "image"
    charset = str(kind.get_param("charset", "utf-8")).lower()
    if not is_picture and (kind.get_content_type() != JSON or charset not in ("utf-8", "utf8")):
        raise RefusalError(
            415,
            "NOT_JSON",
            "send JSON in UTF-8, with the header Content-Type: application/json; or an image "
            "file, with image/png, image/jpeg or its like",
        )
    if _header(scope, b"content-encoding") not in ("", "identity"):
        raise RefusalError(415, "COMPRESSED", "send the body uncompressed")
    return is_picture


def _header(scope: Scope, wanted: bytes) -> str:
    """All values of a header, empty if it is not there."""
    values = [value for name, value in scope["headers"] if name == wanted]
    return b", ".join(values).decode("latin-1")


def _busy() -> RefusalError:
    return RefusalError(
        503, "BUSY", "too many requests at once; ask again", **{"retry-after": RETRY_SECONDS}
    )


async def _send(send: Send, status: int, answer: Answer, headers: dict[str, str]) -> None:
    """An answer piece by piece, so that no more than a piece waits in the connection."""
    content = answer.content
    everywhere = {
        "content-type": answer.kind,
        "content-length": str(len(content)),
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    }
    lines = [(name.encode(), value.encode()) for name, value in (everywhere | headers).items()]
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await send({"type": "http.response.start", "status": status, "headers": lines})
            for start in range(0, len(content), PIECE_BYTES):
                piece, more = content[start : start + PIECE_BYTES], start + PIECE_BYTES
                body = {"type": "http.response.body", "body": piece}
                await send({**body, "more_body": more < len(content)})
    except TimeoutError:
        log.warning("an answer was not taken within %d seconds", BODY_SECONDS)


class Connection(H11Protocol):
    """A connection that is cut when it keeps us waiting, as uvicorn's own would not be.

    From its start, or the end of an answer, it has `IDLE_SECONDS` to take what is still on its way
    and to ask the next question; the time that we work does not count.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only where a socket names its protocol, and ours comes from a listener
        # that does not: without it, every second piece waits 40 ms for an acknowledgement.
        self._socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start_timer()

    def on_response_complete(self) -> None:
        self._start_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def _start_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(IDLE_SECONDS, self._cut_if_late)

    def _cut_if_late(self) -> None:
        cycle = self.cycle
        we_work = cycle is not None and not (cycle.response_complete or cycle.more_body)
        if we_work and not self.transport.is_closing():  # and `_send` looks after the answer
            self._start_timer()
            return
        # Also what the system still holds of an answer goes.
        at_once = struct.pack("ii", 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()
