"""Names that come from outside and become paths on this disk.

Whoever can write a bucket chooses what its objects are called, and what the manifests, locks and
lists of files in it say. So every such name passes through here before it meets a path.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.base.names import shown

SHA256 = re.compile("[0-9a-f]{64}")
MAX_PART_BYTES = 255  # of a file system
MAX_SHOWN = 200


class UntrustedError(UserError):
    """What was found is none of what this project writes there."""

    def __init__(self, origin: str, problem: str) -> None:
        super().__init__(
            f"{origin} {problem}: nothing of it was taken; find out who wrote it, and delete it"
        )


def check_name(name: object, *, origin: str, pattern: re.Pattern[str] | None = None) -> str:
    """A relative path in plain parts, `a/b.png`, which fits the pattern as a whole if there is one.

    `origin` is what the name was found in, for the UntrustedError.
    """
    if isinstance(name, str) and _is_plain(name) and (not pattern or pattern.fullmatch(name)):
        return name
    raise UntrustedError(origin, f"names {_short(name)}, which is none of its files")


def path_inside(
    folder: Path, name: object, *, origin: str, pattern: re.Pattern[str] | None = None
) -> Path:
    """Where a file of this name lies in the folder; UntrustedError if a link there leads out of it.

    The folder may itself be a link, to a larger disk say.
    """
    path = folder / check_name(name, origin=origin, pattern=pattern)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UntrustedError(origin, f"names {_short(name)}, which leads out of {folder}")
    return path


def check_names(names: Iterable[object], *, origin: str) -> None:
    """UntrustedError unless one folder can hold files of these names: each once, none below one."""
    taken: set[str] = set()
    for name in names:
        if (plain := check_name(name, origin=origin)) in taken:
            raise UntrustedError(origin, f"names {_short(name)} twice")
        taken.add(plain)
    for name in taken:
        parts = name.split("/")
        if any("/".join(parts[:end]) in taken for end in range(1, len(parts))):
            raise UntrustedError(origin, f"names {_short(name)} below a file")


def _is_plain(name: str) -> bool:
    try:
        parts = name.encode().split(b"/")
    except UnicodeEncodeError:  # JSON may hold halves of characters
        return False
    return b"\0" not in name.encode() and all(
        part not in (b"", b".", b"..") and len(part) <= MAX_PART_BYTES for part in parts
    )


def _short(name: object) -> str:
    return shown(str(name)[:MAX_SHOWN])
