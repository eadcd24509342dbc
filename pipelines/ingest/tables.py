"""Parquet files with a column of images: Hugging Face's layout, plain bytes, and our own shards."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipelines.base.names import shown
from pipelines.base.outputs import listed
from pipelines.ingest.entries import (
    Allowance,
    NoImagesError,
    RawFile,
    Read,
    Skipped,
    refusal,
)

ROWS_AT_ONCE = 8  # a row may be a file of the largest size
IMAGE_COLUMNS = ("image", "img", "content", "bytes", "jpg", "jpeg", "png", "webp")
LABEL_COLUMN = "label"
SOURCE_COLUMN = "source"


def read_table(file: BinaryIO, name: str, allowance: Allowance) -> Iterator[Read]:
    """A file for each row, named by its `path` or `source`, else by the table and its number."""
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    image = _image_column(schema, name)
    groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
    declared = Allowance(name, file.seek(0, os.SEEK_END))  # before anything is unpacked
    declared.spend(sum(group.total_byte_size for group in groups))
    shape = _shape_of_shards(schema, image, name)
    names = _class_names(schema)
    ours = shape is not None or image == "content"  # elsewhere a `source` is no file's name
    others = [LABEL_COLUMN, SOURCE_COLUMN] if ours else [LABEL_COLUMN]
    others = [column for column in others if column in schema.names]
    stem = PurePosixPath(name).stem
    row = 0
    batches = parquet.iter_batches(ROWS_AT_ONCE, columns=[image, *others], use_threads=False)
    for batch in batches:
        contents, paths = _contents(batch, image)
        labels = _labels(batch, names)
        for content, path, label in zip(contents, paths, labels, strict=True):
            source = path or f"{stem}-{row:07d}"
            row += 1
            if content is None:
                yield Skipped(source, "no bytes in the table: only the path of a file elsewhere")
                continue
            size = len(content)
            allowance.spend(size)
            if reason := refusal(source, size):
                yield Skipped(source, reason)
                continue
            yield RawFile(source, _as_png(content, shape) if shape else content, label=label)


def _image_column(schema: pa.Schema, name: str) -> str:
    """The column that holds bytes of images: one of the usual names first, else the only one."""
    twice = [column for column, times in Counter(schema.names).items() if times > 1]
    if twice:
        raise NoImagesError(f"{name} has several columns of one name ({listed(twice)})")
    found = [field.name for field in schema if _holds_bytes(field.type)]
    known = [column for column in IMAGE_COLUMNS if column in found]
    if known or len(found) == 1:
        return str((known or found)[0])
    columns = ", ".join(f"{shown(field.name)} ({field.type})" for field in list(schema)[:20])
    expected = "one column `image` of bytes, or of {bytes, path} as Hugging Face writes it"
    if found:
        raise NoImagesError(
            f"{name} has several columns of bytes ({', '.join(map(shown, found))}): "
            f"expected {expected}"
        )
    raise NoImagesError(f"{name} has no column of images: expected {expected}; it has {columns}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "bytes" in fields and _holds_bytes(fields["bytes"])
    return any(
        check(kind)
        for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    )


def _shape_of_shards(schema: pa.Schema, image: str, name: str) -> tuple[int, int, int] | None:
    """(height, width, channels) of raw pixels, as our own shards hold them; None for files."""
    kind = schema.field(image).type
    if not pa.types.is_fixed_size_binary(kind):
        return None
    try:
        height, width, channels = (
            int((schema.metadata or {})[key]) for key in (b"height", b"width", b"channels")
        )
    except (KeyError, ValueError):
        raise NoImagesError(
            f"{name} holds pixels of unknown shape: its metadata lack height, width and channels"
        ) from None
    if height * width * channels != kind.byte_width or channels not in (1, 3):
        raise NoImagesError(
            f"{name} holds {kind.byte_width} bytes an image, which are not the "
            f"{height} x {width} x {channels} values that its metadata state"
        )
    return height, width, channels


def _as_png(pixels: bytes, shape: tuple[int, int, int]) -> bytes:
    image = np.frombuffer(pixels, np.uint8).reshape(shape)
    png = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if shape[-1] == 1 else image).save(
        png, "PNG", compress_level=1
    )
    return png.getvalue()


def _contents(batch: pa.RecordBatch, image: str) -> tuple[list[Any], list[str | None]]:
    """The bytes of each row and its name, None where there is none."""
    column = batch.column(image)
    paths: list[Any] = [None] * len(batch)
    if pa.types.is_struct(column.type):
        if "path" in [field.name for field in column.type]:
            paths = pc.struct_field(column, "path").to_pylist()
        column = pc.struct_field(column, "bytes")
    if SOURCE_COLUMN in batch.schema.names:
        paths = batch.column(SOURCE_COLUMN).to_pylist()
    return column.to_pylist(), [path if isinstance(path, str) else None for path in paths]


def _class_names(schema: pa.Schema) -> list[str]:
    """Names of the classes as Hugging Face's `datasets` writes them into the metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[LABEL_COLUMN]["names"]]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []


def _labels(batch: pa.RecordBatch, names: list[str]) -> list[str | None]:
    if LABEL_COLUMN not in batch.schema.names:
        return [None] * len(batch)
    return [_label(value, names) for value in batch.column(LABEL_COLUMN).to_pylist()]


def _label(value: Any, names: list[str]) -> str | None:
    """A class as text; -1 is Hugging Face's "none stated"."""
    if isinstance(value, int) and not isinstance(value, bool):
        if names:
            return names[value] if 0 <= value < len(names) else None
        return str(value) if value != -1 else None
    return str(value) if isinstance(value, str | bool) else None
