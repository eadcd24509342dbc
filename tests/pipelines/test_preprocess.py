"""Files in, shards out; every property is checked on the files that the stage wrote."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from aegan.config import SPLITS, ConfigError, DataConfig, PreprocessConfig
from aegan.data import dataset, designed_faces, intrinsic_dimension
from pipelines import download as download_stage
from pipelines import preprocess as preprocess_stage
from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.download import download
from pipelines.ingest import decoded_before, pieces
from pipelines.ingest.decode import decode_snapshot
from pipelines.ingest.pieces import decode_files, decode_rows
from pipelines.preprocess import preprocess
from tests.faulty_decoder import FAULTY_DECODER
from tests.pictures import blocks, encode, write_folder

CONFIG = PreprocessConfig(
    image_size=16,
    image_channels=3,
    fit="crop",
    max_pixels=10_000,
    frames="first",
    value_range="full",
    near_duplicate_distance=3.0,
    validation_fraction=0.2,
    test_fraction=0.2,
    rows_per_shard=32,
    rows_per_row_group=8,
    keep_out="",
)
REAL_FACES = Path("../shared/data/anime_faces/anime_faces.zip")


def snapshot(source: str | Path, folder: Path, *, images: int = 200) -> Path:
    config = DataConfig(
        source=str(source),
        in_place=False,
        manifold_images=images,
        manifold_size=16,
        manifold_seed=0,
    )
    download(config, folder / "raw")
    return folder / "raw"


def run(
    raw: Path,
    folder: Path,
    config: PreprocessConfig = CONFIG,
    processes: int = 1,
    batch_size: int = 1,
) -> dict:
    return preprocess(
        config,
        raw,
        shards=folder / "shards",
        artifacts=folder / "artifacts",
        runs=folder / "runs",
        batch_size=batch_size,
        processes=processes,
    )


def quarantine(folder: Path) -> dict[str, str]:
    with (folder / "artifacts/quarantine.csv").open(encoding="utf-8") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def split_of_each_image(folder: Path) -> dict[str, str]:
    return {
        image_id: split
        for split in SPLITS
        for image_id in dataset.load_columns(folder / "shards", split, ["image_id"])["image_id"]
    }


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of all that the stage wrote."""
    files = [*(folder / "shards").iterdir(), *(folder / "artifacts").iterdir()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images of the designed faces, in 7 row groups, and what became of them."""
    folder = tmp_path_factory.mktemp("faces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_stage, "ROW_GROUP_ROWS", 32)
        snapshot("manifold", folder)
    run(folder / "raw", folder)
    return folder


def test_pictures_of_any_source_name_arrive_and_what_is_left_out_is_safe_to_open(tmp_path):
    odd = ["=1+1.png", "@cmd.png", "red\x1b[31m.png", "nbsp\u00a0\u3000.png", "../out\u202e.png"]
    names = [*odd, *(f"data\\a\\i{row:04d}.png" for row in range(60))]
    images = [encode(image) for image in blocks(len(names))]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, image)
        archive.writestr("-2+3.txt", "a,b\n1,2\n")
        archive.writestr("=page.png", "<html>log in</html>")
        archive.writestr("a.bmp", encode(blocks(1)[0], "BMP"))  # the pixels of "=1+1.png"
    run(snapshot(tmp_path / "set.zip", tmp_path), tmp_path)
    found = {
        source: None
        for split in SPLITS
        for source in dataset.load_columns(tmp_path / "shards", split, ["source"])["source"]
    }
    left_out = quarantine(tmp_path)
    assert left_out.pop("'-2+3.txt") == "not an image: a table of text (CSV)"
    assert left_out.pop("'=page.png").startswith("not an image: an HTML page")
    twins = {source for source, reason in left_out.items() if reason.startswith("duplicate: ")}
    assert twins in ({"a.bmp"}, {"'=1+1.png"})
    expected = {name.replace("\\", "/") for name in names} - {"=1+1.png"}
    near = {source.lstrip("'") for source in left_out.keys() - twins}
    assert found.keys() - {"=1+1.png", "a.bmp"} == {
        name for name in expected if shown(name) not in near
    }


def test_classes_that_a_source_states_travel_with_its_images(tmp_path):
    images = [encode(image) for image in blocks(60)]
    labels = [("cat", "dog", None)[row % 3] for row in range(60)]
    pq.write_table(
        pa.table({"image": pa.array(images, pa.binary()), "label": labels}), tmp_path / "a.parquet"
    )
    raw = snapshot(tmp_path / "a.parquet", tmp_path)
    shards = json.loads((raw / "manifest.json").read_text())["shards"]
    (tmp_path / "work").mkdir()
    parts = decode_snapshot(CONFIG, raw, shards, work=tmp_path / "work", processes=1)
    assert [label for part in parts for label in pq.read_table(part)["label"].to_pylist()] == labels


def test_the_log_says_how_many_files_of_a_source_are_skipped_and_where_they_are_listed(
    tmp_path, caplog
):
    images = write_folder(tmp_path / "images", blocks(60))
    (images / "notes.txt").write_text("notes")
    (images / ".hidden").touch()
    raw = snapshot(images, tmp_path)
    with caplog.at_level("INFO"):
        run(raw, tmp_path)
    (told,) = [message for message in caplog.messages if "skipped" in message]
    assert "1 not an image" in told
    assert "1 hidden or system file" in told
    assert told.endswith(f"see {tmp_path / 'artifacts/quarantine.csv'}")


def test_every_image_arrives_once_with_its_pixels_source_and_factors(faces):
    images, factors = designed_faces.generate(0, 200, seed=0, image_size=16)
    seen = set()
    for split in SPLITS:
        found = dataset.load_images(faces / "shards", split)
        names = ["source", "image_id", *(f"factor_{f.name}" for f in designed_faces.FACTORS)]
        columns = dataset.load_columns(faces / "shards", split, names)
        for row, source in enumerate(columns["source"]):
            index = int(source.removeprefix("face-").removesuffix(".png"))
            seen.add(index)
            np.testing.assert_array_equal(found[row], images[index])
            assert columns["image_id"][row] == hashlib.sha256(images[index].tobytes()).hexdigest()
            assert [columns[name][row] for name in names[2:]] == factors[index].tolist()
    left_out = {int(source[5:12]) for source in quarantine(faces)}
    assert seen | left_out == set(range(200))
    assert not seen & left_out


def test_the_shards_are_those_of_the_contract(faces):
    manifest = json.loads((faces / "shards/manifest.json").read_text())
    raw = json.loads((faces / "raw/manifest.json").read_text())
    assert manifest["source_sha256"] == raw["source_sha256"]
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    joined = "".join(shard["sha256"] for shard in shards)
    assert manifest["dataset_sha256"] == hashlib.sha256(joined.encode()).hexdigest()
    for split in SPLITS:
        *full, last = manifest["splits"][split]["shards"]
        assert all(shard["rows"] == CONFIG.rows_per_shard for shard in full)
        for shard in (*full, last):
            content = (faces / "shards" / shard["file"]).read_bytes()
            assert shard["bytes"] == len(content)
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
            file = pq.ParquetFile(faces / "shards" / shard["file"])
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            assert all(rows == CONFIG.rows_per_row_group for rows in groups[:-1])
            assert sum(groups) == shard["rows"]
            assert set(file.read(["split"])["split"].to_pylist()) == {split}
            metadata = file.schema_arrow.metadata
            assert metadata[b"height"] == metadata[b"width"] == b"16"
            assert metadata[b"channels"] == b"3"
            assert metadata[b"preprocess_sha256"].decode() == manifest["preprocess_sha256"]


def test_the_images_dimension_stands_in_statistics_and_manifest_if_there_are_enough(
    faces, tmp_path, monkeypatch
):
    monkeypatch.setattr(intrinsic_dimension, "MIN_IMAGES", 100)
    (tmp_path / "raw").symlink_to(faces / "raw")
    statistics = run(tmp_path / "raw", tmp_path)
    expected = round(intrinsic_dimension.of_shards(tmp_path / "shards"), 1)
    manifest = dataset.read_manifest(tmp_path / "shards")
    assert statistics["intrinsic_dimension"] == manifest["intrinsic_dimension"] == expected
    of_few = dataset.read_manifest(faces / "shards")
    assert of_few["intrinsic_dimension"] is None
    assert manifest["dataset_sha256"] == of_few["dataset_sha256"]


def test_statistics_count_every_file_and_describe_the_training_images(faces):
    statistics = json.loads((faces / "artifacts/statistics.json").read_text())
    counts = {split: len(dataset.load_images(faces / "shards", split)) for split in SPLITS}
    assert {split: statistics[split] for split in SPLITS} == counts
    assert statistics["files"] == 200 == statistics["kept"] + statistics["quarantined"]
    pixels = dataset.load_images(faces / "shards", "train").reshape(-1, 3)
    assert list(statistics["pixel_mean"].values()) == pytest.approx(pixels.mean(axis=0), abs=1e-3)
    assert list(statistics["pixel_std"].values()) == pytest.approx(pixels.std(axis=0), abs=1e-3)


def test_the_contact_sheet_shows_a_hundred_training_images(faces):
    sheet = Image.open(faces / "artifacts/contact_sheet.png")
    assert sheet.size == ((10 * 18 + 2) * 4,) * 2


def test_after_a_good_end_the_parts_alone_stay_for_the_next_run(faces):
    [work] = (faces / "runs").glob("preprocess-*")
    assert sorted(work.iterdir()) == parts(faces)
    assert len(parts(faces)) == 7


def test_the_bytes_do_not_depend_on_the_number_of_processes(faces, tmp_path):
    run(faces / "raw", tmp_path, processes=2)
    assert hashes(tmp_path) == hashes(faces)


def test_a_decoded_row_depends_on_its_own_file_alone():
    contents = [encode(image) for image in blocks(5, size=64)]
    contents[2] = b"no image"
    together = decode_files(pa.chunked_array([contents], pa.large_binary()), CONFIG)
    assert [row is None for row in together["reason"].to_pylist()] == [1, 1, 0, 1, 1]
    for row, content in enumerate(contents):
        alone = decode_files(pa.chunked_array([[content]], pa.large_binary()), CONFIG)
        assert alone.drop("file").to_pylist() == together.slice(row, 1).drop("file").to_pylist()
    assert len(decode_files(pa.chunked_array([[]], pa.large_binary()), CONFIG)) == 0


def test_a_decoding_process_loads_neither_torch_nor_scipy():
    script = "import pipelines.preprocess, sys; print({'torch', 'scipy'} & sys.modules.keys())"
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"


def stack(count: int) -> bytes:
    """A TIFF of as many pages."""
    pages = [Image.fromarray(image) for image in blocks(count, seed=5)]
    return encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])


def test_pages_of_a_source_beyond_the_first_are_counted_and_said(tmp_path, caplog):
    folder = write_folder(tmp_path / "images", blocks(40))
    (folder / "stack.tif").write_bytes(stack(40))
    statistics = run(snapshot(folder, tmp_path), tmp_path)
    assert statistics["kept"] == 41
    assert (statistics["files_with_more_frames"], statistics["frames_left_out"]) == (1, 39)
    (said,) = [text for text in statistics["warnings"] if "pages" in text]
    assert said == (
        "39 further pages or frames in 1 file were left out: preprocess.frames: all takes them"
    )
    assert f"warning: {said}" in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_all_pages_of_a_source_become_images_when_asked_for(tmp_path, processes):
    folder = write_folder(tmp_path / "images", blocks(20))
    (folder / "stack.tif").write_bytes(stack(40))
    (folder / "text.png").write_text("no image")
    config = dataclasses.replace(CONFIG, frames="all")
    statistics = run(snapshot(folder, tmp_path), tmp_path, config, processes)
    assert statistics["kept"] == 60
    assert statistics["frames_left_out"] == 0
    found = {}
    for split in SPLITS:
        sources = dataset.load_columns(tmp_path / "shards", split, ["source"])["source"]
        found |= dict(zip(sources, dataset.load_images(tmp_path / "shards", split), strict=True))
    assert quarantine(tmp_path).keys() == {"text.png"}
    names = ["stack.tif", *(f"stack.tif#{page}" for page in range(2, 41))]
    for name, page in zip(names, blocks(40, seed=5), strict=True):
        np.testing.assert_array_equal(found[name], page)


def test_decoded_frames_of_a_source_come_in_tables_of_bounded_size(monkeypatch):
    monkeypatch.setattr(pieces, "TABLE_BYTES", 10 * 768)
    contents = pa.array([stack(15), b"no image", stack(3)], pa.large_binary())
    rows = pa.table({"source": ["a", "b", "c"], "content": contents})
    for frames, sizes in (("all", [15, 4]), ("first", [3])):
        tables = list(decode_rows(rows, dataclasses.replace(CONFIG, frames=frames)))
        assert [len(table) for table in tables] == sizes
    assert tables[0]["source"].to_pylist() == ["a", "b", "c"]


def test_a_source_of_12_bits_in_16_gets_a_warning_with_the_range_and_the_setting(tmp_path, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    for row, image in enumerate(blocks(40, channels=1)):
        values = image.squeeze().astype(np.uint16) * 16
        (folder / f"{row:04d}.png").write_bytes(encode(Image.fromarray(values)))
    most = max(int(image.max()) for image in blocks(40, channels=1)) * 16
    (folder / "bright.png").write_bytes(encode(Image.new("I;16", (16, 16), 65535)))
    raw = snapshot(folder, tmp_path)
    statistics = run(raw, tmp_path / "dark")
    assert statistics["images_of_16_bits"] == 41
    assert statistics["largest_16_bit_value"] == 65535
    (said,) = [text for text in statistics["warnings"] if "16-bit" in text]
    assert said.startswith(f"40 of 41 images with 16-bit samples hold no value above {most:,}, of")
    assert "preprocess.value_range: 0..4095" in said
    assert said in caplog.text
    assert max(statistics["pixel_mean"].values()) < 24

    config = dataclasses.replace(CONFIG, value_range="0..4095")
    statistics = run(raw, tmp_path / "right", config)
    assert not [text for text in statistics["warnings"] if "16-bit" in text]
    assert min(statistics["pixel_mean"].values()) > 100
    manifest = json.loads((tmp_path / "right/shards/manifest.json").read_text())
    assert manifest["value_range"] == "0..4095"


@pytest.mark.fault("damaged files")
def test_lack_of_memory_ends_the_run_with_the_cure_and_drops_no_source(tmp_path):
    script = """
import resource, sys
import pyarrow as pa
from pipelines.ingest.pieces import decode_rows
from pipelines.base.errors import UserError
from tests.pipelines.test_preprocess import CONFIG
import dataclasses
content = open(sys.argv[1], "rb").read()
rows = pa.table({"source": ["large.png"], "content": pa.array([content], pa.large_binary())})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000,) * 2)
try:
    list(decode_rows(rows, dataclasses.replace(CONFIG, max_pixels=10**8)))
