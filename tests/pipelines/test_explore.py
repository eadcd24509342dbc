"""The stage `explore` where the page's runtime can and cannot be fetched; what it measures."""

import functools
import http.server
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import aegan
from aegan.onnx_export import NETWORKS
from aegan.pixels import to_float
from pipelines.base.errors import UserError
from pipelines.explore import explore
from pipelines.serving import exports, onnx_web
from tests.trained import write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty environment, and a folder that a server on this machine gives in npm's place."""
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/onnxruntime-web.tgz"
        monkeypatch.setattr(onnx_web, "ADDRESS", address)
        monkeypatch.setattr(onnx_web, "FOLDER", tmp_path / "environment")
        yield served
        server.shutdown()
        thread.join()


def test_without_its_runtime_the_page_is_left_out_and_the_stage_goes_on(
    elsewhere: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path / "model", discriminators=True)
    explore(model, tmp_path / "out")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    said = warning.getMessage()
    assert "no explorer.html" in said
    assert "onnxruntime-web" in said
    assert "`.venv/bin/dvc repro --force --single-item explore` makes it then" in said
    assert "\n" not in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.onnx" for name in NETWORKS}
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "out/encoder.onnx")
    (found,) = session.run(None, {"x": to_float(images).contiguous().numpy()})
    expected = aegan.encode(aegan.load(model), images).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    given = {"image_discriminator": to_float(images), "latent_discriminator": torch.randn(3, 8)}
    for name, inputs in given.items():
        judge = getattr(aegan.load(model, discriminators=True), name)
        session = onnxruntime.InferenceSession(tmp_path / f"out/{name}.onnx")
        (logit,) = session.run(None, {session.get_inputs()[0].name: inputs.contiguous().numpy()})
        np.testing.assert_allclose(logit, judge(inputs).numpy(), rtol=0, atol=1e-4)


def test_a_runtime_that_was_changed_on_the_way_is_refused(elsewhere: Path) -> None:
    (elsewhere / "onnxruntime-web.tgz").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"has the SHA-256 .*, expected d2228df7"):
        onnx_web.read_runtime()
    assert not onnx_web.FOLDER.exists()


def test_a_file_of_the_runtime_that_is_damaged_is_fetched_again(
    elsewhere: Path, tmp_path: Path
) -> None:
    onnx_web.FOLDER.mkdir()
    for file, _ in onnx_web.FILES.values():
        (onnx_web.FOLDER / file).write_bytes(b"damaged")
    with pytest.raises(UserError, match="onnxruntime-web"):
        onnx_web.read_runtime()


def test_a_page_has_a_name_that_a_browser_opens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.html"):
        exports.explore(str(tmp_path), tmp_path / "page.txt")


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no trained model"):
        exports.export(str(tmp_path), tmp_path / "onnx")
