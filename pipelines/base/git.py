"""What git answers; where it does not, one line says why, what it was asked for, and the cure."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipelines.base.errors import UserError

REASONS = ("fatal: ", "error: ")  # how git begins the line that says why


def git(
    *arguments: str,
    need: str,
    cure: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What git prints, here or in a folder that exists, names of files as Python has them.

    Else a UserError; `need` says why nothing goes on without an answer.
    """
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=os.environ | (environment or {}),
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"git not found: {need}; install git") from None
    if done.returncode != 0:
        said = os.fsdecode(done.stderr or done.stdout)
        cure = _advice(said) or cure
        raise UserError(f"git {arguments[0]}: {_reason(said)}: {need}{f'; {cure}' if cure else ''}")
    return os.fsdecode(done.stdout)


def _reason(said: str) -> str:
    """Of several lines the one that says why; in another language than English the first."""
    lines = said.strip().splitlines() or ["it did not say why"]
    line = next((line for line in lines if line.startswith(REASONS)), lines[0])
    for beginning in REASONS:
        line = line.removeprefix(beginning)
    return line


def _advice(said: str) -> str:
    """Git's own, which it has for a folder of another user's."""
    lines = (line.strip() for line in said.splitlines() if "safe.directory" in line)
    return next((f"`{line}` if you trust its owner" for line in lines), "")
