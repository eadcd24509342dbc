"""What MLflow's page says of champions: aliases and descriptions, derived from the log.

They are a copy for people and for programs that know MLflow only. Whoever finds one that differs
puts it right, so a process that was killed before it got there, or a hand that moved an alias,
changes nothing for long.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pipelines.registry.decision_log import Decision, succession
from pipelines.registry.mlflow_store import twice

ALIASES = ("champion", "previous")
MARK = "**Decisions** (kept by `aegan`; what stands above is yours)"
MAX_DESCRIPTION = 5000  # characters that MLflow keeps
MIN_ROOM = 500  # characters that a description of ours is worth


class Repair(NamedTuple):
    """Something in MLflow that is not as the log says."""

    what: str  # in words; empty where nobody needs to know
    make: Callable[[], Any]


def deed(decision: Decision) -> str:
    """`promotion of version 3 in place of version 2 by me@here`."""
    what, other = {
        "promotion": ("promotion of", "in place of"),
        "refusal": ("refusal of", "against"),
        "rollback": ("rollback to", "from"),
    }[decision.kind]
    than = f" {other} version {decision.start}" if decision.start else ""
    return f"{what} version {decision.to}{than} by {decision.by}"


def words(decision: Decision) -> str:
    """The same with its time and number, in one line."""
    return f"{deed(decision)}, {moment(decision.time)} (decision {decision.number})"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def is_there(versions: Mapping[str, Any], decision: Decision) -> bool:
    """Whether the version that was decided on still is.

    A model that was deleted and is made again has versions of the same numbers.
    """
    version = versions.get(decision.to)
    return version is not None and (version.run_id or "") == decision.run_id


def repairs(
    client: Any, model_name: str, entries: Sequence[Decision], versions: Mapping[str, Any]
) -> Iterator[Repair]:
    """What has to change in MLflow to be as the log says; nothing before there is a champion.

    The versions are those of the model, by number.
    """
    line = succession(entries)
    if not line or not versions:
        return
    model = client.get_registered_model(model_name)
    pointing = {alias: str(number) for alias, number in model.aliases.items()}
    meant = aliases(line, versions)
    for alias, decision in meant.items():
        found, wanted = pointing.get(alias), decision.to if decision else None
        if found == wanted:
            continue
        if decision:
            make = partial(twice, client.set_registered_model_alias, model_name, alias, decision.to)
            right = f"version {decision.to}, by decision {line[-1].number} of {line[-1].by}"
        else:
            make = partial(client.delete_registered_model_alias, model_name, alias)
            right = "no version that is there"
        was = f"was at version {found}" if found else "was missing"
        yield Repair(f"the alias {alias} of {model_name} {was}: put right, it is {right}", make)
    there = {made.version for made in entries if made.counts and is_there(versions, made)}
    for number, run_id in sorted(there):
        found = versions[number].description or ""
        if (text := _with(found, _about_version((number, run_id), entries))) != found:
            yield Repair("", partial(client.update_model_version, model_name, number, text))
    found = model.description or ""
    if (text := _with(found, _about_model(meant))) != found:
        yield Repair("", partial(client.update_registered_model, model_name, text))


def aliases(line: Sequence[Decision], versions: Mapping[str, Any]) -> dict[str, Decision | None]:
    """Which decision's version each alias means; of deleted ones the alias is deleted, too."""
    champion = line[-1] if is_there(versions, line[-1]) else None
    others = [made for made in line if made.version != line[-1].version]
    before = [made for made in others if is_there(versions, made)]
    return dict(zip(ALIASES, (champion, before[-1] if before else None), strict=True))


def _about_version(version: tuple[str, str], entries: Sequence[Decision]) -> str:
    changes = [entry for entry in entries if entry.changes_champion]
    state = "Never champion."
    for made, ended in zip(changes, [*changes[1:], None], strict=True):
        if made.version == version:
            until = f" until {moment(ended.time)}, followed by version {ended.to}" if ended else ""
            state = f"Champion since {moment(made.time)}{until}."
    about = [entry for entry in entries if entry.counts and entry.version == version]
    return "\n".join([state, "", *(f"- {_with_reasons(entry)}" for entry in reversed(about))])


def _about_model(meant: Mapping[str, Decision | None]) -> str:
    return "\n".join(
        f"- {alias}: {_with_reasons(made) if made else 'none that is there'}"
        for alias, made in meant.items()
    )


def _with_reasons(decision: Decision) -> str:
    reasons = "; ".join(" ".join(reason.split()) for reason in decision.reasons)
    return words(decision) + (f": {reasons}" if reasons else "")


def _with(description: str, text: str) -> str:
    """A description with our part at its end, for which there may be no room."""
    theirs = description.partition(MARK)[0].rstrip()
    room = MAX_DESCRIPTION - len(theirs)
    if room < MIN_ROOM:
        return description
    return f"{theirs}\n\n{MARK}\n\n{text}".lstrip()[: MAX_DESCRIPTION - 10].rstrip()
