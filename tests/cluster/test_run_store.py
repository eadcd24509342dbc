"""A run in a bucket that fails in every way, without Ray: the training loop and its uploader."""

import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

from aegan.config import ComputeConfig, TrainConfig
from aegan.data.dataset import read_manifest
from aegan.training import checkpoint, loop, training_log
from aegan.training.loop import Outcome, train
from aegan.training.run_folder import RunFolder, step_name
from pipelines import train as driver
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.bucket import run_store, shard_store, storage
from pipelines.bucket.finished_run import publish
from pipelines.bucket.run_store import RunStore, Uploader, take_over
from tests.tiny import PARAMS, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

CONFIG = tiny_config(checkpoint_interval_steps=2, sample_interval_steps=4)
WRITES = ("PUT", "POST", "DELETE")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STOP_INTERVAL_STEPS", 1)
    monkeypatch.setattr(run_store, "POLL_SECONDS", 0.05)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(CONFIG, shards=shards, run_folder=folder, device=torch.device("cpu"))
    torch.set_num_threads(before)
    return folder


def work(url: str, folder: Path, shards: Path, **keywords: Any) -> Outcome:
    """What a worker does on a machine whose disk is `folder`: resume, train, upload.

    `also` is called after each checkpoint with its number, from 1.
    """
    store = RunStore(url)
    driver = keywords.pop("driver", None) or take_over(store)
    folder.mkdir(exist_ok=True)
    store.exchange(RunFolder(folder))
    uploader = Uploader(store, RunFolder(folder), driver)
    also, numbers = keywords.pop("also", lambda number: None), itertools.count(1)
    config = keywords.pop("config", CONFIG)

    def report(metrics: dict[str, float]) -> None:
        uploader.checkpoint_saved()
        also(next(numbers))

    stop_at = keywords.pop("stop_at", None)

    def should_stop() -> bool:
        reached = stop_at is not None and checkpoint.steps(folder / "checkpoints")[-1] >= stop_at
        return reached or uploader.should_stop()

    try:
        return train(
            config,
            shards=shards,
            run_folder=folder,
            device=torch.device("cpu"),
            report=report,
            should_stop=should_stop,
        )
    finally:
        uploader.close()


def rows(folder: Path) -> list[dict[str, float]]:
    """The log in the newest checkpoint, without what depends on the time of day."""
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    times = ("time", "seconds", "images_per_second")
    return [
        {key: row[key] for key in row if key not in times}
        for row in training_log.all_rows(checkpoint.read_state(newest)["log"])
    ]


