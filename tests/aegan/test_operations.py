"""What a request is answered; over HTTP: tests/pipelines/test_serve.py."""

import base64
import io
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import aegan
from aegan import operations
from tests.latents import add_density, small_density
from tests.trained import write_model

MODEL_SIZE, LATENT_DIM = 16, 8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> aegan.Model:
    return aegan.load(write_model(tmp_path_factory.mktemp("trained") / "model"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> aegan.Model:
    folder = write_model(tmp_path_factory.mktemp("fitted") / "model")
    return aegan.load(add_density(folder, small_density(LATENT_DIM)))


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> aegan.Model:
    """A model of the arm `gan`: it has no encoder."""
    return aegan.load(write_model(tmp_path_factory.mktemp("gan") / "model", encoder=False))


def ask(
    model: aegan.Model, operation: str, images: Any = (), latents: Any = (), **params: Any
) -> list[dict[str, Any]]:
    rows = [*({"image": image} for image in images), *({"latent": z} for z in latents)]
    return operations.operate(model, rows, {"operation": operation, **params})


def to_base64(image: np.ndarray, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def pixels(record: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(record["image"])))))


def pictures(count: int) -> np.ndarray:
    shape = (count, MODEL_SIZE, MODEL_SIZE, 3)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_generate_gives_the_library_s_samples_and_their_latents(model: aegan.Model) -> None:
    records = ask(model, "generate", count=3, seed=5)
    images = torch.stack([pixels(record) for record in records])
    assert torch.equal(images, aegan.sample(model, 3, seed=5))
    again = ask(model, "generate", latents=[record["latent"] for record in records])
    assert again == records


def test_generate_draws_fitted_latents_as_the_library_does(fitted: aegan.Model) -> None:
    given: dict[str, Any] = {"latents": "fitted", "temperature": 0.5, "label": "dogs"}
    params = {"operation": "generate", "count": 3, "seed": 5} | given
    records = operations.operate(fitted, [], params)
    images = torch.stack([pixels(record) for record in records])
    assert torch.equal(images, aegan.sample(fitted, 3, seed=5, **given))
    assert operations.operate(fitted, [], params | {"temperature": 1}) != records
    prior = operations.operate(fitted, [], params_without(params, *given) | {"latents": "prior"})
    expected = aegan.sample(fitted, 3, seed=5, latents="prior")
    assert torch.equal(torch.stack([pixels(record) for record in prior]), expected)


def params_without(params: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name not in names}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latents": "Fitted"}, r'latents is "Fitted"; .* prior, fitted \(nearest: fitted\)'),
        ({"latents": None}, "params.latents is null; expected one of prior, fitted"),
        ({"latents": "prior", "temperature": 1}, "params.temperature is for latents: fitted"),
        (
            {"latents": "prior", "label": "cats"},
            "params.label is given, but this model's prior knows no classes",
        ),
        ({"temperature": True}, "params.temperature is true; expected a number from 0 to 2"),
        ({"temperature": "1"}, 'params.temperature is "1"; expected a number'),
        ({"temperature": 2.5}, "params.temperature is 2.5; expected a number"),
        ({"temperature": 10**400}, "params.temperature is 1000.*; expected a number"),
        ({"label": "cat"}, r'params.label is "cat"; expected one of cats, dogs \(nearest: cats\)'),
        ({"label": ["cats"]}, "params.label is a list"),
        ({"operation": "encode"}, "params.latents belongs to generate, not to encode"),
    ],
)
def test_a_wrong_request_for_fitted_latents_is_answered_with_what_is_wrong(
    fitted: aegan.Model, given: dict[str, Any], message: str
) -> None:
    params = {"operation": "generate", "latents": "fitted"} | given
    with pytest.raises(operations.RequestError, match=message):
        operations.operate(fitted, [], params)


def test_a_label_is_refused_where_the_images_had_none(tmp_path: Path) -> None:
    density = small_density(LATENT_DIM, classes=())
    model = aegan.load(add_density(write_model(tmp_path / "model"), density))
    params = {"operation": "generate", "latents": "fitted", "label": "cats"}
    with pytest.raises(operations.RequestError, match="no class of images has fitted latents"):
        operations.operate(model, [], params)


def test_a_model_without_fitted_latents_says_so(model: aegan.Model) -> None:
    with pytest.raises(operations.RequestError, match="this model has no fitted latents"):
        operations.operate(model, [], {"operation": "generate", "latents": "fitted"})


