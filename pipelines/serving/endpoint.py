"""The HTTP side of serving: who may ask, how much, how long; an ASGI application on uvicorn.

The server is for programs of this machine. A web page in a browser here must not be able to use it,
and whatever one request takes (bytes, time, a place in the queue) has an end. What is answered is
the business of `aegan/operations.py`.
"""

import asyncio
import json
import logging
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

import aegan
from aegan import operations

MAX_BODY_BYTES = 32 * 1024**2
MAX_HELD_BYTES = 8 * MAX_BODY_BYTES  # of bodies and answers on their way, together
MAX_WAITING = 8  # requests that are read; one is worked on at a time, on all cores
BODY_SECONDS = 30  # for a body to arrive, and for an answer to be taken
IDLE_SECONDS = 2 * BODY_SECONDS  # for a connection to get to the point where work is ours
PIECE_BYTES = 1 << 20  # of an answer that are sent at once
RETRY_SECONDS = "5"
OUR_NAME = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
METHODS = {
    "/invocations": ("POST",),
    "/ping": ("GET", "HEAD"),
    "/health": ("GET", "HEAD"),
    "/version": ("GET", "HEAD"),
}

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


class Application:
    """One model behind ASGI. `about` is what /version says."""

    def __init__(self, model: aegan.AEGAN, about: dict[str, Any]) -> None:
        self._model, self._about = model, about
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._waiting = self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        try:
            status, content = 200, await self._answer(scope, receive)
        except RefusalError as refusal:
            status, content, headers = refusal.status, refusal.content, refusal.headers
        except DisconnectedError:
            return
        except Exception:
            log.exception("a request could not be answered")
            failure = RefusalError(500, "INTERNAL_ERROR", "the server failed; its log says why")
            status, content = failure.status, failure.content
        with self._held() as hold:
            hold(len(content))
            await _send(send, status, content, headers)

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        check_sender(scope)
        path, methods = scope["path"], METHODS.get(scope["path"])
        if methods is None:
            raise RefusalError(404, "NOT_FOUND", f"no such address; there are {', '.join(METHODS)}")
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise RefusalError(405, "BAD_METHOD", f"{path} is asked with {allowed}", allow=allowed)
        if path == "/version":
            return json.dumps(self._about).encode()
        if path != "/invocations":
            return b'{"status": "ok"}'
        check_kind(scope)
        with self._held() as hold:
            body = await self._read_body(scope, receive, hold)
            return await self._in_turn(body)

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

    async def _in_turn(self, body: bytes) -> bytes:
        """What the model answers, once the requests that came before are done."""
        if self._waiting >= MAX_WAITING:
            raise _busy()
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, self._work, body)
        except operations.RequestError as error:
            raise RefusalError(400, "INVALID_PARAMETER_VALUE", str(error)) from None
        finally:
            self._waiting -= 1

    def _work(self, body: bytes) -> bytes:
        request = operations.parse(body, latent_dim=self._model.latent_dim)
        return json.dumps({"predictions": operations.answer(self._model, request)}).encode()

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


def check_sender(scope: Scope) -> None:
    """Refuse what a browser sends for a web page: one of another origin, or of a name that leads
    here by DNS rebinding.
    """
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or not OUR_NAME.fullmatch(hosts[0]):
        raise RefusalError(403, "FORBIDDEN", "this server answers to 127.0.0.1 and localhost only")
    origin, site = _header(scope, b"origin"), _header(scope, b"sec-fetch-site")
    if origin not in ("", f"http://{hosts[0].decode('ascii')}") or site not in (
        *("", "none", "same-origin"),
    ):
        raise RefusalError(403, "FORBIDDEN", "this server does not answer to web pages")


def check_kind(scope: Scope) -> None:
    """Refuse what is not called JSON; no form and no plain script of a web page can call it so."""
    kind = Message()
    kind["content-type"] = _header(scope, b"content-type") or "nothing"
    charset = str(kind.get_param("charset", "utf-8")).lower()
    if kind.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise RefusalError(
            415, "NOT_JSON", "send JSON in UTF-8, with the header Content-Type: application/json"
        )
    if _header(scope, b"content-encoding") not in ("", "identity"):
        raise RefusalError(415, "COMPRESSED", "send the body uncompressed")


def _header(scope: Scope, wanted: bytes) -> str:
    """All values of a header, empty if it is not there."""
    values = [value for name, value in scope["headers"] if name == wanted]
    return b", ".join(values).decode("latin-1")


def _busy() -> RefusalError:
    return RefusalError(
        503, "BUSY", "too many requests at once; ask again", **{"retry-after": RETRY_SECONDS}
    )


async def _send(send: Send, status: int, content: bytes, headers: dict[str, str]) -> None:
    """An answer piece by piece, so that no more than a piece waits in the connection."""
    everywhere = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
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
