"""The only boto3 module: list, read, write and delete objects of an S3 bucket.

Credentials and endpoint are boto3's own (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...);
without credentials requests go unsigned, as public buckets want them. AWS_REQUEST_PAYER=requester
agrees to pay for what is read from a bucket that asks for it.
"""

import functools
import logging
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ParamValidationError,
)

from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors

PARALLEL_READS = 8  # of small objects; each holds at most one in memory
READ_ATTEMPTS = 4  # of a body that breaks off; whole requests are retried by botocore
PATIENCE_SECONDS = 120.0  # how long a bucket that does not answer is asked again
BUSY = ("SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "InternalError")
MAX_READ_BYTES = 64 * 2**20  # of an object that is read into memory
CHANGED = "Changed"  # StorageError.code of an object with another etag
LARGER = "Larger"  # the same of one with more bytes than it may have
BUCKET = re.compile(  # of `s3://...`: the ARN of an access point, or a name or alias
    r"s3://(arn:[^/]*:(?:outpost[/:][^/:]+[/:])?accesspoint[/:][^/]+|[^/]+)(?:/(.*))?", re.DOTALL
)
EXPECTED = (
    "s3://bucket, s3://bucket/prefix or s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix"
)
TRANSIENT = (ConnectionError, HTTPClientError, IncompleteReadError, RetriesExceededError)

Item = TypeVar("Item")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class StorageError(UserError):
    """A bucket that refuses or does not answer; `transient`: the same may succeed later."""

    def __init__(self, message: str, *, code: str = "", transient: bool = False) -> None:
        super().__init__(message)
        self.code, self.transient = code, transient


def is_s3(address: str) -> bool:
    return address.startswith("s3://")


def list_objects(url: str) -> Iterator[tuple[str, int]]:
    """(url, bytes) of the object at `s3://bucket/key`, or of all objects below it."""
    for address, size, _ in list_versions(url):
        yield address, size


def list_versions(url: str) -> Iterator[tuple[str, int, str]]:
    """(url, bytes, etag) of the same objects; an object that is written anew has another etag."""
    bucket, key = _split(url)
    below = f"{key.rstrip('/')}/" if key else ""
    with _clear_errors(url, "read"):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for page in pages:
            for item in page.get("Contents", []):
                if item["Key"] == key or item["Key"].startswith(below):
                    yield f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"]


def is_object(url: str) -> bool:
    """Whether the address is that of one object, with none below it."""
    bucket, key = _split(url)
    if not key:
        return False
    try:
        with _clear_errors(url, "read"):
            _client().head_object(Bucket=bucket, Key=key)
    except StorageError as error:
        if error.transient:
            raise
        return False  # or it may not be asked for: what is read next says so
    return next(list_objects(f"{url.rstrip('/')}/"), None) is None


def read_object(url: str, *, etag: str = "") -> bytes:
    """The whole content of one object; StorageError if it has not the etag that is asked for.

    The same for one of more than MAX_READ_BYTES, whatever a listing said of it.
    """
    return read_version(url, etag=etag)[0]


def read_version(url: str, *, etag: str = "") -> tuple[bytes, str]:
    """The same, and the etag that the object had."""
    bucket, key = _split(url)
    with _clear_errors(url, "read"):
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                answer = _client().get_object(Bucket=bucket, Key=key)
                if etag and answer["ETag"] != etag:
                    raise StorageError(f"{url} has changed: its etag was {etag}", code=CHANGED)
                _check_size(url, answer["ContentLength"], MAX_READ_BYTES)
                return answer["Body"].read(), answer["ETag"]
            except BotoCoreError:
                if attempt == READ_ATTEMPTS:
                    raise
    raise AssertionError("unreachable")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `read` makes of each item, in their order, PARALLEL_READS of them at once."""
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) == PARALLEL_READS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_object_if_any(url: str) -> bytes | None:
    """The content of one object; None if there is none."""
    found = read_version_if_any(url)
    return None if found is None else found[0]


def read_version_if_any(url: str) -> tuple[bytes, str] | None:
    """The content of one object and its etag; None if there is none."""
    try:
        return read_version(url)
    except StorageError as error:
        if error.code == "NoSuchKey":
            return None
        raise


def download_object(url: str, file: Path, *, most_bytes: int | None = None) -> None:
    """One object into a local file, in parallel parts; StorageError once it has more than that."""
    bucket, key = _split(url)
    arrived = 0

    def count(more: int) -> None:
        nonlocal arrived
        arrived += more
        if most_bytes is not None:
            _check_size(url, arrived, most_bytes)

    with _clear_errors(url, "read"), clear_disk_errors(file):
        _client().download_file(bucket, key, str(file), Callback=count)


def write_object(url: str, content: bytes) -> None:
    """One object, which replaces any other of its name; whole or not at all."""
    bucket, key = _split(url)
    with _clear_errors(url, "written"):
        _client().put_object(Bucket=bucket, Key=key, Body=content)


def replace_object(url: str, content: bytes, *, etag: str) -> str | None:
    """The same if the object there still has this etag ("": if there is none); its new etag.

    None if somebody else has written meanwhile.
    """
    bucket, key = _split(url)
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
    try:
        with _clear_errors(url, "written"):
            answer = _client().put_object(Bucket=bucket, Key=key, Body=content, **condition)
    except StorageError as error:
        if error.code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
            return None
        raise
    new: str = answer["ETag"]
    return new


def upload_object(file: Path, url: str) -> None:
    """A local file as one object, in parallel parts; whole or not at all."""
    bucket, key = _split(url)
    with file.open("rb") as content, _clear_errors(url, "written"):
        _client().upload_fileobj(content, bucket, key)


def delete_object(url: str) -> None:
    """Delete one object; one that is not there is no error."""
    bucket, key = _split(url)
    with _clear_errors(url, "deleted"):
        _client().delete_object(Bucket=bucket, Key=key)


def retry(action: Callable[[], Result], *, seconds: float | None = None) -> Result:
    """What an action returns; tried again while the bucket does not answer, with longer pauses.

    Raises the last StorageError once `seconds` (default: PATIENCE_SECONDS) are over, and one that
    is not transient at once.
    """
    give_up = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    pause = 1.0
    while True:
        try:
            return action()
        except StorageError as error:
            left = give_up - time.monotonic()
            if not error.transient or left <= 0:
                raise
            log.warning("%s; trying again for %.0f s", error, left)
        time.sleep(random.uniform(0.5, 1.0) * pause)  # workers must not ask all at once
        pause = min(2 * pause, 10.0)


def _check_size(url: str, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise StorageError(f"{url} has more than the {most_bytes} bytes it may have", code=LARGER)


def _split(url: str) -> tuple[str, str]:
    """(bucket, key); a key may hold any characters, slashes at its beginning and `?` too."""
    found = BUCKET.fullmatch(url)
    if found is None:
        raise UserError(f"{url} is no S3 address: expected {EXPECTED}")
    return found[1], found[2] or ""


@functools.cache
def _client() -> Any:
    logging.getLogger("botocore").setLevel(logging.WARNING)  # not which endpoint it found
    session = boto3.Session()
    credentials = session.get_credentials()
    try:
        if credentials is not None:
            credentials.get_frozen_credentials()  # reads the files that they lie in
    except OSError as error:
        raise StorageError(
            f"the credentials for S3 cannot be read ({error.strerror}: {error.filename}): "
            "check AWS_WEB_IDENTITY_TOKEN_FILE, or what AWS_PROFILE names"
        ) from None
    anonymous = {"signature_version": UNSIGNED} if credentials is None else {}
    retries = {"mode": "standard", "total_max_attempts": 5}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries, **anonymous)
    region = session.region_name or "us-east-1"
    try:
        client = session.client("s3", config=config, region_name=region)
        if urlsplit(client.meta.endpoint_url).scheme not in ("http", "https"):
            raise ValueError(f"Invalid endpoint: {client.meta.endpoint_url}")
    except ValueError as error:
        raise StorageError(
            f"the address of the S3 server is none ({error}): expected AWS_ENDPOINT_URL to begin "
            "with https:// or http://, as in http://host:9000"
        ) from None
    if payer := os.environ.get("AWS_REQUEST_PAYER"):

        def agree(params: dict[str, Any], **_: Any) -> None:
            params["headers"]["x-amz-request-payer"] = payer

        client.meta.events.register("before-call.s3", agree)
    return client


@contextmanager
def _clear_errors(url: str, action: Literal["read", "written", "deleted"]) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        transient = status >= 500 or code in BUSY
        cure = {
            "NoSuchBucket": "check the bucket's name, and AWS_ENDPOINT_URL if it is not on AWS",
            "NoSuchKey": "check the path behind the bucket's name",
            "404": "check the bucket's name and the path behind it",
            "AuthorizationHeaderMalformed": "set AWS_REGION to that of the bucket",
        }.get(
            code,
            "check the credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) and their rights; "
            "a bucket whose requester pays wants AWS_REQUEST_PAYER=requester",
        )
        if transient:
            cure = "the server is at fault; run the same command again when it has recovered"
        raise StorageError(
            f"{url} cannot be {action} ({code}): {cure}", code=code, transient=transient
        ) from None
    except ParamValidationError:
        raise StorageError(f"{url} is no S3 address: expected {EXPECTED}") from None
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{url} cannot be {action}: {' '.join(str(error).split())}; "
            "check the network, AWS_ENDPOINT_URL and AWS_PROFILE",
            transient=isinstance(error, TRANSIENT),
        ) from None
