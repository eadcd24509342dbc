"""The only boto3 module: list, read, download and write objects of an S3 bucket.

Credentials and endpoint are boto3's own (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...);
without credentials requests go unsigned, as public buckets want them.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipelines.errors import UserError
from pipelines.files import clear_disk_errors

READ_ATTEMPTS = 4  # of a body that breaks off; whole requests are retried by botocore


def list_objects(url: str) -> Iterator[tuple[str, int]]:
    """(url, bytes) of the object at `s3://bucket/key`, or of all objects below it."""
    bucket, key = _split(url)
    below = f"{key.rstrip('/')}/" if key else ""
    with _clear_errors(url):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for page in pages:
            for item in page.get("Contents", []):
                if item["Key"] == key or item["Key"].startswith(below):
                    yield f"s3://{bucket}/{item['Key']}", item["Size"]


def read_object(url: str) -> bytes:
    """The whole content of one object."""
    bucket, key = _split(url)
    with _clear_errors(url):
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                content: bytes = _client().get_object(Bucket=bucket, Key=key)["Body"].read()
                return content
            except BotoCoreError:
                if attempt == READ_ATTEMPTS:
                    raise
    raise AssertionError("unreachable")


def download_object(url: str, file: Path) -> None:
    """One object into a local file, in parallel parts."""
    bucket, key = _split(url)
    with _clear_errors(url), clear_disk_errors(file):
        _client().download_file(bucket, key, str(file))


def write_object(url: str, content: bytes) -> None:
    """One object, whole or not at all."""
    bucket, key = _split(url)
    with _clear_errors(url, "written"):
        _client().put_object(Bucket=bucket, Key=key, Body=content)


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
def _clear_errors(url: str, done: str = "read") -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        cure = {
            "NoSuchBucket": "check the bucket's name, and AWS_ENDPOINT_URL if it is not on AWS",
            "NoSuchKey": "check the path behind the bucket's name",
            "404": "check the bucket's name and the path behind it",
        }.get(code, "check the credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) and their rights")
        raise UserError(f"{url} cannot be {done} ({code}): {cure}") from None
    except (BotoCoreError, Boto3Error) as error:
        raise UserError(
            f"{url} cannot be {done}: {error}; check the network, AWS_ENDPOINT_URL and AWS_PROFILE"
        ) from None
