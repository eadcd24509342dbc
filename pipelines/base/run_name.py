"""The name of a run, by which a training finds its own checkpoints again."""

from importlib.metadata import version

from aegan.config import TrainConfig, identity
from aegan.files import sha256_of_json
from pipelines.base.identity import weights_code_sha256


def run_name(config: TrainConfig, dataset_sha256: str, *, start_sha256: str = "") -> str:
    """A name that changes with what determines the weights after any step, and nothing else.

    That is data, parameters, code, PyTorch, and the weights started from; not how many steps.
    """
    content = [
        identity(config),
        dataset_sha256,
        start_sha256,
        weights_code_sha256(),
        version("torch"),
    ]
    return f"{config.training.arm}-{sha256_of_json(content)[:12]}"