def assert_same_run(first: Path, second: Path) -> None:
    folders = first / "checkpoints", second / "checkpoints"
    for step in checkpoint.steps(folders[1]):
        tensors = [checkpoint.load(folder / step_name(step))[0] for folder in folders]
        assert [
            key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])
        ] == []
    assert rows(first) == rows(second)
    pictures = [
        {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
        for folder in (first, second)
    ]
    assert pictures[0] == pictures[1]


def fetched(url: str, folder: Path) -> Path:
    store = RunStore(url)
    store.refresh()
    folder.mkdir()
    store.fetch(RunFolder(folder))
    return folder


@pytest.mark.fault("killed processes")
def test_a_run_that_moves_to_another_machine_ends_as_one_that_stayed(
    bucket, shards, tmp_path, undisturbed
):
    url = f"{bucket}/runs/x"
    assert not work(url, tmp_path / "a", shards, stop_at=4).finished
    assert work(url, tmp_path / "b", shards).finished
    assert_same_run(tmp_path / "b", undisturbed)
    assert_same_run(fetched(url, tmp_path / "c"), undisturbed)


@pytest.mark.fault("killed processes")
def test_whenever_a_worker_dies_no_half_checkpoint_is_taken_and_the_run_ends_the_same(
    monkeypatch, proxy, bucket, shards, tmp_path
):
    """After each single write of a run, the machine falls silent; another one goes on."""
    monkeypatch.setattr(run_store, "POLL_SECONDS", 60.0)  # else progress is written now and then
    config = tiny_config(num_steps=4, checkpoint_interval_steps=2)
    work(f"{bucket}/whole", tmp_path / "whole", shards, config=config)
    writes = sum(method in WRITES for method, _ in proxy.requests)
    resumed_at = set()
    for last in range(4, writes):
        url, left = f"{bucket}/{last}", iter(range(last))

        def die(method: str, path: str, left: Any = left) -> int | None:
            return 403 if method in WRITES and next(left, None) is None else None

        proxy.fault = die
        with pytest.raises(UserError):
            work(url, tmp_path / f"{last}-a", shards, config=config)
        proxy.fault = lambda method, path: None
        store = RunStore(url)
        store.refresh()
        found = fetched(url, tmp_path / f"{last}-seen")
        assert checkpoint.steps(found / "checkpoints") == store.steps()  # each verified
        resumed_at.add(max(store.steps(), default=None))
        work(url, tmp_path / f"{last}-b", shards, config=config)
        assert_same_run(tmp_path / f"{last}-b", tmp_path / "whole")
    assert resumed_at == {None, 0, 2, 4}


@pytest.mark.fault("servers that fail")
@pytest.mark.parametrize("answer", [500, 503, 1.5], ids=["500", "503", "slow"])
def test_a_server_that_fails_for_a_while_changes_nothing(
    proxy, bucket, shards, tmp_path, undisturbed, answer
):
    def fail_from_now_on(checkpoint_number: int) -> None:
        if checkpoint_number == 1:
            proxy.during(3.0, answer)

    url = f"{bucket}/runs/x"
    assert work(url, tmp_path / "a", shards, also=fail_from_now_on).finished
    assert proxy.refused + proxy.delayed > 0
    assert_same_run(fetched(url, tmp_path / "c"), undisturbed)


@pytest.mark.fault("servers that fail")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (503, r"s3://.*/runs/x/.* cannot be written \(SlowDown\): .*run the same command again"),
        (403, r"s3://.*/runs/x/.* cannot be written \(AccessDenied\): check the credentials"),
    ],
)
def test_giving_up_is_one_clear_error_and_the_same_machine_loses_nothing(
    monkeypatch, proxy, bucket, shards, tmp_path, undisturbed, answer, message
):
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 1.0)
    url = f"{bucket}/runs/x"

    def refuse_writes(checkpoint_number: int) -> None:
        if checkpoint_number == 2:  # the first one is in the bucket by now
            proxy.fault = lambda method, path: answer if method in WRITES else None

    with pytest.raises(UserError, match=message) as error:
        work(url, tmp_path / "a", shards, also=refuse_writes)
    assert str(tmp_path / "a") in str(error.value)
    proxy.fault = lambda method, path: None
    saved = checkpoint.steps(tmp_path / "a" / "checkpoints")[-1]
    store = RunStore(url)
    store.refresh()
    assert max(store.steps()) < saved < 8
    store.exchange(RunFolder(tmp_path / "a"))
    assert max(store.steps()) == saved
    assert work(url, tmp_path / "b", shards).finished
    assert_same_run(tmp_path / "b", undisturbed)


@pytest.mark.fault("servers that fail")
def test_a_refusal_is_not_asked_for_twice(proxy, bucket, tmp_path):
    proxy.fault = lambda method, path: 403
    with pytest.raises(UserError, match=r"AccessDenied.*check the credentials"):
        RunStore(f"{bucket}/runs/x").exchange(RunFolder(tmp_path))
    assert proxy.refused == 1


@pytest.mark.fault("bucket")
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_is_used(
    s3, bucket, shards, tmp_path, undisturbed
):
    url = f"{bucket}/runs/x"
    work(url, tmp_path / "a", shards, stop_at=6)
    store = RunStore(url)
    store.refresh()
    *_, before, newest = store.steps()
    (tensors,) = [
        name
        for name in store._names
        if name.startswith(f"checkpoints/step-{newest:08d}/") and name.endswith(".safetensors")
    ]
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3)
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"runs/x/{tensors}", Body=b"x")
    assert checkpoint.steps(fetched(url, tmp_path / "c") / "checkpoints")[-1] == before
    work(url, tmp_path / "b", shards)
    assert_same_run(tmp_path / "b", undisturbed)
    assert_same_run(fetched(url, tmp_path / "d"), undisturbed)


@pytest.mark.fault("killed processes")
def test_another_driver_takes_the_run_over_and_the_first_one_ends(
    bucket, shards, tmp_path, undisturbed
):
    url = f"{bucket}/runs/x"

    def another_begins(checkpoint_number: int) -> None:
        if checkpoint_number == 1:
            taken.append(take_over(RunStore(url)))

    taken: list[str] = []
    with pytest.raises(UserError, match=r"another training of s3://.*/runs/x was started on"):
        work(url, tmp_path / "a", shards, also=another_begins)
    assert work(url, tmp_path / "b", shards, driver=taken[0]).finished
    assert_same_run(tmp_path / "b", undisturbed)


