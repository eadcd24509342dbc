"""One retraining at a time: a file lock on one machine, a lease in the bucket across machines.

The lease is an object with an owner and an end, which its owner puts off as long as it works. Each
new owner has a higher number: who was paused past the end finds another number there, and stops
before it publishes anything.

Two who take it at once are told apart by the bucket, which writes under conditions. Some S3 servers
ignore these: there who has written waits, and has the lease if it is still his.
"""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

from pipelines.base import locks
from pipelines.base.errors import UserError
from pipelines.bucket import storage
from pipelines.registry import decisions
from pipelines.retraining.ledger import Bucket, Folder

LEASE = "lease"  # its object's name
SECONDS = 120.0  # that a lease lasts; put off every third of it
SETTLED = 1 / 12  # of these seconds: by then all have written who took it at once

log = logging.getLogger(__name__)


class BusyError(UserError):
    """Another retraining is at work."""


class LostError(UserError):
    """The lease has passed to another."""


@dataclass(frozen=True)
class _Terms:
    owner: str
    number: int
    until: float  # seconds since 1970
    key: str = ""  # random: in two containers user, host and process may have the same names


class Lease:
    """What the holder asks before it publishes."""

    def check(self) -> None:
        """LostError unless the lease is still ours."""


class _BucketLease(Lease):
    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._seconds = f"{url}/{LEASE}", seconds
        self._owner = f"{decisions.this_person()}, process {os.getpid()}"
        self._key = secrets.token_hex(8)
        terms, etag = self._read()
        if terms and terms.until > time.time():
            raise BusyError(
                f"another retraining is at work: {terms.owner} holds {self._url} for another "
                f"{terms.until - time.time():.0f} s unless it goes on; wait for it"
            )
        self._number = terms.number + 1 if terms else 1
        self._is_conditional = True
        self._etag = self._write(etag, self._end())
        if self._etag and self._put("", self._end()):  # which is there, and had to be refused
            self._is_conditional = False
            time.sleep(SETTLED * seconds)
            self._etag = self._etag_if_ours()
        if not self._etag:
            raise BusyError(f"another retraining has just taken {self._url}: wait for it")
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    def check(self) -> None:
        with self._lock:
            terms, _ = self._read()
            if not self._is_ours(terms):
                holder = terms.owner if terms else "nobody"
                raise LostError(
                    f"the lease {self._url} was ours and is {holder}'s now: this process was "
                    "paused too long; nothing was published; run the same command again"
                )

    def release(self) -> None:
        self._released.set()
        self._heart.join()
        if self._etag:
            self._write(self._etag, 0.0)

    def _end(self) -> float:
        return time.time() + self._seconds

    def _read(self) -> tuple[_Terms | None, str]:
        """Whose lease it is, and the object's etag."""
        found = storage.retry(lambda: storage.read_version_if_any(self._url))
        return (None, "") if found is None else (_parse(found[0]), found[1])

    def _is_ours(self, terms: _Terms | None) -> bool:
        return terms is not None and (terms.key, terms.number) == (self._key, self._number)

    def _etag_if_ours(self) -> str:
        terms, etag = self._read()
        return etag if self._is_ours(terms) else ""

    def _write(self, etag: str, until: float) -> str:
        """The new etag; "" if the lease is another's."""
        if not self._is_conditional and not self._etag_if_ours():
            return ""
        return self._put(etag, until) or self._etag_if_ours()  # if our answer was lost on its way

    def _put(self, etag: str, until: float) -> str:
        """The new etag; "" if the object has another one than this."""
        terms = _Terms(self._owner, self._number, until, self._key)
        content = json.dumps(asdict(terms)).encode()
        return storage.retry(lambda: storage.replace_object(self._url, content, etag=etag)) or ""

    def _beat(self) -> None:
        while not self._released.wait(self._seconds / 3):
            with self._lock:
                try:
                    self._etag = self._write(self._etag, self._end())
                except storage.StorageError as error:  # `check` will say more
                    log.warning("%s", error)
                    continue
            if not self._etag:
                return  # lost


def _parse(content: bytes) -> _Terms | None:
    """None for what is no lease: it is replaced."""
    try:
        terms = _Terms(**json.loads(content))
        return replace(terms, number=int(terms.number), until=float(terms.until))
    except (ValueError, TypeError):
        return None


@contextmanager
def hold(place: Folder | Bucket, *, seconds: float | None = None) -> Iterator[Lease]:
    """Keep other retrainings of this project away; BusyError if one is at work.

    `seconds` stands in for SECONDS. UserError for a disk or bucket that cannot be written to.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.hold("retrain"))
        except locks.HeldError as error:
            raise BusyError(str(error)) from None
        lease = Lease()
        if isinstance(place, Bucket):
            lease = _BucketLease(place.url, SECONDS if seconds is None else seconds)
            stack.callback(lease.release)
        yield lease
