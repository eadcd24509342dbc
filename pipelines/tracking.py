"""The seam to MLflow: store one trained model with all that is known of it, and load it again.

MLflow is imported on first use only: that takes seconds, and its telemetry must be off before.
The store is `MLFLOW_TRACKING_URI`, else a SQLite file in the working folder.
"""

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import aegan
from pipelines import mlflow_files
from pipelines.errors import UserError
from pipelines.files import project_folder

DEFAULT_URI = "sqlite:///mlflow.db"
SERVING_SCRIPT = Path(__file__).with_name("serving.py")
ENVIRONMENT = {  # set unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 wait for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow asks for the commit; a machine without git is fine
}
SQLITE_WAIT_SECONDS = 10
MAX_POINTS, MAX_PARAMS = 1000, 100  # that MLflow takes in one request
MAX_DIGEST = 36  # characters of a data set's hash that MLflow keeps
SERVED_PACKAGES = ("mlflow", "numpy", "pillow", "pyarrow", "safetensors", "torch")


class Point(NamedTuple):
    """One value of a metric's curve."""

    name: str
    value: float
    step: int
    time: float  # seconds since 1970


@dataclass(frozen=True, kw_only=True)
class Record:
    """One trained model and what is known of it."""

    run_name: str
    model_folder: Path
    content_sha256: str  # equal contents share one version
    params: Mapping[str, Any]
    points: Sequence[Point]
    run_tags: Mapping[str, str]
    version_tags: Mapping[str, str]
    dataset: Mapping[str, Any]  # {"name", "sha256", "source", "profile"}
    files: Mapping[str, Sequence[Path]]  # folder among the run's artifacts -> files and folders


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered model version."""

    number: str
    run_id: str
    reused: bool


def set_environment() -> None:
    """Switch MLflow's telemetry and chatter off; has to come before anything imports it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tracking_uri() -> str:
    """Where runs and models are kept."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def without_credentials(text: str) -> str:
    """`https://user:password@host/` => `https://host/`, wherever it stands in a text."""
    return re.sub(r"://[^/\s@]*@", "://", text)


def register(record: Record, *, experiment: str, model_name: str, alias: str) -> Version:
    """Store a record as a run and a model version and point the alias at it; raises UserError.

    The alias is moved last: what it points at is whole. A whole version of the same content is
    reused.
    """
    with _readable_errors():
        mlflow = _import_mlflow()
        client = mlflow.MlflowClient()
        found = _find_version(mlflow, client, model_name, record.content_sha256)
        registered = found or _create_version(mlflow, client, record, experiment, model_name)
        client.set_registered_model_alias(model_name, alias, registered.number)
        return registered


def log_search(
    search: str, *, experiment: str, tags: Mapping[str, Any], files: Sequence[Path]
) -> str:
    """The run that the trials of a search are nested in, with its results; returns the run's id."""
    with _readable_errors():
        mlflow = _import_mlflow()
        client = mlflow.MlflowClient()
        run_id = _search_run(mlflow, client, search, experiment)
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id)
        return run_id


def log_trial(
    name: str,
    *,
    search: str,
    experiment: str,
    params: Mapping[str, Any],
    points: Sequence[Point],
    tags: Mapping[str, str],
) -> None:
    """Store one trial as a run nested in its search's, unless it is there whole; raises UserError.

    A run of that name that was cut off when it was written, or has other tags, is replaced.
    """
    with _readable_errors():
        mlflow = _import_mlflow()
        client = mlflow.MlflowClient()
        parent = _search_run(mlflow, client, search, experiment)
        experiment_id = client.get_run(parent).info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.run_name = '{name}'"
        for run in client.search_runs([experiment_id], query):
            if run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
                return
            client.delete_run(run.info.run_id)
        tags = {**tags, "mlflow.parentRunId": parent}
        run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        _log_numbers(client, run_id, params, points)
        client.set_terminated(run_id)


def _search_run(mlflow: Any, client: Any, search: str, experiment: str) -> str:
    """The id of the run of that name, which is made where there is none."""
    experiment_id = mlflow.set_experiment(experiment).experiment_id
    found = client.search_runs([experiment_id], f"tags.search = '{search}'")
    if found:
        run_id: str = found[0].info.run_id
        return run_id
    made: str = client.create_run(
        experiment_id, tags={"search": search}, run_name=search
    ).info.run_id
    return made


def load_model(uri: str | Path, weights: Literal["ema", "raw"] = "ema") -> aegan.AEGAN:
    """The networks in a folder (`artifacts/train/model`) or MLflow (`models:/aegan@candidate`).

    Raises UserError.
    """
    with _readable_errors(), TemporaryDirectory() as folder:
        path = fetch_model(str(uri), Path(folder)) if is_address(str(uri)) else uri
        return aegan.load(path, weights=weights)


def check_store() -> str:
    """The address of the store, once it has answered this user; raises UserError."""
    with _readable_errors():
        client = _import_mlflow(writing=False).MlflowClient()
        client.search_registered_models(max_results=1)
        return without_credentials(tracking_uri())


def is_address(uri: str) -> bool:
    """Whether a model's address is one of MLflow."""
    return uri.startswith(("models:/", "runs:/"))


def fetch_model(uri: str, folder: Path) -> Path:
    """Download the model folder of `models:/aegan@candidate` below a folder; raises UserError."""
    with _readable_errors():
        artifacts = _import_mlflow(writing=False).artifacts
        return Path(artifacts.download_artifacts(f"{uri}/artifacts/model", dst_path=str(folder)))