def test_encode_and_reconstruct_agree_with_the_library(model: aegan.Model) -> None:
    images = pictures(3)
    sent, tensor = [to_base64(image) for image in images], torch.from_numpy(images)
    latents = [record["latent"] for record in ask(model, "encode", sent)]
    assert torch.equal(torch.tensor(latents), aegan.encode(model, tensor))
    reconstructed = torch.stack([pixels(record) for record in ask(model, "reconstruct", sent)])
    assert torch.equal(reconstructed, aegan.reconstruct(model, tensor))


@pytest.mark.parametrize("path", ["slerp", "linear"])
def test_interpolate_walks_from_each_row_to_the_next(model: aegan.Model, path: str) -> None:
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
    model: aegan.Model, kind: str, options: dict[str, Any]
) -> None:
    image = np.full((40, 25, 3), 200, dtype=np.uint8)
    [record] = ask(model, "encode", [to_base64(image, kind, **options)])
    assert len(record["latent"]) == LATENT_DIM


PICTURE = to_base64(pictures(1)[0])
BOMB = to_base64(np.zeros((5000, 5000), dtype=np.uint8))
ZEROS = [0.0] * LATENT_DIM


WRONG = [
    ({"operation": "explode"}, r'params.operation is "explode"; expected one of generate, encode'),
    ({"operation": "Generate"}, r"\(nearest: generate\)"),
    ({"operation": None}, "params.operation is null"),
    ({"operation": ["generate"]}, "params.operation is a list"),
    ({"operation": "generate", "cuont": 2}, r'param "cuont" is unknown; .*\(nearest: count\)'),
    ({"operation": "generate", "count": 0}, "params.count is 0; .* from 1 to 1024"),
    ({"operation": "generate", "count": 1025}, "params.count is 1025"),
    ({"operation": "generate", "count": None}, "params.count is null; expected a whole number"),
    ({"operation": "generate", "count": True}, "params.count is true"),
    ({"operation": "generate", "count": 2.0}, "params.count is 2.0"),
    ({"operation": "generate", "count": "2"}, 'params.count is "2"'),
    ({"operation": "generate", "count": 10**400}, "params.count is 1000"),
    ({"operation": "generate", "seed": -1}, "params.seed is -1"),
    ({"operation": "generate", "num_frames": 3}, "params.num_frames belongs to interpolate"),
    ({"operation": "generate", "count": 1, "latents": [ZEROS]}, "count is for generate without"),
    ({"operation": "generate", "images": [PICTURE]}, "generate takes latents or no rows"),
    ({"operation": "generate", "latents": [ZEROS[1:]]}, "row 0: latent must be a list of 8"),
    ({"operation": "generate", "latents": [ZEROS, None]}, "row 1 has neither image nor latent"),
    ({"operation": "generate", "latents": [[*ZEROS[1:], float("nan")]]}, "row 0: .*finite"),
    ({"operation": "generate", "latents": [[*ZEROS[1:], 1e300]]}, "row 0: .*finite"),
    ({"operation": "generate", "latents": [[*ZEROS[1:], 10**400]]}, "row 0: .*finite"),
    ({"operation": "generate", "latents": [[*ZEROS[1:], [1]]]}, "row 0: latent"),
    ({"operation": "generate", "latents": [[*ZEROS[1:], "x"]]}, "row 0: latent"),
    ({"operation": "generate", "latents": [[*ZEROS[1:], True]]}, "row 0: latent"),
    ({"operation": "generate", "latents": [{}]}, "row 0: latent"),
    ({"operation": "generate", "latents": [ZEROS] * 1025}, "1025 rows given; at most 1024"),
    ({"operation": "encode"}, "encode needs rows with the column image"),
    ({"operation": "reconstruct", "latents": [ZEROS]}, "needs rows with the column image"),
    ({"operation": "encode", "images": [PICTURE], "latents": [ZEROS]}, "row 1 has latent, the row"),
    ({"operation": "encode", "images": [PICTURE, None]}, "row 1 has neither"),
    ({"operation": "encode", "images": [7]}, "row 0: image is 7"),
    ({"operation": "encode", "images": ["§§§"]}, "row 0: image is not base64"),
    ({"operation": "encode", "images": ["data:image/png;base64,AA"]}, "not base64"),
    ({"operation": "encode", "images": [""]}, "row 0: image is .*empty file"),
    ({"operation": "encode", "images": ["aGVsbG8="]}, "row 0: image is not an image"),
    ({"operation": "encode", "images": [PICTURE[:80]]}, "row 0: image is"),
    ({"operation": "encode", "images": [BOMB]}, "row 0: image is too many pixels"),
    ({"operation": "interpolate", "images": [PICTURE]}, "needs two rows or more"),
    ({"operation": "interpolate", "latents": [ZEROS] * 2, "path": "jump"}, 'path is "jump"'),
    ({"operation": "interpolate", "latents": [ZEROS] * 2, "num_frames": 1}, "num_frames is 1"),
    ({"operation": "interpolate", "latents": [ZEROS] * 600, "num_frames": 2}, "be 1198 images"),
]


