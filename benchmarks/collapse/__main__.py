"""The command line of the package."""

import argparse
from pathlib import Path

from benchmarks.collapse import __doc__ as usage
from benchmarks.collapse import digits, lines, mixture_table, weak
from benchmarks.collapse.mixtures import MIXTURES
from benchmarks.collapse.objectives import FORMS
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
        command.add_argument(
            "--arms", nargs="+", choices=mixture_table.ARMS, default=[*mixture_table.ARMS]
        )
        command.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
        command.add_argument("--discriminator-width", type=int, default=200)
        command.set_defaults(measure=mixture_table.measure, learning_rate=1e-4)
    command = commands.add_parser("weak", help="the grid with ever narrower discriminators")
    command.add_argument("--widths", type=int, nargs="+", default=weak.WIDTHS)
    command.add_argument("--picture", type=Path, help="where the modes are drawn")
    command.set_defaults(measure=weak.measure, learning_rate=1e-4)
    for command in commands.choices.values():
        command.add_argument("--generator-width", type=int, default=400)
        command.add_argument("--lambdas", type=float, nargs=2, help="of image and latent")
    command = commands.add_parser("lines", help="interpolation on a known manifold")
    command.add_argument("--base-channels", type=int, default=16)
    command.set_defaults(measure=lines.measure, learning_rate=2e-4)
    command = commands.add_parser("digits", help="stacked MNIST")
    command.add_argument("--mnist", type=Path, required=True, help="folder of MNIST's four files")
    command.add_argument("--form", choices=FORMS, default="bce")
    command.add_argument("--filters", type=int, default=64, help="of generator and encoder")
    command.add_argument("--discriminator-filters", type=int, default=64)
    command.set_defaults(measure=digits.measure, learning_rate=2e-4)
    for command in commands.choices.values():
        command.add_argument("--seeds", type=int, default=10)
        command.add_argument("--steps", type=int, default=2000)
        command.add_argument(
            "--learning-rate", type=float, default=command.get_default("learning_rate")
        )
        command.add_argument("--json", type=Path, help="where the figures go, and go on")
    options = parser.parse_args()
    print(options.measure(options))


if __name__ == "__main__":
    run_stage(main)
