"""Parquet shards -> uint8 images. The only reader of the data contract in docs/architecture.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aegan.config import ConfigError, Split


def read_manifest(folder: Path) -> dict[str, Any]:
    """The shards' manifest; see docs/architecture.md for its keys."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def load_images(folder: Path, split: Split, *, limit: int | None = None) -> np.ndarray:
    """Images of a split in shard order, those of `choose_rows`, uint8 [N, H, W, C]."""
    manifest = read_manifest(folder)
    rows = choose_rows(manifest, split, limit=limit)
    shape = image_shape(manifest)
    images = np.empty((len(rows), *shape), np.uint8)
    start = 0
    for file, group, own in _by_row_group(folder, manifest, split, rows):
        place = images[start : start + len(own)]
        # Straight there: NumPy takes a copy first if it shall also find rows that are not there.
        np.take(read_row_group(file, group, shape), own, axis=0, out=place, mode="clip")
        start += len(own)
    return images


def choose_rows(
    manifest: dict[str, Any], split: Split, *, limit: int | None, seed: int = 0
) -> NDArray[np.int64]:
    """At most `limit` positions in a split, in order: random ones, always the same, int64 [N].

    The first ones would not do: images lie in the order of their folders, so by classes or dates.
    Those of a lower limit are among those of a higher one.
    """
    count: int = manifest["splits"][split]["rows"]
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def image_shape(manifest: dict[str, Any]) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (manifest["image_size"], manifest["image_size"], manifest["image_channels"])


def row_groups(
    folder: Path, manifest: dict[str, Any], split: Split
) -> Iterator[tuple[Path, int, int]]:
    """Shard, row group and its rows, of a split in shard order; a shard is opened when needed."""
    for file in (folder / shard["file"] for shard in manifest["splits"][split]["shards"]):
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            yield file, group, metadata.row_group(group).num_rows


def read_row_group(file: Path, group: int, shape: tuple[int, ...]) -> np.ndarray:
    """Images of one row group without a copy, uint8 [N, H, W, C]."""
    column = pq.ParquetFile(file).read_row_group(group, columns=["image"]).column("image")
    chunk = pa.concat_arrays(column.chunks)  # one chunk already, unless the file is unusual
    size = int(np.prod(shape))
    pixels = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
    return pixels.reshape(-1, *shape)


def load_labels(folder: Path, split: Split) -> np.ndarray:
    """Classes of a split's images in shard order, int64 [N]; raises ConfigError if one has none."""
    groups = row_groups(folder, read_manifest(folder), split)
    labels = [read_labels(file, group) for file, group, _ in groups]
    return np.concatenate([np.empty(0, np.int64), *labels])


def read_labels(file: Path, group: int) -> np.ndarray:
    """Classes of one row group, int64 [N], as positions in the manifest's `classes`."""
    column = pq.ParquetFile(file).read_row_group(group, columns=["label"]).column("label")
    if column.null_count:
        raise ConfigError(
            "model.prior has a label, but there are images without a class: put each into its "
            "class's folder (docs/data.md), or take label out of model.prior"
        )
    labels: np.ndarray = column.to_numpy()
    return labels


def spread(
    folder: Path, split: Split, *, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """At most `count` random images from all over a split, some of a row group at a time.

    Yields uint8 [N, H, W, C] and int64 [N], their classes (-1: none).
    """
    manifest = read_manifest(folder)
    shape = image_shape(manifest)
    rows = choose_rows(manifest, split, limit=count, seed=seed)
    for file, group, own in _by_row_group(folder, manifest, split, rows):
        images = read_row_group(file, group, shape)
        labels = pq.ParquetFile(file).read_row_group(group, columns=["label"]).column("label")
        yield images[own], labels.fill_null(-1).to_numpy()[own]


def _by_row_group(
    folder: Path, manifest: dict[str, Any], split: Split, rows: NDArray[np.int64]
) -> Iterator[tuple[Path, int, NDArray[np.int64]]]:
    """Shard and row group that hold some of these rows, and which ones of the group they are."""
    start = 0
    for file, group, count in row_groups(folder, manifest, split) if len(rows) else ():
        own = rows[(start <= rows) & (rows < start + count)] - start
        start += count
        if len(own):
            yield file, group, own


def load_columns(folder: Path, split: Split, columns: list[str]) -> dict[str, np.ndarray]:
    """Any other columns of a split in shard order, e.g. `["image_id", "factor_yaw"]`."""
    manifest = read_manifest(folder)
    tables = [
        pq.read_table(folder / shard["file"], columns=columns)
        for shard in manifest["splits"][split]["shards"]
    ]
    return {
        name: np.concatenate([table.column(name).to_numpy() for table in tables])
        if tables
        else np.empty(0)
        for name in columns
    }
