"""Stage `preprocess`: artifacts/raw -> artifacts/shards: checked, resized, deduplicated, split.

Three passes; memory is bounded by a few row groups a core plus some 300 bytes an image:
1. decode.py: all cores turn the row groups of the snapshot into part files in a work folder
   (decode_on_ray.py: all nodes of a cluster, when the images are still in their bucket);
2. deduplicate.py: ids and thumbnails alone say what becomes of each image;
3. here: all cores stream the parts into the shards of the three splits.
The bytes do not depend on the number of processes. Killed, the next run uses the finished parts;
ended well, the next run takes from them what it would decode again (decoded_before.py).
"""

import dataclasses
import hashlib
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from PIL import Image

from aegan.config import SPLITS, PreprocessConfig, Split, TrainingConfig, check_batch_size
from aegan.data import intrinsic_dimension
from aegan.files import sha256_of_json, write_json
from aegan.pictures import grid, save_png
from pipelines.base import identity, locks, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import clear_disk_errors, new_folder, project_folder, read_json
from pipelines.base.outputs import FOLDERS, PREPROCESS, RAW, SHARDS
from pipelines.base.progress import progress
from pipelines.ingest import decode, keep_out, splits
from pipelines.ingest.deduplicate import (
    DUPLICATE,
    KEPT_OUT,
    LEAST_HELD_OUT,
    LEAST_IMAGES,
    SET_ASIDE,
    UNUSABLE,
    Verdict,
    decide,
)
from pipelines.ingest.near_duplicates import Indices
from pipelines.ingest.quarantine import KEPT_OUT_REASON, summary, write_quarantine
from pipelines.ingest.shards import ShardWriter

RUNS = Path("runs")
SCHEMA_VERSION = 2
CONTACT_SHEET_IMAGES = 100
LEAST_TRAINING_IMAGES = 4  # of which two can stand in for held-out ones
UNLIKELY = 4.0  # standard deviations of a fair draw
MUCH = 0.1  # of the images
FEW = 8  # held-out images; evaluate compares no smaller sets
DARK = 1 << 14  # 16-bit samples below: of 14 bits or fewer, or nearly black

log = logging.getLogger(__name__)


def preprocess(
    config: PreprocessConfig,
    raw: Path,
    *,
    shards: Path,
    artifacts: Path,
    runs: Path,
    other_runs: Path | None = None,
    batch_size: int = 1,
    processes: int | None = None,
) -> dict[str, Any]:
    """Write the shards and the reports; returns the statistics. Raises UserError.

    What was decoded before is looked for in `runs`, and in `other_runs`, which stays as it is.
    A set that cannot be trained on in batches of `batch_size` is refused here, not hours later.
    """
    snapshot = read_json(raw / "manifest.json", stage="download")
    kept_out = None
    if config.keep_out:
        file = project_folder() / config.keep_out
        kept_out = keep_out.read(file, channels=config.image_channels)
    how, what = _how(config), sha256_of_json(snapshot)[:16]
    with _work_folder(runs, how, what, other_runs=other_runs) as (work, earlier):
        parts = decode.decode_snapshot(
            config, raw, snapshot["shards"], work=work, earlier=earlier, processes=processes
        )
        verdict = decide(parts, config, thumbnails_file=work / "thumbnails", kept_out=kept_out)
        _check_splits(config, parts, verdict, batch_size=batch_size)
        with (
            new_folder(artifacts, written=FOLDERS[PREPROCESS]) as reports,
            new_folder(shards, written=FOLDERS[SHARDS]) as folder,
        ):
            kept = _write_shards(config, snapshot, parts, verdict, folder)
            left_out = _left_out(snapshot, parts, verdict)
            reasons = write_quarantine(left_out, reports / "quarantine.csv")
            statistics = _statistics(config, snapshot, verdict, reasons) | kept.pixel_statistics()
            of_files, warnings = _of_files(config, parts)
            statistics |= of_files
            statistics["warnings"] += warnings
            statistics["intrinsic_dimension"] = _add_dimension(folder)
            write_json(reports / "statistics.json", statistics)
            _draw(kept.sheet, reports / "contact_sheet.png")
        if decode.is_listing(raw, snapshot["shards"]):  # the next one does not tell which are known
            for part in parts:
                part.unlink()
    log.info(
        "kept %d of %d files: %d train, %d validation, %d test",
        *(statistics[key] for key in ("kept", "files", *SPLITS)),
    )
    if (dimension := statistics["intrinsic_dimension"]) is not None:
        log.info("about %g numbers describe a training image: its intrinsic dimension", dimension)
    if reasons:
        told = summary(reasons, statistics["files"])
        log.info("%s, see %s", told, artifacts / "quarantine.csv")
    for warning in statistics["warnings"]:
        log.warning("warning: %s", warning)
    return statistics


