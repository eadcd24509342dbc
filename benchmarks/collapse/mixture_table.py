"""Modes, high quality and reverse KL of every arm on one mixture; equal steps and equal compute."""

import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aegan.config import Arm
from benchmarks.collapse.latents import samples_from_fit, samples_from_prior
from benchmarks.collapse.mixtures import MIXTURES, NUM_SAMPLES, NUM_TRAINING_POINTS, Mixture
from benchmarks.collapse.networks import SeedNetworks, Widths
from benchmarks.collapse.objectives import FORMS, loss_of
from benchmarks.collapse.train import Settings, flops_of_step, train
from benchmarks.rows import Results, Row, Scores, mean_and_error, per_seed, table

ARMS: dict[str, tuple[Arm, int]] = {  # of the table => of the objective, samples D_x sees at once
    "gan": ("gan", 1),
    "pacgan2": ("gan", 2),
    "aae": ("aae", 1),
    "egan": ("egan", 1),
    "aegan": ("aegan", 1),
}
LATENT_DIM = {"ring": 2, "grid": 2, "1200d": 8}
LAMBDAS = {"ring": (1.0, 0.1), "grid": (1.0, 0.1), "1200d": (10.0, 1.0)}  # of image and latent
BATCH_SIZE, BETA1 = 100, 0.8  # the protocol's


def prepare(
    mixture: str,
    arm: str,
    form: str,
    seeds: Sequence[int],
    *,
    learning_rate: float,
    lambdas: tuple[float, float] | None = None,
    **widths: Any,
) -> tuple[SeedNetworks, Settings]:
    """The networks of one row of a table, and how they are trained."""
    arm_of_objective, packing = ARMS[arm]
    settings = Settings(
        arm=arm_of_objective,
        loss=loss_of(**FORMS[form], lambdas=lambdas or LAMBDAS[mixture]),
        latent_dim=LATENT_DIM[mixture],
        packing=packing,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        beta1=BETA1,
    )
    sizes = Widths(latent_dim=LATENT_DIM[mixture], packing=packing, **widths)
    data_dim = MIXTURES[mixture]().centres.shape[1]
    return SeedNetworks(arm_of_objective, sizes, data_dim, seeds), settings


def measure(options: Namespace) -> str:
    """Trains what is missing in the file of results; returns the table."""
    name, seeds = options.benchmark, range(options.seeds)
    mixture = MIXTURES[name]()
    points = mixture.sample(NUM_TRAINING_POINTS, torch.Generator().manual_seed(0))
    sizes = {
        "generator": options.generator_width,
        "discriminator": options.discriminator_width,
        "learning_rate": options.learning_rate,
        "lambdas": options.lambdas or LAMBDAS[name],
    }
    stated = {"mixture": name, "seeds": options.seeds, "steps": options.steps, "forms": FORMS}
    stated |= {"latent_dim": LATENT_DIM[name]} | sizes
    results = Results(options.json, stated, floor=floor(mixture, options.seeds))

    def flops(arm: str, form: str) -> int:
        networks, settings = prepare(name, arm, form, [0], **sizes)
        return flops_of_step(networks, points, settings)

    for form in options.forms:
        for arm in options.arms:
            stops = [options.steps]
            if arm == "gan":  # and as much compute as aegan
                stops.append(round(options.steps * flops("aegan", form) / flops("gan", form)))
            if results.find(arm=arm, form=form, steps=stops[-1]):
                continue
            networks, settings = prepare(name, arm, form, seeds, **sizes)
            teraflop, start = flops(arm, form) / 1e12, time.process_time()
            for steps in train(networks, points, settings, seeds=seeds, stops=stops):
                row = {"arm": arm, "form": form, "steps": steps}
                row |= {"teraflop_per_seed": round(steps * teraflop, 3)}
                row |= {"cpu_seconds": round(time.process_time() - start)}
                for source, scores in score(networks, mixture, points).items():
                    results.add(row | {"samples_from": source} | scores)
    return as_table(results.rows, results.report["floor"])


def score(networks: SeedNetworks, mixture: Mixture, points: Tensor) -> dict[str, Scores]:
    """Of samples from the prior and, with an encoder, from the fitted density."""
    sources = {"prior": samples_from_prior(networks, NUM_SAMPLES)}
    if networks.encoder is not None:
        sources["fitted"] = samples_from_fit(networks, points, NUM_SAMPLES)
    return {
        source: per_seed(mixture.score(samples) for samples in of_seeds)
        for source, of_seeds in sources.items()
    }


def floor(mixture: Mixture, num_seeds: int) -> Scores:
    """Of the mixture's own samples."""
    return per_seed(
        mixture.score(mixture.sample(NUM_SAMPLES, torch.Generator().manual_seed(1 + seed)))
        for seed in range(num_seeds)
    )


def as_table(rows: list[Row], floor: Scores) -> str:
    """One line a row, the perfect sampler last."""

    def shown(scores: Scores) -> list[str]:
        digits = {"modes": 1, "high_quality": 1, "reverse_kl": 3}
        return [mean_and_error(scores[name], number) for name, number in digits.items()]

    headings = ["form", "arm", "steps", "TFLOP a seed", "samples from"]
    lines = [
        [
            *(row["form"], row["arm"], f"{row['steps']:,}", f"{row['teraflop_per_seed']:.2f}"),
            *(row["samples_from"], *shown(row)),
        ]
        for row in rows
    ]
    perfect = ["", "perfect sampler", "", "", "", *shown(floor)]
    return table([*headings, "modes", "high quality %", "reverse KL"], [*lines, perfect])
