"""What someone who can write a bucket may put there, and that none of it leaves its folder."""

import json
import os
import re
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aegan.data.dataset import read_manifest
from aegan.training.run_folder import RunFolder
from pipelines.base.errors import UserError
from pipelines.base.outside import UntrustedError, check_names, path_inside
from pipelines.bucket import run_store, shard_store, storage
from pipelines.bucket.run_store import RunStore, is_asked_to_stop, shown_progress
from tests.s3 import s3_server
from tests.tiny import tiny_shards

pytestmark = pytest.mark.integration
PARTS = st.sampled_from(["", ".", "..", "...", "a", "link", "loop", "a.png", "~", "\0", "\ud800"])
NAMES = st.one_of(
    st.lists(PARTS | st.text(max_size=5), max_size=6).map("/".join),
    st.text(string.printable, max_size=300),
    st.none() | st.integers() | st.lists(st.text(), max_size=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links out of it and in a circle."""
    folder = tmp_path_factory.mktemp("outer") / "folder"
    folder.mkdir()
    (folder / "link").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "etc").symlink_to("/etc")
    return folder


@pytest.mark.fault("names from outside")
@settings(deadline=None)
@given(name=NAMES)
@example(name="../x")
@example(name="/etc/passwd")
@example(name="a/../../x")
@example(name="link/x")
@example(name="etc/passwd")
@example(name="a" * 256)
@example(name="")
def test_a_name_from_outside_is_refused_or_stays_inside_its_folder(folder, name):
    try:
        path = path_inside(folder, name, origin="the manifest")
    except UntrustedError:
        return
    inside = Path(os.path.realpath(path)).relative_to(folder.resolve())
    assert inside.parts
    assert str(inside) == name or (folder / name).is_symlink()
    assert name not in ("..", ".", "")


@pytest.mark.fault("names from outside")
def test_a_plain_name_is_taken_also_in_a_folder_that_is_a_link(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    for name in ("a.png", "a/b c.png", "..a", "a..", "~", "\u202e.png", "a\nb"):
        assert path_inside(tmp_path / "linked", name, origin="x") == tmp_path / "linked" / name
    with pytest.raises(UntrustedError, match=r"^x names b.png, which is none of its files"):
        path_inside(folder, "b.png", origin="x", pattern=re.compile("a+[.]png"))


@pytest.mark.fault("names from outside")
@pytest.mark.parametrize("names", [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"], ["a", None], [".."]])
def test_a_list_of_names_that_one_folder_cannot_hold_is_refused(names):
    with pytest.raises(UntrustedError):
        check_names(names, origin="the list")
    check_names(["a", "ab", "b/a", "b/ab"], origin="the list")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


class Bucket:
    """What an attacker can do: write objects, under any key."""

    def __init__(self, name: str) -> None:
        self.name, self.url = name, f"s3://{name}"
        self._client = boto3.client("s3", region_name="us-east-1")
        self._client.create_bucket(Bucket=name)

    def write(self, key: str, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._client.put_object(Bucket=self.name, Key=key, Body=body)

    def keys(self) -> set[str]:
        found = self._client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return {item["Key"] for item in found}


@pytest.fixture
def bucket(endpoint, monkeypatch, request) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    storage._client.cache_clear()
    yield Bucket(f"test-{abs(hash(request.node.nodeid)):x}")
    storage._client.cache_clear()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's disk; the folder above it is not its business."""
    folder = tmp_path / "disk" / "node"
    folder.mkdir(parents=True)
    monkeypatch.setattr(shard_store, "node_folder", lambda: folder)
    return folder


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fault("names from outside")
def test_the_manifest_in_a_bucket_names_no_file_of_a_node(
    bucket, node, shards, tmp_path, record_property
):
    manifest = read_manifest(shards)
    shard_store.send_shards(shards, bucket.url)
    place = f"data/{manifest['dataset_sha256']}"
    names = ["../../../escaped.txt", str(tmp_path / "escaped.txt"), "a/../../../../escaped.txt", ""]
    record_property("faults", len(names))
    bucket.write("escaped.txt", b"evil")
    for name in names:
        bucket.write(f"{place}/{name}", b"evil")
        hostile = json.loads(json.dumps(manifest))
        hostile["splits"]["train"]["shards"][0]["file"] = name
        bucket.write(f"{place}/manifest.json", hostile)
        folder = shard_store.fetch_shards(bucket.url, manifest)
        assert read_manifest(folder) == manifest
    assert not {name for name in files_below(tmp_path) if "escaped" in name}
    assert {path.parent for path in node.rglob("*.parquet")} == {folder}


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(values)


def repeat(manifest: dict[str, Any]) -> None:
    manifest["splits"]["train"]["shards"] *= 2


@pytest.mark.fault("names from outside")
@pytest.mark.parametrize(
    "damage",
    [
        change(file="../../secret.txt"),
        change(file="/etc/passwd"),
        change(file="train-00000.parquet/../../x"),
        change(file="secret.parquet"),
        change(file=7),
        change(sha256="0" * 64),
        change(sha256="../x"),
        change(bytes="1"),
        change(bytes=True),
        repeat,
        lambda manifest: manifest.update(dataset_sha256="../../x"),
        lambda manifest: manifest.update(splits=[1]),
        lambda manifest: manifest.update(splits={"train": {"shards": [[]]}}),
        lambda manifest: manifest.pop("splits"),
    ],
)
def test_a_manifest_that_came_from_a_bucket_uploads_no_file_of_this_machine(
    bucket, node, shards, tmp_path, damage
):
    (tmp_path / "shards").mkdir()
    for file in shards.iterdir():
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "shards/secret.parquet").write_text("secret")
    manifest = read_manifest(shards)
    damage(manifest)
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UntrustedError):
        shard_store.send_shards(tmp_path / "shards", bucket.url)
    with pytest.raises(UntrustedError):
        shard_store.fetch_shards(bucket.url, manifest)
    assert bucket.keys() == set()
    assert files_below(node) == set()


