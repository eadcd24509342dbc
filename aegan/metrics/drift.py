"""Whether new images are of the kind of the old ones, and how large a difference is.

Each test has a p and an effect. The p says whether chance explains a difference, and falls with the
number of images whatever the difference; the effect says how large it is, whatever their number.
Only both together are a shift. All effects are Cliff's delta (1993): of a random new and a random
old image, how much more often the new one has the higher value than the lower one; 0: one kind, 1
or -1: each new image can be told from each old one. Below .147 a delta is usually called
negligible, from .474 on large (Romano et al. 2006).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aegan.metrics.features import extract, feature_extractor
from aegan.metrics.kernel import kernel
from aegan.networks import AEGAN
from aegan.sampling import encode

PERMUTATIONS = 999
ODD_IMAGES = 16
NEIGHBOURS = 5  # old images from which a new one's distance is taken
BLOCK = 8  # pixels, of JPEG
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
BATCH_SIZE = 64  # images held as floating-point numbers
DECIMALS = 9  # of kernels whose mean is 1; what lies beyond is rounding

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Test:
    """One statistic of new images against old ones."""

    name: str
    effect: float  # Cliff's delta, in [-1, 1]; positive: the new images' values are higher
    p: float
    p_adjusted: float  # Holm's, over all tests of the check

    def tells(self, *, level: float, min_effect: float) -> bool:
        """Whether it says that the images are of another kind."""
        return self.p_adjusted < level and abs(self.effect) > min_effect


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What `compare` finds."""

    tests: tuple[Test, ...]
    shifted: bool  # at least one test tells it
    odd: list[int]  # of the new images compared, the oddest ones, the oddest first


@dataclass(frozen=True, kw_only=True)
class Described:
    """What is compared of some images, in random order."""

    vectors: dict[str, Tensor]  # space => float [N, D]
    values: dict[str, Array]  # statistic of pixels => [N]


def compare(
    new: Tensor,
    old: Tensor,
    *,
    model: AEGAN | None,
    features: str,
    seed: int,
    level: float = 0.05,
    min_effect: float = 0.15,
    max_images: int = 2000,
) -> Drift:
    """New against old images, uint8 [N, H, W, C] and [M, H, W, C], H and W above 8; N, M >= 2.

    At most `max_images` of each are looked at, and as many of each are compared. `model` gives
    E(x), if it has an encoder; `features` is the name of an extractor (`aegan.metrics.features`).
    Images that come in series, like the frames of a film, count as if each were drawn by itself:
    then p is too small, and the effect alone holds back an alarm. Raises ValueError.
    """
    if min(len(new), len(old)) < 2:
        raise ValueError(f"{len(new)} new and {len(old)} old images; expected 2 or more of each")
    generator = torch.Generator().manual_seed(seed)
    chosen, kept = (
        torch.randperm(len(images), generator=generator)[:max_images] for images in (new, old)
    )
    described_new = describe(new[chosen], model=model, features=features)
    described_old = describe(old[kept], model=model, features=features)
    tests = run_tests(described_new, described_old, seed=seed)
    return Drift(
        tests=tests,
        shifted=any(test.tells(level=level, min_effect=min_effect) for test in tests),
        odd=chosen[_oddest(described_new.vectors["features"], described_old.vectors["features"])]
        .tolist(),
    )  # fmt: skip


def describe(images: Tensor, *, model: AEGAN | None, features: str) -> Described:
    """What is compared of uint8 [N, H, W, C]."""
    vectors = {"features": extract(feature_extractor(features, images.shape[-1]), images)}
    if model is not None and model.encoder is not None:
        vectors["E(x)"] = encode(model, images)
    return Described(vectors=vectors, values=pixel_statistics(images))


def run_tests(new: Described, old: Described, *, seed: int) -> tuple[Test, ...]:
    """All tests of the first images of each, as many of one as of the other."""
    found = {
        f"kernel distance of {space}": _kernel_test(vectors, old.vectors[space], seed=seed)
        for space, vectors in new.vectors.items()
    }
    for name, values in new.values.items():
        count = min(len(values), len(old.values[name]))
        found[name] = _rank_test(values[:count], old.values[name][:count])
    adjusted = holm([p for _, p in found.values()])
    return tuple(
        Test(name=name, effect=effect, p=p, p_adjusted=p_adjusted)
        for (name, (effect, p)), p_adjusted in zip(found.items(), adjusted, strict=True)
    )


