"""The command line of the package."""

import argparse
from pathlib import Path

from benchmarks.collapse import __doc__ as usage
from benchmarks.collapse import (
    faces,
    lines,
    manifold,
    mixture_table,
    mnist,
    stacked_mnist,
    weak_discriminator,
)
from benchmarks.collapse.mixtures import MIXTURES
from pipelines.base.errors import run_stage

TASKS = {
    **dict.fromkeys(MIXTURES, mixture_table),
    "weak-discriminator": weak_discriminator,
    "mnist": mnist,
    "stacked-mnist": stacked_mnist,
    "faces": faces,
    "manifold": manifold,
    "lines": lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.collapse",
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        command = commands.add_parser(name, help=str(task.__doc__).partition("\n")[0])
        task.add_options(command)
        command.add_argument("--json", type=Path, help="where the figures go, and go on")
    options = parser.parse_args()
    print(TASKS[options.task].measure(options))


if __name__ == "__main__":
    run_stage(main)
