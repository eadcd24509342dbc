import hashlib
import io
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aegan.config import DataConfig
from aegan.data import designed_faces
from pipelines import download as stage
from pipelines.base.errors import UserError, run_stage
from pipelines.download import download
from pipelines.ingest.entries import Skipped
from pipelines.ingest.sources import read_folder
from pipelines.serving import batch
from tests.pictures import blocks, encode, write_folder


def config(source: str | Path, images: int = 10) -> DataConfig:
    return DataConfig(
        source=str(source),
        in_place=False,
        manifold_images=images,
        manifold_size=16,
        manifold_seed=3,
    )


def rows(folder: Path) -> list[dict]:
    return [
        row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def test_the_snapshot_holds_the_files_byte_for_byte_and_hashes_itself(tmp_path):
    images = write_folder(tmp_path / "images", blocks(5))
    raw = tmp_path / "raw"
    manifest = download(config(images), raw)
    assert {row["source"]: row["content"] for row in rows(raw)} == {
        file.name: file.read_bytes() for file in images.iterdir()
    }
    assert manifest == json.loads((raw / "manifest.json").read_text())
    assert manifest["files"] == 5
    for shard in manifest["shards"]:
        content = (raw / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert shard["bytes"] == len(content)


def test_the_same_source_gives_the_same_bytes_and_a_changed_one_another_hash(tmp_path):
    images = write_folder(tmp_path / "images", blocks(5))
    first, second = (download(config(images), tmp_path / name) for name in ("one", "two"))
    assert first == second
    (images / "0003.png").rename(images / "0009.png")
    assert download(config(images), tmp_path / "three")["source_sha256"] != first["source_sha256"]


def test_an_archive_is_recorded_by_its_own_hash(tmp_path):
    images = write_folder(tmp_path / "images", blocks(5))
    archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", images))
    manifest = download(config(archive), tmp_path / "raw")
    assert manifest["source_sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert manifest["files"] == 5


def test_a_nested_copy_of_the_whole_set_is_not_stored_twice(tmp_path):
    images = blocks(6)
    write_folder(tmp_path / "set/data", images)
    write_folder(tmp_path / "set/data/data", images)
    manifest = download(config(tmp_path / "set"), tmp_path / "raw")
    assert manifest["files"] == 6
    assert {row["source"] for row in rows(tmp_path / "raw")} == {
        f"data/000{i}.png" for i in range(6)
    }
    assert manifest["skipped"][0] == {
        "source": "data/data/0000.png",
        "reason": "identical file: data/0000.png",
    }


def test_the_designed_set_comes_with_its_factors(tmp_path):
    manifest = download(config("manifold"), tmp_path / "raw")
    images, factors = designed_faces.generate(0, 10, seed=3, image_size=16)
    found = rows(tmp_path / "raw")
    assert manifest["factors"] == [factor.name for factor in designed_faces.FACTORS]
    for row, image, values in zip(found, images, factors, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["content"]))), image)
        assert [row[f"factor_{name}"] for name in manifest["factors"]] == values.tolist()


def test_more_of_the_designed_set_begins_with_the_same_images(tmp_path):
    download(config("manifold", images=4), tmp_path / "small")
    download(config("manifold", images=9), tmp_path / "large")
    assert rows(tmp_path / "large")[:4] == rows(tmp_path / "small")


def test_shards_and_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(stage, "ROW_GROUP_BYTES", 3_000)
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(40):
        (folder / f"{index:02d}").write_bytes(random.bytes(1000 + 10 * index))
    manifest = download(config(folder), tmp_path / "raw")
    assert [row["source"] for row in rows(tmp_path / "raw")] == [f"{i:02d}" for i in range(40)]
    assert len(manifest["shards"]) > 4
    for shard in manifest["shards"]:
        file = pq.ParquetFile(tmp_path / "raw" / shard["file"])
        groups = [
            file.read_row_group(group)["content"].to_pylist()
            for group in range(file.num_row_groups)
        ]
        sizes = [sum(map(len, group)) for group in groups]
        assert max(sizes) <= 3_000
        assert sum(sizes) <= 10_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "data.source nowhere/at/all not found (a path counts from"),
        ("kaggle:only-a-name", "kaggle:only-a-name is no data set: expected kaggle:owner/name"),
        ("kaggle:../../etc", "expected kaggle:owner/name"),
        ("s3://", "expected s3://bucket, s3://bucket/prefix"),
        ("http://example.org/set.zip", "is not encrypted: use https://"),
    ],
)
def test_a_wrong_source_is_one_clear_error_and_leaves_nothing(tmp_path, source, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        download(config(source), tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_an_error_that_names_what_was_skipped(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"no files in .*images$"):
        download(config(tmp_path / "images"), tmp_path / "raw")
    (tmp_path / "images/.hidden").touch()
    told = r"1 skipped, the first is .hidden \(hidden or system file\)$"
    with pytest.raises(UserError, match=told):
        download(config(tmp_path / "images"), tmp_path / "raw")


def table_of(images: list[bytes], labels: list[str | None]) -> pa.Table:
    return pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels)})


