"""Second pass of `preprocess`: what becomes of each file, from ids, draws and thumbnails alone."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aegan.config import SPLITS, PreprocessConfig
from pipelines.base.progress import progress
from pipelines.ingest.keep_out import KeptOut
from pipelines.ingest.labels import folder_classes
from pipelines.ingest.near_duplicates import Indices, NearDuplicates
from pipelines.ingest.splits import TEST, TRAIN, VALIDATION, Numbers, drawn_splits, waiting_times

# Fates besides a split's position in SPLITS: 0, 1, 2.
UNUSABLE, DUPLICATE, SET_ASIDE, KEPT_OUT = 3, 4, 5, 6
LEAST_IMAGES = 10  # from which on no split with a fraction stays empty
LEAST_HELD_OUT = {TEST: 2, VALIDATION: 1}  # images
CANDIDATES = 1024  # images that may be looked at to fill a split
_FIRST_BATCH, _LARGEST_BATCH = 64, 1024  # images that take their turns together


@dataclass(frozen=True)
class Verdict:
    """What becomes of each file of the snapshot, in its order."""

    fate: NDArray[np.int8]  # position in SPLITS, or UNUSABLE, DUPLICATE, SET_ASIDE, KEPT_OUT
    twin: Indices  # the file that a duplicate or set-aside image resembles, or -1
    sources: pa.ChunkedArray
    groups: tuple[int, int] = (0, 0)  # groups of near duplicates, images in them
    drawn: tuple[int, ...] = (0,) * len(SPLITS)  # images of each split, before any was set aside
    promoted: dict[int, int] = field(default_factory=dict)  # split => images it got from others
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # or -1
    classes: tuple[str, ...] = ()


def decide(
    parts: list[Path],
    config: PreprocessConfig,
    *,
    thumbnails_file: Path,
    kept_out: KeptOut | None = None,
) -> Verdict:
    """Exact duplicates of an earlier file go, and near duplicates across splits.

    So do training images that are, or are near to, one that is to be kept out of training.
    An image that stays is in the split that its own draw says, whatever else the set holds; in a
    small set, the lowest draws fill test and validation split.
    """
    ids, draws, turns, usable, sources, stated = _gather(parts, thumbnails_file)
    fate = np.full(len(ids), UNUSABLE, np.int8)
    twin = np.full(len(ids), -1, np.int64)
    if not len(usable):
        return Verdict(fate, twin, sources)

    _, first, code = np.unique(ids[usable], return_index=True, return_inverse=True)
    original = usable[first[code]]
    repeated = usable != original
    fate[usable[repeated]] = DUPLICATE
    twin[usable[repeated]] = original[repeated]

    images = usable[~repeated]
    if kept_out:
        with thumbnails_file.open("ab") as out:
            out.write(kept_out.thumbnails)
    search = NearDuplicates(
        thumbnails_file, channels=config.image_channels, distance=config.near_duplicate_distance
    )
    split = drawn_splits(draws[images], config)
    if kept_out:
        trained = images[split == TRAIN]
        near = search.nearest(trained, np.arange(len(ids), search.count)) >= 0
        near |= np.isin(ids[trained], np.array(kept_out.ids, ids.dtype))  # at any distance
        fate[trained[near]] = KEPT_OUT
        stays = fate[images] != KEPT_OUT
        images, split = images[stays], split[stays]
        if not len(images):
            return Verdict(fate, twin, sources)
    drawn = tuple(np.bincount(split, minlength=len(SPLITS)).tolist())
    rival = keep_apart(search, images, split, waiting_times(turns[images], split, config))
    fate[images] = np.where(rival < 0, split, SET_ASIDE)
    twin[images] = rival
    promoted = _fill(search, fate, twin, images, draws[images], config)
    labels, classes = _label(fate, sources, stated)
    groups = search.groups(images)
    return Verdict(fate, twin, sources, groups, drawn, promoted, labels, classes)


def keep_apart(
    search: NearDuplicates,
    images: Indices,
    split: NDArray[np.int8],
    times: NDArray[np.float64],
) -> Indices:
    """For each image a near duplicate in another split that stays in its place, or -1: it stays.

    Images take their turns in the order of their times: one stays unless a near duplicate in
    another split has stayed before. So nothing that stays leaks; of a group in which all are
    alike one split stays, and of a long chain, like the frames of a film, parts in each split.
    """
    rival = np.full(len(images), -1, np.int64)
    contested = _contested(search, images, split)
    contested = contested[np.argsort(times[contested], kind="stable")]
    stays = np.zeros(len(images), np.bool_)
    start, size = 0, _FIRST_BATCH
    while start < len(contested):
        batch = contested[start : start + size]
        before = contested[:start][stays[contested[:start]]]
        for side in np.unique(split[batch]):
            asking = batch[split[batch] == side]
            others = before[split[before] != side]
            rival[asking] = search.nearest(images[asking], images[others])
        open_ends = batch[rival[batch] < 0]
        near = search.near(images[open_ends], images[open_ends])
        near &= split[open_ends][:, None] != split[open_ends]
        kept = np.zeros(len(open_ends), np.bool_)
        for row in range(len(open_ends)):
            blocking = np.flatnonzero(near[row, :row] & kept[:row])
            kept[row] = not len(blocking)
            if len(blocking):
                rival[open_ends[row]] = images[open_ends[blocking[0]]]
        stays[open_ends] = kept
        start, size = start + len(batch), min(2 * size, _LARGEST_BATCH)
    return rival


def _contested(search: NearDuplicates, images: Indices, split: NDArray[np.int8]) -> Indices:
    """Positions among the images of all that have a near duplicate in another split."""
    largest = np.bincount(split).argmax()
    few = [
        rows[search.nearest(images[rows], images[split != side]) >= 0]
        for side in range(len(SPLITS))
        if side != largest and len(rows := np.flatnonzero(split == side))
    ]
    rows, found = np.flatnonzero(split == largest), np.concatenate([np.empty(0, np.int64), *few])
    many = rows[search.nearest(images[rows], images[found]) >= 0]
    return np.concatenate([many, found])


def _fill(
    search: NearDuplicates,
    fate: NDArray[np.int8],
    twin: Indices,
    images: Indices,
    draws: Numbers,
    config: PreprocessConfig,
) -> dict[int, int]:
    """From `LEAST_IMAGES` on, see that held-out splits have images; changes `fate` and `twin`.

    What a split lacks comes from the lowest draws, first from those without near duplicates in
    other splits; else these give way, up to half of the training images. Returns how many images
    of other splits each split got.
    """
    promoted: dict[int, int] = {}
    by_draw = images[np.argsort(draws, kind="stable")]
    drawn = np.empty(len(fate), np.int8)
    drawn[images] = drawn_splits(draws, config)
    if (fate[images] < len(SPLITS)).sum() < LEAST_IMAGES:
        return promoted
    least_training = (fate == TRAIN).sum() // 2
    for split, fraction in ((TEST, config.test_fraction), (VALIDATION, config.validation_fraction)):
        while fraction > 0 and (fate == split).sum() < LEAST_HELD_OUT[split]:
            candidates = by_draw[~np.isin(fate[by_draw], (split, TEST))][:CANDIDATES]
            others = images[(fate[images] < len(SPLITS)) & (fate[images] != split)]
            prices = _near_counts(search, candidates, others) - (fate[candidates] != SET_ASIDE)
            prices[_near_counts(search, candidates, others[fate[others] == TEST]) > 0] = len(fate)
            cheapest = candidates[prices.argmin()]
            if (fate == TRAIN).sum() - prices.min() - 1 < least_training:
                break
            near = others[search.near(cheapest[None], others)[0] & (others != cheapest)]
            fate[near], twin[near] = SET_ASIDE, cheapest
            fate[cheapest], twin[cheapest] = split, -1
            if drawn[cheapest] != split:
                promoted[split] = promoted.get(split, 0) + 1
    return promoted


def _near_counts(search: NearDuplicates, images: Indices, among: Indices) -> Indices:
    """How many near duplicates each image has among others, itself included."""
    counts = np.zeros(len(images), np.int64)
    for start in range(0, len(among), _LARGEST_BATCH):
        counts += search.near(images, among[start : start + _LARGEST_BATCH]).sum(axis=1)
    return counts


def _label(
    fate: NDArray[np.int8], sources: pa.ChunkedArray, stated: pa.ChunkedArray
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Position of each kept image's class among the names, or -1: as stated, else by folder."""
    kept = np.flatnonzero(fate < len(SPLITS))
    folders = pc.replace_substring_regex(sources, pattern="/?[^/]*$", replacement="")
    if stated.take(kept).null_count == len(kept):
        stated = folders
    names = stated.combine_chunks().dictionary_encode()
    codes = names.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    seen = np.unique(codes[kept])
    seen = seen[seen >= 0]
    found = [names.dictionary[code].as_py() for code in seen.tolist()]
    if stated is folders:
        found = folder_classes(found, images=len(kept))
    classes = tuple(sorted({name for name in found if name}))
    label_of = np.full(len(names.dictionary) + 1, -1, np.int32)  # the last: of code -1
    number = {name: place for place, name in enumerate(classes)}
    label_of[seen] = [number.get(name, -1) for name in found]
    return label_of[codes], classes