except UserError as error:
    print(error)
"""
    (tmp_path / "large").write_bytes(encode(Image.new("RGB", (6000, 6000))))
    command = [sys.executable, "-c", script, str(tmp_path / "large")]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == (
        "not enough memory to decode large.png: lower preprocess.max_pixels or free some, then "
        "run the same command again\n"
    ), result.stderr


def test_every_unusable_file_gets_its_line_and_the_rest_is_kept(tmp_path):
    images = blocks(40)
    folder = write_folder(tmp_path / "images", images)
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "half.jpg").write_bytes(encode(images[0], "JPEG")[:300])
    (folder / "large.png").write_bytes(encode(blocks(1, size=128)[0]))
    (folder / "link.png").symlink_to("/etc/passwd")
    (folder / "mislabelled.txt").write_bytes(encode(blocks(1, seed=9)[0], "BMP"))
    (folder / "zzz-again.bmp").write_bytes(encode(images[7], "BMP"))
    (folder / ".DS_Store").touch()
    statistics = run(snapshot(folder, tmp_path), tmp_path)
    reasons = {source: reason.split(":")[0] for source, reason in quarantine(tmp_path).items()}
    assert reasons == {
        ".DS_Store": "hidden or system file",
        "empty.png": "empty file",
        "half.jpg": "cannot be decoded",
        "large.png": "too many pixels",
        "link.png": "link",
        "text.png": "not an image",
        "zzz-again.bmp": "duplicate",
    }
    assert quarantine(tmp_path)["zzz-again.bmp"] == "duplicate: 0007.png"
    assert statistics["kept"] == 41
    assert statistics["quarantined_by_reason"]["too many pixels"] == 1


def test_one_channel_and_padding_are_supported(tmp_path):
    raw = snapshot(write_folder(tmp_path / "images", blocks(60)[:, :12]), tmp_path)
    config = dataclasses.replace(CONFIG, image_channels=1, fit="pad")
    run(raw, tmp_path, config)
    train = dataset.load_images(tmp_path / "shards", "train")
    assert train.shape[1:] == (16, 16, 1)
    assert (train[:, :2] == 255).all()


def noisy_copies(images: np.ndarray, *, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-2, 3, images.shape)
    return np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)


def test_no_training_image_is_a_near_duplicate_of_a_held_out_one(tmp_path):
    images = blocks(60)
    folder = write_folder(tmp_path / "images", images)
    for copy in range(3):
        write_folder(folder / f"copy-{copy}", noisy_copies(images, seed=copy))
    run(snapshot(folder, tmp_path), tmp_path)
    train, validation, test = (
        dataset.load_images(tmp_path / "shards", split).reshape(-1, 768).astype(float)
        for split in SPLITS
    )
    for later, earlier in ((train, test), (train, validation), (validation, test)):
        distances = np.sqrt(np.square(later[:, None] - earlier[None]).mean(axis=-1))
        assert distances.min() >= CONFIG.near_duplicate_distance
    aside = [r for r in quarantine(tmp_path).values() if r.startswith("near duplicate")]
    assert aside
    statistics = json.loads((tmp_path / "artifacts/statistics.json").read_text())
    assert statistics["near_duplicate_groups"] == 60
    assert statistics["images_in_near_duplicate_groups"] == 240


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**16), st.integers(1, 60), st.booleans())
def test_adding_data_never_moves_an_image_to_another_split(tmp_path_factory, seed, more, similar):
    folder = tmp_path_factory.mktemp("growing")
    old = blocks(80, seed=seed)
    images = write_folder(folder / "images", old)
    run(snapshot(images, folder / "before"), folder / "before")
    new = noisy_copies(old[:more], seed=seed) if similar else blocks(more, seed=seed + 1)
    write_folder(images / "added", new)
    run(snapshot(images, folder / "after"), folder / "after")
    before, after = (split_of_each_image(folder / name) for name in ("before", "after"))
    assert {i: s for i, s in before.items() if i in after} == {
        i: s for i, s in after.items() if i in before
    }
    gone = [source for source in quarantine(folder / "after") if "/" not in source]
    assert len(before.keys() - after.keys()) == len(gone)
    near = "near duplicate of an image in another split: "
    assert all(quarantine(folder / "after")[source].startswith(near) for source in gone)


def split_of_each_source(folder: Path) -> dict[str, str]:
    return {
        source: split
        for split in SPLITS
        for source in dataset.load_columns(folder / "shards", split, ["source"])["source"]
    }


def reference_of(images: np.ndarray, file: Path) -> Path:
    """A Parquet file as `aegan reference` cuts one."""
    rows = [image.tobytes() for image in images]
    columns = {
        "image_id": [hashlib.sha256(row).hexdigest() for row in rows],
        "image": pa.array(rows, pa.binary(len(rows[0]))),
    }
    height, width, channels = images.shape[1:]
    metadata = {"height": str(height), "width": str(width), "channels": str(channels)}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)
    return file


@pytest.mark.parametrize("distance", [3.0, 0.0])
def test_what_is_near_to_the_reference_is_not_trained_on_and_is_listed(tmp_path, distance):
    images = blocks(60)
    config = dataclasses.replace(CONFIG, near_duplicate_distance=distance)
    raw = snapshot(write_folder(tmp_path / "images", images), tmp_path)
    run(raw, tmp_path, config)
    split = split_of_each_source(tmp_path)
    trained = [name for name in sorted(split) if split[name] == "train"]
    held_out = [name for name in sorted(split) if split[name] == "test"]
    numbers = [int(Path(name).stem) for name in (*trained[:3], held_out[0])]
    elsewhere = images[numbers]  # which are in the source, too
    elsewhere[0] ^= 1  # and one that was saved anew
    file = reference_of(elsewhere, tmp_path / "reference.parquet")
    out = tmp_path / "out"
    statistics = run(raw, out, dataclasses.replace(config, keep_out=str(file)))
    lost = trained[0 if distance else 1 : 3]
    assert quarantine(out) == dict.fromkeys(lost, "near duplicate of a reference image")
    assert statistics["quarantined_by_reason"] == {"near duplicate of a reference image": len(lost)}
    assert split_of_each_source(out) == {n: s for n, s in split.items() if n not in lost}
    before, after = (
        json.loads((folder / "shards/manifest.json").read_text()) for folder in (tmp_path, out)
    )
    assert before["preprocess_sha256"] == after["preprocess_sha256"]


@pytest.mark.parametrize("fraction", [0.0, 1e-9])
def test_a_reference_of_all_images_is_said_to_leave_none(tmp_path, fraction):
    images = blocks(12)
    raw = snapshot(write_folder(tmp_path / "images", images), tmp_path)
    file = reference_of(images, tmp_path / "reference.parquet")
    config = dataclasses.replace(
        CONFIG, keep_out=str(file), validation_fraction=fraction, test_fraction=fraction
    )
    with pytest.raises(UserError, match=r"^0 .* \(12 more are in preprocess.keep_out\)"):
        run(raw, tmp_path / "out", config)


@pytest.mark.parametrize("content", [None, b"no table", "gray"])
def test_a_reference_that_does_not_fit_is_one_clear_error(faces, tmp_path, content):
    file = tmp_path / "reference.parquet"
    if content == "gray":
        reference_of(blocks(2, channels=1), file)
    elif content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"reference.parquet .*: expected a Parquet file of images"):
        run(faces / "raw", tmp_path, dataclasses.replace(CONFIG, keep_out=str(file)))


def star_fields(count: int, *, seed: int = 0) -> np.ndarray:
    """uint8 [N, 64, 64, 1]: faint stars on black, so that all have the same coarse colours."""
    random = np.random.default_rng(seed)
    images = random.integers(8, 14, (count, 64, 64, 1), dtype=np.uint8)
    for image in images:
        image[tuple(random.integers(0, 64, (2, 40)))] = random.integers(60, 220, (40, 1))
    return images


PROJECT_SPLITS = dataclasses.replace(CONFIG, validation_fraction=0.05, test_fraction=0.1)


def test_pictures_of_equal_colours_are_split_by_the_fractions_and_alike_at_any_size(tmp_path):
    raw = snapshot(write_folder(tmp_path / "images", star_fields(400)), tmp_path)
    found = {}
    for name, change in {
        "16": {},
        "32": {"image_size": 32},
        "gray": {"image_channels": 1, "image_size": 64, "fit": "pad"},
    }.items():
        statistics = run(raw, tmp_path / name, dataclasses.replace(PROJECT_SPLITS, **change))
        assert statistics["kept"] == 400
        assert statistics["test"] == pytest.approx(40, abs=20)
        assert statistics["validation"] == pytest.approx(20, abs=15)
        found[name] = split_of_each_source(tmp_path / name)
    assert found["16"] == found["32"] == found["gray"]


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,  # a draw may leave fewer training images than are needed, rarely
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**16), st.integers(10, 40))
def test_ten_images_can_be_split(tmp_path_factory, seed, count):
    folder = tmp_path_factory.mktemp("small")
    raw = snapshot(write_folder(folder / "images", blocks(count, seed=seed)), folder)
    statistics = run(raw, folder, PROJECT_SPLITS)
    assert statistics["kept"] == count
    assert statistics["test"] >= 2
    assert statistics["validation"] >= 1
    assert statistics["train"] == count - statistics["test"] - statistics["validation"] > 0


def test_an_image_that_chance_did_not_hold_out_is_the_one_with_the_lowest_draw(tmp_path):
    images = blocks(12)
    raw = snapshot(write_folder(tmp_path / "images", images), tmp_path)
    tiny = dataclasses.replace(CONFIG, validation_fraction=1e-9, test_fraction=1e-9)
    statistics = run(raw, tmp_path, tiny)
    drawn = sorted(range(12), key=lambda row: hashlib.sha256(encode(images[row])).digest())
    splits = split_of_each_source(tmp_path)
    order = [splits[f"{row:04d}.png"] for row in drawn]
    assert order == ["test", "test", "validation", *["train"] * 9]
    assert any("may go back when the set grows" in line for line in statistics["warnings"])


def test_nine_images_cannot_be_split_but_can_be_trained_on(tmp_path):
    raw = snapshot(write_folder(tmp_path / "images", blocks(9)), tmp_path)
    with pytest.raises(UserError, match=r"9 of 9 files .* 10 are needed.*test_fraction=0"):
        run(raw, tmp_path, PROJECT_SPLITS)
    none = dataclasses.replace(CONFIG, validation_fraction=0.0, test_fraction=0.0)
    statistics = run(raw, tmp_path, none)
    assert (statistics["train"], statistics["validation"], statistics["test"]) == (9, 0, 0)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_of_fraction_zero_is_empty_and_what_is_not_measured_is_said(tmp_path, split):
    raw = snapshot(write_folder(tmp_path / "images", blocks(60)), tmp_path)
    statistics = run(raw, tmp_path, dataclasses.replace(CONFIG, **{f"{split}_fraction": 0.0}))
    assert statistics[split] == 0
    assert statistics["kept"] == 60
    assert len(statistics["warnings"]) == 1
    assert f"preprocess.{split}_fraction is 0: " in statistics["warnings"][0]


def test_a_batch_larger_than_the_training_split_is_refused_with_the_setting_that_works(tmp_path):
    raw = snapshot(write_folder(tmp_path / "images", blocks(33)), tmp_path)
    with pytest.raises(ConfigError, match=r"only 2\d training images.* -S training.batch_size=16$"):
        run(raw, tmp_path, PROJECT_SPLITS, batch_size=32)
    assert not (tmp_path / "shards").exists()
    run(raw, tmp_path, PROJECT_SPLITS, batch_size=16)


def test_the_stage_knows_the_batch_size_that_the_training_split_must_fill(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", blocks(33))
    snapshot(folder, tmp_path / "artifacts")
    shutil.copy("params.yaml", tmp_path)  # its training.batch_size is 32
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"training.batch_size is 32, but there are only"):
        preprocess_stage.main()


def test_a_set_of_one_picture_cannot_be_split_and_the_true_reason_is_said(tmp_path):
    images = noisy_copies(blocks(1).repeat(40, axis=0), seed=0)
    raw = snapshot(write_folder(tmp_path / "images", images), tmp_path)
    with pytest.raises(UserError, match=r"near duplicates of each other.*near_duplicate_distance"):
        run(raw, tmp_path)


def test_a_few_groups_of_near_duplicates_are_split_without_a_leak(tmp_path):
    pictures = blocks(6).repeat(12, axis=0)
    raw = snapshot(write_folder(tmp_path / "images", noisy_copies(pictures, seed=0)), tmp_path)
    statistics = run(raw, tmp_path, PROJECT_SPLITS)
    assert statistics["test"] >= 2
    assert statistics["validation"] >= 1
    of_picture: dict[int, set[str]] = {}
    for source, split in split_of_each_source(tmp_path).items():
        of_picture.setdefault(int(source[:4]) // 12, set()).add(split)
    assert all(len(splits) == 1 for splits in of_picture.values())


def test_a_split_far_from_its_fraction_is_a_warning_with_the_reason(tmp_path):
    images = np.concatenate([blocks(200), noisy_copies(blocks(1, seed=1).repeat(300, 0), seed=0)])
    raw = snapshot(write_folder(tmp_path / "images", images), tmp_path)
    statistics = run(raw, tmp_path, dataclasses.replace(CONFIG, validation_fraction=0.02))
    warnings = statistics["warnings"]
    aside = "images were set aside as near duplicates of images in other splits"
    assert sum(aside in line for line in warnings) == 1
    of_splits = [line for line in warnings if "were wanted" in line]
    assert of_splits
    for line in of_splits:
        assert re.search(r"are \w+ images, .* were wanted: .* near duplicates .* set aside", line)


def labels(folder: Path) -> dict[str, str | None]:
    """Class of each source, as the shards and their manifest say."""
    classes = dataset.read_manifest(folder / "shards")["classes"]
    found = {}
    for file in (folder / "shards").glob("*.parquet"):
        table = pq.read_table(file, columns=["source", "label"])
        assert table.schema.field("label").type == pa.int64()
        for row in table.to_pylist():
            found[row["source"]] = None if row["label"] is None else classes[row["label"]]
    return found


def test_class_folders_of_a_source_become_labels(tmp_path):
    images = blocks(30)
    write_folder(tmp_path / "images/train/dogs", images[:10])
    write_folder(tmp_path / "images/train/cats/indoors", images[10:25])
    write_folder(tmp_path / "images/test/cats", images[25:28])
    write_folder(tmp_path / "images", images[28:])
    statistics = run(snapshot(tmp_path / "images", tmp_path), tmp_path)
    assert dataset.read_manifest(tmp_path / "shards")["classes"] == ["cats", "dogs"]
    assert statistics["classes"] == {"cats": 18, "dogs": 10}
    found = labels(tmp_path)
    assert found["train/cats/indoors/0003.png"] == found["test/cats/0002.png"] == "cats"
    assert found["train/dogs/0003.png"] == "dogs"
    assert found["0001.png"] is None


def test_a_second_copy_of_a_source_within_itself_makes_no_classes(tmp_path):
    images = blocks(20)
    write_folder(tmp_path / "images/data", images)
    write_folder(tmp_path / "images/data/data", images[:15])
    statistics = run(snapshot(tmp_path / "images", tmp_path), tmp_path)
    assert statistics["kept"] == 20
    assert statistics["classes"] == {}
    assert set(labels(tmp_path).values()) == {None}


def test_classes_that_a_source_states_count_more_than_folders(tmp_path):
    write_folder(tmp_path / "images/a", blocks(10))
    write_folder(tmp_path / "images/b", blocks(10, seed=1))
    raw = snapshot(tmp_path / "images", tmp_path)
    file = raw / "files-00000.parquet"
    table = pq.read_table(file)
    stated = pa.array(["ship", None, *["boat"] * 13], pa.string())
    other = file.with_name("files-00001.parquet")  # a later shard, in which no image has a class
    pq.write_table(table.slice(0, 15).append_column("label", stated), file)
    pq.write_table(table.slice(15), other)
    manifest = json.loads((raw / "manifest.json").read_text())
    manifest["shards"] = [
        {"file": path.name, "bytes": path.stat().st_size} for path in (file, other)
    ]
    (raw / "manifest.json").write_text(json.dumps(manifest))
    assert run(raw, tmp_path)["classes"] == {"boat": 13, "ship": 1}
    assert labels(tmp_path)["b/0009.png"] is None
    assert labels(tmp_path)["a/0001.png"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_pixels": 10}, r"no usable image among 3 files.* 0000.png \(too many pixels"),
        ({}, "3 of 3 files are different, usable images, 10 are needed: add images"),
    ],
)
def test_what_a_user_can_cure_is_one_clear_error(tmp_path, change, message):
    raw = snapshot(write_folder(tmp_path / "images", blocks(3)), tmp_path)
    with pytest.raises(UserError, match=message):
        run(raw, tmp_path, dataclasses.replace(CONFIG, **change))
    assert not (tmp_path / "shards").exists()


@pytest.mark.fault("damaged files")
def test_a_missing_or_changed_snapshot_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json not found: run the stage download first"):
        run(tmp_path / "raw", tmp_path)
    raw = snapshot("manifold", tmp_path)
    (raw / "files-00000.parquet").write_bytes(b"cut")
    with pytest.raises(UserError, match="missing or changed: run the stage download again"):
        run(raw, tmp_path)


def start_stage(
    folder: Path,
    raw: Path,
    *,
    prologue: str = "pass",
    processes: int | None = 2,
    path: str = "",
) -> subprocess.Popen[str]:
    """The stage in a process of its own, with two workers."""
    script = folder / "stage.py"
    script.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pipelines.base.errors import run_stage\n"
        "from tests.pipelines.test_preprocess import run\n"
        "if __name__ == '__main__':\n"
        f"    {prologue}\n"
        f"    run_stage(lambda: run(Path(sys.argv[1]), Path(sys.argv[2]), processes={processes}))\n"
    )
    command = [sys.executable, str(script), str(raw), str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{path}{Path.cwd()}"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/preprocess-*/part-*.parquet"))


@pytest.mark.slow
@pytest.mark.fault("killed processes")
def test_killed_half_way_the_next_run_gives_the_same_bytes_and_no_worker_stays(faces, tmp_path):
    process = start_stage(tmp_path, faces / "raw")
    wait_until(lambda: parts(tmp_path))
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not (tmp_path / "shards").exists()
    wait_until(lambda: all(has_ended(worker) for worker in workers))
    run(faces / "raw", tmp_path)
    assert hashes(tmp_path) == hashes(faces)


def decode_badly(folder: Path, images: Path) -> tuple[int, str]:
    """The stage on some images, each of them a piece, with a decoder that ends its process."""
    raw = snapshot(images, folder)
    (folder / "faulty").mkdir()
    (folder / "faulty/sitecustomize.py").write_text(FAULTY_DECODER)
    process = start_stage(folder, raw, processes=None, path=f"{folder / 'faulty'}:")
    _, error = process.communicate()
    return process.returncode, error


@pytest.mark.slow
@pytest.mark.fault("killed processes")
def test_files_that_crash_the_decoder_are_left_out_by_name_and_the_rest_is_kept(
    tmp_path, monkeypatch, record_property
):
    record_property("faults", 2)
    monkeypatch.setattr(download_stage, "ROW_GROUP_BYTES", 8_000)
    images = write_folder(tmp_path / "images", blocks(30))
    for name in ("0003.png", "0021.png"):
        (images / name).write_bytes(encode(Image.new("RGB", (17, 19), "red")) + name.encode())
    code, error = decode_badly(tmp_path, images)
    assert code == 0, error
    reason = "cannot be decoded: the decoder crashes (SIGSEGV)"
    assert quarantine(tmp_path) == {"0003.png": reason, "0021.png": reason}
    assert error.count(" is left out: the decoder crashes at it (SIGSEGV)") == 2
    assert "Traceback" not in error
    assert len(split_of_each_image(tmp_path)) == 28


@pytest.mark.slow
@pytest.mark.fault("killed processes")
def test_a_decoding_process_that_is_killed_names_the_file_and_drops_no_source(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(download_stage, "ROW_GROUP_BYTES", 8_000)
    images = write_folder(tmp_path / "images", blocks(30))
    (images / "0021.png").write_bytes(encode(Image.new("RGB", (17, 23))))
    code, error = decode_badly(tmp_path, images)
    assert code == 1
    assert error.splitlines()[-1] == (
        "error: a decoding process was killed while it decoded 0021.png, perhaps for lack of "
        "memory: lower preprocess.max_pixels or free some, then run the same command again"
    )
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.fault("killed processes")
def test_a_decoding_process_that_is_killed_once_is_no_end(faces, tmp_path):
    process = start_stage(tmp_path, faces / "raw")
    wait_until(lambda: list(tmp_path.glob("runs/preprocess-*/*.at")))
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].kill()
    process.communicate()
    assert process.returncode == 0
    assert hashes(tmp_path) == hashes(faces)


@pytest.mark.slow
@pytest.mark.fault("killed processes")
def test_a_decoder_that_crashes_at_every_file_ends_the_run(tmp_path):
    images = write_folder(tmp_path / "images", blocks(1))
    for number in range(30):
        png = encode(Image.new("RGB", (17, 19), (number, 0, 0)))
        (images / f"crash-{number:02d}.png").write_bytes(png)
    code, error = decode_badly(tmp_path, images)
    assert code == 1
    last = error.splitlines()[-1]
    assert last.startswith("error: the image decoder crashed at 5 files and now at crash-05.png")
    assert "Traceback" not in error


@pytest.mark.fault("damaged files")
def test_finished_parts_are_used_again_and_missing_or_damaged_ones_are_made(faces, tmp_path):
    shards = json.loads((faces / "raw/manifest.json").read_text())["shards"]

    def decode() -> dict[Path, tuple[int, bytes]]:
        made = decode_snapshot(CONFIG, faces / "raw", shards, work=tmp_path, processes=1)
        return {part: (part.stat().st_ino, part.read_bytes()) for part in made}

    before = decode()
    first, second, *others = before
    first.unlink()
    second.write_bytes(b"half a part")
    after = decode()
    assert [after[part][1] for part in after] == [before[part][1] for part in before]
    assert all(after[part][0] == before[part][0] for part in others)


def test_a_failed_run_keeps_its_parts_and_one_under_other_parameters_clears_them(faces, tmp_path):
    with pytest.raises(UserError, match="near duplicates of each other"):
        run(faces / "raw", tmp_path, dataclasses.replace(CONFIG, near_duplicate_distance=255.0))
    failed = parts(tmp_path)
    assert len(failed) == 7
    run(faces / "raw", tmp_path)
    assert hashes(tmp_path) == hashes(faces)
    assert not {*failed} & {*parts(tmp_path)}


def gif(count: int, seed: int) -> bytes:
    """An animation of different frames."""
    frames = [Image.fromarray(frame) for frame in blocks(count, seed=seed)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def files_of(number: int) -> list[bytes]:
    """What may lie under a name: a picture, an animation, no picture, a picture cut off."""
    picture = encode(blocks(1, seed=number)[0])
    return [picture, gif(3, seed=number), b"no picture %d" % number, picture[: len(picture) // 2]]


@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**16), st.sampled_from(["first", "all"]))
def test_what_was_decoded_before_gives_the_bytes_of_a_run_from_nothing(
    tmp_path_factory, monkeypatch, seed, frames
):
    monkeypatch.setattr(download_stage, "ROW_GROUP_ROWS", 7)
    config = dataclasses.replace(CONFIG, frames=frames)
    random = np.random.default_rng(seed)
    source, going_on = (tmp_path_factory.mktemp(name) for name in ("source", "going-on"))
    for turn in range(3):  # each time some files are new, removed, or hold something else
        for name in random.choice(60, 40, replace=False):
            content = files_of(int(random.integers(60)))[random.choice(4, p=[0.7, 0.1, 0.1, 0.1])]
            (source / f"{name:02d}").write_bytes(content)
        for file in random.choice(sorted(source.iterdir()), 5, replace=False):
            file.unlink()
        raw = snapshot(source, tmp_path_factory.mktemp("raw"))
        run(raw, going_on, config)
        if turn:
            anew = tmp_path_factory.mktemp("anew")
            run(raw, anew, config)
            assert hashes(going_on) == hashes(anew)


@pytest.mark.parametrize("processes", [1, 2])
def test_only_new_files_are_decoded(faces, tmp_path, caplog, processes):
    source = write_folder(tmp_path / "source", blocks(40))
    run(snapshot(source, tmp_path), tmp_path)
    (source / "0010.png").unlink()
    (source / "0020a.png").write_bytes(encode(blocks(1, seed=9)[0]))
    (source / "0030.png").rename(source / "9.png")
    with caplog.at_level("INFO"):
        run(snapshot(source, tmp_path), tmp_path, processes=processes)
    assert "decoded 1 files" in caplog.text
    assert "39 files had been decoded before" in caplog.text


def test_parts_of_other_parameters_or_code_are_not_taken(tmp_path, caplog, monkeypatch):
    source = write_folder(tmp_path / "source", blocks(40))
    raw = snapshot(source, tmp_path)
    run(raw, tmp_path)
    (source / "new.png").write_bytes(encode(blocks(1, seed=9)[0]))
    raw = snapshot(source, tmp_path)
    with caplog.at_level("INFO"):
        run(raw, tmp_path, dataclasses.replace(CONFIG, fit="pad"))
    assert "decoded 41 files" in caplog.text
    caplog.clear()
    monkeypatch.setattr(preprocess_stage.PIL, "__version__", "another")
    with caplog.at_level("INFO"):
        run(raw, tmp_path, dataclasses.replace(CONFIG, fit="pad"))
    assert "decoded 41 files" in caplog.text


@pytest.mark.fault("damaged files")
def test_files_of_a_damaged_part_are_decoded_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(download_stage, "ROW_GROUP_ROWS", 10)
    source = write_folder(tmp_path / "source", blocks(40))
    run(snapshot(source, tmp_path), tmp_path)
    pixels, cut_off, missing, _ = parts(tmp_path)
    content = pixels.read_bytes()
    image = pq.read_table(pixels, columns=["image"]).column("image")[3].as_py()
    place = content.index(image)
    pixels.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    cut_off.write_bytes(cut_off.read_bytes()[:1000])
    missing.unlink()
    (source / "new.png").write_bytes(encode(blocks(1, seed=9)[0]))
    raw = snapshot(source, tmp_path)
    run(raw, tmp_path / "anew")
    with caplog.at_level("INFO"):
        run(raw, tmp_path)
    assert "10 files had been decoded before" in caplog.text
    assert hashes(tmp_path) == hashes(tmp_path / "anew")


def test_files_in_another_order_altogether_are_decoded_again_rather_than_looked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(decoded_before, "FREE_ROWS", 20)
    monkeypatch.setattr(decoded_before, "DEAR", 2)
    monkeypatch.setattr(download_stage, "ROW_GROUP_ROWS", 10)
    before = write_folder(tmp_path / "before", blocks(100))
    run(snapshot(before, tmp_path), tmp_path)
    [work] = tmp_path.glob("runs/preprocess-*")
    decoded_before.write_index(work, tmp_path / "index.npy")
    in_order, scattered = (
        decoded_before.DecodedBefore(work, tmp_path / "index.npy", CONFIG) for _ in range(2)
    )
    files = sorted(before.iterdir())
    for file in files:
        assert in_order.find(file.read_bytes())
    for number in range(100):
        scattered.find(files[number * 37 % 100].read_bytes())
    assert in_order.taken == 100
    assert 0 < scattered.taken < 20


@pytest.mark.slow
@pytest.mark.fault("disk full")
def test_a_full_disk_is_one_clear_line_and_leaves_no_half_written_folder(faces, tmp_path):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    process = start_stage(tmp_path, faces / "raw", prologue=limit)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.count("\n") == 1
    assert error.startswith("error: no space left for")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "stage.py"}


@pytest.mark.slow
@pytest.mark.fault("killed processes")
def test_interrupted_by_the_user_it_ends_quietly_without_a_worker_left(faces, tmp_path):
    process = start_stage(tmp_path, faces / "raw")
    wait_until(lambda: parts(tmp_path))
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode in (0, 130)  # 0: it was faster
    assert error == ""
    wait_until(lambda: all(has_ended(worker) for worker in workers))


def test_a_second_run_in_the_same_folder_is_refused(faces, tmp_path):
    (tmp_path / "runs").mkdir()
    with (
        FileLock(tmp_path / "runs/preprocess.lock"),
        pytest.raises(UserError, match="another preprocess run is at work"),
    ):
        run(faces / "raw", tmp_path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.pipelines.test_preprocess import *\n"
        "folder = Path(sys.argv[1])\n"
        "config = dataclasses.replace(CONFIG, rows_per_shard=2048, image_size=32)\n"
        "run(snapshot('manifold', folder, images=int(sys.argv[2])), folder, config)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    peak_bytes = {}
    for count in (15_000, 60_000):
        command = [sys.executable, "-c", script, str(tmp_path / str(count)), str(count)]
        result = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        )
        peak_bytes[count] = int(result.stdout)
    growth_bytes = (peak_bytes[60_000] - peak_bytes[15_000]) / 45_000
    assert growth_bytes < 1536  # an image takes 3072, a thumbnail mapped from its file 768


@pytest.mark.slow
@pytest.mark.skipif(not REAL_FACES.exists(), reason="the real faces are not here")
def test_the_real_faces_lose_only_what_leaks(tmp_path):
    config = dataclasses.replace(CONFIG, image_size=32, rows_per_shard=8192, max_pixels=10**6)
    config = dataclasses.replace(config, rows_per_row_group=1024, validation_fraction=0.05)
    statistics = run(snapshot(REAL_FACES, tmp_path), tmp_path, config, processes=2)
    assert statistics["files"] == 22_950
    assert statistics["kept"] > 22_900
    assert statistics["quarantined_by_reason"].keys() == {
        "near duplicate of an image in another split"
    }
    assert statistics["test"] / statistics["kept"] == pytest.approx(0.2, abs=0.01)
