"""Whether a figure is worse by more than another seed would make it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegan.metrics.comparison import CONFIDENCE, seed_noise, worsening

figures = st.floats(1e-3, 1e3)


@given(candidate=figures, champion=figures, scale=st.floats(0.1, 10))
def test_a_worsening_is_a_share_whatever_the_unit_and_its_sign_says_which_way(
    candidate: float, champion: float, scale: float
) -> None:
    lower = worsening(candidate, champion, "lower")
    assert lower == pytest.approx(candidate / champion - 1)
    assert worsening(candidate, champion, "higher") == -lower
    assert worsening(scale * candidate, scale * champion, "lower") == pytest.approx(lower)


def test_a_champion_at_zero_makes_any_worsening_a_large_one() -> None:
    assert worsening(0.1, 0.0, "lower") > 1e4
    assert worsening(0.0, 0.0, "higher") == 0


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_two_trainings_differ_by_more_than_the_noise_as_rarely_as_it_says(seeds: int) -> None:
    random = np.random.default_rng(0)
    trials = random.normal(10, 1, (1500, seeds + 2))
    exceeded = [
        worsening(candidate, champion, "lower") * champion > 10 * seed_noise(list(values))
        for candidate, champion, *values in trials
    ]
    assert np.mean(exceeded) == pytest.approx(1 - CONFIDENCE, abs=0.012)


def test_equal_trainings_have_no_noise() -> None:
    assert seed_noise([2.0, 2.0, 2.0]) == 0
