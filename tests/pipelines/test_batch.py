"""`aegan encode` and `aegan reconstruct` of many files; docs/batch.md."""

import csv
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import aegan
from pipelines.base.errors import UserError
from pipelines.bucket import storage
from pipelines.ingest.entries import RawFile
from pipelines.serving import batch, decoding, served
from tests.disks import largest_file
from tests.faulty_decoder import FAULTY_DECODER
from tests.s3 import s3_server
from tests.trained import ROOT, write_model

COUNT = 70  # more than one pass

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def loaded(model: Path) -> served.Served:
    return served.load(str(model))


def png(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, count: int = COUNT) -> Path:
    """Pictures in two folders, two of them equal, one damaged and one that is no image."""
    for number in range(count):
        file = folder / ("a", "b")[number % 2] / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(max(1, number)))
    (folder / "damaged.png").write_bytes(png(5)[:-300])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "faces")


def rows(out: Path) -> dict[str, Any]:
    """Latent, or reason, of each file of the parts."""
    table = pq.read_table(out / "latents").to_pylist()
    found = {row["source"]: row["latent"] or row["reason"] for row in table}
    assert len(found) == len(table)
    return found


def check_latents(out: Path, pictures: Path, loaded: served.Served) -> None:
    found = rows(out)
    names = sorted(str(file.relative_to(pictures)) for file in pictures.glob("*/*.png"))
    images = aegan.read_images([pictures / name for name in names], loaded.model)
    latents = torch.tensor([found[name] for name in names])
    expected = aegan.encode(loaded.model, images)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() - {*names} == {"damaged.png", "notes.txt"}


def test_a_folder_becomes_latents_by_file_name_and_bad_files_are_listed(
    pictures: Path, loaded: served.Served, tmp_path: Path
) -> None:
    batch.run("encode", str(pictures), tmp_path / "out", loaded)
    check_latents(tmp_path / "out", pictures, loaded)
    with (tmp_path / "out/quarantine.csv").open() as file:
        listed = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert listed["notes.txt"] == "not an image: text"
    assert "ends too early" in listed["damaged.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("batch.json", "latents", "quarantine.csv", ".lock"),
    }


def test_reconstructions_lie_under_the_names_of_their_files(
    pictures: Path, loaded: served.Served, tmp_path: Path
) -> None:
    batch.run("reconstruct", str(pictures), tmp_path / "out", loaded)
    drawn = sorted((tmp_path / "out/pictures").glob("**/*.png"))
    assert len(drawn) == COUNT
    images = aegan.read_images([pictures / "b/0007.png"], loaded.model)
    found = np.asarray(Image.open(tmp_path / "out/pictures/b/0007.png.png"))
    expected = aegan.reconstruct(loaded.model, images)[0].numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1
    check_latents(tmp_path / "out", pictures, loaded)


def test_names_in_an_archive_never_lead_out_of_the_folder(
    loaded: served.Served, tmp_path: Path
) -> None:
    archive = tmp_path / "faces.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("../../up.png", "/absolute.png", "fine.png", "fine.png.png/below.png"):
            packed.writestr(name, png(1))
    batch.run("reconstruct", str(archive), tmp_path / "below/out", loaded)
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    assert "below/out/pictures/fine.png.png" in files
    assert all(name.startswith("below/out/pictures/") for name in files)
    assert rows(tmp_path / "below/out")["../../up.png"].startswith("name: ")
    assert not Path("/absolute.png.png").exists()


def test_a_picture_of_a_long_name_is_drawn_and_one_of_too_long_a_name_listed(
    loaded: served.Served, tmp_path: Path
) -> None:
    names = [letter + "é" * 123 + ending for letter, ending in (("a", ".png"), ("b", ".jpeg"))]
    path = f"{'deep/' * 900}c.png"  # longer than the system allows
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for name in (*names, path):  # names of 251 and 252 bytes
            archive.writestr(name, png(1))
    batch.run("reconstruct", str(tmp_path / "faces.zip"), tmp_path / "out", loaded)
    found = rows(tmp_path / "out")
    assert [len(found[names[0]]), found[names[1]], found[path]] == [8, batch.NO_NAME, batch.NO_NAME]
    assert [file.name for file in (tmp_path / "out/pictures").glob("*.*")] == [f"{names[0]}.png"]


