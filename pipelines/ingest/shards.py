"""Writing Parquet shards and their hashes."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aegan.files import new_file, sha256_of


def write_parquet(tables: Iterator[pa.Table], file: Path, *, checksums: bool = False) -> None:
    """One table or more, each as one row group, written beside its place, then renamed.

    With checksums a reader that asks for it is told of damage.
    """
    first = next(tables)
    with (
        new_file(file) as temporary,
        _writer(temporary, first.schema, write_page_checksum=checksums) as writer,
    ):
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=max(1, len(table)))


def _writer(file: Path, schema: pa.Schema, **more: bool) -> pq.ParquetWriter:
    # Image bytes neither compress nor repeat: plain pages load at the speed of memory.
    return pq.ParquetWriter(
        file, schema, compression="none", use_dictionary=False, write_statistics=False, **more
    )


class ShardWriter:
    """Row groups into `<name>-00000.parquet`, ...; `shards` lists the finished files.

    Of several writers of one name, each begins with another number: `first`.
    """

    def __init__(self, folder: Path, name: str, *, schema: pa.Schema, first: int = 0) -> None:
        self.shards: list[dict[str, Any]] = []
        self.schema = schema
        self._folder, self._name, self._first = folder, name, first
        self._writer: pq.ParquetWriter | None = None
        self.rows = 0  # in the open shard
        self.bytes = 0

    def write(self, table: pa.Table) -> None:
        """Append one row group to the open shard."""
        if self._writer is None:
            self._writer = _writer(self._file, self.schema)
        self._writer.write_table(table, row_group_size=len(table))
        self.rows += len(table)
        self.bytes += table.nbytes

    def add_column(self, field: pa.Field) -> None:
        """From here on rows have one column more; it is null in all before, also in shards."""
        self.finish_shard()
        self.schema = self.schema.append(field)
        earlier, self.shards = self.shards, []
        for shard in earlier:
            temporary = (self._folder / shard["file"]).rename(self._folder / "narrow.tmp")
            narrow = pq.ParquetFile(temporary)
            for group in range(narrow.num_row_groups):
                rows = narrow.read_row_group(group)
                self.write(rows.append_column(field, pa.nulls(len(rows), field.type)))
            self.finish_shard()
            temporary.unlink()

    def finish_shard(self) -> None:
        """Close the open shard, if any, and hash it."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        written = {"bytes": self._file.stat().st_size, "sha256": sha256_of(self._file)}
        self.shards.append({"file": self._file.name, "rows": self.rows, **written})
        self.rows = self.bytes = 0

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._name}-{self._first + len(self.shards):05d}.parquet"