def holm(p_values: list[float]) -> list[float]:
    """The p values times how many hypotheses are left when each has its turn (Holm 1979).

    The chance that any of them is below a level, if none should be, is at most that level.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def _rank_test(new: Array, old: Array) -> tuple[float, float]:
    """Cliff's delta of two samples [N] and [M], and the p of Mann and Whitney's test of it."""
    from scipy.stats import mannwhitneyu

    u, p = mannwhitneyu(new, old)
    return float(2 * u / (len(new) * len(old)) - 1), float(p)


def _kernel_test(new: Tensor, old: Tensor, *, seed: int) -> tuple[float, float]:
    """Effect and p of the kernel distance of vectors [N, D] and [M, D].

    An image's witness value is its mean kernel with other new images less that with other old ones.
    The kernel distance is the difference of its means, so the effect is taken of its values.
    """
    count = min(len(new), len(old))
    pooled = torch.cat([new[:count], old[:count]]).double()
    among = kernel(pooled, pooled)
    among /= among.abs().mean()
    among.fill_diagonal_(0)
    is_new = (torch.arange(2 * count) < count).double()[:, None]
    found = kernel_distances(among, is_new).round(decimals=DECIMALS)
    by_chance = kernel_distances(among, _halves(count, seed)).round(decimals=DECIMALS)
    p = (1 + int((by_chance >= found).sum())) / (1 + PERMUTATIONS)

    others = count - is_new[:, 0]  # new images besides this one
    to_new = (among @ is_new)[:, 0] / others
    to_old = (among @ (1 - is_new))[:, 0] / (2 * count - 1 - others)
    witness = (to_new - to_old).round(decimals=DECIMALS).numpy()
    effect, _ = _rank_test(witness[:count], witness[count:])
    return effect, p


@lru_cache(maxsize=1)
def _halves(count: int, seed: int) -> Tensor:
    """Random halves of a sample of 2 * count, 1 for one and 0 for the other, [2N, PERMUTATIONS]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2 * count, PERMUTATIONS, generator=generator).argsort(dim=0)
    return (order < count).double()


def kernel_distances(among: Tensor, is_new: Tensor) -> Tensor:
    """`kernel_distance` of many ways to part a sample into two halves, [P].

    `among` [2N, 2N] is the kernel of the sample, 0 on the diagonal; each column of `is_new`
    [2N, P] is 1 for the images of one half, 0 for those of the other.
    """
    count = len(among) // 2
    to_all = among.sum(dim=0)
    within_new = (is_new * (among @ is_new)).sum(dim=0)
    across = to_all @ is_new - within_new
    within_old = to_all.sum() - within_new - 2 * across
    return (within_new + within_old) / (count * (count - 1)) - 2 * across / count**2


def pixel_statistics(images: Tensor) -> dict[str, Array]:
    """What a person would see first of uint8 [N, H, W, C], [N] each; of colours only for C = 3.

    A hue is an angle and has no order: it is told by two pairs of opposite colours.
    """
    batches = [_statistics(batch.double()) for batch in images.split(BATCH_SIZE)]
    return {name: torch.cat([b[name] for b in batches]).numpy() for name in batches[0]}


def _statistics(x: Tensor) -> dict[str, Tensor]:
    colours = {}
    if x.shape[-1] == 3:
        red, green, blue = x.unbind(-1)
        colours = {
            "saturation": (x.amax(-1) - x.amin(-1)).mean((1, 2)),
            "red against green": (red - green).mean((1, 2)),
            "yellow against blue": ((red + green) / 2 - blue).mean((1, 2)),
        }
        gray = x @ torch.tensor(LUMA, dtype=x.dtype)
    else:
        gray = x[..., 0]
    inner = gray[:, 1:-1, 1:-1]
    around = gray[:, :-2, 1:-1] + gray[:, 2:, 1:-1] + gray[:, 1:-1, :-2] + gray[:, 1:-1, 2:]
    return {
        "brightness": gray.mean((1, 2)),
        "contrast": gray.std((1, 2)),
        **colours,
        "sharpness": (4 * inner - around).var((1, 2)),  # of the Laplacian
        "blockiness": _steps_at_blocks(gray) + _steps_at_blocks(gray.mT),
    }


def _steps_at_blocks(gray: Tensor) -> Tensor:
    """By how much neighbours of [N, H, W] differ more where JPEG's blocks meet, [N]."""
    steps = gray.diff(dim=2).abs().mean(dim=1)
    return steps[:, BLOCK - 1 :: BLOCK].mean(dim=1) - steps.mean(dim=1)


def _oddest(new: Tensor, old: Tensor) -> Tensor:
    """Positions of the new vectors [N, D] that lie farthest from their nearest old ones [M, D]."""
    nearest = torch.cdist(new, old).topk(min(NEIGHBOURS, len(old)), largest=False)
    return nearest.values.mean(dim=1).topk(min(ODD_IMAGES, len(new))).indices
