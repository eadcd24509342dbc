"""The seam to MLflow: store one trained model with all that is known of it, and load it again.

A registration that is cut off anywhere leaves nothing that a later one does not take away, and
however many register one content, one version of it remains (docs/reliability.md).
"""

import json
import os
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import aegan
from aegan import model_folder
from aegan.config import RegisterConfig
from aegan.training import checkpoint
from aegan.training.checkpoint import CheckpointError
from aegan.training.state import export_model
from pipelines.base import package, params
from pipelines.base.errors import UserError
from pipelines.base.files import hash_files, project_folder
from pipelines.base.names import shown
from pipelines.base.outputs import TRAIN
from pipelines.registry import decisions, mlflow_store
from pipelines.registry.live_run import REGISTERED
from pipelines.registry.mlflow_runs import (
    Point,
    create_run,
    log_numbers,
    make_experiment,
)
from pipelines.registry.mlflow_store import (
    UnsoundModelError,
    alone,
    check_place,
    open_store,
    quoted,
    readable_errors,
    tracking_uri,
    twice,
    unless_there,
    without_credentials,
)
from pipelines.registry.standing import ALIASES, MAX_DESCRIPTION

SERVING_SCRIPT = Path(__file__).with_name("model_from_code.py")
CARD, PICTURES, NETWORKS = "README.md", "interpolations", "onnx"  # in a package
MAX_DIGEST = 36  # characters of a data set's hash that MLflow keeps
MAX_FILE_BYTES = 4 * model_folder.MAX_PARAMETERS + 2 * model_folder.MAX_HEADER_BYTES  # of a model
MODEL_FILES = "artifacts/model"  # where MLflow keeps them, among the files of a version
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
        registered = _find_version(mlflow, client, model_name, record.content_sha256)
        if not registered:
            registered = _create_version(
                *(mlflow, client, record, experiment, model_name, identity), live_run=live_run
            )
        _end_unfinished(client, experiment, identity)
        twice(client.set_registered_model_alias, model_name, alias, registered.number)
        return registered


def log_search(
    search: str, *, experiment: str, tags: Mapping[str, Any], files: Sequence[Path]
) -> str:
    """The run that the trials of a search are nested in, with its results; returns the run's id."""
    with readable_errors(), alone():
        mlflow = open_store()
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
    with readable_errors(), alone():
        mlflow = open_store()
        client = mlflow.MlflowClient()
        parent = _search_run(mlflow, client, search, experiment)
        experiment_id = client.get_run(parent).info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.run_name = {quoted(name)}"
        for run in client.search_runs([experiment_id], query):
            if run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
                return
            client.delete_run(run.info.run_id)
        tags = {**tags, "mlflow.parentRunId": parent}
        run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        log_numbers(client, run_id, params=params, points=points)
        client.set_terminated(run_id)


def _search_run(mlflow: Any, client: Any, search: str, experiment: str) -> str:
    """The id of the run of that name, which is made where there is none."""
    experiment_id = make_experiment(mlflow, experiment)
    found = client.search_runs([experiment_id], f"tags.search = {quoted(search)}")
    if found:
        run_id: str = found[0].info.run_id
        return run_id
    made: str = client.create_run(
        experiment_id, tags={"search": search}, run_name=search
    ).info.run_id
    return made


def load_model(address: str | Path, weights: Literal["ema", "raw"] = "ema") -> aegan.Model:
    """The networks at any address: `models:/aegan@candidate`, a model's folder, a checkpoint's.

    Raises UserError.
    """
    with readable_errors(), model_at(str(address)) as folder:
        return aegan.load(folder, weights=weights)


def default_model() -> str:
    """The address of this project's model: the trained one, else the registry's champion."""
    trained = TRAIN / "model"
    if (trained / model_folder.CONFIG).exists():
        return str(trained)
    if not params.PARAMS_FILE.exists():
        raise UserError(
            "there is no trained model here: name one with --model (models:/NAME@ALIAS, a model's "
            "folder, a checkpoint), or `make run` trains one"
        )
    return f"models:/{params.load(RegisterConfig).model_name}@champion"


def check_store() -> str:
    """The address of the store, once it has answered this user; raises UserError."""
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        client.search_registered_models(max_results=1)
        return without_credentials(tracking_uri())


def is_address(uri: str) -> bool:
    """Whether a model's address is one of MLflow."""
    return uri.startswith(("models:/", "runs:/"))


@contextmanager
def local_folder(address: str) -> Iterator[Path]:
    """The model at any address, MLflow's or a folder's, as a folder that may be loaded.

    All that is loaded from outside comes through here: with `AEGAN_TRUSTED_KEYS` set, what no
    holder of such a key signed is refused before any weight is parsed. Raises UserError.
    """
    if is_address(address):
        with TemporaryDirectory() as downloads:
            yield fetch_model(address, Path(downloads))
    else:
        with package.trusted(folder_at(address)) as folder:
            yield folder


