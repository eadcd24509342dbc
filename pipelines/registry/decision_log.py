"""The log of decisions about a model: promotions, refusals and rollbacks, in the server's order.

The log of the model `aegan` is another registered model, `aegan.decisions`, with one version for
each decision: MLflow moves an alias for whoever asks last, but it gives every version a number of
its own, in one order for all. A decision counts only if it was made against the champion of its
time, so of two at once the one with the lower number does. Nothing else says who is champion.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from pipelines.registry.mlflow_store import paged, quoted

Kind = Literal["promotion", "refusal", "rollback"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One entry of the log."""

    number: int  # its place in the log
    kind: Kind
    start: str | None  # the champion's version that it was decided against
    to: str  # the version that it is about
    run_id: str  # that version's run: a model that is made again has other ones of that number
    by: str
    reasons: tuple[str, ...]
    reference: str  # hash of the reference split; empty where none was used
    time: float  # seconds since 1970, by the server's clock
    counts: bool

    @property
    def version(self) -> tuple[str, str]:
        """What it is about, also where the model was made again since."""
        return self.to, self.run_id

    @property
    def changes_champion(self) -> bool:
        return self.counts and self.kind != "refusal"

    def is_same_as(self, other: "Decision") -> bool:
        """Whether both say the same, whenever they were written."""
        return replace(self, number=0, time=0.0, counts=False) == replace(
            other, number=0, time=0.0, counts=False
        )


def log_of(model_name: str) -> str:
    """The registered model that holds the decisions about another."""
    return f"{model_name}.decisions"


def fold(entries: Iterable[Decision]) -> list[Decision]:
    """The entries by number, each with whether it counts.

    It does if it was decided against the champion so far, and does not repeat what was decided
    since that became champion.
    """
    folded: list[Decision] = []
    champion: tuple[str, str] | None = None
    for entry in sorted(entries, key=lambda entry: entry.number):
        changes_nothing = entry.kind != "refusal" and entry.version == champion
        counts = (
            entry.start == (champion[0] if champion else None)
            and not changes_nothing
            and not any(entry.is_same_as(other) for other in since_change(folded))
        )
        folded.append(replace(entry, counts=counts))
        if folded[-1].changes_champion:
            champion = entry.version
    return folded


def since_change(folded: Sequence[Decision]) -> list[Decision]:
    """What counts since the champion last changed, that change first; all where it never did."""
    changes = [place for place, entry in enumerate(folded) if entry.changes_champion]
    return [entry for entry in folded[changes[-1] if changes else 0 :] if entry.counts]


def succession(folded: Iterable[Decision]) -> list[Decision]:
    """The decisions that made today's champion, last, and those a rollback would go back to.

    A rollback takes away the champions that came after its target.
    """
    line: list[Decision] = []
    for entry in folded:
        if not entry.changes_champion:
            continue
        places = [place for place, made in enumerate(line) if made.version == entry.version]
        if entry.kind == "rollback" and places:
            del line[places[-1] :]
        line.append(entry)
    return line


def read(client: Any, model_name: str) -> list[Decision]:
    """The whole log, oldest first, with what counts."""
    name = log_of(model_name)
    numbers = set()
    entries = []
    for version in versions_of(client, name):
        numbers.add(int(version.version))
        if entry := _entry(version):
            entries.append(entry)
        else:
            log.warning("%s: version %s is no decision of ours: passed over", name, version.version)
    if missing := sorted({*range(1, max(numbers, default=0))} - numbers):
        first = ", ".join(map(str, missing[:5]))
        log.warning("%s: somebody deleted %s from the log: what it says may be wrong", name, first)
    return fold(entries)


def versions_of(client: Any, model_name: str) -> list[Any]:
    """All versions of a registered model in MLflow; none where there is no such model."""
    search = partial(client.search_model_versions, f"name = {quoted(model_name)}")
    found = [version for version in paged(search) if version.name == model_name]
    return sorted(found, key=lambda version: int(version.version))


def tags_of(decision: Decision) -> dict[str, str]:
    """What a decision is in MLflow; its number and time are the server's."""
    return {
        "kind": decision.kind,
        "from": decision.start or "",
        "to": decision.to,
        "by": decision.by,
        "reasons": json.dumps(decision.reasons, ensure_ascii=False),
        "reference": decision.reference,
    }


def _entry(version: Any) -> Decision | None:
    """The decision that a version of the log holds, which anyone may have written."""
    tags = version.tags
    try:
        reasons = json.loads(tags["reasons"])
        kind: Any = tags["kind"]
        if kind not in get_args(Kind) or not isinstance(reasons, list):
            return None
        return Decision(
            number=int(version.version),
            kind=kind,
            start=tags["from"] or None,
            to=tags["to"],
            run_id=version.run_id or "",
            by=tags["by"],
            reasons=tuple(map(str, reasons)),
            reference=tags["reference"],
            time=version.creation_timestamp / 1000,
            counts=False,
        )
    except (KeyError, ValueError):
        return None
