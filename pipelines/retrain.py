"""`aegan retrain`: new images -> checked, trained, compared, promoted or refused, by itself.

Steps follow one another (pipelines/retraining/steps.py); what each has found stands in a ledger, so
that the same command goes on after a crash where it stopped, and does nothing where there is
nothing to do. Exit codes: 0 promoted or nothing to do, 3 refused, 4 another is at work, 1 error.
"""

import itertools
import logging
import time
from dataclasses import dataclass
from typing import Any

from aegan.config import ComputeConfig, DataConfig, RegisterConfig, RetrainConfig
from aegan.files import sha256_of_json
from pipelines.base import identity, params
from pipelines.base.errors import UserError
from pipelines.base.files import project_folder
from pipelines.registry import decisions, mlflow_store
from pipelines.retraining import history_page, lease, messages, workplace
from pipelines.retraining.ledger import FOLDER, Entry, Ledger, Step, new_entry, place_of
from pipelines.retraining.look import look
from pipelines.retraining.steps import (
    EXIT_CODES,
    FETCHED,
    OUTCOME,
    REASONS,
    STEPS,
    Retraining,
    cost,
)

BUSY = 4
BEFORE_DECIDING = ("fetch", "check")  # steps that are the same whatever a person accepts
IGNORED = ("compute", "evaluate", "interpolate", "tune")  # sections that change no weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was asked for."""

    dry_run: bool = False
    until: str = ""  # the last step to do
    force: str = ""  # a step to do again, with all after it
    accept_drift: str = ""  # the retraining whose drift is accepted
    reason: str = ""


def main(options: Options) -> tuple[dict[str, Any], int]:
    """Retrain if there is reason to => what came of it, the exit code. Raises UserError."""
    for name in (options.until, options.force):
        if name and name not in STEPS:
            raise UserError(f"{name} is no step: {', '.join(STEPS)}")
    if (options.force or options.accept_drift) and not options.reason:
        raise UserError("say why: --reason TEXT; it is kept in the ledger")
    messages.check()
    place = place_of(params.load(ComputeConfig).storage)
    try:
        if options.dry_run:
            return _retrain(Ledger(place), lease.Lease(), options)
        with lease.hold(place) as held:
            return _retrain(Ledger(place), held, options)
    except lease.BusyError as error:
        log.error("%s", error)
        return {"id": None, "outcome": "busy", "reasons": [str(error)]}, BUSY


def _retrain(ledger: Ledger, held: lease.Lease, options: Options) -> tuple[dict[str, Any], int]:
    commit = workplace.last_commit()
    config, registry = params.load(RetrainConfig), params.load(RegisterConfig)
    champion = _champion(registry.model_name)
    begun = time.time()
    source, seen = look(params.load(DataConfig))
    log.info("look: %s, %.1f s", source, time.time() - begun)
    entry = new_entry(seen=seen, source=source, settings=_settings(), champion=champion)
    earlier = ledger.entries()
    if not options.dry_run:
        ledger.looked()
        _tell_late(ledger, earlier)
    entry = next((known for known in earlier if _is_the_same(known, entry)), entry)
    _apply(options, entry)
    if entry.outcome:
        told = "; ".join(entry.reasons)
        log.info(
            "nothing new since retraining %s, which ended: %s (%s)", entry.id, entry.outcome, told
        )
        facts = _facts(entry) | {"nothing_new": True}
        return facts, EXIT_CODES["asks"] if entry.outcome == "asks" else 0
    work = workplace.Workplace()
    _take_back_if_elsewhere(entry, work)
    if options.dry_run:
        return _facts(entry) | {"to_do": _show_plan(entry, earlier, config)}, 0
    retraining = Retraining(
        entry=entry, commit=commit, config=config, registry=registry,
        work=work, lease=held, deadline=begun + config.max_hours * 3600,
    )  # fmt: skip
    code = _go_through(retraining, ledger, options)
    return _facts(entry), code


def _champion(model_name: str) -> str:
    """Its version; "" where there is none, or no registry yet."""
    file = mlflow_store.database_file()
    return "" if file and not file.exists() else decisions.champion(model_name) or ""


def _is_the_same(known: Entry, new: Entry) -> bool:
    """Whether it is this one, or one that saw the same and whose end is today's champion.

    Also if it was cut off between the gate's promotion and the ledger's word of it.
    """
    same_facts = (known.seen, known.settings) == (new.seen, new.settings)
    end = known.champion_after if known.outcome else known.trained_version
    return known.id == new.id or (same_facts and bool(end) and end == new.champion)


def _settings() -> str:
    """Hash of the parameters and the code that decide what comes out."""
    sections = {key: value for key, value in params.read().items() if key not in IGNORED}
    code = identity.code_sha256(
        identity.code_of([f"pipelines.{stage}" for stage in ("preprocess", "train")])
    )
    return sha256_of_json([sections, code])


