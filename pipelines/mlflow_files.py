"""The MLflow store in the project's folder goes along when that folder is moved, renamed or copied.

MLflow writes absolute paths into its database: a copy would write into the original's folder. No
command of MLflow changes them, so they are changed in the database itself.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from pipelines.errors import run_stage
from pipelines.files import project_folder

FOLDER = "mlruns"  # beside the database
PLACES = (  # every column that holds where files are
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
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


def _moved(place: str, project: Path) -> str:
    """Where a path in another folder's `mlruns/` is in this one's; empty if it stays as it is."""
    before, folder, inside = place.rpartition(f"/{FOLDER}/")
    here = project / FOLDER / inside
    if not folder or Path(before).resolve() == project.resolve():
        return ""
    return str(here) if here.exists() or not Path(place).exists() else ""


if __name__ == "__main__":
    run_stage(main)
