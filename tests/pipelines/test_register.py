"""Registering in a real SQLite store, and loading from it."""

import base64
import io
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aegan
from aegan.training.run_folder import RunFolder
from pipelines import register
from pipelines.base.errors import UserError
from pipelines.registry import mlflow_store, registration, tracking
from pipelines.registry.live_run import send_rest
from tests.latents import add_density, small_density
from tests.trained import REGISTER, ROOT, RUN_NAME, START, write_project

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder, entered, whose model is registered; shared: a new store takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = write_project(tmp_path_factory.mktemp("project"))
        add_density(root / "artifacts/train/model", small_density(8))
        patch.chdir(root)
        register.register(REGISTER)
        yield root


@pytest.fixture
def store(registered: Path) -> Any:
    """A client of the shared store."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{registered / 'mlflow.db'}")


def test_registering_points_the_alias_at_a_version_that_answers(
    registered: Path, store: Any
) -> None:
    import mlflow

    written = json.loads(Path("artifacts/register/registration.json").read_text())
    version = store.get_model_version_by_alias("aegan", "candidate")
    assert (written["version"], written["run_id"]) == (str(version.version), version.run_id)
    assert written["tracking_uri"] == "sqlite:///mlflow.db"  # no path of this machine
    assert store.get_run(version.run_id).info.status == "FINISHED"

    service = mlflow.pyfunc.load_model(written["model_uri"])
    [record] = service.predict([], params={"operation": "generate", "seed": 3})
    image = np.array(Image.open(io.BytesIO(base64.b64decode(record["image"]))))
    model = aegan.load("artifacts/train/model")
    np.testing.assert_array_equal(image, aegan.sample(model, 1, seed=3)[0])
    fitted: dict[str, Any] = {"latents": "fitted", "temperature": 0.5, "label": "dogs"}
    [record] = service.predict([], params={"operation": "generate", "seed": 3, **fitted})
    expected = aegan.random_latents(model, 1, seed=3, **fitted)
    np.testing.assert_array_equal(np.float32(record["latent"]), expected[0])


def test_the_run_holds_parameters_curves_machine_and_scores(registered: Path, store: Any) -> None:
    run = store.get_run(store.get_model_version_by_alias("aegan", "candidate").run_id)
    assert run.data.params["loss.lambda_image_reconstruction"] == "10.0"
    assert run.data.params["training.arm"] == "aegan"
    assert run.data.params["preprocess.image_size"] == "32"
    curve = store.get_metric_history(run.info.run_id, "train/image_reconstruction")
    assert [(point.step, point.value, point.timestamp) for point in curve] == [
        (20, 1 / 20, (START + 20) * 1000),
        (40, 1 / 40, (START + 40) * 1000),
    ]
    machine = store.get_metric_history(run.info.run_id, "system/cpu_percent")
    assert [point.value for point in machine] == [50, 51, 52]
    assert run.data.metrics["evaluate/frechet_distance/ema"] == 1.5
    assert "evaluate/mean_absolute_error/weights" not in run.data.metrics  # it was not a number


def test_the_run_holds_the_version_of_data_and_code(registered: Path, store: Any) -> None:
    version = store.get_model_version_by_alias("aegan", "candidate")
    run = store.get_run(version.run_id)
    manifest = json.loads(Path("artifacts/shards/manifest.json").read_text())
    assert run.data.tags["dataset_sha256"] == manifest["dataset_sha256"]
    assert run.data.tags["mlflow.source.git.commit"] == "f" * 40
    assert len(run.data.tags["dvc_lock_sha256"]) == 64
    assert version.tags["run_name"] == RUN_NAME
    assert version.tags["evaluate/frechet_distance/ema"] == "1.5"
    for tags in (run.data.tags, version.tags):  # figures of other features cannot be compared
        assert tags["train/features"] == "made-up features"
        assert tags["evaluate/features"] == "other made-up features"
    profile = json.loads(run.inputs.dataset_inputs[0].dataset.profile)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert profile["shards"] == {shard["file"]: shard["sha256"] for shard in shards}


def test_the_run_holds_pictures_and_report(registered: Path, store: Any) -> None:
    run_id = store.get_model_version_by_alias("aegan", "candidate").run_id
    folders = {entry.path for entry in store.list_artifacts(run_id)}
    assert {"samples", "interpolations", "report", "metrics", "data"} <= folders
    for file in ("samples/step-00000040-samples.png", "report/index.html"):
        found = store.list_artifacts(run_id, str(Path(file).parent))
        assert [entry.path for entry in found] == [file]


def test_the_stored_model_needs_nothing_pickled_and_pins_what_it_needs(
    registered: Path, store: Any
) -> None:
    import mlflow

    folder = Path(mlflow.artifacts.download_artifacts("models:/aegan@candidate"))
    assert not list(folder.rglob("*.pkl"))
    assert (folder / "code/aegan/sampling.py").exists()
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == set(registration.SERVED_PACKAGES)
    assert all("==" in line and "+" not in line for line in requirements)


def test_a_model_loads_from_the_registry_as_from_its_folder(registered: Path) -> None:
    model = tracking.load_model("artifacts/train/model")
    latents = aegan.random_latents(model, 2, seed=0)
    expected = aegan.decode(model, latents)
    loaded = tracking.load_model("models:/aegan@candidate")
    assert torch.equal(aegan.decode(loaded, latents), expected)
    assert loaded.encoder is not None
    assert loaded.latent_density is not None


def test_the_same_content_is_registered_once_and_other_content_again(
    registered: Path, store: Any
) -> None:
    first = store.get_model_version_by_alias("aegan", "candidate")
    again = register.register(REGISTER)
    assert again.reused
    assert again.number == str(first.version)
    scores = Path("artifacts/evaluate/metrics.json")
    content = scores.read_text()
    scores.write_text('{"frechet_distance": {"ema": 1.0}}')
    other = register.register(REGISTER)
    assert int(other.number) == int(first.version) + 1
    scores.write_text(content)
    assert register.register(REGISTER).number == str(first.version)  # the alias moves back
    alias = store.get_model_version_by_alias("aegan", "candidate")
    assert alias.version == first.version


def test_a_tracked_training_and_its_model_are_one_run_and_other_scores_get_another(
    registered: Path, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = write_project(tmp_path / "project", seed=1, tracked=True)
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registered / 'mlflow.db'}")
    live_run = send_rest(RunFolder(project / "runs" / RUN_NAME), "aegan")
    assert "registered_model" not in store.get_run(live_run).data.tags
    version = register.register(REGISTER)
    assert version.run_id == live_run
    run = store.get_run(live_run)
    assert run.info.status == "FINISHED"
    assert run.data.params["evaluate.seed"] == "0"
    assert run.data.metrics["evaluate/frechet_distance/ema"] == 1.5
    for name, values in (("image_reconstruction", [1 / 20, 1 / 40]), ("images_shown", [640, 1280])):
        curve = store.get_metric_history(live_run, f"train/{name}")
        assert [(point.step, point.value) for point in curve] == [
            *zip((20, 40), values, strict=True)
        ]
    assert len(store.get_metric_history(live_run, "system/cpu_percent")) == 3
    Path("artifacts/evaluate/metrics.json").write_text('{"frechet_distance": {"ema": 1.25}}')
    other = register.register(REGISTER)
    assert other.run_id != live_run
    assert len(store.get_metric_history(other.run_id, "train/image_reconstruction")) == 2
    assert send_rest(RunFolder(project / "runs" / RUN_NAME), "aegan") == ""


def test_a_version_whose_files_are_gone_is_not_reused(
    registered: Path, store: Any, tmp_path: Path
) -> None:
    before = register.register(REGISTER)
    uri = store.get_model_version_download_uri("aegan", before.number)
    import mlflow

    folder = Path(mlflow.artifacts.download_artifacts(uri))
    shutil.move(folder, tmp_path / "elsewhere")
    after = register.register(REGISTER)
    assert not after.reused
    assert after.number != before.number


def test_passwords_reach_neither_files_nor_messages(
    registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again when the server is closed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:s3cret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError) as error:
        register.register(REGISTER)
    assert "s3cret" not in str(error.value)
    assert f"127.0.0.1:{port}" in str(error.value)
    assert "is MLFLOW_TRACKING_URI right" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("password", ["s3cret", "s3@cret", "@s3cret@", "s3/cret", ""])
def test_no_part_of_a_password_is_left_in_an_address(password: str) -> None:
    text = f"MLflow at https://admin:{password}@host:5000/x: models:/aegan@old, s3://a:1/b@c"
    left = "MLflow at https://host:5000/x: models:/aegan@old, s3://a:1/b@c"
    assert mlflow_store.without_credentials(text) == left


def test_passwords_of_the_source_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    text = Path("params.yaml").read_text()
    source = "source: https://someone:s3cret@example.org/a.zip?signature=s3cret"
    Path("params.yaml").write_text(re.sub("source: .*", source, text, count=1))
    assert "s3cret" not in str(register.collect())


def test_a_server_that_refuses_the_password_is_one_clear_error(
    registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=r"401.*check MLFLOW_TRACKING_USERNAME"):
            register.register(REGISTER)
        server.shutdown()


def test_a_store_that_is_no_database_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(UserError, match=r"mlflow.db: file is not a database; .*move the file"):
        register.register(REGISTER)
    assert not Path("artifacts/register").exists()


def test_a_locked_store_is_one_clear_error(
    registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "SQLITE_WAIT_SECONDS", 0.1)
    other = sqlite3.connect("mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(UserError, match="database is locked; close the program"):
            register.register(REGISTER)
    finally:
        other.close()


def test_loading_creates_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"mlflow.db not found: run from"):
        tracking.load_model("models:/aegan@candidate")
    with pytest.raises(UserError, match=r"holds no trained model: config.json is missing"):
        tracking.load_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_alias_is_one_clear_error(registered: Path) -> None:
    with pytest.raises(UserError, match="nobody"):
        tracking.load_model("models:/aegan@nobody")


def test_missing_stages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"artifacts/train/run.json not found: run the stage train first"
    ):
        register.register(REGISTER)


def test_a_model_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    run = json.loads(Path("artifacts/train/run.json").read_text())
    Path("artifacts/train/run.json").write_text(json.dumps({**run, "dataset_sha256": "0" * 64}))
    with pytest.raises(UserError, match="not the data the model was trained on"):
        register.collect()


def test_without_a_run_folder_the_curves_come_from_the_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    shutil.rmtree("runs")
    points = [(p.name, p.step, p.value) for p in register.collect().curves]
    assert ("train/image_reconstruction", 40, 0.25) in points
    assert not [name for name, _, _ in points if name.startswith("system/")]


@pytest.mark.slow
def test_registering_calls_nobody_and_writes_nowhere_else(tmp_path: Path) -> None:
    """In a fresh home, without the variables by which MLflow would spare a test run or CI."""
    root, home, temporary = write_project(tmp_path / "project"), tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary)}
    watch = (
        "import sys, runpy\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.bind'):\n"
        "        host = args[0] if event == 'socket.getaddrinfo' else args[1][0]\n"
        "        if host not in ('127.0.0.1', '::1'):\n"
        "            print('NETWORK', event, args, file=sys.stderr)\n"
        "sys.addaudithook(hook)\n"
        "runpy.run_module('pipelines.register', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch],
        cwd=root,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "models:/aegan@candidate" in done.stdout
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert list(temporary.iterdir()) == []
