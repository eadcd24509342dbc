"""Parquet shards -> uint8 images. The only reader of the data contract in docs/architecture.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from aegan.config import Split


def read_manifest(folder: Path) -> dict[str, Any]:
    """The shards' manifest; see docs/architecture.md for its keys."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def load_images(folder: Path, split: Split, *, limit: int | None = None) -> np.ndarray:
    """Images of a split in shard order (the first `limit`), uint8 [N, H, W, C]."""
    manifest = read_manifest(folder)
    size, channels = manifest["image_size"], manifest["image_channels"]
    rows = manifest["splits"][split]["rows"]
    images = np.empty((rows if limit is None else min(rows, limit), size, size, channels), np.uint8)
    start = 0
    for shard in manifest["splits"][split]["shards"]:
        file = pq.ParquetFile(folder / shard["file"])
        for group in range(file.num_row_groups):
            if start == len(images):
                return images
            column = file.read_row_group(group, columns=["image"]).column("image")
            for chunk in column.chunks:
                pixels = np.frombuffer(
                    chunk.buffers()[1],
                    np.uint8,
                    len(chunk) * size * size * channels,
                    offset=chunk.offset * size * size * channels,
                ).reshape(-1, size, size, channels)
                taken = pixels[: len(images) - start]
                images[start : start + len(taken)] = taken
                start += len(taken)
    return images


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
