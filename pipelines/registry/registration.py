"""One trained model with all that is known of it, as a run and a version in MLflow.

A registration that is cut off anywhere leaves nothing that a later one does not take away, and
however many register one content, one version of it remains (docs/reliability.md).
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aegan
from pipelines.base import package
from pipelines.base.errors import UserError
from pipelines.registry import mlflow_store
from pipelines.registry.live_run import REGISTERED
from pipelines.registry.mlflow_runs import (
    Point,
    create_run,
    log_numbers,
    make_experiment,
    remove_run,
)
from pipelines.registry.mlflow_store import (
    alone,
    check_place,
    open_store,
    quoted,
    readable_errors,
    twice,
    unless_there,
)
from pipelines.registry.standing import MAX_DESCRIPTION
from pipelines.registry.tracking import CARD, NETWORKS, PICTURES, open_repository

SERVING_SCRIPT = Path(__file__).with_name("model_from_code.py")
MAX_DIGEST = 36  # characters of a data set's hash that MLflow keeps
SERVED_PACKAGES = (
    "annotated-types", "mlflow", "numpy", "pillow", "pyarrow", "safetensors", "torch",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Record:
    """One trained model and what is known of it."""

    run_name: str
    model_folder: Path
    content_sha256: str  # equal contents share one version
    params: Mapping[str, Any]
    curves: Sequence[Point]
    scores: Sequence[Point]
    run_tags: Mapping[str, str]
    version_tags: Mapping[str, str]
    dataset: Mapping[str, Any]  # {"name", "sha256", "source", "profile"}
    files: Mapping[str, Sequence[Path]]  # folder among the run's artifacts -> files and folders
    card: str  # Markdown, with the pictures
    description: str  # the same without them, of the version
    pictures: Sequence[Path]  # beside the card, in PICTURES
    networks: Sequence[Path]  # ONNX files, in NETWORKS


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered model version."""

    number: str
    run_id: str
    reused: bool


def register(
    record: Record, *, experiment: str, model_name: str, alias: str, live_run: str = ""
) -> Version:
    """Store a record as a run and a model version and point the alias at it; raises UserError.

    The run with the id `live_run` has the curves already and gets the rest. The alias is moved
    last: what it points at is whole. A whole version of the same content is reused.
    """
    with readable_errors(), alone():
        mlflow = open_store()
        client = mlflow.MlflowClient()
        identity = {"content_sha256": record.content_sha256, REGISTERED: model_name}
        if mlflow_store.database_file():  # we are alone: whatever is unfinished was cut off
            _end_unfinished(client, experiment, {})
        registered = _find_version(client, model_name, record.content_sha256)
        if not registered:
            registered = _create_version(
                *(mlflow, client, record, experiment, model_name, identity), live_run=live_run
            )
        _end_unfinished(client, experiment, identity)
        twice(client.set_registered_model_alias, model_name, alias, registered.number)
        return registered


def _find_version(client: Any, model_name: str, content_sha256: str) -> Version | None:
    """The first version of that content whose files are still there.

    The first: numbers only grow, so that all who register one content at once agree on it.
    UserError for one whose files are to lie elsewhere.
    """
    query = f"name = {quoted(model_name)} AND tags.content_sha256 = '{content_sha256}'"
    for found in client.search_model_versions(query, order_by=["version_number ASC"]):
        files, _ = open_repository(client, f"models:/{model_name}/{found.version}")
        if any(file.path == "MLmodel" for file in files.list_artifacts()):
            return Version(number=str(found.version), run_id=found.run_id, reused=True)
    return None


def _create_version(
    mlflow: Any,
    client: Any,
    record: Record,
    experiment: str,
    model_name: str,
    identity: Mapping[str, str],
    *,
    live_run: str,
) -> Version:
    """A run that holds the record, and the model version made from it.

    A server may get the same from another machine meanwhile: the first version counts, and the
    other is taken back here, by whoever made it.
    """
    experiment_id = make_experiment(mlflow, experiment)
    tags = {**record.run_tags, **identity}
    run, points = _adopt(client, live_run, record, experiment_id, tags), record.scores
    if not run:
        run = create_run(client, experiment_id, record.run_name, tags)
        points = [*record.curves, *record.scores]
    try:
        with _failed_unless_done(client, run):
            _log_record(client, run.info.run_id, record, points)
            model_id = _log_model(mlflow, client, run, record)
            with unless_there():
                client.create_registered_model(model_name)
            client.create_model_version(
                model_name,
                f"models:/{model_id}",
                run.info.run_id,
                tags={**record.version_tags, "content_sha256": record.content_sha256},
                description=record.description[:MAX_DESCRIPTION],
                model_id=model_id,
            )
            client.set_terminated(run.info.run_id)
    except mlflow.MlflowException:
        # Who registered the same content first has taken our unfinished run away: theirs it is.
        first = _find_version(client, model_name, record.content_sha256)
        if not first or first.run_id == run.info.run_id:
            raise
        _delete_versions(client, model_name, run, keep=first)
        return first
    first = _find_version(client, model_name, record.content_sha256)
    if not first:
        raise UserError(
            f"{model_name}: the version that was just made is not there any more: another program "
            "has deleted it; run the same command again"
        )
    _delete_versions(client, model_name, run, keep=first)
    if first.run_id != run.info.run_id:
        remove_run(client, run)
        return first
    return replace(first, reused=False)


