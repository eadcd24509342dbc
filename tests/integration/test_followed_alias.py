"""`aegan serve --model models:/aegan@champion` while its alias moves, asked all the time."""

import json
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aegan
from aegan import operations
from pipelines import register
from pipelines.registry import mlflow_store
from tests.servers import model_server
from tests.trained import REGISTER, ROOT, write_model, write_project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = Path("artifacts/train/model")
LATENT = [0.5] * 8
PROMOTION_SECONDS = 10
REQUEST = {"dataframe_records": [{"latent": LATENT}], "params": {"operation": "generate"}}


class Registry:
    """Three registered versions with other weights each; the third is damaged."""

    def __init__(self) -> None:
        self.models = []
        for seed in range(3):
            shutil.rmtree(MODEL)
            write_model(MODEL, seed=seed)
            self.models.append(aegan.load(MODEL))
            register.register(REGISTER)
        self._client = mlflow_store.open_store().MlflowClient()
        place = self._client.get_model_version_download_uri("aegan", "3")
        with (Path(place.removeprefix("file://")) / "artifacts/model/ema.safetensors").open(
            "r+b"
        ) as weights:
            weights.seek(-4, os.SEEK_END)
            weights.write(b"\0\1\2\3")

    def promote(self, version: int) -> None:
        self._client.set_registered_model_alias("aegan", "champion", str(version))


@pytest.fixture(scope="module", autouse=True)
def _inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(write_project(tmp_path_factory.mktemp("project")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry()
    found.promote(1)
    return found


@pytest.fixture(scope="module")
def server(registry: Registry) -> Iterator[tuple[str, Path]]:
    """Address and log of the server."""
    log = Path("serve.log").absolute()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ("--model", "models:/aegan@champion")
    with model_server(*options, log=log, environment=environment) as address:
        yield address, log


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as response:
        content = response.read().decode()
        return json.loads(content) if content.startswith("{") else content


def wait_for(url: str, **expected: str) -> float:
    """Seconds until /readyz says so."""
    started = time.monotonic()
    while not get(f"{url}/readyz").items() >= expected.items():
        assert time.monotonic() - started < 60, get(f"{url}/readyz")
        time.sleep(0.1)
    return time.monotonic() - started


class Clients:
    """Some that ask for one picture again and again, until the block ends."""

    def __init__(self, url: str) -> None:
        self._request = urllib.request.Request(
            f"{url}/invocations", json.dumps(REQUEST).encode(), {"Content-Type": "application/json"}
        )
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]
        self.errors: list[Exception] = []
        self.pictures: list[str] = []

    def _ask(self) -> None:
        while not self._end.is_set():
            try:
                with urllib.request.urlopen(self._request, timeout=60) as response:
                    [record] = json.load(response)["predictions"]
                    self.pictures.append(record["image"])
            except Exception as error:
                self.errors.append(error)

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def picture(model: aegan.AEGAN) -> str:
    [record] = operations.operate(model, REQUEST["dataframe_records"], REQUEST["params"])
    return str(record["image"])


def test_a_promotion_is_served_within_seconds_and_no_request_fails(
    server: tuple[str, Path], registry: Registry
) -> None:
    url, log = server
    with Clients(url) as clients:
        time.sleep(1)
        registry.promote(2)
        seconds = wait_for(url, model="models:/aegan/2", problem="")
        time.sleep(1)
    assert clients.errors == []
    expected = [picture(model) for model in registry.models[:2]]
    assert clients.pictures[0] == expected[0]
    assert clients.pictures[-1] == expected[1]
    assert set(clients.pictures) == set(expected)
    assert seconds < PROMOTION_SECONDS
    assert "models:/aegan/2 is served from now on (models:/aegan@champion)" in log.read_text()
    assert 'aegan_model_info{version="models:/aegan/2"} 1.0' in get(f"{url}/metrics")


@pytest.mark.fault("registry")
def test_a_champion_that_cannot_be_loaded_leaves_the_one_before_serving_and_says_so(
    server: tuple[str, Path], registry: Registry
) -> None:
    url, log = server
    registry.promote(2)
    wait_for(url, model="models:/aegan/2")
    before = len(log.read_text().splitlines())
    with Clients(url) as clients:
        registry.promote(3)
        started = time.monotonic()
        while not (problem := get(f"{url}/readyz")["problem"]):
            assert time.monotonic() - started < 60
            time.sleep(0.1)
        time.sleep(8)  # it looks again, and says no more
    assert clients.errors == []
    assert set(clients.pictures) == {picture(registry.models[1])}
    assert problem == "models:/aegan@champion cannot be followed: the log says why"
    assert get(f"{url}/readyz")["model"] == "models:/aegan/2"
    assert "aegan_model_stale 1.0" in get(f"{url}/metrics")
    [line] = log.read_text().splitlines()[before:]
    assert line.startswith("models:/aegan/2 stays served: models:/aegan/3: its files are not those")
    registry.promote(1)
    wait_for(url, model="models:/aegan/1", problem="")
    assert "aegan_model_stale 0.0" in get(f"{url}/metrics")
