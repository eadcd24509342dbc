"""Zip and tar archives, read member by member and never unpacked to disk."""

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from pipelines.base.names import decoded, shown
from pipelines.ingest.entries import (
    DAMAGE,
    MAX_FILE_BYTES,
    Allowance,
    Packed,
    RawFile,
    Skipped,
    cause,
    is_container_name,
    refusal,
)
from pipelines.ingest.zip_members import open_member

MAX_HEADER_BYTES = 64 * 1024  # of one tar entry: its long name and attributes
MAX_LABEL_BYTES = 1000
UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("avif", "heic", "heif", "jp2", "j2k", "pgm", "ppm", "pnm", "tga"),
)

Members = Iterator[RawFile | Skipped | Packed]


def as_path(name: str) -> str:
    """A member's name with `/` between folders; some Windows tools write backslashes."""
    return name if "/" in name else name.replace("\\", "/")


def read_zip(file: BinaryIO, allowance: Allowance) -> Members:
    """Every plain member, shallow ones first."""
    with zipfile.ZipFile(file) as archive:
        _check_count(file, len(archive.infolist()))
        members = [(_zip_name(entry), entry) for entry in archive.infolist()]
        for name, entry in sorted(members, key=lambda member: (member[0].count("/"), member[0])):
            if name.endswith("/") and not entry.file_size:
                continue
            mode = entry.external_attr >> 16
            kind = "" if stat.S_IFMT(mode) == 0 or stat.S_ISREG(mode) else "special file"
            kind = "link: not followed in an archive" if stat.S_ISLNK(mode) else kind
            reason = refusal(name, entry.file_size, kind, stored_bytes=entry.compress_size)
            if entry.flag_bits & 1:
                reason = reason or "encrypted"
            if reason:
                yield Skipped(name, reason)
                continue
            allowance.spend(entry.file_size)
            try:
                with open_member(archive, entry) as stream:
                    if is_container_name(name):
                        yield Packed(name, stream, allowance)
                        continue
                    content = stream.read()
            except DAMAGE as error:
                yield Skipped(name, f"damaged in the archive: {cause(error)}")
                continue
            yield RawFile(name, content)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The member's name; without the mark for UTF-8 it may be that all the same, or code page 437.

    zipfile has decoded it as the latter.
    """
    name = entry.filename
    if not entry.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return as_path(name)


def _check_count(file: BinaryIO, found: int) -> None:
    """A damaged length in a zip's directory can hide the entries behind it: its end counts them."""
    file.seek(max(file.seek(0, 2) - 2**16 - 22, 0))
    end = file.read()
    place = end.rfind(b"PK\x05\x06")
    count = int.from_bytes(end[place + 10 : place + 12], "little")
    # 2**16 - 1: zip64 counts elsewhere. Some tools never write that, and count on from 0.
    if place >= 0 and count not in (found % 2**16, 2**16 - 1):
        raise zipfile.BadZipFile(f"{found} of {count} entries found")


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
def _open_tar(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, _Metered]]:
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    with ExitStack() as stack:
        for mark, unpack in UNPACKERS.items():
            if start.startswith(mark):
                file = stack.enter_context(unpack(file, "rb"))
                break
        metered = _Metered(file)
        # The names' bytes: tarfile would take the encoding of this machine.
        with tarfile.open(
            fileobj=cast(BinaryIO, metered), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            yield archive, metered


def is_tar(file: BinaryIO) -> bool:
    try:
        with _open_tar(file):
            return True
    except tarfile.ReadError:
        return False


def read_tar(file: BinaryIO, name: str, allowance: Allowance) -> Members:
    """Every plain member in the archive's order; of a WebDataset, images with their classes."""
    companions: Counter[str] = Counter()
    sample: list[RawFile] = []
    sample_bytes = 0
    for member in _read_members(file, allowance):
        same = isinstance(member, RawFile) and sample and _key(member) == _key(sample[0])
        if sample and (not same or sample_bytes > MAX_FILE_BYTES):
            yield from _images_of(sample, companions)
            sample, sample_bytes = [], 0
        if isinstance(member, RawFile):
            sample.append(member)
            sample_bytes += member.size
        else:
            yield member
    yield from _images_of(sample, companions)
    if companions:
        kinds = ", ".join(f"{count} .{suffix}" for suffix, count in sorted(companions.items()))
        yield Skipped(PurePosixPath(name).name, f"companions of images, not read: {kinds}")


def _key(file: RawFile) -> str:
    """What the files of one WebDataset sample share: the name up to the first dot."""
    folder, slash, name = file.source.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _images_of(sample: list[RawFile], companions: Counter[str]) -> Iterator[RawFile]:
    """The files of a sample; beside an image others are counted as its companions only."""
    suffixes = [file.source.rpartition("/")[2].partition(".")[2].lower() for file in sample]
    are_images = [suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in suffixes]
    if not any(are_images):
        yield from sample
        return
    label = None
    for file, suffix, is_image in zip(sample, suffixes, are_images, strict=True):
        if not is_image:
            companions[suffix[-20:]] += 1
        if suffix == "cls" and file.size <= MAX_LABEL_BYTES:
            label = decoded(file.content).strip() or None
    for file, is_image in zip(sample, are_images, strict=True):
        if is_image:
            yield RawFile(file.source, file.content, label=label)


def _read_members(file: BinaryIO, allowance: Allowance) -> Members:
    with _open_tar(file) as (archive, metered):
        while (entry := archive.next()) is not None:
            if entry.size < 0:
                raise tarfile.ReadError("a size is negative")
            allowance.spend(entry.size)
            raw_name = entry.name.encode("utf-8", "surrogateescape")
            name = as_path(decoded(raw_name)).removeprefix("./")
            kind = "" if entry.isreg() else "special file"
            if entry.issym() or entry.islnk():
                kind = f"link: to {shown(entry.linkname)}, not followed in an archive"
            if entry.isdir():
                pass
            elif reason := refusal(name, entry.size, kind):
                yield Skipped(name, reason)
            else:
                stream = archive.extractfile(entry)
                assert stream is not None  # entry is a regular file
                metered.allowance = entry.size
                if is_container_name(name):
                    yield Packed(name, cast(BinaryIO, stream), allowance)
                else:
                    yield RawFile(name, stream.read())
            metered.allowance = MAX_HEADER_BYTES
            archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps every entry
            archive.pax_headers = {}  # and every attribute
        if metered.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a bad header for the end
            raise tarfile.ReadError("a header is bad, or the end is missing")
        while rest := metered.stream.read(1024**2):  # the checksum is at the end
            allowance.spend(len(rest))
