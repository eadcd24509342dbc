from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipelines.bucket import storage
from tests.cluster.faults import FaultyProxy
from tests.s3 import s3_server
from tests.tiny import tiny_shards


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server."""
    with s3_server() as address:
        yield address


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let this process, and what it starts, find an S3 server at this address."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    storage._client.cache_clear()


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What this process, and what it starts, reaches the S3 server through."""
    proxy = FaultyProxy(s3)
    reach(monkeypatch, proxy.endpoint)
    yield proxy
    storage._client.cache_clear()
    proxy.close()


@pytest.fixture
def bucket(proxy: FaultyProxy, s3: str, request: pytest.FixtureRequest) -> str:
    """s3://bucket of this test alone."""
    name = f"test-{abs(hash(request.node.nodeid)):x}"
    boto3.client("s3", region_name="us-east-1", endpoint_url=s3).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))
