"""How long a promotion, a rollback and the history take with 100 entries in the log.

    MLFLOW_TRACKING_URI=http://127.0.0.1:5000 .venv/bin/python -m benchmarks.decisions

It writes a model of its own, `benchmark-of-decisions`, with versions that hold no files, into the
registry that MLFLOW_TRACKING_URI names, and never into the project's own.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.base.errors import UserError, run_stage
from pipelines.registry import decision_log, decisions, mlflow_store
from pipelines.registry.mlflow_store import unless_there

MODEL, ENTRIES, REPEATS = "benchmark-of-decisions", 100, 5


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("MLFLOW_TRACKING_URI is not set: name a registry to write a model into")
    client = mlflow_store.open_store().MlflowClient()
    with unless_there():
        client.create_registered_model(MODEL)
    for _ in range(2):
        run = client.create_run("0")
        client.create_model_version(MODEL, run.info.artifact_uri, run.info.run_id)
    versions = list(decisions.versions(client, MODEL))[-2:]

    def decide(kind: Any) -> None:
        now = decisions.champion(MODEL)
        other = next(version for version in versions if version != now)
        decisions.decide(MODEL, kind=kind, start=now, to=other, reasons=["timed"])

    decide("promotion")
    [first] = decisions.history(MODEL)
    for number in range(2, ENTRIES + 1):
        refusal = replace(first, kind="refusal", start=first.to, reasons=(f"number {number}",))
        source, tags = f"models:/{MODEL}/{first.to}", decision_log.tags_of(refusal)
        client.create_model_version(decision_log.log_of(MODEL), source, tags=tags)
    show("promotion", lambda: decide("promotion"))
    show("rollback", lambda: decide("rollback"))
    show("history", lambda: decisions.history(MODEL))
    client.delete_registered_model(MODEL)
    client.delete_registered_model(f"{MODEL}.decisions")


def show(what: str, call: Callable[[], Any]) -> None:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"{what}: median {median:.2f} s, {min(seconds):.2f} to {max(seconds):.2f}")


if __name__ == "__main__":
    run_stage(main)
