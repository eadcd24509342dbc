"""Pages for people: one file each, from the templates in `pipelines/pages`."""

import base64
from pathlib import Path
from typing import Any

import jinja2

PAGES = Path(__file__).parents[1] / "pages"


def render(template: str, **values: Any) -> str:
    """A page as HTML; a value that the template asks for and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def address(png: bytes) -> str:
    """The bytes of a PNG file => a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
