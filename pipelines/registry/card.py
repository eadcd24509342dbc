"""The card of a model: what it is, was made from and can do, as one short page of Markdown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aegan.metrics import METRICS, SECOND_OPINION
from pipelines.base.names import shown
from pipelines.ingest.source_address import DESIGNED, without_secrets

MAX_NAME = 200

JsonObject = Mapping[str, Any]


def write(
    *,
    model: JsonObject,
    run: JsonObject,
    scores: JsonObject,
    manifest: JsonObject,
    pictures: Sequence[str] = (),
) -> str:
    """The card from a model's config.json, run.json, the figures and the shards' manifest.

    `pictures` are names of picture files, as they are called beside the card.
    """
    parts = [
        _what(model, run),
        _data(manifest),
        "\n".join(["## Figures", "", *_figures(scores)]),
        "\n\n".join(["## Pictures", *(f"![{name}]({name})" for name in pictures)] * bool(pictures)),
        "\n".join(["## Limits", "", *_limits(model, scores)]),
        "\n".join(["## How it was made", "", *_making(run)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(model: JsonObject, run: JsonObject) -> str:
    side, networks = model["image_size"], model["model"]
    colours = "gray" if model["image_channels"] == 1 else "RGB"
    parts = "generator and encoder" if model["has_encoder"] else "generator"
    return (
        f"# {parts.capitalize()} of {side}x{side} {colours} images\n\n"
        f"Networks `{networks['architecture']}`, latents of {networks['latent_dim']} dimensions "
        f"({_quoted(networks['prior'])}), trained as `{model.get('arm', 'aegan')}`.\n"
        "`aegan.load(FOLDER)` reads this folder; weights are safetensors, nothing is pickled.\n"
        "`onnx/` holds the networks for other programs."
    )


def _data(manifest: JsonObject) -> str:
    rows = {name: split["rows"] for name, split in manifest["splits"].items()}
    source = str(manifest["source"])
    licence = (
        "The images are drawn by this project's own code (Apache-2.0)."
        if source == DESIGNED
        else "**Licence: not known to this program.** Who owns the images decides what these "
        "weights may be used for; ask where they came from. The code is Apache-2.0."
    )
    return (
        f"## Data\n\n{_quoted(without_secrets(source) if '://' in source else source)}: "
        f"{rows['train']} training, {rows['validation']} validation, {rows['test']} test images; "
        f"version `{manifest['dataset_sha256'][:16]}`.\n{licence}"
    )


def _figures(scores: JsonObject) -> Iterator[str]:
    if scores.get("note"):
        yield f"{scores['note']}\n"
    yield (
        f"Averaged weights on {scores.get('num_images', 'the')} {scores.get('split', 'held-out')} "
        f"images, in {_quoted(scores.get('features', 'the features of the report'))}.\n"
    )
    yield "| figure | better | model | beside it | that is |"
    yield "|---|---|---|---|---|"
    for name, metric in METRICS.items():  # the report also shows the second opinions
        row = scores.get(name)
        if isinstance(row, Mapping) and not name.endswith(SECOND_OPINION):
            model, floor = (_number(row.get(column)) for column in ("ema", "floor"))
            yield f"| {name} | {metric.better} | {model} | {floor} | {metric.floor} |"


def _limits(model: JsonObject, scores: JsonObject) -> Iterator[str]:
    yield "- It draws images like those it was trained on, and can show traits of single ones."
    yield f"- Other images are shrunk or cut to {model['image_size']} pixels (`{model['fit']}`)."
    yield "- One training with one seed: another one gives other figures."
    for reason in dict.fromkeys(scores.get("not_measured", {}).values()):
        yield f"- Not measured: {reason}"


def _making(run: JsonObject) -> Iterator[str]:
    yield f"- run `{run['run_name']}`, step {run['chosen_step']} of {run['step']}"
    if start := run.get("start"):
        yield f"- from the weights of {_quoted(start['address'])} (`{start['sha256'][:16]}`)"
    if commit := run.get("git_commit"):
        yield f"- code: commit `{commit}`"
    yield "- `pipelines.train` with the parameters in MLflow's run"


def _number(value: Any) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4g}" if known else "-"


def _quoted(text: str) -> str:
    """A text from outside as Markdown's code, in which nothing means anything."""
    return f"`{shown(str(text))[:MAX_NAME].replace('`', chr(39))}`"
