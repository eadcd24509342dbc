"""Requests of plain JSON values -> answers of plain JSON values, within limits (docs/serving.md).

A request names an operation, rows and settings. It is answered as it was asked or refused with one
sentence, a `RequestError`: a name, a type or a value that is not understood is never passed over.
What a request may cost is known before any picture is decoded. How requests travel is the business
of others: `pipelines/serve.py` over HTTP, `pipelines/registry/model_from_code.py` within MLflow.

An answer is made in steps: each asks for one pass of a network, so that whoever takes the steps may
put the passes of several requests together (`pipelines/serving/batching.py`).
"""

import base64
import io
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor

from aegan.data.image_files import UnusableImageError, work_of
from aegan.model_folder import Model
from aegan.networks import AEGAN
from aegan.pictures import to_pil
from aegan.sampling import (
    MAX_SEED,
    MAX_TEMPERATURE,
    NO_DENSITY,
    InterpolationPath,
    Latents,
    decode,
    default_latents,
    encode,
    latent_paths,
    random_latents,
)

BATCH_SIZE = 64  # rows of one pass of a network, and pictures of a request in memory at once
MAX_ROWS = 1024  # of a request, and images of an answer
MAX_ANSWER_PIXELS = 1 << 23  # of all images of an answer together: 1024 of 90x90, 128 of 256x256
MAX_PIXELS = 4096 * 4096  # of one image received, and of a JPEG after its reduction
MAX_WORK = 1 << 27  # of all images received together, as `work_of` counts: a few seconds
MAX_LATENT = 1e6  # largest magnitude of a coordinate: beyond it float32 squares overflow
MAX_SHOWN = 40  # characters of a request that an answer repeats
MAX_NAMES = 50  # valid names in an answer

NO_CLASSES: dict[Latents, str] = {
    "prior": "this model's prior knows no classes",
    "fitted": "no class of images has fitted latents",
}
COLUMNS = ("image", "latent")
PARAMS: dict[str, tuple[str, ...]] = {  # operation => what else may stand beside it
    "generate": ("count", "seed", "latents", "temperature", "label"),
    "encode": (),
    "reconstruct": (),
    "interpolate": ("num_frames", "path"),
}
DEFAULTS: dict[str, Any] = {
    "count": 1,
    "seed": 0,
    "temperature": 1.0,
    "num_frames": 8,
    "path": "slerp",
}
SETTINGS = tuple(name for names in PARAMS.values() for name in names)
FORMS = ("dataframe_records", "dataframe_split")

Record = dict[str, Any]
Result = TypeVar("Result")
Network = Literal["encode", "decode"]
# Gives a network and up to BATCH_SIZE inputs, takes its outputs; ends with the result.
Steps = Generator[tuple[Network, Tensor], Tensor, Result]


class RequestError(ValueError):
    """Why a request cannot be answered, in one sentence fit for the one who asked."""


def parse(content: bytes, *, latent_dim: int) -> Any:
    """Strict JSON in UTF-8: no key twice, no NaN, no more values than a request can need."""
    values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_ROWS * (latent_dim + 8):  # before any of them takes its memory
        raise RequestError(
            f"the body holds more values than {MAX_ROWS} rows of {latent_dim} numbers need"
        )
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number
        )
    except RequestError:
        raise
    except UnicodeDecodeError:
        raise RequestError("the body is not JSON: it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not JSON: {error.msg.lower()} at character {error.pos}"
        ) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError:  # of Python's limit on digits
        raise RequestError("the body holds a number of thousands of digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the key {_shown(twice)} stands twice in one object")
    return found


def _no_number(name: str) -> None:
    raise RequestError(f"{name} is no JSON number")


def answer(model: Model, request: Any) -> list[Record]:
    """A parsed body, `{"dataframe_records": [...], "params": {...}}` => its records."""
    return operate(model, *rows_and_params(request))


