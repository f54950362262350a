"""Serves the page: static files, which need no key, and the facts and examples of the model, which do.

The page asks /v1/chat/completions as every client does, and keeps the conversation in the browser's memory alone.
"""

from __future__ import annotations

import json
import mimetypes
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ivl.errors import InputError
from ivl.utils.files import real, write_json
from ivl.utils.strict_json import from_json, read_json

if TYPE_CHECKING:
    from fastapi import FastAPI, Response

EXAMPLES = "examples.json"
"""File in the model's directory: a JSON list of {"text": ..., "images": [file names]} that the model can answer."""
FILES = {
    "/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"), "/rules.js": ("rules.js", "text/javascript"),
}  # fmt: skip
"""The files by path. They are the same for every model, so they are open: the page itself asks for the key."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
LIMITS = ("max_body_bytes", "max_frames", "max_image_tiles", "max_images", "max_new_tokens", "max_videos")
"""Limits of the server that the page shows, or checks before it sends."""


@dataclass(frozen=True)
class PageExample:
    """An example question and its images, which are files beside the model."""

    text: str
    images: tuple[str, ...] = ()


def read_examples(directory: Path) -> list[PageExample]:
    """Return the example questions of a model.

    Raises:
        InputError: if the file is not a list of {"text", "images"}, or names an image outside the directory.
    """
    path = directory / EXAMPLES
    rows = read_json(path) if path.exists() else []
    if not isinstance(rows, list):
        raise InputError(f'{path}: not a list of {{"text": ..., "images": [...]}}')
    examples = [from_json(PageExample, row, f"{path}: [{number}]") for number, row in enumerate(rows)]
    for name in (name for example in examples for name in example.images):
        if not _is_inside(directory, name):
            raise InputError(f"{path}: {name!r} is not a file beside the model")
    return examples


def _is_inside(directory: Path, name: str) -> bool:
    try:
        path = real(directory / name)
        return path.is_relative_to(real(directory)) and path.is_file()
    except (OSError, ValueError):  # no name of a file
        return False


def write_examples(directory: Path, examples: list[tuple[str, list[Path]]]) -> None:
    """Write example questions, with copies of their images, beside a model."""
    (directory / "examples").mkdir(exist_ok=True)
    rows = []
    for number, (text, images) in enumerate(examples):
        names = [f"examples/{number}-{n}{image.suffix}" for n, image in enumerate(images)]
        for name, image in zip(names, images, strict=True):
            (directory / name).write_bytes(image.read_bytes())
        rows.append({"text": text, "images": names})
    write_json(directory / EXAMPLES, rows)


def add_page(app: FastAPI, directory: Path) -> None:
    """Add the page of the model in a directory to an application. Raises InputError as `read_examples` does."""
    from fastapi.responses import Response  # here, since write_examples needs no server

    from ivl.checkpoint.model_dir import empty_model

    examples, config, service = read_examples(directory), app.state.config, app.state.service
    names = dict.fromkeys(name for example in examples for name in example.images)
    images = {name: f"page/images/{number}" for number, name in enumerate(names)}
    model = {
        "name": config.names[0], "max_context": service.engine.max_context,
        "parameters": sum(parameter.numel() for parameter in empty_model(service.engine.model.config).parameters()),
        "tiling": asdict(service.processor.tiling), "limits": {name: getattr(config, name) for name in LIMITS},
        "examples": [{"text": example.text, "images": [images[name] for name in example.images]} for example in examples],
    }  # fmt: skip
    static = resources.files("ivl.serve") / "static"
    contents = {path: ((static / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
    contents["/page/model"] = (json.dumps(model).encode(), "application/json")
    for name, path in images.items():
        contents[f"/{path}"] = ((directory / name).read_bytes(), mimetypes.guess_type(name)[0] or "application/octet-stream")

    def send(content: bytes, kind: str) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    for path, content in contents.items():
        app.add_api_route(path, partial(send, *content), methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
