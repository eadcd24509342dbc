"""The only reader of params.yaml: sections become the dataclasses of `aegan.config`."""

import dataclasses
import functools
import json
import logging
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from aegan import config, files
from pipelines.base import mlflow_names
from pipelines.base.errors import UserError

PARAMS_FILE = Path("params.yaml")
SECTIONS: dict[str, type] = {
    "data": config.DataConfig,
    "preprocess": config.PreprocessConfig,
    "model": config.ModelConfig,
    "loss": config.LossConfig,
    "training": config.TrainingConfig,
    "compute": config.ComputeConfig,
    "tune": config.TuneConfig,
    "evaluate": config.EvaluateConfig,
    "interpolate": config.InterpolateConfig,
    "register": config.RegisterConfig,
}
GONE = ("compute.compile", "compute.cuda_graphs")  # settings of earlier versions, off by default
Section = TypeVar("Section")

log = logging.getLogger(__name__)


def load(section: type[Section], path: Path = PARAMS_FILE) -> Section:
    """The section of `params.yaml` that belongs to a config class; raises UserError.

    All sections are checked: what is wrong in the last stage's is said before the first one works.
    """
    sections = {name: parse_section(name, values) for name, values in read(path).items()}
    mlflow_names.check(sections["register"])
    name = next(key for key, value in SECTIONS.items() if value is section)
    return cast(Section, sections[name])


def load_train_config(path: Path = PARAMS_FILE) -> config.TrainConfig:
    """What a training needs: networks, objective, optimisation."""
    return config.TrainConfig(
        model=load(config.ModelConfig, path),
        loss=load(config.LossConfig, path),
        training=load(config.TrainingConfig, path),
    )


def read(path: Path = PARAMS_FILE) -> dict[str, dict[str, Any]]:
    """All sections as plain values; an unknown or missing section is a UserError."""
    if not path.exists():
        raise UserError(f"{path} not found: run from the project's root folder")
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold the sections {', '.join(SECTIONS)}")
    _check_keys(f"{path}: sections", raw, list(SECTIONS))
    return raw


def parse_section(name: str, values: Any) -> Any:
    """One section's values as its dataclass; names the key, what is wrong and what is allowed."""
    return _parse(name, values, SECTIONS[name])


def _parse(name: str, values: Any, kind: type) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(values, dict):
        raise UserError(f"params.yaml: {name} must hold the keys {', '.join(hints)}")
    for key in values:
        if (new := config.RENAMED.get(f"{name}.{key}")) is not None:
            raise UserError(f"params.yaml: {name}.{key} is called {new} now: rename it there")
    values = {key: value for key, value in values.items() if not _is_gone(f"{name}.{key}", value)}
    _check_keys(f"params.yaml: keys of {name}", values, list(hints))
    return kind(**{key: _convert(f"{name}.{key}", values[key], hints[key]) for key in hints})


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


def _convert(key: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            allowed = ", ".join(map(str, get_args(kind)))
            raise UserError(f"params.yaml: {key} is {_written(value)}; allowed: {allowed}")
        return value
    if dataclasses.is_dataclass(kind):
        return _parse(key, value, cast(type, kind))
    if get_origin(kind) is dict:  # any names, values of one kind
        if not isinstance(value, dict):
            raise UserError(
                f"params.yaml: {key} is {_written(value)}; expected names with their values"
            )
        item = get_args(kind)[1]
        return {name: _convert(f"{key}.{name}", entry, item) for name, entry in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"params.yaml: {key} is {_written(value)}; expected {kind.__name__}")
    return value


def _written(value: Any) -> str:
    """A value much as it stands in the file."""
    if value is None:
        return "empty"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)


def as_dict(*sections: Any) -> dict[str, dict[str, Any]]:
    """Config objects back to plain sections, for hashing, logging and JSON."""
    names = {value: key for key, value in SECTIONS.items()}
    return {names[type(section)]: dataclasses.asdict(section) for section in sections}


def apply_overlay(overlay: Path, path: Path = PARAMS_FILE) -> list[str]:
    """Write an overlay's values into params.yaml, keeping comments; returns what changed."""
    if not overlay.exists():
        available = ", ".join(str(file) for file in sorted(Path("presets").glob("*.yaml")))
        raise UserError(f"{overlay} not found; available: {available}")
    yaml = YAML()
    document = yaml.load(path.read_text(encoding="utf-8"))
    changed = []
    for name, values in YAML(typ="safe").load(overlay.read_text(encoding="utf-8")).items():
        if name not in SECTIONS:
            raise UserError(f"{overlay}: unknown section {name}; valid: {', '.join(SECTIONS)}")
        for key, value in values.items():
            if document[name].get(key) != value:
                before = _written(document[name].get(key))
                changed.append(f"{name}.{key}: {before} -> {_written(value)}")
            document[name][key] = value
    text = StringIO()
    yaml.dump(document, text)
    for name, values in YAML(typ="safe").load(text.getvalue()).items():
        parse_section(name, values)
    files.write_text(path, text.getvalue())
    return changed


def write_overlay(values: dict[str, Any], file: Path, *, comment: str) -> None:
    """Write settings by their dotted names, `loss.gamma`, as an overlay of params.yaml."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    text = StringIO()
    YAML().dump(sections, text)
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    file.write_text(lines + text.getvalue(), encoding="utf-8")
