"""A trained model as a folder: written by `write`, read by `load`, as untrusted as an image file.

    config.json                   sizes of the networks, how images become square, hashes of weights
    ema.safetensors               averaged weights of generator and encoder
    weights.safetensors           those of the last step
    latents.safetensors           the density of the averaged encoder's latents, if it was fitted
    discriminators.safetensors    the discriminators of the last step, if there are any: for export

`format_version` in config.json grows when a field changes; every earlier version is read.
Sizes are compared before anything of their size is allocated; nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_in
from torch import Tensor

from aegan.config import ConfigError, ModelConfig, ValueRange, check_classes, with_new_names
from aegan.data.image_files import Fit, Form
from aegan.files import save_tensors, sha256_of, write_json
from aegan.latent_density import LatentDensity, check_shapes, from_tensors, tensors_of
from aegan.networks import AEGAN
from aegan.networks.model import DISCRIMINATORS

Weights = Literal["ema", "raw"]

CONFIG = "config.json"
FILES: dict[Weights, str] = {"ema": "ema.safetensors", "raw": "weights.safetensors"}
LATENTS = "latents.safetensors"
DISCRIMINATOR_WEIGHTS = "discriminators.safetensors"
OPTIONAL = (LATENTS, DISCRIMINATOR_WEIGHTS)
# 1: none was written, and model.architecture was called model.preset; 2: had no model.prior and
# nothing optional.
FORMAT_VERSION = 3
MAX_PARAMETERS = 2**30  # of the networks that are loaded: 4 GiB
MAX_HEADER_BYTES = 2**20  # of a file of weights, and of config.json
MAX_SHOWN = 60  # characters of a value in a message


class ModelError(ValueError):
    """A model's folder that cannot be loaded; the message names the file and the cure."""


class Model(AEGAN):
    """The networks of a model's folder, with what it says of the images they were trained on.

    Networks alone, as in training, know the size of images and nothing of files.
    """

    fit: Fit = "crop"
    value_range: str = "full"  # how samples deeper than 8 bits become grey levels

    @property
    def form(self) -> Form:
        """What image files become before the encoder sees them."""
        return Form(
            image_size=self.image_size,
            image_channels=self.image_channels,
            fit=self.fit,
            value_range=self.value_range,
        )


