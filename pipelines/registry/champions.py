"""`aegan models`, `history`, `promote`, `rollback`: champions as people ask for them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.registry import decisions, standing, tracking
from pipelines.registry.decision_log import Decision, succession
from pipelines.registry.mlflow_store import StoreError, open_store, readable_errors

log = logging.getLogger(__name__)


class Refused(UserError):  # noqa: N818
    """A version does not become champion, for a reason that stands in the registry."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A version of the registered model, as `aegan models` shows it."""

    version: str
    run_id: str
    aliases: tuple[str, ...]
    time: float  # of its registration, seconds since 1970
    run_name: str
    dataset_sha256: str
    scores: dict[str, float]
    gate: Literal["", "passed", "refused"]
    gate_reference: str  # hash of the reference split that the gate used
    gate_champion: str  # the version that it was compared with; empty for none


def models(model_name: str) -> list[Model]:
    """The versions, oldest first; raises UserError."""
    decisions.history(model_name)  # which puts the aliases right
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        found = decisions.versions(client, model_name)
        aliases = client.get_registered_model(model_name).aliases if found else {}
    return [
        Model(
            version=number,
            run_id=version.run_id or "",
            aliases=tuple(sorted(name for name, at in aliases.items() if str(at) == number)),
            time=version.creation_timestamp / 1000,
            run_name=version.tags.get("run_name", ""),
            dataset_sha256=version.tags.get("dataset_sha256", ""),
            scores=dict(_scores(version.tags)),
            gate=version.tags.get("gate", ""),
            gate_reference=version.tags.get("gate_reference", ""),
            gate_champion=version.tags.get("gate_champion", ""),
        )
        for number, version in found.items()
    ]


def promote(model_name: str, number: str, *, force: bool, reason: str) -> str:
    """Make a version champion and say so in a sentence; raises Refused, Outrun, UserError.

    Unless forced, for a reason, its files must be whole and the gate must have passed it against
    today's champion; the first champion needs no gate.
    """
    if force and not reason.strip():
        raise UserError("--force passes over the gate: say why with --reason TEXT")
    line = succession(decisions.history(model_name))
    model = next((found for found in models(model_name) if found.version == number), None)
    if not model:
        raise UserError(f"{model_name} has no version {number}: see `aegan models`")
    if line and line[-1].version == (number, model.run_id):
        return f"{model_name} version {number} is the champion already: {standing.words(line[-1])}"
    if force:
        why = "forced past the gate"
    elif not line:
        why = "the first champion"
    elif model.gate == "passed" and model.gate_champion == line[-1].to:
        why = "the gate has passed it"
    else:
        said = {
            "passed": f"has passed it, but not against version {line[-1].to}, the champion",
            "refused": "has refused it",
        }.get(model.gate, "has not seen it")
        raise Refused(
            f"{model_name} version {number}: the gate {said}; run `aegan gate {number}`, or "
            "promote it with --force --reason TEXT"
        )
    if not force:
        tracking.load_model(f"models:/{model_name}/{number}")
    decision = decisions.decide(
        model_name,
        kind="promotion",
        start=line[-1].to if line else None,
        to=number,
        reasons=[why, reason] if reason else [why],
        reference=model.gate_reference,
    )
    return f"{model_name}: {standing.words(decision)}"


def rollback(model_name: str, *, to: str = "", reason: str = "") -> str:
    """Make a former champion, by default the last that is whole, champion again.

    Says so in a sentence; raises Outrun, UserError.
    """
    entries = decisions.history(model_name)
    line = succession(entries)
    if not line:
        raise UserError(f"{model_name} has no champion yet: `aegan promote VERSION` makes one")
    champions = [made for made in entries if made.changes_champion]
    former = [made for made in (champions if to else line) if made.version != line[-1].version]
    if to and to not in {made.to for made in champions}:
        raise UserError(
            f"{model_name} version {to} never was champion: `aegan promote {to}`, or see "
            "`aegan history`"
        )
    with readable_errors():
        there = decisions.versions(open_store(writing=False).MlflowClient(), model_name)
    if to == line[-1].to and standing.is_there(there, line[-1]):
        return f"{model_name} version {to} is the champion already: {standing.words(line[-1])}"
    wanted = [made for made in former if made.to == to] if to else former
    target = _newest_whole(model_name, wanted, there)
    if not target:
        other = _newest_whole(model_name, [made for made in former if made.to != to], there)
        cure = f"`aegan rollback --to {other}` is whole" if other else "promote another version"
        what = f"version {to} is not there any more" if to else "no former champion is there"
        raise UserError(f"{model_name}: {what}; {cure}")
    decision = decisions.decide(
        model_name,
        kind="rollback",
        start=line[-1].to,
        to=target,
        reasons=[reason] if reason else [],
    )
    return f"{model_name}: {standing.words(decision)}"


def _newest_whole(model_name: str, made: Sequence[Decision], there: Mapping[str, Any]) -> str:
    """Of versions that were champions the last whose files are what was registered, else empty.

    Raises StoreError: one whose files cannot be asked for now may be whole.
    """
    for (number, _), decision in {one.version: one for one in reversed(made)}.items():
        if not standing.is_there(there, decision):
            log.warning("%s: version %s was deleted in MLflow", model_name, number)
            continue
        try:
            tracking.load_model(f"models:/{model_name}/{number}")
        except StoreError:
            raise
        except UserError as error:
            log.warning("%s", error)
            continue
        return number
    return ""


def table_of_models(found: Sequence[Model]) -> str:
    """The versions for people, with the score that training aims at."""
    rows = [
        (
            model.version,
            ", ".join(model.aliases),
            standing.moment(model.time),
            model.dataset_sha256[:12],
            f"{model.scores['frechet_distance/ema']:.4g}"
            if "frechet_distance/ema" in model.scores
            else "",
            model.gate,
            model.run_name,
        )
        for model in found
    ]
    return _table(("version", "aliases", "registered", "data", "Fréchet", "gate", "run"), rows)


def table_of_decisions(entries: Sequence[Decision]) -> str:
    """The log for people; what came too late, or was sent twice, is marked."""
    rows = [
        (
            str(entry.number),
            standing.moment(entry.time),
            entry.kind,
            entry.to,
            entry.start or "",
            entry.by,
            "yes" if entry.counts else "no",
            "; ".join(entry.reasons),
        )
        for entry in entries
    ]
    return _table(("no.", "when", "what", "version", "champion", "by", "counts", "reasons"), rows)


def _scores(tags: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The measures among a version's tags, which anyone may have written."""
    for name, value in sorted(tags.items()):
        if name.startswith("evaluate/"):
            try:
                yield name.removeprefix("evaluate/"), float(value)
            except ValueError:
                continue


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(heading), *([" ".join(shown(cell).split()) or "-" for cell in r] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
