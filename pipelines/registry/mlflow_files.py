"""The MLflow store in the project's folder goes along when that folder is moved, renamed or copied.

MLflow writes absolute paths into its database: a copy would write into the original's folder. No
command of MLflow changes them, so they are changed in the database itself. With an address,
`python -m pipelines.registry.mlflow_files s3://bucket/prefix`, it names the files copied there.
"""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import project_folder

FOLDER = "mlruns"  # beside the database
PLACES = (  # every column that holds where files are
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def main() -> None:
    file = project_folder() / "mlflow.db"
    adopt(file)
    if len(sys.argv) > 1:
        move(file, sys.argv[1])


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


def move(file: Path, address: str) -> None:
    """Make the files copied from `mlruns/` to a bucket those that it names; raises UserError."""
    if not file.exists() or not address.startswith("s3://"):
        raise UserError(
            f"expected a store {file} and the address of a copy of {FOLDER}/ as s3://bucket/prefix"
        )
    home = f"{file.parent / FOLDER}/"
    with closing(sqlite3.connect(file)) as database, database:
        for table, column in PLACES:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE substr({column}, 1, ?) = ?",
                (f"{address.rstrip('/')}/", len(home) + 1, len(home), home),
            )


def _moved(place: str, project: Path) -> str:
    """Where a path in another folder's `mlruns/` is in this one's; empty if it stays as it is."""
    before, folder, inside = place.rpartition(f"/{FOLDER}/")
    here = project / FOLDER / inside
    if not folder or "://" in before or Path(before).resolve() == project.resolve():
        return ""
    return str(here) if here.exists() or not Path(place).exists() else ""


if __name__ == "__main__":
    run_stage(main)
