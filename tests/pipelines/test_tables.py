import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.base.errors import UserError
from pipelines.ingest import entries
from pipelines.ingest.entries import NoImagesError, RawFile, Skipped
from pipelines.ingest.sources import read_archive, read_folder
from tests.pictures import blocks, encode


def write(file: Path, table: pa.Table, **options) -> Path:
    pq.write_table(table, file, **options)
    return file


def hugging_face(images: list[bytes], **columns) -> pa.Table:
    rows = [{"bytes": image, "path": f"i{row:04d}.png"} for row, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(rows, kind), **columns})


def with_class_names(table: pa.Table, names: list[str]) -> pa.Table:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


def read(file: Path) -> list:
    return list(read_archive(file, "the table"))


IMAGES = [encode(image) for image in blocks(20)]


def test_a_source_in_hugging_faces_layout_gives_files_paths_and_named_classes(tmp_path):
    table = with_class_names(
        hugging_face(IMAGES, label=[row % 3 - 1 for row in range(20)]), ["cat", "dog"]
    )
    assert read(write(tmp_path / "a", table, row_group_size=7)) == [
        RawFile(f"i{row:04d}.png", image, label=(None, "cat", "dog")[row % 3])
        for row, image in enumerate(IMAGES)
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "png", "anything"])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([7, None], ["7", None]),
        (["a", "b"], ["a", "b"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        ([0.5, 1.5], [None, None]),
    ],
)
def test_a_column_of_bytes_is_a_source_of_images(tmp_path, kind, name, labels, expected):
    table = pa.table({name: pa.array(IMAGES[:2], kind), "label": labels, "source": ["web", "web"]})
    assert read(write(tmp_path / "a", table)) == [
        RawFile(f"the table-000000{row}", IMAGES[row], label=expected[row]) for row in range(2)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_our_own_shards_are_a_source_without_loss(tmp_path, channels):
    images = blocks(5, channels=channels)
    schema = pa.schema(
        [
            ("image", pa.binary(images[0].size)),
            ("label", pa.int64()),
            ("source", pa.string()),
        ],
        {"height": "16", "width": "16", "channels": str(channels)},
    )
    columns = {
        "image": [image.tobytes() for image in images],
        "label": [0, 1, None, 1, 0],
        "source": [f"folder/{row}.jpg" for row in range(5)],
    }
    found = read(write(tmp_path / "a", pa.table(columns, schema)))
    assert [(e.source, e.label) for e in found] == [
        (f"folder/{row}.jpg", label) for row, label in enumerate(["0", "1", None, "1", "0"])
    ]
    for entry, image in zip(found, images, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(entry.content))).reshape(image.shape)
        np.testing.assert_array_equal(picture, image)


def test_a_snapshot_of_ours_is_a_source_again(tmp_path):
    columns = {
        "source": ["a/b.png", "c.png"],
        "content": pa.array(IMAGES[:2], pa.large_binary()),
        "label": ["x", None],
    }
    assert read(write(tmp_path / "a", pa.table(columns))) == [
        RawFile("a/b.png", IMAGES[0], label="x"),
        RawFile("c.png", IMAGES[1]),
    ]


def test_a_source_folder_of_tables_gives_all_rows_and_names_the_table_without_images(tmp_path):
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = hugging_face(IMAGES[10 * part : 10 * part + 10])
        write(tmp_path / f"data/train-{part}.parquet", table)
    write(tmp_path / "data/text.parquet", pa.table({"text": ["a"], "number": [1]}))
    found = list(read_folder(tmp_path))
    assert [e.content for e in found if isinstance(e, RawFile)] == IMAGES
    assert {e.source.rpartition("/")[0] for e in found} == {"data"}
    (skipped,) = [e for e in found if isinstance(e, Skipped)]
    assert skipped.source == "data/text.parquet"
    assert skipped.reason == (
        "no images within: data/text.parquet has no column of images: expected one column `image` "
        "of bytes, or of {bytes, path} as Hugging Face writes it; it has text (string), "
        "number (int64)"
    )


def test_a_row_of_a_source_table_without_bytes_is_listed(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": "/home/me/a.png"}, None, {"bytes": IMAGES[0], "path": None}]
    found = read(write(tmp_path / "a", pa.table({"image": pa.array(rows, kind)})))
    reason = "no bytes in the table: only the path of a file elsewhere"
    assert found == [
        Skipped("/home/me/a.png", reason),
        Skipped("the table-0000001", reason),
        RawFile("the table-0000002", IMAGES[0]),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [b"x"], "b": [b"y"]}, r"the table has several columns of bytes \(a, b\)"),
        ({"a": [1]}, r"has no column of images: expected .*; it has a \(int64\)"),
        ({"image": [[b"x", b"y"]]}, r"it has image \(list<"),
        ({"image": pa.array([b"abcd"], pa.binary(4))}, "pixels of unknown shape"),
    ],
)
def test_a_source_table_without_images_says_what_it_has_and_what_was_expected(
    tmp_path, columns, message
):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a", pa.table(columns)))


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("names", [["image", "image"], ["image", "label", "label"]])
def test_a_source_table_with_two_columns_of_one_name_says_so(tmp_path, names):
    columns = [pa.array([b"a"]), *([pa.array([1])] * (len(names) - 1))]
    file = write(tmp_path / "a", pa.Table.from_arrays(columns, names=names))
    with pytest.raises(NoImagesError, match=rf"has several columns of one name \({names[-1]}\)"):
        read(file)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("place", [2, 8, 300, 900])
def test_a_damaged_source_table_is_one_clear_error(tmp_path, place):
    file = write(tmp_path / "a", hugging_face(IMAGES))
    content = file.read_bytes()
    file.write_bytes(b"PAR1" + content[4 : len(content) - place])
    with pytest.raises(UserError, match=r"the table is damaged \(.+\)"):
        read(file)


def test_a_source_table_that_unpacks_without_measure_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_FILE_BYTES", 2**20)
    zeros = pa.table({"image": pa.array([bytes(2**19)] * 8, pa.binary())})
    plain = write(tmp_path / "a", zeros, compression="zstd", use_dictionary=False)
    repeated = write(tmp_path / "b", zeros, compression="zstd")
    for file in (plain, repeated):
        with pytest.raises(UserError, match="decompression bomb"):
            read(file)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_tables_and_arrays_in_a_source_archive_are_read_where_they_lie(tmp_path, kind):
    contents = {name: io.BytesIO() for name in ("a/t.parquet", "a/n.npz", "m.npy")}
    pq.write_table(pa.table({"image": pa.array(IMAGES[:2], pa.binary())}), contents["a/t.parquet"])
    np.savez(contents["a/n.npz"], x=blocks(7)[2:4])
    np.save(contents["m.npy"], blocks(7)[4:])
    for name, content in contents.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content.getvalue())
    format = {"zip": "zip", "tar.gz": "gztar"}[kind]
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), format, tmp_path / "set"))
    names = ["a/n-x-0000000", "a/n-x-0000001", "a/t-0000000", "a/t-0000001"]
    names += [f"m-000000{row}" for row in range(3)]
    assert sorted(entry.source for entry in read(archive)) == names
    assert sorted(entry.source for entry in read_folder(tmp_path / "set")) == names
