"""The only boto3 module: list, read, write and delete objects of an S3 bucket.

Credentials and endpoint are boto3's own (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...);
without credentials requests go unsigned, as public buckets want them.
"""

import functools
import logging
import random
import time
from collections.abc import Callable, Iterator
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
)

from pipelines.errors import UserError
from pipelines.files import clear_disk_errors

PARALLEL_READS = 8  # of small objects; each holds at most one in memory
READ_ATTEMPTS = 4  # of a body that breaks off; whole requests are retried by botocore
PATIENCE_SECONDS = 120.0  # how long a bucket that does not answer is asked again
BUSY = ("SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "InternalError")
CHANGED = "Changed"  # StorageError.code of an object with another etag
PASSING = (ConnectionError, HTTPClientError, IncompleteReadError, RetriesExceededError)

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class StorageError(UserError):
    """A bucket that refuses or does not answer; `passing`: the same may succeed later."""

    def __init__(self, message: str, *, code: str = "", passing: bool = False) -> None:
        super().__init__(message)
        self.code, self.passing = code, passing


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


def read_object(url: str, *, etag: str = "") -> bytes:
    """The whole content of one object; StorageError if it has not the etag that is asked for."""
    bucket, key = _split(url)
    with _clear_errors(url, "read"):
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                answer = _client().get_object(Bucket=bucket, Key=key)
                if etag and answer["ETag"] != etag:
                    raise StorageError(f"{url} has changed: its etag was {etag}", code=CHANGED)
                content: bytes = answer["Body"].read()
                return content
            except BotoCoreError:
                if attempt == READ_ATTEMPTS:
                    raise
    raise AssertionError("unreachable")


def read_object_if_any(url: str) -> bytes | None:
    """The content of one object; None if there is none."""
    try:
        return read_object(url)
    except StorageError as error:
        if error.code == "NoSuchKey":
            return None
        raise


def download_object(url: str, file: Path) -> None:
    """One object into a local file, in parallel parts."""
    bucket, key = _split(url)
    with _clear_errors(url, "read"), clear_disk_errors(file):
        _client().download_file(bucket, key, str(file))


def write_object(url: str, content: bytes) -> None:
    """One object, which replaces any other of its name; whole or not at all."""
    bucket, key = _split(url)
    with _clear_errors(url, "written"):
        _client().put_object(Bucket=bucket, Key=key, Body=content)


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


def patiently(action: Callable[[], Result], *, seconds: float | None = None) -> Result:
    """What an action returns; tried again while the bucket does not answer, with longer pauses.

    Raises the last StorageError once `seconds` (default: PATIENCE_SECONDS) are over, and one that
    is not passing at once.
    """
    give_up = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    pause = 1.0
    while True:
        try:
            return action()
        except StorageError as error:
            left = give_up - time.monotonic()
            if not error.passing or left <= 0:
                raise
            log.warning("%s; trying again for %.0f s", error, left)
        time.sleep(random.uniform(0.5, 1.0) * pause)  # workers must not ask all at once
        pause = min(2 * pause, 10.0)


def _split(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"{url} is no S3 address: expected s3://bucket or s3://bucket/prefix")
    return parts.netloc, url.partition("://")[2].partition("/")[2]


@functools.cache
def _client() -> Any:
    logging.getLogger("botocore").setLevel(logging.WARNING)  # not which endpoint it found
    session = boto3.Session()
    anonymous = {"signature_version": UNSIGNED} if session.get_credentials() is None else {}
    retries = {"mode": "standard", "total_max_attempts": 5}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries, **anonymous)
    region = session.region_name or "us-east-1"
    return session.client("s3", config=config, region_name=region)


@contextmanager
def _clear_errors(url: str, action: Literal["read", "written", "deleted"]) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        passing = status >= 500 or code in BUSY
        cure = {
            "NoSuchBucket": "check the bucket's name, and AWS_ENDPOINT_URL if it is not on AWS",
            "NoSuchKey": "check the path behind the bucket's name",
            "404": "check the bucket's name and the path behind it",
        }.get(code, "check the credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) and their rights")
        if passing:
            cure = "the server is at fault; run the same command again when it has recovered"
        raise StorageError(
            f"{url} cannot be {action} ({code}): {cure}", code=code, passing=passing
        ) from None
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{url} cannot be {action}: {error}; "
            "check the network, AWS_ENDPOINT_URL and AWS_PROFILE",
            passing=isinstance(error, PASSING),
        ) from None
