"""Where a training takes its first weights from: `training.start_from` names a trained model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aegan.config import ConfigError, TrainConfig
from aegan.training import start
from aegan.training.checkpoint import CheckpointError
from aegan.training.start import Start
from pipelines.base.errors import UserError
from pipelines.base.files import project_folder
from pipelines.registry import tracking


def read_start(config: TrainConfig, manifest: dict[str, Any], *, output: Path) -> Start | None:
    """The weights to begin with, checked; None for random ones. Raises UserError.

    A folder below `output`, where the stage publishes, would be gone when it is needed.
    """
    address = config.training.start_from
    if not address:
        return None
    try:
        with _local_folder(address, output) as folder:
            return start.read(folder, config, manifest)
    except (ConfigError, CheckpointError) as error:
        raise UserError(f"training.start_from: {address}: {error}") from None


@contextmanager
def _local_folder(address: str, output: Path) -> Iterator[Path]:
    """The model or checkpoint at an address, which is no output of this training."""
    if not tracking.is_address(address):
        folder = tracking.folder_at(address)
        if folder.resolve().is_relative_to((project_folder() / output).resolve()):
            raise UserError(
                f"training.start_from is {address}, which every training replaces: copy that "
                "folder elsewhere, or take models:/name@alias or a checkpoint in runs/"
            )
        if not folder.is_dir():
            raise UserError(f"training.start_from is {address}, but there is no such folder")
    with tracking.local_folder(address) as found:
        yield found
