"""Which split an image falls into, and which of two that are alike stays."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegan.config import PreprocessConfig
from pipelines.base import params
from pipelines.ingest.deduplicate import keep_apart
from pipelines.ingest.near_duplicates import NearDuplicates
from pipelines.ingest.splits import TEST, TRAIN, VALIDATION, draw, drawn_splits, waiting_times

CONFIG = params.load(PreprocessConfig, Path(__file__).parents[2] / "params.yaml")
FRACTIONS = st.floats(0, 0.4)


def splits_of(contents: list[bytes], *, validation: float = 0.05, test: float = 0.1) -> np.ndarray:
    draws = np.array([draw(content)[0] for content in contents], np.uint64)
    config = {**vars(CONFIG), "validation_fraction": validation, "test_fraction": test}
    return drawn_splits(draws, PreprocessConfig(**config))


def test_a_split_is_the_place_of_the_first_eight_bytes_of_the_files_sha256():
    content = b"any file"
    place, turn = draw(content)
    digest = hashlib.sha256(content).digest()
    assert place == int.from_bytes(digest[:8])
    assert turn == int.from_bytes(digest[8:16])
    for places, split in (([0, 0.0999], TEST), ([0.1, 0.1499], VALIDATION), ([0.1501, 1], TRAIN)):
        draws = np.array([int(u * (2**64 - 1)) for u in places], np.uint64)
        assert drawn_splits(draws, CONFIG).tolist() == [split, split]


def test_frames_of_a_file_have_splits_of_their_own():
    draws = [draw(b"a film", frame) for frame in range(500)]
    assert draws[0] == draw(b"a film")
    assert len(set(draws)) == 500
    splits = drawn_splits(np.array([place for place, _ in draws], np.uint64), CONFIG)
    assert 25 < (splits == TEST).sum() < 80


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0.0, 0.3), (0.3, 0.0), (0.0, 0.0)])
def test_splits_come_in_the_wanted_fractions(validation, test):
    splits = splits_of([b"%d" % i for i in range(4000)], validation=validation, test=test)
    counts = np.bincount(splits, minlength=3) / 4000
    assert counts == pytest.approx([1 - validation - test, validation, test], abs=0.02)
    assert (counts > 0).tolist() == [True, validation > 0, test > 0]


@settings(max_examples=50)
@given(st.binary(), FRACTIONS, FRACTIONS)
def test_a_larger_test_fraction_never_takes_an_image_out_of_the_test_split(content, small, more):
    (before,) = splits_of([content], test=small)
    (after,) = splits_of([content], test=small + more)
    assert before != TEST or after == TEST


def near_pairs(thumbnails: np.ndarray, distance: float) -> np.ndarray:
    """All pairs by the definition, in plain floating point."""
    values = thumbnails.reshape(len(thumbnails), 256, -1).astype(float)
    contrast = np.sqrt(values.var(axis=1).mean(axis=-1))
    limit = distance * np.clip(contrast / 12, 1 / 3, 1)
    flat = values.reshape(len(values), -1)  # whole numbers: the products are exact
    norms = np.square(flat).sum(axis=1)
    squares = norms[:, None] + norms - 2 * flat @ flat.T
    return squares / flat.shape[1] < np.square(np.minimum(limit[:, None], limit))


def groups(seed: int, *, count: int, pictures: int, noise: float) -> np.ndarray:
    """uint8 [N, 768]: a few pictures, each with many slightly different copies."""
    random = np.random.default_rng(seed)
    originals = random.integers(40, 215, (pictures, 768))
    copies = originals[random.integers(0, pictures, count)]
    return (copies + random.normal(0, noise, copies.shape)).round().astype(np.uint8)


def film(count: int) -> np.ndarray:
    """uint8 [N, 768]: every frame differs little from the next and much from later ones."""
    walk = np.random.default_rng(0).normal(0, 0.8, (count, 768)).cumsum(axis=0)
    start = np.random.default_rng(1).integers(0, 256, 768)
    return (128 + 127 * np.sin((walk + start) / 50)).astype(np.uint8)


def stars(count: int) -> np.ndarray:
    """uint8 [N, 768]: faint points on black, at other places in each."""
    random = np.random.default_rng(0)
    bright = random.random((count, 256)) < 0.05
    return (bright * random.integers(6, 14, (count, 256))).astype(np.uint8).repeat(3, axis=1)


CROWDS = {
    "groups": groups(0, count=500, pictures=60, noise=1.5),
    "pairs": groups(1, count=500, pictures=350, noise=1.5),
    "one picture": groups(2, count=600, pictures=1, noise=1.0),
    "a film": film(500),
    "stars": stars(600),
}


def set_aside(thumbnails: np.ndarray, folder: Path, *, order: np.ndarray | None = None):
    """Splits and rivals of thumbnails whose files are numbered, searched in any order."""
    order = np.arange(len(thumbnails)) if order is None else order
    thumbnails[order].tofile(folder / "thumbnails")
    search = NearDuplicates(folder / "thumbnails", channels=3, distance=3.0)
    draws = np.array([draw(b"%d" % number) for number in order.tolist()], np.uint64)
    split = drawn_splits(draws[:, 0], CONFIG)
    times = waiting_times(draws[:, 1], split, CONFIG)
    rival = keep_apart(search, np.arange(len(order)), split, times)
    return split, rival


@pytest.mark.parametrize("kind", CROWDS)
def test_no_two_images_that_stay_in_different_splits_are_near_duplicates(kind, tmp_path):
    thumbnails = CROWDS[kind]
    split, rival = set_aside(thumbnails, tmp_path)
    near, stays = near_pairs(thumbnails, 3.0), rival < 0
    leaks = near & (split[:, None] != split) & stays & stays[:, None]
    assert leaks.sum() == 0
    # And an image gives way only to one that is like it and stays in another split.
    gone = np.flatnonzero(~stays)
    assert near[gone, rival[gone]].all()
    assert (split[gone] != split[rival[gone]]).all()
    assert stays[rival[gone]].all()


@pytest.mark.parametrize("size", [2, 6])
def test_every_split_loses_about_alike_to_near_duplicates(size, tmp_path):
    pictures = np.random.default_rng(0).integers(40, 215, (3000 // size, 768)).repeat(size, axis=0)
    noise = np.random.default_rng(1).integers(-1, 2, pictures.shape)
    split, rival = set_aside((pictures + noise).astype(np.uint8), tmp_path)
    counts = np.bincount(split[rival < 0])
    assert 1200 < counts.sum() < 2900
    assert counts / counts.sum() == pytest.approx([0.85, 0.05, 0.1], abs=0.03)
    in_group = split.reshape(-1, size)
    stays = (rival < 0).reshape(-1, size)
    chosen = in_group[np.arange(len(stays)), stays.argmax(axis=1)]
    assert ((in_group == chosen[:, None]) == stays).all()  # all of one split, and no more is lost


def test_a_chain_of_near_duplicates_stays_in_every_split(tmp_path):
    split, rival = set_aside(film(1200), tmp_path)
    counts = np.bincount(split[rival < 0])
    assert 500 < counts.sum() < 1200
    assert counts / counts.sum() == pytest.approx([0.85, 0.05, 0.1], abs=0.06)


def test_what_is_set_aside_for_a_split_does_not_depend_on_the_order_of_files(tmp_path):
    thumbnails = CROWDS["groups"]
    order = np.random.default_rng(0).permutation(len(thumbnails))
    _, before = set_aside(thumbnails, tmp_path)
    _, after = set_aside(thumbnails, tmp_path, order=order)
    assert ((before < 0)[order] == (after < 0)).all()


def test_pictures_of_little_contrast_are_near_duplicates_only_if_they_are_alike(tmp_path):
    distinct = stars(60)
    plain = np.square(distinct[:, None].astype(float) - distinct).mean(axis=-1) ** 0.5
    assert (plain < 3.0).mean() > 0.3  # by the plain distance many would be one picture
    thumbnails = np.concatenate([distinct, distinct + np.uint8(1)])
    thumbnails.tofile(tmp_path / "thumbnails")
    search = NearDuplicates(tmp_path / "thumbnails", channels=3, distance=3.0)
    found = search.nearest(np.arange(60), np.arange(60, 120))
    np.testing.assert_array_equal(found >= 0, near_pairs(thumbnails, 3.0)[:60, 60:].any(axis=1))
    assert search.near(np.arange(60), np.arange(60)).sum() == 60
