"""How far damage lies above chance in the features that judge images, and what they cost.

In standard deviations of the distance between two sets of real images, which are those of the
shards; of the learned features at several sides of their input. The table of docs/metrics.md.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aegan.data.dataset import load_images
from aegan.metrics import efficientnet
from aegan.metrics.features import LEARNED_FEATURES, RANDOM_FEATURES, extract, feature_extractor
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from benchmarks.machine import describe
from tests.damage import Damage, blur, colour, jpeg, lost_variety, noise, swapped_patches

IMAGES, SPLITS = 256, 12  # of each set; of the real images into two sets
DAMAGES: dict[Damage, tuple[float, ...]] = {
    noise: (2, 4, 8, 16, 32),
    blur: (0.3, 0.4, 0.5, 0.7, 1.0),
    swapped_patches: (0.125, 0.25, 0.5, 0.75, 1),
    lost_variety: (0.25, 0.5, 0.75, 0.875, 0.95),
    jpeg: (95, 85, 75, 50, 25),
    colour: (2, 4, 8, 16, 32),
}
DISTANCES = {"Frechet": frechet_distance, "kernel": kernel_distance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("artifacts/shards"))
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 96])
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = load_images(options.shards, "train", limit=3 * IMAGES)
    print(describe("torch")["cpu"], f"{len(images)} images of {images.shape[1]} pixels")
    show(RANDOM_FEATURES, images)
    for side in options.sides:
        efficientnet.SMALLEST_SIDE = efficientnet.LARGEST_SIDE = side
        show(LEARNED_FEATURES, images, f"at {side} pixels")


def show(name: str, images: np.ndarray, where: str = "") -> None:
    """A line for each distance and damage."""
    extractor = feature_extractor(name, 3)

    def features(pixels: np.ndarray) -> Tensor:
        return extract(extractor, torch.from_numpy(pixels))

    start = time.process_time()
    real = features(images)
    milliseconds = 1000 * (time.process_time() - start) / len(images)
    print(f"\n{name} {where}: {milliseconds:.2f} ms an image")
    random = np.random.default_rng(5)
    orders = [torch.from_numpy(random.permutation(len(images))) for _ in range(SPLITS)]
    reference, others = real[:IMAGES], images[IMAGES : 2 * IMAGES]
    damaged = {
        damage: [features(damage(others, level)) for level in levels]
        for damage, levels in DAMAGES.items()
    }
    for title, distance in DISTANCES.items():
        null = [distance(real[o[:IMAGES]], real[o[IMAGES : 2 * IMAGES]]) for o in orders]
        undamaged = distance(reference, real[IMAGES : 2 * IMAGES])
        print(f"  {title}: two real sets {np.mean(null):.4g} +- {np.std(null, ddof=1):.2g}")
        for damage, sets in damaged.items():
            scores = [(distance(reference, one) - undamaged) / np.std(null, ddof=1) for one in sets]
            print(f"    {damage.__name__}: {' '.join(f'{score:.1f}' for score in scores)}")


if __name__ == "__main__":
    main()