@pytest.mark.fault("bucket")
def test_a_shard_in_a_bucket_that_is_larger_than_stated_does_not_fill_the_disk(
    bucket, node, shards, monkeypatch
):
    manifest = read_manifest(shards)
    shard_store.send_shards(shards, bucket.url)
    most = 0
    plain = storage._check_size

    def watch(url: str, size: int, most_bytes: int) -> None:
        nonlocal most
        most = max(most, size)
        plain(url, size, most_bytes)

    monkeypatch.setattr(storage, "_check_size", watch)
    bucket.write(f"data/{manifest['dataset_sha256']}/train-00000.parquet", bytes(50 * 2**20))
    with pytest.raises(UserError, match=r"train-00000.parquet is damaged: delete everything"):
        shard_store.fetch_shards(bucket.url, manifest)
    assert most < 25 * 2**20  # parts that were on their way, not the whole
    assert not list(node.rglob("*.parquet*"))


@pytest.mark.fault("bucket")
def test_shards_that_a_node_has_lost_or_cut_short_are_fetched_again(bucket, node, shards):
    manifest = read_manifest(shards)
    shard_store.send_shards(shards, bucket.url)
    whole = {file.name: file.read_bytes() for file in shards.glob("*.parquet")}
    for damage in (lambda file: file.write_bytes(b""), lambda file: file.unlink()):
        damage(shard_store.fetch_shards(bucket.url, manifest) / "train-00000.parquet")
        folder = shard_store.fetch_shards(bucket.url, manifest)
        assert {file.name: file.read_bytes() for file in folder.glob("*.parquet")} == whole


@pytest.mark.fault("other users")
def test_a_nodes_folder_that_is_a_link_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_store.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / f"aegan-{os.getuid()}").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="belongs to another user: set TMPDIR"):
        shard_store.node_folder()
    (tmp_path / f"aegan-{os.getuid()}").unlink()
    (tmp_path / f"aegan-{os.getuid()}").mkdir(mode=0o777)
    assert shard_store.node_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.fault("names from outside")
def test_no_object_of_a_run_in_a_bucket_leads_out_of_the_runs_folder(
    bucket, tmp_path, record_property, caplog
):
    names = [
        "samples/../../../escaped.png",
        "samples//escaped.png",
        "samples/../run.json/escaped.png",
        "samples/",
        "samples/.bashrc",
        "../escaped.png",
        "checkpoints/step-00000001/../../../../escaped.png",
        "checkpoints/step-x/state.json",
        "checkpoints/step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661/state.json",
        "checkpoints/step-999999999999/state.json",
    ]
    record_property("faults", len(names))
    for name in names:
        bucket.write(f"runs/x/{name}", b"evil")
    bucket.write("runs/x/samples/step-00000001-samples.png", b"picture")
    store = RunStore(f"{bucket.url}/runs/x")
    store.refresh()
    run_folder = tmp_path / "a" / "b" / "run"
    run_folder.mkdir(parents=True)
    store.fetch(RunFolder(run_folder))
    assert files_below(tmp_path) == {"a/b/run/samples/step-00000001-samples.png"}
    assert "holds what no run writes, left alone: " in caplog.text
    assert store.steps() == []


