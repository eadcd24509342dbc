"""Registered versions that nothing needs any more: which they are, and how they go for good.

Needed are the newest ones, what an alias or a tag of the model names, what a rollback could return
to, what a run that is at work begins with, and what others say (`pipelines/project/old_versions`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from pipelines.registry import decisions, mlflow_runs
from pipelines.registry.decision_log import log_of, succession
from pipelines.registry.mlflow_store import (
    alone,
    check_place,
    open_store,
    paged,
    readable_errors,
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A registered version, and why it stays; it may go without a reason."""

    number: str
    time: float  # of its registration, seconds since 1970
    run_id: str  # in MLflow
    run_name: str  # of the folder that it was trained in
    reason: str


def versions(model_name: str, keep: int, *, needed: Mapping[str, str]) -> list[Found]:
    """All of a model, oldest first; raises UserError.

    `needed` is what is known beside the registry: a version's number or address => reason.
    """
    entries = decisions.history(model_name)  # which puts the aliases right
    with readable_errors():
        client = open_store(writing=False).MlflowClient()
        found = decisions.versions(client, model_name)
        if not found:
            return []
        model, running = client.get_registered_model(model_name), list(_running(client))
    stay = dict.fromkeys([*found][-keep:], f"one of the newest {keep}")
    for line in ([one for one in entries if one.changes_champion], succession(entries)):
        former = dict.fromkeys(one.to for one in reversed(line))  # each once, the last first
        stay |= dict.fromkeys([*former][: keep + 1], "a rollback could return to it")
    at_work = {run.info.run_id for run in running}
    stay |= {n: "its run is at work" for n, one in found.items() if one.run_id in at_work}
    stay |= {str(number): f"the alias {alias}" for alias, number in model.aliases.items()}
    named = dict(needed) | {value: f"the tag {name} names it" for name, value in model.tags.items()}
    named |= {
        run.data.tags.get("start_from", ""): f"the run {run.info.run_name} begins with it"
        for run in running
    }
    stay |= {
        address.removeprefix(f"models:/{model_name}/"): reason for address, reason in named.items()
    }
    return [
        Found(
            number=number,
            time=version.creation_timestamp / 1000,
            run_id=version.run_id,
            run_name=version.tags.get("run_name", ""),
            reason=stay.get(number, ""),
        )
        for number, version in found.items()
    ]


def remove(model_name: str, old: Sequence[Found]) -> None:
    """Delete versions with their runs and files; the log of decisions stays. Raises UserError.

    A version goes last: one whose removal was cut off is found again.
    """
    for version in old:
        with readable_errors(), alone():
            client = open_store().MlflowClient()
            named = client.search_model_versions(f"run_id = '{version.run_id}'")
            others = {
                (made.name, str(made.version)) for made in named if made.name != log_of(model_name)
            } - {(model_name, version.number)}
            run = _run(client, version.run_id)
            if run and not others:
                _remove_files(client, run)
                mlflow_runs.remove_run(client, run)
            client.delete_model_version(model_name, version.number)


def _run(client: Any, run_id: str) -> Any:
    """None for one that somebody has removed for good."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _remove_files(client: Any, run: Any) -> None:
    """Those at a server or in a bucket; those on this machine go with the run."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    models = mlflow_runs.logged_models(client, run)
    for place in (run.info.artifact_uri, *(model.artifact_location for model in models)):
        check_place(place, f"the run {run.info.run_id}")
        if urlsplit(place).scheme not in ("", "file"):
            get_artifact_repository(place).delete_artifacts()


def _running(client: Any) -> Iterator[Any]:
    """Every run that MLflow believes to be at work."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if experiments:
        yield from paged(partial(client.search_runs, experiments, "attributes.status = 'RUNNING'"))
