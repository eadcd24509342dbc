"""The `aegan` command: each function reads its arguments and calls the module that does the work.

Those modules are imported inside the functions, so that `aegan --help` loads no torch, MLflow, Ray.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from pipelines.base.defaults import DAYS, HOST, PORT
from pipelines.base.errors import UserError, run_stage, shown_lines

app = typer.Typer(
    help="Autoencoding GANs: train, look, compare, register, serve.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
REFUSED = 3  # exit status
ANSWERS: ContextVar[TextIO] = ContextVar("answers")  # where what was done is said


def _keep_stdout(context: typer.Context, as_json: bool) -> bool:
    """With --json standard output has nothing but the answer: all else is printed on stderr."""
    ANSWERS.set(sys.stdout)
    if as_json:
        context.with_resource(redirect_stdout(sys.stderr))
    return as_json


# Options and arguments that several commands have.
Model = Annotated[
    str,
    typer.Option(
        help="models:/NAME@ALIAS, models:/NAME/3, a model's folder or a training checkpoint; "
        "by default artifacts/train/model, else models:/NAME@champion",
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Say what was done as JSON, in one line.", callback=_keep_stdout),
]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why, for the log.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")]
Picture = Annotated[Path, typer.Argument(help="An image file of any kind that training takes.")]
Frames = Annotated[
    int, typer.Option(min=2, max=1000, help="Images on the way, both ends included.")
]
Way = Annotated[
    Literal["slerp", "linear"],
    typer.Option(help="slerp: the path of the model's prior, a great circle; linear: straight."),
]
Strip = Annotated[Path, typer.Option(help="A strip, .png, or a film, .gif, .webp or .mp4.")]
Source = Annotated[
    str, typer.Argument(help="An image, a folder or archive of images, s3://bucket/prefix.")
]
Folder = Annotated[
    str, typer.Option("--out", help="A folder; the same command again goes on in it.")
]
Png = Annotated[Path, typer.Option(help="A name that ends in .png.")]


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


@app.command()
def submit(
    stop: Annotated[
        bool, typer.Option("--stop", help="End the running job; it saves a checkpoint first.")
    ] = False,
    job: Annotated[
        str, typer.Option(metavar="ID", help="Follow, fetch or stop this job instead.")
    ] = "",
    install: Annotated[
        bool,
        typer.Option(
            "--install",
            help="Let Ray install requirements.lock, where the cluster's image does not have it.",
        ),
    ] = False,
    pass_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Give this variable of this machine to the job, for instance "
            "MLFLOW_TRACKING_URI; never one that holds a secret. May be repeated.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List the files and variables that would go, and what would not."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the pipeline on the cluster that RAY_ADDRESS names, follow it, fetch its results.

    Ctrl-C leaves the job running; the same command follows it again (docs/submitting.md).
    """
    from pipelines import submit

    done = submit.main(
        stop=stop, job=job, install=install, pass_env=pass_env or [], dry_run=dry_run
    )
    _say(("", done), as_json)


@app.command()
def clean(
    keep: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also registered versions but the newest so many, unless something needs them.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[
        float, typer.Option(metavar="N", help="How long a run that nothing names is kept.")
    ] = DAYS,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    as_json: Json = False,
) -> None:
    """Show what runs have left behind that nothing names any more, or remove it (`make tidy`)."""
    from pipelines.project import tidy

    _say(("", tidy.main(days=days, keep=keep, yes=yes)), as_json)


@app.command()
def doctor(
    nodes: Annotated[bool, typer.Option("--nodes", hidden=True)] = False, as_json: Json = False
) -> None:
    """Look whether a run would find what it needs, here and on the cluster.

    Each thing is ok, warn or fail, with its cure; exit status 1 if any fails.
    """
    from pipelines.project import doctor

    if nodes:
        doctor.print_nodes()
        return
    findings = doctor.main()
    _say(("", [asdict(finding) for finding in findings]), as_json)
    raise typer.Exit(int(any(finding.status == "fail" for finding in findings)))


stack = typer.Typer(
    help="Start, show, end PostgreSQL, S3 and MLflow on this machine.", rich_markup_mode=None
)
app.add_typer(stack, name="stack")
Port = Annotated[
    int | None, typer.Option(min=1024, max=65535, help="Where it listens.", show_default=False)
]