def rows_and_params(request: Any) -> tuple[list[Any], Any]:
    """What `operate` takes, of a parsed body; raises RequestError."""
    if not isinstance(request, dict):
        raise RequestError(f"the body is {_shown(request)}; expected an object")
    _check_names("key", request, (*FORMS, "params"))
    forms = [form for form in FORMS if form in request]
    if len(forms) != 1:
        raise RequestError(
            f"{' and '.join(forms) or 'no rows'} given; expected {' or '.join(FORMS)}, also when "
            "it is empty"
        )
    [form] = forms
    rows = (_records if form == FORMS[0] else _split)(request[form])
    return rows, request.get("params", {})


def _records(rows: Any) -> list[Any]:
    if not isinstance(rows, list):
        raise RequestError(f"dataframe_records is {_shown(rows)}; expected a list of objects")
    return rows


def _split(table: Any) -> list[Any]:
    """`{"columns": [...], "data": [[...], ...]}`, with or without "index" => rows."""
    if not isinstance(table, dict):
        raise RequestError(f"dataframe_split is {_shown(table)}; expected an object")
    _check_names("key", table, ("columns", "data", "index"))
    columns, data = table.get("columns"), table.get("data")
    if not isinstance(columns, list) or not isinstance(data, list):
        raise RequestError("dataframe_split needs the lists columns and data")
    _check_names("column", columns, COLUMNS)
    if len(set(columns)) < len(columns):
        raise RequestError("dataframe_split names a column twice")
    for number, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestError(f"row {number} must be a list of {len(columns)} values")
    index = table.get("index")
    if index is not None and not (isinstance(index, list) and len(index) == len(data)):
        raise RequestError("the index of dataframe_split must be as long as its data")
    return [dict(zip(columns, row, strict=True)) for row in data]


def operate(model: Model, rows: Sequence[Any], params: Any) -> list[Record]:
    """Rows with an image or a latent each, and `{"operation": ...}` with its settings => records.

    Raises RequestError.
    """
    work = steps(model, rows, params)
    try:
        network, inputs = next(work)
        while True:
            network, inputs = work.send(run(model, network, inputs))
    except StopIteration as end:
        return cast(list[Record], end.value)


def run(model: AEGAN, network: Network, inputs: Tensor) -> Tensor:
    """One pass of a network: uint8 images => latents, or latents => uint8 images."""
    return encode(model, inputs) if network == "encode" else decode(model, inputs)


def steps(model: Model, rows: Sequence[Any], params: Any) -> Steps[list[Record]]:
    """The same as `operate`, but for the passes of the networks, which are asked for."""
    operation, settings = _read_params(params)
    column, values = _read_rows(rows)
    if operation in ("encode", "reconstruct") and column != "image":
        raise RequestError(f"{operation} needs rows with the column image")
    if column == "image" and model.encoder is None:
        raise RequestError(
            "this model has no encoder and takes latents only: it was trained as a plain GAN"
        )
    match operation:
        case "generate":
            z = _latents_to_draw(model, column, values, settings)
            return to_records(images=(yield from _decode(z)), latents=z)
        case "encode":
            return to_records(latents=(yield from _encode(model, values)))
        case "reconstruct":
            _check_answer(model, len(values))
            z = yield from _encode(model, values)
            return to_records(images=(yield from _decode(z)))
        case _:
            return (yield from _interpolate(model, column, values, settings))


def _encode(model: Model, images: list[Any]) -> Steps[Tensor]:
    """Base64 of image files => float32 [N, latent_dim]."""
    latents = []
    for batch in read_images(images, model):
        latents.append((yield "encode", batch))
    return torch.cat(latents)


def _decode(z: Tensor) -> Steps[list[str]]:
    """Latents [N, latent_dim] => base64 of PNG files."""
    files: list[str] = []
    for batch in z.split(BATCH_SIZE):
        images = yield "decode", batch
        files += [_to_base64(image) for image in images.numpy()]
    return files


def _read_params(params: Any) -> tuple[str, dict[str, Any]]:
    """The operation, and the other params that were given."""
    if not isinstance(params, Mapping):
        raise RequestError(f"params is {_shown(params)}; expected an object")
    _check_names("param", params, ("operation", *SETTINGS))
    operation = params.get("operation")
    if "operation" not in params:
        raise RequestError(f"params.operation is missing; expected one of {', '.join(PARAMS)}")
    if not isinstance(operation, str) or operation not in PARAMS:
        raise RequestError(
            f"params.operation is {_shown(operation)}; {_expected(operation, tuple(PARAMS))}"
        )
    settings = {name: value for name, value in params.items() if name != "operation"}
    for name in settings:
        if name not in PARAMS[operation]:
            owner = next(other for other, names in PARAMS.items() if name in names)
            raise RequestError(f"params.{name} belongs to {owner}, not to {operation}")
    return operation, settings


