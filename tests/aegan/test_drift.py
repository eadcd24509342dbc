"""The check of new images: its level, its power, and that many images alone raise no alarm."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegan.data import designed_faces
from aegan.metrics import drift
from aegan.metrics.drift import Described, compare, holm, kernel_distances, run_tests
from aegan.metrics.features import LEARNED_FEATURES, RANDOM_FEATURES
from aegan.metrics.kernel import kernel, kernel_distance
from aegan.networks import AEGAN
from tests.damage import blur, gray, jpeg, turned_hue
from tests.trained import CONFIG

POOL, SIZE = 600, 32  # images, pixels
DRAWS_OF_LEVEL, IMAGES_OF_LEVEL = 200, 50
DRAWS_OF_POWER, IMAGES_OF_POWER = 20, 100
LEVEL, MIN_EFFECT = 0.05, 0.15

slow = pytest.mark.slow
random_compare = partial(compare, model=None, features=RANDOM_FEATURES, seed=0)


def faces(count: int, *, background: float = 1.0) -> np.ndarray:
    """Designed faces, whose backgrounds have a part of the hues."""
    names = [factor.name for factor in designed_faces.FACTORS]
    factors = designed_faces.sample_factors(np.arange(count), seed=0)
    factors[:, names.index("background_hue")] *= background
    return designed_faces.render(factors, image_size=SIZE)


def some(described: Described, rows: np.ndarray) -> Described:
    return Described(
        vectors={name: vectors[rows] for name, vectors in described.vectors.items()},
        values={name: values[rows] for name, values in described.values.items()},
    )


def told(tests: tuple[drift.Test, ...], *, min_effect: float = MIN_EFFECT) -> bool:
    return any(test.tells(level=LEVEL, min_effect=min_effect) for test in tests)


@pytest.fixture(
    scope="module", params=[RANDOM_FEATURES, pytest.param(LEARNED_FEATURES, marks=slow)]
)
def describe(request):
    torch.manual_seed(0)
    model = AEGAN(CONFIG, image_size=SIZE, image_channels=3, discriminators=False)

    def describe(images: np.ndarray) -> Described:
        return drift.describe(torch.from_numpy(images), model=model, features=request.param)

    return describe


@pytest.fixture(scope="module")
def same(describe) -> Described:
    return describe(faces(POOL))


# -- level and power ------------------------------------------------------------------------------


def test_of_200_draws_of_one_kind_at_most_7_percent_raise_an_alarm(same):
    random, found = np.random.default_rng(1), []
    for _ in range(DRAWS_OF_LEVEL):
        order = random.permutation(POOL)
        new, old = order[:IMAGES_OF_LEVEL], order[IMAGES_OF_LEVEL : 2 * IMAGES_OF_LEVEL]
        found.append(run_tests(some(same, new), some(same, old), seed=0))
    # Without the bound on effects, which would hide a wrong p.
    assert np.mean([told(tests, min_effect=0) for tests in found]) <= 0.07
    p = np.array([[test.p for test in tests] for tests in found])
    assert {test.name for test in found[0]} >= {"kernel distance of E(x)", "brightness"}
    # Each test for itself is as often below its level as it says: 10 +- 3.1 times in 200.
    for level in (0.05, 0.5):
        counts = (p < level).sum(axis=0)
        error = (DRAWS_OF_LEVEL * level * (1 - level)) ** 0.5
        assert (abs(counts - level * DRAWS_OF_LEVEL) < 4 * error).all(), counts


@pytest.mark.parametrize(
    "images",
    [
        partial(turned_hue, degrees=60),
        lambda images: faces(len(images), background=0.25),
        partial(blur, sigma=0.5),
        partial(gray, share=1),
        partial(jpeg, quality=10),
    ],
    ids=["hue", "background", "blur", "gray", "jpeg"],
)
def test_100_images_of_another_kind_are_told_from_100_old_ones(describe, same, images):
    other = describe(images(faces(POOL)))
    random, found = np.random.default_rng(2), 0
    for _ in range(DRAWS_OF_POWER):
        order = random.permutation(POOL)
        new, old = order[:IMAGES_OF_POWER], order[IMAGES_OF_POWER : 2 * IMAGES_OF_POWER]
        found += told(run_tests(some(other, new), some(same, old), seed=0))
    assert found >= DRAWS_OF_POWER - 1


def test_at_10_000_images_a_tiny_shift_is_significant_and_no_alarm():
    random = np.random.default_rng(0)
    base = random.integers(60, 190, (2, 10_000, 1, 1, 1))
    base[0] += 3  # gray levels
    images = (base + random.integers(-20, 20, (2, 10_000, 16, 16, 1))).astype(np.uint8)
    new, old = (
        Described(vectors={}, values=drift.pixel_statistics(torch.from_numpy(part)))
        for part in images
    )
    brightness = run_tests(new, old, seed=0)[0]
    assert brightness.p_adjusted < 1e-4
    assert 0.02 < brightness.effect < 0.1
    assert not brightness.tells(level=LEVEL, min_effect=MIN_EFFECT)
    assert brightness.tells(level=LEVEL, min_effect=0.02)


def test_a_small_shift_of_latents_is_significant_and_no_alarm():
    z = torch.randn(2, 1000, 4, generator=torch.Generator().manual_seed(0))
    z[0, :, 0] += 0.2
    new, old = (Described(vectors={"E(x)": part}, values={}) for part in z)
    (test,) = run_tests(new, old, seed=0)
    assert test.p <= 0.01
    assert 0.01 < test.effect < MIN_EFFECT


# -- against references ---------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_distances_of_permuted_samples_are_those_of_the_samples_parted_so(count, dim, seed):
    pooled = torch.randn(2 * count, dim, generator=torch.Generator().manual_seed(seed)).double()
    halves = list(combinations(range(2 * count), count))
    is_new = torch.zeros(2 * count, len(halves)).double()
    expected = []
    for column, half in enumerate(halves):
        is_new[list(half), column] = 1
        rest = [row for row in range(2 * count) if row not in half]
        expected.append(kernel_distance(pooled[list(half)], pooled[rest]))
    among = kernel(pooled, pooled).fill_diagonal_(0)
    torch.testing.assert_close(
        kernel_distances(among, is_new), torch.tensor(expected, dtype=torch.float64)
    )


def test_the_p_of_a_kernel_distance_is_the_share_of_all_ways_to_part_the_sample():
    pooled = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    pooled[:4, 0] += 1.5
    new, old = (Described(vectors={"E(x)": part}, values={}) for part in pooled.split(4))
    (test,) = run_tests(new, old, seed=0)
    distances = []
    for half in combinations(range(8), 4):  # (0, 1, 2, 3) is the first
        rest = [row for row in range(8) if row not in half]
        distances.append(kernel_distance(pooled[list(half)], pooled[rest]))
    exact = np.mean(np.array(distances) >= distances[0] - 1e-12)
    assert test.p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 999) ** 0.5 + 0.001)


def test_effects_of_ranks_are_cliffs_delta():
    new, old = np.array([1.0, 2.0, 3.0, 3.0]), np.array([0.0, 2.0, 3.0, 9.0])
    both = [Described(vectors={}, values={"any": values}) for values in (new, old)]
    (test,) = run_tests(*both, seed=0)
    assert test.effect == pytest.approx(np.sign(new[:, None] - old).mean())


def test_holms_p_values_are_those_of_his_procedure_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_statistics_see_what_they_are_named_after():
    images = torch.from_numpy(faces(20))
    plain = drift.pixel_statistics(images)
    changed = {
        "brightness": (images // 2, -1),
        "contrast": (images // 2 + 64, -1),
        "saturation": (torch.from_numpy(gray(images.numpy(), 1)), -1),
        "red against green": (images * torch.tensor([1, 0, 1], dtype=torch.uint8), 1),
        "yellow against blue": (images * torch.tensor([1, 1, 0], dtype=torch.uint8), 1),
        "sharpness": (torch.from_numpy(blur(images.numpy(), 0.7)), -1),
        "blockiness": (torch.from_numpy(jpeg(images.numpy(), 5)), 1),
    }
    assert changed.keys() == plain.keys()
    for name, (other, sign) in changed.items():
        assert (sign * (drift.pixel_statistics(other)[name] - plain[name]) > 0).mean() > 0.8, name


# -- the whole check ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(faces(120))


def test_equal_seeds_find_the_same_and_other_seeds_draw_other_images(images):
    new, old = images[:50], images[50:]
    first = random_compare(new, old, max_images=30)
    assert random_compare(new, old, max_images=30) == first
    assert random_compare(new, old, max_images=30, seed=1) != first


def test_as_many_new_images_are_compared_as_old_ones(images):
    few, many = (
        drift.describe(part, model=None, features=RANDOM_FEATURES)
        for part in (images[:12], images[12:])
    )
    expected = run_tests(few, some(many, np.arange(12)), seed=0)
    assert run_tests(few, many, seed=0) == expected
    assert run_tests(many, few, seed=0) != expected


def test_fewer_images_than_asked_for_are_compared_as_they_are(images):
    found = random_compare(images[:2], images[2:5])
    assert not found.shifted
    assert sorted(found.odd) == [0, 1]
    with pytest.raises(ValueError, match="1 new and 5 old images; expected 2 or more of each"):
        random_compare(images[:1], images[:5])


def test_identical_images_are_of_one_kind(images):
    for new, old in ((images[:1], images[:1]), (images[:1] * 0, images[:1] * 0)):
        found = random_compare(new.expand(20, -1, -1, -1), old.expand(30, -1, -1, -1))
        assert [(test.effect, test.p) for test in found.tests] == [(0, 1)] * len(found.tests)
        assert not found.shifted


def test_gray_images_have_no_statistics_of_colours(images):
    flat = images.float().mean(-1, keepdim=True).to(torch.uint8)
    found = random_compare(flat[:60], flat[60:])
    names = {test.name for test in found.tests}
    assert names == {
        "kernel distance of features", "brightness", "contrast", "sharpness", "blockiness"
    }  # fmt: skip
    assert not found.shifted
    assert random_compare(flat[:60] // 2, flat[60:]).shifted


def test_a_model_without_encoder_is_compared_by_features_alone(images):
    model = AEGAN(CONFIG, image_size=SIZE, image_channels=3, encoder=False, discriminators=False)
    found = random_compare(images[:40], images[40:], model=model)
    assert found == random_compare(images[:40], images[40:])


def test_the_oddest_images_are_those_that_resemble_no_old_one(images):
    new = images[:60].clone()
    strange = [3, 17, 41]
    generator = torch.Generator().manual_seed(0)
    shape = (len(strange), *new.shape[1:])
    new[strange] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    found = random_compare(new, images[60:])
    assert set(found.odd[:3]) == set(strange)
    assert len(set(found.odd)) == 16