def test_a_request_to_stop_reaches_the_training_and_progress_the_driver(bucket, shards, tmp_path):
    store = RunStore(f"{bucket}/runs/x")
    driver = take_over(store)
    (tmp_path / "driver").mkdir()
    with run_store.shown_progress(store, RunFolder(tmp_path / "driver"), driver):
        slow = threading.Event()

        def stop_after_progress(checkpoint_number: int) -> None:
            if (tmp_path / "driver" / "metrics.jsonl").exists():
                (tmp_path / "driver" / "stop").touch()
            slow.wait(0.3)

        outcome = work(store.url, tmp_path / "a", shards, driver=driver, also=stop_after_progress)
    assert not outcome.finished
    assert RunFolder(tmp_path / "driver").rows()[-1]["step"] >= 2


def command(bucket: str, clone: Path, shards: Path, config: TrainConfig = CONFIG) -> Path:
    """What the stage does in a clone of the project, its worker on a machine of its own."""

    def run_workers(config: Any, *others: Any, store: RunStore, **keywords: Any) -> dict[str, Any]:
        outcome = work(store.url, clone / "node", shards, config=config)
        return {"finished": outcome.finished, "step": outcome.step}

    compute = replace(params.load(ComputeConfig, PARAMS), storage=bucket)
    folder = driver.train(
        config, compute, shards=shards, runs=clone / "runs", run_workers=run_workers
    )
    publish(folder, clone / "artifacts/train", shards=shards)
    return folder.path


def model_of(clone: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (clone / "artifacts/train/model").iterdir()}


@pytest.fixture
def stored(bucket, shards, tmp_path, s3) -> tuple[str, Any]:
    """A finished run in the bucket, trained in clone `a`: its key there, and a client."""
    folder = command(bucket, tmp_path / "a", shards)
    return f"runs/{folder.name}", boto3.client("s3", region_name="us-east-1", endpoint_url=s3)


@pytest.mark.fault("bucket")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", None),
        ("run.json", b""),
        ("driver.json", b"{"),
        ("outcome.json", b"{"),
        ("progress.json", b"null"),
        ("metrics.jsonl", b"garbage"),
        ("samples/step-00000008-samples.png", None),
        ("samples/step-00000008-samples.png", b""),
        ("checkpoints/step-00000008/state.json", None),
        ("checkpoints/step-00000008/state.json", b"null"),
        ("checkpoints/step-00000008/state.json", b"{"),
    ],
)
def test_a_finished_run_of_which_the_bucket_lost_a_piece_is_whole_after_a_resume_elsewhere(
    bucket, shards, tmp_path, stored, name, content
):
    key, client = stored
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": f"{key}/{name}"}
    client.delete_object(**place) if content is None else client.put_object(**place, Body=content)
    for clone in ("b", "c"):  # the second finds what the first has mended
        folder = command(bucket, tmp_path / clone, shards)
        assert model_of(tmp_path / clone) == model_of(tmp_path / "a")
        assert rows(folder) == rows(tmp_path / "a" / "runs" / folder.name)
        assert (tmp_path / clone / "artifacts/train/samples/step-00000008-samples.png").exists()
    facts = RunStore(f"{bucket}/{key}").read("run.json")
    assert facts is not None
    assert facts["params"]["training"]["num_steps"] == 8
    assert ("note" in facts) == (name == "run.json")


@pytest.mark.fault("killed processes")
def test_whenever_the_drivers_disk_is_lost_the_run_in_the_bucket_is_published(
    monkeypatch, proxy, bucket, shards, tmp_path, record_property
):
    """After each single write of a run: the driver goes on, or (every other time) another clone."""
    monkeypatch.setattr(run_store, "POLL_SECONDS", 60.0)  # else progress is written now and then
    config = tiny_config(num_steps=2, checkpoint_interval_steps=2, sample_interval_steps=2)
    command(f"{bucket}/whole", tmp_path / "whole", shards, config)
    writes = sum(method in WRITES for method, _ in proxy.requests)
    record_property("faults", writes - 1)
    for last in range(1, writes):
        clone, left, dies = tmp_path / f"{last}", iter(range(last)), last % 2 == 0

        def lose(
            method: str, path: str, clone: Path = clone, left: Any = left, dies: bool = dies
        ) -> int | None:
            if method not in WRITES or next(left, None) is not None:
                return None
            shutil.rmtree(clone / "runs", ignore_errors=True)
            return 403 if dies else None

        proxy.fault = lose
        if dies:
            with pytest.raises(UserError):
                command(f"{bucket}/{last}", clone, shards, config)
            proxy.fault = lambda method, path: None
            clone = tmp_path / f"{last}-other"
        command(f"{bucket}/{last}", clone, shards, config)
        published, whole = clone / "artifacts/train", tmp_path / "whole/artifacts/train"
        assert model_of(clone) == model_of(tmp_path / "whole")
        assert [p.name for p in published.rglob("*")] == [p.name for p in whole.rglob("*")]
        # What was known when it began, not what is known now:
        assert "note" not in json.loads((published / "run.json").read_text())