def _find_version(mlflow: Any, client: Any, model_name: str, content_sha256: str) -> Version | None:
    """The newest version of that content whose files are still there."""
    query = f"name = '{model_name}' AND tags.content_sha256 = '{content_sha256}'"
    versions = client.search_model_versions(query, order_by=["version_number DESC"])
    for found in versions:
        uri = f"models:/{model_name}/{found.version}"
        files = mlflow.artifacts.list_artifacts(artifact_uri=uri)
        if any(file.path == "MLmodel" for file in files):
            return Version(number=str(found.version), run_id=found.run_id, reused=True)
    return None


def _create_version(
    mlflow: Any, client: Any, record: Record, experiment: str, model_name: str
) -> Version:
    """A run that holds the record, and the model version made from it."""
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=record.run_name, tags=dict(record.run_tags)) as run:
        run_id: str = run.info.run_id
        _log_record(client, run_id, record)
        model = _log_model(mlflow, record.model_folder)
        if not client.search_registered_models(f"name = '{model_name}'"):
            client.create_registered_model(model_name)
        made = client.create_model_version(
            model_name,
            model.model_uri,
            run_id,
            tags={**record.version_tags, "content_sha256": record.content_sha256},
            model_id=model.model_id,
        )
        return Version(number=str(made.version), run_id=run_id, reused=False)


def _log_numbers(
    client: Any, run_id: str, params: Mapping[str, Any], points: Sequence[Point]
) -> None:
    from mlflow.entities import Metric, Param

    all_params = [Param(name, str(value)) for name, value in params.items()]
    for batch in _batches(all_params, MAX_PARAMS):
        client.log_batch(run_id, params=batch)
    metrics = [
        Metric(point.name, point.value, round(point.time * 1000), point.step) for point in points
    ]
    for batch in _batches(metrics, MAX_POINTS):
        client.log_batch(run_id, metrics=batch)


def _log_record(client: Any, run_id: str, record: Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    _log_numbers(client, run_id, record.params, record.points)
    dataset = Dataset(
        name=record.dataset["name"],
        digest=record.dataset["sha256"][:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": record.dataset["source"]}),
        profile=json.dumps(record.dataset["profile"]),
    )
    training = InputTag("mlflow.data.context", "training")
    client.log_inputs(run_id, [DatasetInput(dataset, [training])])
    for folder, paths in record.files.items():
        for path in paths:
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(run_id, str(path), folder)


def _log_model(mlflow: Any, folder: Path) -> Any:
    """The model as MLflow keeps it: weights, our package, the serving script; nothing pickled."""
    import pandas as pd

    from pipelines import serving

    zeros = [0.0] * aegan.load(folder).latent_dim
    return mlflow.pyfunc.log_model(
        name="model",
        python_model=str(SERVING_SCRIPT),
        artifacts={"model": os.path.relpath(folder)},
        code_paths=[str(Path(aegan.__file__).parent)],
        signature=serving.SIGNATURE,
        input_example=(pd.DataFrame({"latent": [zeros]}), {"operation": "generate"}),
        pip_requirements=[
            f"{package}=={version(package).split('+')[0]}" for package in SERVED_PACKAGES
        ],
    )


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _import_mlflow(*, writing: bool = True) -> Any:
    """MLflow with its telemetry and chatter off, pointed at a store that is known to answer."""
    set_environment()
    given, uri = os.environ.get("MLFLOW_TRACKING_URI"), tracking_uri()
    local = uri.startswith("sqlite:///")
    if local:
        path = project_folder() / uri.removeprefix("sqlite:///")
        _check_sqlite(path, writing=writing)
        mlflow_files.adopt(path)
        uri = f"sqlite:///{path}"  # MLflow caches stores by URI, whatever the folder
    import mlflow

    for chatty in ("alembic", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)  # which writes the variable: it is the user's, put it back
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if given is not None:
        os.environ["MLFLOW_TRACKING_URI"] = given
    if local:
        with chdir(path.parent):  # where MLflow opens a store it will keep the files
            mlflow.MlflowClient().search_experiments(max_results=1)
    return mlflow


def _check_sqlite(path: Path, *, writing: bool) -> None:
    """A missing, locked or damaged file is found in seconds; MLflow itself retries for minutes."""
    if not path.exists():
        if writing:
            return
        raise UserError(
            f"{path} not found: run from the project's root folder after `make run`, or set "
            "MLFLOW_TRACKING_URI to a server"
        )
    try:
        with closing(sqlite3.connect(path, timeout=SQLITE_WAIT_SECONDS)) as database:
            if writing:
                database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master")
            database.rollback()
    except sqlite3.Error as error:
        raise UserError(
            f"{path}: {error}; close the program that uses it, or move the file away and register "
            "again"
        ) from None


@contextmanager
def _readable_errors() -> Iterator[None]:
    """What MLflow and its stores raise, as one line that names the store and holds no password."""
    try:
        yield
    except UserError:
        raise
    except aegan.ModelError as error:
        raise UserError(str(error)) from None
    except Exception as error:
        of_a_store = type(error).__module__.startswith(("mlflow.", "sqlalchemy.", "botocore."))
        if not (of_a_store or isinstance(error, (OSError, ModuleNotFoundError))):
            raise
        where = without_credentials(tracking_uri())
        reason = without_credentials(f"{error}\n".splitlines()[0]).split(" with url:")[0][:300]
        raise UserError(f"MLflow at {where}: {reason}; {_cure(reason)}") from error


def _cure(reason: str) -> str:
    if "Invalid Host header" in reason:
        return "let the server accept this host name (`mlflow server --allowed-hosts HOST:PORT`)"
    if "error code 401" in reason or "error code 403" in reason:
        return "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
    if "error code 404" in reason or "failed with exception" in reason:
        return "is MLFLOW_TRACKING_URI right, and an MLflow server running there?"
    return "see docs/serving.md"
