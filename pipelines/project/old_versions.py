"""`aegan clean --keep N`: registered versions beyond the newest go, with their runs."""

from collections.abc import Iterator
from contextlib import ExitStack

from aegan.config import ComputeConfig, RegisterConfig, TrainingConfig
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.bucket.run_store import RunStore
from pipelines.bucket.storage import is_s3
from pipelines.registry import mlflow_store, old_versions
from pipelines.registry.standing import moment
from pipelines.retraining import lease
from pipelines.retraining.ledger import Ledger, place_of


def clean(keep: int, *, used: set[str], remove: bool) -> set[str]:
    """Say which versions go and why others stay, and remove them if that is asked for.

    Returns the names of the runs that go with them: not those of `used`. Raises UserError, also
    while a retraining is at work on any machine.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: expected how many of the newest versions stay, at least 1")
    file = mlflow_store.database_file()
    if file and not file.exists():
        return set()
    name, address = params.load(RegisterConfig).model_name, params.load(ComputeConfig).storage
    place = place_of(address)
    with ExitStack() as held:
        if remove:
            held.enter_context(lease.hold(place))
        found = old_versions.versions(name, keep, needed=dict(_needed(Ledger(place))))
        old = [version for version in found if not version.reason]
        runs = {version.run_name for version in old}
        runs -= {version.run_name for version in found if version.reason} | used | {""}
        print(f"versions of {name}: {len(found)}, of which {len(old)} may go")
        for version in found:
            print(
                f"    version {version.number} of {moment(version.time)}, run {version.run_name}: "
                + (f"stays, {version.reason}" if version.reason else "goes")
            )
        if remove:
            old_versions.remove(name, old)
            for run in sorted(runs) if is_s3(address) else ():
                RunStore(f"{address.rstrip('/')}/runs/{run}").remove()
    return runs


def _needed(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """Versions that this project's settings, and retrainings not at their end, name."""
    yield params.load(TrainingConfig).start_from, "training.start_from names it"
    for entry in ledger.entries():
        if not entry.outcome:
            reason = f"retraining {entry.id} is not at its end"
            yield entry.champion, reason
            for step in entry.steps.values():
                yield from ((str(step.result.get(key, "")), reason) for key in ("version", "start"))
