"""`aegan sync`: what trainings could not send to MLflow while they ran."""

import logging
from collections.abc import Sequence
from pathlib import Path

from aegan.config import RegisterConfig
from aegan.training.run_folder import RunFolder
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.base.outside import check_name
from pipelines.registry.live_run import mark_of, send_rest

RUNS = Path("runs")

log = logging.getLogger(__name__)


def main(names: Sequence[str]) -> dict[str, str]:
    """Send the rest of these runs; without names, of all that were to be seen in MLflow.

    Returns the runs of which all is there now, and what they are called there.
    """
    experiment, sent = params.load(RegisterConfig).experiment, {}
    for folder in _named(names) if names else _tracked():
        if run_id := send_rest(folder, experiment):
            log.info("%s: all of it is in MLflow, run %s", folder.path.name, run_id)
            sent[folder.path.name] = run_id
    return sent


def _tracked() -> list[RunFolder]:
    folders = [RunFolder(path) for path in sorted(RUNS.glob("*")) if path.is_dir()]
    return [folder for folder in folders if mark_of(folder)]


def _named(names: Sequence[str]) -> list[RunFolder]:
    folders = [RunFolder(RUNS / check_name(name, origin="the command line")) for name in names]
    for folder in folders:
        if not folder.facts.exists():
            raise UserError(
                f"{folder.path} holds no training: expected the name of a folder in {RUNS}/"
            )
    return folders
