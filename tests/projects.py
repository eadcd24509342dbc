"""A folder with the project's own files, as a user's clone has them, and other parameters."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.base import params

ROOT = Path(__file__).parent.parent
COPIED = (".dvc/config", ".dvc/.gitignore", ".dvcignore", "dvc.yaml", "params.yaml")


def make_project(folder: Path, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Its `.venv` is a link to this one."""
    for name in ("aegan", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    (folder / "docs").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    for file in COPIED:
        shutil.copy(ROOT / file, folder / file)
    ignored = (ROOT / ".gitignore").read_text().replace("/.venv/", "/.venv")  # here it is a link
    (folder / ".gitignore").write_text(ignored)
    params.change(parameters, folder / "params.yaml", said_by="tests")
