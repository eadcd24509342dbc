"""What stages read of each other, folders that appear whole or not at all, disks that refuse."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aegan.files import sha256_of
from pipelines.base import outputs
from pipelines.base.errors import UserError
from pipelines.base.names import shown

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)

COPIES = (".dvc/tmp/exps", "retraining/work")  # of the project: of `dvc exp run --temp`, of retrain


def read_bytes(file: Path, *, stage: str) -> bytes:
    """What a stage has written; UserError that names the stage where it has not."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} not found: run the stage {stage} first") from None


def read_json(file: Path, *, stage: str) -> dict[str, Any]:
    """A JSON object that a stage has written; UserError where it is missing or damaged."""
    try:
        value = json.loads(read_bytes(file, stage=stage))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: run the stage {stage} again")
    return value


def project_folder() -> Path:
    """Where the user's files are: here, or, in a copy (COPIES), the original's folder."""
    here = Path.cwd()
    copies = (
        folder for folder in here.parents for copy in COPIES if here.is_relative_to(folder / copy)
    )
    return next(copies, here)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) over the names and contents of files and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                digest.update(f"{file.relative_to(path.parent)}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path, *, written: Sequence[str]) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` once all went well and else disappears.

    One process at a time may fill it. A file there that fits no pattern of `written` is the user's:
    UserError, before anything is done, or at the end if it came meanwhile.
    """
    outputs.check_folder(folder, written)
    target = folder.resolve()  # `folder` may be a link to a larger disk
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with clear_disk_errors(folder):
        for left_over in target.parent.glob(f".{target.name}.*.tmp"):  # of a killed process
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            outputs.check_folder(folder, written)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def clear_disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk and missing permissions into a UserError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"no space left for {place}: free some, or link its folder to a larger disk, "
                "then run the same command again"
            ) from None
        if error.errno in _NO_PERMISSION:
            where = error.filename or place
            raise UserError(
                f"not allowed to write {where}: check its owner and mode, and that its disk is "
                "not mounted read-only"
            ) from None
        raise


@contextmanager
def clear_read_errors(source: str) -> Iterator[None]:
    """Turn what keeps a source from being opened into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shown(source)} cannot be read ({error.strerror}): check its owner, mode and disk"
        ) from None
