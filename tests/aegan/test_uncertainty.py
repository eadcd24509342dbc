"""Standard errors against how far figures really scatter when everything is drawn again."""

import numpy as np
import pytest
import torch
from torch import Tensor

from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from aegan.metrics.neighbours import precision_recall_density_coverage
from aegan.metrics.uncertainty import GROUPS, with_errors

IMAGES, DRAWS = 200, 40


def test_the_error_of_a_mean_of_equal_parts_is_that_of_the_parts_means() -> None:
    values = torch.randn(GROUPS * 30, generator=torch.Generator().manual_seed(0)).double()
    found = with_errors(lambda kept: {"mean": float(values[kept].mean())}, len(values))["mean"]
    parts = values.reshape(GROUPS, 30).mean(1)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(float(parts.std() / GROUPS**0.5))


def test_every_part_is_left_out_once_and_a_pair_of_images_is_enough() -> None:
    kept: list[list[int]] = []

    def measure(at: Tensor) -> dict[str, float]:
        kept.append(at.tolist())
        return {"count": float(len(at))}

    assert with_errors(measure, 2)["count"].value == 2
    assert sorted(kept) == [[0], [0, 1], [1]]
    kept.clear()
    with_errors(measure, 25)
    left_out = [set(range(25)) - {*at} for at in kept]
    assert sorted(map(len, left_out)) == [0, *[2] * 5, *[3] * 5]
    assert set().union(*left_out) == set(range(25))


@pytest.mark.parametrize("shift", [0.3, 0.6])
def test_errors_are_of_the_size_of_the_real_scatter(shift: float) -> None:
    """Of distances and shares between samples that differ from the real ones, as models' do."""

    def measure(real: Tensor, generated: Tensor) -> dict[str, float]:
        return {
            "frechet_distance": frechet_distance(real, generated),
            "kernel_distance": kernel_distance(real, generated),
            **precision_recall_density_coverage(real, generated, neighbours=5),
        }

    figures = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        real, generated = torch.randn(2, IMAGES, 6, generator=generator)
        generated = 1.2 * generated + shift
        figures.append(with_errors(lambda at, r=real, g=generated: measure(r[at], g[at]), IMAGES))
    for name in figures[0]:
        scatter = np.std([of[name].value for of in figures], ddof=1)
        said = np.sqrt(np.mean([of[name].error ** 2 for of in figures]))
        assert 0.75 < said / scatter < 2, (name, said, scatter)