def test_classes_that_a_source_states_are_a_column_of_the_snapshot_and_in_its_hash(tmp_path):
    images = [encode(image) for image in blocks(3)]
    hashes = set()
    for labels in (["cat", "dog", None], ["cat", "cat", None], [None, None, None]):
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table_of(images, labels), tmp_path / "set/a.parquet")
        hashes.add(download(config(tmp_path / "set"), tmp_path / "raw")["source_sha256"])
        found = rows(tmp_path / "raw")
        assert [row["content"] for row in found] == images
        assert ("label" in found[0]) == any(labels)
        assert [row.get("label") for row in found] == labels
    assert len(hashes) == 3


@pytest.mark.integration
def test_a_table_or_array_at_an_https_address_is_a_source(tmp_path):
    images = [encode(image) for image in blocks(3)]
    pq.write_table(table_of(images, ["a", "b", None]), tmp_path / "set.parquet")
    np.savez(tmp_path / "set.npz", images=blocks(3))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"  # plain only on this machine
        for name, sources in {
            "set.parquet": [f"set-000000{row}" for row in range(3)],
            "set.npz": [f"set-images-000000{row}" for row in range(3)],
        }.items():
            manifest = download(config(f"{address}/{name}"), tmp_path / "raw")
            assert [row["source"] for row in rows(tmp_path / "raw")] == sources
            content = (tmp_path / name).read_bytes()
            assert manifest["source_sha256"] == hashlib.sha256(content).hexdigest()
    finally:
        server.shutdown()
        server.server_close()


def test_an_archive_at_an_https_address_is_fetched_again_only_if_its_etag_says_so(tmp_path):
    etag = '"1"'

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("ETag", etag)
            super().end_headers()

        def log_message(self, *_: object) -> None: ...

    served = tmp_path / "served"
    served.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = config(f"http://127.0.0.1:{server.server_port}/set.npy")

    def fetch(images: np.ndarray) -> dict:
        np.save(served / "set.npy", images)
        return download(source, tmp_path / "raw", earlier=[tmp_path / "raw"])

    try:
        first, other = blocks(3), blocks(3, seed=1)
        before = fetch(first)
        assert fetch(other) == before  # a server that lies about it is believed
        etag = '"2"'
        changed = fetch(other)
        assert (
            changed["source_sha256"]
            == hashlib.sha256((served / "set.npy").read_bytes()).hexdigest()
        )
        etag = 'W/"3"'  # the same to a reader, perhaps not the same bytes
        fetch(other)
        assert fetch(first)["source_sha256"] == before["source_sha256"]
    finally:
        server.shutdown()
        server.server_close()


