"""Members of zip archives, unpacked in pieces: none takes more memory than it says that it holds.

zipfile alone unpacks what it has read of a member as a whole before it cuts that to the stated
size, so some hundred bytes could become gigabytes.
"""

import bz2
import copy
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, BinaryIO, cast

PIECE_BYTES = 1024**2
WITHIN_BOUNDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # in which zipfile gives what is asked
LZMA_START = 9  # bytes: version, length of what follows, properties, dictionary's size
LEAST_DICTIONARY = 4096


@contextmanager
def open_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[BinaryIO]:
    """What a member holds, to be read once from its start; raises one of entries.DAMAGE."""
    with ExitStack() as stack:
        if entry.compress_type in WITHIN_BOUNDS:
            stream = stack.enter_context(archive.open(entry))
        elif unpack := UNPACKERS.get(entry.compress_type):
            packed = stack.enter_context(archive.open(_as_it_lies(entry)))
            stream = stack.enter_context(unpack(packed, entry.file_size))
        else:
            raise NotImplementedError(f"packed by the method {entry.compress_type}")
        yield cast(BinaryIO, _Member(stream, entry))


class _Member:
    def __init__(self, stream: IO[bytes], entry: zipfile.ZipInfo) -> None:
        self._stream, self._left = stream, entry.file_size
        self._stated_crc, self._crc = entry.CRC, 0

    def read(self, size: int = -1) -> bytes:
        """As of any file; the checksum is looked at with the last byte."""
        wanted = self._left if size < 0 else min(size, self._left)
        pieces = []
        while wanted:
            piece = self._stream.read(min(wanted, PIECE_BYTES))
            pieces.append(piece)
            wanted -= len(piece)
            self._left = self._left - len(piece) if piece else 0
            self._crc = zlib.crc32(piece, self._crc)
            if not self._left and self._crc != self._stated_crc:
                raise zipfile.BadZipFile("the checksum is wrong")
            if not piece:
                break
        return b"".join(pieces)


def _as_it_lies(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """The entry of a member's packed bytes, of which no checksum is known."""
    packed = copy.copy(entry)
    packed.compress_type, packed.file_size = zipfile.ZIP_STORED, entry.compress_size
    del packed.CRC
    return packed


def _unpack_bzip2(packed: IO[bytes], size: int) -> IO[bytes]:
    return cast(IO[bytes], bz2.BZ2File(packed))


def _unpack_lzma(packed: IO[bytes], size: int) -> IO[bytes]:
    start = packed.read(LZMA_START)
    if len(start) < LZMA_START or start[2:4] != b"\5\0":
        raise zipfile.BadZipFile("its LZMA header is none")
    properties, dictionary = start[4], int.from_bytes(start[5:], "little")
    unpacker = {
        "id": lzma.FILTER_LZMA1,
        "lc": properties % 9,
        "lp": properties // 9 % 5,
        "pb": properties // 45,
        # It is allocated whole, and no byte lies farther back than the first one.
        "dict_size": max(LEAST_DICTIONARY, min(dictionary, size)),
    }
    return cast(IO[bytes], lzma.LZMAFile(packed, format=lzma.FORMAT_RAW, filters=[unpacker]))


UNPACKERS: dict[int, Callable[[IO[bytes], int], IO[bytes]]] = {
    zipfile.ZIP_BZIP2: _unpack_bzip2,
    zipfile.ZIP_LZMA: _unpack_lzma,
}
