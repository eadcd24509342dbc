"""The only reader of params.yaml: sections become the dataclasses of `aegan.config`."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from aegan import config, files
from aegan.config import SCHEDULABLE, SECTIONS, ConfigError, Schedule, written
from pipelines.base.errors import UserError
from pipelines.base.files import read_json
from pipelines.base.outputs import SHARDS

PARAMS_FILE = Path("params.yaml")
AUTO = "auto"
DIMENSION = "intrinsic_dimension"  # the manifest's key
GONE = ("compute.compile", "compute.cuda_graphs")  # settings of earlier versions, off by default
Section = TypeVar("Section")

log = logging.getLogger(__name__)


def load(section: type[Section], path: Path = PARAMS_FILE) -> Section:
    """The section of `params.yaml` that belongs to a config class; raises UserError.

    All sections are checked: what is wrong in the last stage's is said before the first one works.
    `TrainConfig` is the three that a training needs: networks, objective, optimisation.
    """
    values = read(path)
    trains = section in (config.ModelConfig, config.TrainConfig)
    sections = _checked(_with_latent_dim(values, unknown=None if trains else 1))
    return next(found for found in sections if type(found) is section)


def _with_latent_dim(values: dict[str, Any], *, unknown: int | None) -> dict[str, Any]:
    """The sections with a number in place of `model.latent_dim: auto`.

    It is the intrinsic dimension that preprocess has found, rounded up (docs/data.md). Before, it
    is `unknown`; None: UserError.
    """
    model = values["model"]
    if not isinstance(model, dict) or model.get("latent_dim") != AUTO:
        return values
    found = unknown
    if unknown is None:
        dimension = read_json(SHARDS / "manifest.json", stage="preprocess").get(DIMENSION)
        if not isinstance(dimension, int | float):
            raise UserError(
                "params.yaml: model.latent_dim is auto, but preprocess has not estimated the "
                "images' intrinsic dimension (it takes 200 training images): run it again, or "
                "write a number"
            )
        found = math.ceil(dimension)
        _say_once(f"model.latent_dim: auto is {found}, for an intrinsic dimension of {dimension}")
    return values | {"model": model | {"latent_dim": found}}


def _checked(values: dict[str, Any]) -> list[Any]:
    """All sections as config objects; raises UserError."""
    sections = {name: _parse(name, values[name], kind) for name, kind in SECTIONS.items()}
    parts = {name: sections[name] for name in get_type_hints(config.TrainConfig)}
    every = [*sections.values(), config.TrainConfig(**parts)]
    try:
        for section in every:
            config.check(section)
    except ConfigError as error:
        raise UserError(f"params.yaml: {error}") from None
    return every


def read(path: Path = PARAMS_FILE) -> dict[str, dict[str, Any]]:
    """All sections as plain values; an unknown or missing section is a UserError."""
    if not path.exists():
        raise UserError(f"{path} not found: run from the project's root folder")
    raw = _with_added_sections(_parsed(path, YAML(typ="safe")))
    _check_keys(f"{path}: sections", raw, list(SECTIONS))
    return raw


def _parsed(path: Path, yaml: YAML) -> dict[str, Any]:
    """What a YAML file of sections holds; raises UserError."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a YAML file") from None
    except (YAMLError, ValueError) as error:  # also of a number with too many digits
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold sections, of {', '.join(SECTIONS)}")
    return found


def _with_added_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """A file of an earlier version, with the sections that are new as a whole."""
    new = [
        name
        for name, kind in SECTIONS.items()
        if all(f"{name}.{field.name}" in config.ADDED for field in dataclasses.fields(kind))
    ]
    return {name: config.with_new_names(name, {}) for name in new} | raw


def _parse(name: str, values: Any, kind: type) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    _check_mapping(f"params.yaml: {name}", values, kind)
    renamed = [
        f"{name}.{key} is called {' and '.join(config.RENAMED[f'{name}.{key}'])} now"
        for key in values
        if f"{name}.{key}" in config.RENAMED
    ]
    if renamed:
        raise UserError(f"params.yaml: {'; '.join(renamed)}: rename it there")
    values = {key: value for key, value in values.items() if not _is_gone(f"{name}.{key}", value)}
    _check_keys(f"params.yaml: keys of {name}", values, list(hints))
    return kind(**{key: _convert(f"{name}.{key}", values[key], hints[key]) for key in hints})


