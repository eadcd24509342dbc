"""Who is champion: decide it, ask for it, see how it came about (docs/registry.md).

Every question reads the log and puts aliases and descriptions right that differ from it.
"""

import getpass
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aegan.files import sha256_of_json
from pipelines.base.errors import UserError
from pipelines.registry import decision_log, standing
from pipelines.registry.decision_log import Decision, Kind, log_of, succession, versions_of
from pipelines.registry.mlflow_store import (
    alone,
    check_place,
    open_store,
    readable_errors,
    unless_there,
)

ATTEMPTS = 8  # of several who write at once, a server gives up on some
MAX_NAMED = 3  # decisions that came between
ROUNDS = 20  # of putting aliases right while others decide

log = logging.getLogger(__name__)


class Outrun(UserError):  # noqa: N818 # others call it so
    """Somebody else's decision came between."""


def history(model_name: str) -> list[Decision]:
    """Every decision about a model, oldest first; raises UserError."""
    entries, _ = _look(model_name)
    return entries


def champion(model_name: str) -> str | None:
    """The champion's version, None before the first promotion; UserError if it was deleted."""
    return aliased(model_name, "champion")


def aliased(model_name: str, alias: str) -> str | None:
    """The version that `champion` or `previous` means by the log; None if there is none.

    Raises UserError, also for a champion that was deleted.
    """
    entries, versions = _look(model_name)
    line = succession(entries)
    if not line:
        return None
    meant = standing.aliases(line, versions)
    if alias == "champion" and not meant["champion"]:
        before = meant["previous"]
        cure = f"`aegan rollback` takes version {before.to}" if before else "promote another"
        raise UserError(
            f"{model_name}: version {line[-1].to}, the champion by decision {line[-1].number}, was "
            f"deleted in MLflow; {cure}"
        )
    found = meant[alias]
    return found.to if found else None


def decide(
    model_name: str,
    *,
    kind: Kind,
    start: str | None,
    to: str,
    reasons: Sequence[str],
    reference: str = "",
    files: Sequence[Path] = (),
    by: str = "",
) -> Decision:
    """Append a decision about version `to` that was made while `start` was champion.

    The files go to the run of that version. A decision that is in the log is not written again.
    Raises Outrun if there is another champion by now, UserError for what MLflow refuses.
    """
    with readable_errors(), alone():
        client = open_store().MlflowClient()
        version = versions(client, model_name).get(to)
        if version is None:
            raise UserError(f"{model_name} has no version {to}: see `aegan models`")
        wanted = Decision(
            number=0,
            kind=kind,
            start=start,
            to=to,
            run_id=version.run_id or "",
            by=by or this_person(),
            reasons=tuple(reasons),
            reference=reference,
            time=0.0,
            counts=False,
        )
        decision = _find(client, model_name, wanted)
        if not decision:
            _keep_files(client, wanted, files)
            decision = _append(client, model_name, wanted)
        _put_right(client, model_name, say=False)
    return decision


def this_person() -> str:
    """`AEGAN_BY`, else `user@host`."""
    return os.environ.get("AEGAN_BY") or f"{getpass.getuser()}@{socket.gethostname()}"


def _look(model_name: str) -> tuple[list[Decision], dict[str, Any]]:
    """The log, and the model's versions by number; what differs from the log is put right."""
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        entries = decision_log.read(client, model_name)
        there = versions(client, model_name)
        right = not any(standing.repairs(client, model_name, entries, there))
    if right:
        return entries, there
    try:
        with readable_errors(), alone():
            return _put_right(open_store().MlflowClient(), model_name, say=True)
    except UserError as error:  # who may only read is told what the log says, nevertheless
        log.warning("%s differs from its log and cannot be put right: %s", model_name, error)
        return entries, there


def _put_right(client: Any, model_name: str, *, say: bool) -> tuple[list[Decision], dict[str, Any]]:
    """Make aliases and descriptions what the log says, also while others write it.

    What was written with an older log in mind is found by reading both again afterwards.
    """
    for _ in range(ROUNDS):
        entries = decision_log.read(client, model_name)
        there = versions(client, model_name)
        wrong = list(standing.repairs(client, model_name, entries, there))
        if not wrong:
            return entries, there
        for repair in wrong:
            if say and repair.what:
                log.warning("%s", repair.what)
            repair.make()
    raise UserError(f"{model_name}: somebody keeps changing its aliases in MLflow; find out who")


def versions(client: Any, model_name: str) -> dict[str, Any]:
    """A model's versions in MLflow by number, oldest first."""
    return {str(version.version): version for version in versions_of(client, model_name)}


def _find(client: Any, model_name: str, wanted: Decision) -> Decision | None:
    """The decision in the log, where it counts; None if it may be written. Raises Outrun."""
    entries = decision_log.read(client, model_name)
    for entry in decision_log.since_change(entries):
        if entry.is_same_as(wanted):
            return entry
    line = succession(entries)
    now = line[-1].to if line else None
    if now == wanted.start:
        if line and wanted.kind != "refusal" and line[-1].version == wanted.version:
            raise UserError(f"{model_name}: version {now} is the champion already")
        return None
    changes = [entry for entry in entries if entry.changes_champion]
    before = [place for place, entry in enumerate(changes) if entry.to == wanted.start]
    between = changes[before[-1] + 1 if before else 0 :][-MAX_NAMED:]
    raise Outrun(
        f"{model_name}: this {wanted.kind} of version {wanted.to} was decided against "
        f"{_named(wanted.start)}, but the champion is {_named(now)} by now: "
        f"{'; '.join(map(standing.words, between)) or 'see `aegan history`'}"
    )


def _named(version: str | None) -> str:
    return f"version {version}" if version else "none"


def _keep_files(client: Any, decision: Decision, files: Sequence[Path]) -> None:
    """Put what a decision was made by among the files of the version's run."""
    if not files:
        return
    place = client.get_run(decision.run_id).info.artifact_uri
    check_place(place, f"the run of version {decision.to}")
    folder = f"decisions/{sha256_of_json(decision_log.tags_of(decision))[:16]}"
    for file in files:
        client.log_artifact(decision.run_id, str(file), folder)


def _append(client: Any, model_name: str, wanted: Decision) -> Decision:
    """Write a decision into the log and return it as it counts there; raises Outrun."""
    from mlflow.exceptions import RestException

    name = log_of(model_name)
    about = f"Every decision about the model {model_name}, kept by `aegan`: delete none of them."
    with unless_there():
        client.create_registered_model(name, description=about)
    for left in reversed(range(ATTEMPTS)):
        try:
            client.create_model_version(
                name,
                f"models:/{model_name}/{wanted.to}",
                wanted.run_id or None,
                tags=decision_log.tags_of(wanted),
                description=standing.deed(wanted),
                await_creation_for=0,
            )
        except RestException as error:
            if error.error_code != "INTERNAL_ERROR" or not left:
                raise
        if found := _find(client, model_name, wanted):
            return found
    raise UserError(f"{name}: MLflow has taken a decision and does not show it; try again")