def _apply(options: Options, entry: Entry) -> None:
    """Take back what is to be done again."""
    if options.accept_drift:
        if entry.id != options.accept_drift:
            raise UserError(
                f"retraining {options.accept_drift} is not the one that is to be done now, "
                f"{entry.id}: source, settings or champion have changed since"
            )
        if entry.outcome == "asks":
            entry.accepted = options.reason
            _take_back(entry, "decide")
    if options.force:
        _check_is_reached(entry, options.force)
        _take_back(entry, options.force)
        entry.reasons = [f"{options.force} was done again: {options.reason}"]


def _check_is_reached(entry: Entry, step: str) -> None:
    """UserError where the retraining has ended at an earlier step, which has nothing for this."""
    for name in itertools.takewhile(lambda name: name != step, STEPS):
        if name in entry.steps and (outcome := entry.steps[name].result.get(OUTCOME)):
            raise UserError(
                f"--force {step}: retraining {entry.id} ended at the step {name} ({outcome}) and "
                f"has not come to {step}: `--force {name}` does that and what follows again"
            )


def _take_back(entry: Entry, step: str) -> None:
    """Forget a step and all after it, and the end that they led to, if they did."""
    names = list(STEPS)
    for name in names[names.index(step) :]:
        if gone := entry.steps.pop(name, None):
            said = gone.result.get(REASONS, [])
            entry.reasons = [reason for reason in entry.reasons if reason not in said]
    entry.outcome = entry.champion_after = ""
    entry.told = False  # of the end that is to come


def _take_back_if_elsewhere(entry: Entry, work: workplace.Workplace) -> None:
    """Of a retraining that goes on: the steps that have left their files in another worktree."""
    fetched = entry.steps.get("fetch")
    if fetched and fetched.output and not work.holds(fetched.result.get(FETCHED)):
        log.info(
            "what retraining %s has fetched is on another machine, or replaced by another's: "
            "it is fetched and made again",
            entry.id,
        )
        _take_back(entry, "fetch")


def _go_through(retraining: Retraining, ledger: Ledger, options: Options) -> int:
    entry, before = retraining.entry, retraining.entry.id
    for name, work in STEPS.items():
        accepted = "" if name in BEFORE_DECIDING else entry.accepted
        depends_on = sha256_of_json([name, before, accepted])
        step = entry.steps.get(name)
        if step is None or not step.output or step.input != depends_on:
            step = entry.steps[name] = Step(depends_on, begun=time.time())
            retraining.lease.check()
            ledger.save(entry)
            log.info("%s", name)
            step.result = work(retraining)
            step.seconds = time.time() - step.begun
            step.output = before = sha256_of_json([depends_on, step.result])
            if outcome := step.result.get(OUTCOME):
                entry.outcome, entry.reasons = outcome, entry.reasons + step.result[REASONS]
                entry.champion_after = step.result.get("champion", entry.champion)
            retraining.lease.check()
            ledger.save(entry)
        before = step.output
        if entry.outcome:
            break
        if name == options.until:
            log.info("ends after the step %s; the same command goes on", name)
            return 0
    seconds = sum(step.seconds for step in entry.steps.values())
    log.info("retraining %s: %s", entry.id, entry.outcome)
    for reason in entry.reasons:
        log.info("  %s", reason)
    log.info("it took %s", cost(seconds, retraining.config))
    page = history_page.write(ledger.entries(), project_folder() / FOLDER, retraining.config)
    log.info("all of them: file://%s", page)
    _tell(ledger, entry)
    return EXIT_CODES[entry.outcome]


def _show_plan(entry: Entry, earlier: list[Entry], config: RetrainConfig) -> list[str]:
    """Say what would be done, and what it has cost before => the steps."""
    todo = [name for name in STEPS if name not in entry.steps or not entry.steps[name].output]
    print(f"retraining {entry.id} of {entry.source} would do: {', '.join(todo)}")
    trained = [known for known in earlier if "train" in known.steps and known.outcome]
    if trained:
        seconds = [sum(step.seconds for step in known.steps.values()) for known in trained]
        typical = sorted(seconds)[len(seconds) // 2]
        print(f"the {len(trained)} before took {cost(typical, config)} (median)")
    print(f"it would end after {config.max_hours:g} hours (retrain.max_hours)")
    print("nothing was written")
    return todo


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "source": entry.source,
        "outcome": entry.outcome,  # "" until it has ended
        "reasons": entry.reasons,
        "champion": entry.champion_after if entry.outcome else entry.champion,
    }


def _message(entry: Entry) -> dict[str, Any]:
    """What is told of a retraining's end; `id` stays when it is sent again.

    It differs for another end of the same retraining (--force), whose last step began later.
    """
    last = max((step.begun for step in entry.steps.values()), default=entry.begun)
    name = f"{entry.id}-{entry.outcome}-{last:.3f}"
    return _facts(entry) | {"id": name, "retraining": entry.id, "time": entry.begun}


def _tell(ledger: Ledger, entry: Entry) -> None:
    if not entry.told and messages.send(_message(entry)):
        entry.told = True
        ledger.save(entry)


def _tell_late(ledger: Ledger, earlier: list[Entry]) -> None:
    """Messages that could not be delivered when it was time."""
    for entry in earlier:
        if entry.outcome:
            _tell(ledger, entry)