def _read_rows(rows: Sequence[Any]) -> tuple[str, list[Any]]:
    """The one column of all rows, "" without rows, and its values."""
    if len(rows) > MAX_ROWS:
        raise RequestError(f"{len(rows)} rows given; at most {MAX_ROWS} are allowed")
    column, values = "", []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise RequestError(f"row {number} is {_shown(row)}; expected an object")
        _check_names(f"row {number}: column", row, COLUMNS)
        given = [name for name in COLUMNS if row.get(name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"row {number} has {'both' if given else 'neither'} image "
                f"{'and' if given else 'nor'} latent; expected one of them"
            )
        if given[0] != (column or given[0]):
            raise RequestError(f"row {number} has {given[0]}, the rows before it {column}")
        column = given[0]
        values.append(row[column])
    return column, values


def _latents_to_draw(
    model: AEGAN, column: str, values: list[Any], settings: Mapping[str, Any]
) -> Tensor:
    """Those given, or random ones."""
    if column == "image":
        raise RequestError("generate takes latents or no rows; reconstruct takes images")
    if values and settings:
        raise RequestError(f"params.{min(settings)} is for generate without rows")
    if values:
        _check_answer(model, len(values))
        return read_latents(values, latent_dim=model.latent_dim)
    count = _whole_number(settings, "count", 1, MAX_ROWS)
    seed = _whole_number(settings, "seed", 0, MAX_SEED)
    _check_answer(model, count)
    return _draw(model, count, seed, settings)


def _draw(model: AEGAN, count: int, seed: int, settings: Mapping[str, Any]) -> Tensor:
    """Random latents [count, latent_dim] of the prior or of the fitted density."""
    allowed = get_args(Latents)
    latents = cast(Latents, _one_of(settings, "latents", allowed, default_latents(model)))
    density = model.latent_density
    if latents == "fitted" and density is None:
        raise RequestError(NO_DENSITY)
    chosen: dict[str, Any] = {}
    if "temperature" in settings:
        chosen["temperature"] = temperature = settings["temperature"]
        if latents == "prior":
            raise RequestError("params.temperature is for latents: fitted, not for the prior")
        if type(temperature) not in (int, float) or not 0 <= temperature <= MAX_TEMPERATURE:
            raise RequestError(
                f"params.temperature is {_shown(temperature)}; expected a number from 0 to "
                f"{MAX_TEMPERATURE:g}"
            )
    if "label" in settings:
        of_density = density.classes if density is not None else ()
        classes = of_density if latents == "fitted" else model.classes
        if not classes:
            raise RequestError(f"params.label is given, but {NO_CLASSES[latents]}")
        chosen["label"] = _one_of(settings, "label", classes)
    return random_latents(model, count, seed=seed, latents=latents, **chosen)


def _interpolate(
    model: Model, column: str, values: list[Any], settings: Mapping[str, Any]
) -> Steps[list[Record]]:
    """Frames from each row to the next, pair after pair."""
    pairs = len(values) - 1
    if pairs < 1:
        raise RequestError("interpolate needs two rows or more, all images or all latents")
    path = _one_of(settings, "path", get_args(InterpolationPath), DEFAULTS["path"])
    num_frames = _whole_number(settings, "num_frames", 2, MAX_ROWS)
    _check_answer(model, pairs * num_frames)
    if column == "image":
        z = yield from _encode(model, values)
    else:
        z = read_latents(values, latent_dim=model.latent_dim)
    paths = latent_paths(
        model, z[:-1], z[1:], num_frames=num_frames, path=cast(InterpolationPath, path)
    )
    return to_records(images=(yield from _decode(paths.flatten(0, 1))))


def _check_answer(model: AEGAN, images: int) -> None:
    most = min(MAX_ROWS, max(1, MAX_ANSWER_PIXELS // model.image_size**2))
    if images > most:
        raise RequestError(
            f"the answer would be {images} images of {model.image_size}x{model.image_size}; "
            f"at most {most} are allowed"
        )


def read_images(rows: Sequence[Any], model: Model) -> Iterator[Tensor]:
    """Base64 of image files, cropped and resized to the model's size => batches [N, H, W, C].

    All together are known to be affordable before the first is decoded.
    """
    files, work = [], 0
    for row, text in enumerate(rows):
        content = _content_of(text, row)
        with _about_image(row):
            work += work_of(content, enough=MAX_WORK)
        if work > MAX_WORK:
            raise RequestError(
                f"the images up to row {row} have more than {MAX_WORK} pixels to read, where a "
                "JPEG counts once for each of its scans and other formats at least twice; send "
                "fewer or smaller ones"
            )
        files.append(content)
    for start in range(0, len(files), BATCH_SIZE):
        images = []
        for row, content in enumerate(files[start : start + BATCH_SIZE], start):
            with _about_image(row):
                images.append(model.form.decode(content, max_pixels=MAX_PIXELS))
        yield torch.from_numpy(np.stack(images))


def _content_of(text: Any, row: int) -> bytes:
    if not isinstance(text, str):
        raise RequestError(f"row {row}: image is {_shown(text)}; expected base64 of an image file")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise RequestError(f"row {row}: image is not base64 (no line breaks, no prefix)") from None


@contextmanager
def _about_image(row: int) -> Iterator[None]:
    try:
        yield
    except UnusableImageError as error:
        raise RequestError(f"row {row}: image is {error}") from None


def read_latents(rows: Sequence[Any], *, latent_dim: int) -> Tensor:
    """Lists of numbers => float32 [N, latent_dim]."""
    return torch.tensor([_read_latent(values, row, latent_dim) for row, values in enumerate(rows)])


def _read_latent(values: Any, row: int, latent_dim: int) -> list[float]:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not numbers or len(values) != latent_dim:
        raise RequestError(f"row {row}: latent must be a list of {latent_dim} numbers")
    if not all(-MAX_LATENT <= value <= MAX_LATENT for value in values):  # NaN compares false
        raise RequestError(f"row {row}: latent must hold finite numbers of at most {MAX_LATENT:g}")
    return [float(value) for value in values]


def to_records(*, images: list[str] | None = None, latents: Tensor | None = None) -> list[Record]:
    """Files in base64 and/or float32 [N, latent_dim] => N records of plain JSON values."""
    columns: dict[str, list[Any]] = {}
    if images is not None:
        columns["image"] = images
    if latents is not None:
        columns["latent"] = latents.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _to_base64(image: np.ndarray) -> str:
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _whole_number(settings: Mapping[str, Any], name: str, lowest: int, highest: int) -> int:
    value = settings.get(name, DEFAULTS[name])
    if type(value) is not int or not lowest <= value <= highest:  # true is no number
        raise RequestError(
            f"params.{name} is {_shown(value)}; expected a whole number from {lowest} to {highest}"
        )
    return value


def _one_of(
    settings: Mapping[str, Any], name: str, allowed: Sequence[str], default: Any = None
) -> str:
    value = settings.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise RequestError(f"params.{name} is {_shown(value)}; {_expected(value, allowed)}")
    return value


def _check_names(what: str, names: Iterable[Any], valid: Sequence[str]) -> None:
    for name in names:
        if name not in valid:
            raise RequestError(f"{what} {_shown(name)} is unknown; {_expected(name, valid)}")


def _expected(name: Any, valid: Sequence[str]) -> str:
    """The valid names, and which of them may be meant."""
    near = get_close_matches(str(name)[:MAX_SHOWN].lower(), valid, n=1)
    some = ", ".join(valid[:MAX_NAMES])
    return f"expected one of {some}{f' (nearest: {near[0]})' if near else ''}"


def _shown(value: Any) -> str:
    """A value as it stands in JSON, in ASCII; what is long or nested by its kind or its start."""
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else "a list"
    text = json.dumps(value[:MAX_SHOWN] if isinstance(value, str) else value, default=str)
    return text if len(text) <= 2 * MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
