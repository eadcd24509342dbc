"""MLflow's store: `MLFLOW_TRACKING_URI`, else an SQLite file in the project's folder.

MLflow is imported on first use only: that takes seconds, and its telemetry must be off before. A
database is never changed to another version of MLflow here, and one process at a time writes.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

import aegan
from aegan.files import new_file
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, project_folder
from pipelines.base.names import shown
from pipelines.registry import mlflow_files

DEFAULT_URI = "sqlite:///mlflow.db"
ENVIRONMENT = {  # set unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",  # from addresses that the server chooses
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 wait for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow asks for the commit; a machine without git is fine
}
CHATTY = ("alembic", "urllib3", "mlflow.store.db.utils")  # which repeat every error with its stack
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
BUCKETS = ("s3", "gs")
SQLITE_WAIT_SECONDS = 5
CREDENTIALS = re.compile(r"://(?:[^/\s]*|[^/\s:@]*:(?!\d+/)[^\s@]*)@")
FAILING = re.compile(r"too many (5\d\d) error responses")
PATIENCE_SECONDS = 600  # with another registration in the same store
AGAIN = "then run the same command again"


class UnsoundModelError(UserError):
    """A model's files are not those that were registered, or none that a model can have."""


class StoreError(UserError):
    """MLflow, or where it keeps files, does not answer as it should; it may later."""


def set_environment() -> None:
    """Switch MLflow's telemetry and chatter off; has to come before anything imports it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tracking_uri() -> str:
    """Where runs and models are kept."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def without_credentials(text: str) -> str:
    """`https://user:password@host/` => `https://host/`, wherever it stands in a text.

    The password may hold `@`, or `/` as those of databases may.
    """
    return CREDENTIALS.sub("://", text)


def database_file() -> Path | None:
    """The SQLite file that is the store; None where it is a server."""
    uri = tracking_uri()
    if not uri.startswith("sqlite:///"):
        return None
    return project_folder() / uri.removeprefix("sqlite:///")


