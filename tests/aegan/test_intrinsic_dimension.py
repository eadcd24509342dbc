"""The intrinsic dimension: of sets whose dimension is known, and of the designed faces."""

import numpy as np
import pytest

from aegan.data import designed_faces, intrinsic_dimension
from aegan.data.intrinsic_dimension import MIN_IMAGES, NEIGHBOURS, of_shards
from tests.shards import write_shards


def flat(count: int, dim: int, *, within: int = 40) -> np.ndarray:
    """Normal points of a flat subspace, turned into no direction of the axes, float32 [N, D]."""
    random = np.random.default_rng(0)
    points = random.standard_normal((count, dim)) @ random.standard_normal((dim, within))
    return (points + 100).astype(np.float32)


@pytest.mark.parametrize("dim", [2, 5, 8])
def test_the_dimension_of_a_flat_set_is_found(dim: int) -> None:
    found = intrinsic_dimension.intrinsic_dimension(flat(2000, dim))
    assert found == pytest.approx(dim, rel=0.15)


def test_a_hand_computed_case() -> None:
    """On a line of equal steps the nearest neighbours lie at 1, 1, 2, 2, ..., k / 2, k / 2."""
    points = np.arange(800, dtype=np.float32)[:, None]
    distances = np.repeat(np.arange(1, NEIGHBOURS // 2 + 1), 2)
    expected = 1 / np.log(distances[-1] / distances[:-1]).mean()
    found = intrinsic_dimension.intrinsic_dimension(points)
    assert found == pytest.approx(expected, rel=0.05)  # the ends have neighbours on one side


def test_a_curved_surface_has_the_dimension_of_its_coordinates() -> None:
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (3000, 2))
    circles = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert intrinsic_dimension.intrinsic_dimension(circles) == pytest.approx(2, rel=0.1)


def test_copies_are_left_out() -> None:
    points = flat(1000, 3)
    once = intrinsic_dimension.intrinsic_dimension(points)
    some_twice = np.concatenate([points, points[:300]])
    assert intrinsic_dimension.intrinsic_dimension(some_twice) == pytest.approx(once, rel=0.1)
    assert intrinsic_dimension.intrinsic_dimension(np.repeat(points[:150], 2, axis=0)) is None


@pytest.mark.parametrize("count", [1, NEIGHBOURS, MIN_IMAGES - 1])
def test_too_few_points_have_none(count: int) -> None:
    assert intrinsic_dimension.intrinsic_dimension(flat(count, 3)) is None


@pytest.mark.parametrize("side", [32, 64])
def test_the_designed_faces_have_about_as_many_dimensions_as_factors(side: int, tmp_path) -> None:
    images = designed_faces.generate(0, 2000, seed=0, image_size=side)[0]
    shards = write_shards(tmp_path, {"train": images})
    assert len(designed_faces.FACTORS) == 8
    assert of_shards(shards) == pytest.approx(8, abs=1)
