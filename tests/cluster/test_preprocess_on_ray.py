"""Images that stay in their bucket: decoded through Ray Data, with the bytes of the local path."""

import csv
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from ruamel.yaml import YAML

from aegan.config import DataConfig
from pipelines import download as download_stage
from pipelines.download import download
from tests.cluster.conftest import reach
from tests.cluster.nodes import RayCluster, two_nodes
from tests.faulty_decoder import FAULTY_DECODER
from tests.pictures import blocks, encode
from tests.project import ROOT, finish, start

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("proxy"),
]
PREPROCESS = {
    "image_size": 16,
    "max_pixels": 10_000,
    "validation_fraction": 0.2,
    "test_fraction": 0.2,
    "rows_per_shard": 16,
    "rows_per_row_group": 8,
}


def client(s3: str) -> Any:
    return boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=s3,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )


def put_images(s3: str, bucket: str) -> str:
    """s3://bucket/faces with 60 sound images of several sizes and formats, and some others."""
    files = {f"{row:04d}.png": encode(image) for row, image in enumerate(blocks(40))}
    files |= {
        f"large/{row:04d}.jpg": encode(image[:48, :36], "JPEG")
        for row, image in enumerate(blocks(20, seed=1, size=64))
    }
    files |= {
        "copy-of-0005.png": files["0005.png"],
        "0007-other-format.bmp": encode(blocks(40)[7], "BMP"),
        "broken.jpg": files["large/0000.jpg"][:300],
        "copy-of-broken.jpg": files["large/0000.jpg"][:300],
        "text.png": b"no image",
        ".hidden.png": files["0000.png"],
    }
    for name, content in files.items():
        client(s3).put_object(Bucket=bucket, Key=f"faces/{name}", Body=content)
    return f"s3://{bucket}/faces"


@pytest.fixture(scope="module")
def images(s3: str) -> str:
    """Those that no test changes."""
    client(s3).create_bucket(Bucket="images-in-place")
    return put_images(s3, "images-in-place")


