"""The raw files of any `data.source`, one at a time and never extracted to disk.

Names and contents are untrusted: what is not a plain file of sane size under a plain relative name
comes out as `Skipped` with its reason.
"""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from aegan.file_kinds import START_BYTES, kind_of
from pipelines import storage
from pipelines.errors import UserError

MAX_FILE_BYTES = 64 * 1024**2
MAX_HEADER_BYTES = 64 * 1024  # of one tar entry: its long name and attributes
MAX_COMPRESSION = 200  # more is a decompression bomb
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
# What zipfile, tarfile and the unpackers raise for bytes that are not as they should be.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    IndexError,
    OverflowError,
    NotImplementedError,
    RecursionError,
)


@dataclass(frozen=True)
class RawFile:
    """One file as found."""

    source: str
    content: bytes
    factors: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.content).digest()


@dataclass(frozen=True)
class ListedFile:
    """One object of a bucket that stays there."""

    source: str
    url: str
    etag: str
    size: int

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.url}\0{self.etag}\0{self.size}".encode()).digest()


@dataclass(frozen=True)
class Skipped:
    """One entry that was not read, and why."""

    source: str
    reason: str


Entry = RawFile | ListedFile | Skipped
Entries = Iterator[Entry]


def read_folder(folder: Path) -> Entries:
    """Every regular file below a folder, shallow ones first, links not followed."""
    for file in sorted(_walk(folder), key=lambda file: (len(file.parts), file)):
        name = _text(str(PurePosixPath(file.relative_to(folder))))
        try:
            found = file.lstat()
            if reason := _refusal(name, found.st_size, _kind(found.st_mode)):
                yield Skipped(name, reason)
            else:
                yield RawFile(name, file.read_bytes())
        except OSError as error:
            yield Skipped(name, f"not readable: {error.strerror}")


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder, onerror=_raise_unreadable):
        paths = [Path(where) / name for name in folders]
        yield from (path for path in paths if path.is_symlink())
        yield from (Path(where) / name for name in files)


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}): check its mode")


def _kind(mode: int) -> str:
    """What a file mode (of a folder, zip or tar entry) says, in words; "" for a plain file."""
    if stat.S_ISREG(mode) or stat.S_IFMT(mode) == 0:  # zip entries often carry no type
        return ""
    return "link" if stat.S_ISLNK(mode) else "special file"


def _refusal(name: str, size: int, kind: str, *, stored_bytes: int | None = None) -> str:
    """Why an entry is not read; "" when it is."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or set(name) & set("\\:"):
        return "unsafe path"
    if not name.isprintable():
        return "unsafe path: control characters"
    if "__MACOSX" in path.parts or any(part.startswith(".") for part in path.parts):
        return "hidden or system file"
    if path.name.lower() in ("thumbs.db", "desktop.ini"):
        return "hidden or system file"
    if kind:
        return f"{kind}: not followed" if kind == "link" else kind
    if size > MAX_FILE_BYTES:
        return f"too large: {size} bytes, at most {MAX_FILE_BYTES}"
    if stored_bytes is not None and size > max(2**20, MAX_COMPRESSION * stored_bytes):
        return f"decompression bomb: {stored_bytes} bytes become {size}"
    return ""


def _text(name: str) -> str:
    """A file name that is valid UTF-8, whatever bytes the disk or the archive holds."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_archive_name(name: str) -> bool:
    """Whether a file name or address ends like an archive's."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def read_archive(file: Path, name: str) -> Entries:
    """Every plain file in a zip or tar archive; `name` is what errors call it."""
    try:
        if _is_tar(file):  # first: a tar may end with a zip, whose mark is at its end
            yield from _read_tar(file, name)
        elif zipfile.is_zipfile(file):
            yield from _read_zip(file, name)
        else:
            with file.open("rb") as content:
                kind = kind_of(content.read(START_BYTES))
            found = f": it is {kind}" if kind else ""
            raise UserError(f"{name} is neither a folder nor a sound zip or tar archive{found}")
    except DAMAGE as error:
        raise UserError(f"{name} is damaged ({_cause(error)}): fetch or pack it again") from None


def _cause(error: Exception) -> str:
    """What is wrong with the bytes; an error of the disk is no damage and goes on."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # impossible offset
        raise error
    return str(error) or type(error).__name__


