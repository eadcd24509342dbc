"""The MLflow store in the project's folder goes along when that folder is moved, renamed or copied.

MLflow writes absolute paths into its database: a copy would write into the original's folder. No
command of MLflow changes them, so they are changed in the database itself.
"""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from pipelines.errors import UserError, run_stage
from pipelines.files import project_folder

FOLDER = "mlruns"  # beside the database
PLACES = (  # every column that holds where files are
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


FOLDER_OF_RUN_OR_MODEL = re.compile(r"(m-)?[0-9a-f]{32}")
DELETED = (  # runs, and models of theirs, that were deleted and that no version of a model names
    "SELECT run_uuid, artifact_uri FROM runs WHERE lifecycle_stage = 'deleted' "
    "AND run_uuid NOT IN (SELECT run_id FROM model_versions WHERE run_id IS NOT NULL)",
    "SELECT model_id, artifact_location FROM logged_models WHERE source_run_id IN "
    "(SELECT run_uuid FROM runs WHERE lifecycle_stage = 'deleted') "
    "AND 'models:/' || model_id NOT IN (SELECT source FROM model_versions)",
)


def main() -> None:
    adopt(project_folder() / "mlflow.db")


def adopt(file: Path) -> None:
    """Make the files in `mlruns/` beside an SQLite database those that it names."""
    if not file.exists():
        return
    with closing(sqlite3.connect(file)) as database, database:
        known = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        for table, column in PLACES:
            if table not in known:  # a store that MLflow has not filled yet
                continue
            rows = database.execute(f"SELECT DISTINCT {column} FROM {table}")
            for (place,) in rows.fetchall():
                if place and (here := _moved(place, file.parent)):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (here, place)
                    )


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


def _moved(place: str, project: Path) -> str:
    """Where a path in another folder's `mlruns/` is in this one's; empty if it stays as it is."""
    before, folder, inside = place.rpartition(f"/{FOLDER}/")
    here = project / FOLDER / inside
    if not folder or Path(before).resolve() == project.resolve():
        return ""
    return str(here) if here.exists() or not Path(place).exists() else ""


if __name__ == "__main__":
    run_stage(main)
