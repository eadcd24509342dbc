"""The model at an address, MLflow's or a folder's: found, fetched, checked, loaded."""

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
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
from pipelines.registry import decisions
from pipelines.registry.mlflow_runs import logged_models
from pipelines.registry.mlflow_store import (
    UnsoundModelError,
    alone,
    check_place,
    open_store,
    readable_errors,
    tracking_uri,
    without_credentials,
)
from pipelines.registry.standing import ALIASES

CARD, PICTURES, NETWORKS = "README.md", "interpolations", "onnx"  # beside a version's model
MAX_FILE_BYTES = 4 * model_folder.MAX_PARAMETERS + 2 * model_folder.MAX_HEADER_BYTES  # of a model
MODEL_FILES = "artifacts/model"  # where MLflow keeps them, among the files of a version


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
            _download(repository, name, model, uri)
        if keys:
            package.check_signature(model, keys, called=uri)
        if package.SUMS in stored:
            for name in package.read_sums(model, called=uri):
                if not (model / name).exists():
                    _download(repository, name, model, uri)
        return model


def add_signature(uri: str, folder: Path) -> None:
    """Put the list of files and the signature in a folder beside the model at an address."""
    with readable_errors():
        repository, _ = _open_repository(uri)
        for name in (package.SUMS, package.SIGNATURE):
            repository.log_artifact(str(folder / name), MODEL_FILES)


def _open_repository(uri: str) -> tuple[Any, str | None]:
    return open_repository(open_store(writing=False).MlflowClient(), uri)


def open_repository(client: Any, uri: str) -> tuple[Any, str | None]:
    """Where the files of a model are, and the hash that its version was registered with.

    UserError for a place where none are looked for.
    """
    place, recorded = _locate(client, uri)
    check_place(place, uri)
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(place), recorded


def _fetch(repository: Any, recorded: str | None, uri: str, folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    _download(repository, model_folder.CONFIG, model, uri)
    description = model_folder.read_description(model / model_folder.CONFIG)
    for name in model_folder.files_of(description):
        if name != model_folder.CONFIG:
            _download(repository, name, model, uri)
    if recorded and hash_files([model]) != recorded:
        raise UnsoundModelError(
            f"{uri}: its files are not those that were registered (model_sha256 is {recorded}): "
            "they were changed or damaged in the store; register the model again"
        )
    return model


def _download(repository: Any, name: str, model: Path, uri: str) -> None:
    """One file, as it is called here: a listing would be the store's to write.

    UnsoundModelError where the store answers, and has no such file of the model at `uri`.
    """
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    stored = PurePosixPath(MODEL_FILES, name)
    try:
        repository._download_file(str(stored), str(model / name))
    except Exception:  # each kind of store has its own for a file that is not there
        listed = repository.list_artifacts(str(stored.parent))
        if stored.name in {PurePosixPath(entry.path).name for entry in listed}:
            raise
        raise UnsoundModelError(
            f"{uri}: its file {shown(name)} is not in the store any more; name another version, "
            "or register the model again"
        ) from None


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