def _check_mapping(where: str, values: Any, kind: type) -> None:
    if not isinstance(values, Mapping):
        keys = (field.name for field in dataclasses.fields(kind))
        raise UserError(f"{where} must hold the keys {', '.join(keys)}")


def _is_gone(key: str, value: Any) -> bool:
    """Whether it is a setting of an earlier version; UserError if it was switched on."""
    if key not in GONE:
        return False
    if value is not False:
        raise UserError(f"params.yaml: {key} is no setting any more: remove the line")
    _say_once(f"params.yaml: {key} is no setting any more; the line can be removed")
    return True


@functools.cache
def _say_once(note: str) -> None:
    """A stage reads the file several times."""
    log.info(note)


def _check_keys(where: str, found: dict[str, Any], expected: list[str]) -> None:
    unknown = [key for key in found if key not in expected]
    missing = [key for key in expected if key not in found]
    if unknown or missing:
        wrong = {"unknown": unknown, "missing": missing, "valid": expected}
        told = (f"{kind}: {', '.join(map(str, keys))}" for kind, keys in wrong.items() if keys)
        raise UserError(f"{where}: {'; '.join(told)}")


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Sections within a section, and whole numbers where any will do; the rest as it is."""
    kind, bounds = config.parts(hint)
    if SCHEDULABLE in bounds and isinstance(value, dict):
        kind = Schedule
    if dataclasses.is_dataclass(kind):
        return _parse(key, value, cast(type, kind))
    if get_origin(kind) is dict and isinstance(value, dict):
        item = get_args(kind)[1]
        return {name: _convert(f"{key}.{name}", entry, item) for name, entry in value.items()}
    if kind is float and type(value) is int:
        with suppress(OverflowError):  # so large that it is out of bounds
            return float(value)
    return value


def as_dict(*sections: Any) -> dict[str, dict[str, Any]]:
    """Config objects back to plain sections, for hashing, logging and JSON."""
    names = {value: key for key, value in SECTIONS.items()}
    return {names[type(section)]: dataclasses.asdict(section) for section in sections}


def apply_overlay(overlay: Path, path: Path = PARAMS_FILE) -> list[str]:
    """Write an overlay's values into params.yaml, keeping comments; returns what changed."""
    if not overlay.exists():
        available = ", ".join(str(file) for file in sorted(Path("presets").glob("*.yaml")))
        raise UserError(f"{overlay} not found; available: {available}")
    return change(_parsed(overlay, YAML(typ="safe")), path, said_by=str(overlay))


def change(
    sections: Mapping[str, Mapping[str, Any]], path: Path = PARAMS_FILE, *, said_by: str
) -> list[str]:
    """Write values into params.yaml, keeping comments and all that is not named.

    Returns what changed. Raises UserError, before anything is written, where they do not fit.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    read(path)  # refuses what is no file of parameters
    document = _parsed(path, yaml)
    changed = []
    for name, values in sections.items():
        if name not in SECTIONS:
            raise UserError(f"{said_by}: unknown section {name}; valid: {', '.join(SECTIONS)}")
        _check_mapping(f"{said_by}: {name}", values, SECTIONS[name])
        section = document.setdefault(name, config.with_new_names(name, {}))
        _check_mapping(f"{path}: {name}", section, SECTIONS[name])
        for key, value in values.items():
            if section.get(key) != value:
                changed.append(f"{name}.{key}: {written(section.get(key))} -> {written(value)}")
                section[key] = value
    text = StringIO()
    yaml.dump(document, text)
    result = _with_added_sections(YAML(typ="safe").load(text.getvalue()))
    _checked(_with_latent_dim(result, unknown=1))
    files.write_text(path, text.getvalue())
    return changed


def write_overlay(values: dict[str, Any], file: Path, *, comment: str) -> None:
    """Write settings by their dotted names, `loss.gamma_image`, as an overlay of params.yaml."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    text = StringIO()
    YAML().dump(sections, text)
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    file.write_text(lines + text.getvalue(), encoding="utf-8")