@contextmanager
def model_at(address: str) -> Iterator[Path]:
    """The same as a model's folder, also where the address is a checkpoint's."""
    with local_folder(address) as folder:
        if not (folder / checkpoint.STATE).exists():
            yield folder
            return
        with TemporaryDirectory() as exported:
            try:
                export_model(folder, Path(exported))
            except (CheckpointError, LookupError) as error:
                raise UserError(f"{folder} cannot be used: {error}") from None
            yield Path(exported)


def folder_at(address: str) -> Path:
    """A folder of this machine; a path counts from the project's folder, `~` and $NAME too."""
    return project_folder() / Path(os.path.expandvars(address)).expanduser()


def is_alias(uri: str) -> bool:
    """Whether a model's address may mean another version tomorrow."""
    return uri.startswith("models:/") and "@" in uri


def fetch_model(uri: str, folder: Path) -> Path:
    """Download the model of `models:/aegan@candidate` into `folder/model`; raises UserError.

    Only the files of a model are asked for, none larger than a model can be, from the store's own
    places; where the version says what it holds (`model_sha256`), they must be that, or it is an
    UnsoundModelError.
    """
    uri = pinned(uri)
    if keys := package.trusted_keys():
        folder = fetch_package(uri, folder, keys)
        package.check(folder, keys, called=uri)
        return folder
    with readable_errors(), _no_larger_files(MAX_FILE_BYTES):
        return _fetch(*_open_repository(uri), uri, folder)


def fetch_package(uri: str, folder: Path, keys: package.TrustedKeys) -> Path:
    """The same with card, pictures, list of files and signature, as far as the list names them.

    With trusted keys a list that no holder signed is refused before its names are asked for.
    """
    with readable_errors(), _no_larger_files(MAX_FILE_BYTES):
        repository, recorded = _open_repository(uri)
        model = _fetch(repository, recorded, uri, folder)
        stored = {entry.path.rpartition("/")[2] for entry in repository.list_artifacts(MODEL_FILES)}
        for name in stored & {package.SUMS, package.SIGNATURE}:
            _download(repository, name, model)
        if keys:
            package.check_signature(model, keys, called=uri)
        if package.SUMS in stored:
            for name in package.read_sums(model, called=uri):
                if not (model / name).exists():
                    _download(repository, name, model)
        return model


def add_signature(uri: str, folder: Path) -> None:
    """Put the list of files and the signature in a folder beside the model at an address."""
    with readable_errors():
        repository, _ = _open_repository(uri)
        for name in (package.SUMS, package.SIGNATURE):
            repository.log_artifact(str(folder / name), MODEL_FILES)


def _open_repository(uri: str) -> tuple[Any, str | None]:
    """Where the files of a model are, and the hash that its version was registered with."""
    mlflow = open_store(writing=False)
    place, recorded = _locate(mlflow.MlflowClient(), uri)
    check_place(place, uri)
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(place), recorded


