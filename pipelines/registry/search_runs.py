"""A search in MLflow: a run with its results, and nested in it a run for each trial."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.registry.mlflow_runs import Point, log_numbers, make_experiment
from pipelines.registry.mlflow_store import alone, check_place, open_store, quoted, readable_errors


def log_search(
    search: str, *, experiment: str, tags: Mapping[str, Any], files: Sequence[Path]
) -> str:
    """The run that the trials of a search are nested in, with its results; returns the run's id."""
    with readable_errors(), alone():
        mlflow = open_store()
        client = mlflow.MlflowClient()
        run_id = _search_run(mlflow, client, search, experiment)
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id)
        return run_id


def log_trial(
    name: str,
    *,
    search: str,
    experiment: str,
    params: Mapping[str, Any],
    points: Sequence[Point],
    tags: Mapping[str, str],
) -> None:
    """Store one trial as a run nested in its search's, unless it is there whole; raises UserError.

    A run of that name that was cut off when it was written, or has other tags, is replaced.
    """
    with readable_errors(), alone():
        mlflow = open_store()
        client = mlflow.MlflowClient()
        parent = _search_run(mlflow, client, search, experiment)
        experiment_id = client.get_run(parent).info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.run_name = {quoted(name)}"
        for run in client.search_runs([experiment_id], query):
            if run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
                return
            client.delete_run(run.info.run_id)
        tags = {**tags, "mlflow.parentRunId": parent}
        run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        log_numbers(client, run_id, params=params, points=points)
        client.set_terminated(run_id)


def _search_run(mlflow: Any, client: Any, search: str, experiment: str) -> str:
    """The id of the run of that name, made where there is none; UserError if it lies elsewhere."""
    experiment_id = make_experiment(mlflow, experiment)
    found = client.search_runs([experiment_id], f"tags.search = {quoted(search)}")
    if found:
        run = found[0]
    else:
        run = client.create_run(experiment_id, tags={"search": search}, run_name=search)
    check_place(run.info.artifact_uri, f"the run of the search {search}")
    run_id: str = run.info.run_id
    return run_id
