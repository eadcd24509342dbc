"""The `aegan` command: each function reads its arguments and calls the module that does the work.

Those modules are imported inside the functions, so that `aegan --help` loads no torch, MLflow, Ray.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer import Option

from pipelines.base.errors import UserError, run_stage

app = typer.Typer(
    help="Autoencoding GANs: train, look, compare, register, serve.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
REFUSED = 3  # exit status
Json = Annotated[bool, typer.Option("--json", help="for programs")]
Reason = Annotated[str, typer.Option(help="why, for the log")]
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


@app.command()
def retrain(
    dry_run: Annotated[bool, Option(help="Say what would be done, and write nothing.")] = False,
    until: Annotated[str, Option(metavar="STEP", help="End after this step.")] = "",
    force: Annotated[str, Option(metavar="STEP", help="Do this step and those after again.")] = "",
    accept_drift: Annotated[
        str, Option(metavar="ID", help="Train on images of another kind, which it asked about.")
    ] = "",
    reason: Annotated[str, Option(metavar="TEXT", help="Why, for the ledger.")] = "",
) -> None:
    """Look for new images; check, train, compare and promote by itself (docs/retraining.md).

    Exits with 0 if a model was promoted or there was nothing to do, 3 if it was refused or a
    person is asked, 4 if another retraining is at work.
    """
    from pipelines import retrain

    options = retrain.Options(
        dry_run=dry_run, until=until, force=force, accept_drift=accept_drift, reason=reason
    )
    raise typer.Exit(retrain.main(options))


@app.command()
def health() -> None:
    """Exit with 2 if the champion is too old, or nobody has looked for new images for too long."""
    from pipelines.retraining import health

    raise typer.Exit(health.main())


@app.command()
def models(as_json: Json = False) -> None:
    """List the registered versions: aliases, scores, when, from which data."""
    from pipelines.registry import champions

    found = champions.models(_model_name())
    _print_all(found, None if as_json else champions.table_of_models)


@app.command()
def history(as_json: Json = False) -> None:
    """List every promotion, refusal and rollback: who, when, why."""
    from pipelines.registry import champions, decisions

    found = decisions.history(_model_name())
    _print_all(found, None if as_json else champions.table_of_decisions)


@app.command()
def promote(
    version: Annotated[int, typer.Argument(min=1)],
    force: Annotated[bool, typer.Option("--force", help="whatever the gate said")] = False,
    reason: Reason = "",
) -> None:
    """Make a version the champion; exit status 3 if the gate has not passed it."""
    from pipelines.registry import champions

    try:
        print(champions.promote(_model_name(), str(version), force=force, reason=reason))
    except champions.Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(min=1, help="a former champion's version")] = None,
    reason: Reason = "",
) -> None:
    """Make the previous champion the champion again."""
    from pipelines.registry import champions

    print(champions.rollback(_model_name(), to=str(to or ""), reason=reason))


def _model_name() -> str:
    from aegan.config import RegisterConfig
    from pipelines.base import params

    return params.load(RegisterConfig).model_name


def _print_all(found: list[Any], table: Callable[[list[Any]], str] | None) -> None:
    """Print dataclasses as a table, or as JSON where there is none."""
    print(table(found) if table else json.dumps([asdict(one) for one in found], indent=2))


@app.command("gate")
def gate_command(
    version: Annotated[
        str, typer.Argument(help="number of a version; else what `register.alias` means")
    ] = "",
    measure_noise: Annotated[
        bool, typer.Option("--measure-noise", help="train with other seeds instead, once")
    ] = False,
    seeds: Annotated[int, typer.Option(help="how many, for --measure-noise", min=3)] = 5,
    steps: Annotated[
        int, typer.Option(help="of each training; 0: `training.num_steps`", min=0)
    ] = 0,
) -> None:
    """Check a registered version: promoted (exit 0) or refused (exit 3), and why."""
    from aegan.config import RegisterConfig
    from pipelines.base import params
    from pipelines.registry import gate, noise, tracking

    if measure_noise:
        shares = noise.measure_noise(seeds=seeds, num_steps=steps)
        for name, share in shares.items():
            print(f"{name}: {share:.1%} worse is what another seed can make")
        return
    config = params.load(RegisterConfig)
    verdict = gate.gate(config, version or tracking.aliased(config.model_name, config.alias))
    print(gate.said(verdict))
    raise typer.Exit(0 if verdict.passed else REFUSED)


reference = typer.Typer(help="The images that versions are compared on.", rich_markup_mode=None)
app.add_typer(reference, name="reference")


@reference.command("show")
def show_reference() -> None:
    """Say which reference split counts."""
    from pipelines.registry import reference

    print(reference.said(reference.current()))


@reference.command("new")
def new_reference(
    reason: Annotated[str, typer.Option(help="why; kept with it, and shown")],
) -> None:
    """Cut another reference split from the test images; scores on two are never compared."""
    from pipelines.base.outputs import SHARDS
    from pipelines.registry import reference

    print(reference.said(reference.cut(SHARDS, reason=reason)))


if __name__ == "__main__":
    main()