@pytest.mark.parametrize(("request_", "message"), WRONG)
def test_a_wrong_request_is_answered_with_what_is_wrong(
    model: aegan.Model, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(operations.RequestError, match=message) as raised:
        ask(model, **request_)
    assert len(str(raised.value)) < 250


@pytest.mark.fault("served requests")
@pytest.mark.parametrize("name", ["latents", "Latent", "img", "lat\u202eent", "", "image "])
def test_a_misspelt_column_is_refused_and_never_a_random_face(
    model: aegan.Model, name: str
) -> None:
    with pytest.raises(
        operations.RequestError, match=r"row 0: column .* is unknown; expected one of"
    ):
        operations.operate(model, [{name: ZEROS}], {"operation": "generate"})
    table = {"columns": [name], "data": [[ZEROS]]}
    with pytest.raises(operations.RequestError, match=r"column .* is unknown"):
        operations.answer(model, {"dataframe_split": table, "params": {"operation": "generate"}})


def test_whole_numbers_are_latents_too(model: aegan.Model) -> None:
    whole = ask(model, "generate", latents=[[1] * LATENT_DIM])
    assert whole == ask(model, "generate", latents=[[1.0] * LATENT_DIM])


def test_a_table_of_columns_is_the_same_as_records(model: aegan.Model) -> None:
    params = {"operation": "generate"}
    rows = [{"latent": ZEROS}, {"latent": [1.5] * LATENT_DIM}]
    table = {"columns": ["latent"], "data": [list(row.values()) for row in rows], "index": [0, 1]}
    records = operations.answer(model, {"dataframe_records": rows, "params": params})
    assert operations.answer(model, {"dataframe_split": table, "params": params}) == records


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "the body is a list; expected an object"),
        ({}, "no rows given; expected dataframe_records or dataframe_split"),
        ({"inputs": []}, 'key "inputs" is unknown'),
        ({"instances": [{"latent": ZEROS}]}, 'key "instances" is unknown'),
        ({"dataframe_record": []}, r"\(nearest: dataframe_records\)"),
        ({"dataframe_records": {"latent": [ZEROS]}}, "dataframe_records is an object"),
        (
            {"dataframe_records": [[1]], "params": {"operation": "encode"}},
            "row 0 is a list; expected an object",
        ),
        ({"dataframe_records": [], "dataframe_split": {}}, "dataframe_records and dataframe_split"),
        ({"dataframe_records": [], "params": None}, "params is null; expected an object"),
        ({"dataframe_records": []}, "params.operation is missing"),
        ({"dataframe_split": {"data": [[ZEROS]]}}, "needs the lists columns and data"),
        (
            {"dataframe_split": {"columns": ["latent"], "data": [ZEROS]}},
            "row 0 must be a list of 1",
        ),
        ({"dataframe_split": {"columns": ["latent"] * 2, "data": []}}, "names a column twice"),
        ({"dataframe_split": {"columns": [["latent"]], "data": []}}, "column a list is unknown"),
        ({"dataframe_split": {"columns": [], "data": [[]], "index": []}}, "index of dataframe_sp"),
    ],
)
def test_another_form_of_request_is_refused_in_one_sentence(
    model: aegan.Model, request_: Any, message: str
) -> None:
    with pytest.raises(operations.RequestError, match=message):
        operations.answer(model, request_)