@pytest.mark.fault("names from outside")
def test_pictures_of_a_run_in_a_bucket_follow_no_link_out_of_its_folder(bucket, tmp_path):
    bucket.write("runs/x/samples/step-00000001-samples.png", b"evil")
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").symlink_to(tmp_path / "outside")
    store = RunStore(f"{bucket.url}/runs/x")
    store.refresh()
    with pytest.raises(UntrustedError, match="which leads out of"):
        store.fetch(RunFolder(tmp_path / "run"))
    assert files_below(tmp_path / "outside") == set()


STATES: list[Any] = [
    {},
    {"sha256": "0" * 64},
    {"sha256": "../../../../escaped", "log": {"rows": [], "ending": None}},
    {"sha256": "0" * 64, "log": {"rows": [{"step": "1"}], "ending": None}},
    {"sha256": "0" * 64, "log": {"rows": [], "ending": None}, "step": 2},
    {"sha256": "0" * 64, "log": [], "step": 1},
    [],
]


@pytest.mark.fault("bucket")
@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_in_a_bucket_whose_hash_is_right_and_words_are_wrong_is_left_out(
    bucket, tmp_path, state, caplog
):
    if isinstance(state, dict):
        state = {"step": 1, **state}
        state = {**state, "state_sha256": run_store.checkpoint._sha256_of_state(state)}
    bucket.write("runs/x/checkpoints/step-00000001/state.json", state)
    bucket.write(f"runs/x/checkpoints/step-00000001/{'0' * 64}.safetensors", b"tensors")
    store = RunStore(f"{bucket.url}/runs/x")
    store.refresh()
    store.fetch(RunFolder(tmp_path))
    assert files_below(tmp_path) == set()
    assert "checkpoint 1 in" in caplog.text
    assert store.steps() == []


WORDS: list[Any] = [
    [],
    {},
    {"step": "1"},
    {"step": 1},
    {"step": 1, "images_per_second": "fast", "seconds": 1.0},
    {"driver": 1, "stop": 1, "host": "\033[2J"},
    {"driver": "driver"},
    {"driver": "driver", "finished": "yes"},
    {"driver": "driver", "error": ["x"]},
]


@pytest.mark.fault("bucket")
def test_whatever_a_bucket_says_of_progress_and_outcome_the_driver_goes_on(
    bucket, tmp_path, monkeypatch, record_property
):
    monkeypatch.setattr(run_store, "POLL_SECONDS", 0.02)
    record_property("faults", len(WORDS))
    store = RunStore(f"{bucket.url}/runs/x")
    row = {"step": 3, "images_per_second": 1.0, "seconds": 1.0}
    with shown_progress(store, RunFolder(tmp_path / "run"), "driver"):
        for words in WORDS:
            for name in ("progress.json", "outcome.json", "driver.json"):
                bucket.write(f"runs/x/{name}", words)
            if not isinstance(words, dict) or words.get("driver") != "driver":
                with pytest.raises(UserError, match="another training of"):
                    is_asked_to_stop(store, "driver")
            else:
                assert not is_asked_to_stop(store, "driver")
        bucket.write("runs/x/progress.json", row)
        wait_for(tmp_path / "run/metrics.jsonl")
        assert not (tmp_path / "run/outcome.json").exists()
        outcome = {"driver": "driver", "finished": True, "step": 3}
        bucket.write("runs/x/outcome.json", outcome)
        wait_for(tmp_path / "run/outcome.json")
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == row
    assert json.loads((tmp_path / "run/outcome.json").read_text()) == outcome


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault("bucket")
def test_an_object_in_a_bucket_that_is_read_whole_has_a_bound(bucket, monkeypatch):
    monkeypatch.setattr(storage, "MAX_READ_BYTES", 100)
    bucket.write("runs/x/driver.json", bytes(101))
    with pytest.raises(UserError, match=r"driver.json has more than the 100 bytes it may have"):
        RunStore(f"{bucket.url}/runs/x").read("driver.json")
