import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aegan.config import DataConfig
from pipelines import download as download_stage
from pipelines.base.errors import UserError
from pipelines.base.outputs import LAST_RAW, RAW
from pipelines.bucket import storage
from pipelines.download import download
from pipelines.ingest import fetched_before
from tests.cluster.faults import FaultyProxy
from tests.pictures import blocks, encode, write_folder
from tests.s3 import s3_server

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    storage._client.cache_clear()
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="images")
    yield lambda name, content, **options: client.put_object(
        Bucket="images", Key=name, Body=content, **options
    )
    storage._client.cache_clear()


def config(source: str, *, in_place: bool = False) -> DataConfig:
    return DataConfig(
        source=source, in_place=in_place, manifold_images=1, manifold_size=16, manifold_seed=0
    )


def test_objects_are_those_at_or_below_the_address_and_no_neighbours(bucket):
    for name in ("set/a.png", "set/b/c.png", "settings/x.png", "set"):
        bucket(name, name.encode())
    found = dict(storage.list_objects("s3://images/set"))
    assert found == {
        "s3://images/set": 3,
        "s3://images/set/a.png": 9,
        "s3://images/set/b/c.png": 11,
    }
    assert storage.read_object("s3://images/set/a.png") == b"set/a.png"


def test_tables_arrays_and_archives_in_a_bucket_are_a_source_by_address_and_below_a_prefix(
    bucket, tmp_path
):
    images = [encode(image) for image in blocks(6)]
    table = pa.table({"image": pa.array(images[:2], pa.binary()), "label": ["a", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", blocks(6)[2:4])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("4.png", images[4])
    for name in ("a.parquet", "a.npy", "a.zip"):
        bucket(f"tables/sub/{name}", (tmp_path / name).read_bytes())
    bucket("tables/odd: \u3000\u202e\\name.png", images[5])
    sources = {}
    for place in ("tables", "tables/sub/a.parquet", "tables/sub/a.npy", "tables/sub/a.zip"):
        download(config(f"s3://images/{place}"), tmp_path / "raw")
        rows = pq.read_table(next((tmp_path / "raw").glob("files-*.parquet"))).to_pylist()
        sources[place] = {row["source"]: row.get("label") for row in rows}
    assert sources == {
        "tables/sub/a.parquet": {"a-0000000": "a", "a-0000001": None},
        "tables/sub/a.npy": {"a-0000000": None, "a-0000001": None},
        "tables/sub/a.zip": {"4.png": None},
        "tables": {
            "sub/a-0000000 (2)": "a",
            "sub/a-0000001 (2)": None,
            "sub/a-0000000": None,
            "sub/a-0000001": None,
            "sub/4.png": None,
            "odd: \u3000\u202e\\name.png": None,
        },
    }
    listing = download(config("s3://images/tables", in_place=True), tmp_path / "raw")
    assert listing["files"] == 1
    assert {item["reason"].partition(":")[0] for item in listing["skipped"]} == {"archive"}


def test_a_prefix_and_an_archive_in_a_bucket_give_the_files_of_the_folder(bucket, tmp_path):
    images = write_folder(tmp_path / "images", blocks(20))
    for file in images.iterdir():
        bucket(f"faces/{file.name}", file.read_bytes())
    bucket("faces/", b"")  # what some tools leave to mark a folder
    archive = shutil.make_archive(str(tmp_path / "faces"), "gztar", images)
    bucket("packed/faces.tar.gz", Path(archive).read_bytes())

    folder = download(config(str(images)), tmp_path / "a")
    prefix = download(config("s3://images/faces"), tmp_path / "b")
    packed = download(config("s3://images/packed/faces.tar.gz"), tmp_path / "c")
    tables = [
        pq.read_table(tmp_path / name / "files-00000.parquet").sort_by("source") for name in "abc"
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert prefix["source_sha256"] == folder["source_sha256"] != packed["source_sha256"]


def test_a_listing_tells_what_is_where_in_place_of_the_files_and_changes_with_them(
    bucket, tmp_path
):
    files = {f"{row:04d}.png": encode(image) for row, image in enumerate(blocks(20, seed=2))}
    for name, content in (files | {".hidden.png": b"x"}).items():
        bucket(f"listed/{name}", content)
    source = "s3://images/listed"
    stored = download(config(source), tmp_path / "stored")
    listing = download(config(source, in_place=True), tmp_path / "listing")
    rows = pq.read_table(tmp_path / "listing/files-00000.parquet").to_pylist()
    assert [row["source"] for row in rows] == sorted(files)
    for row in rows:
        assert row.keys() == {"source", "url", "etag", "bytes"}
        assert row["url"] == f"{source}/{row['source']}"
        assert row["bytes"] == len(files[row["source"]])
        assert storage.read_object(row["url"], etag=row["etag"]) == files[row["source"]]
    changing = {"source_sha256", "shards", "objects"}
    assert listing.keys() == stored.keys() - {"objects"}
    assert all(listing[name] == stored[name] for name in stored.keys() - changing)

    assert download(config(source, in_place=True), tmp_path / "again") == listing
    bucket("listed/0007.png", encode(blocks(1, seed=3)[0]))
    changed = download(config(source, in_place=True), tmp_path / "changed")
    assert changed["source_sha256"] != listing["source_sha256"]
    with pytest.raises(UserError, match=r"0007.png has changed: its etag was"):
        storage.read_object(rows[7]["url"], etag=rows[7]["etag"])


@pytest.mark.parametrize("source", ["manifold", "s3://images/packed/faces.zip", "/some/folder"])
def test_only_a_prefix_of_a_bucket_can_be_left_in_place(tmp_path, source):
    with pytest.raises(UserError, match=r"data.in_place is true, but .* is no s3://bucket/prefix"):
        download(config(source, in_place=True), tmp_path / "raw")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://no-such-bucket/x", r"\(NoSuchBucket\): check the bucket's name"),
        ("s3://images/no-such-archive.zip", r"\(404\): check the bucket's name and the path"),
        ("s3://images/no/such/prefix", "no files in s3://images/no/such/prefix"),
    ],
)
def test_what_is_not_there_is_one_clear_error(bucket, tmp_path, address, message):
    with pytest.raises(UserError, match=message):
        download(config(address), tmp_path / "raw")


def test_an_endpoint_that_does_not_answer_is_one_clear_error(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage._client.cache_clear()
    with pytest.raises(UserError, match="check the network, AWS_ENDPOINT_URL"):
        download(config("s3://images/faces"), tmp_path / "raw")


def test_a_public_bucket_is_read_without_credentials(bucket, monkeypatch):
    bucket("open.txt", b"public", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._client.cache_clear()
    assert storage.read_object("s3://images/open.txt") == b"public"


def unset_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.fault("bucket")
@pytest.mark.parametrize("address", ["127.0.0.1:9000", "minio:9000", "localhost", "ftp://host"])
def test_a_bucket_at_an_address_that_is_none_is_one_clear_error(bucket, monkeypatch, address):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    storage._client.cache_clear()
    with pytest.raises(UserError) as error:
        storage.read_object("s3://images/x")
    assert address in str(error.value)
    assert "expected AWS_ENDPOINT_URL to begin with https:// or http://" in str(error.value)


@pytest.mark.fault("bucket")
def test_a_bucket_whose_credentials_lie_in_a_missing_file_is_one_clear_error(
    bucket, monkeypatch, tmp_path
):
    unset_credentials(monkeypatch)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    expected = rf"No such file or directory: {tmp_path}/token.*check AWS_WEB_IDENTITY_TOKEN_FILE"
    for action in (
        lambda: storage.read_object("s3://images/x"),
        lambda: list(storage.list_objects("s3://images")),
        lambda: storage.write_object("s3://images/x", b""),
        lambda: storage.download_object("s3://images/x", tmp_path / "x"),
    ):
        storage._client.cache_clear()
        with pytest.raises(UserError, match=expected):
            action()


@pytest.mark.fault("bucket")
def test_one_object_of_a_bucket_is_a_source_if_it_holds_images_whatever_its_name(bucket, tmp_path):
    images = [encode(image) for image in blocks(3)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.png", images[0])
    bucket("single/packed", (tmp_path / "a.zip").read_bytes())
    bucket("single/one.png", images[1])
    bucket("single/set", b"")  # beside a prefix of the same name
    bucket("single/set/2.png", images[2])
    for source, name in (("packed", "1.png"), ("set", "2.png"), ("set/", "2.png")):
        download(config(f"s3://images/single/{source}"), tmp_path / "raw")
        rows = pq.read_table(next((tmp_path / "raw").glob("files-*.parquet"))).to_pylist()
        assert [row["source"] for row in rows] == [name]
    with pytest.raises(UserError, match=r"one.png is neither .* it is one image: put many into"):
        download(config("s3://images/single/one.png"), tmp_path / "raw")
    with pytest.raises(UserError, match=r"is true, but .*packed' is no s3://bucket/prefix"):
        download(config("s3://images/single/packed", in_place=True), tmp_path / "raw")


@pytest.mark.fault("bucket")
def test_keys_with_empty_parts_in_a_bucket_are_read_and_a_prefix_of_them_too(bucket, tmp_path):
    images = [encode(image) for image in blocks(4, seed=7)]
    keys = ("twice//a.png", "twice//b//c.png", "twice/d.png", "twice///e.png")
    for key, content in zip(keys, images, strict=True):
        bucket(key, content)
    found = {}
    for place in ("twice", "twice//", "twice//b"):
        for in_place in (False, True):
            source = config(f"s3://images/{place}", in_place=in_place)
            download(source, tmp_path / "raw")
            table = pq.read_table(tmp_path / "raw/files-00000.parquet")
            found[place, in_place] = set(table.column("source").to_pylist())
            if in_place:
                urls = table.column("url").to_pylist()
                assert {storage.read_object(url) for url in urls} <= set(images)
    for in_place in (False, True):
        assert found["twice", in_place] == {"/a.png", "/b//c.png", "d.png", "//e.png"}
        assert found["twice//", in_place] == {"a.png", "b//c.png", "/e.png"}
        assert found["twice//b", in_place] == {"/c.png"}


@pytest.mark.fault("bucket")
def test_a_bucket_whose_requester_pays_is_read_by_who_says_so(bucket, endpoint, monkeypatch):
    """A server that refuses, as S3 does, what does not say that it pays."""
    bucket("paid/a.png", b"content")
    proxy = FaultyProxy(endpoint)
    proxy.refuses = lambda headers: 403 if headers.get("x-amz-request-payer") is None else None
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage._client.cache_clear()
    with pytest.raises(UserError, match=r"AccessDenied.*requester pays wants AWS_REQUEST_PAYER="):
        storage.read_object("s3://images/paid/a.png")
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    storage._client.cache_clear()
    assert dict(storage.list_objects("s3://images/paid")) == {"s3://images/paid/a.png": 7}
    assert storage.read_object("s3://images/paid/a.png") == b"content"
    assert storage.is_object("s3://images/paid/a.png")
    proxy.close()


@pytest.mark.fault("bucket")
@pytest.mark.parametrize(
    ("bucket_part", "host"),
    [
        ("name-abcdef-s3alias", "name-abcdef-s3alias.s3.amazonaws.com"),
        (
            "arn:aws:s3:us-west-2:123456789012:accesspoint/name",
            "name-123456789012.s3-accesspoint.us-west-2.amazonaws.com",
        ),
        (
            "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-01/accesspoint/name",
            "name-123456789012.op-01.s3-outposts.us-west-2.amazonaws.com",
        ),
    ],
)
def test_the_access_point_of_a_bucket_is_an_address(bucket, monkeypatch, bucket_part, host):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    storage._client.cache_clear()
    name, key = storage._split(f"s3://{bucket_part}/prefix//a.png")
    assert (name, key) == (bucket_part, "prefix//a.png")
    url = storage._client().generate_presigned_url(
        "get_object", Params={"Bucket": name, "Key": key}
    )
    assert url.startswith(f"https://{host}/prefix//a.png?")


@pytest.mark.fault("bucket")
@pytest.mark.parametrize(
    "address",
    ["s3://", "s3:///key", "s3://Bad Name!/x", "s3://arn:aws:s3:::name/x", "s3://arn:x/y"],
)
def test_an_address_of_a_bucket_that_is_none_is_one_clear_error(bucket, address):
    with pytest.raises(UserError, match=r"is no S3 address: expected s3://bucket, .*accesspoint"):
        list(storage.list_objects(address))


@pytest.fixture
def fetched(bucket, endpoint, monkeypatch) -> Iterator[Callable[[], list[str]]]:
    """The keys of the objects that were fetched since it was asked last."""
    proxy = FaultyProxy(endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage._client.cache_clear()

    def ask() -> list[str]:
        paths = [path for method, path in proxy.requests if method == "GET"]
        proxy.requests.clear()
        return sorted({unquote(path).partition("/images/")[2].partition("?")[0] for path in paths})

    yield ask
    proxy.close()


def zipped(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("seed", range(2))
def test_of_a_prefix_only_what_has_changed_is_fetched_and_the_bytes_are_those_from_nothing(
    bucket, fetched, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(download_stage, "ROW_GROUP_ROWS", 3)
    monkeypatch.setattr(download_stage, "SHARD_BYTES", 1000)
    client = boto3.client("s3", region_name="us-east-1")
    prefix = f"often-{seed}"
    images = [encode(image) for image in blocks(60, seed=seed)]
    random = np.random.default_rng(seed)

    def content() -> bytes:
        kind = random.random()
        some = [images[number] for number in random.integers(60, size=4)]
        if kind < 0.1:  # with a picture that may be elsewhere too, one twice, and no picture
            return zipped({"a.png": some[0], "b/c.png": some[1], ".hidden": b"", "d": some[0]})
        return some[0] if kind < 0.9 else b"no picture %d" % random.integers(9)

    there: dict[str, bytes] = {}
    for turn in range(4):
        changed = {}
        for number in random.choice(40, 30 if not turn else 6, replace=False):
            found = content()
            name = f"{prefix}/{number:02d}{'.zip' if found.startswith(b'PK') else '.png'}"
            if there.get(name) != found:
                bucket(name, found)
                changed[name] = found
        there |= changed
        for name in random.choice(sorted(there), 3, replace=False):
            client.delete_object(Bucket="images", Key=name)
            changed.pop(name, None)
            there.pop(name)
        source = config(f"s3://images/{prefix}")
        fetched()
        download(source, tmp_path / str(turn), earlier=[tmp_path / str(turn - 1)])
        assert [name for name in fetched() if name] == sorted(changed)
        download(source, tmp_path / "anew")
        assert all_bytes(tmp_path / str(turn)) == all_bytes(tmp_path / "anew")


def test_an_archive_with_the_etag_of_before_is_not_fetched_again(bucket, fetched, tmp_path):
    images = [encode(image) for image in blocks(4)]
    for archive in (zipped({"a.png": images[0], "b.png": images[1]}), zipped({"a": images[2]})):
        bucket("sets/a.zip", archive)
        first = download(config("s3://images/sets/a.zip"), tmp_path / "first")
        assert "sets/a.zip" in fetched()
        source = config("s3://images/sets/a.zip")
        second = download(source, tmp_path / "second", earlier=[tmp_path / "first"])
        assert "sets/a.zip" not in fetched()
        assert first == second
        assert first["source_sha256"] == hashlib.sha256(archive).hexdigest()
        assert all_bytes(tmp_path / "first") == all_bytes(tmp_path / "second")


def test_an_archive_that_changes_while_it_is_fetched_is_fetched_again_the_next_time(
    bucket, endpoint, monkeypatch, tmp_path
):
    images = [encode(image) for image in blocks(3)]
    bucket("moving/a.zip", zipped({"a.png": images[0]}))
    bucket("moving/b.png", images[2])
    proxy = FaultyProxy(endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage._client.cache_clear()

    def change(method: str, path: str) -> None:
        if path.endswith("a.zip"):
            bucket("moving/a.zip", zipped({"a.png": images[1]}))

    proxy.fault = change
    source = config("s3://images/moving")
    download(source, tmp_path / "first")
    proxy.fault = lambda method, path: None
    proxy.requests.clear()
    download(source, tmp_path / "second", earlier=[tmp_path / "first"])
    assert {path.rpartition("/")[2] for _, path in proxy.requests} >= {"a.zip"}
    assert "/images/moving/b.png" not in {path for _, path in proxy.requests}
    download(source, tmp_path / "anew")
    assert all_bytes(tmp_path / "second") == all_bytes(tmp_path / "anew")
    proxy.close()


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("damage", ["shard", "notes", "manifest", "no notes", "other code"])
def test_an_earlier_snapshot_that_is_not_sound_is_used_for_what_its_hashes_vouch_for(
    bucket, fetched, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(download_stage, "ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(download_stage, "SHARD_BYTES", 600)
    for number, image in enumerate(blocks(8)):
        bucket(f"{damage}/{number}.png", encode(image))
    source, last = config(f"s3://images/{damage}"), tmp_path / "last"
    manifest = download(source, last)
    assert len(manifest["shards"]) > 2
    name = {"shard": "files-00001.parquet", "notes": "objects-00000.parquet"}.get(damage)
    if name:
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "manifest":
        text = (last / "manifest.json").read_text()
        (last / "manifest.json").write_text(text[: len(text) // 2])
    elif damage == "no notes":
        manifest.pop("objects")
        (last / "manifest.json").write_text(json.dumps(manifest))
    else:
        monkeypatch.setattr(fetched_before, "_reader", lambda: "another")
    fetched()
    download(source, tmp_path / "raw", earlier=[tmp_path / "nowhere", last])
    again = [found for found in fetched() if found]
    rows = manifest["shards"][1]["rows"] if damage == "shard" else 8
    assert len(again) == rows
    download(source, tmp_path / "anew")
    assert all_bytes(tmp_path / "raw") == all_bytes(tmp_path / "anew")


def test_what_an_earlier_snapshot_of_another_source_holds_is_not_taken(bucket, fetched, tmp_path):
    for place in ("one", "two"):
        bucket(f"{place}/a.png", encode(blocks(1)[0]))
    download(config("s3://images/one"), tmp_path / "one")
    fetched()
    download(config("s3://images/two"), tmp_path / "two", earlier=[tmp_path / "one"])
    assert "two/a.png" in fetched()


def test_the_stage_keeps_its_snapshot_where_dvc_does_not_delete_it(
    bucket, fetched, tmp_path, monkeypatch
):
    """As DVC does it: the output is deleted before the next run."""
    monkeypatch.chdir(tmp_path)
    bucket("kept/a.png", encode(blocks(1)[0]))
    monkeypatch.setattr(download_stage.params, "load", lambda _: config("s3://images/kept"))
    download_stage.main()
    first = all_bytes(RAW)
    [inode, other] = [(place / "files-00000.parquet").stat().st_ino for place in (RAW, LAST_RAW)]
    assert inode == other  # nothing was copied
    shutil.rmtree(RAW)
    fetched()
    download_stage.main()
    assert "kept/a.png" not in fetched()
    assert all_bytes(RAW) == first
