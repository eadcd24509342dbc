"""What an earlier snapshot holds of a source, so that it need not be fetched again.

A snapshot of a bucket or a server notes, in a file beside its shards, what each object gave:
files, by their hash, and what was not read and why. An object of the same name, etag and size gives
the same again. The shards are believed as far as the hashes in their manifest vouch for them.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.files import sha256_of, sha256_of_json
from pipelines.base import identity
from pipelines.base.errors import UserError
from pipelines.ingest.entries import Entry, RawFile, Read, Skipped, Version
from pipelines.ingest.shards import ShardWriter

SCHEMA = pa.schema(
    [
        ("object", pa.string()),
        ("etag", pa.string()),
        ("bytes", pa.int64()),
        ("source", pa.string()),  # of one entry, before names are made unique
        ("sha256", pa.binary(32)),  # of its content; null if it was not read
        ("reason", pa.string()),
    ]
)
ROWS = 4096  # of a row group
KEY = "objects"  # of the manifest


class Notes:
    """Writes down what each object gives, while its entries pass."""

    def __init__(self, folder: Path) -> None:
        self._writer = ShardWriter(folder, KEY, schema=SCHEMA)
        self._rows: list[tuple[Any, ...]] = []

    def passing(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if entry.version:
                found = entry.digest if isinstance(entry, RawFile) else None
                reason = entry.reason if isinstance(entry, Skipped) else None
                version = entry.version
                self._rows.append(
                    (version.name, version.etag, version.size, entry.source, found, reason)
                )
            if len(self._rows) == ROWS:
                self._write()
            yield entry

    def facts(self) -> dict[str, Any]:
        """What the manifest says of them; nothing of a source without objects."""
        if self._rows:
            self._write()
        self._writer.finish_shard()
        shards = self._writer.shards
        return {KEY: {"read_by": _reader(), "shards": shards}} if shards else {}

    def _write(self) -> None:
        columns = zip(zip(*self._rows, strict=True), SCHEMA, strict=True)
        arrays = [pa.array(values, field.type) for values, field in columns]
        self._writer.write(pa.Table.from_arrays(arrays, schema=SCHEMA))
        self._rows = []


@cache
def _reader() -> str:
    """Hash of what decides which files an archive or a table gives."""
    code = identity.code_sha256(identity.code_of(["pipelines.ingest.sources"]))
    return sha256_of_json([code, PIL.__version__, pa.__version__])


class FetchedBefore:
    """An earlier snapshot of the same source; holds one row group at a time."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raises KeyError, OSError, ValueError or an error of Arrow's where it is damaged."""
        self.source_sha256: str = manifest["source_sha256"]
        self.taken = 0  # objects
        self._folder = folder
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._ends = np.cumsum([shard["rows"] for shard in self._shards])
        tables = []
        for notes in manifest[KEY]["shards"]:
            if sha256_of(folder / notes["file"]) != notes["sha256"]:
                raise ValueError(f"{notes['file']} is damaged")
            tables.append(pq.read_table(folder / notes["file"], schema=SCHEMA))
        self._notes = pa.concat_tables(tables).combine_chunks()
        # Of equal contents the first is stored: so the numbers are those of the snapshot's rows.
        files = self._notes.column("sha256").combine_chunks().dictionary_encode()
        self._rows = files.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        self._places = self._find_places()
        self._sound: dict[int, bool] = {}
        self._first, self._table = 0, pa.table({})  # the row group that is held, and its first row

    def _find_places(self) -> dict[Version, tuple[int, int]]:
        """First and last row of each object in the notes."""
        columns = (self._notes.column(name).to_pylist() for name in ("object", "etag", "bytes"))
        places: dict[Version, tuple[int, int]] = {}
        for row, version in enumerate(map(Version, *columns)):
            places[version] = places.get(version, (row,))[0], row
        return places

    def entries_of(self, version: Version) -> Iterator[Read] | None:
        """What an object gives; None if it is another one now, or not sure to be whole here."""
        if not version.etag or version not in self._places:
            return None
        first, last = self._places[version]
        rows = self._rows[first : last + 1]
        shards = np.unique(np.searchsorted(self._ends, rows[rows >= 0], side="right"))
        if not all(map(self._is_sound, shards.tolist())):
            return None
        self.taken += 1
        return self._entries(version, first, last)

    def _is_sound(self, number: int) -> bool:
        if number not in self._sound:
            shard = self._shards[number]
            file = self._folder / shard["file"]
            self._sound[number] = file.is_file() and sha256_of(file) == shard["sha256"]
        return self._sound[number]

    def _entries(self, version: Version, first: int, last: int) -> Iterator[Read]:
        for place in range(first, last + 1):
            source, digest, reason = (
                self._notes.column(name)[place].as_py() for name in ("source", "sha256", "reason")
            )
            if digest is None:
                yield Skipped(source, reason, version)
                continue
            content, label = self._content_of(int(self._rows[place]))
            file = RawFile(source, content, label=label, version=version)
            if file.digest != digest:
                raise UserError(
                    f"{self._folder} was changed while it was read: run the same command again"
                )
            yield file

    def _content_of(self, row: int) -> tuple[bytes, str | None]:
        """A file of the snapshot and its class."""
        inside = row - self._first
        if not 0 <= inside < len(self._table):
            self._hold(row)
            inside = row - self._first
        label = self._table.column("label")[inside].as_py() if self._table.num_columns > 1 else None
        return self._table.column("content")[inside].as_py(), label

    def _hold(self, row: int) -> None:
        """Read the row group of this row."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[shard]) - self._shards[shard]["rows"]
        try:
            file = pq.ParquetFile(self._folder / self._shards[shard]["file"])
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be read any more ({error.strerror}): run the same command "
                "again"
            ) from None
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < start + rows:
                columns = [name for name in ("content", "label") if name in file.schema_arrow.names]
                self._table, self._first = file.read_row_group(group, columns), start
                return
            start += rows
        raise UserError(f"{self._folder} does not fit its manifest: delete that folder")


def find(folders: Iterable[Path], source: str) -> FetchedBefore | None:
    """The first of these snapshots that is of this source, as far as it is sound."""
    for folder in folders:
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            if manifest["source"] == source and manifest[KEY]["read_by"] == _reader():
                return FetchedBefore(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            continue  # there is none, it is damaged, or of a version that took no notes
    return None
