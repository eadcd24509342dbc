"""The model as MLflow keeps and serves it: generate, encode, reconstruct, interpolate.

MLflow keeps this file beside the model and executes it on loading ("models from code"), so nothing
is unpickled; the package `aegan` travels along, and nothing else of ours is needed. `make serve`
does not run it: that is pipelines/serve.py, with the same requests and answers (docs/serving.md).
"""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

import aegan
from aegan import operations

# No schema of the inputs: MLflow drops columns that it does not name and refuses whole numbers,
# before the model sees them. Params without a default: what was not given must be known.
SIGNATURE = ModelSignature(
    outputs=Schema(
        [
            ColSpec(DataType.string, "image", required=False),  # base64 of a PNG
            ColSpec(Array(DataType.double), "latent", required=False),  # latent_dim numbers
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("operation", DataType.string, None),
            ParamSpec("count", DataType.long, None),
            ParamSpec("seed", DataType.long, None),
            ParamSpec("latents", DataType.string, None),
            ParamSpec("temperature", DataType.double, None),
            ParamSpec("label", DataType.string, None),
            ParamSpec("num_frames", DataType.long, None),
            ParamSpec("path", DataType.string, None),
        ]
    ),
)


class Service(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined, unused-ignore]
    """The model behind the endpoint `/invocations` of `mlflow models serve`."""

    def load_context(self, context: Any) -> None:
        self.model = aegan.load(context.artifacts["model"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """A DataFrame or records with `image` or `latent` => records with `image` and/or `latent`.

        What MLflow does with other exceptions is to send their traceback to the one who asked.
        """
        given = {name: _plain(value) for name, value in (params or {}).items() if value is not None}
        try:
            return operations.operate(self.model, _rows(model_input), given)
        except operations.RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except Exception as error:
            raise MlflowException(f"the model failed: {type(error).__name__}") from error


def _rows(model_input: pd.DataFrame | list[Any]) -> list[Any]:
    """Rows as a request states them: pandas fills what a row does not have with NaN."""
    if isinstance(model_input, pd.DataFrame):
        model_input = model_input.to_dict("records")
    if not isinstance(model_input, list):
        raise operations.RequestError("send rows as dataframe_records or dataframe_split")
    return [
        {name: _plain(value) for name, value in row.items() if not _is_missing(value)}
        if isinstance(row, dict)
        else row
        for row in model_input
    ]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


mlflow.models.set_model(Service())
