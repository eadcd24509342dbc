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

MODEL = "artifacts/train/model"
Model = Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/3, a folder")]


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


@app.command()
def explore(model: Model = MODEL, out: Path = Path("explorer.html")) -> None:
    """Write one HTML file in which anyone walks through the model, in any browser, offline."""
    from pipelines.serving import exports

    exports.explore(model, out)
    typer.echo(f"file://{out.resolve()}")


@app.command()
def export(model: Model = MODEL, out: Path = Path("onnx")) -> None:
    """Write the model's networks as ONNX files into a folder."""
    from pipelines.serving import exports

    for file in exports.export(model, out):
        typer.echo(str(file))


if __name__ == "__main__":
    main()
