"""Few images: what D_x's augmentation is worth, with one probability and with ADA's rule.

    .venv/bin/python -m benchmarks.augmentation --json FILE [--archive faces.zip]

Designed faces, and with --archive those of a .zip, too. For each number of images, way and seed one
training with the settings of params.yaml; its averaged networks are judged on images that it never
saw, several times on the way, since what learns by heart gets worse again.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.rows import Results, as_table
from benchmarks.trainings import JUDGES, SCORES, judged_settings, picture_sets, train_and_judge
from pipelines.base.errors import run_stage

WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed": {"training.augmentation_probability": 0.3},
    "adaptive": {"training.augmentation_target": 0.6, "training.augmentation_images": 25_000},
}
LOGGED = ("image_discriminator", "augmentation_probability", "image_overfitting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--archive", type=Path, help="a .zip of other pictures")
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 5_000])
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--looks", type=int, default=4, help="how often a training is judged")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    options = parser.parse_args()
    count = max(options.images) + 2 * JUDGES
    sets = picture_sets(options.archive, count, options.size)
    each = options.steps // options.looks
    stated = {key: vars(options)[key] for key in ("size", "steps", "looks")}
    results = Results(options.json, stated | {"ways": WAYS} | judged_settings())
    plan = itertools.product(range(options.seeds), sets, options.images, options.ways)
    for seed, name, images, way in plan:  # cut short, it leaves whole comparisons
        of_training = {"set": name, "images": images, "way": way, "seed": seed}
        if results.find(**of_training):
            continue
        found = train_and_judge(
            *(sets[name], images, WAYS[way]),
            seed=seed,
            looks=range(each, options.steps + 1, each),
            logged=LOGGED,
        )
        results.add(*(of_training | row for row in found))
        print(results.rows[-1], flush=True)
    print(as_table(results.rows, ("set", "images", "step", "way"), SCORES))


if __name__ == "__main__":
    run_stage(main)
