"""Writing Parquet shards and their hashes, into folders that appear whole or not at all."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_parquet(table: pa.Table, file: Path) -> None:
    """One table as one row group, written aside and renamed."""
    aside = file.with_name(f".{file.name}.tmp")
    with _writer(aside, table.schema) as writer:
        writer.write_table(table, row_group_size=max(1, len(table)))
    aside.replace(file)


def _writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Image bytes neither compress nor repeat: plain pages load at the speed of memory.
    return pq.ParquetWriter(
        file, schema, compression="none", use_dictionary=False, write_statistics=False
    )


class ShardWriter:
    """Row groups into `<name>-00000.parquet`, ...; `shards` lists the finished files."""

    def __init__(self, folder: Path, name: str, *, schema: pa.Schema) -> None:
        self.shards: list[dict[str, Any]] = []
        self.schema = schema
        self._folder, self._name = folder, name
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

    def finish_shard(self) -> None:
        """Close the open shard, if any, and hash it."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with self._file.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._file.stat().st_size
        name = self._file.name
        self.shards.append({"file": name, "rows": self.rows, "bytes": size, "sha256": sha256})
        self.rows = self.bytes = 0

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._name}-{len(self.shards):05d}.parquet"


def write_json(value: Any, file: Path) -> None:
    """Indented JSON, written aside and renamed."""
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(file)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` once all went well and else disappears."""
    target = folder.resolve()  # `folder` may be a link to a larger disk
    aside = target.with_name(f".{target.name}.tmp")
    with clear_disk_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def clear_disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk and missing permissions into a UserError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"no space left for {place}: free some, or link its folder to a larger disk, "
                "then run the same command again"
            ) from None
        if error.errno in _NO_PERMISSION:
            where = error.filename or place
            raise UserError(f"not allowed to write {where}: check its owner and mode") from None
        raise
