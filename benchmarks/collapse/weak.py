"""The author's claim as a series: modes of GAN and AEGAN as the discriminator gets narrower."""

from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.collapse.mixture_table import LAMBDAS, prepare, score
from benchmarks.collapse.mixtures import MIXTURES, NUM_TRAINING_POINTS
from benchmarks.collapse.train import train
from benchmarks.rows import Results, Row, mean_and_error, table

WIDTHS = (6, 12, 25, 50, 200)
ARMS = ("gan", "aegan")


def measure(options: Namespace) -> str:
    """Trains what is missing in the file of results, draws the picture, returns the table."""
    mixture, seeds = MIXTURES["grid"](), range(options.seeds)
    points = mixture.sample(NUM_TRAINING_POINTS, torch.Generator().manual_seed(0))
    sizes = {
        "generator": options.generator_width,
        "learning_rate": options.learning_rate,
        "lambdas": options.lambdas or LAMBDAS["grid"],
    }
    stated = {"mixture": "grid", "form": "bce", "seeds": options.seeds, "steps": options.steps}
    results = Results(options.json, stated | sizes)
    for width in options.widths:
        for arm in ARMS:
            if results.find(arm=arm, discriminator_width=width):
                continue
            networks, settings = prepare("grid", arm, "bce", seeds, discriminator=width, **sizes)
            for steps in train(networks, points, settings, seeds=seeds, stops=[options.steps]):
                row = {"arm": arm, "discriminator_width": width, "steps": steps}
                for source, scores in score(networks, mixture, points).items():
                    results.add(row | {"samples_from": source} | scores)
    rows = sorted(results.rows, key=lambda row: row["discriminator_width"])
    if options.picture:
        draw(rows, options.picture)
    return as_table(rows)


def as_table(rows: list[Row]) -> str:
    lines = [
        [str(row["discriminator_width"]), row["arm"], row["samples_from"]]
        + [mean_and_error(row[name], 1) for name in ("modes", "high_quality")]
        for row in rows
    ]
    return table(["width of D_x", "arm", "samples from", "modes", "high quality %"], lines)


def draw(rows: list[Row], file: Path) -> None:
    """Modes over width, mean and standard error over seeds; rows by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    series = {"GAN": ("gan", "prior"), "AEGAN": ("aegan", "prior")}
    series["AEGAN, fitted density"] = ("aegan", "fitted")
    for label, (arm, source) in series.items():
        found = [row for row in rows if (row["arm"], row["samples_from"]) == (arm, source)]
        modes = torch.tensor(
            [row["modes"] for row in found], dtype=torch.float64
        )  # [widths, seeds]
        axes.errorbar(
            [row["discriminator_width"] for row in found],
            modes.mean(1),
            yerr=modes.std(1) / modes.shape[1] ** 0.5,
            marker="o",
            capsize=3,
            label=label,
        )
    axes.axhline(25, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    widths = sorted({row["discriminator_width"] for row in rows})
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(0, 26)
    axes.set_xlabel("maxout units in each of the image discriminator's three layers")
    axes.set_ylabel("modes of 25 found")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)