def test_the_same_call_again_does_the_rest(
    pictures: Path, loaded: served.Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PART_BATCHES", 1)
    out = tmp_path / "out"
    write = batch._write_part

    def cut_off(out: Path, number: int, part: list[batch.Row]) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(out, number, part)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_write_part", cut_off)
        with pytest.raises(KeyboardInterrupt):
            batch.run("encode", str(pictures), out, loaded)
    [first] = (out / "latents").iterdir()
    written = first.stat().st_mtime_ns
    batch.run("encode", str(pictures), out, loaded)
    check_latents(out, pictures, loaded)
    assert first.stat().st_mtime_ns == written
    batch.run("encode", str(pictures), out, loaded)  # and then there is nothing to do
    check_latents(out, pictures, loaded)


def test_results_of_another_model_source_or_operation_are_not_mixed(
    pictures: Path, loaded: served.Served, tmp_path: Path
) -> None:
    batch.run("encode", str(pictures / "damaged.png"), tmp_path / "out", loaded)
    other = served.load(str(write_model(tmp_path / "other", seed=1)))
    for operation, source, model, differing in (
        ("encode", "damaged.png", other, "model"),
        ("encode", "notes.txt", loaded, "source"),
        ("reconstruct", "damaged.png", loaded, "operation"),
    ):
        with pytest.raises(UserError, match=f"results of another {differing}"):
            batch.run(operation, str(pictures / source), tmp_path / "out", model)  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    with pytest.raises(UserError, match="holds other files"):
        batch.run("encode", str(pictures), tmp_path / "mine", loaded)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["precious"]


@pytest.mark.fault("files")
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(
    pictures: Path, loaded: served.Served, tmp_path: Path
) -> None:
    with largest_file(2000), pytest.raises(UserError, match="no space left for"):
        batch.run("encode", str(pictures), tmp_path / "out", loaded)
    assert list((tmp_path / "out/latents").iterdir()) == []
    batch.run("encode", str(pictures), tmp_path / "out", loaded)
    check_latents(tmp_path / "out", pictures, loaded)


@pytest.fixture
def _faulty_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTY_DECODER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("_faulty_decoder")
@pytest.mark.fault("files")
def test_a_file_that_crashes_the_decoder_is_left_out_by_name(
    loaded: served.Served, tmp_path: Path
) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number, (19, 17) if number == 2 else (9, 9)))
    batch.run("encode", str(folder), tmp_path / "out", loaded)
    found = rows(tmp_path / "out")
    assert found["2.png"] == "cannot be decoded: the decoder crashes"
    assert [len(found[f"{number}.png"]) for number in (0, 1, 3)] == [8, 8, 8]


@pytest.mark.usefixtures("_faulty_decoder")
@pytest.mark.fault("files")
def test_files_that_come_after_a_decoder_s_crash_are_decoded(
    loaded: served.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "GROUP_FILES", 1)

    def files() -> Iterator[RawFile]:
        yield RawFile("bad.png", png(0, (19, 17)))
        while multiprocessing.active_children():  # until the crash has ended the process
            time.sleep(0.01)
        time.sleep(0.2)  # and the pool has seen it
        yield from (RawFile(f"{number}.png", png(number)) for number in range(2))

    with decoding.Decoder(loaded.model.form, processes=1) as decoder:
        found = dict(decoder.decode(files()))
    assert found.pop("bad.png") == decoding.CRASHED
    assert [image.shape for image in found.values()] == [(16, 16, 3)] * 2  # type: ignore[union-attr]


