"""Images that no training may see: those of a Parquet file with the columns of a shard.

They are the reference that versions are compared on (pipelines/registry/reference.py), which stays
the same while the source changes; so its images need not be among the source's test images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.base.errors import UserError
from pipelines.ingest.near_duplicates import thumbnails


@dataclass(frozen=True)
class KeptOut:
    """What is known of them."""

    ids: tuple[str, ...] = ()
    thumbnails: bytes = b""  # one after the other


def read(file: Path, *, channels: int) -> KeptOut:
    """UserError unless the file holds images of so many channels, of any size."""
    expected = (
        f"expected a Parquet file of images with {channels} channels, as a shard "
        "(preprocess.keep_out)"
    )
    if not file.is_file():
        raise UserError(f"{file} not found: {expected}")
    try:
        ids = pq.read_table(file, columns=["image_id"]).column("image_id").to_pylist()
        small = b"".join(_thumbnails(file, channels))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        raise UserError(f"{file} does not fit: {expected}") from None
    return KeptOut(tuple(ids), small)


def _thumbnails(file: Path, channels: int) -> Iterator[bytes]:
    parquet = pq.ParquetFile(file)
    metadata = parquet.schema_arrow.metadata
    height, width, stored = (int(metadata[name]) for name in (b"height", b"width", b"channels"))
    if stored != channels or height != width:
        raise ValueError(f"{stored} channels")
    for rows in parquet.iter_batches(1024, columns=["image"]):
        content = b"".join(rows.column("image").to_pylist())
        images = np.frombuffer(content, np.uint8).reshape(-1, height, width, channels)
        yield thumbnails(images).tobytes()
