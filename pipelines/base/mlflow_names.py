"""How a filter of MLflow quotes a name; which names it takes stands in `aegan.config`."""


def quoted(text: str) -> str:
    """A text as a value in a filter of MLflow, which has two quotes and no way to escape them."""
    return f'"{text}"' if "'" in text else f"'{text}'"