def _how(config: PreprocessConfig) -> str:
    """Hash of all that a decoded row depends on besides its file: parameters, code and decoder."""
    code = identity.code_sha256(identity.code_of(["pipelines.ingest.pieces"]))
    return sha256_of_json([_settings(config), code, PIL.__version__])[:16]


def _settings(config: PreprocessConfig) -> dict[str, Any]:
    """How images are made; which ones are kept out is no part of it."""
    settings = dataclasses.asdict(config)
    del settings["keep_out"]
    return settings


@contextmanager
def _work_folder(
    runs: Path, how: str, what: str, *, other_runs: Path | None
) -> Iterator[tuple[Path, Path | None]]:
    """The folder of the part files, and that of an earlier run on other files, if there is one.

    Parts stay when the run fails, for the same command again, and when it ends well, for the next
    files: DVC, which deletes outputs before a stage runs, leaves `runs` alone.
    """
    folder = runs / f"preprocess-{how}-{what}"
    with clear_disk_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(runs / "preprocess.lock", timeout=0):
                folder.mkdir(exist_ok=True)
                earlier = _most_parts(
                    old
                    for place in (runs, other_runs or runs)
                    for old in place.glob(f"preprocess-{how}-*")
                    if not old.samefile(folder)
                )
                _remove_others(runs, folder, earlier)
                yield folder, earlier
                for file in folder.iterdir():
                    if file.suffix != ".parquet":
                        file.unlink()
                _remove_others(runs, folder)
        except Timeout:
            raise UserError(f"another preprocess run is at work in {runs}: wait for it") from None


def _most_parts(folders: Iterator[Path]) -> Path | None:
    """A run that was killed at its start has few of them."""
    return max(folders, key=lambda folder: len(list(folder.glob("part-*"))), default=None)


def _remove_others(runs: Path, *kept: Path | None) -> None:
    for folder in runs.glob("preprocess-*"):
        if folder.is_dir() and folder not in kept:  # of other parameters, or not needed any more
            shutil.rmtree(folder)


def _check_splits(
    config: PreprocessConfig, parts: list[Path], verdict: Verdict, *, batch_size: int
) -> None:
    """What train, evaluate and interpolate need of the data; the cure stands in the error."""
    if (verdict.fate == UNUSABLE).all():
        first = pq.read_table(parts[0], columns=["source", "reason"]).slice(0, 1).to_pylist()[0]
        raise UserError(
            f"no usable image among {len(verdict.fate)} files, the first is "
            f"{first['source']} ({first['reason']}): check data.source"
        )
    counts = np.bincount(verdict.fate, minlength=KEPT_OUT + 1).tolist()
    kept = sum(counts[: len(SPLITS)])
    fractions = splits.fractions(config)
    held_out = {code: least for code, least in LEAST_HELD_OUT.items() if fractions[code] > 0}
    lost = f" ({counts[KEPT_OUT]} more are in preprocess.keep_out)" if counts[KEPT_OUT] else ""
    if held_out and kept < LEAST_IMAGES:
        raise UserError(
            f"{kept} of {len(verdict.fate)} files are different, usable images{lost}, "
            f"{LEAST_IMAGES} are needed: add images (to train without any held out: "
            "-S preprocess.validation_fraction=0 -S preprocess.test_fraction=0)"
        )
    for code, least in held_out.items():
        if counts[code] < least:
            raise UserError(
                f"{counts[code]} {SPLITS[code]} images are left and {least} are needed: the "
                "images are near duplicates of each other, and one that is like a training image "
                "cannot be held out. Add other images, or lower "
                f"preprocess.near_duplicate_distance (it is {config.near_duplicate_distance:g})"
            )
    training = counts[splits.TRAIN]
    if training < LEAST_TRAINING_IMAGES:
        raise UserError(
            f"{training} training images are left{lost} and {LEAST_TRAINING_IMAGES} are needed: "
            "add images, or lower preprocess.validation_fraction and preprocess.test_fraction"
        )
    check_batch_size(batch_size, images=training)


