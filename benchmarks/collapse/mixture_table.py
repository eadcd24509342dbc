"""Modes, high quality and reverse KL of every arm on one mixture; equal steps and equal compute."""

import time
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from aegan.config import Arm, LossConfig
from benchmarks.collapse.latents import samples_from_fit, samples_from_prior
from benchmarks.collapse.mixtures import MIXTURES, NUM_SAMPLES, NUM_TRAINING_POINTS, Mixture
from benchmarks.collapse.results import Results, Row, mean_and_error, per_seed, table
from benchmarks.collapse.train import Networks, Settings, flops_of_step, train

ARMS: dict[str, tuple[Arm, int]] = {  # of the table => of the objective, samples D_x sees at once
    "gan": ("gan", 1),
    "pacgan2": ("gan", 2),
    "aae": ("aae", 1),
    "egan": ("egan", 1),
    "aegan": ("aegan", 1),
}
FORMS: dict[str, dict[str, Any]] = {
    "bce": {"adversarial": "bce", "gamma": 0.0},
    "relativistic": {"adversarial": "relativistic", "gamma": 0.1},
}
IN_THE_PLANE = {"latent_dim": 2, "lambdas": (0.1, 0.01)}  # of image and latent reconstruction
OF_MIXTURE = {
    "ring": IN_THE_PLANE,
    "grid": IN_THE_PLANE,
    "1200d": {"latent_dim": 8, "lambdas": (10.0, 1.0)},
}


def settings_of(mixture: str, arm: str, form: str, **sizes: Any) -> Settings:
    """What one row of a table is trained with."""
    arm_of_objective, packing = ARMS[arm]
    image, latent = OF_MIXTURE[mixture]["lambdas"]
    loss = LossConfig(
        lambda_image_reconstruction=image,
        lambda_latent_reconstruction=latent,
        lambda_image_adversarial=1.0,
        lambda_latent_adversarial=1.0,
        real_target=0.95,
        fake_target=0.05,
        **FORMS[form],
    )
    return Settings(
        arm=arm_of_objective,
        packing=packing,
        latent_dim=OF_MIXTURE[mixture]["latent_dim"],
        loss=loss,
        **sizes,
    )


def measure(options: Namespace) -> str:
    """Trains what is missing in the file of results; returns the table."""
    mixture = MIXTURES[options.benchmark]()
    sizes = {
        "generator_width": options.generator_width,
        "discriminator_width": options.discriminator_width,
        "learning_rate": options.learning_rate,
    }
    seeds = range(options.seeds)
    stated = {"mixture": options.benchmark, "seeds": options.seeds, "steps": options.steps}
    stated |= sizes | OF_MIXTURE[options.benchmark] | {"forms": FORMS, "samples": NUM_SAMPLES}
    results = Results(options.json, stated, floor=floor(mixture, options.seeds))
    points = mixture.sample(NUM_TRAINING_POINTS, torch.Generator().manual_seed(0))
    for form in options.forms:
        most = flops_of_step(settings_of(options.benchmark, "aegan", form, **sizes), points)
        for arm in options.arms:
            settings = settings_of(options.benchmark, arm, form, **sizes)
            each = flops_of_step(settings, points)
            stops = [options.steps]
            if arm == "gan":  # as much compute as aegan
                stops.append(round(options.steps * most / each))
            if results.find(arm=arm, form=form, steps=stops[-1]):
                continue
            start = time.perf_counter()
            for steps, networks in zip(
                stops, train(points, settings, seeds=seeds, stops=stops), strict=True
            ):
                row = {"arm": arm, "form": form, "steps": steps}
                row |= {"teraflop_per_seed": round(steps * each / 1e12, 3)}
                row |= {"seconds": round(time.perf_counter() - start)}
                for source, scores in score(networks, mixture, points, options.seeds).items():
                    results.add(row | {"samples_from": source} | scores)
    return as_table(results.rows, results.report["floor"])


def score(
    networks: Networks, mixture: Mixture, points: Tensor, num_seeds: int
) -> dict[str, dict[str, list[float]]]:
    """Scores per seed of samples from the prior and, with an encoder, from the fitted density."""
    sources = {"prior": samples_from_prior(networks, NUM_SAMPLES, num_seeds)}
    if networks.encoder is not None:
        sources["fitted"] = samples_from_fit(networks, points, NUM_SAMPLES, num_seeds)
    return {
        source: per_seed(mixture.score(samples) for samples in of_seeds)
        for source, of_seeds in sources.items()
    }


def floor(mixture: Mixture, seeds: int) -> dict[str, list[float]]:
    """Scores of the mixture's own samples."""
    return per_seed(
        mixture.score(mixture.sample(NUM_SAMPLES, torch.Generator().manual_seed(1 + seed)))
        for seed in range(seeds)
    )


def as_table(rows: list[Row], floor: dict[str, list[float]]) -> str:
    def scores(row: dict[str, list[float]]) -> list[str]:
        digits = {"modes": 1, "high_quality": 1, "reverse_kl": 3}
        return [mean_and_error(row[name], number) for name, number in digits.items()]

    headings = ["form", "arm", "steps", "TFLOP a seed", "samples from"]
    lines = [
        [
            *(row["form"], row["arm"], f"{row['steps']:,}", f"{row['teraflop_per_seed']:.1f}"),
            *(row["samples_from"], *scores(row)),
        ]
        for row in rows
    ]
    perfect = ["", "perfect sampler", "", "", "", *scores(floor)]
    return table([*headings, "modes", "high quality %", "reverse KL"], [*lines, perfect])
