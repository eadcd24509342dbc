"""Whether new images may be trained on: what changed since the last time, finding by finding."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from aegan.config import SPLITS, PreprocessConfig, RetrainConfig
from aegan.data.dataset import image_shape, load_columns, read_row_group, row_groups
from aegan.metrics.drift import Drift, Test, compare
from aegan.networks import AEGAN
from aegan.pictures import grid, save_png
from pipelines.base.errors import UserError
from pipelines.base.files import read_json
from pipelines.ingest.near_duplicates import NearDuplicates, thumbnails
from pipelines.ingest.quarantine import (
    KEPT_OUT_REASON,
    cell,
    kind_of_reason,
    read_quarantine,
)
from pipelines.registry.reference import most_images

Verdict = Literal["ok", "wait", "ask", "refuse"]  # the later the graver
SAME_FORM = ("image_size", "image_channels", "fit", "value_range")  # of the manifest
COPIES = (
    *("identical file", "duplicate", "near duplicate of an image in another split"),
    KEPT_OUT_REASON,
)
HARMLESS = ("hidden or system file", "companions of images, not read")
SHEET_COLUMNS, SHEET_PIXELS = 4, 64  # least side of an image on the sheet
MOST_FORMATS = 8  # that are named

Ids = NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: float
    threshold: float | None  # None: it is only counted
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `check` finds."""

    findings: tuple[Finding, ...]
    left_out: tuple[str, ...] = ()  # ids of new images that are too near to the reference
    drift: Drift | None = None  # None: there was too little to compare

    @property
    def verdict(self) -> Verdict:
        """The gravest of the findings'."""
        return max((finding.verdict for finding in self.findings), key=get_args(Verdict).index)


@dataclass(frozen=True, kw_only=True)
class Preprocessed:
    """What one run of the stage preprocess has left."""

    shards: Path  # with their manifest.json
    quarantine: Path  # .csv


def check(
    new: Preprocessed,
    old: Preprocessed,
    *,
    reference: Path,
    model: AEGAN | None,
    features: str,
    preprocess: PreprocessConfig,
    config: RetrainConfig,
    sheet: Path,
) -> Check:
    """Compare all images of now with all of last time; UserError where a file is missing.

    `reference` is a Parquet file with the columns of a shard, whose images no training may see;
    `model` is the champion. The oddest new images are drawn to `sheet`, a .png.
    """
    form = _form(new.shards, old.shards)
    if form.verdict != "ok":
        return Check(findings=(form,))  # images of two forms cannot be compared
    now, before = _Images(new.shards), _Images(old.shards)
    is_new = ~np.isin(now.ids, before.ids)
    rows = set(read_quarantine(new.quarantine)) - set(read_quarantine(old.quarantine))
    near = _near_duplicates(
        now, is_new, before, reference, distance=preprocess.near_duplicate_distance
    )
    left_out = now.ids[is_new][near.reference]
    usable = is_new & ~np.isin(now.ids, left_out)
    drift = _drift(now, usable, before, model=model, features=features, config=config, sheet=sheet)
    kinds = Counter(kind_of_reason(reason) for _, reason in rows)
    findings = (
        form,
        _new_images(int(usable.sum()), config),
        _formats(now.sources[is_new]),
        *_unusable(kinds, int(is_new.sum()), near, config),
        _near_reference(len(left_out), kinds[KEPT_OUT_REASON]),
        *_gone(now, before, rows, config),
        _of_drift(drift, config),
    )
    return Check(findings=findings, left_out=tuple(left_out.tolist()), drift=drift)


