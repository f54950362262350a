"""The OpenAPI document: requests by their types, responses by an example of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from ivl.serve.schemas import ChatRequest, CompletionRequest, TokenizeRequest

EXAMPLES: dict[str, Any] = json.loads(Path(__file__).with_name("responses.json").read_text("utf-8"))
"""A response of each kind. Fields that may be null, such as logprobs, are null or have this shape."""
_TYPES = {str: "string", int: "integer", float: "number"}
_NULLABLE = ("param", "code", "logprobs", "refusal")


def described(text: str, kind: str) -> dict[str, Any]:
    """Return the description of a response that looks like an example."""
    content = {"schema": {"$ref": f"#/components/schemas/{kind}"}, "example": EXAMPLES[kind]}
    return {"description": text, "content": {"application/json": content}}


def _schema_of(value: Any, *, nullable: bool = False) -> dict[str, Any]:
    """Return the JSON schema of values like this one."""
    if isinstance(value, dict):
        fields = {key: _schema_of(item, nullable=key in _NULLABLE) for key, item in value.items()}
        schema: dict[str, Any] = {"type": "object", "properties": fields, "required": list(fields)}
    elif isinstance(value, list):
        schema = {"type": "array", "items": _schema_of(value[0])}
    else:
        schema = {"type": _TYPES.get(type(value), "string")}
    return schema | {"type": [schema["type"], "null"]} if nullable else schema


def document(app: FastAPI) -> dict[str, Any]:
    """Return the routes as FastAPI sees them, with the bodies that they read themselves, and how to give a key."""
    openapi = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    kinds = (ChatRequest, CompletionRequest, TokenizeRequest)
    _, bodies = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}")
    openapi["components"] = {
        "schemas": bodies["$defs"] | {kind: _schema_of(example) for kind, example in EXAMPLES.items()},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    openapi["security"] = [{"key": []}]
    openapi["paths"]["/health"]["get"]["security"] = []
    for path in openapi["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return openapi