def snapshot(project: Path, source: str, *, in_place: bool) -> Path:
    """A project folder whose download stage has ended: pieces of eight files."""
    parameters = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    parameters["preprocess"] |= PREPROCESS
    project.mkdir()
    with (project / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(parameters, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_stage, "LISTED_ROWS", 8)
        config = parameters["data"] | {"source": source, "in_place": in_place}
        download(DataConfig(**config), project / "artifacts/raw")
    return project


def without_progress(output: str) -> str:
    """What a slow machine prints now and then is left out."""
    return re.sub(r"^(decoding|writing): .*\n", "", output, flags=re.MULTILINE)


def shards(project: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in (project / "artifacts/shards").glob("*.parquet")
    }


def quarantine(project: Path) -> dict[str, str]:
    with (project / "artifacts/preprocess/quarantine.csv").open(encoding="utf-8") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def statistics(project: Path) -> dict:
    return json.loads((project / "artifacts/preprocess/statistics.json").read_text())


@pytest.fixture(scope="module")
def stored(images: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project whose snapshot holds the files, preprocessed on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        reach(patch, s3)
        project = snapshot(tmp_path_factory.mktemp("local") / "stored", images, in_place=False)
        finish(start(project, "preprocess"))
    return project


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """The tests that use it are the last ones: no other Ray runs beside it."""
    with two_nodes() as cluster:
        yield cluster


def assert_same_dataset(in_place: Path, stored: Path) -> None:
    """All is equal but what is said of byte-identical files, which a listing does not know."""
    assert len(shards(stored)) > 3
    assert shards(in_place) == shards(stored)
    contact_sheet = "artifacts/preprocess/contact_sheet.png"
    assert (in_place / contact_sheet).read_bytes() == (stored / contact_sheet).read_bytes()

    reasons, expected_reasons = quarantine(in_place), quarantine(stored)
    assert expected_reasons["copy-of-0005.png"] == "identical file: 0005.png"
    assert expected_reasons["copy-of-broken.jpg"] == "identical file: broken.jpg"
    assert reasons == expected_reasons | {
        "copy-of-0005.png": "duplicate: 0005.png",
        "copy-of-broken.jpg": expected_reasons["broken.jpg"],
    }
    counts, expected_counts = statistics(in_place), statistics(stored)
    assert counts.pop("quarantined_by_reason") != expected_counts.pop("quarantined_by_reason")
    assert counts.pop("bytes") > expected_counts.pop("bytes")
    assert counts == expected_counts
    manifest, expected_manifest = (
        json.loads((project / "artifacts/shards/manifest.json").read_text())
        for project in (in_place, stored)
    )
    assert manifest.pop("source_sha256") != expected_manifest.pop("source_sha256")
    assert manifest == expected_manifest


def test_images_left_in_place_give_the_bytes_of_the_local_path(images, stored, tmp_path):
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    output = finish(start(project, "preprocess"))
    assert_same_dataset(project, stored)
    decoded, kept, left_out, *others = without_progress(output).splitlines()
    assert decoded.startswith("decoded 65 files")
    assert kept.startswith("kept 60 of 66 files: ")
    assert left_out.endswith("quarantine.csv")
    assert all(line.startswith("warning: ") for line in others)  # and nothing of Ray's own


@pytest.mark.parametrize("change", ["written anew", "deleted"])
def test_an_object_changed_since_the_listing_is_one_clear_error(bucket, s3, tmp_path, change):
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": "faces/0033.png"}
    images = put_images(s3, place["Bucket"])
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    if change == "deleted":
        client(s3).delete_object(**place)
    else:
        client(s3).put_object(**place, Body=encode(blocks(1, seed=5)[0]))
    assert without_progress(finish(start(project, "preprocess"), expected=1)) == (
        f"error: {images}/0033.png is not the object that was listed: run `make refresh`\n"
    )
    assert not (project / "artifacts/shards").exists()


def test_killed_in_the_middle_it_goes_on_with_the_parts_it_has(images, stored, proxy, tmp_path):
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    proxy.fault = lambda method, path: 5.0 if path.endswith("large/0019.jpg") else None
    driver = start(project, "preprocess")
    while not (parts := list(project.glob("runs/preprocess-*/part-*.parquet"))):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    finished = {part.name for part in project.glob("runs/preprocess-*/part-*.parquet")}
    assert 0 < len(parts) <= len(finished) < 9
    proxy.fault = lambda method, path: None
    output = without_progress(finish(start(project, "preprocess")))
    assert_same_dataset(project, stored)
    missing = 9 - len(finished)
    assert 8 * (missing - 1) < int(output.split()[1]) <= 8 * missing


def test_a_bucket_that_answers_with_errors_for_a_while_is_asked_again(
    images, stored, proxy, tmp_path
):
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    proxy.fault = lambda method, path: 503 if proxy.refused < 30 and "/large/" in path else None
    finish(start(project, "preprocess"))
    assert proxy.refused == 30
    assert_same_dataset(project, stored)


def test_a_task_that_a_file_crashes_ends_the_run_in_one_line_with_the_cure(bucket, s3, tmp_path):
    for row, image in enumerate([*blocks(10), np.zeros((19, 17, 3), np.uint8)]):
        name, content = f"faces/{row:04d}.png", encode(image)
        client(s3).put_object(Bucket=bucket.removeprefix("s3://"), Key=name, Body=content)
    project = snapshot(tmp_path / "in-place", f"{bucket}/faces", in_place=True)
    (tmp_path / "sitecustomize.py").write_text(FAULTY_DECODER)
    output = finish(start(project, "preprocess", PYTHONPATH=f"{tmp_path}:{ROOT}"), expected=1)
    assert "Traceback" not in output
    [error] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: decoding on the cluster ended (")
    assert "-S data.in_place=false decodes on this machine and names it" in error


def test_interrupted_by_the_user_it_ends_quietly(images, proxy, tmp_path):
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    proxy.fault = lambda method, path: 2.0 if "/large/" in path else None
    driver = start(project, "preprocess")
    while not list(project.glob("runs/preprocess-*/part-*.parquet")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    driver.send_signal(signal.SIGINT)
    assert without_progress(finish(driver, expected=130)) == ""


def test_nodes_that_know_nothing_of_our_code_give_them_too(cluster, images, stored, tmp_path):
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    finish(start(project, "preprocess", **cluster.environment))
    assert_same_dataset(project, stored)


def test_the_tasks_of_a_lost_node_run_again_on_another(cluster, images, stored, proxy, tmp_path):
    project = snapshot(tmp_path / "in-place", images, in_place=True)
    proxy.fault = lambda method, path: 1.0 if "/large/" in path else None
    driver = start(project, "preprocess", **cluster.environment)
    while not proxy.delayed:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    cluster.nodes.pop(0).lose()
    try:
        finish(driver)
    finally:
        cluster.add_node()
    assert_same_dataset(project, stored)