@pytest.mark.fault("served requests")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: expecting value at character 0"),
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 15_000, "nested too deeply"),
        (b"[" * 1_000_000, "more values than 1024 rows of 8 numbers"),
        (b"[" + b"[]," * 2_000_000 + b"1]", "more values"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"9" * 5000, "thousands of digits"),
        (b'{"params": {}, "params": {}}', 'the key "params" stands twice'),
    ],
)
def test_a_body_that_is_no_plain_json_is_refused_before_it_takes_memory(
    content: bytes, message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(operations.RequestError, match=message):
        operations.parse(content, latent_dim=8)
    assert time.monotonic() - started < 1


def test_the_largest_request_is_not_too_many_values() -> None:
    rows = [{"latent": [0.5] * LATENT_DIM}] * operations.MAX_ROWS
    split = {"columns": ["latent"], "data": [[row["latent"]] for row in rows], "index": [0] * 1024}
    for request_ in ({"dataframe_records": rows, "params": {}}, {"dataframe_split": split}):
        assert operations.parse(json.dumps(request_).encode(), latent_dim=LATENT_DIM) == request_


def of_many_scans(side: int, scans: int) -> bytes:
    """A small JPEG whose scans each cost a walk over all its blocks."""
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, "JPEG", progressive=True)
    head, _, scan = content.getvalue()[:-2].rpartition(b"\xff\xda")
    return head + (b"\xff\xda" + scan) * scans + b"\xff\xd9"


@pytest.mark.fault("served requests")
@pytest.mark.parametrize(
    "costly",
    [
        pytest.param((of_many_scans(8192, 99), 1), id="a JPEG of 99 scans"),
        pytest.param((of_many_scans(2048, 60), 300), id="many JPEGs of many scans"),
        pytest.param((of_many_scans(2048, 60)[:-2], 300), id="many that lack their end"),
        pytest.param((b"P3\n1500 1500\n255\n" + b"9 " * 6_750_000, 1), id="a PPM read in Python"),
    ],
)
def test_what_all_pictures_of_a_request_cost_is_bounded_before_any_is_decoded(
    model: aegan.Model, costly: tuple[bytes, int]
) -> None:
    content, rows = costly
    started = time.monotonic()
    with pytest.raises(operations.RequestError, match=r"the images up to row .* pixels to read"):
        ask(model, "encode", [base64.b64encode(content).decode()] * rows)
    assert time.monotonic() - started < 5


def test_as_many_ordinary_pictures_as_a_request_may_have_are_read(model: aegan.Model) -> None:
    picture = to_base64(np.zeros((200, 200, 3), dtype=np.uint8), "JPEG", progressive=True)
    plain = to_base64(np.zeros((256, 256, 3), dtype=np.uint8))
    for image in (picture, plain):
        assert sum(map(len, operations.read_images([image] * 300, model))) == 300
    photograph = Image.new("RGB", (4000, 3000))
    file = io.BytesIO()
    photograph.save(file, "JPEG", progressive=True)
    assert list(operations.read_images([base64.b64encode(file.getvalue()).decode()], model))


def test_an_answer_of_large_images_has_fewer_of_them(
    model: aegan.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "MAX_ANSWER_PIXELS", 5 * MODEL_SIZE**2)
    assert len(ask(model, "generate", count=5)) == 5
    for asked in (
        {"operation": "generate", "count": 6},
        {"operation": "generate", "latents": [ZEROS] * 6},
        {"operation": "reconstruct", "images": [PICTURE] * 6},
        {"operation": "interpolate", "latents": [ZEROS] * 2, "num_frames": 6},
    ):
        with pytest.raises(operations.RequestError, match="6 images of 16x16; at most 5"):
            ask(model, **asked)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_damaged_files_are_read_or_refused(
    model: aegan.Model, position: int, byte: int, cut: int
) -> None:
    content = bytearray(base64.b64decode(PICTURE))
    content[position % len(content)] = byte
    damaged = base64.b64encode(content[: 1 + cut % len(content)]).decode()
    with suppress(operations.RequestError):  # any other exception fails
        [record] = ask(model, "encode", [damaged])
        assert np.isfinite(record["latent"]).all()


def test_a_model_without_encoder_generates_and_refuses_images(gan: aegan.Model) -> None:
    assert len(ask(gan, "generate", count=2)) == 2
    assert len(ask(gan, "interpolate", latents=[ZEROS, [1.0] * LATENT_DIM], num_frames=3)) == 3
    for operation in ("encode", "reconstruct", "interpolate"):
        with pytest.raises(operations.RequestError, match="no encoder"):
            ask(gan, operation, [PICTURE, PICTURE])