def test_a_source_without_files_leaves_the_place_free_for_another(
    pictures: Path, loaded: served.Served, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("empty", "nowhere"):
        with pytest.raises(UserError, match=r"no files in|not found"):
            batch.run("encode", str(tmp_path / source), tmp_path / "out", loaded)
    batch.run("encode", str(pictures / "a"), tmp_path / "out", loaded)
    assert len(rows(tmp_path / "out")) == COUNT // 2


def test_a_model_without_encoder_is_refused(tmp_path: Path, pictures: Path) -> None:
    gan = served.load(str(write_model(tmp_path / "gan", encoder=False)))
    with pytest.raises(UserError, match=r"has no encoder .* cannot take pictures"):
        batch.run("encode", str(pictures), tmp_path / "out", gan)
    assert not (tmp_path / "out").exists()


def test_a_gray_model_draws_gray_pictures(tmp_path: Path, pictures: Path) -> None:
    gray = served.load(str(write_model(tmp_path / "gray", channels=1)))
    batch.run("reconstruct", str(pictures / "a/0000.png"), tmp_path / "out", gray)
    assert Image.open(tmp_path / "out/pictures/0000.png.png").mode == "L"


@pytest.fixture(scope="module")
def bucket(pictures: Path) -> Iterator[str]:
    """The same pictures as objects."""
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage._client.cache_clear()
        storage._client().create_bucket(Bucket="batch")
        for file in pictures.rglob("*.*"):
            storage.upload_object(file, f"s3://batch/faces/{file.relative_to(pictures)}")
        yield "s3://batch/faces"
    storage._client.cache_clear()


def test_a_bucket_s_prefix_is_a_source_like_a_folder(
    bucket: str, pictures: Path, loaded: served.Served, tmp_path: Path
) -> None:
    batch.run("encode", bucket, tmp_path / "out", loaded)
    check_latents(tmp_path / "out", pictures, loaded)
    batch.run("encode", f"{bucket}/a/0000.png", tmp_path / "one", loaded)
    one, same = rows(tmp_path / "one")["0000.png"], rows(tmp_path / "out")["a/0000.png"]
    assert one == pytest.approx(same, abs=1e-5)


def test_one_image_is_answered_in_the_terminal_or_as_one_picture(
    pictures: Path, model: Path, tmp_path: Path
) -> None:
    image = str(pictures / "a/0002.png")
    answer = batch.main("encode", image, "", str(model))
    assert answer["source"] == image
    assert len(answer["latent"]) == 8
    batch.main("reconstruct", image, str(tmp_path / "again.png"), str(model))
    assert Image.open(tmp_path / "again.png").size == (16, 16)


def test_the_user_s_own_picture_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    photo, other = tmp_path / "photo.png", tmp_path / "other.png"
    photo.write_bytes(png(1))
    other.symlink_to(photo)
    for out in (photo, other):
        with pytest.raises(UserError, match=r"one of the pictures given: choose another name"):
            batch.main("reconstruct", str(photo), str(out), str(model))
    assert photo.read_bytes() == png(1)


def test_results_within_the_source_are_refused(
    loaded: served.Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    for out in ("redrawn", ".", str(tmp_path / "below/redrawn")):
        with pytest.raises(UserError, match=r"lies in the source, \., .*name a folder outside it"):
            batch.run("reconstruct", ".", Path(out), loaded)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "{pictures}"), "--out is missing: name a folder"),
        (("encode", "nowhere", "--out", "out"), "nowhere not found: expected a folder"),
        (("encode", "{pictures}/notes.txt"), "notes.txt: not an image: text"),
        (("reconstruct", "{pictures}/a/0000.png"), "--out is missing"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    pictures: Path, model: Path, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    filled = [part.format(pictures=pictures) for part in arguments]
    operation, source, *rest = filled
    with pytest.raises(UserError, match=message):
        batch.main(operation, source, str(tmp_path / rest[1]) if rest else "", str(model))  # type: ignore[arg-type]


@pytest.mark.fault("processes")
def test_ctrl_c_ends_it_and_the_same_command_goes_on(
    model: Path, loaded: served.Served, tmp_path: Path
) -> None:
    pictures = write_pictures(tmp_path / "many", 400)
    start = "from pipelines.serving import batch\nbatch.PART_BATCHES = 1\n"
    start += "from pipelines import cli\ncli.main()"
    arguments = [sys.executable, "-c", start, "encode", str(pictures), "--model", str(model)]
    arguments += ["--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 300
    while not list(tmp_path.glob("out/latents/part-*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in process.communicate()[1]
    assert len(rows(tmp_path / "out")) < 402
    again = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "files are done already" in again.stderr
    check_latents(tmp_path / "out", pictures, loaded)
