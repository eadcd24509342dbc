"""The command line of the package."""

import argparse
from pathlib import Path

import torch

from benchmarks.collapse import __doc__ as usage
from benchmarks.collapse import mixture_table, weak
from benchmarks.collapse.mixtures import MIXTURES
from pipelines.base.errors import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.collapse",
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name in MIXTURES:
        command = commands.add_parser(name, help="modes and quality of every arm")
        command.add_argument("--arms", nargs="+", default=list(mixture_table.ARMS))
        command.add_argument("--forms", nargs="+", default=list(mixture_table.FORMS))
        command.add_argument("--discriminator-width", type=int, default=200)
        command.set_defaults(measure=mixture_table.measure)
    command = commands.add_parser("weak", help="the grid with ever narrower discriminators")
    command.add_argument("--picture", type=Path, help="where the modes are drawn")
    command.set_defaults(measure=weak.measure)
    for command in commands.choices.values():
        command.add_argument("--seeds", type=int, default=10)
        command.add_argument("--steps", type=int, default=2000)
        command.add_argument("--generator-width", type=int, default=400)
        command.add_argument("--learning-rate", type=float, default=1e-4)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--json", type=Path, help="where the figures go, and go on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(options.measure(options))


if __name__ == "__main__":
    run_stage(main)