def _gather(
    parts: list[Path], thumbnails_file: Path
) -> tuple[np.ndarray, Numbers, Numbers, Indices, pa.ChunkedArray, pa.ChunkedArray]:
    """Ids, draws, turns, rows that are usable, sources, and labels as far as the source states any.

    The thumbnails go to a file.
    """
    ids, draws, turns, usable, sources, labels = [], [], [], [], [], []
    columns = ["source", "image_id", "draw", "turn", "thumbnail", "reason", "label"]
    with thumbnails_file.open("wb") as out:
        for part in progress(parts, "comparing", unit="parts", total=len(parts)):
            there = pq.read_schema(part).names  # of a source with classes, some parts have none
            table = pq.read_table(part, columns=[name for name in columns if name in there])
            out.write(b"".join(table.column("thumbnail").to_pylist()))
            # 128 bits of the hash tell any number of images apart, in half the memory.
            ids.append(np.array(table.column("image_id").to_pylist(), "S32"))
            draws.append(table.column("draw").to_numpy())
            turns.append(table.column("turn").to_numpy())
            usable.append(table.column("reason").is_null().to_numpy())
            sources.append(pa.array(table.column("source").to_pylist(), pa.string()))
            stated = table.column("label").to_pylist() if "label" in there else [None] * len(table)
            labels.append(pa.array(stated, pa.string()))
    return (
        np.concatenate(ids),
        np.concatenate(draws),
        np.concatenate(turns),
        np.flatnonzero(np.concatenate(usable)),
        pa.chunked_array(sources),
        pa.chunked_array(labels),
    )
