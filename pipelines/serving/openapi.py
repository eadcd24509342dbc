"""What the server answers, as OpenAPI and as a page: both made of one description, no network."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from aegan import operations

TEMPLATES = Path(__file__).parents[1] / "pages"
REFUSALS = {
    "400": "Not understood: the message says what is wrong.",
    "403": "Another host name, or sent by a web page.",
    "406": "Not one image, but Accept asks for one.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "Neither JSON nor an image file.",
    "500": "A fault of the server's own.",
    "503": "Too many requests at once: ask again after Retry-After seconds.",
}
ADDRESSES = {
    "/healthz": "The process answers.",
    "/readyz": "A model is served: which version, and whether the alias means it.",
    "/version": "Which model: hashes, sizes, classes.",
    "/metrics": "Counters for Prometheus.",
    "/openapi.json": "This description.",
    "/docs": "This description as a page.",
}
IMAGE = {"type": "string", "contentEncoding": "base64", "description": "an image file"}
LATENT = {"type": "array", "items": {"type": "number"}}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    record = {"type": "object", "properties": {"image": IMAGE, "latent": LATENT}}
    records = {"type": "array", "items": record}
    param = {name: _param(name) for name in operations.SETTINGS}
    param["operation"] = {"enum": list(operations.PARAMS)}
    request = {
        "type": "object",
        "required": ["dataframe_records", "params"],
        "properties": {
            "dataframe_records": records,
            "params": {"type": "object", "required": ["operation"], "properties": param},
        },
        "example": {
            "dataframe_records": [],
            "params": {"operation": "generate", "count": 2, "seed": 7},
        },
    }
    answer = {"type": "object", "properties": {"predictions": records}}
    error = {
        "type": "object",
        "properties": {"error_code": {"type": "string"}, "message": {"type": "string"}},
    }
    refusals = {
        status: {"description": meaning, "content": _json(error)}
        for status, meaning in REFUSALS.items()
    }
    picture = {"schema": {"type": "string", "format": "binary"}}
    invoke = {
        "summary": "Generate, encode, reconstruct or interpolate images.",
        "description": "The body is JSON, or one image file to reconstruct "
        "(?operation=encode for its latent). Accept: image/png gives the one image of the answer.",
        "parameters": [
            {
                "name": "operation",
                "in": "query",
                "description": "of an image file",
                "schema": {"enum": ["encode", "reconstruct"], "default": "reconstruct"},
            }
        ],
        "requestBody": {"required": True, "content": {**_json(request), "image/*": picture}},
        "responses": {
            "200": {
                "description": "One record for each row.",
                "content": {**_json(answer), "image/png": picture},
            },
            **refusals,
        },
    }
    looks = {
        address: {"get": {"summary": summary, "responses": {"200": {"description": "It is so."}}}}
        for address, summary in ADDRESSES.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "AEGAN", "version": "1"},
        "paths": {"/invocations": {"post": invoke}, **looks},
    }


def page() -> str:
    """The same for people, in HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("serving.html.j2").render(
        addresses=ADDRESSES,
        defaults=operations.DEFAULTS,
        operations=operations.PARAMS,
        refusals=REFUSALS,
    )


def _param(name: str) -> dict[str, Any]:
    default = operations.DEFAULTS.get(name)
    return {} if default is None else {"default": default}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
