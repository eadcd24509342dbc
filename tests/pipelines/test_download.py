import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aegan import manifold
from aegan.config import DataConfig
from pipelines import download as stage
from pipelines.download import download
from pipelines.errors import UserError
from tests.pictures import blocks, write_folder


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
    images, factors = manifold.generate(0, 10, seed=3, image_size=16)
    found = rows(tmp_path / "raw")
    assert manifest["factors"] == [factor.name for factor in manifold.FACTORS]
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
        ("nowhere/at/all", "data.source 'nowhere/at/all' not found: expected manifold, a folder"),
        ("kaggle:only-a-name", "kaggle:only-a-name is no data set: expected kaggle:owner/name"),
        ("kaggle:../../etc", "expected kaggle:owner/name"),
        ("s3://", "expected s3://bucket or s3://bucket/prefix"),
        ("http://example.org/set.zip", "is not encrypted: use https://"),
    ],
)
def test_a_wrong_source_is_one_clear_error_and_leaves_nothing(tmp_path, source, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        download(config(source), tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_an_error_that_names_what_was_skipped(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"no files in .*images"):
        download(config(tmp_path / "images"), tmp_path / "raw")
    (tmp_path / "images/.hidden").touch()
    with pytest.raises(UserError, match="hidden or system file"):
        download(config(tmp_path / "images"), tmp_path / "raw")


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
