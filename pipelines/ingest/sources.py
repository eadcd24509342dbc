"""The raw files of any `data.source`, one at a time and never extracted to disk.

Names and contents are untrusted. Names are text only, so any is taken; what is not a plain file of
sane size comes out as `Skipped` with its reason. Archives, tables and arrays among the files are
looked into once, and give their files as if unpacked where they lie.
"""

import os
import shutil
import stat
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from aegan.data.file_kinds import START_BYTES, is_image, kind_of
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, clear_read_errors
from pipelines.base.names import UniqueNames, decoded, shown
from pipelines.bucket import storage
from pipelines.ingest import archives, arrays, tables
from pipelines.ingest.entries import (
    DAMAGE,
    MAX_FILE_BYTES,
    Allowance,
    Entries,
    Entry,
    ListedFile,
    NoImagesError,
    Packed,
    RawFile,
    Read,
    Skipped,
    Version,
    cause,
    is_container_name,
    refusal,
)
from pipelines.ingest.fetched_before import FetchedBefore

FOLDER_LOST = "folder not readable"  # and all below it
LINK_TO_NOTHING = "link: leads nowhere"
LINK_ELSEWHERE = "link: leads to another file system, not followed"
LINK_IN_A_CIRCLE = "link: leads to a folder that is read anyway, or to one above it"
LINK_TO_NO_IMAGE = "link: leads to a file that is no image, not followed"


def read_folder(folder: Path) -> Iterator[Read]:
    """Every regular file below a folder, shallow ones first.

    A link is followed to an image, archive or folder on the same file system.
    """
    return _unpacked(_read_folder(folder))


def _read_folder(folder: Path) -> Iterator[Read | Packed]:
    found = sorted(walk(folder), key=lambda file: (file.path.count("/"), file.path.split("/")))
    for file in found:
        name = decoded(os.fsencode(file.path))
        if reason := refusal(name, 0, file.reason):
            yield Skipped(name, reason)
            continue
        path = folder / file.path
        try:
            if is_container_name(name):
                with path.open("rb") as content:
                    yield Packed(name, content, None)
            else:
                yield _read_file(path, name, is_linked=file.is_linked)
        except FileNotFoundError:
            yield Skipped(name, "not readable: it vanished while the folder was read")
        except OSError as error:
            yield Skipped(name, f"not readable: {error.strerror}")


@dataclass(frozen=True)
class Found:
    """A file below a folder, by its path within; `reason`: why it is not to be read."""

    path: str
    is_linked: bool
    reason: str = ""


def walk(folder: Path) -> Iterator[Found]:
    """All files of a folder; real folders before linked ones, each folder once."""
    top = folder.resolve()
    device = top.stat().st_dev
    seen = {(found.st_dev, found.st_ino) for found in (path.stat() for path in top.parents)}
    pending, linked = deque([""]), deque[str]()
    is_linked = False
    while pending or linked:
        if not pending:
            pending.append(linked.popleft())
            is_linked = True
        inside = pending.popleft()
        where = f"{top}/{inside}"
        try:
            known = Path(where).stat()
            # Real folders have no circles, and on some network disks they share their numbers.
            if is_linked and (known.st_dev, known.st_ino) in seen:
                yield Found(inside.removesuffix("/"), True, LINK_IN_A_CIRCLE)
                continue
            seen.add((known.st_dev, known.st_ino))
            with os.scandir(where) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise UserError(
                    f"the folder {shown(str(top))} cannot be read ({error.strerror}): "
                    "make it readable, `chmod -R u+rX FOLDER`"
                ) from None
            # A path of its own may be too long for the system, too.
            yield Found(inside.removesuffix("/"), is_linked, f"{FOLDER_LOST}: {error.strerror}")
            continue
        for entry in found:
            path = inside + entry.name
            try:
                if refusal(path, 0):
                    yield Found(path, is_linked)
                elif entry.is_symlink():
                    reason, is_folder = _follow(entry, device)
                    if is_folder:
                        linked.append(f"{path}/")
                    else:
                        yield Found(path, True, reason)
                elif entry.is_dir():
                    pending.append(f"{path}/")
                else:
                    yield Found(path, is_linked, "" if entry.is_file() else "special file")
            except OSError as error:  # where the system must ask what kind it is, and may not
                yield Found(path, is_linked, f"not readable: {error.strerror}")


