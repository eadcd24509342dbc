"""What is left in MLflow's store, and which runs of ours it names (for `make tidy`)."""

import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.base.errors import UserError
from pipelines.base.files import project_folder
from pipelines.registry import mlflow_store
from pipelines.registry.mlflow_files import FOLDER, PLACES
from pipelines.registry.mlflow_store import paged

FOLDER_OF_RUN_OR_MODEL = re.compile(r"(m-)?[0-9a-f]{32}")
DELETED = (  # runs, and models of theirs, that were deleted and that no version of a model names
    "SELECT run_uuid, artifact_uri FROM runs WHERE lifecycle_stage = 'deleted' "
    "AND run_uuid NOT IN (SELECT run_id FROM model_versions WHERE run_id IS NOT NULL)",
    "SELECT model_id, artifact_location FROM logged_models WHERE source_run_id IN "
    "(SELECT run_uuid FROM runs WHERE lifecycle_stage = 'deleted') "
    "AND 'models:/' || model_id NOT IN (SELECT source FROM model_versions)",
)


def run_names() -> set[str]:
    """Names of trainings and searches that a run or a model version in MLflow was made from."""
    if (
        mlflow_store.tracking_uri() == mlflow_store.DEFAULT_URI
        and not (project_folder() / "mlflow.db").exists()
    ):
        return set()
    with mlflow_store.readable_errors():
        client = mlflow_store.open_store(writing=False).MlflowClient()
        names = set()
        for search in (_all_runs, _all_versions):
            for tags in search(client):
                names |= {tags[key] for key in ("run_name", "search") if key in tags}
        return names


def purge(ids: Sequence[str]) -> None:
    """Remove deleted runs and their models from the local store for good; raises UserError."""
    client = mlflow_store.open_store().MlflowClient()
    runs = [name for name in ids if not name.startswith("m-")]
    models = [name for name in ids if name.startswith("m-")]
    with mlflow_store.readable_errors():
        for model in models:
            client.delete_logged_model(model)
    uri = f"sqlite:///{project_folder() / 'mlflow.db'}"
    command = [sys.executable, "-W", "ignore", "-m", "mlflow", "gc"]
    command += ["--backend-store-uri", uri, "--tracking-uri", uri]
    command += ["--run-ids", ",".join(runs)] if runs else []
    command += ["--logged-model-ids", ",".join(models)] if models else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise UserError(f"mlflow gc failed: {reason}")


def _all_runs(client: Any) -> Iterator[Mapping[str, str]]:
    """The tags of every run."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if experiments:
        yield from (run.data.tags for run in paged(partial(client.search_runs, experiments)))


def _all_versions(client: Any) -> Iterator[Mapping[str, str]]:
    """The tags of every version of every model."""
    return (found.tags for found in paged(client.search_model_versions))


def deleted(file: Path) -> dict[str, Path]:
    """Runs and models that are deleted in MLflow, which keeps their files: id => folder."""
    rows = (row for query in DELETED for row in _rows(file, query))
    return {name: Path(place).parent for name, place in rows if place}


def unnamed(file: Path) -> list[Path]:
    """Folders in `mlruns/` that no run and no model of the database names.

    None without a database: then nobody knows what is in there.
    """
    named = {
        Path(place).resolve()
        for table, column in PLACES
        for (place,) in _rows(file, f"SELECT {column} FROM {table}")
        if place
    }
    if not named:
        return []
    inside = file.parent / FOLDER
    return [
        folder
        for folder in (*inside.glob("*/*"), *inside.glob("*/models/*"))
        if FOLDER_OF_RUN_OR_MODEL.fullmatch(folder.name)
        and folder.is_dir()
        and (folder / "artifacts").resolve() not in named
    ]


def _rows(file: Path, query: str) -> list[tuple[str, ...]]:
    """What a query finds; nothing where there is no database, or one that is not filled yet."""
    if not file.exists():
        return []
    try:
        with closing(sqlite3.connect(file)) as database:
            filled = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'logged_models'")
            return database.execute(query).fetchall() if filled.fetchone() else []
    except sqlite3.Error as error:
        raise UserError(f"{file}: {error}; what it names is not known") from None