def _adopt(
    client: Any, run_id: str, record: Record, experiment_id: str, tags: Mapping[str, str]
) -> Any:
    """The run that the training has filled, marked as one that is being registered.

    None without one, or if it says something else than the record: MLflow changes no parameter.
    UserError if its files are to lie elsewhere.
    """
    run = client.get_run(run_id) if run_id else None
    if (
        not run
        or REGISTERED in run.data.tags
        or run.info.experiment_id != experiment_id
        or any(run.data.params.get(name, str(v)) != str(v) for name, v in record.params.items())
    ):
        return None
    check_place(run.info.artifact_uri, f"the run {run_id}")
    client.update_run(run_id, "RUNNING")  # first: what is marked and not finished was cut off
    log_numbers(client, run_id, tags=tags)
    return run


@contextmanager
def _failed_unless_done(client: Any, run: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the error above is the one to tell
            client.set_terminated(run.info.run_id, "FAILED")
        raise


def _delete_versions(client: Any, model_name: str, run: Any, *, keep: Version) -> None:
    """Delete what was made from a run, but for the version that counts, and decisions about it.

    A server may have made one although it answered with an error, or two where a request was sent
    again.
    """
    for made in client.search_model_versions(f"run_id = '{run.info.run_id}'"):
        if made.name == model_name and str(made.version) != keep.number:
            client.delete_model_version(made.name, made.version)


def _end_unfinished(client: Any, experiment: str, identity: Mapping[str, str]) -> None:
    """Take away runs with these tags that were cut off; one that has its version is whole."""
    found = client.get_experiment_by_name(experiment)
    if not found or found.lifecycle_stage != "active":
        return
    conditions = [f"tags.{name} = {quoted(value)}" for name, value in identity.items()]
    query = " AND ".join(["attributes.status != 'FINISHED'", *conditions])
    for run in client.search_runs([found.experiment_id], query):
        if REGISTERED not in run.data.tags:  # a search's, or somebody else's
            continue
        if client.search_model_versions(f"run_id = '{run.info.run_id}'"):
            client.set_terminated(run.info.run_id)
        else:
            remove_run(client, run)


def _log_record(client: Any, run_id: str, record: Record, points: Sequence[Point]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    log_numbers(client, run_id, params=record.params, points=points)
    dataset = Dataset(
        name=record.dataset["name"],
        digest=record.dataset["sha256"][:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": record.dataset["source"]}),
        profile=json.dumps(record.dataset["profile"]),
    )
    training = InputTag("mlflow.data.context", "training")
    twice(client.log_inputs, run_id, [DatasetInput(dataset, [training])])
    for folder, paths in record.files.items():
        for path in paths:
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(run_id, str(path), folder)


def _log_model(mlflow: Any, client: Any, run: Any, record: Record) -> str:
    """The model as MLflow keeps it: weights, our package, the serving script; nothing pickled.

    Returns its id. It is made for the run first: within an active run MLflow would ask for the
    history of every metric, one by one, to note those of the model's step.
    """
    import pandas as pd
    from mlflow.entities import LoggedModelOutput

    from pipelines.registry import model_from_code

    zeros = [0.0] * aegan.load(record.model_folder).latent_dim
    run_id = run.info.run_id
    logged = client.create_logged_model(
        run.info.experiment_id,
        "model",
        source_run_id=run_id,
        params={name: str(value) for name, value in record.params.items()},
    )
    check_place(logged.artifact_location, f"a new model of the run {run_id}")
    model_id: str = logged.model_id
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    with TemporaryDirectory() as folder:
        _write_package(record, Path(folder) / "model")
        with chdir(folder):  # MLflow records the address of what it copies
            mlflow.pyfunc.log_model(
                name="model",
                model_id=model_id,
                python_model=str(SERVING_SCRIPT),
                artifacts={"model": "model"},
                code_paths=[str(Path(aegan.__file__).parent)],
                signature=model_from_code.SIGNATURE,
                input_example=(pd.DataFrame({"latent": [zeros]}), {"operation": "generate"}),
                pip_requirements=[
                    f"{name}=={version(name).split('+')[0]}" for name in SERVED_PACKAGES
                ],
            )
    return model_id


def _write_package(record: Record, folder: Path) -> None:
    """The model's files with card, pictures, ONNX, hashes and, with a key, a signature."""
    shutil.copytree(record.model_folder, folder)
    for name, files in ((PICTURES, record.pictures), (NETWORKS, record.networks)):
        (folder / name).mkdir()
        for file in files:
            shutil.copy(file, folder / name)
    (folder / CARD).write_text(record.card, encoding="utf-8")
    package.write_sums(folder)
    if key := package.signing_key():
        package.sign(folder, key)
