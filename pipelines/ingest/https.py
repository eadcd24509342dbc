"""Fetching an archive over HTTPS, within bounds that no server can stretch.

A redirect leads to public addresses only, or to where the user's own address led (his machine, his
network): what counts is the address that is connected to, whatever names and their servers say.
"""

import ipaddress
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import socket
from threading import Event, Thread
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPResponse, Retry
from urllib3.exceptions import HTTPError

from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.base.progress import progress
from pipelines.ingest.source_address import without_secrets

MAX_BYTES = 256 * 1024**3
MAX_REDIRECTS = 5
CHUNK_BYTES = 1024**2
TIMEOUT_SECONDS = 30  # to connect, and between two pieces
WINDOW_SECONDS = 300.0  # in each of these
LEAST_BYTES = 4 * 1024**2  # so much must arrive, 14 kB a second: or a drip would never end
TRIES = 4
PAUSE_SECONDS = 0.3  # before the second try; twice as long before each further one
MAX_WAIT_SECONDS = 60  # that a server may ask for before the next try
PASSING = (429, 500, 502, 503, 504)
METADATA = {  # where clouds tell a machine its credentials, besides 169.254.169.254
    *("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
}

Reach = Literal["public", "private", "this machine", "link-local"]
log = logging.getLogger(__name__)


class _PassingError(UserError):
    """The same may succeed after `wait` seconds, which the server has asked for (or 0)."""

    def __init__(self, problem: str, cure: str, *, wait: float = 0.0) -> None:
        super().__init__(f"{problem}: {cure}")
        self.problem, self.wait = problem, wait


Facts = tuple[str, int]  # of an answer: the etag, "" without a strong one, and its length or -1


def fetch(url: str, file: Path) -> Facts:
    """Download an address into a file, whole or with a UserError."""
    for tried in range(1, TRIES + 1):
        try:
            return _watched(partial(_fetch, url, file), file, without_secrets(url))
        except _PassingError as error:
            if tried == TRIES or error.wait > MAX_WAIT_SECONDS:
                raise
            pause = max(error.wait, PAUSE_SECONDS * 2 ** (tried - 1))
            log.warning("%s: try %d of %d in %.1f s", error.problem, tried + 1, TRIES, pause)
        time.sleep(pause)
    raise AssertionError("unreachable")


def ask(url: str) -> Facts:
    """What `fetch` would return, and nothing is fetched; UserError in one try."""

    def work(given_up: Event) -> Facts:
        with _answer_of(url) as answer:
            return _facts(answer)

    return _watched(work, Path(os.devnull), without_secrets(url))


def _facts(answer: requests.Response) -> Facts:
    etag = answer.headers.get("ETag", "")
    is_strong = not etag.startswith("W/")  # a weak one may stand for other bytes
    return etag if is_strong else "", _length_of(answer)


def _length_of(answer: requests.Response) -> int:
    try:
        return int(answer.headers["Content-Length"])
    except (KeyError, ValueError):  # not said, or no number
        return -1


def _watched(work: Callable[[Event], Facts], file: Path, name: str) -> Facts:
    """Do it in a thread while the file grows; else UserError.

    Time-outs of single reads do not end a drip, in a header or in a handshake least of all. The
    thread is left behind then: it ends with its next piece, or with the process.
    """
    result, given_up = Future[Facts](), Event()

    def run() -> None:
        try:
            result.set_result(work(given_up))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    size = 0
    try:
        while True:
            try:
                return result.result(timeout=WINDOW_SECONDS)
            except TimeoutError:
                if result.done():
                    continue
            before, size = size, file.stat().st_size if file.exists() else 0
            if size - before < LEAST_BYTES:
                raise UserError(
                    f"{name} cannot be fetched: {size - before} bytes in {WINDOW_SECONDS:.0f} "
                    f"seconds, at least {LEAST_BYTES} are expected: try again later, or fetch it "
                    "yourself and set data.source to the file"
                )
    finally:
        given_up.set()


def state(url: str) -> str:
    """What the server says of a file that lies there now, not read; UserError as of `fetch`."""
    with _answer_of(url) as answer:
        told = {key: answer.headers.get(key, "") for key in ("ETag", "Last-Modified")}
        length = answer.headers.get("Content-Length", "")
    if not any(told.values()):
        log.warning("%s: its server does not say when it has changed", without_secrets(url))
        return f"{time.time()}"
    return "\0".join((*told.values(), length))


def _fetch(url: str, file: Path, given_up: Event) -> Facts:
    """One try."""
    with _answer_of(url) as answer:
        _save(answer, file, given_up)
        return _facts(answer)


@contextmanager
def _answer_of(url: str) -> Iterator[requests.Response]:
    """The server's answer, whose bytes are still to be read."""
    name = without_secrets(url)
    problem = f"{name} cannot be fetched"
    cure = "check the address and the network, then run the same command again"
    try:
        with requests.Session() as session:
            session.max_redirects = MAX_REDIRECTS
            adapter = _Checked()
            for scheme in ("https://", "http://"):
                session.mount(scheme, adapter)
            plain_bytes = {"Accept-Encoding": "identity"}
            with session.get(
                url, stream=True, timeout=TIMEOUT_SECONDS, headers=plain_bytes
            ) as answer:
                _check_answer(answer, name)
                yield answer
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _PassingError(f"{problem} ({type(error).__name__})", cure) from None
    except (requests.RequestException, HTTPError, ValueError) as error:  # the last for no address
        raise UserError(f"{problem} ({type(error).__name__}): {cure}") from None


class _Checked(HTTPAdapter):
    """Sends a request, the first or a redirect's, only where that is safe.

    What is connected to is looked at before a byte is sent. Behind a proxy, which connects in our
    place, only addresses that stand in the redirect itself can be told.
    """

    def __init__(self) -> None:
        self._url = ""
        self._first: Reach = "public"
        self._is_redirected = False
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {
            scheme: _looking_at_connections(pool, self._check) for scheme, pool in pools.items()
        }

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        parts = urlsplit(str(request.url))
        self._url = without_secrets(parts.geturl())
        stated = _stated_reach(parts.hostname or "")
        # Plain http lets anyone on the way replace the file: only this machine may use it.
        if parts.scheme != "https" and stated != "this machine":
            raise UserError(f"{self._url} is not encrypted: use https://")
        if stated:
            self._check(stated)
        answer = super().send(request, *args, **kwargs)
        if answer.is_redirect:
            self._is_redirected = True
            answer.close()  # requests would read its body, however long
        return answer

    def _check(self, reach: Reach) -> None:
        if not self._is_redirected:
            self._first = reach
        elif reach == "link-local" or reach not in ("public", self._first):
            raise UserError(
                f"a redirect leads to {self._url}, an address of {_PLACES[reach]}, and is not "
                "followed: if you mean that place, set data.source to it"
            )


_PLACES: dict[Reach, str] = {
    "private": "a private network",
    "this machine": "this machine",
    "link-local": "the machine's nearest network, where clouds keep credentials",
}


def _looking_at_connections(
    pool: type[HTTPConnectionPool], check: Callable[[Reach], None]
) -> type[HTTPConnectionPool]:
    """The same pool; each new connection is checked before it is used, even for a handshake."""

    class Connection(pool.ConnectionCls):  # type: ignore[misc,name-defined]
        def _new_conn(self) -> socket:
            connected: socket = super()._new_conn()
            try:
                peer, own = (
                    where[0] for where in (connected.getpeername(), connected.getsockname())
                )
                check("this machine" if peer == own else _reach_of(peer))
            except BaseException:
                connected.close()
                raise
            return connected

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def _reach_of(address: str) -> Reach:
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return "this machine"
    if ip.is_link_local or str(ip) in METADATA:
        return "link-local"
    return "public" if ip.is_global and not ip.is_multicast else "private"


def _stated_reach(host: str) -> Reach | None:
    """Of an address in its usual form, or `localhost`; None of other names."""
    if host == "localhost":
        return "this machine"
    try:
        return _reach_of(host)
    except ValueError:
        return None


def _check_answer(answer: requests.Response, name: str) -> None:
    """UserError unless it holds the bytes that were asked for; a _PassingError if it soon may."""
    told = f"{name} answers {answer.status_code} {shown(str(answer.reason)[:60])}"
    if answer.status_code in PASSING:
        wait = _wait_of(answer)
        asked = f" and asks to wait {wait:.0f} s" if wait else ""
        cure = "the server is at fault; run the same command again later"
        raise _PassingError(told + asked, cure, wait=wait)
    if not answer.ok:
        raise UserError(f"{told}: check the address")
    encoding = answer.headers.get("Content-Encoding", "").lower()
    # Some servers call the file's own compression an encoding; bytes are taken as they come.
    is_its_own = urlsplit(answer.url).path.lower().endswith((".gz", ".tgz"))
    if set(re.findall(r"[\w-]+", encoding)) & set(HTTPResponse.CONTENT_DECODERS) and not is_its_own:
        raise UserError(
            f"{name} is sent in the encoding {shown(encoding[:60])}, which was not asked for and "
            "could unpack to any size: fetch it yourself and set data.source to the file"
        )


def _wait_of(answer: requests.Response) -> float:
    """Seconds that `Retry-After` asks for; 0 without it, or where it is no time."""
    try:
        return Retry().parse_retry_after(answer.headers.get("Retry-After", "0"))
    except (HTTPError, ValueError, OverflowError):
        return 0.0


def _save(answer: requests.Response, file: Path, given_up: Event) -> None:
    length = _length_of(answer)
    pieces = -(-length // CHUNK_BYTES) if length >= 0 else None
    with file.open("wb") as out:
        chunks = answer.raw.stream(CHUNK_BYTES, decode_content=False)
        for chunk in progress(chunks, "fetching", unit="MiB", total=pieces):
            if out.tell() + len(chunk) > MAX_BYTES:
                raise UserError(
                    f"{without_secrets(answer.url)} is larger than {MAX_BYTES} bytes: "
                    "fetch it yourself and set data.source to the file"
                )
            out.write(chunk)
            if given_up.is_set():
                return
