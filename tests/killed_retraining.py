"""`aegan retrain` in a process that kills itself, with SIGKILL, where a test says.

One process that has everything in its memory forks them: to import it would take longer.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any, Literal

from tests.trained import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.killed_retraining", "pipelines.retrain"])

Moment = Literal["beginning", "end"]


def retrain(folder: Path, environment: Mapping[str, str], step: str, moment: Moment) -> None:
    """Retrain a project until a step has not yet begun, or is done and the ledger not told so."""
    arguments = (folder, dict(environment), step, moment)
    process = CONTEXT.Process(target=_retrain, args=arguments)
    with chdir(ROOT):  # where that process finds our modules
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (step, moment, process.exitcode)


def _retrain(folder: Path, environment: dict[str, str], step: str, moment: Moment) -> None:
    from pipelines import retrain
    from pipelines.retraining.steps import STEPS

    os.chdir(folder)
    os.environ.pop("PYTHONPATH", None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.update(environment)
    work = STEPS[step]

    def killed(retraining: Any) -> Any:
        if moment == "end":
            work(retraining)
        os.kill(os.getpid(), signal.SIGKILL)

    STEPS[step] = killed
    sys.exit(retrain.main(retrain.Options())[1])
