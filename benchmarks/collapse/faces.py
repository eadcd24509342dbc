"""The author's claims on pictures: a plain GAN against AEGAN, the same G and D_x, several seeds.

Designed faces, or with --archive the pictures of a .zip. Both arms with the author's form of
the loss (BCE without penalties, his lambdas) and with that of params.yaml; judged after 200 steps
and on, in learned features, by samples of the prior. The last lines compare the arms seed by seed.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from benchmarks.rows import Results, Row, as_table, table
from benchmarks.trainings import (
    JUDGES,
    SCORES,
    archived,
    designed,
    judged_settings,
    train_and_judge,
)

ARMS = ("gan", "aegan")
KEYS = ("set", "loss", "step", "arm")
LOSSES: dict[str, dict[str, Any]] = {
    "author": {
        "loss.lambda_image_reconstruction": 10.0,
        "loss.lambda_latent_reconstruction": 5.0,
        "loss.gamma_image": 0.0,
        "loss.gamma_latent": 0.0,
        "training.learning_rate": 2e-4,
    },
    "ours": {},
}
COMPARED = ("frechet_distance", "recall", "coverage", "ms_ssim")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--archive", type=Path, help="a .zip of pictures, not designed faces")
    command.add_argument("--images", type=int, default=10_000)
    command.add_argument("--size", type=int, default=32, help="side in pixels")
    command.add_argument("--looks", type=int, nargs="+", default=[200, 600, 1_200, 2_400, 3_600])
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--loss", nargs="+", choices=LOSSES, default=[*LOSSES])
    command.add_argument("--seeds", type=int, default=5)


def measure(options: argparse.Namespace) -> str:
    """Trains what is missing in the file of results; returns the table, and the arms compared."""
    count = options.images + 2 * JUDGES
    if options.archive:
        name, pictures = options.archive.stem, archived(options.archive, count, options.size)
    else:
        name, pictures = "designed", designed(count, options.size)
    stated = {key: vars(options)[key] for key in ("images", "size", "looks")}
    stated |= {"losses": LOSSES}
    results = Results(options.json, stated | judged_settings(), keys=KEYS)
    plan = itertools.product(range(options.seeds), options.loss, options.arm)
    for seed, loss, arm in plan:  # cut short, it leaves whole comparisons
        of_training = {"set": name, "loss": loss, "arm": arm, "seed": seed}
        if results.find(**of_training):
            continue
        found = train_and_judge(
            *(pictures, options.images, LOSSES[loss] | {"training.arm": arm}),
            seed=seed,
            looks=options.looks,
        )
        results.add(*(of_training | row for row in found))
    rows = sorted(results.rows, key=lambda row: [row[key] for key in ("set", "loss", "step")])
    return f"{as_table(rows, KEYS, SCORES)}\n\n{paired(rows)}"


def paired(rows: list[Row]) -> str:
    """AEGAN minus GAN, seed by seed, with the p of a paired t test."""
    keys = ("set", "loss", "step")
    lines = []
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of = {
            arm: sorted(
                (row for row in rows if (*(row[key] for key in keys), row["arm"]) == (*group, arm)),
                key=lambda row: row["seed"],
            )
            for arm in ARMS
        }
        if len(of["gan"]) != len(of["aegan"]) or len(of["gan"]) < 2:
            continue
        cells = []
        for score in COMPARED:
            ours, theirs = ([row[score] for row in of[arm]] for arm in ("aegan", "gan"))
            mean = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(ours)
            cells.append(f"{mean:+.4f} (p {ttest_rel(ours, theirs).pvalue:.3f})")
        lines.append([*map(str, group), *cells])
    return table([*keys, *(f"{score}, aegan - gan" for score in COMPARED)], lines)
