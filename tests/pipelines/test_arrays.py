import io
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.base.errors import UserError
from pipelines.ingest import entries
from pipelines.ingest.entries import RawFile, Skipped
from pipelines.ingest.sources import read_archive, read_folder
from tests.pictures import blocks, encode


def save(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "set.npy", array)
    return folder / "set.npy"


def read(file: Path) -> list:
    return list(read_archive(file, f"data/{file.name}"))


def pixels(found: list) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(entry.content))) for entry in found])


COLOURS = blocks(7)
GRAY = blocks(7, channels=1)[..., 0]
ALPHA = blocks(7, channels=4)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GRAY, GRAY),
        (GRAY[..., None], GRAY),
        (GRAY[:, None], GRAY),
        (COLOURS, COLOURS),
        (np.moveaxis(COLOURS, -1, 1), COLOURS),
        (ALPHA, ALPHA),
        (COLOURS[0], COLOURS[:1]),
        (COLOURS.astype(np.int64), COLOURS),
        (COLOURS.astype(">u2"), COLOURS),
        (COLOURS / 255, COLOURS),
        ((COLOURS / 255).astype(np.float16), COLOURS),
        (GRAY > 127, (GRAY > 127) * np.uint8(255)),
        (GRAY.astype(np.uint16) * 257, GRAY.astype(np.uint16) * 257),
    ],
)
def test_a_source_array_gives_its_images_value_for_value(tmp_path, monkeypatch, array, expected):
    monkeypatch.setattr("pipelines.ingest.arrays.AT_ONCE_BYTES", 3000)
    found = read(save(tmp_path, np.ascontiguousarray(array)))
    assert [entry.source for entry in found] == [f"set-000000{row}" for row in range(len(expected))]
    np.testing.assert_array_equal(pixels(found), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GRAY[0], "has the shape 16 x 16: expected"),
        (np.zeros((3, 16, 16), np.uint8), "has the shape 3 x 16 x 16: expected"),
        (np.zeros((9, 3, 16, 3), np.uint8), "9 x 3 x 16 x 3: .* no doubt which they are"),
        (np.zeros((9, 16, 16, 2), np.uint8), "with 1, 3 or 4 channels"),
        (np.zeros((0, 16, 16), np.uint8), "is empty"),
        (COLOURS / 127.5 - 1, "float64 from -1 to 1: save uint8 from 0 to 255, or floats"),
        (COLOURS.astype(np.float32), "float32 from 0 to 25"),
        (np.full((5, 16, 16), np.nan), "float64 from nan to nan"),
        (COLOURS.astype(np.uint16) * 257, "uint16 from"),
        (GRAY.astype(np.complex64), "values of the type complex64"),
        (np.asfortranarray(COLOURS), r"Fortran's order: save np.ascontiguousarray\(images\)"),
        (np.array([{"a": 1}]), "holds Python objects, a pickle, which can run code"),
        (np.zeros(9, [("a", "u1"), ("日", "u1")]), "named fields"),
    ],
)
def test_a_source_array_that_is_not_read_says_what_it_has_and_the_cure(tmp_path, array, message):
    np.save(tmp_path / "set.npy", array)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "set.npy")
    (tmp_path / "ok.png").write_bytes(b"x")
    found = list(read_folder(tmp_path))
    assert found[0] == RawFile("ok.png", b"x")
    assert isinstance(found[1], Skipped)
    assert found[1].reason.startswith("no images within: set.npy ")


def test_a_source_npz_gives_the_images_of_all_arrays_with_their_classes(tmp_path):
    np.savez_compressed(
        tmp_path / "mnist.npz",
        x_train=GRAY[:5],
        y_train=[3, 1, 4, 1, 5],
        x_test=GRAY[5:],
        y_test=np.array([["a"], ["b"]]),
        names=np.array(["cat", "dog"]),
    )
    found = read(tmp_path / "mnist.npz")
    assert [(e.source, e.label) for e in found if isinstance(e, RawFile)] == [
        *((f"mnist-x_test-000000{row}", label) for row, label in enumerate("ab")),
        *((f"mnist-x_train-000000{row}", label) for row, label in enumerate("31415")),
    ]
    np.testing.assert_array_equal(pixels(found[:-1]), np.concatenate([GRAY[5:], GRAY[:5]]))
    assert found[-1].source == "mnist-names"
    assert found[-1].reason.startswith("no array of images: data/mnist.npz, array names, has")


def test_labels_of_a_source_npz_that_do_not_fit_are_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOURS, labels=[1, 2])
    with pytest.raises(UserError, match="array images, has 7 images, but 2 labels"):
        read(tmp_path / "a.npz")


def test_a_source_npz_of_pickles_is_refused_and_nothing_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([b"x", {}], object))
    with pytest.raises(UserError, match="a pickle, which can run code"):
        read(tmp_path / "a.npz")


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("left", [40, 200, 3000])
def test_a_source_array_that_ends_early_is_one_clear_error(tmp_path, left):
    file = save(tmp_path, COLOURS)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=r"data/set.npy is damaged \(.+\)"):
        read(file)


def test_a_source_npz_that_unpacks_without_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_FILE_BYTES", 2**20)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2**12, 32, 32), np.uint8))
    with pytest.raises(UserError, match="decompression bomb"):
        read(tmp_path / "a.npz")


@pytest.mark.fault("damaged files")
def test_damage_anywhere_in_a_source_array_or_table_is_one_clear_error_or_other_pixels(
    tmp_path, record_property
):
    record_property("faults", 3 * 60)
    np.save(tmp_path / "plain.npy", COLOURS)
    np.savez_compressed(tmp_path / "packed.npz", images=COLOURS, labels=np.arange(7))
    rows = [{"bytes": encode(image), "path": "a.png"} for image in COLOURS]
    pq.write_table(pa.table({"image": rows, "label": range(7)}), tmp_path / "table.parquet")
    for file in list(tmp_path.iterdir()):
        sound = file.read_bytes()
        for seed in range(60):
            random = Random(seed)
            content = bytearray(sound)
            end = random.choice([len(content), 150])  # headers are small
            for place in random.sample(range(end), 2):
                content[random.choice([place, -1 - place])] ^= random.randrange(1, 256)
            file.write_bytes(content)
            with suppress(UserError):
                assert len(read(file)) >= 1