def _warnings(config: PreprocessConfig, verdict: Verdict) -> list[str]:
    """What a user should know about the splits, a sentence or two each."""
    kept = np.bincount(verdict.fate, minlength=len(SPLITS))[: len(SPLITS)].tolist()
    total = sum(kept)
    warnings = []
    for code, number in verdict.promoted.items():
        warnings.append(
            f"the draw left too few {SPLITS[code]} images: {number} came from another split and "
            "may go back when the set grows"
        )
    if not config.validation_fraction:
        warnings.append(
            "preprocess.validation_fraction is 0: no image tells the best checkpoint, the last "
            "one is taken, and the curves do not show whether training images are learnt by heart"
        )
    if not config.test_fraction:
        stand_in = "validation images, which have chosen the checkpoint"
        if not config.validation_fraction:
            stand_in = "training images: how the model does on new ones is not measured"
        warnings.append(f"preprocess.test_fraction is 0: evaluate and interpolate use {stand_in}")
    if 0 < kept[splits.VALIDATION] < FEW:
        warnings.append(
            f"there are only {kept[splits.VALIDATION]} validation images: which checkpoint is "
            "the best one is nearly chance"
        )
    if 0 < kept[splits.TEST] < FEW:
        warnings.append(
            f"there are only {kept[splits.TEST]} test images: evaluate measures reconstructions, "
            f"and from {FEW} on also samples and latents"
        )
    aside = int((verdict.fate == SET_ASIDE).sum())
    if aside > MUCH * (total + aside):
        warnings.append(
            f"{aside:,} of {total + aside:,} images were set aside as near duplicates of images in "
            "other splits, so that none leaks: if they show different things, lower "
            f"preprocess.near_duplicate_distance (it is {config.near_duplicate_distance:g})"
        )
    for code, fraction in enumerate(splits.fractions(config)):
        wanted = fraction * total
        unlikely = abs(kept[code] - wanted) > UNLIKELY * (wanted * (1 - fraction)) ** 0.5
        if unlikely and code not in verdict.promoted:
            lost = verdict.drawn[code] - kept[code]
            reason = f"{lost:,} near duplicates of images in other splits were set aside"
            warnings.append(
                f"{kept[code]:,} of {total:,} images are {SPLITS[code]} images, {wanted:,.0f} were "
                f"wanted: {reason if aside else 'so fell the draw'}"
            )
    return warnings


def _schema(config: PreprocessConfig, factors: list[str]) -> pa.Schema:
    """The data contract of docs/architecture.md."""
    columns = [
        ("image_id", pa.string()),
        ("image", pa.binary(config.image_size**2 * config.image_channels)),
        ("split", pa.string()),
        ("label", pa.int64()),
        ("source", pa.string()),
        *((f"factor_{name}", pa.float32()) for name in factors),
    ]
    metadata = {
        "height": config.image_size,
        "width": config.image_size,
        "channels": config.image_channels,
        "schema_version": SCHEMA_VERSION,
        "preprocess_sha256": sha256_of_json(_settings(config)),
    }
    return pa.schema(columns, {key: str(value) for key, value in metadata.items()})


@dataclass(frozen=True)
class _Shard:
    """A file to write: which images of the snapshot it holds."""

    split: Split
    number: int  # within its split
    images: Indices


