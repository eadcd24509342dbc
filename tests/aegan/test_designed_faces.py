"""Properties of the designed data set."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegan.data.designed_faces import FACTORS, generate, render, sample_factors

NAMES = [factor.name for factor in FACTORS]
LOW = np.array([factor.low for factor in FACTORS], np.float32)
HIGH = np.array([factor.high for factor in FACTORS], np.float32)


def some_faces(count: int) -> np.ndarray:
    return sample_factors(np.arange(count), seed=11)


def difference(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(images.astype(int) - others)


@settings(max_examples=20, deadline=None)
@given(
    start=st.integers(0, 2**40),
    count=st.integers(1, 130),
    seed=st.integers(0, 2**63),
    size=st.sampled_from([16, 32, 45, 130]),
)
def test_an_image_depends_on_seed_and_index_alone(
    start: int, count: int, seed: int, size: int
) -> None:
    images, factors = generate(start, count, seed=seed, image_size=size)
    for offset in {0, count // 2, count - 1}:
        alone, its_factors = generate(start + offset, 1, seed=seed, image_size=size)
        assert np.array_equal(images[offset], alone[0])
        assert np.array_equal(factors[offset], its_factors[0])


def test_chunks_inside_a_long_call_do_not_show() -> None:
    images, _ = generate(0, 600, seed=4, image_size=32)
    parts = [generate(start, 40, seed=4, image_size=32)[0] for start in range(0, 600, 40)]
    assert np.array_equal(images, np.concatenate(parts))


def test_the_published_data_set_has_the_same_bytes_on_every_machine() -> None:
    # A deliberate change of the drawing changes this hash, and with it every figure we published.
    images, factors = generate(0, 64, seed=0, image_size=32)
    digest = hashlib.sha256(images.tobytes() + factors.astype("<f4").tobytes()).hexdigest()
    assert digest == "8faa30100e47ee039d94e3fc57d7e367b1c5da698748756f0c01d95316fb80ce"


def test_shapes_and_types_at_any_size_and_count() -> None:
    images, factors = generate(5, 7, seed=0, image_size=24)
    assert (images.shape, images.dtype) == ((7, 24, 24, 3), np.uint8)
    assert (factors.shape, factors.dtype) == ((7, len(FACTORS)), np.float32)
    assert generate(0, 0, seed=0, image_size=24)[0].shape == (0, 24, 24, 3)
    assert generate(0, 2, seed=0, image_size=1)[0].shape == (2, 1, 1, 3)
    assert generate(0, 2, seed=0, image_size=300)[0].shape == (2, 300, 300, 3)


def test_factors_are_uniform_in_their_ranges_and_uncorrelated() -> None:
    factors = sample_factors(np.arange(20000), seed=3)
    assert ((factors >= LOW) & (factors < HIGH)).all()
    deciles = np.floor((factors - LOW) / (HIGH - LOW) * 10).astype(int)
    for column in deciles.T:
        assert np.bincount(column, minlength=10) == pytest.approx(2000, abs=220)
    correlation = np.corrcoef(factors.T) - np.eye(len(FACTORS))
    assert np.abs(correlation).max() < 0.035


def test_seeds_give_different_faces() -> None:
    assert not np.isin(some_faces(50), sample_factors(np.arange(50), seed=12)).all(axis=1).any()


@pytest.mark.parametrize("size", [16, 32, 45, 64])
def test_the_mirror_image_of_a_face_is_the_face_turned_the_other_way(size: int) -> None:
    factors = some_faces(64)
    mirrored = factors.copy()
    mirrored[:, NAMES.index("yaw")] *= -1
    flipped = render(factors, image_size=size)[:, :, ::-1]
    assert np.array_equal(flipped, render(mirrored, image_size=size))


@pytest.mark.parametrize("name", NAMES)
def test_a_small_step_of_a_factor_changes_pixels_little(name: str) -> None:
    factors = some_faces(100)
    stepped = factors.copy()
    stepped[:, NAMES.index(name)] += 1e-3 * (HIGH - LOW)[NAMES.index(name)]
    change = difference(render(factors, image_size=32), render(stepped, image_size=32))
    assert change.max() <= 6


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_fifth_of_a_factor_is_seen_in_every_face(name: str) -> None:
    column = NAMES.index(name)
    step = 0.2 * (HIGH - LOW)[column]
    factors = some_faces(100)
    stepped = factors.copy()
    stepped[:, column] += np.where(factors[:, column] + step < HIGH[column], step, -step)
    change = difference(render(factors, image_size=32), render(stepped, image_size=32))
    assert change.reshape(100, -1).max(axis=1).min() >= 8


@pytest.mark.parametrize("name", [factor.name for factor in FACTORS if factor.circular])
def test_circular_factors_close_their_circle(name: str) -> None:
    column = NAMES.index(name)
    low, high = some_faces(20), some_faces(20)
    low[:, column], high[:, column] = LOW[column], HIGH[column]
    assert np.array_equal(render(low, image_size=32), render(high, image_size=32))


def test_every_size_shows_the_same_picture() -> None:
    factors = some_faces(40)
    large = render(factors, image_size=128).astype(float)
    averaged = large.reshape(40, 32, 4, 32, 4, 3).mean(axis=(2, 4))
    assert np.abs(render(factors, image_size=32) - averaged).mean(axis=(1, 2, 3)).max() < 4


def test_even_a_linear_map_of_the_pixels_reads_every_factor() -> None:
    images, factors = generate(0, 2300, seed=7, image_size=32)
    angles = 2 * np.pi * (factors - LOW) / (HIGH - LOW)
    columns = [
        (np.cos(angle), np.sin(angle)) if factor.circular else (angle,)
        for factor, angle in zip(FACTORS, angles.T, strict=True)
    ]
    y = np.stack([part for parts in columns for part in parts], axis=1)
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    x = images.reshape(len(images), -1) / np.float32(255)
    x -= x.mean(axis=0)
    products = x @ x[:2000].T
    weights = np.linalg.solve(products[:2000] + 0.3 * np.eye(2000, dtype=np.float32), y[:2000])
    unexplained = np.square(products[2000:] @ weights - y[2000:]).mean(axis=0)
    assert unexplained.max() < 0.2
    assert np.median(unexplained) < 0.03
