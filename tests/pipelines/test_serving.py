"""What the served model answers, called directly: tests/integration asks the same over HTTP."""

import base64
import io
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import aegan
from pipelines import serving
from tests.trained import write_model

MODEL_SIZE, LATENT_DIM = 16, 8
DEFAULTS = {param.name: param.default for param in serving.SIGNATURE.params.params}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> aegan.AEGAN:
    return aegan.load(write_model(tmp_path_factory.mktemp("trained") / "model"))


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> aegan.AEGAN:
    """A model of the arm `gan`: it has no encoder."""
    return aegan.load(write_model(tmp_path_factory.mktemp("gan") / "model", encoder=False))


def ask(
    model: aegan.AEGAN, operation: str, images: Any = (), latents: Any = (), **params: Any
) -> list[dict[str, Any]]:
    answer = {**DEFAULTS, "operation": operation, **params}
    return serving.answer(model, images, latents, **answer)


def to_base64(image: np.ndarray, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def pixels(record: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(record["image"])))))


def pictures(count: int) -> np.ndarray:
    shape = (count, MODEL_SIZE, MODEL_SIZE, 3)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_generate_gives_the_library_s_samples_and_their_latents(model: aegan.AEGAN) -> None:
    records = ask(model, "generate", count=3, seed=5)
    images = torch.stack([pixels(record) for record in records])
    assert torch.equal(images, aegan.sample(model, 3, seed=5))
    again = ask(model, "generate", latents=[record["latent"] for record in records])
    assert again == records


def test_encode_and_reconstruct_agree_with_the_library(model: aegan.AEGAN) -> None:
    images = pictures(3)
    sent, tensor = [to_base64(image) for image in images], torch.from_numpy(images)
    latents = [record["latent"] for record in ask(model, "encode", sent)]
    assert torch.equal(torch.tensor(latents), aegan.encode(model, tensor))
    reconstructed = torch.stack([pixels(record) for record in ask(model, "reconstruct", sent)])
    assert torch.equal(reconstructed, aegan.reconstruct(model, tensor))


@pytest.mark.parametrize("path", ["slerp", "linear"])
def test_interpolate_walks_from_each_row_to_the_next(model: aegan.AEGAN, path: str) -> None:
    sent = [to_base64(image) for image in pictures(3)]
    frames = ask(model, "interpolate", sent, num_frames=4, path=path)
    latents = [record["latent"] for record in ask(model, "encode", sent)]
    assert frames == ask(model, "interpolate", latents=latents, num_frames=4, path=path)
    assert len(frames) == 8
    ends = [pixels(record) for record in ask(model, "reconstruct", sent)]
    for frame, end in ((0, 0), (3, 1), (4, 1), (7, 2)):
        difference = pixels(frames[frame]).int() - ends[end].int()
        assert difference.abs().max() <= 1  # the ends of a path are rounded differently


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("TIFF", {})]
)
def test_images_of_any_kind_and_size_are_understood(
    model: aegan.AEGAN, kind: str, options: dict[str, Any]
) -> None:
    image = np.full((40, 25, 3), 200, dtype=np.uint8)
    [record] = ask(model, "encode", [to_base64(image, kind, **options)])
    assert len(record["latent"]) == LATENT_DIM


PICTURE = to_base64(pictures(1)[0])
BOMB = to_base64(np.zeros((5000, 5000), dtype=np.uint8))
ZEROS = [0.0] * LATENT_DIM


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"operation": "explode"}, r"params.operation is 'explode'; allowed: generate, encode"),
        ({"operation": "generate", "count": 0}, "count is 0; it must lie between 1 and 1024"),
        ({"operation": "generate", "count": 1025}, "count is 1025"),
        ({"operation": "generate", "seed": -1}, "seed is -1"),
        ({"operation": "generate", "images": [PICTURE]}, "generate takes latents or no rows"),
        ({"operation": "generate", "latents": [ZEROS[1:]]}, "row 0: latent must be a list of 8"),
        ({"operation": "generate", "latents": [ZEROS, None]}, "row 1: latent must be a list of 8"),
        ({"operation": "generate", "latents": [[*ZEROS[1:], float("nan")]]}, "row 0: .*finite"),
        ({"operation": "generate", "latents": [[*ZEROS[1:], 1e300]]}, "row 0: .*finite"),
        ({"operation": "generate", "latents": [[*ZEROS[1:], [1]]]}, "row 0: latent"),
        ({"operation": "generate", "latents": [[*ZEROS[1:], "x"]]}, "row 0: latent"),
        ({"operation": "generate", "latents": [ZEROS] * 1025}, "1025 rows; at most 1024"),
        ({"operation": "encode"}, "needs the column image"),
        ({"operation": "reconstruct", "latents": [ZEROS]}, "needs the column image"),
        ({"operation": "encode", "images": [PICTURE], "latents": [ZEROS]}, "not both"),
        ({"operation": "encode", "images": [PICTURE, None]}, "row 1: image is missing"),
        ({"operation": "encode", "images": [float("nan")]}, "row 0: image is missing"),
        ({"operation": "encode", "images": ["§§§"]}, "row 0: image is not base64"),
        ({"operation": "encode", "images": ["data:image/png;base64,AA"]}, "not base64"),
        ({"operation": "encode", "images": [""]}, "row 0: image is empty"),
        ({"operation": "encode", "images": ["aGVsbG8="]}, "row 0: image is not an image"),
        ({"operation": "encode", "images": [PICTURE[:80]]}, "row 0: image is"),
        ({"operation": "encode", "images": [BOMB]}, "row 0: image is too many pixels"),
        ({"operation": "interpolate", "images": [PICTURE]}, "needs two rows or more"),
        ({"operation": "interpolate", "latents": [ZEROS] * 2, "path": "jump"}, "path is 'jump'"),
        ({"operation": "interpolate", "latents": [ZEROS] * 2, "num_frames": 1}, "num_frames is 1"),
        ({"operation": "interpolate", "latents": [ZEROS] * 600, "num_frames": 2}, "599 pairs of 2"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(
    model: aegan.AEGAN, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(model, **request_)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_damaged_files_are_read_or_refused(
    model: aegan.AEGAN, position: int, byte: int, cut: int
) -> None:
    content = bytearray(base64.b64decode(PICTURE))
    content[position % len(content)] = byte
    damaged = base64.b64encode(content[: 1 + cut % len(content)]).decode()
    with suppress(ValueError):  # any other exception fails
        [record] = ask(model, "encode", [damaged])
        assert np.isfinite(record["latent"]).all()


def test_a_model_without_encoder_generates_and_refuses_images(gan: aegan.AEGAN) -> None:
    assert len(ask(gan, "generate", count=2)) == 2
    assert len(ask(gan, "interpolate", latents=[ZEROS, [1.0] * LATENT_DIM], num_frames=3)) == 3
    for operation in ("encode", "reconstruct", "interpolate"):
        with pytest.raises(ValueError, match="no encoder"):
            ask(gan, operation, [PICTURE, PICTURE])