def write(
    folder: Path,
    description: dict[str, Any],
    weights: dict[Weights, dict[str, Tensor]],
    judges: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a model of this description and these tensors; returns config.json.

    `judges` are the tensors of the discriminators that the description names. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {FILES[kind]: tensors for kind, tensors in weights.items()}
    files |= {DISCRIMINATOR_WEIGHTS: dict(judges)} if judges else {}
    for name, tensors in files.items():
        save_tensors(tensors, folder / name)
    hashes = {name: sha256_of(folder / name) for name in files}
    config = {"format_version": FORMAT_VERSION, **description, "sha256": hashes}
    write_json(folder / CONFIG, config)
    return config


def add_latents(folder: Path, density: LatentDensity) -> None:
    """Put the density of the averaged encoder's latents into a model's folder; raises OSError."""
    metadata = {"classes": json.dumps(density.classes)}
    save_tensors(tensors_of(density), folder / LATENTS, metadata=metadata)
    config = read_description(folder / CONFIG)
    config["sha256"][LATENTS] = sha256_of(folder / LATENTS)
    write_json(folder / CONFIG, config)


def files_of(description: dict[str, Any]) -> list[str]:
    """The files of a model with this config.json, whoever wrote it."""
    optional = [name for name in OPTIONAL if _recorded_hash(description, name) is not None]
    return [CONFIG, *FILES.values(), *optional]


def load(
    folder: str | os.PathLike[str], *, weights: Weights = "ema", discriminators: bool = False
) -> Model:
    """A trained model's generator and encoder, ready to use; raises ModelError.

    `ema`: the averaged weights, which draw the better images, with the density of their latents;
    `raw`: those of the last step. `discriminators`: also those that the folder has, which nothing
    but an export needs.
    """
    if weights not in FILES:
        raise ValueError(f"weights is {weights}; it must be one of {', '.join(FILES)}")
    config_file, weights_file = Path(folder) / CONFIG, Path(folder) / FILES[weights]
    try:
        config = read_description(config_file)
        discriminators = discriminators and DISCRIMINATOR_WEIGHTS in files_of(config)
        model = _build(config, config_file, discriminators=discriminators)
        expected, judges = model.state_dict(), {}
        for name in [name for name in expected if name.split(".")[0] in DISCRIMINATORS]:
            judges[name] = expected.pop(name)
        tensors = _read_weights(weights_file, expected, config)
        if judges:
            tensors |= _read_weights(Path(folder) / DISCRIMINATOR_WEIGHTS, judges, config)
        if weights == "ema" and LATENTS in files_of(config):
            model.latent_density = _read_latents(Path(folder) / LATENTS, config, model.latent_dim)
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise ModelError(f"{error.filename or folder} cannot be read: {reason}") from None
    model.to_empty(device="cpu").load_state_dict(tensors)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def read_description(file: Path) -> dict[str, Any]:
    """A config.json of any version, as one of today's; raises ModelError, OSError.

    Its fields are anyone's: none is checked here but the version.
    """
    _check_exists(file)
    if file.stat().st_size > MAX_HEADER_BYTES:
        raise _damaged(file, f"more than {MAX_HEADER_BYTES} bytes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(file, "not JSON") from None
    if not isinstance(config, dict):
        raise _damaged(file, "not a JSON object")
    version = config.get("format_version", 1)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ModelError(
            f"{file} has format_version {_shown(version)}, this version of aegan reads 1 to "
            f"{FORMAT_VERSION}: load it with the version that wrote it, or a newer one"
        )
    if version < FORMAT_VERSION and isinstance(config.get("model"), dict):
        config["model"] = with_new_names("model", config["model"])
    return config


def _build(config: dict[str, Any], file: Path, *, discriminators: bool) -> Model:
    """The networks that a config.json describes, without memory for their weights yet."""

    def field(section: Any, name: str, kind: type, expected: str) -> Any:
        value = section.get(name) if isinstance(section, dict) else None
        if type(value) is not kind:  # true is no number
            raise _damaged(file, f"{name} is {_shown(value)}, expected {expected}")
        return value

    networks = field(config, "model", dict, "an object")
    sizes = ModelConfig(
        architecture=field(networks, "architecture", str, "a name"),
        latent_dim=field(networks, "latent_dim", int, "a whole number"),
        prior=field(networks, "prior", str, "a name"),
        base_channels=field(networks, "base_channels", int, "a whole number"),
    )
    unknown = networks.keys() - vars(sizes).keys()
    if unknown:
        raise _damaged(file, f"{_shown(min(unknown))} is no setting of a model")
    fit, fits = field(config, "fit", str, "a name"), get_args(Fit)
    if fit not in fits:
        raise _damaged(file, f"fit is {_shown(fit)}, expected {' or '.join(fits)}")
    value_range = field({"value_range": "full"} | config, "value_range", str, "a range")
    try:
        ValueRange.parse(value_range)
    except ValueError:
        expected = "expected full or as in 0..4095"
        raise _damaged(file, f"value_range is {_shown(value_range)}, {expected}") from None
    classes = field({"classes": []} | config, "classes", list, "a list of names")
    if not all(isinstance(name, str) for name in classes):
        raise _damaged(file, "classes holds something else than names")
    judges = field({"discriminators": []} | config, "discriminators", list, "a list of names")
    if not all(name in DISCRIMINATORS for name in judges):
        raise _damaged(
            file, f"discriminators holds something else than {', '.join(DISCRIMINATORS)}"
        )
    try:
        with torch.device("meta"):
            model = Model(
                sizes,
                image_size=field(config, "image_size", int, "a whole number"),
                image_channels=field(config, "image_channels", int, "a whole number"),
                encoder=field(config, "has_encoder", bool, "true or false"),
                discriminators=discriminators,
                packing=field({"packing": 1} | config, "packing", int, "a whole number"),
            )
        check_classes(sizes, classes)
    except ConfigError as error:
        raise _damaged(file, str(error)) from None
    for name in set(DISCRIMINATORS) - set(judges):
        setattr(model, name, None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise _damaged(file, f"networks of {parameters} weights, at most {MAX_PARAMETERS}")
    model.fit, model.value_range = fit, value_range
    model.classes = tuple(classes) if sizes.num_classes else ()
    return model


def _recorded_hash(config: dict[str, Any], name: str) -> Any:
    """What config.json says of a file; None in a folder from before hashes were recorded."""
    hashes = config.get("sha256", {})
    return hashes.get(name) if isinstance(hashes, dict) else hashes


def _read_weights(
    file: Path, expected: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Tensors of the names and shapes of those expected, which have no memory yet."""
    recorded = _recorded_hash(config, file.name)
    tensors, _ = _read_tensors(file, lambda found: _compare(found, expected, file), recorded)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _damaged(file, "weights that are not finite numbers")
    return tensors


def _read_latents(file: Path, config: dict[str, Any], latent_dim: int) -> LatentDensity:
    try:
        tensors, metadata = _read_tensors(
            file,
            lambda found: check_shapes(found, latent_dim=latent_dim),
            _recorded_hash(config, LATENTS),
        )
        classes = json.loads(metadata.get("classes", "[]"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are no list of names")
        return from_tensors(tensors, classes)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from None


Found = dict[str, tuple[str, list[int]]]  # name of a tensor => its type and shape


def _read_tensors(
    file: Path, check: Callable[[Found], None], recorded: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, once `check` has passed what its header says, and its metadata."""
    _check_exists(file)
    with file.open("rb") as content:
        if int.from_bytes(content.read(8), "little") > MAX_HEADER_BYTES:
            raise _damaged(file, "no file of weights")
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        check(found)
        bytes_read = file.read_bytes()
        if recorded is not None and hashlib.sha256(bytes_read).hexdigest() != recorded:
            raise _damaged(file, f"its SHA-256 is not the one in {CONFIG}")
        tensors = tensors_in(bytes_read)
    except SafetensorError as error:
        raise _damaged(file, str(error)) from None
    return tensors, metadata


def _compare(found: Found, tensors: dict[str, Tensor], file: Path) -> None:
    """Refuse tensors other than those of the networks, by the first name that differs."""
    expected = {name: ("F32", list(value.shape)) for name, value in tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            held, wanted = (
                "nothing" if one is None else f"{one[0]} {one[1]}"
                for one in (found.get(name), expected.get(name))
            )
            raise _damaged(
                file, f"{_shown(name)} is {held}, the networks of {CONFIG} have {wanted}"
            )


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise ModelError(
            f"{file.parent} holds no trained model: {file.name} is missing; `make run` trains one"
        )


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(f"{file} cannot be used: {reason}; copy or train it again")


def _shown(value: Any) -> str:
    """A value of config.json as it stands there, cut where it is long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
