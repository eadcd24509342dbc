"""What a source gives: files as found, archives to look into, and what is not read and why."""

import errno
import hashlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import pyarrow as pa

from pipelines.base.errors import UserError
from pipelines.base.names import is_system_file, shown

MAX_FILE_BYTES = 64 * 1024**2
MAX_COMPRESSION = 200  # more is a decompression bomb
CONTAINER_SUFFIXES = (
    *(".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz"),
    *(".parquet", ".npy", ".npz"),
)
# What zipfile, tarfile, pyarrow and the unpackers raise for bytes that are not as they should be.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
    EOFError,
    OSError,
    ValueError,
    IndexError,
    OverflowError,
    RuntimeError,  # encrypted; also how deep a parser may go
)


class NoImagesError(UserError):
    """A sound file that holds no images, or none that can be told: within a folder it is listed."""


@dataclass(frozen=True)
class Version:
    """An object of a bucket, or a file of a server; one that is written anew has another etag."""

    name: str
    etag: str
    size: int


@dataclass(frozen=True)
class RawFile:
    """One file as found."""

    source: str
    content: bytes
    factors: tuple[float, ...] = ()
    label: str | None = None  # if the source states a class
    version: Version | None = None  # what it was fetched as, or with the archive that it lay in

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.content).digest()


@dataclass(frozen=True)
class ListedFile:
    """One object of a bucket that stays there."""

    source: str
    url: str
    etag: str
    size: int
    label = version = None

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.url}\0{self.etag}\0{self.size}".encode()).digest()


@dataclass(frozen=True)
class Skipped:
    """One entry that was not read, and why: `<kind>` or `<kind>: <detail>`."""

    source: str
    reason: str
    version: Version | None = None  # of the archive that it lies in


class Allowance:
    """The bytes that may come out of an archive; more is a bomb, and ends the run."""

    def __init__(self, name: str, packed_bytes: int, *, outer: "Allowance | None" = None) -> None:
        self._name, self._packed, self._outer = name, packed_bytes, outer
        self._unpacked = 0

    def spend(self, size: int) -> None:
        self._unpacked += size
        if self._unpacked > max(MAX_FILE_BYTES, MAX_COMPRESSION * self._packed):
            raise UserError(
                f"{self._name} is a decompression bomb: "
                f"{self._packed} bytes become {self._unpacked}"
            )
        if self._outer:
            self._outer.spend(size)


@dataclass(frozen=True)
class Packed:
    """An archive, table or array among the entries, open until the next entry is asked for."""

    source: str
    file: BinaryIO
    outer: Allowance | None  # of the archive that it lies in; None if it lies on disk
    version: Version | None = None


Read = RawFile | Skipped
Entry = Read | ListedFile
Entries = Iterator[Entry]


def is_container_name(name: str) -> bool:
    """Whether a file name or address ends like that of a file that holds many images."""
    return name.lower().endswith(CONTAINER_SUFFIXES)


def refusal(name: str, size: int, kind: str = "", *, stored_bytes: int | None = None) -> str:
    """Why an entry is not read; "" when it is."""
    if is_system_file(name):
        return "hidden or system file"
    if kind:
        return kind
    if size > MAX_FILE_BYTES and not is_container_name(name):
        return f"too large: {size} bytes, at most {MAX_FILE_BYTES}"
    if stored_bytes is not None and size > max(2**20, MAX_COMPRESSION * stored_bytes):
        return f"decompression bomb: {stored_bytes} bytes become {size}"
    return ""


def cause(error: Exception) -> str:
    """What is wrong with the bytes; an error of the disk is no damage and goes on."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # impossible offset
        raise error
    if str(error).startswith("File name in directory"):
        return "its two names differ"
    if isinstance(error, OSError) and error.errno:
        return "it points outside itself"
    if isinstance(error, UnicodeError):
        return "a name is not the UTF-8 that it claims to be"
    return shown((str(error).splitlines() or [type(error).__name__])[0][:200])
