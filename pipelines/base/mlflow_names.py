"""Which names MLflow takes, said before a training and not after it; how a filter quotes them."""

import re

from aegan.config import RegisterConfig
from pipelines.base.errors import UserError
from pipelines.base.names import shown

MAX_LETTERS = 250
ALIAS = re.compile(r"[\w-]+", re.ASCII)
RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
IN_ADDRESSES = "/:@?#"  # they part an address, `models:/name@alias`


def check(config: RegisterConfig) -> None:
    """UserError if MLflow, its filters or an address could not hold the names in params.yaml."""
    for key, value in (("experiment", config.experiment), ("model_name", config.model_name)):
        if not _is_text(value):
            raise UserError(
                f"params.yaml: register.{key} is '{shown(value)}'; expected 1 to {MAX_LETTERS} "
                "printable letters without blanks around them"
            )
    name, alias = config.model_name, config.alias
    wrong = [letter for letter in IN_ADDRESSES if letter in name]
    if wrong or name in (".", "..") or name.endswith("\\") or ("'" in name and '"' in name):
        reason = f"holds {wrong[0]}" if wrong else "is none that MLflow can look for"
        raise UserError(
            f"params.yaml: register.model_name is '{shown(name)}', which {reason}; expected "
            "letters, digits, blanks, - and _"
        )
    if not ALIAS.fullmatch(alias) or RESERVED_ALIAS.fullmatch(alias) or len(alias) > MAX_LETTERS:
        raise UserError(
            f"params.yaml: register.alias is '{shown(alias)}'; expected letters, digits, - and _, "
            "but not latest or v and a number, which MLflow keeps for itself"
        )


def quoted(text: str) -> str:
    """A text as a value in a filter of MLflow, which has two quotes and no way to escape them."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _is_text(value: str) -> bool:
    return value == value.strip() and value.isprintable() and 0 < len(value) <= MAX_LETTERS