@stack.command("up")
def stack_up(
    postgresql_port: Port = None,
    s3_port: Port = None,
    mlflow_port: Port = None,
    s3_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Another S3 endpoint; moto: our own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start what does not run."""
    from pipelines.project import stack

    ports = {"postgresql": postgresql_port, "s3": s3_port, "mlflow": mlflow_port}
    given = {name: port for name, port in ports.items() if port}
    _say(("", stack.up(stack.folder_here(), given, s3_endpoint)), as_json)


@stack.command("status")
def stack_status(as_json: Json = False) -> None:
    """Say what runs where; exit status 3 if not everything does."""
    from pipelines.project import stack

    found = stack.status(stack.folder_here())
    _say(("", found), as_json)
    all_up = found and all(service["state"] == "up" for service in found)
    raise typer.Exit(0 if all_up else stack.NOT_ALL_UP)


@stack.command("down")
def stack_down(as_json: Json = False) -> None:
    """End everything; the data stay."""
    from pipelines.project import stack

    _say(("", stack.down(stack.folder_here())), as_json)


@app.command()
def verify(model: str, as_json: Json = False) -> None:
    """Look whether a model, a folder or models:/..., is what was signed (docs/serving.md)."""
    from pipelines.registry import signing

    found = signing.verify(model)
    _say((found, {"model": model, "found": found}), as_json)


@app.command()
def sign(model: str, as_json: Json = False) -> None:
    """Sign a model, a folder or models:/..., with the key in the file AEGAN_SIGNING_KEY."""
    from pipelines.registry import signing

    _say(signing.sign(model), as_json)


@app.command()
def keygen(file: Path, as_json: Json = False) -> None:
    """Make a pair of keys: FILE to sign with, for you alone, and FILE.pub for who loads."""
    from pipelines.base import package

    key, public = package.make_keys(file), f"{file}.pub"
    facts = {"private": str(file), "public": public, "key": key}
    _say((f"{file} and {public}: key {key[:16]}", facts), as_json)


@app.command()
def sync(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Send to MLflow what trainings could not send while they ran (RUN: a folder in runs/)."""
    from pipelines.registry import sync

    _say(("", {"sent": sync.main(names or [])}), as_json)


@app.command()
def generate(
    count: Annotated[int, typer.Argument(min=1, max=10_000, help="How many.")] = 16,
    out: Annotated[Path, typer.Option(help="One picture, .png, or a new folder.")] = Path(
        "generated.png"
    ),
    model: Model = "",
    seed: Seed = 0,
    latents: Annotated[
        Literal["prior", "fitted"] | None,
        typer.Option(help="Where they are drawn from; by default fitted, if the model has them."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of fitted latents, 0 to 2: lower is likelier, less varied."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="All of one class, by its name.")] = None,
    as_json: Json = False,
) -> None:
    """Draw random images."""
    from pipelines.serving import pictures

    options: dict[str, Any] = {"latents": latents, "temperature": temperature, "label": label}
    _say(pictures.generate(count, out, model=model, seed=seed, **options), as_json)


@app.command()
def interpolate(
    start: Picture,
    end: Picture,
    out: Strip = Path("path.png"),
    model: Model = "",
    frames: Frames = 12,
    path: Way = "slerp",
    as_json: Json = False,
) -> None:
    """Walk from one picture to another.

    A strip shows the first picture, its reconstruction, the images on the way, the reconstruction
    of the second and that picture itself. A film shows the same without the two pictures, there
    and back.
    """
    from pipelines.serving import pictures

    _say(pictures.interpolate(start, end, out, model=model, frames=frames, path=path), as_json)


@app.command()
def mirror(
    picture: Picture,
    out: Strip = Path("mirror.png"),
    model: Model = "",
    frames: Frames = 12,
    path: Way = "slerp",
    as_json: Json = False,
) -> None:
    """Walk from a picture to its own mirror image.

    A strip shows the picture, what the model makes of it (its reconstruction), the way to its
    mirror image, the reconstruction of that and the mirror image itself. A blend of pixels would
    show both at once, half transparent; a model that has understood its subject turns it round.
    """
    from pipelines.serving import pictures

    _say(pictures.mirror(picture, out, model=model, frames=frames, path=path), as_json)


@app.command()
def grid(
    corners: Annotated[
        list[Path] | None, typer.Argument(help="Four pictures; with --dimensions none or one.")
    ] = None,
    out: Png = Path("grid.png"),
    model: Model = "",
    across: Annotated[int, typer.Option(min=2, max=32, help="Images in a row.")] = 8,
    dimensions: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Two dimensions of the latent to walk along, from left and from top."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Walk in two directions: between four pictures, or along two dimensions of the latent.

    The corners are top left, top right, bottom left, bottom right. With --dimensions all others
    stay as they are in the picture given, or else in a random latent.
    """
    from pipelines.serving import pictures

    options: dict[str, Any] = {"across": across, "dimensions": dimensions, "seed": seed}
    _say(pictures.grid(corners or [], out, model=model, **options), as_json)


@app.command()
def project(
    of: Annotated[list[Path], typer.Argument(help="Image files.", metavar="PICTURE...")],
    out: Png = Path("projected.png"),
    model: Model = "",
    steps: Annotated[int, typer.Option(min=0, max=100_000, help="Of gradient descent.")] = 200,
    as_json: Json = False,
) -> None:
    """Look for latents nearer to pictures than the encoder's, by gradient; say how much nearer.

    Each row: the picture, its reconstruction, what the refined latent gives. Errors are measured
    before and after: MAE on [-1, 1], lower is nearer; SSIM, 1 is identical.
    """
    from pipelines.serving import pictures

    _say(pictures.project(of, out, model=model, steps=steps), as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Your images; folders of classes are fine.")],
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1e6, help="That training may take on this machine.")
    ] = 30.0,
    size: Annotated[
        int | None,
        typer.Option(help="Side in pixels; by default what the images have, at most 32 (GPU: 64)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Set params.yaml for the images in a folder: size, colour, how many steps fit the time.

    A few training steps are timed on this machine; comments and other settings stay.
    """
    from pipelines.project import new_project

    _say(new_project.init(folder, minutes=minutes, image_size=size), as_json)


def _say(done: tuple[str, Any], as_json: bool) -> None:
    """A sentence for people, "" where they have been told already, or facts for machines."""
    text, facts = done
    if as_json or text:
        said = json.dumps(facts) if as_json else shown_lines(text)
        print(said, file=ANSWERS.get(), flush=True)


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Option(
            help="models:/NAME@ALIAS, which is followed; models:/NAME/3; a model's folder or a "
            "training checkpoint; by default models:/NAME@champion, if there is one, else what "
            "was registered last",
            show_default=False,
        ),
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = PORT,
    host: Annotated[
        str, typer.Option(help="The address to listen on; another than 127.0.0.1 lets in all.")
    ] = HOST,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A host name that requests may use, too. May be repeated.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer HTTP requests with a model, and follow its alias (docs/serving.md)."""
    from pipelines import serve

    serve.main(
        model=model,
        host=host,
        port=port,
        names=name or [],
        ready=lambda facts: _say(("", facts), as_json),
    )


@app.command()
def encode(source: Source, out: Folder = "", model: Model = "", as_json: Json = False) -> None:
    """Latents of images, to Parquet; of one image without --out to the terminal, as JSON."""
    from pipelines.serving import batch

    done = batch.main("encode", source, out, model)
    _say(("", done), as_json or not out)


@app.command()
def reconstruct(source: Source, out: Folder = "", model: Model = "", as_json: Json = False) -> None:
    """Images as the model sees them: encoded and drawn again, as PNG files."""
    from pipelines.serving import batch

    _say(("", batch.main("reconstruct", source, out, model)), as_json)


@app.command()
def retrain(
    dry_run: Annotated[
        bool, typer.Option(help="Say what would be done, and write nothing.")
    ] = False,
    until: Annotated[str, typer.Option(metavar="STEP", help="End after this step.")] = "",
    force: Annotated[
        str, typer.Option(metavar="STEP", help="Do this step and those after it again.")
    ] = "",
    accept_drift: Annotated[
        str, typer.Option(metavar="ID", help="Train on images that it has asked about.")
    ] = "",
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Look for new images; check, train, compare and promote by itself (docs/retraining.md).

    Exits with 0 if a model was promoted or there was nothing to do, 3 if it was refused or a
    person is asked, 4 if another retraining is at work.
    """
    from pipelines import retrain

    options = retrain.Options(
        dry_run=dry_run, until=until, force=force, accept_drift=accept_drift, reason=reason
    )
    facts, code = retrain.main(options)
    _say(("", facts), as_json)
    raise typer.Exit(code)


@app.command()
def health(as_json: Json = False) -> None:
    """Exit with 2 if the champion is too old, or nobody has looked for new images for too long."""
    from pipelines.retraining import health

    checks = health.checks()
    lines = "\n".join(check.said for check in checks)
    _say((lines, [asdict(check) for check in checks]), as_json)
    raise typer.Exit(0 if all(check.ok for check in checks) else health.STALE)


@app.command()
def models(as_json: Json = False) -> None:
    """List the registered versions: aliases, scores, when, from which data."""
    from pipelines.registry import champions

    found = champions.models(_model_name())
    _say((champions.table_of_models(found), [asdict(model) for model in found]), as_json)


@app.command()
def history(as_json: Json = False) -> None:
    """List every promotion, refusal and rollback: who, when, why."""
    from pipelines.registry import champions, decisions

    found = decisions.history(_model_name())
    _say((champions.table_of_decisions(found), [asdict(one) for one in found]), as_json)


@app.command()
def promote(
    version: Annotated[int, typer.Argument(min=1)],
    force: Annotated[bool, typer.Option("--force", help="Whatever the gate said.")] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make a version the champion; exit status 3 if the gate has not passed it."""
    from pipelines.registry import champions

    name = _model_name()
    try:
        done = champions.promote(name, str(version), force=force, reason=reason)
        _say((done, {"model": name, "champion": str(version), "done": done}), as_json)
    except champions.Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(min=1, help="A former champion's version.")] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make the previous champion the champion again."""
    from pipelines.registry import champions, decisions

    name = _model_name()
    done = champions.rollback(name, to=str(to or ""), reason=reason)
    _say((done, {"model": name, "champion": decisions.champion(name), "done": done}), as_json)


def _model_name() -> str:
    from aegan.config import RegisterConfig
    from pipelines.base import params

    return params.load(RegisterConfig).model_name


@app.command("gate")
def gate_command(
    version: Annotated[
        str, typer.Argument(help="Number of a version; else what `register.alias` means.")
    ] = "",
    measure_noise: Annotated[
        bool, typer.Option("--measure-noise", help="Train with other seeds instead, once.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="How many, for --measure-noise.", min=3)] = 5,
    steps: Annotated[
        int, typer.Option(help="Of each training; 0: `training.num_steps`.", min=0)
    ] = 0,
    as_json: Json = False,
) -> None:
    """Check a registered version: promoted (exit 0) or refused (exit 3), and why."""
    from aegan.config import RegisterConfig
    from pipelines.base import params
    from pipelines.registry import gate, noise, tracking

    if measure_noise:
        shares = noise.measure_noise(seeds=seeds, num_steps=steps)
        lines = [
            f"{n}: {share:.1%} worse is what another seed can make" for n, share in shares.items()
        ]
        _say(("\n".join(lines), dict(shares)), as_json)
        return
    config = params.load(RegisterConfig)
    verdict = gate.gate(config, version or tracking.aliased(config.model_name, config.alias))
    _say((gate.said(verdict), asdict(verdict)), as_json)
    raise typer.Exit(0 if verdict.passed else REFUSED)


reference = typer.Typer(help="The images that versions are compared on.", rich_markup_mode=None)
app.add_typer(reference, name="reference")


@reference.command("show")
def show_reference(as_json: Json = False) -> None:
    """Say which reference split counts."""
    from pipelines.registry import reference

    _say(reference.said(reference.current()), as_json)


@reference.command("new")
def new_reference(
    reason: Annotated[str, typer.Option(help="Why; kept with it, and shown.")],
    as_json: Json = False,
) -> None:
    """Cut another reference split from the test images; scores on two are never compared."""
    from pipelines.base.outputs import SHARDS
    from pipelines.registry import reference

    _say(reference.said(reference.cut(SHARDS, reason=reason)), as_json)


@app.command()
def explore(model: Model = "", out: Path = Path("explorer.html"), as_json: Json = False) -> None:
    """Write one HTML file in which anyone walks through the model, in any browser, offline."""
    from pipelines.serving import exports

    _say(exports.explore(model, out), as_json)


@app.command()
def export(model: Model = "", out: Path = Path("onnx"), as_json: Json = False) -> None:
    """Write the model's networks, four or what it has, as ONNX files into a folder."""
    from pipelines.serving import exports

    _say(exports.export(model, out), as_json)


if __name__ == "__main__":
    main()