def files_folder() -> Path:
    """The only folder of this machine where a store may keep files: none of a server's choice."""
    file = database_file()
    return (file.parent if file else project_folder()) / mlflow_files.FOLDER


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time writes into an SQLite store, the others wait; a server sees to itself.

    The lock is the operating system's: it ends with the process. UserError after ten minutes.
    """
    file = database_file()
    if file is None:
        yield
        return
    lock = FileLock(f"{file}.lock", mode=0o600, is_singleton=True)  # which may hold it twice
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logging.info("another process writes to %s: waiting for it", file)
            lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise UserError(
            f"another process has been writing to {file} for {PATIENCE_SECONDS} s: end it, {AGAIN}"
        ) from None
    except OSError:
        raise UserError(f"{file}.lock cannot be written; {_cure_of_sqlite('readonly')}") from None
    try:
        yield
    finally:
        lock.release()


def open_store(*, writing: bool = True) -> Any:
    """The module mlflow, pointed at a store that is known to answer; raises UserError.

    A new SQLite store is this user's alone, like the folder of its files.
    """
    set_environment()
    given, uri, file = os.environ.get("MLFLOW_TRACKING_URI"), tracking_uri(), database_file()
    if file and (file.exists() or not writing):
        _check_sqlite(file, writing=writing)
    import mlflow

    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    if file:
        if not file.exists() or file.stat().st_size == 0:
            with alone():
                _create(mlflow, file)
        mlflow_files.adopt(file)
        uri = f"sqlite:///{file}"  # MLflow caches stores by URI, whatever the folder
    if uri.split(":")[0].split("+")[0] in DATABASES:
        _check_version(mlflow, uri)
    mlflow.set_tracking_uri(uri)  # which writes the variable: it is the user's, put it back
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if given is not None:
        os.environ["MLFLOW_TRACKING_URI"] = given
    if file:
        with chdir(file.parent):  # where MLflow opens a store it will keep the files
            mlflow.MlflowClient().search_experiments(max_results=1)
    return mlflow


def check_place(place: str, what: str) -> None:
    """UserError unless a store's files lie where the store itself is, or in a bucket.

    The store says where its files are: whoever can write there could otherwise have any folder of
    this machine read or written, or the registry's password sent to any server.
    """
    parts = urlsplit(place)
    if parts.scheme in BUCKETS:
        return
    if parts.scheme == "mlflow-artifacts":
        server = urlsplit(tracking_uri())
        if server.scheme in ("http", "https") and parts.netloc.rpartition("@")[2] in (
            "",
            server.netloc.rpartition("@")[2],
        ):
            return
    if parts.scheme in ("", "file") and parts.netloc in ("", "localhost"):
        path, folder = Path(unquote(parts.path) if parts.scheme else place), files_folder()
        if path.is_absolute() and path.resolve().is_relative_to(folder.resolve()):
            return
    raise UserError(
        f"{what} is kept at {shown(without_credentials(place))}, which is none of the places of "
        f"the registry {without_credentials(tracking_uri())} (its own files, {files_folder()} or "
        "a bucket): see docs/security.md, The registry"
    )


@contextmanager
def readable_errors() -> Iterator[None]:
    """What MLflow and its stores raise, as one line that names the store and holds no password."""
    try:
        yield
    except UserError:
        raise
    except aegan.ModelError as error:
        raise UnsoundModelError(str(error)) from None
    except Exception as error:
        of_a_store = type(error).__module__.startswith(
            ("mlflow.", "sqlalchemy.", "botocore.", "requests.", "sqlite3")
        )
        if not (of_a_store or isinstance(error, (OSError, ModuleNotFoundError))):
            raise
        where = without_credentials(tracking_uri())
        reason = _reason(error)
        raise StoreError(f"MLflow at {where}: {shown(reason)}; {_cure(reason)}") from error


def _reason(error: Exception) -> str:
    line = without_credentials(f"{error}\n".splitlines()[0])
    if failing := FAILING.search(line):  # behind the address and words of urllib3
        return f"the server answers {failing[1]}"
    return line.split(" with url:")[0][:300]


def _cure(reason: str) -> str:
    if reason.startswith("the server answers"):
        return "its log says why; is its database running?"
    if "Invalid Host header" in reason:
        return "let the server accept this host name (`mlflow server --allowed-hosts HOST:PORT`)"
    if "error code 401" in reason or "error code 403" in reason:
        return "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
    if "error code 404" in reason or "failed with exception" in reason:
        return "is MLFLOW_TRACKING_URI right, and an MLflow server running there?"
    if "sqlite3" in reason and database_file():
        return _cure_of_sqlite(reason)
    return f"see docs/serving.md, {AGAIN}"


def _cure_of_sqlite(reason: str) -> str:
    if "locked" in reason:
        return f"close the program that uses it, {AGAIN}"
    if "readonly" in reason or "unable to open" in reason:
        return f"check the owner and mode of the file and of its folder, {AGAIN}"
    if "full" in reason:
        return f"free some space, {AGAIN}"
    return (
        f"put a copy of yours in its place, or move the file and {mlflow_files.FOLDER}/ away and "
        f"register again"
    )


def _check_sqlite(file: Path, *, writing: bool) -> None:
    """A missing, locked or damaged file is found in seconds; MLflow itself retries for minutes."""
    if not file.exists():
        raise UserError(
            f"{file} not found: run from the project's root folder after `make run`, or set "
            "MLFLOW_TRACKING_URI to a server"
        )
    if file.stat().st_mode & 0o002:
        raise UserError(
            f"{file}: every user of this machine may change it; check that its runs are yours, "
            f"`chmod o-w {file}`, {AGAIN}"
        )
    try:
        with closing(sqlite3.connect(file, timeout=SQLITE_WAIT_SECONDS)) as database:
            if writing:
                database.execute("BEGIN IMMEDIATE")
                database.execute(f"PRAGMA user_version = {_user_version(database)}")  # a real write
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            database.rollback()
    except sqlite3.Error as error:
        raise UserError(f"{file}: {error}; {_cure_of_sqlite(str(error))}") from None
    if found != "ok":
        raise UserError(f"{file}: damaged ({shown(found)[:100]}); {_cure_of_sqlite('damaged')}")


def _user_version(database: sqlite3.Connection) -> int:
    (number,) = database.execute("PRAGMA user_version").fetchone()
    return int(number)


def quoted(text: str) -> str:
    """A text as a value in a filter of MLflow, which has two quotes and no way to escape them."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def paged(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow finds, page after page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


def twice(call: Callable[..., Any], *arguments: Any) -> None:
    """Of two who write the same row first, at once, MLflow's server fails one: it is there now."""
    from mlflow.exceptions import MlflowException

    try:
        call(*arguments)
    except MlflowException:
        call(*arguments)


@contextmanager
def unless_there() -> Iterator[None]:
    """What is to be made may be there already."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create(mlflow: Any, file: Path) -> None:
    """A new store, which appears whole: MLflow cannot go on with one that was cut off."""
    if file.exists() and file.stat().st_size:
        return  # by the process that was waited for
    folder = file.parent / mlflow_files.FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left_over in file.parent.glob(f".{file.name}.*.tmp*"):  # by a process that was killed
        left_over.unlink()
    with clear_disk_errors(file), new_file(file) as temporary, chdir(file.parent):
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


def _check_version(mlflow: Any, uri: str) -> None:
    """UserError for a database of another version: MLflow would change it without a copy."""
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).get_table_names():
                return  # a new one
            found = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    known = ScriptDirectory.from_config(_get_alembic_config(""))
    if found == known.get_current_head():
        return
    where, version = without_credentials(uri), mlflow.__version__
    if found not in {script.revision for script in known.walk_revisions()}:
        raise UserError(
            f"{where}: no database of MLflow {version} or older (its version is "
            f"{shown(found or 'not stated')}); use the MLflow that wrote it, or move it away and "
            "register again"
        )
    raise UserError(
        f"{where}: written by an older MLflow than {version}, which would change it for good; stop "
        f"what uses it, make a copy of it, run `.venv/bin/mlflow db upgrade {where}`, {AGAIN}"
    )
