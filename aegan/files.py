"""Files that appear whole or not at all: written beside, flushed to the disk, then renamed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A file to write, which replaces `file` once all went well and else disappears."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # another process has another one
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(file)
        flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Indented; a number that is not finite is a ValueError."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(file: Path) -> str:
    """Of a file's content, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def flush(path: Path) -> None:
    """A file, or the names in a folder, to the disk: whole also after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