def _check_total(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    if unpacked_bytes > max(MAX_FILE_BYTES, MAX_COMPRESSION * packed_bytes):
        raise UserError(
            f"{name} is a decompression bomb: {packed_bytes} bytes become {unpacked_bytes}"
        )


def _check_count(file: Path, found: int) -> None:
    """A damaged length in a zip's directory can hide the entries behind it: its end counts them."""
    with file.open("rb") as content:
        content.seek(max(file.stat().st_size - 2**16 - 22, 0))
        end = content.read()
    place = end.rfind(b"PK\x05\x06")
    count = int.from_bytes(end[place + 10 : place + 12], "little")
    if place >= 0 and count not in (found, 2**16 - 1):  # the latter: zip64 counts elsewhere
        raise zipfile.BadZipFile(f"{found} of {count} entries found")


def _read_zip(file: Path, name: str) -> Entries:
    packed_bytes = file.stat().st_size
    unpacked_bytes = 0
    with zipfile.ZipFile(file) as archive:
        _check_count(file, len(archive.infolist()))
        entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
        for entry in sorted(entries, key=lambda entry: (entry.filename.count("/"), entry.filename)):
            path = _text(entry.filename)
            kind = _kind(entry.external_attr >> 16)
            reason = _refusal(path, entry.file_size, kind, stored_bytes=entry.compress_size)
            if entry.flag_bits & 1:
                reason = reason or "encrypted"
            if reason:
                yield Skipped(path, reason)
                continue
            unpacked_bytes += entry.file_size
            _check_total(name, unpacked_bytes, packed_bytes)
            try:
                with archive.open(entry) as stream:
                    content = stream.read(MAX_FILE_BYTES + 1)
            except DAMAGE as error:
                yield Skipped(path, f"damaged in the archive: {_cause(error)}")
                continue
            yield RawFile(path, content)


class _Metered:
    """A stream that gives tarfile, which reads any header whole, `allowance` bytes and no more."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.allowance = MAX_HEADER_BYTES
        self.last = b""  # what was read last
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.allowance:
            raise tarfile.ReadError(f"a header is larger than {MAX_HEADER_BYTES} bytes")
        self.allowance -= size
        self.last = self.stream.read(size)
        return self.last


@contextmanager
def _open_tar(file: Path) -> Iterator[tuple[tarfile.TarFile, _Metered]]:
    with file.open("rb") as packed:
        start = packed.read(8)
    unpack = next((unpack for mark, unpack in UNPACKERS.items() if start.startswith(mark)), open)
    with unpack(file, "rb") as stream:
        metered = _Metered(stream)
        with tarfile.open(fileobj=cast(BinaryIO, metered), mode="r:") as archive:
            yield archive, metered


def _is_tar(file: Path) -> bool:
    try:
        with _open_tar(file):
            return True
    except tarfile.ReadError:
        return False


def _read_tar(file: Path, name: str) -> Entries:
    packed_bytes = file.stat().st_size
    unpacked_bytes = 0
    with _open_tar(file) as (archive, metered):
        while (entry := archive.next()) is not None:
            if entry.size < 0:
                raise tarfile.ReadError("a size is negative")
            unpacked_bytes += entry.size
            _check_total(name, unpacked_bytes, packed_bytes)
            path = _text(entry.name).removeprefix("./")
            kind = "link" if entry.issym() or entry.islnk() else "special file"
            if entry.isdir():
                pass
            elif reason := _refusal(path, entry.size, "" if entry.isreg() else kind):
                yield Skipped(path, reason)
            else:
                stream = archive.extractfile(entry)
                assert stream is not None  # entry is a regular file
                metered.allowance = entry.size
                yield RawFile(path, stream.read())
            metered.allowance = MAX_HEADER_BYTES
            archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps every entry
            archive.pax_headers = {}  # and every attribute
        if metered.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a bad header for the end
            raise tarfile.ReadError("a header is bad, or the end is missing")
        while rest := metered.stream.read(1024**2):  # the checksum is at the end
            unpacked_bytes += len(rest)
            _check_total(name, unpacked_bytes, packed_bytes)


def read_bucket(url: str) -> Entries:
    """Every object below `s3://bucket/prefix`, several read at once, in the bucket's order."""
    prefix = f"{url.rstrip('/')}/"

    def read(address: str, size: int) -> RawFile | Skipped:
        name = address.removeprefix(prefix)
        if reason := _refusal(name, size, ""):
            return Skipped(name, reason)
        return RawFile(name, storage.read_object(address))

    objects = (item for item in storage.list_objects(prefix) if not item[0].endswith("/"))
    with ThreadPoolExecutor(storage.PARALLEL_READS) as pool:
        waiting: deque[Future[RawFile | Skipped]] = deque()
        for address, size in objects:
            waiting.append(pool.submit(read, address, size))
            if len(waiting) == storage.PARALLEL_READS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def list_bucket(url: str) -> Entries:
    """The same objects as `read_bucket` in the same order, not read."""
    prefix = f"{url.rstrip('/')}/"
    for address, size, etag in storage.list_versions(prefix):
        name = address.removeprefix(prefix)
        if address.endswith("/"):
            continue
        if reason := _refusal(name, size, ""):
            yield Skipped(name, reason)
        else:
            yield ListedFile(name, address, etag, size)


def without_repetitions(entries: Iterable[Entry]) -> Entries:
    """Skip files whose bytes, or whose name, came before (nested copies of a whole set, say).

    Of a listing, whose names are unique, nothing is skipped: the bytes are not known yet.
    """
    names: set[str] = set()
    first_with: dict[bytes, str] = {}
    for entry in entries:
        if isinstance(entry, RawFile):
            digest = entry.digest
            if entry.source in names:
                entry = Skipped(entry.source, "name occurs twice")
            elif first := first_with.get(digest):
                entry = Skipped(entry.source, f"identical file: {first}")
            else:
                names.add(entry.source)
                first_with[digest] = entry.source
        yield entry
