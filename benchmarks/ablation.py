"""What each part of the objective is worth: one changed at a time, on the designed faces.

    .venv/bin/python -m benchmarks.ablation --json FILE

Each lambda halved and doubled; each term removed; no gradient penalties; no normalisation;
augmentation. The unchanged training is judged by its raw weights and by fitted latents, too.
Every line is compared with the unchanged training seed by seed.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from scipy.stats import ttest_rel
from torch import Tensor

from aegan.config import TrainConfig
from aegan.networks.layers import ChannelNorm
from benchmarks.rows import Results, Row, groups, mean_and_error, table
from benchmarks.trainings import JUDGES, designed, judged_settings, train_and_judge
from pipelines.base import params
from pipelines.base.errors import run_stage

UNCHANGED = "unchanged"
LAMBDAS = {  # of the author's equation => its terms, each of which has a weight of its own here
    "lambda_image_reconstruction": ("image_reconstruction",),
    "lambda_latent_reconstruction": ("latent_reconstruction",),
    "lambda_image_adversarial": ("x_hat_adversarial", "x_tilde_adversarial"),
    "lambda_latent_adversarial": ("z_hat_adversarial", "z_tilde_adversarial"),
}
FACTORS = {"halved": 0.5, "doubled": 2.0}
NO_NORMALISATION = "no normalisation"
SAMPLERS = (("ema", "prior"), ("raw", "prior"), ("ema", "fitted"))  # of the unchanged training
KEYS = ("way", "weights", "latents")
SCORES = {"kernel_distance": 3, "frechet_distance": 1, "ms_ssim": 3, "image_reconstruction": 3}


def ways() -> dict[str, dict[str, Any]]:
    """What is changed, by the name of its line."""
    loss = params.load(TrainConfig).loss

    def times(factor: float, *terms: str) -> dict[str, float]:
        names = [f"lambda_{term}" for term in terms]
        return {f"loss.{name}": factor * getattr(loss, name) for name in names}

    changed = {
        f"{name} {how}": times(factor, *LAMBDAS[name])
        for name, (how, factor) in itertools.product(LAMBDAS, FACTORS.items())
    }
    terms = itertools.chain(*LAMBDAS.values())
    changed |= {f"no {term.replace('_', ' ')}": times(0, term) for term in terms}
    return {
        UNCHANGED: {},
        **changed,
        "no gradient penalties": {"loss.gamma_image": 0.0, "loss.gamma_latent": 0.0},
        NO_NORMALISATION: {},
        "augmentation": {"training.augmentation_probability": 0.3},
    }


@contextmanager
def without_normalisation() -> Iterator[None]:
    """Networks whose normalisation is the identity; its rectifier stays."""

    def forward(layer: ChannelNorm, h: Tensor) -> Tensor:
        return h if layer.negative_slope is None else F.leaky_relu(h, layer.negative_slope)

    with patch.object(ChannelNorm, "forward", forward):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8_000)
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    pictures, changes = designed(options.images + 2 * JUDGES, options.size), ways()
    stated = {key: vars(options)[key] for key in ("images", "size", "steps")}
    results = Results(options.json, stated | {"ways": changes} | judged_settings(), keys=KEYS)
    for seed, way in itertools.product(range(options.seeds), changes):
        of_training = {"way": way, "seed": seed}
        if results.find(**of_training):
            continue
        changed = without_normalisation() if way == NO_NORMALISATION else nullcontext()
        with changed:
            found = train_and_judge(
                *(pictures, options.images, changes[way]),
                seed=seed,
                looks=[options.steps],
                samplers=SAMPLERS if way == UNCHANGED else SAMPLERS[:1],
            )
        results.add(*(of_training | row for row in found))
        print(results.rows[-1], flush=True)
    print(in_words(results.rows))


def in_words(rows: list[Row]) -> str:
    """The table, with the p of each line's distance against the unchanged one's, seed by seed."""
    lines = []
    of_lines = groups(sorted(rows, key=lambda row: row["seed"]), KEYS)
    reference = (UNCHANGED, *SAMPLERS[0])
    unchanged = distances(of_lines[reference])
    for line, chosen in of_lines.items():
        way, weights, latents = line
        cells = [mean_and_error([row[name] for row in chosen], n) for name, n in SCORES.items()]
        paired = line != reference and len(chosen) > 1
        p = ttest_rel(distances(chosen), unchanged[: len(chosen)]).pvalue if paired else None
        what = (
            [way]
            + ["raw weights"] * (weights == "raw")
            + ["fitted latents"] * (latents == "fitted")
        )
        lines.append([", ".join(what), *cells, "" if p is None else f"{p:.3f}"])
    return table(["changed", *SCORES, "p of the Fréchet distance"], lines)


def distances(rows: list[Row]) -> list[float]:
    return [row["frechet_distance"] for row in rows]


if __name__ == "__main__":
    run_stage(main)
