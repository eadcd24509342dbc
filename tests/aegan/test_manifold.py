"""Properties of the designed data set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegan.manifold import FACTORS, generate, render, sample_factors

NAMES = [factor.name for factor in FACTORS]
LOW = np.array([factor.low for factor in FACTORS], np.float32)
HIGH = np.array([factor.high for factor in FACTORS], np.float32)


def some_faces(count: int) -> np.ndarray:
    return sample_factors(np.arange(count), seed=11)


@settings(max_examples=20, deadline=None)
@given(
    start=st.integers(0, 2**40),
    count=st.integers(1, 130),
    seed=st.integers(0, 2**63),
    size=st.sampled_from([16, 32, 45]),
)
def test_an_image_depends_on_seed_and_index_alone(
    start: int, count: int, seed: int, size: int
) -> None:
    images, factors = generate(start, count, seed=seed, image_size=size)
    for offset in {0, count // 2, count - 1}:
        alone, its_factors = generate(start + offset, 1, seed=seed, image_size=size)
        assert np.array_equal(images[offset], alone[0])
        assert np.array_equal(factors[offset], its_factors[0])


def test_shapes_and_types() -> None:
    images, factors = generate(5, 7, seed=0, image_size=24)
    assert (images.shape, images.dtype) == ((7, 24, 24, 3), np.uint8)
    assert (factors.shape, factors.dtype) == ((7, len(FACTORS)), np.float32)
    assert generate(0, 0, seed=0, image_size=24)[0].shape == (0, 24, 24, 3)


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


@pytest.mark.parametrize("size", [32, 45, 64])
def test_the_mirror_image_of_a_face_is_the_face_turned_the_other_way(size: int) -> None:
    factors = some_faces(64)
    mirrored = factors.copy()
    mirrored[:, NAMES.index("yaw")] *= -1
    flipped = render(factors, image_size=size)[:, :, ::-1].astype(int)
    assert np.abs(flipped - render(mirrored, image_size=size)).max() <= 1
