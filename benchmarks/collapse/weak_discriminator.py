"""The author's claim as a series: modes of GAN and AEGAN as the discriminator gets narrower."""

import argparse
from pathlib import Path

import torch

from benchmarks.collapse.mixture_table import (
    LAMBDAS,
    LATENT_DIM,
    SCORES,
    add_sizes,
    controls,
    trained_rows,
    training_points,
)
from benchmarks.collapse.mixtures import MIXTURES
from benchmarks.collapse.objectives import LOSSES
from benchmarks.rows import Results, Row, as_table, groups

WIDTHS = (6, 12, 25, 50, 200)
ARMS = ("gan", "aegan")
KEYS = ("discriminator_width", "arm", "steps", "samples_from")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--loss", choices=LOSSES, default="bce")
    command.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    command.add_argument("--picture", type=Path, help="where the modes are drawn")
    add_sizes(command)


def measure(options: argparse.Namespace) -> str:
    """Trains what is missing in the file of results, draws the picture, returns the table."""
    seeds, points = range(options.seeds), training_points(MIXTURES["grid"]())
    sizes = {
        "generator": options.generator_width,
        "learning_rate": options.learning_rate,
        "lambdas": options.lambdas or LAMBDAS["grid"],
    }
    stated = {"mixture": "grid", "seeds": options.seeds, "steps": options.steps}
    results = Results(options.json, stated | {"loss": options.loss} | sizes, keys=KEYS)
    if not results.rows:
        results.add(*controls(MIXTURES["grid"](), points, seeds, LATENT_DIM["grid"]))
    for width in options.widths:
        for arm in options.arm:
            if results.find(arm=arm, discriminator_width=width):
                continue
            sized = sizes | {"discriminator": width, "steps": options.steps}
            rows = trained_rows("grid", arm, options.loss, seeds, points, **sized)
            results.add(*({"discriminator_width": width} | row for row in rows))
    rows = sorted(results.rows, key=lambda row: row.get("discriminator_width", 0))
    if options.picture:
        draw(rows, options.steps, options.picture)
    return as_table(rows, KEYS, SCORES)


def draw(rows: list[Row], steps: int, file: Path) -> None:
    """Modes over width, mean and standard error over seeds; rows by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()

    def line_of(arm: str, source: str, *, longer: bool = False) -> list[Row]:
        found = groups(rows, ("arm", "samples_from")).get((arm, source), [])
        return [row for row in found if (row["steps"] > steps) == longer]

    series = {
        "GAN": line_of("gan", "prior"),
        "GAN, AEGAN's compute": line_of("gan", "prior", longer=True),
        "AEGAN": line_of("aegan", "prior"),
        "AEGAN, fitted density": line_of("aegan", "fitted"),
    }
    widths = sorted({row["discriminator_width"] for line in series.values() for row in line})
    for label, line in series.items():
        of_width = {
            width: torch.tensor([row["modes"] for row in chosen]).double()
            for (width,), chosen in groups(line, ["discriminator_width"]).items()
        }
        axes.errorbar(
            [*of_width],
            [float(modes.mean()) for modes in of_width.values()],
            yerr=[float(modes.std()) / len(modes) ** 0.5 for modes in of_width.values()],
            marker="o",
            capsize=3,
            label=label,
        )
    blob = [row["modes"] for row in rows if row["arm"] == "one Gaussian"]
    axes.axhline(
        sum(blob) / len(blob), color="gray", linewidth=0.8, linestyle="--", label="one Gaussian"
    )
    axes.axhline(25, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(0, 26)
    axes.set_xlabel("maxout units in each of the image discriminator's three layers")
    axes.set_ylabel("modes of 25 found")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)