def test_a_longer_run_is_a_resume_in_another_clone_too(bucket, shards, tmp_path, stored):
    longer = replace(CONFIG, training=replace(CONFIG.training, num_steps=11))
    folder = command(bucket, tmp_path / "b", shards, longer)
    train(longer, shards=shards, run_folder=tmp_path / "once", device=torch.device("cpu"))
    assert rows(folder) == rows(tmp_path / "once")
    tensors = [
        checkpoint.load(RunFolder(run).checkpoint(11))[0] for run in (folder, tmp_path / "once")
    ]
    assert [
        name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])
    ] == []
    with pytest.raises(UserError, match=r"num_steps is 8, but .* trained for 11 steps .* s3://"):
        command(bucket, tmp_path / "c", shards)


def test_a_source_of_weights_reaches_the_workers_through_the_bucket(
    bucket, shards, tmp_path, stored
):
    training = replace(
        CONFIG.training, num_steps=2, start_from=str(tmp_path / "a/artifacts/train/model")
    )
    folder = command(bucket, tmp_path / "b", shards, replace(CONFIG, training=training))
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    assert checkpoint.read_state(newest)["start"]["networks"] == ["generator", "encoder"]


def test_shards_are_uploaded_once_and_fetched_once_per_node(
    monkeypatch, proxy, bucket, shards, tmp_path
):
    monkeypatch.setattr(shard_store, "node_folder", lambda: tmp_path)
    for _ in range(2):
        shard_store.send_shards(shards, bucket)
    puts = [path for method, path in proxy.requests if method == "PUT"]
    assert len(puts) == 4  # three shards, then the manifest
    assert "manifest.json" in puts[-1]
    manifest = read_manifest(shards)
    proxy.requests.clear()
    with ThreadPoolExecutor(3) as workers:
        folders = set(workers.map(lambda _: shard_store.fetch_shards(bucket, manifest), range(3)))
    (folder,) = folders
    assert sum(method == "GET" for method, _ in proxy.requests) == 3  # not the manifest
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == {
        path.name: path.read_bytes() for path in shards.glob("*.parquet")
    }


@pytest.mark.fault("bucket")
def test_an_upload_of_shards_that_was_cut_off_is_completed(
    monkeypatch, proxy, bucket, shards, tmp_path
):
    monkeypatch.setattr(shard_store, "node_folder", lambda: tmp_path)
    left = iter(range(1))
    proxy.fault = lambda method, path: 403 if method == "PUT" and next(left, None) is None else None
    with pytest.raises(UserError, match="cannot be written"):
        shard_store.send_shards(shards, bucket)
    manifest = read_manifest(shards)
    proxy.fault = lambda method, path: None
    with pytest.raises(UserError, match="404"):
        shard_store.fetch_shards(bucket, manifest)
    proxy.requests.clear()
    shard_store.send_shards(shards, bucket)
    assert sum(method == "PUT" for method, _ in proxy.requests) == 3  # one was there already
    assert shard_store.fetch_shards(bucket, manifest).exists()


@pytest.mark.fault("bucket")
def test_a_shard_with_other_bytes_than_the_manifest_says_is_refused(
    monkeypatch, s3, bucket, shards, tmp_path
):
    monkeypatch.setattr(shard_store, "node_folder", lambda: tmp_path)
    shard_store.send_shards(shards, bucket)
    manifest = read_manifest(shards)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3)
    key = f"data/{manifest['dataset_sha256']}/train-00000.parquet"
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"x")
    with pytest.raises(UserError, match=r"train-00000.parquet is damaged: delete everything below"):
        shard_store.fetch_shards(bucket, manifest)
    assert [path for path in (tmp_path / "shards").iterdir() if path.is_dir()] == []
