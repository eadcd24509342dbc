"""A real MLflow server and a real scoring server on loopback, asked as a person with curl would."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aegan
from pipelines import register
from pipelines.base.errors import UserError
from pipelines.registry import mlflow_store, tracking
from tests.servers import model_server
from tests.trained import REGISTER, ROOT, write_project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
START_SECONDS = 240
MODEL = Path("artifacts/train/model")
OURS = {"server.log", "sitecustomize.py", "__pycache__"}  # what the tests put into the home
WATCH = '''
import sys

def hook(event, args):
    """Report every attempt to reach, or to be reached from, anything but this machine."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        host = args[0] if event == "socket.getaddrinfo" else args[1]
        host = host[0] if isinstance(host, tuple) else host
        if host not in ("127.0.0.1", "::1", "localhost", "") and str(host)[:1] not in ("/", "\\0"):
            print("NETWORK", event, args, file=sys.stderr, flush=True)

sys.addaudithook(hook)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def _inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@contextmanager
def server(*arguments: str, answers: str, home: Path, **extra: str) -> Iterator[tuple[str, Path]]:
    """Run an MLflow command until the block ends; gives its address and its log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", home / "server.log"
    home.mkdir(parents=True)
    (home / "sitecustomize.py").write_text(WATCH)
    environment = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        "PYTHONPATH": str(home),  # not the project: the model must bring its own package
        **mlflow_store.ENVIRONMENT,
        **extra,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [BIN / "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait_until_it_answers(url + answers, process, log)
            yield url, log
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            dead = process.poll() is not None or time.monotonic() > give_up
            assert not dead, log.read_text()
            time.sleep(0.5)


@pytest.fixture(scope="module")
def scoring(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`mlflow models serve` of a model registered in the embedded store."""
    home = tmp_path_factory.mktemp("scoring") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register.register(REGISTER)
        command = ("models", "serve", "-m", "models:/aegan@candidate", "--env-manager", "local")
        store = mlflow_store.DEFAULT_URI
        with server(*command, answers="/ping", home=home, MLFLOW_TRACKING_URI=store) as running:
            yield running


def ask(url: str, request_: Any) -> tuple[int, Any]:
    """POST JSON (or raw bytes) to /invocations => status and answer."""
    data = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/invocations", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def body(operation: str, rows: list[Any], **params: Any) -> dict[str, Any]:
    return {"dataframe_records": rows, "params": {"operation": operation, **params}}


def pixels(records: list[dict[str, Any]]) -> torch.Tensor:
    files = [io.BytesIO(base64.b64decode(record["image"])) for record in records]
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))


def test_all_four_operations_answer_over_http(scoring: tuple[str, Path]) -> None:
    url, _ = scoring
    model = aegan.load("artifacts/train/model")

    status, generated = ask(url, body("generate", [], count=3, seed=7))
    assert status == 200
    assert torch.equal(pixels(generated), aegan.sample(model, 3, seed=7))

    latents = [{"latent": record["latent"]} for record in generated]
    assert ask(url, body("generate", latents)) == (200, generated)

    images = [{"image": record["image"]} for record in generated]
    status, encoded = ask(url, body("encode", images))
    assert status == 200
    found = torch.tensor([record["latent"] for record in encoded])
    torch.testing.assert_close(found, aegan.encode(model, pixels(images)))

    status, rebuilt = ask(url, body("reconstruct", images))
    assert status == 200
    assert torch.equal(pixels(rebuilt), aegan.reconstruct(model, pixels(images)))

    status, frames = ask(url, body("interpolate", images, num_frames=4, path="linear"))
    assert status == 200
    expected = aegan.interpolate(model, found[:-1], found[1:], num_frames=4, path="linear")
    assert torch.equal(pixels(frames), expected.flatten(0, 1))


def test_records_under_the_key_inputs_are_the_same_rows(scoring: tuple[str, Path]) -> None:
    _, records = ask(scoring[0], body("generate", [], count=2))
    latents = [{"latent": record["latent"]} for record in records]
    request = {"inputs": latents, "params": {"operation": "generate"}}
    assert ask(scoring[0], request) == (200, records)


def test_whole_number_latents_are_answered_within_mlflow_too(scoring: tuple[str, Path]) -> None:
    status, records = ask(scoring[0], body("generate", [{"latent": [1] * 8}]))
    assert status == 200
    assert ask(scoring[0], body("generate", [{"latent": [1.0] * 8}])) == (200, records)


def test_a_count_of_null_counts_as_not_given_within_mlflow(scoring: tuple[str, Path]) -> None:
    assert ask(scoring[0], body("generate", [], count=None)) == ask(
        scoring[0], body("generate", [])
    )