def _fetch(repository: Any, recorded: str | None, uri: str, folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    _download(repository, model_folder.CONFIG, model)
    description = model_folder.read_description(model / model_folder.CONFIG)
    for name in model_folder.files_of(description):
        if name != model_folder.CONFIG:
            _download(repository, name, model)
    if recorded and hash_files([model]) != recorded:
        raise UnsoundModelError(
            f"{uri}: its files are not those that were registered (model_sha256 is {recorded}): "
            "they were changed or damaged in the store; register the model again"
        )
    return model


def _download(repository: Any, name: str, model: Path) -> None:
    """One file, as it is called here: a listing would be the store's to write."""
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    repository._download_file(f"{MODEL_FILES}/{name}", str(model / name))


def check_files(model_name: str, version: str) -> None:
    """UnsoundModelError unless a version says what it holds, and its folder holds nothing else."""
    uri = f"models:/{model_name}/{version}"
    with readable_errors():
        repository, recorded = _open_repository(uri)
        if not recorded:
            raise UnsoundModelError(
                f"{uri} has no model_sha256: it was not registered by this pipeline"
            )
        known = {model_folder.CONFIG, *model_folder.FILES.values(), *model_folder.OPTIONAL}
        known |= {CARD, PICTURES, NETWORKS, package.SUMS, package.SIGNATURE}
        names = {Path(file.path).name for file in repository.list_artifacts(MODEL_FILES)}
    if others := sorted(names - known):
        raise UnsoundModelError(f"{uri} holds {shown(others[0])}, which is no file of a model")


def check_version(model_name: str, version: str) -> None:
    """UserError unless there is a version of that number."""
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        with _there(f"there is no version {version} of {model_name} in MLflow at", "`make mlflow`"):
            client.get_model_version(model_name, version)


@contextmanager
def _there(missing: str, cure: str) -> Iterator[None]:
    """What is asked for inside is in the store, or a UserError says that it is missing there."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        where = without_credentials(tracking_uri())
        raise UserError(f"{missing} {where}; {cure} shows what there is") from None


def aliased(model_name: str, alias: str) -> str:
    """The number of the version that an alias means; raises UserError."""
    return pinned(f"models:/{model_name}@{alias}").rpartition("/")[2]


def tags_of(model_name: str, version: str) -> dict[str, str]:
    """The tags of a registered version; raises UserError."""
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        tags: dict[str, str] = client.get_model_version(model_name, version).tags
        return tags


def set_tags(model_name: str, version: str, tags: Mapping[str, str]) -> None:
    """Tags of a model version; raises UserError."""
    with readable_errors(), alone():
        client = open_store().MlflowClient()
        for name, value in tags.items():
            client.set_model_version_tag(model_name, version, name, value)


def _locate(client: Any, uri: str) -> tuple[str, str | None]:
    """Where the files of a model are, and the hash that its version was registered with."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if uri.startswith("runs:/"):
        run_id, _, name = uri.removeprefix("runs:/").partition("/")
        models = logged_models(client, client.get_run(run_id))
        found = next((model for model in models if model.name == name), None)
        if not found:
            raise UserError(f"{uri}: this run has no model of that name")
        return found.artifact_location, None
    name, *number = get_model_name_and_version(client, uri)
    if not number:  # models:/m-0123456789abcdef
        return client.get_logged_model(name).artifact_location, None
    tags = client.get_model_version(name, number[0]).tags
    return client.get_model_version_download_uri(name, number[0]), tags.get("model_sha256")


@contextmanager
def _no_larger_files(max_bytes: int) -> Iterator[None]:
    """This process writes no file of more bytes: what sends one without end is told off by it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [max_bytes, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pinned(uri: str) -> str:
    """`models:/aegan@candidate` => `models:/aegan/3`, the version that it means now.

    An address without alias stays as it is. `champion` and `previous` are what the log of decisions
    says, wherever MLflow's alias points. Raises UserError.
    """
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if not alias:
        return uri
    if alias in ALIASES and (decided := decisions.aliased(name, alias)):
        return f"models:/{name}/{decided}"
    missing = f"{uri}: there is no such model or alias in MLflow at"
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        with _there(missing, "`make run` registers one, `make mlflow`"):
            return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"


def _find_version(mlflow: Any, client: Any, model_name: str, content_sha256: str) -> Version | None:
    """The first version of that content whose files are still there.

    The first: numbers only grow, so that all who register one content at once agree on it.
    """
    query = f"name = {quoted(model_name)} AND tags.content_sha256 = '{content_sha256}'"
    for found in client.search_model_versions(query, order_by=["version_number ASC"]):
        uri = f"models:/{model_name}/{found.version}"
        files = mlflow.artifacts.list_artifacts(artifact_uri=uri)
        if any(file.path == "MLmodel" for file in files):
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
        first = _find_version(mlflow, client, model_name, record.content_sha256)
        if not first or first.run_id == run.info.run_id:
            raise
        _delete_versions(client, model_name, run, keep=first)
        return first
    first = _find_version(mlflow, client, model_name, record.content_sha256)
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
    """
    run = client.get_run(run_id) if run_id else None
    if (
        not run
        or REGISTERED in run.data.tags
        or run.info.experiment_id != experiment_id
        or any(run.data.params.get(name, str(v)) != str(v) for name, v in record.params.items())
    ):
        return None
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


def remove_run(client: Any, run: Any) -> None:
    """Delete a run and the models logged in it; on this machine their files first.

    Called within `readable_errors` and `alone`, like the next.
    """
    models = [model.model_id for model in logged_models(client, run)]
    if mlflow_store.database_file():
        home = mlflow_store.files_folder() / run.info.experiment_id  # not where the store says
        for folder in (run.info.run_id, *(f"models/{model}" for model in models)):
            shutil.rmtree(home / folder, ignore_errors=True)
    for model in models:
        client.delete_logged_model(model)
    client.delete_run(run.info.run_id)


def logged_models(client: Any, run: Any) -> list[Any]:
    found: list[Any] = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = {quoted(run.info.run_id)}"
    )
    return found


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
    model_id: str = client.create_logged_model(
        run.info.experiment_id,
        "model",
        source_run_id=run_id,
        params={name: str(value) for name, value in record.params.items()},
    ).model_id
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