def _plan_shards(config: PreprocessConfig, verdict: Verdict) -> list[_Shard]:
    """Every kept image in its split, in the snapshot's order, in shards that are full but one."""
    shards = []
    for code, split in enumerate(SPLITS):
        images = np.flatnonzero(verdict.fate == code)
        for start in range(0, len(images), config.rows_per_shard):
            rows = images[start : start + config.rows_per_shard]
            shards.append(_Shard(split, start // config.rows_per_shard, rows))
    return shards


class _TrainingImages:
    """What the reports say about the training images, gathered while they pass."""

    def __init__(self, config: PreprocessConfig, verdict: Verdict) -> None:
        self._shape = (config.image_size, config.image_size, config.image_channels)
        self._histogram = np.zeros((config.image_channels, 256), np.int64)
        images = np.flatnonzero(verdict.fate == SPLITS.index("train"))
        places = np.linspace(0, len(images) - 1, min(len(images), CONTACT_SHEET_IMAGES))
        self._wanted = images[places.astype(np.int64)]
        self._shown: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def add(self, numbers: Indices, column: pa.ChunkedArray) -> None:
        """Some images and their numbers in the snapshot; threads may call it at the same time."""
        chunk, size = column.combine_chunks(), column.type.byte_width
        pixels = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        stack = pixels.reshape(-1, *self._shape[1:])
        picture = Image.fromarray(stack.squeeze(-1) if stack.shape[-1] == 1 else stack)
        histogram = np.reshape(picture.histogram(), self._histogram.shape)
        images = pixels.reshape(-1, *self._shape)
        with self._lock:
            self._histogram += histogram
            for row in np.flatnonzero(np.isin(numbers, self._wanted)):
                self._shown[int(numbers[row])] = images[row].copy()

    @property
    def sheet(self) -> list[np.ndarray]:
        """Evenly spaced images, uint8 [H, W, C]."""
        return [self._shown[number] for number in self._wanted.tolist()]

    def pixel_statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel in grey levels, 0 to 255."""
        names = ("red", "green", "blue") if len(self._histogram) == 3 else ("grey",)
        levels = np.arange(256)
        statistics: dict[str, Any] = {"pixel_mean": {}, "pixel_std": {}}
        for name, counts in zip(names, self._histogram, strict=True):
            mean = np.average(levels, weights=counts)
            variance = np.average((levels - mean) ** 2, weights=counts)
            statistics["pixel_mean"][name] = round(float(mean), 4)
            statistics["pixel_std"][name] = round(float(variance**0.5), 4)
        return statistics


def _write_shards(
    config: PreprocessConfig,
    snapshot: dict[str, Any],
    parts: list[Path],
    verdict: Verdict,
    folder: Path,
) -> _TrainingImages:
    """Write the kept rows into the shards of their splits, several at a time, and the manifest."""
    schema = _schema(config, snapshot["factors"])
    training_images = _TrainingImages(config, verdict)
    ends = np.cumsum([pq.read_metadata(part).num_rows for part in parts])

    def write(shard: _Shard) -> dict[str, Any]:
        writer = ShardWriter(folder, shard.split, schema=schema, first=shard.number)
        written = 0
        tables = _read_rows(parts, ends, shard, verdict, schema)
        for rows in _row_groups(tables, config.rows_per_row_group):
            writer.write(rows)
            if shard.split == "train":
                numbers = shard.images[written : written + len(rows)]
                training_images.add(numbers, rows.column("image"))
            written += len(rows)
        writer.finish_shard()
        return writer.shards[0]

    shards = _plan_shards(config, verdict)
    # Threads are enough: reading, writing and hashing release the interpreter's lock.
    threads = ThreadPoolExecutor(min(decode.available_cores(), len(shards)))
    try:
        writing = threads.map(write, shards)
        entries = list(progress(writing, "writing", unit="shards", total=len(shards)))
    finally:
        threads.shutdown(cancel_futures=True)
    by_split: dict[str, Any] = {split: {"rows": 0, "shards": []} for split in SPLITS}
    for shard, entry in zip(shards, entries, strict=True):
        by_split[shard.split]["rows"] += entry["rows"]
        by_split[shard.split]["shards"].append(entry)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "image_size": config.image_size,
        "image_channels": config.image_channels,
        "fit": config.fit,
        "value_range": config.value_range,
        "preprocess_sha256": sha256_of_json(_settings(config)),
        "dataset_sha256": hashlib.sha256(
            "".join(entry["sha256"] for entry in entries).encode()
        ).hexdigest(),
        "source": snapshot["source"],
        "source_sha256": snapshot["source_sha256"],
        "factors": snapshot["factors"],
        "classes": verdict.classes,
        "splits": by_split,
    }
    write_json(folder / "manifest.json", manifest)
    return training_images


def _read_rows(
    parts: list[Path], ends: Indices, shard: _Shard, verdict: Verdict, schema: pa.Schema
) -> Iterator[pa.Table]:
    """The rows of a shard (ascending numbers), a part at a time, in the shards' schema."""
    images = shard.images
    stored = [name for name in schema.names if name not in ("split", "label")]
    first, last = np.searchsorted(ends, images[[0, -1]], side="right")
    for number in range(int(first), int(last) + 1):
        start = ends[number - 1] if number else 0
        inside = images[np.searchsorted(images, start) : np.searchsorted(images, ends[number])]
        if len(inside):
            table = pq.read_table(parts[number], columns=stored).take(inside - start)
            labels = verdict.labels[inside]
            table = table.append_column("split", pa.array([shard.split] * len(table), pa.string()))
            table = table.append_column("label", pa.array(labels, pa.int64(), mask=labels < 0))
            yield table.select(schema.names).replace_schema_metadata(schema.metadata)


def _row_groups(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows; the last may be shorter."""
    waiting: pa.Table | None = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while len(waiting) >= size:
            yield waiting.slice(0, size)
            waiting = waiting.slice(size).combine_chunks()
    if waiting is not None and len(waiting):
        yield waiting


def _left_out(
    snapshot: dict[str, Any], parts: list[Path], verdict: Verdict
) -> Iterator[tuple[str, str]]:
    for entry in snapshot["skipped"]:
        yield entry["source"], entry["reason"]
    start = 0
    for part in parts:
        table = pq.read_table(part, columns=["source", "reason"])
        fate = verdict.fate[start : start + len(table)]
        for row in np.flatnonzero(fate >= len(SPLITS)):
            source, reason = (column[row].as_py() for column in table.columns)
            if fate[row] == KEPT_OUT:
                reason = KEPT_OUT_REASON
            elif fate[row] != UNUSABLE:
                twin = verdict.sources[int(verdict.twin[start + row])].as_py()
                near = "near duplicate of an image in another split"
                kind = "duplicate" if fate[row] == DUPLICATE else near
                reason = f"{kind}: {twin}"
            yield source, reason
        start += len(table)


def _statistics(
    config: PreprocessConfig, snapshot: dict[str, Any], verdict: Verdict, reasons: Counter[str]
) -> dict[str, Any]:
    """The counts; nothing that differs between two runs on the same files."""
    counts = np.bincount(verdict.fate, minlength=len(SPLITS))[: len(SPLITS)]
    groups, images_in_groups = verdict.groups
    labels = verdict.labels[verdict.fate < len(SPLITS)]
    images_of_class = np.bincount(labels[labels >= 0], minlength=len(verdict.classes)).tolist()
    return {
        "files": snapshot["files"] + len(snapshot["skipped"]),
        "bytes": snapshot["bytes"],
        "kept": int(counts.sum()),
        **{split: int(count) for split, count in zip(SPLITS, counts, strict=True)},
        "quarantined": reasons.total(),
        "quarantined_by_reason": dict(sorted(reasons.items())),
        "near_duplicate_groups": groups,
        "images_in_near_duplicate_groups": images_in_groups,
        "classes": dict(zip(verdict.classes, images_of_class, strict=True)),
        "warnings": _warnings(config, verdict),
    }


def _of_files(config: PreprocessConfig, parts: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """What files hold besides the images taken, and what a user should know about it."""
    columns = ["frames_left_out", "largest_value"]
    table = pa.concat_tables([pq.read_table(part, columns=columns) for part in parts])
    left_out = table.column("frames_left_out").to_numpy()
    largest = table.column("largest_value").drop_null().to_numpy()  # of images with 16-bit samples
    warnings = []
    statistics: dict[str, Any] = {
        "files_with_more_frames": int(np.count_nonzero(left_out)),
        "frames_left_out": int(left_out.sum()),
        "images_of_16_bits": len(largest),
    }
    if len(largest):
        statistics["largest_16_bit_value"] = int(largest.max())
    if statistics["frames_left_out"]:
        files = statistics["files_with_more_frames"]
        warnings.append(
            f"{statistics['frames_left_out']:,} further pages or frames in {files:,} "
            f"file{'s' * (files > 1)} were left out: preprocess.frames: all takes them"
        )
    dark = largest[largest < DARK]
    if config.value_range == "full" and len(dark) > len(largest) / 2:
        most, bits = int(dark.max()), max(8, int(dark.max()).bit_length())
        warnings.append(
            f"{len(dark):,} of {len(largest):,} images with 16-bit samples hold no value above "
            f"{most:,}, of 65,535: they are dark. If their samples have {bits} bits, set "
            f"preprocess.value_range: 0..{2**bits - 1}"
        )
    return statistics, warnings


def _add_dimension(shards: Path) -> float | None:
    """Estimate the training images' intrinsic dimension and note it in the manifest."""
    dimension = intrinsic_dimension.of_shards(shards)
    rounded = None if dimension is None else round(dimension, 1)
    manifest = read_json(shards / "manifest.json", stage="preprocess")
    write_json(shards / "manifest.json", manifest | {"intrinsic_dimension": rounded})
    return rounded


def _draw(images: list[np.ndarray], file: Path) -> None:
    columns = int(len(images) ** 0.5 + 0.5)
    scale = max(1, 64 // images[0].shape[0])
    save_png(grid(np.stack(images), columns=columns), file, scale=scale)


def main() -> None:
    config = params.load(PreprocessConfig)
    batch_size = params.load(TrainingConfig).batch_size
    with locks.hold("preprocess"):
        preprocess(
            config,
            RAW,
            shards=SHARDS,
            artifacts=PREPROCESS,
            runs=RUNS,
            other_runs=project_folder() / RUNS,
            batch_size=batch_size,
        )


if __name__ == "__main__":
    run_stage(main)