@pytest.mark.fault("served requests")
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"{", "valid JSON"),
        (b"\xff", "valid JSON"),
        ({}, "exactly one of the input fields"),
        ({"params": {"operation": "generate"}}, "exactly one of the input fields"),
        ({"dataframe_records": []}, "params.operation is missing"),
        ({"dataframe_records": 5, "params": {"operation": "generate"}}, "list of records"),
        ({"inputs": {"latent": [[1.0] * 8]}, "params": {"operation": "generate"}}, "send rows as"),
        ({"instances": [{"latent": [1] * 8}], "params": {"operation": "generate"}}, "send rows as"),
        (body("explode", []), "expected one of generate, encode"),
        (body("generate", [], count=0), "params.count is 0"),
        (body("generate", [], count="many"), "count"),
        (body("generate", [], count=2.5), "count"),
        (body("generate", [{"latents": [1.0] * 8}]), 'column "latents" is unknown'),
        (body("generate", [{"latent": [1.0, 2.0]}]), "row 0: latent must be a list of 8"),
        (body("generate", [{"latent": [float("nan")] * 8}]), "finite"),
        (body("generate", [{"latent": [1.0, None]}]), "latent"),
        (body("generate", [{"latent": "abc"}]), "latent"),
        (body("generate", [{"latent": None}]), "row 0 has neither image nor latent"),
        (body("generate", [{"latent": [0.0] * 8}, {"image": "AAAA"}]), "row 1 has image"),
        (body("encode", []), "needs rows with the column image"),
        (body("encode", [{"picture": "AAAA"}]), 'column "picture" is unknown'),
        (body("encode", [{"image": "§"}]), "row 0: image is not base64"),
        (body("encode", [{"image": 7}]), "image"),
        (body("encode", [{"image": None}]), "image"),
    ],
)
def test_a_wrong_request_gets_status_400_and_a_reason(
    scoring: tuple[str, Path], request_: Any, message: str
) -> None:
    status, answer = ask(scoring[0], request_)
    assert status == 400
    assert message in answer["message"]
    assert "Traceback" not in json.dumps(answer)


def test_a_refusal_does_not_send_the_request_back(scoring: tuple[str, Path]) -> None:
    status, answer = ask(scoring[0], body("encode", [{"image": "A" * 1_000_000}]))
    assert status == 400
    assert len(json.dumps(answer)) < 1000


def test_serving_calls_nobody_and_leaves_nothing_in_the_home(scoring: tuple[str, Path]) -> None:
    assert ask(scoring[0], body("generate", []))[0] == 200
    assert "NETWORK" not in scoring[1].read_text()
    assert {path.name for path in scoring[1].parent.iterdir()} <= OURS


EVIL = """
from pathlib import Path
Path("executed").touch()
"""


@pytest.mark.fault("registry")
def test_serving_a_registered_version_executes_nothing_that_the_registry_holds(
    project: Path, scoring: tuple[str, Path]
) -> None:
    copy = project.parent / "attacked"
    shutil.copytree(project, copy)
    for file in (copy / "mlruns").rglob("*.py"):
        file.write_text(file.read_text() + EVIL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    load = "import mlflow; mlflow.pyfunc.load_model('models:/aegan@candidate')"
    theirs = {**environment, "MLFLOW_TRACKING_URI": f"sqlite:///{copy}/mlflow.db"}
    adopt = (
        "from pipelines.registry.tracking import pinned; print(pinned('models:/aegan@candidate'))"
    )
    adopt = f"{adopt}; {load}"
    subprocess.run([sys.executable, "-c", adopt], cwd=copy, env=theirs, check=True, timeout=200)
    (copy / "executed").unlink()  # so it is an attack

    with model_server(log=copy / "serve.log", folder=copy, environment=environment) as address:
        status, records = ask(address, body("generate", [], count=2, seed=3))
        assert status == 200
        assert torch.equal(pixels(records), aegan.sample(aegan.load(MODEL), 2, seed=3))
        with urllib.request.urlopen(f"{address}/version", timeout=20) as response:
            assert json.load(response)["model"] == "models:/aegan/1"
        assert not (copy / "executed").exists()


def test_an_alias_that_points_at_nothing_is_one_line_with_the_cure(
    scoring: tuple[str, Path],
) -> None:
    name = "models:/aegan@champion"
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.serve", "--port", "0", "--model", name],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert f"error: {name}: there is no such model or alias" in line
    assert "make run" in line


def test_a_tracking_server_takes_the_model_and_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ("--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1")
    artifacts = ("--artifacts-destination", str(tmp_path / "served"))
    with server("server", *store, *artifacts, answers="/health", home=tmp_path / "home") as running:
        url, log = running
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        first, again = register.register(REGISTER), register.register(REGISTER)
        assert again.reused
        assert (first.number, first.run_id) == (again.number, again.run_id)
        written = json.loads(Path("artifacts/register/registration.json").read_text())
        assert written["tracking_uri"] == url
        model = aegan.load("artifacts/train/model")
        latents = aegan.random_latents(model, 2, seed=0)
        served = aegan.decode(tracking.load_model("models:/aegan@candidate"), latents)
        assert torch.equal(served, aegan.decode(model, latents))

        # The same machine by a name the server was not told about.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("127.0.0.1", "127.1"))
        with pytest.raises(UserError, match="--allowed-hosts"):
            register.register(REGISTER)
        assert "NETWORK" not in log.read_text()
        assert {path.name for path in log.parent.iterdir()} <= OURS
