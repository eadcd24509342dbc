"""The `aegan` command: each function reads its arguments and calls the module that does the work.

Those modules are imported inside the functions, so that `aegan --help` loads no torch, MLflow, Ray.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.base.errors import UserError, run_stage

app = typer.Typer(
    help="Autoencoding GANs: train, look, compare, register, serve.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ARGPARSE: dict[str, Any] = {  # commands that are modules, too, and read their arguments themselves
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}


def main() -> None:
    try:
        run_stage(_main)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _main() -> None:
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="aegan", standalone_mode=False)
    except typer.TyperException as error:  # an unknown command, an option without its value
        raise UserError(f"{error.format_message()} (see `aegan --help`)") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    sys.exit(code)


@app.command(**ARGPARSE)
def submit(context: typer.Context) -> None:
    """Run the pipeline on a Ray cluster as a job, follow it, fetch its results."""
    from pipelines import submit

    submit.main(context.args)


@app.command(**ARGPARSE)
def doctor(context: typer.Context) -> None:
    """Look whether a run would find what it needs, here and on the cluster."""
    from pipelines.project import doctor

    doctor.main(context.args)


@app.command(**ARGPARSE)
def stack(context: typer.Context) -> None:
    """Start, show, end PostgreSQL, S3 and MLflow on this machine: up, status, down."""
    from pipelines.project import stack

    stack.main(context.args)


@app.command()
def verify(model: str) -> None:
    """Look whether a model, a folder or models:/..., is what was signed (docs/serving.md)."""
    from pipelines.registry import signing

    typer.echo(signing.verify(model))


@app.command()
def sign(model: str) -> None:
    """Sign a model, a folder or models:/..., with the key in the file AEGAN_SIGNING_KEY."""
    from pipelines.registry import signing

    typer.echo(signing.sign(model))


@app.command()
def keygen(file: Path) -> None:
    """Make a pair of keys: FILE to sign with, for you alone, and FILE.pub for who loads."""
    from pipelines.base import package

    typer.echo(f"{file} and {file}.pub: key {package.make_keys(file)[:16]}")


@app.command()
def sync(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", show_default=False)
    ] = None,
) -> None:
    """Send to MLflow what trainings could not send while they ran (RUN: a folder in runs/)."""
    from pipelines.registry import sync

    sync.main(names or [])


if __name__ == "__main__":
    main()