class _Images:
    """The rows of a folder of shards, split after split."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards
        self.manifest = read_json(shards / "manifest.json", stage="preprocess")
        columns = {split: load_columns(shards, split, ["image_id", "source"]) for split in SPLITS}
        self.ids: Ids = np.concatenate([c["image_id"] for c in columns.values()]).astype(str)
        self.sources: Ids = np.concatenate([c["source"] for c in columns.values()]).astype(str)
        self.splits = np.repeat(SPLITS, [len(c["source"]) for c in columns.values()])

    def pixels(self, chosen: NDArray[np.bool_]) -> Iterator[np.ndarray]:
        """The chosen images in order, uint8 [N, H, W, C], some at a time."""
        start = 0
        for split in SPLITS:
            for file, group, rows in row_groups(self.shards, self.manifest, split):
                inside = np.flatnonzero(chosen[start : start + rows])
                start += rows
                if len(inside):
                    yield read_row_group(file, group, image_shape(self.manifest))[inside]


def new_test_images(new: Preprocessed, old: Preprocessed, *, without: Sequence[str]) -> Tensor:
    """The test images that were not there last time, uint8 [N, H, W, C], but those of `without`.

    No more than a reference has, those with the lowest hashes.
    """
    now, before = _Images(new.shards), _Images(old.shards)
    is_new = (now.splits == "test") & ~np.isin(now.ids, [*before.ids, *without])
    height, width, channels = image_shape(now.manifest)
    most = most_images(height * width * channels)
    chosen = np.isin(now.ids, np.sort(now.ids[is_new])[:most]) & is_new
    pixels = [np.empty((0, height, width, channels), np.uint8), *now.pixels(chosen)]
    return torch.from_numpy(np.concatenate(pixels))


@dataclass(frozen=True)
class _Near:
    """Near duplicates among the new images."""

    reference: NDArray[np.bool_]  # [N]: which are near the reference
    old: int = 0  # how many are near old images
    each_other: int = 0  # how many more are near other new ones


def _near_duplicates(
    now: _Images, is_new: NDArray[np.bool_], before: _Images, reference: Path, *, distance: float
) -> _Near:
    shape = image_shape(now.manifest)
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "thumbnails"
        counts, reference_ids = [], _reference_ids(reference, shape)
        with file.open("wb") as out:
            for images in (
                _reference_pixels(reference, shape),
                before.pixels(np.ones(len(before.ids), np.bool_)),
                now.pixels(is_new),
            ):
                counts.append(0)
                for some in images:
                    out.write(thumbnails(some).tobytes())
                    counts[-1] += len(some)
        if not counts[2]:
            return _Near(np.zeros(0, np.bool_))
        search = NearDuplicates(file, channels=shape[2], distance=distance)
        of_reference, of_before, of_new = np.split(np.arange(sum(counts)), np.cumsum(counts)[:2])
        near_reference = search.nearest(of_new, of_reference) >= 0
        near_reference |= np.isin(now.ids[is_new], reference_ids)  # also if nothing counts as near
        near_old = search.nearest(of_new, of_before) >= 0
        groups, members = search.groups(of_new[~near_old])
    return _Near(near_reference, int(near_old.sum()), members - groups)


def _reference_ids(file: Path, shape: tuple[int, int, int]) -> Ids:
    """UserError unless the file holds images of this shape."""
    expected = f"expected a Parquet file with images {shape[0]}x{shape[1]}x{shape[2]}, as a shard"
    try:
        schema = pq.read_schema(file)
        ids = pq.read_table(file, columns=["image_id"]).column("image_id").to_numpy()
        fits = schema.field("image").type.byte_width == np.prod(shape)
    except FileNotFoundError:
        raise UserError(f"the reference {file} not found: {expected}") from None
    except (OSError, ValueError, KeyError):  # what pyarrow makes of other files and columns
        fits = False
    if not fits:
        raise UserError(f"the reference {file} does not fit: {expected}")
    return np.asarray(ids, str)


def _reference_pixels(file: Path, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    for group in range(pq.read_metadata(file).num_row_groups):
        yield read_row_group(file, group, shape)


def _drift(
    now: _Images,
    usable: NDArray[np.bool_],
    before: _Images,
    *,
    model: AEGAN | None,
    features: str,
    config: RetrainConfig,
    sheet: Path,
) -> Drift | None:
    """New against old training images, as many as are to be compared."""
    random = np.random.default_rng(config.seed)
    samples = []
    for images, candidates in ((now, usable), (before, np.ones(len(before.ids), np.bool_))):
        rows = random.permutation(np.flatnonzero(candidates & (images.splits == "train")))
        chosen = np.isin(np.arange(len(candidates)), rows[: config.drift_images])
        if chosen.sum() < 2:
            return None
        samples.append(torch.from_numpy(np.concatenate(list(images.pixels(chosen)))))
    new, old = samples
    drift = compare(
        new,
        old,
        model=model,
        features=features,
        seed=config.seed,
        level=config.drift_level,
        min_effect=config.drift_min_effect,
        max_images=config.drift_images,
    )
    scale = -(-SHEET_PIXELS // new.shape[1])
    save_png(grid(new[drift.odd], columns=SHEET_COLUMNS), sheet, scale=scale)
    return drift


def _form(new: Path, old: Path) -> Finding:
    now, before = (read_json(folder / "manifest.json", stage="preprocess") for folder in (new, old))
    differing = [
        f"{key} was {before.get(key)} and is {now.get(key)}"
        for key in SAME_FORM
        if before.get(key) != now.get(key)
    ]
    return Finding(
        name="form of the images",
        value=len(differing),
        threshold=0,
        verdict="refuse" if differing else "ok",
        sentence=f"the champion knows images of another form: {'; '.join(differing)}"
        if differing
        else "new and old images are prepared in the same way",
    )


def _new_images(count: int, config: RetrainConfig) -> Finding:
    enough = count >= config.min_new_images
    return Finding(
        name="new images",
        value=count,
        threshold=config.min_new_images,
        verdict="ok" if enough else "wait",
        sentence=f"{count:,} new images"
        + ("" if enough else f"; a retraining waits for {config.min_new_images:,}"),
    )


def _formats(sources: Ids) -> Finding:
    formats = Counter(PurePosixPath(str(source)).suffix.lower() or "none" for source in sources)
    counts = ", ".join(
        f"{count:,} {cell(name)}" for name, count in formats.most_common(MOST_FORMATS)
    )
    return Finding(
        name="formats",
        value=len(formats),
        threshold=None,
        verdict="ok",
        sentence=f"new images by the ends of their names: {counts or 'no images'}",
    )


def _unusable(
    kinds: Counter[str], images: int, near: _Near, config: RetrainConfig
) -> tuple[Finding, Finding]:
    """New files that are no images, and those that show nothing new."""
    broken = Counter({k: n for k, n in kinds.items() if k not in (*COPIES, *HARMLESS)})
    copies = sum(kinds[kind] for kind in COPIES)
    files = images + broken.total() + copies
    counts = ", ".join(f"{count:,} {kind}" for kind, count in broken.most_common())
    return (
        _share(
            "quarantined files",
            broken.total(),
            files,
            config.max_quarantined_fraction,
            "refuse",
            f"new files are unusable{f' ({counts})' if counts else ''}",
        ),
        _share(
            "duplicates",
            copies + near.old + near.each_other,
            files,
            config.max_duplicate_fraction,
            "ask",
            "new files show what others show already "
            f"({copies:,} copies, {near.old:,} near old images, {near.each_other:,} near new ones)",
        ),
    )


def _near_reference(held_out: int, kept_out: int) -> Finding:
    """Of those that are kept out of training none is among the images any more."""
    count = held_out + kept_out
    return Finding(
        name="near duplicates of the reference",
        value=count,
        threshold=None,
        verdict="ok",
        sentence=f"{count:,} new images are near duplicates of reference images: not compared, and "
        f"{kept_out:,} of them kept out of training",
    )


def _gone(
    now: _Images, before: _Images, rows: set[tuple[str, str]], config: RetrainConfig
) -> tuple[Finding, Finding]:
    """Old images whose files are not there any more, and those whose files hold another image.

    A file that has moved, or is now set aside as a copy of another one, is neither.
    """
    copies = {source for source, reason in rows if kind_of_reason(reason) in COPIES}
    there = {cell(source) for source in now.sources} | {source for source, _ in rows}
    lost = {cell(source) for source in before.sources[~np.isin(before.ids, now.ids)]} - copies
    changed, count = len(lost & there), len(before.ids)
    return (
        _share(
            "vanished images",
            len(lost) - changed,
            count,
            config.max_vanished_fraction,
            "refuse",
            "old images are not there any more",
        ),
        _share(
            "changed images",
            changed,
            count,
            config.max_changed_fraction,
            "refuse",
            "old images have changed or cannot be read any more",
        ),
    )


def _of_drift(drift: Drift | None, config: RetrainConfig) -> Finding:
    tests = drift.tests if drift else ()
    telling = [
        test
        for test in tests
        if test.tells(level=config.drift_level, min_effect=config.drift_min_effect)
    ]
    largest = sorted(telling or tests, key=lambda test: -abs(test.effect))
    if not drift:
        sentence = "too few images to compare new with old ones"
    elif telling:
        sentence = f"new images are of another kind: {'; '.join(map(_in_words, largest))}"
    else:
        sentence = f"new images are like the old ones; the largest effect: {_in_words(largest[0])}"
    return Finding(
        name="drift",
        value=abs(largest[0].effect) if largest else 0.0,
        threshold=config.drift_min_effect,
        verdict="ask" if telling else "ok",
        sentence=sentence,
    )


def _in_words(test: Test) -> str:
    return f"{test.name} {test.effect:+.2f} (adjusted p {test.p_adjusted:.2g})"


def _share(name: str, count: int, of: int, most: float, verdict: Verdict, words: str) -> Finding:
    """A finding of a fraction, with this verdict if it is above the largest one allowed."""
    share = count / of if of else 0.0
    too_many = share > most
    return Finding(
        name=name,
        value=share,
        threshold=most,
        verdict=verdict if too_many else "ok",
        sentence=f"{count:,} of {of:,} {words}" + (f"; at most {most:.0%} may" if too_many else ""),
    )
