"""Each metric against a plain reference, and against what it is meant to notice."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, ndimage, stats

from aegan.data import designed_faces
from aegan.data.designed_faces import FACTORS, Factor
from aegan.metrics import METRICS, factors, latent, sliced_wasserstein
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.features import extract, random_features
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from aegan.metrics.neighbours import precision_recall_density_coverage, two_sample_accuracy
from aegan.metrics.reconstruction import nearest_images, reconstruction_errors
from aegan.pixels import to_float
from aegan.priors import NormalPrior

SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    """600 designed faces, 32x32."""
    return torch.from_numpy(designed_faces.generate(0, 600, seed=0, image_size=32)[0])


def noise_images(count: int, size: int, channels: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, size, size, channels)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    smooth = ndimage.gaussian_filter(images.numpy().astype(float), (0, sigma, sigma, 0))
    return torch.from_numpy(smooth.round().astype(np.uint8))


def noisy(images: torch.Tensor, gray_levels: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + gray_levels * noise).round().clamp(0, 255).to(torch.uint8)


def with_few_modes(images: torch.Tensor, count: int) -> torch.Tensor:
    return images[torch.arange(len(images)) % count]


# -- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [16, 32, 128])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_random_features_exist_for_every_image_size_and_channel_count(
    image_size: int, image_channels: int
) -> None:
    images = noise_images(3, image_size, image_channels)
    features = extract(random_features(image_channels), images)
    assert features.shape == (3, 240)
    assert features.isfinite().all()


def test_random_features_depend_on_their_seed_alone_and_leave_the_global_one() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = random_features(3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = random_features(3).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = random_features(3, seed=1).state_dict()
    assert not any(torch.equal(one[name], different[name]) for name in one)


def test_features_named_random_vgg_seed0_stay_what_they_are() -> None:
    ramp = torch.arange(16 * 16 * 3).reshape(1, 16, 16, 3).div(3).to(torch.uint8)
    features = extract(random_features(3), ramp)[0]
    picked = features[[0, 8, 16, 100, 239]].tolist()
    assert picked == pytest.approx([0.24619, 0.23173, 0.02363, -0.13978, 0.12779], rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_frechet_distance_on_random_features_grows_with_every_corruption(
    faces: torch.Tensor, seed: int
) -> None:
    extractor = random_features(3, seed=seed)
    reference, other = faces[:300], faces[300:]

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(extract(extractor, reference), extract(extractor, images))

    floor = distance(other)
    for corrupt, strengths in (
        (blurred, (0.5, 1.0, 2.0)),
        (noisy, (15, 30, 60)),
        (with_few_modes, (60, 15, 1)),
    ):
        distances = [distance(corrupt(other, strength)) for strength in strengths]
        assert [floor, *distances] == sorted([floor, *distances]), corrupt.__name__
        assert distances[0] > 1.1 * floor, corrupt.__name__


# -- distances between sets of features -----------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, dim=st.integers(1, 12), count=st.integers(2, 40))
def test_frechet_distance_equals_the_textbook_formula(seed: int, dim: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(count, dim)) @ generator.normal(size=(dim, dim))
    b = generator.normal(size=(count + 3, dim)) + 0.5
    cov_a, cov_b = (np.cov(x, rowvar=False).reshape(dim, dim) for x in (a, b))
    # Eigenvalues of a product of covariances are real and not negative, but for rounding.
    root = np.sqrt(linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_0_with_fewer_images_than_features() -> None:
    features = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 1) == pytest.approx(200, rel=1e-5)


def test_kernel_distance_equals_sums_over_all_pairs() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 7, 5))
    b += 0.5

    def mean(x: np.ndarray, y: np.ndarray, *, same: bool) -> float:
        values = [
            (x[i] @ y[j] / 5 + 1) ** 3 for i in range(7) for j in range(7) if not (same and i == j)
        ]
        return float(np.mean(values))

    expected = mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False)
    assert kernel_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)


def test_neighbourhood_scores_equal_their_definitions_pair_by_pair() -> None:
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(25, 3)), generator.normal(0.5, 1.3, size=(20, 3))

    def radius(points: np.ndarray, i: int) -> float:
        others = [float(np.linalg.norm(points[i] - point)) for point in np.delete(points, i, 0)]
        return sorted(others)[2]  # the third nearest

    def holds(points: np.ndarray, i: int, point: np.ndarray) -> bool:
        return bool(np.linalg.norm(points[i] - point) < radius(points, i))

    inside = np.array([[holds(real, n, sample) for sample in generated] for n in range(25)])
    around = np.array([[holds(generated, m, image) for m in range(20)] for image in real])
    assert precision_recall_density_coverage(
        torch.from_numpy(real), torch.from_numpy(generated), neighbours=3
    ) == pytest.approx(
        {
            "precision": inside.any(0).mean(),
            "recall": around.any(1).mean(),
            "density": inside.sum() / (3 * 20),
            "coverage": inside.any(1).mean(),
        }
    )


def test_precision_and_recall_tell_missing_quality_from_missing_variety() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 2, generator=generator)
    real[200:] += 20  # two modes
    one_mode = torch.randn(400, 2, generator=generator)
    spread_out = 40 * torch.rand(400, 2, generator=generator) - 10
    few = precision_recall_density_coverage(real, one_mode, neighbours=5)
    vague = precision_recall_density_coverage(real, spread_out, neighbours=5)
    assert few["precision"] > 0.9 > 0.6 > few["recall"]
    assert 0.3 < few["coverage"] < 0.6
    assert vague["precision"] < 0.5
    assert vague["density"] < 0.5


def test_two_samples_are_told_apart_by_their_nearest_neighbours_counted_by_hand() -> None:
    a, b = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[8.5], [20.0], [21.0]])
    own = [1, 1, 0, 0, 1, 1]  # 9 and 8.5 are each other's
    assert two_sample_accuracy(a, b) == pytest.approx(sum(own) / 6)
    with pytest.raises(ValueError, match="must be equally large, not 3 and 2"):
        two_sample_accuracy(a, b[:2])


def test_two_samples_of_one_distribution_are_told_apart_by_chance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1500, 16, generator=generator)
    assert two_sample_accuracy(a, b) == pytest.approx(0.5, abs=0.03)
    assert two_sample_accuracy(a, b + 1) > 0.8
    bits = torch.randint(2, (2, 500, 3), generator=generator)  # all in eight places
    assert two_sample_accuracy(*bits) == pytest.approx(0.5, abs=0.02)


def test_a_hole_in_the_codes_that_no_moment_shows_is_seen_by_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(2000, generator=generator)
    ring = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)  # mean 0, covariance I
    found = departures(ring)
    assert max(found["mean_error"], found["std_error"], found["correlation"]) < 0.05
    assert found["two_sample_accuracy"] > 0.75


def test_neighbours_are_lowered_for_a_handful_of_images() -> None:
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    scores = precision_recall_density_coverage(features, features, neighbours=5)
    assert scores["precision"] == scores["recall"] == scores["coverage"] == 1


# -- patches and variety --------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [16, 32, 96])
def test_laplacian_pyramid_adds_up_to_the_image(image_size: int) -> None:
    x = to_float(noise_images(2, image_size, 3))
    *details, smallest = sliced_wasserstein.laplacian_pyramid(x)
    assert smallest.shape[-1] < 32
    for detail in reversed(details):
        size = detail.shape[-2:]
        smallest = torch.nn.functional.interpolate(smallest, size, mode="bilinear") + detail
    assert torch.allclose(smallest, x, atol=1e-5)


def test_sliced_distance_in_one_dimension_is_the_wasserstein_distance() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50, 1)) * [[[1.0]], [[3.0]]]
    generator = torch.Generator().manual_seed(0)
    found = sliced_wasserstein.sliced_distance(
        torch.from_numpy(a).float(), torch.from_numpy(b).float(), generator
    )
    assert found == pytest.approx(stats.wasserstein_distance(a[:, 0], b[:, 0]), rel=1e-5)


def test_sliced_wasserstein_notices_blur_noise_and_colour(faces: torch.Tensor) -> None:
    reference, other = faces[:150], faces[150:300]

    def distance(images: torch.Tensor) -> float:
        return sliced_wasserstein.sliced_wasserstein(reference, images, seed=0)

    floor = distance(other)
    assert distance(reference) == 0
    assert distance(blurred(other, 2)) > distance(blurred(other, 0.7)) > 1.5 * floor
    assert distance(noisy(other, 40)) > distance(noisy(other, 15)) > 1.5 * floor
    assert distance(other // 2) > 1.5 * floor


@pytest.mark.parametrize("image_size", [16, 32, 64, 96, 128])
def test_ms_ssim_of_copies_is_1_and_falls_with_variety(image_size: int) -> None:
    varied = noise_images(6, image_size, 1)
    copies = varied[:1].expand(6, -1, -1, -1)
    assert ms_ssim(copies, seed=0) == pytest.approx(1, abs=1e-4)
    assert ms_ssim(varied, seed=0) < 0.5


def test_gray_levels_a_little_apart_are_similar_also_about_the_middle() -> None:
    """SSIM compares intensities: on pixels about 0 its term of luminance would change its sign."""
    levels = torch.tensor([131, 124], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(2, 32, 32, 3)
    assert ms_ssim(images, seed=0) > 0.99
    assert reconstruction_errors(images[:1], images[1:])["ssim"].item() > 0.99


# -- reconstruction and latents -------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, channels=st.sampled_from([1, 3]))
def test_reconstruction_errors_equal_their_definitions(seed: int, channels: int) -> None:
    generator = np.random.default_rng(seed)
    images, other = generator.integers(0, 256, (2, 3, 16, 16, channels), dtype=np.uint8)
    x, x_tilde = images / 127.5 - 1, other / 127.5 - 1
    errors = reconstruction_errors(torch.from_numpy(images), torch.from_numpy(other))
    assert errors["mae"].tolist() == pytest.approx(np.abs(x - x_tilde).mean((1, 2, 3)), rel=1e-4)
    mse = np.square(x - x_tilde).mean((1, 2, 3))
    assert errors["psnr"].tolist() == pytest.approx(10 * np.log10(4 / mse), rel=1e-4)


def test_a_perfect_reconstruction_has_finite_scores(faces: torch.Tensor) -> None:
    def mean_errors(images: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
        errors = reconstruction_errors(images, other)
        return {name: float(values.mean()) for name, values in errors.items()}

    errors = mean_errors(faces[:5], faces[:5])
    assert errors["mae"] == 0
    assert errors["ssim"] == pytest.approx(1, abs=1e-5)
    assert math.isfinite(errors["psnr"])
    blurry = [mean_errors(faces, blurred(faces, sigma)) for sigma in (0.5, 1, 2)]
    assert [e["ssim"] for e in blurry] == sorted((e["ssim"] for e in blurry), reverse=True)
    assert errors["psnr"] > blurry[0]["psnr"] > blurry[1]["psnr"] > blurry[2]["psnr"]


def test_the_nearest_image_of_a_noisy_copy_is_its_original(faces: torch.Tensor) -> None:
    assert torch.equal(nearest_images(noisy(faces[:50], 10), faces), faces[:50])


@settings(deadline=None, max_examples=5)
@given(seed=SEEDS, dim=st.sampled_from([1, 3, 16]))
def test_mmd_to_the_prior_equals_a_large_sample_estimate(seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = 0.7 * torch.randn(50, dim, generator=generator).double() + 0.3
    y = torch.randn(4000, dim, generator=generator).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(a[:, None] - b).square().sum(-1) / (2 * dim))

    unequal = ~torch.eye(50, dtype=torch.bool)
    among_prior = kernel(y[:2000], y[2000:]).mean()
    expected = kernel(z, z)[unequal].mean() - 2 * kernel(z, y).mean() + among_prior
    assert latent.mmd(z, NormalPrior(dim)) == pytest.approx(float(expected), abs=0.02)


def departures(z: torch.Tensor) -> dict[str, float]:
    return latent.departures(z, NormalPrior(z.shape[1]))


def test_departures_name_what_is_not_normal() -> None:
    z = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    normal = departures(z)
    assert normal.pop("two_sample_accuracy") == pytest.approx(0.5, abs=0.03)
    assert all(value < 0.2 for value in normal.values())
    assert departures(z + 0.5)["mean_error"] == pytest.approx(0.5, abs=0.05)
    assert departures(1.5 * z)["std_error"] == pytest.approx(0.5, abs=0.05)
    assert departures(z.exp())["skewness_error"] > 2
    uniform = torch.from_numpy(stats.norm.cdf(z.numpy()))
    assert departures(uniform)["kurtosis_error"] == pytest.approx(1.2, abs=0.2)
    tied = torch.cat([z, z], dim=1)
    assert departures(tied)["correlation"] > 0.1
    for wrong in (z + 0.5, 1.5 * z, tied):
        assert departures(wrong)["mmd"] > 10 * abs(normal["mmd"])


def test_departures_of_a_constant_dimension_is_finite() -> None:
    z = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    z[:, 0] = 1.0
    scores = departures(z)
    assert all(math.isfinite(value) for value in scores.values())
    assert scores["std_error"] > 0.3
    assert all(math.isfinite(value) for value in departures(z[:, :1]).values())


# -- factors of the designed faces -----------------------------------------------------------------

ANGLE_AND_LENGTH = [
    Factor("angle", -3.0, 5.0, circular=True),
    Factor("length", -1.0, 1.0, circular=False),
]


@settings(deadline=None)
@given(turn=st.floats(0, 0.999), length=st.floats(0, 1))
def test_factors_survive_embedding(turn: float, length: float) -> None:
    values = np.array([[-3 + 8 * turn, -1 + 2 * length]])
    found = factors.unembed(factors.embed(values, ANGLE_AND_LENGTH), ANGLE_AND_LENGTH)
    assert found[0, 1] == pytest.approx(length, abs=1e-9)
    assert abs((found[0, 0] - turn + 0.5) % 1 - 0.5) < 1e-9


def test_a_circular_factor_has_no_ends() -> None:
    ends = factors.embed(np.array([[-3.0, 0.0], [5.0 - 1e-9, 0.0]]), ANGLE_AND_LENGTH)
    assert np.allclose(ends[0], ends[1])


def recovery(codes: np.ndarray, values: np.ndarray) -> dict[str, dict[str, float]]:
    """Fitted on the first 600, measured on the others."""
    readings = factors.read_codes(codes[:600], values[:600], codes[600:], ANGLE_AND_LENGTH)
    return {
        regression: factors.r_squared(read, values[600:], ANGLE_AND_LENGTH)
        for regression, read in readings.items()
    }


def test_recovery_is_1_for_codes_that_hold_the_factors_and_0_for_noise() -> None:
    generator = np.random.default_rng(0)
    values = generator.uniform([-3, -1], [5, 1], size=(900, 2))
    mixed = factors.embed(values, ANGLE_AND_LENGTH) @ generator.normal(size=(4, 4))
    noise = generator.normal(size=(900, 4))

    for scores in recovery(mixed, values).values():
        assert min(scores.values()) > 0.95
    for scores in recovery(noise, values).values():
        assert max(scores.values()) < 0.05


def test_only_the_nonlinear_recovery_reads_a_curved_code() -> None:
    values = np.random.default_rng(0).uniform([-3, -1], [5, 1], size=(900, 2))
    codes = np.stack([values[:, 1] ** 2, np.sign(values[:, 1]), values[:, 0]], axis=1)
    scores = recovery(codes, values)
    assert scores["linear"]["length"] < 0.9 < scores["nonlinear"]["length"]


def test_factors_are_read_off_unseen_designed_faces() -> None:
    images, values = designed_faces.generate(0, 1500, seed=0, image_size=32)
    pixels = torch.from_numpy(images)
    reader = factors.FactorReader(pixels[:1200], values[:1200].astype(float), FACTORS)
    found = reader.read(pixels[1200:])
    low = np.array([factor.low for factor in FACTORS])
    wanted = (values[1200:] - low) / (np.array([factor.high for factor in FACTORS]) - low)
    difference = found - wanted
    circular = np.array([factor.circular for factor in FACTORS])
    difference = np.where(circular, (difference + 0.5) % 1 - 0.5, difference)
    assert (np.abs(difference).mean(0) < 0.1).all()


def test_marginals_miss_a_missing_combination_that_pairs_reveal() -> None:
    a, b = np.random.default_rng(0).uniform(size=(2, 5000, 2))
    tied = np.stack([b[:, 0], b[:, 0]], axis=1)
    assert max(factors.marginal_distances(a, tied, ANGLE_AND_LENGTH).values()) < 0.05
    assert factors.joint_distance(a, b) < 0.05
    assert factors.joint_distance(a, tied) > 0.5
    assert factors.marginal_distances(a / 2, a / 2 + 0.5, ANGLE_AND_LENGTH)["length"] == 1


# -- words and weight -----------------------------------------------------------------------------


def test_the_page_on_metrics_explains_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in page] == []


def test_importing_the_metrics_loads_no_metric_library() -> None:
    code = (
        "import sys, aegan, pipelines.evaluate; "
        "sys.exit(str({'torchmetrics', 'sklearn', 'scipy', 'matplotlib'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "set()"
