"""What MLflow is told of a training: the same whether it is sent meanwhile or with the model."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aegan.config import CHANGEABLE
from pipelines.registry.mlflow_runs import Point

Facts = Mapping[str, Any]  # run.json


def determined_params(facts: Facts) -> dict[str, Any]:
    """The parameters that a run's name is made of: MLflow never changes one, nor do these."""
    return {
        f"{section}.{key}": value
        for section in ("model", "loss", "training")
        for key, value in facts["params"][section].items()
        if key not in CHANGEABLE and key != "start_from"
    }


def tags(facts: Facts) -> dict[str, str]:
    """Which data, code and weights a training began with, and which job of a cluster it was."""
    commit, start = facts.get("git_commit") or "", facts.get("start") or {}
    found = {
        "dataset_sha256": facts["dataset_sha256"],
        "code_sha256": facts.get("code_sha256"),
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
        "mlflow.source.git.dirty": commit and str(commit.endswith("-dirty")).lower(),
        "ray_job": facts.get("ray_job"),
        "start_from": start.get("address"),
        "start_sha256": start.get("sha256"),
    }
    return {name: value for name, value in found.items() if value}


def train_points(rows: Iterable[Mapping[str, Any]], facts: Facts) -> Iterator[Point]:
    """Curves of a training, among them the images shown: an axis for trainings of other batches."""
    batch_size = facts["params"]["training"]["batch_size"]
    for row in rows:
        yield from _points("train/", {**row, "images_shown": int(row["step"]) * batch_size})


def system_points(rows: Iterable[Mapping[str, Any]], *, first: int = 0) -> Iterator[Point]:
    """Curves of the machine; the first row has the step `first`."""
    for step, row in enumerate(rows, start=first):
        yield from _points("system/", {"step": step, **row})


def _points(prefix: str, row: Mapping[str, Any]) -> Iterator[Point]:
    for name, value in row.items():
        if name not in ("step", "time") and is_finite(value):
            yield Point(prefix + name, float(value), int(row["step"]), float(row["time"]))


def is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):  # an empty cell, a word, a list
        return False