def test_a_source_that_states_classes_late_has_them_in_every_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(stage, "ROW_GROUP_BYTES", 500)
    images = write_folder(tmp_path / "set", blocks(40))
    more = [encode(image) for image in blocks(20, seed=1)]
    (images / "sub").mkdir()
    pq.write_table(table_of(more, ["x", None] * 10), images / "sub/a.parquet")
    manifest = download(config(images), tmp_path / "raw")
    assert len(manifest["shards"]) > 5
    assert sum(shard["rows"] for shard in manifest["shards"]) == manifest["files"] == 60
    for shard in manifest["shards"]:
        content = (tmp_path / "raw" / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert shard["bytes"] == len(content)
    assert {file.name for file in (tmp_path / "raw").iterdir()} == {
        "manifest.json",
        *(shard["file"] for shard in manifest["shards"]),
    }
    found = rows(tmp_path / "raw")
    assert [row["label"] for row in found] == [None] * 40 + ["x", None] * 10
    assert [row["content"] for row in found[40:]] == more
    assert [row["source"] for row in found[:2]] == ["0000.png", "0001.png"]


def test_the_log_says_at_once_how_many_files_of_a_source_are_skipped_and_why(tmp_path, caplog):
    images = write_folder(tmp_path / "set", blocks(5))
    shutil.copy(images / "0000.png", images / "copy.png")
    shutil.copy(images / "0000.png", images / "copy again.png")
    (images / ".hidden").touch()
    with caplog.at_level("INFO"):
        download(config(images), tmp_path / "raw")
    assert caplog.messages[-1] == (
        "3 of 8 files skipped (2 identical file, 1 hidden or system file), "
        "see artifacts/preprocess/quarantine.csv after the stage preprocess"
    )


def test_names_of_a_source_are_kept_in_its_rows_and_escaped_in_its_manifest(tmp_path):
    images = write_folder(tmp_path / "set", blocks(1))
    name = "red\x1b[31m\u202e.png"
    shutil.copy(images / "0000.png", images / ("." + name))
    (images / "0000.png").rename(images / name)
    manifest = download(config(images), tmp_path / "raw")
    assert [row["source"] for row in rows(tmp_path / "raw")] == [name]
    assert manifest["skipped"] == [
        {"source": r".red\x1b[31m\u202e.png", "reason": "hidden or system file"}
    ]


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: meanwhile the tests' process is nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.fault("damaged files")
def test_a_source_folder_or_file_without_permission_is_listed_and_the_rest_is_read(
    record_property,
):
    record_property("faults", 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_folder(folder / "set/sub", blocks(2))
        (folder / "set/sub/0000.png").chmod(0)
        with without_privileges():
            found = list(read_folder(folder / "set"))
        assert found[0] == Skipped("sub/0000.png", "not readable: Permission denied")
        assert found[1].source == "sub/0001.png"
        write_folder(folder / "set/other", blocks(1))
        (folder / "set/sub").chmod(0)
        with without_privileges():
            found = list(read_folder(folder / "set"))
        assert found[0] == Skipped("sub", "folder not readable: Permission denied")
        assert [entry.source for entry in found[1:]] == ["other/0000.png"]
        (folder / "set").chmod(0)
        message = r"/set cannot be read \(Permission denied\): make it readable, `chmod"
        with without_privileges(), pytest.raises(UserError, match=message):
            list(read_folder(folder / "set"))
        (folder / "set").chmod(0o755)
        (folder / "set/sub").chmod(0o755)


@pytest.mark.fault("damaged files")
def test_a_source_archive_without_permission_is_said_to_be_unreadable():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "set.zip").write_bytes(b"PK")
        (folder / "set.zip").chmod(0)
        (folder / "locked").mkdir(mode=0)
        for source in (folder / "set.zip", folder / "locked/set.zip"):
            message = rf"{source} cannot be read \(Permission denied\): check its owner"
            with without_privileges(), pytest.raises(UserError, match=message):
                download(config(str(source)), folder / "raw")
            with without_privileges(), pytest.raises(UserError, match=message):
                batch.main("encode", str(source), str(folder / "out"), "nowhere")


def test_an_error_or_a_log_line_that_names_a_source_does_not_steer_the_terminal(monkeypatch):
    def fail() -> None:
        record = logging.makeLogRecord({"msg": "%s is read", "args": ("b\x9b.png",)})
        lines.append(logging.getLogger().handlers[0].format(record))
        raise UserError("a\x1b[2J\u202e.png is damaged\n  twice")

    lines: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's own
    monkeypatch.setattr(root, "level", root.level)  # put back at the end
    with pytest.raises(SystemExit) as ended:
        run_stage(fail)
    signal.signal(signal.SIGTERM, before)
    assert lines == ["b\\x9b.png is read"]
    assert ended.value.code == "error: a\\x1b[2J\\u202e.png is damaged\n  twice"


def test_a_failed_download_keeps_the_old_snapshot(tmp_path):
    images = write_folder(tmp_path / "images", blocks(3))
    before = download(config(images), tmp_path / "raw")
    with pytest.raises(UserError):
        download(config(tmp_path / "nowhere"), tmp_path / "raw")
    assert json.loads((tmp_path / "raw/manifest.json").read_text()) == before


def test_data_may_lie_on_another_disk_behind_a_link(tmp_path):
    images = write_folder(tmp_path / "images", blocks(3))
    (tmp_path / "disk").mkdir()
    (tmp_path / "raw").symlink_to(tmp_path / "disk/raw")
    for _ in range(2):
        download(config(images), tmp_path / "raw")
    assert (tmp_path / "disk/raw/manifest.json").exists()
