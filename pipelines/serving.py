"""What `mlflow models serve` runs: generate, encode, reconstruct, interpolate (docs/serving.md).

MLflow keeps this file beside the model and executes it on loading ("models from code"), so nothing
is unpickled; the package `aegan` travels along, and nothing else of ours is needed. Requests come
from outside: whatever is wrong with one is answered with status 400 and one sentence.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from torch import Tensor

import aegan
from aegan.image_files import UnusableImageError, decode_image
from aegan.images import to_pil

MAX_IMAGES = 1024  # rows of a request, and images of a response
MAX_PIXELS = 4096 * 4096  # of one image received, and of a JPEG after its reduction
MAX_LATENT = 1e6  # largest magnitude of a coordinate: beyond it float32 squares overflow
PATHS = ("slerp", "linear")

COLUMNS = Schema(
    [
        ColSpec(DataType.string, "image", required=False),  # base64 of an image file
        ColSpec(Array(DataType.double), "latent", required=False),  # latent_dim numbers
    ]
)
SIGNATURE = ModelSignature(
    inputs=COLUMNS,
    outputs=COLUMNS,
    params=ParamSchema(
        [
            ParamSpec("operation", DataType.string, None),  # must be given
            ParamSpec("count", DataType.long, 1),  # generate without latents
            ParamSpec("seed", DataType.long, 0),  # generate without latents
            ParamSpec("num_frames", DataType.long, 8),  # interpolate
            ParamSpec("path", DataType.string, "slerp"),  # interpolate
        ]
    ),
)


class Service(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined, unused-ignore]
    """The model behind the endpoint `/invocations`."""

    def load_context(self, context: Any) -> None:
        self.model = aegan.load(context.artifacts["model"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Rows with `image` or `latent` (a DataFrame) => records with `image` and/or `latent`."""
        images = model_input["image"].tolist() if "image" in model_input else []
        latents = model_input["latent"].tolist() if "latent" in model_input else []
        try:
            return answer(self.model, images, latents, **(params or {}))
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def answer(
    model: aegan.AEGAN,
    images: Sequence[Any],
    latents: Sequence[Any],
    *,
    operation: str | None,
    count: int,
    seed: int,
    num_frames: int,
    path: str,
) -> list[dict[str, Any]]:
    """One operation on images (base64) or latents (lists) => records; raises ValueError."""
    if len(images) and len(latents):
        raise ValueError("give the column image or the column latent, not both")
    if len(images) > MAX_IMAGES or len(latents) > MAX_IMAGES:
        raise ValueError(f"{max(len(images), len(latents))} rows; at most {MAX_IMAGES} are allowed")
    match operation:
        case "generate":
            if len(images):
                raise ValueError("generate takes latents or no rows; reconstruct takes images")
            if len(latents):
                z = read_latents(latents, latent_dim=model.latent_dim)
            else:
                _check_range("count", count, 1, MAX_IMAGES)
                _check_range("seed", seed, 0, 2**63 - 1)
                z = aegan.random_latents(count, model.latent_dim, seed=seed)
            return to_records(images=aegan.decode(model, z), latents=z)
        case "encode":
            return to_records(latents=aegan.encode(model, read_images(images, model)))
        case "reconstruct":
            return to_records(images=aegan.reconstruct(model, read_images(images, model)))
        case "interpolate":
            return _interpolate(model, images, latents, num_frames=num_frames, path=path)
    raise ValueError(
        f"params.operation is {operation!r}; allowed: generate, encode, reconstruct, interpolate"
    )


def _interpolate(
    model: aegan.AEGAN, images: Sequence[Any], latents: Sequence[Any], *, num_frames: int, path: str
) -> list[dict[str, Any]]:
    """Frames from each row to the next, pair after pair."""
    pairs = max(len(images), len(latents)) - 1
    if pairs < 1:
        raise ValueError("interpolate needs two rows or more, all images or all latents")
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; allowed: {', '.join(PATHS)}")
    _check_range("num_frames", num_frames, 2, MAX_IMAGES)
    if pairs * num_frames > MAX_IMAGES:
        raise ValueError(f"{pairs} pairs of {num_frames} frames: more than {MAX_IMAGES} images")
    if len(images):
        z = aegan.encode(model, read_images(images, model))
    else:
        z = read_latents(latents, latent_dim=model.latent_dim)
    frames = aegan.interpolate(
        model, z[:-1], z[1:], num_frames=num_frames, path="slerp" if path == "slerp" else "linear"
    )
    return to_records(images=frames.flatten(0, 1))


def read_images(rows: Sequence[Any], model: aegan.AEGAN) -> Tensor:
    """Base64 of image files, cropped and resized to the model's size => uint8 [N, H, W, C]."""
    if not len(rows):
        raise ValueError("this operation needs the column image: base64 of image files")
    images = [_read_image(text, row, model) for row, text in enumerate(rows)]
    return torch.from_numpy(np.stack(images))


def _read_image(text: Any, row: int, model: aegan.AEGAN) -> np.ndarray:
    if not isinstance(text, str):
        raise ValueError(f"row {row}: image is missing; expected base64 of an image file")
    try:
        return decode_image(
            base64.b64decode(text, validate=True),
            image_size=model.image_size,
            image_channels=model.image_channels,
            fit=model.fit,
            max_pixels=MAX_PIXELS,
            value_range=model.value_range,
        )
    except UnusableImageError as error:
        raise ValueError(f"row {row}: image is {error}") from None
    except ValueError:
        raise ValueError(f"row {row}: image is not base64 (no line breaks, no prefix)") from None


def read_latents(rows: Sequence[Any], *, latent_dim: int) -> Tensor:
    """Lists of numbers => float32 [N, latent_dim]."""
    return torch.from_numpy(
        np.stack([_read_latent(values, row, latent_dim) for row, values in enumerate(rows)])
    )


def _read_latent(values: Any, row: int, latent_dim: int) -> np.ndarray:
    try:
        z = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        z = np.empty(0)
    if z.shape != (latent_dim,):
        raise ValueError(f"row {row}: latent must be a list of {latent_dim} numbers")
    if not (np.abs(z) <= MAX_LATENT).all():  # NaN compares false
        raise ValueError(f"row {row}: latent must hold finite numbers of at most {MAX_LATENT:g}")
    return z.astype(np.float32)


def to_records(
    *, images: Tensor | None = None, latents: Tensor | None = None
) -> list[dict[str, Any]]:
    """uint8 [N, H, W, C] and/or float32 [N, latent_dim] => N records of plain JSON values."""
    columns: dict[str, list[Any]] = {}
    if images is not None:
        columns["image"] = [_to_base64(image) for image in images.numpy()]
    if latents is not None:
        columns["latent"] = latents.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _to_base64(image: np.ndarray) -> str:
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _check_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name} is {value}; it must lie between {lowest} and {highest}")


mlflow.models.set_model(Service())
