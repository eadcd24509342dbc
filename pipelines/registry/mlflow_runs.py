"""Runs of MLflow: how they are made, filled in batches, and removed."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.registry import mlflow_store
from pipelines.registry.mlflow_store import check_place, quoted

MAX_POINTS, MAX_PARAMS = 900, 100  # in one request; MLflow takes 1,000 points and tags together


class Point(NamedTuple):
    """One value of a metric's curve."""

    name: str
    value: float
    step: int
    time: float  # seconds since 1970


def make_experiment(mlflow: Any, name: str) -> str:
    """The id of the experiment of that name, which is made where there is none."""
    experiment = mlflow.set_experiment(name)
    check_place(experiment.artifact_location, f"the experiment {name}")
    experiment_id: str = experiment.experiment_id
    return experiment_id


def create_run(client: Any, experiment_id: str, name: str, tags: Mapping[str, str]) -> Any:
    """A new run, which also says whose it is; UserError if its files are to lie elsewhere."""
    from mlflow.tracking.context.registry import resolve_tags

    all_tags = resolve_tags({"mlflow.source.name": "aegan", **tags})
    run = client.create_run(experiment_id, tags=all_tags, run_name=name)
    check_place(run.info.artifact_uri, f"a new run of the experiment {experiment_id}")
    return run


def log_numbers(
    client: Any,
    run_id: str,
    *,
    params: Mapping[str, Any] | None = None,
    points: Sequence[Point] = (),
    tags: Mapping[str, Any] | None = None,
) -> None:
    """Parameters and points; then, with the last of them, the tags.

    A point that the run has is kept once: whatever was cut off may be sent again.
    """
    from mlflow.entities import Metric, Param, RunTag

    all_params = [Param(name, str(value)) for name, value in (params or {}).items()]
    for batch in _batches(all_params, MAX_PARAMS):
        client.log_batch(run_id, params=batch)
    metrics = [
        Metric(point.name, point.value, round(point.time * 1000), point.step) for point in points
    ]
    *batches, last = _batches(metrics, MAX_POINTS) or [[]]
    for batch in batches:
        client.log_batch(run_id, metrics=batch)
    client.log_batch(
        run_id, metrics=last, tags=[RunTag(name, str(v)) for name, v in (tags or {}).items()]
    )


def remove_run(client: Any, run: Any) -> None:
    """Delete a run and the models logged in it; on this machine their files first.

    Called within `readable_errors` and `alone`, like the next.
    """
    models = [model.model_id for model in logged_models(client, run)]
    if mlflow_store.database_file():
        home = mlflow_store.files_folder() / run.info.experiment_id  # not where the store says
        for folder in (run.info.run_id, *(f"models/{model}" for model in models)):
            shutil.rmtree(home / folder, ignore_errors=True)
    for model in models:
        client.delete_logged_model(model)
    client.delete_run(run.info.run_id)


def logged_models(client: Any, run: Any) -> list[Any]:
    found: list[Any] = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = {quoted(run.info.run_id)}"
    )
    return found


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
