import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from pipelines.ingest.near_duplicates import NearDuplicates, thumbnails


@pytest.fixture
def search(tmp_path):
    """Writes thumbnails to a file and opens the search in it."""

    def open_search(thumbnails: np.ndarray, *, distance: float) -> NearDuplicates:
        thumbnails.tofile(tmp_path / "thumbnails")
        return NearDuplicates(tmp_path / "thumbnails", channels=3, distance=distance)

    return open_search


def root_mean_square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(a.astype(float) - b.astype(float)).mean(axis=-1))


def crowd(seed: int, *, count: int = 300) -> np.ndarray:
    """uint8 [N, 768] thumbnails: a few pictures, each with many slightly different copies."""
    random = np.random.default_rng(seed)
    pictures = random.integers(40, 215, (12, 768))
    noise = random.normal(0, random.uniform(0.5, 8, (count, 1)), (count, 768))
    return (pictures[random.integers(0, 12, count)] + noise).round().astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distance", [2.0, 5.0, 9.0])
def test_the_search_finds_exactly_the_images_that_comparing_all_pairs_finds(search, seed, distance):
    thumbnails = crowd(seed)
    queries, others = np.arange(0, 300, 2), np.arange(1, 300, 2)
    found = search(thumbnails, distance=distance).nearest(queries, others)
    pairs = root_mean_square(thumbnails[queries][:, None], thumbnails[others][None])
    np.testing.assert_array_equal(found >= 0, (pairs < distance).any(axis=1))
    hits = found >= 0
    near = root_mean_square(thumbnails[queries[hits]], thumbnails[found[hits]])
    assert (near < distance).all()


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_the_connected_components_of_all_near_pairs(search, seed):
    thumbnails = crowd(seed, count=100)
    pairs = root_mean_square(thumbnails[:, None], thumbnails[None]) < 4
    _, labels = connected_components(pairs)
    sizes = np.bincount(labels)
    found = search(thumbnails, distance=4).groups(np.arange(100))
    assert found == ((sizes > 1).sum(), sizes[sizes > 1].sum())


def test_a_thousand_copies_of_one_picture_are_searched_in_bounded_memory(search):
    thumbnails = np.full((4000, 768), 100, np.uint8)
    copies = search(thumbnails, distance=3)
    assert (copies.nearest(np.arange(2000), np.arange(2000, 4000)) >= 2000).all()
    assert copies.groups(np.arange(4000))[1] == 4000


def test_distance_zero_finds_nothing_and_one_image_has_no_duplicate(search):
    strict = search(crowd(0), distance=0)
    assert (strict.nearest(np.arange(150), np.arange(150, 300)) == -1).all()
    assert strict.groups(np.array([5])) == (0, 0)
    assert strict.nearest(np.array([5]), np.empty(0, np.int64)).tolist() == [-1]


@pytest.mark.parametrize("size", [16, 64, 512])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_thumbnail_is_the_mean_of_each_area_whatever_images_are_beside(size, channels):
    images = np.random.default_rng(0).integers(0, 256, (6, size, size, channels), dtype=np.uint8)
    side = size // 16
    means = images.reshape(6, 16, side, 16, side, channels).mean(axis=(2, 4))
    small = thumbnails(images)
    assert np.abs(small - means).max() <= 1
    for index in range(6):
        np.testing.assert_array_equal(thumbnails(images[index : index + 1])[0], small[index])
