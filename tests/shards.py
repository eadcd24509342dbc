"""A tiny `artifacts/shards` folder for tests, as docs/architecture.md describes it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import SPLITS


def write_shards(
    folder: Path,
    images_by_split: dict[str, np.ndarray],
    factors: dict[str, dict[str, np.ndarray]] | None = None,
    *,
    classes: tuple[str, ...] = (),
) -> Path:
    """One shard per split of uint8 [N, H, W, C]; `factors[split][name]` is float [N].

    With classes, image after image is of the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _, height, width, channels = next(iter(images_by_split.values())).shape
    names = sorted(next(iter(factors.values()))) if factors else []
    splits = {}
    for split in SPLITS:
        images = images_by_split.get(split, np.empty((0, height, width, channels), np.uint8))
        rows = [np.ascontiguousarray(image).tobytes() for image in images]
        columns = {
            "image_id": pa.array([hashlib.sha256(row).hexdigest() for row in rows], pa.string()),
            "image": pa.array(rows, pa.binary(height * width * channels)),
            "split": pa.array([split] * len(rows), pa.string()),
            "label": pa.array(
                [i % len(classes) if classes else None for i in range(len(rows))], pa.int64()
            ),
            "source": pa.array([f"{split}/{i}.png" for i in range(len(rows))], pa.string()),
        }
        for name in names:
            values = factors[split][name] if factors and split in factors else []
            columns[f"factor_{name}"] = pa.array(values, pa.float32())
        metadata = {"height": height, "width": width, "channels": channels}
        metadata |= {"schema_version": 2, "preprocess_sha256": "0" * 64}
        text = {key: str(value) for key, value in metadata.items()}
        file = folder / f"{split}-00000.parquet"
        pq.write_table(
            pa.table(columns).replace_schema_metadata(text),
            file,
            row_group_size=16,
            compression="none",
            use_dictionary=False,
        )
        content = file.read_bytes()
        shard = {"file": file.name, "rows": len(rows), "bytes": len(content)}
        shard["sha256"] = hashlib.sha256(content).hexdigest()
        splits[split] = {"rows": len(rows), "shards": [shard] if rows else []}
    hashes = [shard["sha256"] for split in splits.values() for shard in split["shards"]]
    manifest = {
        "schema_version": 2,
        "image_size": height,
        "image_channels": channels,
        "fit": "crop",
        "preprocess_sha256": "0" * 64,
        "dataset_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "source": "test",
        "source_sha256": "0" * 64,
        "factors": names,
        "classes": list(classes),
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
