"""Files that appear whole or not at all: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_NAME = 64  # bytes


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A file to write, which replaces `file` once all went well and else disappears."""
    temporary = _aside(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(file)
        flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _aside(file: Path) -> Path:
    """Beside a file, `.NAME.<pid>.tmp`: another process has another one.

    A long name is not made longer, for which a file system has no room.
    """
    raw = os.fsencode(file.name)
    name = file.name if len(raw) <= LONGEST_NAME else hashlib.sha256(raw).hexdigest()
    return file.with_name(f".{name}.{os.getpid()}.tmp")


def write_text(file: Path, text: str) -> None:
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Indented; a number that is not finite is a ValueError."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def save_tensors(
    tensors: dict[str, Tensor], file: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file; a disk that refuses is an OSError, as with any other file."""
    from safetensors import SafetensorError  # here: a process that draws pictures loads no torch
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        reason = re.search(r"os error (\d+)", str(error))
        if reason is None:
            raise
        raise OSError(int(reason[1]), os.strerror(int(reason[1])), str(file)) from None


def remove(path: Path) -> None:
    """A file or folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """Of a file's content, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Of a JSON value, in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """A file, or the names in a folder, to the disk: whole also after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