def _follow(link: os.DirEntry[str], device: int) -> tuple[str, bool]:
    """Why a link is not followed, or ""; and whether it leads to a folder to be read."""
    try:
        target = link.stat()
    except OSError:  # broken, or a circle of links
        return LINK_TO_NOTHING, False
    if target.st_dev != device:
        return LINK_ELSEWHERE, False
    if stat.S_ISDIR(target.st_mode):
        return "", True
    return ("" if stat.S_ISREG(target.st_mode) else "special file"), False


def _read_file(path: Path, name: str, *, is_linked: bool) -> RawFile | Skipped:
    """A file of a disk; what changes meanwhile is half of something, so it is not taken."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait
    with os.fdopen(handle, "rb") as file:
        before = os.fstat(handle)
        if not stat.S_ISREG(before.st_mode):
            return Skipped(name, "special file")
        if reason := refusal(name, before.st_size):
            kind = kind_of(file.read(START_BYTES))
            return Skipped(name, f"{reason}; it is {kind}" if kind else reason)
        content = file.read(before.st_size + 1)
        after = os.fstat(handle)
    if len(content) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        return Skipped(
            name, "not readable: it changed while it was read, `make refresh` reads it again"
        )
    if is_linked and not is_image(content):  # a link may lead to a password as well
        return Skipped(name, LINK_TO_NO_IMAGE)
    return RawFile(name, content)


def read_archive(file: Path, name: str) -> Iterator[Read]:
    """Every image of an archive, table or array; `name` is what errors call it."""
    with clear_read_errors(name):
        content = file.open("rb")
    with content:
        yield from _unpacked(_look_into(content, name, None))


def _look_into(file: BinaryIO, name: str, outer: Allowance | None) -> Iterator[Read | Packed]:
    """The entries of an archive, table or array; the content, not the name, says what it is."""
    try:
        start = file.read(START_BYTES)
        allowance = Allowance(name, file.seek(0, os.SEEK_END), outer=outer)
        file.seek(0)
        if start.startswith(b"PAR1"):
            yield from tables.read_table(file, name, allowance)
        elif start.startswith(b"\x93NUMPY"):
            yield from arrays.read_npy(file, name)
        elif archives.is_tar(file):  # before zip: a tar may end with one, whose mark is at its end
            yield from archives.read_tar(file, name, allowance)
        elif not zipfile.is_zipfile(file):
            kind = kind_of(start)
            if start.startswith(b"PK"):
                kind = "a zip archive without its end: fetch it again"
            elif is_image(start):
                kind = "one image: put many into a folder"
            raise NoImagesError(
                f"{name} is neither a folder nor a sound zip or tar archive, Parquet file or "
                f"NumPy array{': it is ' if kind else ''}{kind}"
            )
        elif arrays.is_npz(file):
            yield from arrays.read_npz(file, name, allowance)
        else:
            yield from archives.read_zip(file, allowance)
    except DAMAGE as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> UserError:
    """What is wrong with an archive, or with the disk that it lies on."""
    try:
        return UserError(f"{name} is damaged ({cause(error)}): fetch or pack it again")
    except OSError as problem:
        return UserError(
            f"{name} cannot be read ({problem.strerror}): check its disk, or take it out of "
            "data.source"
        )


def _unpacked(entries: Iterable[Read | Packed]) -> Iterator[Read]:
    """Look into each archive, table or array among the entries, but into none within it."""
    for entry in entries:
        if isinstance(entry, Packed):
            yield from with_version(_entries_within(entry), entry.version)
        else:
            yield entry


def _entries_within(packed: Packed) -> Iterator[Read]:
    folder, slash, _ = packed.source.rpartition("/")
    with _on_disk(packed) as file:
        try:
            for inner in _look_into(file, shown(packed.source), packed.outer):
                name = folder + slash + inner.source
                if isinstance(inner, Packed):
                    yield Skipped(name, "archive in an archive in the source: unpack it first")
                else:
                    yield replace(inner, source=name)
        except NoImagesError as error:
            yield Skipped(packed.source, f"no images within: {error}")


def with_version(entries: Iterable[Read], version: Version | None) -> Iterator[Read]:
    """The same entries, which say what they were fetched with."""
    return (replace(entry, version=version) for entry in entries)


@contextmanager
def _on_disk(packed: Packed) -> Iterator[BinaryIO]:
    """The bytes of an archive where they can be read in any order: small ones in memory."""
    if packed.outer is None:
        yield packed.file
        return
    with tempfile.SpooledTemporaryFile(MAX_FILE_BYTES) as copy:
        try:
            with clear_disk_errors(Path(tempfile.gettempdir())):
                shutil.copyfileobj(packed.file, copy, 1024**2)
        except DAMAGE as error:
            raise _damaged(shown(packed.source), error) from None
        copy.seek(0)
        yield cast(BinaryIO, copy)


def read_bucket(url: str, before: FetchedBefore | None = None) -> Iterator[Read]:
    """Every object below `s3://bucket/prefix`, several read at once, in the bucket's order.

    What was fetched before is not read again.
    """
    return _unpacked(_read_bucket(_prefix(url), before))


def _prefix(url: str) -> str:
    """What the addresses of all objects below this one begin with; a key may hold empty parts."""
    return url if url.endswith("/") else f"{url}/"


def _read_bucket(prefix: str, before: FetchedBefore | None) -> Iterator[Read | Packed]:
    def listed() -> Iterator[tuple[Version, Iterator[Read] | None]]:  # in one thread, in order
        for address, size, etag in storage.list_versions(prefix):
            if not address.endswith("/"):
                version = Version(address.removeprefix(prefix), etag, size)
                yield version, before.entries_of(version) if before else None

    def read(item: tuple[Version, Iterator[Read] | None]) -> Iterable[Read | Packed]:
        version, known = item
        if known is not None:
            return known
        if reason := refusal(version.name, version.size):
            return [Skipped(version.name, reason)]
        if is_container_name(version.name):
            return _fetched(version, prefix)  # when its turn has come: it may be large
        content, etag = storage.read_version(prefix + version.name)
        return [RawFile(version.name, content, version=Version(version.name, etag, len(content)))]

    for found in storage.read_ahead(read, listed()):
        yield from found


def _fetched(read: Version, prefix: str) -> Iterator[Packed]:
    """A copy of an archive on disk."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "archive"
        version = download_version(prefix + read.name, read, copy)
        with copy.open("rb") as content:
            yield Packed(read.name, content, None, version)


