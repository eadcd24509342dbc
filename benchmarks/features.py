"""How far damage lies above chance in the features that judge images, and what they cost.

In standard deviations of the distance between two sets of real images, which are those of the
shards; of the learned features at several sides of their input. The table of docs/metrics.md.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aegan.data.dataset import load_images
from aegan.files import write_json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shards", type=Path, default=Path("artifacts/shards"))
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 96])
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe("torch", "numpy")
    images = load_images(options.shards, "train", limit=3 * IMAGES)
    rows = {RANDOM_FEATURES: examine(RANDOM_FEATURES, images)}
    for side in options.sides:
        efficientnet.SMALLEST_SIDE = efficientnet.LARGEST_SIDE = side
        rows[f"{LEARNED_FEATURES} at {side} pixels"] = examine(LEARNED_FEATURES, images)
    write_json(options.json, {"machine": machine, "pixels": images.shape[1], "features": rows})
    for name, row in rows.items():
        print(f"{name}: {row['milliseconds_per_image']:.2f} ms an image")
        for kind, scores in row["scores"].items():
            print(f"  {kind}: {' '.join(f'{score:.1f}' for score in scores)}")


def examine(name: str, images: np.ndarray) -> dict[str, Any]:
    """Cost, and the scores of each kind of damage at each level, by distance."""
    extractor = feature_extractor(name, 3)

    def features(pixels: np.ndarray) -> Tensor:
        return extract(extractor, torch.from_numpy(pixels))

    start = time.process_time()
    real = features(images)
    milliseconds = 1000 * (time.process_time() - start) / len(images)
    random = np.random.default_rng(5)
    orders = [torch.from_numpy(random.permutation(len(images))) for _ in range(SPLITS)]
    others = images[IMAGES : 2 * IMAGES]
    damaged = {
        damage: [features(damage(others, level)) for level in levels]
        for damage, levels in DAMAGES.items()
    }
    scores = {}
    for distance in (frechet_distance, kernel_distance):
        spread = np.std(
            [distance(real[o[:IMAGES]], real[o[IMAGES : 2 * IMAGES]]) for o in orders], ddof=1
        )
        undamaged = distance(real[:IMAGES], real[IMAGES : 2 * IMAGES])
        for damage, sets in damaged.items():
            scores[f"{distance.__name__}, {damage.__name__}"] = [
                float((distance(real[:IMAGES], one) - undamaged) / spread) for one in sets
            ]
    return {"milliseconds_per_image": milliseconds, "scores": scores}


if __name__ == "__main__":
    main()
