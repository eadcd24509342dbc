"""A training that begins with the weights of a trained model instead of random ones.

They become a run's checkpoint of step 0, from which the training loop goes on as from any other.
The files are anyone's: only tensors of the expected names, shapes and type are read.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aegan.config import ConfigError, TrainConfig, with_new_names
from aegan.files import sha256_of
from aegan.losses import OBJECTIVES
from aegan.model_folder import CONFIG, FILES, ModelError, read_description
from aegan.training import checkpoint
from aegan.training.run_folder import RunFolder
from aegan.training.state import TrainingState


@dataclass(frozen=True, kw_only=True)
class Start:
    """The weights to begin with, named as in a checkpoint, `model.generator.stem.weight`."""

    tensors: dict[str, Tensor]
    sha256: str  # of their names, shapes and values
    networks: tuple[str, ...]  # that are taken; the others start from random weights


def read(folder: Path, config: TrainConfig, manifest: dict[str, Any]) -> Start:
    """The weights in a model folder or checkpoint that a training of `config` can use.

    Raises ConfigError with everything that does not fit, CheckpointError if files are damaged.
    """
    like = TrainingState(config, manifest, torch.device("cpu"))
    wanted = OBJECTIVES[config.training.arm].networks
    if (folder / CONFIG).exists():
        description, files = _of_model(folder)
    elif (folder / checkpoint.STATE).exists():
        description, files = _of_checkpoint(folder)
    else:
        raise ConfigError(
            f"{folder} is neither a model ({CONFIG}, {', '.join(FILES.values())}) nor a "
            f"checkpoint ({checkpoint.STATE}, {checkpoint.TENSORS})"
        )

    # What differs, by the names of the settings.
    here = {f"model.{key}": value for key, value in vars(config.model).items()}
    here |= {key: manifest[key] for key in ("image_size", "image_channels")}
    there = {f"model.{key}": value for key, value in description["model"].items()}
    there |= {key: description[key] for key in ("image_size", "image_channels")}
    if config.model.num_classes:
        here["classes"], there["classes"] = manifest["classes"], description["classes"]
    problems = [
        f"{key} is {there.get(key)} there and {value} here"
        for key, value in here.items()
        if there.get(key) != value
    ]
    if "encoder" in wanted and "encoder" not in description["networks"]:
        problems.append(f"it has no encoder, which training.arm: {config.training.arm} needs")
    if problems:
        raise ConfigError(
            f"{folder} does not fit: {'; '.join(problems)}; change these settings or start from "
            "another model"
        )

    taken = tuple(name for name in wanted if name in description["networks"])
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("model", like.model), ("ema", like.ema)):
        file, inside = files[prefix]
        expected = {
            name: tensor
            for name, tensor in module.state_dict().items()
            if name.split(".")[0] in taken
        }
        found = _read_tensors(file, expected, prefix=inside)
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in found.items()}
    return Start(tensors=tensors, sha256=_sha256(tensors), networks=taken)


def begin(
    start: Start, config: TrainConfig, manifest: dict[str, Any], run_folder: Path, *, address: str
) -> None:
    """Write the checkpoint of step 0: these weights, fresh optimisers; raises OSError."""
    state = TrainingState(config, manifest, torch.device("cpu"))
    modules = {"model": state.model, "ema": state.ema}
    weights = {f"{p}.{name}": t for p in modules for name, t in modules[p].state_dict().items()}
    for name, tensor in start.tensors.items():
        weights[name].copy_(tensor)
    state.start = record(start, address)
    state.save(RunFolder(run_folder).checkpoints)


def record(start: Start, address: str) -> dict[str, Any]:
    """What is remembered of it: in checkpoints, run.json, the report and MLflow."""
    return {"address": address, "sha256": start.sha256, "networks": list(start.networks)}


Files = dict[str, tuple[Path, str]]  # for raw and averaged weights: a file, and a prefix in it


def _of_model(folder: Path) -> tuple[dict[str, Any], Files]:
    try:
        found = read_description(folder / CONFIG)
        description = {
            "model": dict(found["model"]),
            "networks": ["generator", *["encoder"] * bool(found["has_encoder"])],
            "classes": found.get("classes", []),
            **{key: found[key] for key in ("image_size", "image_channels")},
        }
        hashes = dict(found.get("sha256", {}))  # none in a folder from before they were recorded
    except ModelError as error:
        raise ConfigError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder / CONFIG} does not describe a model") from None
    for file in (folder / FILES["raw"], folder / FILES["ema"]):
        if not file.is_file():
            raise ConfigError(f"{file} is missing")
        if file.name in hashes and hashes[file.name] != sha256_of(file):
            raise ConfigError(f"{file} is not the file that {CONFIG} was written for")
    return description, {"model": (folder / FILES["raw"], ""), "ema": (folder / FILES["ema"], "")}


def _of_checkpoint(folder: Path) -> tuple[dict[str, Any], Files]:
    state = checkpoint.verify(folder)
    try:
        description = {
            "model": with_new_names("model", state["config"]["model"]),
            "networks": OBJECTIVES[state["config"]["training"]["arm"]].networks,
            "classes": state.get("classes", []),
            **{key: state[key] for key in ("image_size", "image_channels")},
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder / checkpoint.STATE} does not describe a model") from None
    file = folder / checkpoint.TENSORS
    return description, {"model": (file, "model."), "ema": (file, "ema.")}


def _read_tensors(file: Path, expected: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """The tensors of these names; nothing is allocated before all shapes are known to be right."""
    try:
        with safe_open(file, framework="pt") as content:
            present = set(content.keys())
            for name, like in expected.items():
                if prefix + name not in present:
                    raise ConfigError(f"{file} lacks {prefix}{name}")
                header = content.get_slice(prefix + name)
                shape, kind = tuple(header.get_shape()), header.get_dtype()
                if shape != tuple(like.shape) or kind != "F32":
                    raise ConfigError(
                        f"{file}: {prefix}{name} is {kind} {list(shape)}; expected F32 "
                        f"{list(like.shape)}"
                    )
            tensors = {name: content.get_tensor(prefix + name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"{file}: {prefix}{name} holds values that are not finite")
    return tensors


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