def version_of(url: str, name: str) -> Version:
    """Of an object as it is now; without an etag if it may be read, but not be listed."""
    try:
        listed = next(storage.list_versions(url), None)
    except storage.StorageError:
        listed = None
    return Version(name, listed[2], listed[1]) if listed and listed[0] == url else unknown(name)


def unknown(name: str) -> Version:
    """Of an object that cannot be told from others: it is fetched again the next time."""
    return Version(name, "", 0)


def download_version(url: str, listed: Version, file: Path) -> Version:
    """Download an object; returns what it is a version of, unknown if it was changed meanwhile."""
    storage.download_object(url, file)
    return listed if version_of(url, listed.name) == listed else unknown(listed.name)


def list_bucket(url: str) -> Entries:
    """The same objects as `read_bucket` in the same order, not read."""
    prefix = _prefix(url)
    for address, size, etag in storage.list_versions(prefix):
        name = address.removeprefix(prefix)
        if address.endswith("/"):
            continue
        if is_container_name(name):
            yield Skipped(name, "archive: read with data.in_place false only")
        elif reason := refusal(name, size):
            yield Skipped(name, reason)
        else:
            yield ListedFile(name, address, etag, size)


def without_repetitions(entries: Iterable[Entry]) -> Entries:
    """Skip files whose bytes came before (nested copies of a whole set, say); make names unique.

    Of a listing nothing is skipped: the bytes are not known yet.
    """
    names = UniqueNames()
    first_with: dict[bytes, str] = {}
    for entry in entries:
        if isinstance(entry, RawFile) and (first := first_with.get(entry.digest)):
            yield Skipped(entry.source, f"identical file: {first}")
        elif isinstance(entry, Skipped):
            yield entry
        else:
            name = names.take(entry.source)
            if isinstance(entry, RawFile):
                first_with[entry.digest] = name
            yield entry if name == entry.source else replace(entry, source=name)
