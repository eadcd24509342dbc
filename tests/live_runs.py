"""A run folder that grows as by a training, without PyTorch, and what MLflow has of it."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from aegan.files import write_json
from aegan.training.run_folder import RunFolder, append_row

BATCH_SIZE, START = 32, 1_700_000_000.0
Point = tuple[str, float, int, int]  # name, value, step, milliseconds


class GrowingRun:
    """A training that saves a checkpoint every two rows."""

    def __init__(self, path: Path, name: str = "aegan-0123456789ab") -> None:
        path.mkdir(parents=True)
        self.folder, self._rows = RunFolder(path), list[dict[str, float]]()
        facts = {"run_name": name, "dataset_sha256": "d" * 64, "git_commit": f"{'f' * 40}-dirty"}
        sections = {"model": {"latent_dim": 8}, "loss": {"adversarial": "bce"}}
        training = {"arm": "aegan", "batch_size": BATCH_SIZE, "num_steps": 400}
        facts |= {"ray_job": "aegan-job", "params": {**sections, "training": training}}
        write_json(self.folder.facts, facts)

    def grow(self) -> None:
        for _ in range(2):
            step = 10 * (len(self._rows) + 1)
            row = {"step": step, "time": START + step + 0.25, "image_reconstruction": 1 / step}
            self._rows.append(row)
        state = {"log": {"rows": self._rows, "ending": None}}
        write_json(self.folder.checkpoint(step) / "state.json", state)
        append_row(self.folder.system, {"time": START + step, "cpu_percent": 50.0})

    def points(self) -> set[Point]:
        """What MLflow is to have, by hand."""
        found = set()
        for row in self._rows:
            step = int(row["step"])
            now = round(row["time"] * 1000)
            found.add(("train/image_reconstruction", row["image_reconstruction"], step, now))
            found.add(("train/images_shown", float(step * BATCH_SIZE), step, now))
        for number, row in enumerate(self.folder.system_rows()):
            now = round(row["time"] * 1000)
            found.add(("system/cpu_percent", 50.0, number, now))
        return found


def runs_in(database: Path) -> dict[str, str]:
    """The runs that are not deleted: id => status."""
    with closing(sqlite3.connect(database, timeout=30)) as opened:
        query = "SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"
        return dict(opened.execute(query).fetchall())


def points_in(database: Path, run_id: str) -> list[Point]:
    """Every point of a run, equal ones too."""
    with closing(sqlite3.connect(database, timeout=30)) as opened:
        query = "SELECT key, value, step, timestamp FROM metrics WHERE run_uuid = ?"
        return opened.execute(query, (run_id,)).fetchall()


def tags_in(database: Path, run_id: str) -> Mapping[str, Any]:
    with closing(sqlite3.connect(database, timeout=30)) as opened:
        return dict(
            opened.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,)).fetchall()
        )
